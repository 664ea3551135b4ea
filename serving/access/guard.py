"""How a server is guarded: its options, whether it may listen where it is told to, TLS, and the first key."""

import argparse
import ipaddress
import json
import shlex
import ssl
from pathlib import Path

from serving.access import secrets
from serving.access.audit import Chain
from serving.access.door import Door, open_door
from serving.access.opening import FOLDER, Opened, open_state
from serving.access.tokens import Provider


def add_guard(parser: argparse.ArgumentParser) -> None:
    """Adds the options to those of a server."""
    guard = parser.add_argument_group("who may use it", "keys are made with python -m serving keys create --role ROLE")
    guard.add_argument("--state", type=Path, default=FOLDER, help="folder of keys, limits and audit (%(default)s)")
    guard.add_argument("--insecure", action="store_true", help="listen beyond this machine without keys or TLS")
    guard.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate, and those that it is signed with")
    guard.add_argument("--tls-key", type=Path, metavar="FILE", help="its key; nobody else may be able to read it")
    guard.add_argument("--tls-client-ca", type=Path, metavar="FILE", help="only clients with a certificate of this CA")
    guard.add_argument("--jwt-keys", metavar="JWKS", help="file or https address of a provider's keys: tokens let in")
    guard.add_argument("--jwt-issuer", default="", metavar="ISS", help="whose tokens")
    guard.add_argument("--jwt-audience", default="", metavar="AUD", help="for whom they have to be made")
    guard.add_argument("--audit-strict", action="store_true", help="refuse all that cannot be written into the audit")
    guard.add_argument("--audit-texts", action="store_true", help="bodies of requests go into the audit, too")


def is_local(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def open_guard(options: argparse.Namespace) -> tuple[Opened, Door]:
    """The state folder and the gate that options name, if it is safe to listen where they say.

    Raises ValueError or OSError.
    """
    opened, provider = open_safe(options)
    return opened, open_door(opened, provider, strict=options.audit_strict, texts=options.audit_texts)


def open_safe(options: argparse.Namespace) -> tuple[Opened, Provider | None]:
    """The state folder and the provider of tokens, if it is safe to listen. Raises ValueError or OSError."""
    provider = None
    if options.jwt_keys:
        provider = Provider(options.jwt_keys, options.jwt_issuer, options.jwt_audience)
    elif options.jwt_issuer or options.jwt_audience:
        raise ValueError("--jwt-issuer and --jwt-audience say nothing without --jwt-keys")
    opened = open_state(options.state)
    _ = opened.roles  # a mistake in them is told before anything starts
    require_safe(options, opened, provider)
    return opened, provider


def require_safe(options: argparse.Namespace, opened: Opened, provider: Provider | None) -> None:
    """Raises ValueError where a server would listen beyond this machine without keys and TLS."""
    if is_local(options.host) or options.insecure:
        return
    wanting = [] if options.tls_cert else ["--tls-cert and --tls-key"]
    now = opened.keys.now()
    if provider is None and not any(key.usable(now) for key in opened.keys.all()):
        wanting.append("a key (python -m serving keys create --role admin)")
    if wanting:
        told = f"--host {options.host} is reached from other machines: it needs {' and '.join(wanting)}"
        raise ValueError(f"{told}, or --insecure")


def tls(options: argparse.Namespace) -> dict:
    """The settings of uvicorn for TLS 1.2 or later, with certificates of clients if they are asked for; {} without.

    Raises ValueError or OSError for files that are not what they should be.
    """
    cert, key, clients = options.tls_cert, options.tls_key, options.tls_client_ca
    if not (cert or key or clients):
        return {}
    if not (cert and key):
        raise ValueError("TLS needs both --tls-cert and --tls-key")
    secrets.private(key)
    context = tls_context(cert, key, clients)
    return {"ssl_context_factory": lambda config, default: context}


def tls_context(cert: Path, key: Path, clients: Path | None) -> ssl.SSLContext:
    """A server's side of TLS 1.2 and 1.3."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")  # an encrypted key is refused, not asked about
        if clients:
            context.load_verify_locations(clients)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        files = ", ".join(str(file) for file in (cert, key, clients) if file)
        raise ValueError(f"{files}: not a certificate, its key and a CA in PEM: {error.reason}") from None
    return context


def first_key(
    options: argparse.Namespace, opened: Opened, chain: Chain, address: str, ask: tuple[str, dict | None]
) -> str:
    """What is printed when a server listens: its address, and at a first start a curl line with a key that works.

    ask: (path, body) of a request that its model answers; no body: GET.
    """
    if not is_local(options.host):
        return address
    made = opened.keys.create_first("admin", made_by="first start")
    if made is None:
        return address
    key, text = made
    chain.note({"who": "first start", "role": "admin", "action": "keys create", "subject": key.id})
    path, body = ask
    cert = ["--cacert", str(options.tls_cert)] if options.tls_cert else []
    words = ["curl", *cert, f"{address}{path}", "-H", f"Authorization: Bearer {text}"]
    words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body else []
    return f"{address}\nfirst start: this admin key is shown once; try\n{shlex.join(words)}"
