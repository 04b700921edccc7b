"""Fetch one url from a stranger: bounded in time and bytes, every hop checked, failures sorted into classes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import resource
import socket
import ssl
import time
import urllib.parse
import weakref
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from data_prep.web.addresses import (
    WAIT_FOR_DESCRIPTORS_S,
    AddressPolicy,
    Names,
    RefusedAddressError,
    lacks_descriptors,
    proxy_for,
)
from data_prep.web.ledger import (
    CLIENT_ERROR,
    CONNECT,
    DECODE,
    OTHER,
    REFUSED,
    SERVER_ERROR,
    THROTTLED,
    TIMEOUT,
    TLS,
    TOO_LARGE,
    FetchError,
)
from data_prep.web.manners import (
    PRODUCT,
    ROBOTS_MAX_BYTES,
    HostLimits,
    RobotsFiles,
    check_header,
    compressions,
    robots_text,
)
from data_prep.web.passes import Settings
from formats.manifest import version_of

MAX_REDIRECTS = 5
MAX_HEADER_BYTES = 70_000  # of one line: 64 KB and its name; aiohttp allows 128 of them
KEEP_CONNECTION_S = 15.0
MAX_KEPT_CONNECTIONS = 1_000
REMEMBERED_HOSTS = 10_000  # between shards
SLOW_START_S = 5.0  # the throughput counts from here on
PROXY_WANTS_PASSWORD = 407
REDIRECTS = (301, 302, 303, 307, 308)
ACCEPT = "image/jpeg,image/png,image/webp,image/gif;q=0.9,*/*;q=0.1"


@dataclasses.dataclass(frozen=True)
class Body:
    """What a server answered with."""

    data: bytes
    content_encoding: str
    http_status: int
    elapsed_s: float = 0.0  # of the whole request, without waiting for its turn


class HttpClient:
    """An HTTP client for urls that nobody vouches for. A context manager, to be used inside one event loop.

    Per process: `threads` requests at once, and the settings' limits per host divided among the processes. What it
    knows of names, robots.txt and hosts serves all shards of a process.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._proxies = dict(settings.proxies)
        self._policy = AddressPolicy(settings.allow_local)
        self._names = Names(self._policy, settings.nameservers, settings.timeout_s, 1 + settings.retries, self._proxies)
        self._robots = RobotsFiles(self._robots_text)
        self._hosts = HostLimits(
            max(1, settings.host_connections // settings.processes), settings.host_requests_per_s / settings.processes
        )
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # a request may try two addresses at once; the rest is for connections that are kept, files and names
        self._slots = asyncio.Semaphore(max(1, min(settings.threads, descriptors // 4)))
        self._max_kept = min(descriptors // 4, MAX_KEPT_CONNECTIONS)
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        trust = ssl.create_default_context()
        self._session = self._new_session(trust, keep_connections=True)
        self._session_that_closes = self._new_session(trust, keep_connections=False)

    def _new_session(self, trust: ssl.SSLContext, keep_connections: bool) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the semaphores limit
                resolver=self._names,
                use_dns_cache=False,
                ssl=trust,
                socket_factory=self._socket,
                force_close=not keep_connections,
                keepalive_timeout=KEEP_CONNECTION_S if keep_connections else None,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "User-Agent": user_agent(self._settings.contact),
                "Accept": ACCEPT,
                "Accept-Encoding": "identity",
            },
            auto_decompress=False,  # a compressed body could be larger than its limit
            trust_env=False,  # proxies are chosen here
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )

    def forget_oldest(self) -> None:
        """Bound the memory of hosts; between shards."""
        for memory in (self._names, self._robots, self._hosts):
            memory.forget_oldest(REMEMBERED_HOSTS)

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End what is under way."""
        await self._robots.close()
        await self._session.close()
        await self._session_that_closes.close()
        await self._names.close()

    @contextlib.asynccontextmanager
    async def image(self, url: str) -> AsyncIterator[Body]:
        """The body of an image's url; its slot is held until the block ends, which bounds the bodies in memory.

        Raises FetchError for everything that keeps the body from being had and used.
        """
        async with self._follow(url, is_image=True) as body:
            yield body

    async def _robots_text(self, url: URL) -> str:
        try:
            async with self._follow(str(url), is_image=False) as body:
                return robots_text(body.data, body.content_encoding)
        except FetchError as error:
            if error.outcome == CLIENT_ERROR:  # no such file: no rules
                return ""
            raise

    @contextlib.asynccontextmanager
    async def _follow(self, text: str, is_image: bool) -> AsyncIterator[Body]:
        spent_s = 0.0
        for _ in range(1 + MAX_REDIRECTS):
            url = self._policy.check(text)
            host = url.raw_host or ""
            proxy = proxy_for(url, self._proxies)
            await (self._names.check_behind_proxy(host) if proxy else self._names.addresses_of(host))
            if is_image:
                await self._robots.check(url)
            async with self._hosts.turn(host), self._slots:
                start_s = time.monotonic()
                try:
                    answer = await self._ask(url, proxy, is_image, self._settings.deadline_s - spent_s)
                except FetchError as error:
                    error.elapsed_s = spent_s + time.monotonic() - start_s
                    raise
                spent_s += time.monotonic() - start_s
                if isinstance(answer, Body):
                    yield dataclasses.replace(answer, elapsed_s=spent_s)
                    return
            text = str(answer)
        raise FetchError(OTHER, f"more than {MAX_REDIRECTS} redirects")

    async def _ask(self, url: URL, proxy: URL | None, is_image: bool, left_s: float) -> Body | URL:
        """One request: the body, or the url to ask instead."""
        wait_s = self._settings.timeout_s
        timeout = aiohttp.ClientTimeout(total=max(left_s, 0.001), sock_connect=wait_s, sock_read=wait_s)
        while True:
            try:
                session = self._session_now()
                async with session.get(url, allow_redirects=False, timeout=timeout, proxy=proxy) as response:
                    return await self._answer(url, response, is_image)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
                cause = getattr(error, "os_error", error)
                if not (isinstance(cause, OSError) and lacks_descriptors(cause)):
                    raise _failure(error) from error
            await asyncio.sleep(WAIT_FOR_DESCRIPTORS_S)  # our own fault, which says nothing about the url

    async def _answer(self, url: URL, response: aiohttp.ClientResponse, is_image: bool) -> Body | URL:
        location = response.headers.get("Location")
        if response.status in REDIRECTS and location:
            return url.join(_location(location))
        if not 200 <= response.status < 300:
            raise _refusal(response.status, response.reason or "", response.headers)
        if is_image:
            check_header(response.headers.getall("X-Robots-Tag", ()))
        encoding = ",".join(response.headers.getall("Content-Encoding", ()))
        return Body(await self._read(response, encoding, is_image), encoding, response.status)

    async def _read(self, response: aiohttp.ClientResponse, encoding: str, is_image: bool) -> bytes:
        limit = self._settings.max_bytes if is_image else ROBOTS_MAX_BYTES
        if is_image and compressions(encoding):
            raise FetchError(DECODE, f"Content-Encoding: {encoding[:40]}", response.status)
        if is_image and (response.content_length or 0) > limit:
            raise FetchError(TOO_LARGE, f"Content-Length: {response.content_length}", response.status)
        chunks: list[bytes] = []
        size = 0
        start_s = time.monotonic()
        async for chunk in response.content.iter_any():
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                if not is_image:
                    break
                raise FetchError(TOO_LARGE, f"more than {limit} bytes", response.status)
            elapsed_s = time.monotonic() - start_s
            if elapsed_s > SLOW_START_S and size < elapsed_s * self._settings.min_bytes_per_s:
                raise FetchError(TIMEOUT, f"{size / elapsed_s:.0f} bytes/s", response.status)
        return b"".join(chunks)[:limit]

    def _session_now(self) -> aiohttp.ClientSession:
        """The one that keeps connections for the next request to a host, as long as few are kept."""
        is_open = sum(kept.fileno() >= 0 for kept in list(self._sockets))
        return self._session if is_open < self._max_kept else self._session_that_closes

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        """The last word on every connection, wherever its address came from (see aiohttp's `socket_factory`)."""
        family, kind, protocol, _, (ip, *_) = address
        if not self._names.may_connect(ip):
            raise RefusedAddressError(f"address {ip}")
        made = socket.socket(family, kind, protocol)
        self._sockets.add(made)
        return made


def _location(text: str) -> URL:
    """The url of a Location header: bytes that are no ASCII are UTF-8, or else stay the bytes that they are."""
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return URL(raw.decode("utf-8"), encoded=raw.isascii())
    except UnicodeDecodeError:
        return URL(urllib.parse.quote(raw, safe=bytes(range(33, 127))), encoded=True)


def user_agent(contact: str | None) -> str:
    """Who asks, truthfully."""
    version = version_of("cluster-clip")
    return f"{PRODUCT}/{version} ({f'+{contact}' if contact else 'image-text data set builder'})"


def _refusal(status: int, reason: str, headers: CIMultiDictProxy[str]) -> FetchError:
    message = f"HTTP {status} {reason}".strip()
    if status == PROXY_WANTS_PASSWORD:
        return FetchError(CONNECT, f"the proxy: {message}", status)
    retry_after_s = _retry_after_s(headers.get("Retry-After"))
    if status == 429:
        return FetchError(THROTTLED, message, status, True, retry_after_s)
    if status >= 500:
        return FetchError(SERVER_ERROR, message, status, True, retry_after_s)
    return FetchError(CLIENT_ERROR if status >= 400 else OTHER, message, status)


def _retry_after_s(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
        return max(0.0, (then - datetime.datetime.now(then.tzinfo)).total_seconds())
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _failure(error: Exception) -> FetchError:
    """The class of what aiohttp raised."""
    cause = getattr(error, "os_error", error)
    message = f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(cause, RefusedAddressError):
        return FetchError(REFUSED, str(cause))
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return FetchError(CONNECT, f"the proxy: HTTP {error.status} {error.message}", retryable=error.status >= 500)
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return FetchError(TIMEOUT, message, retryable=True)
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return FetchError(TLS, message)
    if isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError)):
        return FetchError(CONNECT, message, retryable=True)
    return FetchError(OTHER, message)  # not HTTP, or a redirect to what is no url
