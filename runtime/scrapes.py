"""Answers Prometheus: GET /metrics at a port of its own, in threads of its own, on the standard library alone.

For processes that have something better to do: whoever reads, and however slowly, holds nothing up.
"""

import errno
import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format
MOST_SCRAPES = 8  # at a time; more are turned away, so that nobody fills the process with threads
SCRAPE_SECONDS = 5.0  # that a client may take to send its request or to read a part of the answer


class Scrapes(ThreadingHTTPServer):
    """Answers with what `text` gives, from its construction to `close`.

    host_key, port_key: how the user spelled the address, as in "metrics.prometheus_port=". Raises ValueError where it
    cannot be had.
    """

    daemon_threads = True
    request_queue_size = 32
    block_on_close = False  # a client that reads slowly does not hold up an end
    allow_reuse_port = False

    def __init__(self, host: str, port: int, text: Callable[[], str], host_key: str, port_key: str):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.text, self._free = text, threading.BoundedSemaphore(MOST_SCRAPES)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            why = {errno.EADDRINUSE: "is in use", errno.EACCES: "is not for this user"}.get(error.errno)
            if why is None:  # the name or the address
                raise ValueError(f"{host_key}{host} cannot be listened on ({error.strerror or error})") from None
            raise ValueError(f"{port_key}{port} {why}; choose another port") from None
        self.port: int = self.server_address[1]
        options = {"poll_interval": 0.1}  # seconds, which `close` may take
        threading.Thread(target=self.serve_forever, kwargs=options, name="scrapes", daemon=True).start()

    def close(self) -> None:
        """Gives the port back; answers that are under way are finished."""
        self.shutdown()
        self.server_close()

    def server_bind(self):
        """Without the question to the DNS that an HTTPServer asks: it can take seconds."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request, client_address):
        """Hands a connection to a thread, if one is left."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        """Serves a connection in its thread, and frees that thread's place whatever comes of it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address):
        """A client that went away is not told: the console belongs to the program."""


class _Handler(BaseHTTPRequestHandler):
    server: Scrapes
    timeout = SCRAPE_SECONDS

    def do_GET(self):
        found = self.path.partition("?")[0] == "/metrics"
        body = (self.server.text() if found else "there is /metrics\n").encode()
        self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
        self.send_header("Content-Type", CONTENT_TYPE if found else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Requests are not told."""
