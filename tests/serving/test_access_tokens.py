"""Tokens: only those that the provider signed, with the algorithm of its key, for us, now."""

import base64
import json
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from serving.access.tokens import PAUSE_SECONDS, STALE_SECONDS, KeySet, Provider, Tokens, Unreachable, Wrong, read_keys


def jwk(key, id: str, **more) -> dict:
    """The public half of a key, as a JWKS has it."""
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": id, "use": "sig", **more}


@pytest.fixture(scope="module")
def signing():
    rsa_key, small = (rsa.generate_private_key(65537, bits) for bits in (2048, 1024))
    return {"rsa": rsa_key, "small": small, "ec": ec.generate_private_key(ec.SECP256R1())}


@pytest.fixture(scope="module")
def provider(signing, tmp_path_factory):
    path = tmp_path_factory.mktemp("provider") / "jwks.json"
    keys = [jwk(signing["rsa"], "r"), jwk(signing["ec"], "e"), jwk(signing["small"], "s")]
    keys.append({"kty": "oct", "kid": "o", "k": base64.urlsafe_b64encode(b"x" * 32).decode().rstrip("=")})
    path.write_text(json.dumps({"keys": keys}))
    return Provider(str(path), "https://id.example", "isomesh")


def claims(**more) -> dict:
    now = int(time.time())
    said = {"sub": "alice", "role": "user", "iss": "https://id.example", "aud": "isomesh", "iat": now, "exp": now + 60}
    return {name: value for name, value in {**said, **more}.items() if value is not None}


def public(key) -> bytes:
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, kind)


def by_hand(header: dict | bytes, payload: dict | bytes, signature: bytes = b"") -> str:
    encode = lambda part: base64.urlsafe_b64encode(part).decode().rstrip("=")
    parts = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload))
    return ".".join([*map(encode, parts), encode(signature)])


@pytest.mark.parametrize(("key", "id", "algorithm"), [("rsa", "r", "RS256"), ("ec", "e", "ES256")])
def test_a_right_token(signing, provider, key, id, algorithm):
    token = jwt.encode(claims(), signing[key], algorithm, headers={"kid": id})
    assert Tokens(provider).claims(token)["sub"] == "alice"


def wrong_tokens(signing) -> dict[str, str]:
    good = jwt.encode(claims(), signing["rsa"], "RS256", headers={"kid": "r"})
    head, payload, signature = good.split(".")
    sign = lambda key="rsa", id="r", algorithm="RS256", **more: jwt.encode(
        claims(**more), signing[key], algorithm, headers={"kid": id}
    )
    hmac_of_public = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    swapped = by_hand({"alg": "HS256", "kid": "r"}, claims())
    swapped_key = public(signing["rsa"])
    swapped = swapped[:-1] if swapped.endswith(".") else swapped
    mac = hmac_of_public.sign(swapped.encode(), swapped_key)
    admin = by_hand({}, claims(role="admin")).split(".")[1]
    return {
        "expired": sign(exp=int(time.time()) - 60),
        "not yet": sign(nbf=int(time.time()) + 60),
        "issued later": sign(iat=int(time.time()) + 60),
        "no end": sign(exp=None),
        "no beginning": sign(iat=None),
        "for another": sign(aud="others"),
        "for nobody": sign(aud=None),
        "from another": sign(iss="https://evil.example"),
        "nobody's": sign(sub=None),
        "unknown key": sign(id="x"),
        "a small key": sign("small", "s"),
        "another's key": sign("small", "r"),
        "algorithm none": by_hand({"alg": "none", "kid": "r"}, claims()),
        "algorithm NoNe": by_hand({"alg": "NoNe", "kid": "r"}, claims()),
        "public key as a secret": f"{swapped}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}",
        "a shared key": jwt.encode(claims(), b"x" * 32, "HS256", headers={"kid": "o"}),
        "another RSA": jwt.encode(claims(), signing["rsa"], "RS512", headers={"kid": "r"}),
        "PSS": jwt.encode(claims(), signing["rsa"], "PS256", headers={"kid": "r"}),
        "RSA said of an EC key": sign("rsa", "e"),
        "payload altered": f"{head}.{admin}.{signature}",
        "signature altered": f"{head}.{payload}.{signature[:-4]}AAAA",
        "no signature": f"{head}.{payload}.",
        "critical header": jwt.encode(
            claims(), signing["rsa"], "RS256", headers={"kid": "r", "crit": ["b64"], "b64": False}
        ),
        "kid a list": by_hand({"alg": "RS256", "kid": ["r"]}, claims()),
        "a name that is none": sign(sub="a b\nc"),
        "a role that is a list": sign(role=["admin"]),
        "deep": by_hand(b'{"alg":"RS256","kid":' + b"[" * 5000, claims()),
        "long": good + "A" * 10_000,
        "not JSON": by_hand(b"\xff\xfe", b"{}"),
        "dots": "..",
        "": "",
    }


def test_wrong_tokens(signing, provider):
    tokens = Tokens(provider)
    for kind, token in wrong_tokens(signing).items():
        with pytest.raises(Wrong):
            pytest.fail(f"{kind}: {tokens.claims(token)}")


class Source:
    """A key set at an address, counted."""

    def __init__(self, monkeypatch):
        self.asked, self.keys, self.up, self.now = 0, [], True, 1000.0
        monkeypatch.setattr("serving.access.tokens._load", self.load)

    def load(self, source):
        self.asked += 1
        if not self.up:
            raise OSError("down")
        return json.dumps({"keys": self.keys}).encode()


def test_unknown_keys_are_looked_for_at_a_bounded_rate(signing, monkeypatch):
    source = Source(monkeypatch)
    source.keys = [jwk(signing["rsa"], "r")]
    found = KeySet("https://id.example/jwks", lambda: source.now)
    assert found.find("r")
    for number in range(100):
        assert found.find(f"x{number}") is None
    assert source.asked == 1
    source.keys.append(jwk(signing["ec"], "e"))
    source.now += PAUSE_SECONDS
    assert found.find("e")
    assert source.asked == 2


def test_a_source_that_is_down_is_trusted_for_a_while(signing, monkeypatch):
    source = Source(monkeypatch)
    source.keys = [jwk(signing["rsa"], "r")]
    found = KeySet("https://id.example/jwks", lambda: source.now)
    assert found.find("r")
    source.up = False
    source.now += STALE_SECONDS - 1
    assert found.find("r")
    source.now += 2
    with pytest.raises(Unreachable):
        found.find("r")
    source.up, source.keys = True, [jwk(signing["ec"], "e")]
    source.now += PAUSE_SECONDS
    assert found.find("r") is None  # a key that was taken back


@pytest.mark.parametrize("text", [b"", b"[]", b'{"keys": 3}', b'{"keys": [3]}', b'{"keys": [{"kty": "RSA"}]}', b"\xff"])
def test_what_is_no_key_set(text):
    with pytest.raises(ValueError):
        read_keys(text)


def test_providers_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="over http anybody on the way can change the keys; use https"):
        Provider("http://id.example/jwks", "i", "a")
    with pytest.raises(ValueError, match="neither a file nor an https address"):
        Provider(str(tmp_path / "none"), "i", "a")
    with pytest.raises(ValueError, match="needs --jwt-issuer and --jwt-audience"):
        Provider("https://id.example/jwks", "", "a")
