"""What each host asks of us: robots.txt (RFC 9309), X-Robots-Tag, how many requests at once, and when to stop."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import dataclasses
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from protego import Protego
from yarl import URL

from data_prep.web.addresses import drop_oldest
from data_prep.web.ledger import CONNECT, OPT_OUT, OTHER, THROTTLED, TIMEOUT, FetchError

PRODUCT = "cluster-clip-data-prep"
AGENTS = (PRODUCT, "img2dataset")  # sites that name that program mean this kind of robot
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
# directives with a value: their colon does not make them the name of a robot
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
ROBOTS_MAX_BYTES = 512 * 1024  # RFC 9309 asks for 500 KiB at least; what is beyond is not read
KEEP_ROBOTS_S = 24 * 3600.0  # RFC 9309: not longer
GIVE_UP_AFTER = 10  # failures in a row
GIVE_UP_S = 600.0
MAX_PAUSE_S = 60.0  # a host that asks for more is given up at once
# values of Content-Encoding that are none: how the text is written, how the file was sent or stored
_UNCHANGED = frozenset({"", "identity", "none", "binary", "7bit", "8bit", "utf-8", "utf8", "aws-chunked"})
_GZIP, _ZLIB, _DEFLATE = 31, 15, -15  # zlib's words for the three containers


class RobotsFiles:
    """robots.txt of every host that is asked, fetched once a day.

    `fetch_text` gets the url of a robots.txt and gives its text, or "" where there is none (4xx); it raises
    FetchError when the host cannot tell: then its images count as failed in the same way, and can be retried.
    """

    def __init__(self, fetch_text: Callable[[URL], Awaitable[str]]) -> None:
        self._fetch_text = fetch_text
        self._files: dict[URL, tuple[float, asyncio.Task[Protego]]] = {}  # asked for when

    async def check(self, url: URL) -> None:
        """Raise FetchError when the site's robots.txt disallows this url to robots like ours, or cannot be had."""
        origin = url.origin()
        since_s, task = self._files.get(origin, (0.0, None))
        if task is None or time.monotonic() > since_s + KEEP_ROBOTS_S:
            task = asyncio.ensure_future(self._read(origin))
            self._files[origin] = (time.monotonic(), task)
        try:
            rules = await asyncio.shield(task)
        except FetchError as error:
            if error.retryable and self._files.get(origin, (0.0, None))[1] is task:
                del self._files[origin]
            raise FetchError(
                error.outcome, f"robots.txt: {error.message}", error.http_status, error.retryable, error.retry_after_s
            ) from error
        if not all(rules.can_fetch(str(url), agent) for agent in AGENTS):
            raise FetchError(OPT_OUT, "robots.txt disallows it")

    async def _read(self, origin: URL) -> Protego:
        return Protego.parse(await self._fetch_text(origin.with_path("/robots.txt")))

    def forget_oldest(self, keep: int) -> None:
        """Bound the memory; not while hosts are being asked."""
        drop_oldest(self._files, keep)

    async def close(self) -> None:
        """End the requests under way."""
        tasks = [task for _, task in self._files.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def robots_text(body: bytes, content_encoding: str) -> str:
    """The text of a robots.txt as it came, also where it is compressed although nobody asked for that.

    Raises FetchError for what cannot be read: rules that nobody knows are not kept.
    """
    if "deflate" in content_encoding.lower():
        container = _ZLIB if body[:1] == b"\x78" else _DEFLATE
        body = _inflated(body, container)
    while body.startswith(b"\x1f\x8b"):  # whatever the header says; sometimes twice
        body = _inflated(body, _GZIP)
    is_utf16 = body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = body.decode("utf-16" if is_utf16 else "utf-8-sig", "replace")
    is_unknown = bool(compressions(content_encoding) - {"gzip", "x-gzip", "deflate"})
    if "\0" in text or (is_unknown and "\ufffd" in text):
        raise FetchError(OTHER, f"not text (Content-Encoding: {content_encoding[:40] or 'none'})")
    return text


def compressions(content_encoding: str) -> set[str]:
    """What a Content-Encoding says was done to a body, without the values that change nothing."""
    return {name.strip().lower() for name in content_encoding.split(",")} - _UNCHANGED


def _inflated(data: bytes, container: int) -> bytes:
    """At most ROBOTS_MAX_BYTES of it; what is cut off before has lost rules."""
    inflater = zlib.decompressobj(container)
    try:
        inflated = inflater.decompress(data, ROBOTS_MAX_BYTES)
    except zlib.error as error:
        raise FetchError(OTHER, f"damaged compression: {error}") from error
    if not inflater.eof and max(len(data), len(inflated)) < ROBOTS_MAX_BYTES:
        raise FetchError(OTHER, "damaged compression: cut off")
    return inflated


def check_header(values: Iterable[str]) -> None:
    """Raise FetchError when an X-Robots-Tag, addressed to all robots or to ours, opts out of this use."""
    for value in values:
        agent = ""
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _VALUED:
                agent, part = name.strip(), rest
            if part.strip() in OPT_OUTS and agent in ("", "*", *AGENTS):
                raise FetchError(OPT_OUT, f"X-Robots-Tag: {part.strip()}")


@dataclasses.dataclass
class _Host:
    slots: asyncio.Semaphore
    next_start_s: float = 0.0
    failures: int = 0  # in a row
    given_up_until_s: float = 0.0
    given_up_for: str = ""  # the class of the last of them


class HostLimits:
    """At most `connections` requests at once to a host and `requests_per_s` a second; 429 pauses the whole host.

    A host that fails ten times in a row (no connection, no answer, 429), or that asks for a pause of more than a
    minute, is left alone for ten minutes: a dead host with thousands of urls must not hold up a shard.
    """

    def __init__(self, connections: int, requests_per_s: float) -> None:
        self._connections = connections
        self._interval_s = 1 / requests_per_s
        self._hosts: dict[str, _Host] = {}

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for this host's turn; a FetchError that the block raises tells how the host is doing.

        Raises FetchError, not retryable, when the host was given up.
        """
        host = self._hosts.setdefault(name, _Host(asyncio.Semaphore(self._connections)))
        async with host.slots:
            while (wait_s := host.next_start_s - time.monotonic()) > 0:  # it may be put off while we wait
                await asyncio.sleep(wait_s)
            if time.monotonic() < host.given_up_until_s:
                raise FetchError(host.given_up_for, "host given up: too many failures in a row")
            host.next_start_s = time.monotonic() + self._interval_s
            try:
                yield
            except FetchError as error:
                _note(host, error)
                raise
            host.failures = 0

    def forget_oldest(self, keep: int) -> None:
        """Bound the memory; not while hosts are being asked."""
        drop_oldest(self._hosts, keep)


def _note(host: _Host, error: FetchError) -> None:
    if error.outcome not in (CONNECT, TIMEOUT, THROTTLED):
        host.failures = 0
        return
    host.failures += 1
    host.given_up_for = error.outcome
    pause_s = error.retry_after_s or 0.0
    if host.failures >= GIVE_UP_AFTER or (error.outcome == THROTTLED and pause_s > MAX_PAUSE_S):
        host.given_up_until_s = time.monotonic() + GIVE_UP_S
    elif error.outcome == THROTTLED:
        host.next_start_s = max(host.next_start_s, time.monotonic() + pause_s)
