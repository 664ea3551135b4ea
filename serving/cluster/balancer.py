"""The balancer before the replicas: haproxy, its configuration as text, and what it is told while it runs.

What its configuration rests on, found by killing and stopping replicas of haproxy 2.6
(tests/long/test_cluster_haproxy.py): a request is sent again to another replica as long as nothing of the answer has
come, if it is held whole in one buffer (`option http-buffer-request`) and the first replica closes its connection,
refuses it or answers 503. haproxy copies such a buffer whole, whatever is in it, so that every request pays for a large
one: 4 MiB cost milliseconds. Bodies of more than `kept_bytes` pass, but are not sent again. A stopped process keeps its
connections open, so that nothing is sent again before the supervisor kills it; `on-marked-down shutdown-sessions` would
not wait for that, but would also cut the streams of a replica that drains or is slow for a moment. After the first byte
a broken connection is passed on as such.
"""

import asyncio
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from serving.errors import ApiError

PROGRAM = "haproxy"
ROUTINGS = ("least", "prefix")
HEADERS_BYTES = 16 * 1024  # of a request, beside its body in the same buffer
PREFIX_BYTES = 1024  # of a prompt's start, by which routing=prefix chooses
ROUTE_HEADER = "x-route-key"  # of a client that knows better what belongs together
OVERLOAD = 150  # percent of the mean load at which routing=prefix takes the next replica
CHECK_MS, FAST_MS = 400, 200  # between readiness checks, and after the first that failed
# Clients get two answers that no replica gave: none was there, or none came in time.
UNANSWERED = {
    400: "the request is not HTTP as this server reads it",
    408: "the request did not arrive in time",
    413: "the body is larger than this server takes",
    500: "the balancer failed",
    502: "what the replica answers is not HTTP",
    503: "no replica is ready",
    504: "no replica answered in time",
}
RETRY_AFTER = 2.0


@dataclass(frozen=True)
class Balancer:
    """What the configuration depends on."""

    folder: Path  # of the sockets; nobody else may enter it
    sockets: tuple[Path, ...]  # of the replicas, the first is replica 1
    host: str = "127.0.0.1"
    port: int = 8000
    routing: str = "least"
    body_bytes: int = 4 << 20  # of the largest body that a replica takes
    upload_bytes: int = 101 << 20  # of the largest upload to /v1/files
    kept_bytes: int = 256 << 10  # of the largest body that can be sent again; two such buffers a request that waits
    connections: int = 512  # of clients at a time; more wait to be accepted
    silence: float = 600.0  # seconds until the first byte of an answer, and between two pieces of it
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # clients must show a certificate of this authority

    @property
    def file(self) -> Path:
        return self.folder / "haproxy.cfg"

    @property
    def admin(self) -> Path:
        """The socket of haproxy's own commands."""
        return self.folder / "haproxy.sock"

    @property
    def scheme(self) -> str:
        return "https" if self.tls_cert else "http"

    @property
    def address(self) -> str:
        """As a URL has it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def text(self) -> str:
        """The whole configuration."""
        replicas = "".join(self._replica(number, socket) for number, socket in enumerate(self.sockets, 1))
        return self._common() + self._front() + self._pool() + replicas

    def write(self) -> None:
        """Puts configuration and links to the certificate in place. Raises ValueError with haproxy's words."""
        if self.tls_cert:  # haproxy finds the key by the certificate's name
            for link, target in (("tls.pem", self.tls_cert), ("tls.pem.key", self.tls_key or self.tls_cert)):
                (self.folder / link).unlink(missing_ok=True)
                (self.folder / link).symlink_to(Path(target).resolve(strict=True))
        self.file.write_text(self.text())
        checked = subprocess.run([program(), "-c", "-f", self.file], capture_output=True, text=True)
        if checked.returncode:
            alerts = [line for line in checked.stderr.splitlines() if "ALERT" in line] or [checked.stderr]
            raise ValueError(f"haproxy does not take {self.file}: {alerts[0].strip()}")

    def command(self) -> list[str]:
        """Runs it in the foreground, as one process."""
        return [program(), "-db", "-f", str(self.file)]

    def _common(self) -> str:
        return f"""\
# Written by python -m serving cluster at each start; a change is lost with the next.
global
  stats socket unix@{quoted(self.admin)} mode 600 level admin
  maxconn {self.connections}
  nbthread {min(4, os.cpu_count() or 1)}
  tune.bufsize {self.kept_bytes + HEADERS_BYTES}
defaults
  mode http
  timeout connect 1s
  timeout check {CHECK_MS}ms
  timeout client {self.silence:g}s
  timeout server {self.silence:g}s
  timeout http-request 30s
  timeout http-keep-alive 60s
  option http-buffer-request
  option abortonclose
""" + "".join(map(_error, UNANSWERED, UNANSWERED.values()))

    def _front(self) -> str:
        bind = f"{self.address}:{self.port}"
        if self.tls_cert:
            bind += f" ssl crt {quoted(self.folder / 'tls.pem')} ssl-min-ver TLSv1.2 alpn h2,http/1.1"
        if self.tls_client_ca:
            bind += f" ca-file {quoted(Path(self.tls_client_ca).resolve())} verify required"
        one_by_one = "".join(
            f"  use_backend replica{number} if {{ path_beg /replicas/{number}/ }}\n"
            for number in range(1, 1 + len(self.sockets))
        )
        return f"""\
frontend clients
  bind {bind}
  http-request deny deny_status 413 if {{ req.body_size gt {self.body_bytes} }} !{{ path /v1/files }}
  http-request deny deny_status 413 if {{ req.body_size gt {self.upload_bytes} }}
  http-request set-header X-Forwarded-For %[src]
  http-request set-header X-Forwarded-Proto {self.scheme}
{one_by_one}  default_backend replicas
"""

    def _pool(self) -> str:
        servers = [(f"r{number}", socket) for number, socket in enumerate(self.sockets, 1)]
        checked = "".join(f"  server {name} unix@{quoted(socket)} check\n" for name, socket in servers)
        # Where the checks find none ready, one is asked all the same: it may only have been slow.
        unchecked = "".join(f"  server {name}-anyway unix@{quoted(socket)} backup\n" for name, socket in servers)
        return f"""\
backend replicas
{_balance(self.routing)}  option redispatch 1
  option allbackups
  retries 3
  retry-on conn-failure empty-response 503
  option httpchk
  http-check send meth GET uri /readyz
  http-check expect status 200
  default-server inter {CHECK_MS}ms fastinter {FAST_MS}ms downinter {FAST_MS}ms fall 2 rise 1
{checked}{unchecked}"""

    def _replica(self, number: int, socket: Path) -> str:
        """A way to one replica and no other: for its metrics, its state, and to drain it."""
        return f"""\
backend replica{number}
  http-request replace-path /replicas/{number}(/.*) \\1
  server r{number} unix@{quoted(socket)}
"""

    async def tell(self, command: str) -> str:
        """What the running haproxy answers to a command of its management guide. Raises OSError if it is not there."""
        reader, writer = await asyncio.open_unix_connection(self.admin)
        try:
            writer.write(command.encode() + b"\n")
            return (await asyncio.wait_for(reader.read(), 5)).decode().strip()
        finally:
            writer.close()

    async def take_out(self, number: int) -> None:
        """No new request goes to this replica; those that it has go on."""
        await self.tell(f"set server replicas/r{number} state drain")

    async def take_in(self, number: int) -> None:
        await self.tell(f"set server replicas/r{number} state ready")


def program() -> str:
    """Where haproxy is. Raises ValueError if it is not installed."""
    path = shutil.which(PROGRAM, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if path is None:
        raise ValueError("haproxy is not installed; on Debian: apt-get install haproxy")
    return path


def quoted(path: str | Path) -> str:
    """A path as one word of the configuration."""
    text = str(path)
    if not text.isprintable():
        raise ValueError(f"{text!r}: a path with control characters cannot stand in a configuration")
    return '"' + "".join("\\" + c if c in '\\"$' else c for c in text) + '"'


def _balance(routing: str) -> str:
    """Lines that choose a replica: the one with the fewest requests, or by a hash of the prompt's start."""
    if routing == "least":
        return "  balance leastconn\n"
    starts = [f"req.hdr({ROUTE_HEADER})"]
    for place in ("$.messages[0].content", "$.messages[0].content[0].text", "$.prompt"):
        starts.append(f"req.body,json_query('{place}'),bytes(0,{PREFIX_BYTES})")
    first, *others = (f"  http-request set-var(txn.start) {start}" for start in starts)
    lines = [first, *(f"{line} unless {{ var(txn.start) -m found }}" for line in others)]
    lines += [
        "  balance hash var(txn.start)",
        "  hash-type consistent djb2 avalanche",
        f"  hash-balance-factor {OVERLOAD}",
    ]
    return "\n".join(lines) + "\n"


def _error(status: int, message: str) -> str:
    """An answer of haproxy itself, in the form of the API's errors."""
    error = ApiError(status, message, retry_after=RETRY_AFTER if status == 503 else None)
    headers = "".join(f" hdr {name} {value}" for name, value in error.headers.items())
    body = json.dumps(error.body)
    return f"  http-error status {status} content-type application/json string '{body}'{headers}\n"
