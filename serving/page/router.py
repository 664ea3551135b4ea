"""GET / and /page/NAME: the page for people. Plain files, no build; they are read once, and nothing else is served."""

from pathlib import Path

from fastapi import APIRouter, Depends
from starlette.responses import Response

from serving.access.gate import Caller, needs
from serving.errors import ApiError

FOLDER = Path(__file__).parent
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing from elsewhere, nothing inline, nowhere to send a form, no frame around it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
FILES = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(caller: Caller = Depends(needs("page"))):  # noqa: B008
    """The page itself."""
    return _file("index.html")


@router.get("/page/{name}")
async def file(name: str, caller: Caller = Depends(needs("page"))):  # noqa: B008
    """What the page consists of."""
    if name not in FILES:
        raise ApiError(404, f"there is nothing at '/page/{name[:100]}'", code="not_found")
    return _file(name)


def _file(name: str) -> Response:
    return Response(FILES[name], headers=HEADERS, media_type=KINDS[Path(name).suffix])
