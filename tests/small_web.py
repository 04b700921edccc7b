"""A small web on 127.0.0.1, with the ways in which the real one fails."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class Page:
    """What a path answers after `delay_s`; `missing_bytes` more are announced than sent."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    missing_bytes: int = 0
    delay_s: float = 0.0


class SmallWeb:
    """A server whose pages are a dictionary, path -> Page; every other path answers 404. Counts its requests."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: Counter[str] = Counter()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests[self.path] += 1
                page = web.pages.get(self.path, Page(b"gone", 404))
                time.sleep(page.delay_s)
                self.send_response(page.status)
                for name, value in page.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(page.body) + page.missing_bytes))
                self.end_headers()
                self.wfile.write(page.body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 1024  # a downloader opens many connections at once

            def handle_error(self, *_: object) -> None:
                pass  # clients that hang up are part of the tests

        self._server = Server(("127.0.0.1", 0), Handler)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def __enter__(self) -> SmallWeb:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
