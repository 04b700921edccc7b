from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.web.addresses import AddressPolicy
from data_prep.web.ledger import FetchError

STRICT, LOCAL = AddressPolicy(), AddressPolicy(allow_local=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"])
def test_public_addresses_may_be_asked(address: str) -> None:
    assert STRICT.permits(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "100.100.100.200", "0.0.0.0", "0.1.2.3", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
        "::ffff:8.8.8.8", "::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2001:0:1:2:3:4:5:6",
        "2001:db8::1", "no address", "",
    ],
)  # fmt: skip
def test_other_addresses_may_not(address: str) -> None:
    assert not STRICT.permits(address)
    assert LOCAL.permits(address) == (address in ("127.0.0.1", "127.8.8.8", "::1"))


@given(st.ip_addresses(v=4, network="10.0.0.0/8") | st.ip_addresses(v=4, network="192.168.0.0/16"))
def test_no_private_address_passes_in_any_ipv6_disguise(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    disguises = [number, 0xFFFF << 32 | number, 0x64FF9B << 96 | number, 0x2002 << 112 | number << 80]
    assert not any(STRICT.permits(str(ipaddress.IPv6Address(disguise))) for disguise in disguises)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.org/1.jpg", "data:image/png;base64,AAAA", "//example.org/1.jpg", "1.jpg",
        "http://", "http:///1.jpg", "http://example.org:8080/", "https://example.org:22/", "http://127.0.0.1/",
        "http://[::1]/", "http://[::ffff:169.254.169.254]/", "http://me:secret@example.org/", "http://me@example.org/",
        "http://example.org/" + "x" * 5000, "http://exa mple.org:port/", "http://[bad/", "javascript:alert(1)",
        "http://example.org:99999/", "http://example.org:port/",
    ],
)  # fmt: skip
def test_what_is_no_plain_web_address_is_refused(url: str) -> None:
    with pytest.raises(FetchError) as caught:
        STRICT.check(url)
    assert caught.value.outcome == "refused"
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "url", ["http://example.org/a%2Fb%20c?d=%3D%3d#e", "https://example.org:443/1", "http://8.8.8.8/", "HTTP://A.org/x"]
)
def test_escapes_stay_as_they_are(url: str) -> None:
    assert str(STRICT.check(url)).lower().startswith(url.split(":443")[0].lower())
    assert "%2Fb%20c?d=%3D%3d" in url or "%" not in str(STRICT.check(url))


def test_what_is_not_ascii_is_escaped() -> None:
    assert STRICT.check("http://bücher.example/ä b.jpg").raw_path == "/%C3%A4%20b.jpg"
    assert STRICT.check("http://bücher.example/").raw_host == "xn--bcher-kva.example"


def test_a_local_server_needs_its_switch_and_may_have_any_port() -> None:
    assert LOCAL.check("http://127.0.0.1:8765/1.jpg").port == 8765
    with pytest.raises(FetchError):
        LOCAL.check("http://169.254.169.254/")
