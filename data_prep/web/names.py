"""Host names -> checked addresses: asynchronous, cached, and with a memory for names that do not exist."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence

import aiodns
import pycares
from aiohttp.abc import AbstractResolver, ResolveResult

from data_prep.web.addresses import AddressPolicy, is_literal
from data_prep.web.outcomes import DNS, REFUSED, FetchError

TEMPORARY_FAILURE_S = 20.0  # how long a name that could not be asked about is not asked about again
LOOKUPS_AT_ONCE = 100
_GONE = (pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA, pycares.errno.ARES_EBADNAME)


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
