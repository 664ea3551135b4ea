"""What a request shows to be let in: a key or a token, as `Authorization: Bearer`, or as a browser's password."""

import base64
import binascii
from urllib.parse import urlsplit

from fastapi import Request

from serving.errors import ApiError

LONGEST = 8192 + 64  # characters of the header
CHALLENGES = {"WWW-Authenticate": 'Bearer realm="isomesh"'}
BROWSER_CHALLENGES = {"WWW-Authenticate": 'Basic realm="isomesh: any name, and a key as the password"'}
PAGE_FILES = "/page/"  # what the page consists of


def unauthorized(request: Request, message: str) -> ApiError:
    """401, with the challenge at which a browser asks for a password where one is looking at the page.

    Its styles and icon are challenged, too: Chromium sends a password that stands in the address only when it is asked.
    """
    looks = "text/html" in request.headers.get("accept", "") or request.url.path.startswith(PAGE_FILES)
    headers = BROWSER_CHALLENGES if looks else CHALLENGES
    return ApiError(401, message, code="invalid_api_key", headers=headers)


def shown(request: Request) -> str:
    """The key or token of a request. Raises ApiError (401) where there is none, or more than one."""
    values = request.headers.getlist("authorization")
    if len(values) != 1:
        told = "no key: send 'Authorization: Bearer KEY'" if not values else "more than one Authorization header"
        raise unauthorized(request, told)
    scheme, _, text = values[0].partition(" ")
    text = text.strip()
    if len(values[0]) > LONGEST or not text.isascii() or not text.isprintable():
        raise unauthorized(request, "the Authorization header is too long or holds what no key does")
    if scheme.lower() == "bearer" and text:
        return text
    if scheme.lower() == "basic":
        return _password(request, text)
    raise unauthorized(request, "the Authorization header is no 'Bearer KEY'")


def _password(request: Request, text: str) -> str:
    """The password that a browser sends with all requests to us, also those that another site's page has made."""
    try:
        _, _, password = base64.b64decode(text, validate=True).decode("ascii").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise unauthorized(request, "the Authorization header is no 'Basic' one") from None
    if _from_another_site(request):
        raise ApiError(403, "a page of another site may not use the password that a browser keeps for this one")
    return password


def _from_another_site(request: Request) -> bool:
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc != request.headers.get("host")
    return False
