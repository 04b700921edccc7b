"""Which urls and which network addresses may be asked: public ones, and nothing else."""

from __future__ import annotations

import dataclasses
import ipaddress

from yarl import URL

from data_prep.web.outcomes import REFUSED, FetchError

PORTS = {"http": 80, "https": 443}
MAX_URL_CHARACTERS = 4096

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
