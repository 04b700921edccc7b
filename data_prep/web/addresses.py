"""Which urls and network addresses may be asked (public ones, nothing else), and names -> checked addresses."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import socket
import time
from collections.abc import Sequence

import aiodns
import pycares
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from data_prep.web.ledger import DNS, REFUSED, FetchError

PORTS = {"http": 80, "https": 443}
MAX_URL_CHARACTERS = 4096
TEMPORARY_FAILURE_S = 20.0  # how long a name that could not be asked about is not asked about again
LOOKUPS_AT_ONCE = 100
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


class Names(AbstractResolver):
    """Resolve each name once, through the system's name servers or the ones given (`address` or `address:port`).

    Addresses that the policy refuses never leave this class. To be made and used inside one event loop.
    """

    def __init__(self, policy: AddressPolicy, nameservers: Sequence[str], timeout_s: float) -> None:
        self._policy = policy
        # no search domains: `shop` is not `shop.your-company.example`
        self._resolver = aiodns.DNSResolver(
            nameservers or None, domains=[], timeout=timeout_s / 2, tries=2, flags=pycares.ARES_FLAG_NOSEARCH
        )
        self._lookups = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self._known: dict[str, asyncio.Task[list[str]]] = {}
        self._ask_again_s: dict[str, float] = {}

    async def addresses_of(self, host: str) -> list[str]:
        """The addresses of `host` that may be asked, from memory where it is known.

        Raises FetchError: `dns` when there is no such name (final) or no answer (retryable), `refused` when it
        has addresses but none that may be asked.
        """
        if is_literal(host):
            return [host]
        if time.monotonic() > self._ask_again_s.get(host, float("inf")):
            del self._known[host], self._ask_again_s[host]
        if host not in self._known:
            self._known[host] = asyncio.ensure_future(self._look_up(host))
        # shielded: the name is asked for by others too
        return await asyncio.shield(self._known[host])

    async def _look_up(self, host: str) -> list[str]:
        async with self._lookups:
            try:
                result = await self._resolver.getaddrinfo(host, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
            except aiodns.error.DNSError as error:
                code, message = error.args[0], str(error.args[-1])
                if code in _GONE:
                    raise FetchError(DNS, message) from error
                self._ask_again_s[host] = time.monotonic() + TEMPORARY_FAILURE_S
                raise FetchError(DNS, message, retryable=True) from error
        addresses = [_text(node.addr[0]) for node in result.nodes]
        permitted = [address for address in addresses if self._policy.permits(address)]
        if not permitted:
            raise FetchError(REFUSED, f"{host} has the address {', '.join(addresses) or 'none'}")
        return permitted

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """aiohttp's interface: the addresses that it may connect to."""
        try:
            addresses = await self.addresses_of(host)
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

    async def close(self) -> None:
        """End the lookups under way."""
        for task in self._known.values():
            task.cancel()
        await asyncio.gather(*self._known.values(), return_exceptions=True)
        await self._resolver.close()


def _text(address: str | bytes) -> str:
    return address.decode() if isinstance(address, bytes) else address
