"""Serves the page of runs that still go on, to browsers on this machine alone."""

import contextlib
import errno
import json
import re
import secrets
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tracking.page import contents, page
from tracking.run import Run

ADDRESS, PORT = "127.0.0.1", 6464
# Another site's name that was made to lead here is another host. A tunnel (ssh -L) may change the port.
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")


class Server(ThreadingHTTPServer):
    """`/` is the page; `/data?server=TOKEN&known=GENERATION.STEP,...` what the runs have written since, see `contents`.

    The token tells a page of this server from one that was left open when another server had the port.
    Raises ValueError where the port is taken.
    """

    daemon_threads = True

    def __init__(self, runs: list[Run], port: int = PORT):
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "in use" if error.errno == errno.EADDRINUSE else "not for this user"
            raise ValueError(f"port {port} is {why}; choose another with --port, or --port 0 for any") from None
        self.runs, self.lock, self.token = runs, threading.Lock(), secrets.token_hex(8)
        self.url = f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request, client_address):
        """Tells an error in one line; a browser that went away is none."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    """Answers one request to a `Server`; each has its own thread, and they take turns at reading the runs."""

    server: Server
    timeout = 60  # seconds for a client to send its request

    def do_GET(self):
        """Answers with the page or with JSON, after reading what the runs have written since.

        Otherwise: 403 for a Host that is not this machine, as another site that leads here would have; 404 for another
        path; 409 for data with another server's token.
        """
        server, url = self.server, urlsplit(self.path)
        asked = parse_qs(url.query)
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            self._answer(HTTPStatus.FORBIDDEN, "this page is served under its own address only\n")
        elif url.path not in ("/", "/data"):
            self._answer(HTTPStatus.NOT_FOUND, "there is / and /data\n")
        elif url.path == "/data" and asked.get("server") != [server.token]:
            self._answer(HTTPStatus.CONFLICT, "this is another server than that of the page: load the page again\n")
        else:
            with server.lock:
                for run in server.runs:
                    run.refresh()
                if url.path == "/":
                    text, kind = page(server.runs, server.token), "text/html"
                else:
                    known = parse_known(asked.get("known", [""])[0], len(server.runs))
                    text, kind = json.dumps(contents(server.runs, known), allow_nan=False), "application/json"
            self._answer(HTTPStatus.OK, text, kind)

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        body = text.encode("utf-8", errors="xmlcharrefreplace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Requests are not told."""


def parse_known(text: str, runs: int) -> list[tuple[int, int]] | None:
    """`1.200,1.150` as [(1, 200), (1, 150)]; None where it does not fit the runs."""
    with contextlib.suppress(ValueError):
        pairs = [tuple(map(int, pair.split("."))) for pair in text.split(",")]
        if len(pairs) == runs and all(len(pair) == 2 and pair[1] >= -1 for pair in pairs):
            return pairs
    return None


def serve(runs: list[Run], port: int) -> None:
    """Serves until Ctrl-C. Raises ValueError where the port is taken."""
    with Server(runs, port) as server:
        print(f"serving {server.url} on this machine only; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.1)
