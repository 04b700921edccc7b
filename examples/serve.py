"""Serve a folder on 127.0.0.1 to many clients at once: serve.py DIRECTORY PORT (the demo's web)."""

from __future__ import annotations

import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """`python -m http.server` lets five connections wait, and a downloader opens a hundred."""

    request_queue_size = 1024


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    directory, port = sys.argv[1:]
    Server(("127.0.0.1", int(port)), functools.partial(QuietHandler, directory=directory)).serve_forever()
