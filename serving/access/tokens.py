"""Tokens of an identity provider (JWT): signed with RS256 or ES256 by a key of a JWKS file or address.

A token's `sub` is its holder, `role` its role, `tenant` its tenant (else the holder). Which algorithm is right is
said by the key, never by the token, so that neither `none` nor a public key used as a shared secret opens anything.
"""

import json
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jwt

from serving.access.keys import NAME

ALGORITHMS = {"RSA": "RS256", "EC": "ES256"}  # kind of key -> the one algorithm that it is good for
SMALLEST_RSA = 2048  # bits
LONGEST = 8192  # characters of a token
LARGEST = 2**20  # bytes of a key set
FRESH_SECONDS = 300.0  # for which a key set is used without a look at its source
PAUSE_SECONDS = 10.0  # between two looks at most, whatever tokens ask for
STALE_SECONDS = 3600.0  # after which an unreachable address's keys are trusted no more
LEEWAY = 10.0  # seconds by which clocks may differ


class Wrong(Exception):
    """Not a token that lets anybody in; the reason is for the audit, not for who sent it."""


class Unreachable(Exception):
    """The address of the keys does not answer, and none are known that are fresh enough."""


@dataclass(frozen=True)
class Provider:
    """Whose tokens are believed."""

    keys: str  # file or https address of a JWKS
    issuer: str
    audience: str

    def __post_init__(self):
        url = urllib.parse.urlparse(self.keys)
        here = url.hostname in ("127.0.0.1", "::1", "localhost")
        if url.scheme == "http" and not here:
            raise ValueError(f"--jwt-keys {self.keys}: over http anybody on the way can change the keys; use https")
        if url.scheme not in ("http", "https") and not Path(self.keys).is_file():
            raise ValueError(f"--jwt-keys {self.keys}: neither a file nor an https address")
        if not self.issuer or not self.audience:
            raise ValueError("--jwt-keys needs --jwt-issuer and --jwt-audience: whose tokens, and for whom")


class KeySet:
    """The public keys of a provider by their id, fetched again when they are old or an unknown id is asked for."""

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic):
        self._source, self._clock = source, clock
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched = self._looked = -float("inf")
        self._lock = threading.Lock()

    def find(self, id: str | None) -> jwt.PyJWK | None:
        """The key with this id; without one the only key there is. Raises Unreachable."""
        with self._lock:
            now = self._clock()
            wants = now - self._fetched > FRESH_SECONDS or (id not in self._keys and id is not None)
            if wants and now - self._looked >= PAUSE_SECONDS:
                self._looked = now
                self._fetch(now)
            if now - self._fetched > STALE_SECONDS:
                raise Unreachable(self._source)
            if id is None and len(self._keys) == 1:
                return next(iter(self._keys.values()))
            return self._keys.get(id)

    def _fetch(self, now: float) -> None:
        try:
            self._keys = read_keys(_load(self._source))
            self._fetched = now
        except (OSError, ValueError):
            return  # what was known before is used on, until it is stale


def _load(source: str) -> bytes:
    if "://" not in source:
        return Path(source).read_bytes()
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(urllib.request.Request(source, headers={"Accept": "application/json"}), timeout=3) as answer:
        return answer.read(LARGEST)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        """The address that the operator wrote is the one that is trusted."""
        return None


def read_keys(text: bytes) -> dict[str | None, jwt.PyJWK]:
    """The keys of a JWKS that sign with an algorithm of ours. Raises ValueError for what is none."""
    try:
        entries = json.loads(text)["keys"]
        found = {}
        for entry in entries:
            algorithm = ALGORITHMS.get(entry.get("kty"))
            right = algorithm and entry.get("alg", algorithm) == algorithm and entry.get("use", "sig") == "sig"
            if right and entry.get("crv", "P-256") == "P-256":
                key = jwt.PyJWK(entry, algorithm)
                if algorithm != "RS256" or key.key.key_size >= SMALLEST_RSA:
                    found[entry.get("kid")] = key
        return found
    except (TypeError, KeyError, AttributeError, jwt.PyJWTError) as error:
        raise ValueError(f"no JWKS: {type(error).__name__}") from None


class Tokens:
    """Reads tokens of one provider."""

    def __init__(self, provider: Provider):
        self._provider, self._keys = provider, KeySet(provider.keys)

    def claims(self, token: str) -> Mapping:
        """What a token says, which was signed, is meant for us and has not expired. Raises Wrong or Unreachable."""
        if len(token) > LONGEST:
            raise Wrong("too long")
        try:
            header = jwt.get_unverified_header(token)
            key = self._keys.find(header.get("kid"))
            if key is None:
                raise Wrong("unknown key")
            if header.get("alg") != key.algorithm_name:
                raise Wrong("another algorithm than its key's")
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._provider.audience,
                issuer=self._provider.issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iat", "aud", "iss", "sub"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise Wrong(type(error).__name__) from None
        for name in ("sub", "tenant", "role"):
            value = claims.get(name, "none")
            if not isinstance(value, str) or not NAME.fullmatch(value):
                raise Wrong(f"its {name} is no name")
        return claims
