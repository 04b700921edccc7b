"""A small web on this machine, with the ways in which the real one fails."""

from __future__ import annotations

import dataclasses
import shutil
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclasses.dataclass
class Page:
    """What a path answers after `delay_s`; `missing_bytes` more are announced than sent (fewer if negative).

    A `stream` is sent instead of the body, part by part, without announcing its length.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    missing_bytes: int = 0
    delay_s: float = 0.0
    stream: Callable[[], Iterator[bytes]] | None = None


class SmallWeb:
    """A server whose pages are a dictionary; every other path answers 404. Counts its requests, keeps their headers.

    A path has a page, or a list of pages: answers in turn, the last one for good.
    """

    def __init__(self, host: str = "127.0.0.1", certificate: Path | None = None) -> None:
        self.pages: dict[str, Page | list[Page]] = {}
        self.requests: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        self._scheme = "https" if certificate else "http"
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.headers[self.path] = dict(self.headers)
                page = web._answer(self.path)
                time.sleep(page.delay_s)
                self.send_response(page.status)
                for name, value in page.headers.items():
                    self.send_header(name, value)
                if page.stream is None:
                    self.send_header("Content-Length", str(len(page.body) + page.missing_bytes))
                self.end_headers()
                for part in page.stream() if page.stream else [page.body]:
                    self.wfile.write(part)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 1024  # a downloader opens many connections at once

            def handle_error(self, *_: object) -> None:
                pass  # clients that hang up are part of the tests

        self._server = Server((host, 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def _answer(self, path: str) -> Page:
        number = self.requests[path]
        self.requests[path] += 1
        page = self.pages.get(path, Page(b"gone", 404))
        return page[min(number, len(page) - 1)] if isinstance(page, list) else page

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def keep_connections(self) -> None:
        """Speak HTTP/1.1, and close no connection."""
        self._server.RequestHandlerClass.protocol_version = "HTTP/1.1"  # type: ignore[attr-defined]

    def url(self, path: str, host: str | None = None) -> str:
        return f"{self._scheme}://{host or self._server.server_address[0]}:{self.port}{path}"

    def __enter__(self) -> SmallWeb:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def self_signed(path: Path) -> Path | None:
    """A certificate for 127.0.0.1 that nobody vouches for, with its key; None without the openssl command."""
    if shutil.which("openssl") is None:
        return None
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=small web", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with path.open("a") as stream:
        stream.write(done.stdout)
    return path
