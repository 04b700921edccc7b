"""A server whose answers are bytes, headers included, for what no library would send."""

from __future__ import annotations

import socketserver
import threading
from collections import Counter


def answer(status: bytes = b"200 OK", headers: bytes = b"", body: bytes = b"") -> bytes:
    """An HTTP answer that ends with its connection; `headers` are whole lines."""
    return b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n" + headers + b"\r\n" + body


class RawWeb:
    """Answers a path (of any host: all of 127.0.0.0/8) with its bytes, what it does not know with 404, and hangs up.

    Counts the requests, keeps their first lines. An absolute address, as proxies get it, is a path too.
    """

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.heads: list[bytes] = []
        web = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                line = self.rfile.readline()
                head = line
                while (more := self.rfile.readline()).strip():
                    head += more
                path = line.split(b" ")[1].decode("latin-1") if b" " in line else ""
                web.requests[path] += 1
                web.heads.append(head)
                self.wfile.write(web.pages.get(path, answer(b"404 Absent")))

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True
            request_queue_size = 1024

            def handle_error(self, *_: object) -> None:
                pass  # clients that hang up are part of the tests

        self._server = Server(("0.0.0.0", 0), Handler)
        self.port = int(self._server.server_address[1])

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def __enter__(self) -> RawWeb:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
