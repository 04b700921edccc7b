"""A real browser without a window: Chromium, spoken to over a pipe in its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_TIMEOUT_S = 60


class Page:
    """One tab; `events` are all that the browser told, in order."""

    def __init__(self, requests: int, answers: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._requests, self._answers = requests, answers
        self._buffer, self._number, self._session = b"", 0, ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result; raises RuntimeError if the browser refuses it."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def show(self, file: Path, width: int, colours: str) -> None:
        """Open a file as on a screen of this width in pixels, `colours` light or dark, and wait for all of it."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **screen)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])
        self.events.clear()
        self.send("Page.navigate", url=file.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, script: str) -> Any:
        """The value of an expression in the page; raises RuntimeError for an exception."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, to whatever has the focus."""
        text = {"Enter": "\r"}.get(key, key)
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "")

    def screenshot(self, whole: bool = True) -> bytes:
        """A PNG of the page, or of what fits the screen."""
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def methods(self, name: str) -> list[dict[str, Any]]:
        """The events of one kind since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == name]

    def _read(self) -> dict[str, Any]:
        end_s = time.monotonic() + _TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\0" not in self._buffer:
                if not selector.select(end_s - time.monotonic()):
                    raise TimeoutError("the browser does not answer")
                data = os.read(self._answers, 1 << 16)
                if not data:
                    raise RuntimeError("the browser has ended")
                self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


@contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """Start Chromium with one tab; `profile` is where its files go."""
    assert CHROMIUM
    from_us, requests = os.pipe()
    answers, to_us = os.pipe()
    # the protocol wants file descriptors 3 and 4
    command = f'exec "$@" 3<&{from_us} 4>&{to_us}'
    screen = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    alone = ("--no-first-run", "--disable-quic", "--disable-background-networking", "--disable-component-update")
    options = (*screen, *alone, "--disable-sync")
    browser = subprocess.Popen(
        ["bash", "-c", command, "bash", CHROMIUM, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
        pass_fds=(from_us, to_us),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(requests, answers)
    finally:
        os.close(requests)
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
        os.close(answers)
