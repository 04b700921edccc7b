"""Which urls and network addresses may be asked (public ones, nothing else), and names -> checked addresses."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import ipaddress
import math
import os
import socket
import time
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import aiodns
import pycares
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from data_prep.web.ledger import DNS, REFUSED, FetchError
from formats.errors import UserError

PORTS = {"http": 80, "https": 443}
MAX_URL_CHARACTERS = 4096
KEEP_NAMES_S = 600.0
GIVEN_UP_S = 60.0  # how long a name that could not be asked about is not asked about again
LOOKUPS_AT_ONCE = 100
SILENT_AFTER = 20  # lookups without an answer: behind a proxy there may be no name server for the world outside
WAIT_FOR_DESCRIPTORS_S = 0.2
_GONE = (pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA, pycares.errno.ARES_EBADNAME)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# IPv6 that is routed; ways to write an IPv4 address as an IPv6 one lie outside, or are in the list below
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# what `ipaddress` lets pass in some Python versions: protocol assignments (a cloud's metadata among them), 6to4, Teredo
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16")))


class RefusedAddressError(OSError):
    """Raised where a socket is made, when its address may not be asked."""


@dataclasses.dataclass(frozen=True)
class AddressPolicy:
    """Public addresses on ports 80 and 443; with `allow_local` also this machine (127.0.0.0/8, ::1), any port."""

    allow_local: bool = False

    def permits(self, text: str) -> bool:
        """Whether this IP address may be asked; text that is no address may not."""
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        if self.allow_local and address.is_loopback:
            return True
        return is_public(address)

    def check(self, text: str) -> URL:
        """The parsed url, its escapes untouched.

        Raises FetchError (class `refused`) for what is not http(s) to a public host on ports 80 or 443. Names are
        not looked up here: `Names` and the connector check what they resolve to.
        """
        url, port = _parse(text)
        if url.scheme not in PORTS:
            raise FetchError(REFUSED, f"not http or https: {url.scheme or 'no scheme'}")
        if not url.raw_host:
            raise FetchError(REFUSED, "no host")
        if url.raw_user is not None or url.raw_password is not None:
            raise FetchError(REFUSED, "credentials in the url")
        if port not in PORTS.values() and not self.allow_local:
            raise FetchError(REFUSED, f"port {port}")
        if is_literal(url.raw_host) and not self.permits(url.raw_host):
            raise FetchError(REFUSED, f"address {url.raw_host}")
        return url


def is_literal(host: str) -> bool:
    """Whether the host of a url is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(address: Address) -> bool:
    """Neither private, loopback, link-local (cloud metadata), shared, multicast, reserved nor an IPv4 in disguise."""
    if address.is_multicast or not address.is_global or any(address in network for network in _SPECIAL):
        return False
    return not address.is_reserved if address.version == 4 else address in _GLOBAL_UNICAST


def _parse(text: str) -> tuple[URL, int | None]:
    if len(text) > MAX_URL_CHARACTERS:
        raise FetchError(REFUSED, f"url of more than {MAX_URL_CHARACTERS} characters")
    try:
        # what is escaped already stays as it is: some hosts sign it
        url = URL(text, encoded=text.isascii() and text.isprintable() and " " not in text)
        return url, url.port  # host and port are parsed only when asked for
    except ValueError as error:
        raise FetchError(REFUSED, f"not a url: {error}") from error


Proxies = Mapping[str, str]  # scheme, or "all" -> url of the proxy; "no" -> hosts to ask without


def read_proxies(option: str | None) -> dict[str, str]:
    """The proxies to use: the one of `--proxy`, none for the word `none`, or those of the usual variables.

    Raises UserError for a proxy that does not speak HTTP.
    """
    found = {} if option == "none" else urllib.request.getproxies_environment()
    if option and option != "none":
        found = {"all": option, "no": found.get("no", "")}
    proxies = {name: found[name] for name in ("http", "https", "all", "no") if found.get(name)}
    for name in set(proxies) - {"no"}:
        text = proxies[name] if "://" in proxies[name] else f"http://{proxies[name]}"
        try:
            url = URL(text)
            usable = url.scheme in PORTS and bool(url.host) and url.port is not None
        except ValueError:
            usable = False
        if not usable:
            shown = text.rpartition("@")[2]  # without its password
            raise UserError(f"the proxy {shown} is not http://HOST:PORT: give another --proxy, or --proxy none")
        proxies[name] = text
    return proxies


def proxy_for(url: URL, proxies: Proxies) -> URL | None:
    """Through which proxy a url is asked; None: directly."""
    text = proxies.get(url.scheme) or proxies.get("all")
    host = (url.raw_host or "").lower()
    for entry in proxies.get("no", "").lower().split(","):
        name = entry.strip().removeprefix("*").lstrip(".")
        if entry.strip() == "*" or name in (host, f"{host}:{url.port}") or (name and host.endswith(f".{name}")):
            return None
    return URL(text) if text else None


def lacks_descriptors(error: OSError | None = None) -> bool:
    """Whether an error, or else an attempt to open a file, says that there are no file descriptors left."""
    try:
        if error is None:
            os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as own:
        error = own
    return error is not None and error.errno in (errno.EMFILE, errno.ENFILE)


@dataclasses.dataclass
class _Lookup:
    failures: int  # in a row, this one included
    until_s: float = math.inf  # how long its result holds
    task: asyncio.Task[list[str]] | None = None


class Names(AbstractResolver):
    """Resolve each name once, through the system's name servers or the ones given (`address` or `address:port`).

    Addresses that the policy refuses never leave this class, except those of the proxies, which are the user's. A name
    that could not be asked about is asked about `tries` times, whenever somebody wants it, and then given up for a
    minute. To be made and used inside one event loop.
    """

    def __init__(
        self, policy: AddressPolicy, nameservers: Sequence[str], timeout_s: float, tries: int, proxies: Proxies
    ) -> None:
        self._policy = policy
        # no search domains: `shop` is not `shop.your-company.example`
        self._resolver = aiodns.DNSResolver(
            nameservers or None, domains=[], timeout=timeout_s / 2, tries=2, flags=pycares.ARES_FLAG_NOSEARCH
        )
        self._tries = tries
        self._lookups_at_once = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self._known: dict[str, _Lookup] = {}
        self._proxies = {URL(text).raw_host or "" for name, text in proxies.items() if name != "no"}
        self._proxy_addresses = {host for host in self._proxies if is_literal(host)}
        self._unanswered = 0  # in a row
        self._patience = SILENT_AFTER if self._proxies else math.inf

    async def addresses_of(self, host: str) -> list[str]:
        """The addresses of `host` that may be asked, from memory where it is known.

        Raises FetchError: `dns` when there is no such name (final) or no answer (retryable until it is given up),
        `refused` when it has addresses but none that may be asked.
        """
        if is_literal(host):
            return [host]
        known = self._known.get(host)
        if known is None or time.monotonic() > known.until_s:
            known = self._known[host] = _Lookup(known.failures % self._tries if known else 0)
            known.task = asyncio.ensure_future(self._look_up(host, known))
        assert known.task is not None
        # shielded: the name is asked for by others too
        return await asyncio.shield(known.task)

    async def check_behind_proxy(self, host: str) -> None:
        """Raise FetchError for a name that leads inside, as far as a name server here knows it; the proxy asks its own.

        Where none answers, names are not asked for any more.
        """
        try:
            await self.addresses_of(host)
        except FetchError as error:
            if error.outcome == REFUSED:
                raise

    def may_connect(self, address: str) -> bool:
        """The last word on every connection."""
        return self._policy.permits(address) or address in self._proxy_addresses

    async def _look_up(self, host: str, known: _Lookup) -> list[str]:
        async with self._lookups_at_once:
            try:
                found = await self._ask(host)
                self._unanswered = 0
            except aiodns.error.DNSError as error:
                code, message = error.args[0], str(error.args[-1])
                if code in _GONE:
                    known.until_s = time.monotonic() + KEEP_NAMES_S
                    raise FetchError(DNS, message) from error
                self._unanswered += 1
                known.failures += 1
                given_up = known.failures >= self._tries
                known.until_s = time.monotonic() + (GIVEN_UP_S if given_up else 0.0)
                raise FetchError(DNS, message, retryable=not given_up) from error
        known.until_s = time.monotonic() + KEEP_NAMES_S
        permitted = [address for address in found if self._policy.permits(address)]
        if not permitted:
            raise FetchError(REFUSED, f"{host} has the address {', '.join(found) or 'none'}")
        return permitted

    async def _ask(self, host: str) -> list[str]:
        if self._unanswered >= self._patience:
            raise FetchError(DNS, "no name server answers")
        while True:
            try:
                result = await self._resolver.getaddrinfo(host, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
                return [_text(node.addr[0]) for node in result.nodes]
            except aiodns.error.DNSError:
                if not lacks_descriptors():  # our own fault, which says nothing about the name
                    raise
                await asyncio.sleep(WAIT_FOR_DESCRIPTORS_S)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """aiohttp's interface: the addresses that it may connect to."""
        try:
            addresses = await (self._addresses_of_proxy(host) if host in self._proxies else self.addresses_of(host))
        except FetchError as error:
            raise OSError(None, str(error)) from error
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses
        ]

    async def _addresses_of_proxy(self, host: str) -> list[str]:
        """As the system knows it: a proxy has a local name."""
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        self._proxy_addresses.update(addresses)
        return addresses

    def forget_oldest(self, keep: int) -> None:
        """Bound the memory; not while names are being looked up."""
        drop_oldest(self._known, keep)

    async def close(self) -> None:
        """End the lookups under way."""
        tasks = [known.task for known in self._known.values() if known.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._resolver.close()


def drop_oldest(known: dict[Any, Any], keep: int) -> None:
    """Leave the `keep` entries that were made last."""
    for key in list(known)[: max(0, len(known) - keep)]:
        del known[key]


def _text(address: str | bytes) -> str:
    return address.decode() if isinstance(address, bytes) else address
