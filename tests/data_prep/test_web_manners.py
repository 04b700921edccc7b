"""Robots, rates, names, and the last word on every connection."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import gzip
import itertools
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest
from make_images import encoded
from raw_web import RawWeb, answer
from small_dns import SERVER_FAILURE, SmallDns
from small_web import Page, SmallWeb
from yarl import URL

from data_prep.web import addresses, http_client, manners
from data_prep.web.addresses import AddressPolicy, Names, proxy_for, read_proxies
from data_prep.web.http_client import HttpClient, user_agent
from data_prep.web.ledger import FetchError
from data_prep.web.manners import HostLimits, check_header
from data_prep.web.passes import Settings
from formats.errors import UserError

SETTINGS = Settings(timeout_s=1.0, deadline_s=2.0, retries=0, allow_local=True)
RULES = b"User-agent: *\nDisallow: /photos/\n"


@pytest.fixture
def dns() -> Iterator[SmallDns]:
    with SmallDns() as server:
        yield server


@pytest.fixture
def web() -> Iterator[SmallWeb]:
    with SmallWeb() as server:
        yield server


def outcome_of(url: str, settings: Settings = SETTINGS) -> str:
    """The class and message of a failure, or `ok`."""

    async def ask() -> str:
        async with HttpClient(settings) as client:
            try:
                async with client.image(url):
                    return "ok"
            except FetchError as error:
                return str(error)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ([], True),
        (["all"], True),
        (["noarchive, nofollow"], True),
        (["noai"], False),
        (["NoIndex, nofollow"], False),
        (["nofollow", "noimageai"], False),
        (["none"], False),
        (["noml"], False),
        (["noimageindex"], False),
        (["googlebot: noindex"], True),
        (["googlebot: nofollow, noindex"], True),
        (["img2dataset: noindex"], False),
        (["cluster-clip-data-prep: noai"], False),
        (["*: noai"], False),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], False),
        (["max-snippet: 20, nofollow"], True),
        (["googlebot: nofollow", "noai"], False),
        (["", ", ,:"], True),
    ],
)
def test_robots_headers(values: list[str], allowed: bool) -> None:
    if allowed:
        check_header(values)
    else:
        with pytest.raises(FetchError, match="opt-out"):
            check_header(values)


@pytest.mark.parametrize(
    ("robots", "expected"),
    [
        (Page(b"User-agent: *\nDisallow: /"), "opt-out: robots.txt disallows it"),
        (Page(b"User-agent: *\nDisallow: /*.jpg$"), "opt-out: robots.txt disallows it"),
        (Page(b"User-agent: *\nDisallow: /\nAllow: /photos/"), "ok"),  # the longer rule counts
        (Page(b"User-agent: img2dataset\nDisallow: /\n\nUser-agent: *\nAllow: /"), "opt-out: robots.txt disallows it"),
        (Page(b"User-agent: googlebot\nDisallow: /"), "ok"),
        (Page(b"\xff\xfe<html>not a robots file" + b"x" * 600_000), "ok"),
        (Page(b"\xef\xbb\xbf" + RULES), "opt-out: robots.txt disallows it"),  # or its first line would be lost
        (Page(b"\xff\xfe" + RULES.decode().encode("utf-16-le")), "opt-out: robots.txt disallows it"),
        (Page(gzip.compress(RULES)), "opt-out: robots.txt disallows it"),
        (
            Page(gzip.compress(gzip.compress(RULES)), headers={"Content-Encoding": "GZIP, gzip"}),
            "opt-out: robots.txt disallows it",
        ),
        (Page(gzip.compress(RULES), headers={"Content-Encoding": "x-gzip"}), "opt-out: robots.txt disallows it"),
        (Page(zlib.compress(RULES), headers={"Content-Encoding": "deflate"}), "opt-out: robots.txt disallows it"),
        (Page(zlib.compress(RULES)[2:-4], headers={"Content-Encoding": "Deflate"}), "opt-out: robots.txt disallows it"),
        (Page(RULES, headers={"Content-Encoding": "gzip"}), "opt-out: robots.txt disallows it"),  # it is not
        (Page(RULES, headers={"Content-Encoding": "text/plain"}), "opt-out: robots.txt disallows it"),
        (
            Page(gzip.compress(RULES + b"# " + bytes(50_000_000))),
            "other: robots.txt: not text (Content-Encoding: none)",
        ),
        (Page(RULES.decode().encode("utf-32")), "other: robots.txt: not text (Content-Encoding: none)"),
        (Page(gzip.compress(RULES)[:15]), "other: robots.txt: damaged compression: cut off"),
        (Page(gzip.compress(RULES)[:-10]), "other: robots.txt: damaged compression: cut off"),
        (Page(b"\x1f\x8b garbage"), "other: robots.txt: damaged compression: Error -3 while decompressing data: "),
        (
            Page(b"\x8b\x05\x80 brotli", headers={"Content-Encoding": "br"}),
            "other: robots.txt: not text (Content-Encoding: br)",
        ),
        (Page(status=404), "ok"),
        (Page(status=403), "ok"),
        (Page(status=302, headers={"Location": "/other.txt"}), "opt-out: robots.txt disallows it"),
        (Page(status=503), "5xx: robots.txt: HTTP 503 Service Unavailable"),
        (Page(status=302, headers={"Location": "http://10.0.0.1/robots.txt"}), "refused: robots.txt: address 10.0.0.1"),
    ],
)
def test_robots_files(web: SmallWeb, robots: Page, expected: str) -> None:
    web.pages = {
        "/robots.txt": robots,
        "/other.txt": Page(b"User-agent: *\nDisallow: /photos"),
        "/photos/1.jpg": Page(b"x"),
    }
    outcome = outcome_of(web.url("/photos/1.jpg"))
    assert outcome == expected or (expected.endswith(": ") and outcome.startswith(expected))
    assert web.requests["/photos/1.jpg"] == (expected == "ok")


def test_no_robots_file_takes_long_to_read(web: SmallWeb) -> None:
    """A pattern that costs a backtracking matcher years; the next page shows that it was matched at all."""
    path = "/" + "a" * 200
    web.pages = {"/robots.txt": Page(b"User-agent: *\nDisallow: /" + b"*a" * 20 + b"*b$"), path: Page(b"x")}
    start_s = time.monotonic()
    assert outcome_of(web.url(path)) == "ok"
    assert outcome_of(web.url(path + "b")) == "opt-out: robots.txt disallows it"
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize("pause", ["Mon, 01 Jan 2024 00:00:00 +99999999999999", "soon", "-1", "9" * 5000])
def test_a_pause_that_makes_no_sense_is_still_a_429(web: SmallWeb, pause: str) -> None:
    web.pages = {"/1.jpg": Page(status=429, headers={"Retry-After": pause})}
    assert outcome_of(web.url("/1.jpg")) == "429: HTTP 429 Too Many Requests"


def test_a_redirect_may_not_lead_around_robots(web: SmallWeb) -> None:
    web.pages = {
        "/robots.txt": Page(b"User-agent: *\nDisallow: /private/"),
        "/open": Page(status=302, headers={"Location": "/private/1.jpg"}),
        "/private/1.jpg": Page(b"x"),
    }
    assert outcome_of(web.url("/open")).startswith("opt-out")
    assert not web.requests["/private/1.jpg"]


def test_the_socket_has_the_last_word(web: SmallWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even an address that no other check has seen is not connected to."""
    monkeypatch.setattr(AddressPolicy, "check", lambda _, text: http_client.URL(text))
    assert outcome_of(web.url("/1.jpg"), dataclasses.replace(SETTINGS, allow_local=False)) == (
        "refused: robots.txt: address 127.0.0.1"
    )
    assert not web.requests


def header_lines() -> Iterator[bytes]:
    return (b"X-%d: %s\r\n" % (number, b"x" * 4000) for number in itertools.count())


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (b"HTTP/1.1 200 OK\r\n", header_lines),
        (b"HTTP/1.1 200 OK\r\nX: ", lambda: itertools.repeat(b"x" * 4000)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", header_lines),
    ],
    ids=["headers", "one header", "trailers"],
)
def test_headers_without_end_end_long_before_the_deadline(head: bytes, more: Callable[[], Iterator[bytes]]) -> None:
    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client hangs up
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    is_robots = b"robots.txt" in connection.recv(65_536)
                    connection.sendall(b"HTTP/1.1 404 Absent\r\nContent-Length: 0\r\n\r\n" if is_robots else head)
                    for part in () if is_robots else more():
                        connection.sendall(part)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        start_s = time.monotonic()
        outcome = outcome_of(f"http://127.0.0.1:{listener.getsockname()[1]}/1.jpg")
        assert outcome.partition(":")[0] in ("other", "connect")
        assert time.monotonic() - start_s < SETTINGS.deadline_s / 2


def test_a_slow_body_ends_before_its_deadline(web: SmallWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    def trickle() -> Iterator[bytes]:
        while True:
            yield bytes(10)
            time.sleep(0.05)

    monkeypatch.setattr(http_client, "SLOW_START_S", 0.3)
    web.pages = {"/1.jpg": Page(stream=trickle)}
    start_s = time.monotonic()
    assert outcome_of(web.url("/1.jpg")).endswith("bytes/s")
    assert time.monotonic() - start_s < 1.5


def test_the_user_agent_says_who_asks() -> None:
    assert "(+https://example.org/bot)" in user_agent("https://example.org/bot")
    assert "Mozilla" not in user_agent(None)


def lookups(dns: SmallDns, hosts: list[str], tries: int = 3) -> list[list[str] | str]:
    async def ask() -> list[list[str] | str]:
        resolver = Names(AddressPolicy(), [dns.address], timeout_s=0.6, tries=tries, proxies={})
        found: list[list[str] | str] = []
        for host in hosts:
            try:
                found.append(await resolver.addresses_of(host))
            except FetchError as error:
                found.append(error.outcome + ("?" if error.retryable else "!"))
        await resolver.close()
        return found

    return asyncio.run(ask())


def test_names_are_asked_once_and_checked(dns: SmallDns) -> None:
    dns.names = {"a.example": ["8.8.8.8"], "mixed.example": ["10.0.0.1", "8.8.4.4"], "inside.example": ["192.168.0.1"]}
    hosts = ["a.example", "mixed.example", "inside.example", "gone.example", "8.8.8.8"]
    expected = [["8.8.8.8"], ["8.8.4.4"], "refused!", "dns!", ["8.8.8.8"]]
    assert lookups(dns, hosts) == expected
    questions = dns.questions.copy()
    assert lookups(dns, hosts * 3) == expected * 3
    assert dns.questions - questions == questions  # the second run asks what the first one did, and nothing twice


@pytest.mark.parametrize("answer", [SERVER_FAILURE, None])
def test_each_retry_of_a_name_sends_a_question_until_it_is_given_up(dns: SmallDns, answer: int | None) -> None:
    dns.names = {"ill.example": answer}
    assert lookups(dns, ["ill.example"], tries=1) == ["dns!"]
    once = dns.questions["ill.example"]
    assert lookups(dns, ["ill.example"] * 5, tries=3) == ["dns?", "dns?", "dns!", "dns!", "dns!"]
    assert dns.questions["ill.example"] == (1 + 3) * once


def test_a_name_that_was_given_up_is_asked_about_again_later(dns: SmallDns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "GIVEN_UP_S", 0.0)
    dns.names = {"ill.example": SERVER_FAILURE}
    assert lookups(dns, ["ill.example"] * 4, tries=2) == ["dns?", "dns!", "dns?", "dns!"]


def test_an_answer_that_changes_is_not_asked_for_again(dns: SmallDns, web: SmallWeb) -> None:
    """DNS rebinding: between the check and the connection nothing is resolved."""
    dns.names = {"photos.example": ["127.0.0.1"]}
    web.pages = {"/1.jpg": Page(encoded(0))}
    assert (
        outcome_of(web.url("/1.jpg", "photos.example"), dataclasses.replace(SETTINGS, nameservers=(dns.address,)))
        == "ok"
    )
    assert dns.questions["photos.example"] == 1


@pytest.mark.parametrize(
    "location", [b"/caf\xc3\xa9.jpg", b"/caf\xe9.jpg", b"/two words.jpg", b"/caf%C3%A9.jpg?x=\xff"]
)
def test_a_redirect_may_hold_any_bytes(location: bytes) -> None:
    with RawWeb() as web:
        web.pages = {"/1.jpg": answer(b"302 D\xe9plac\xe9", b"Location: " + location + b"\r\n")}
        expected = "".join(chr(byte) if 32 < byte < 127 else f"%{byte:02X}" for byte in location)
        web.pages[expected] = answer(body=b"x")
        assert outcome_of(web.url("/1.jpg")) == "ok"


@pytest.mark.parametrize("kept", ["", "identity", "Identity, IDENTITY", "none", "UTF-8", "binary", "aws-chunked"])
def test_content_encodings_that_change_nothing(web: SmallWeb, kept: str) -> None:
    web.pages = {"/1.jpg": Page(b"x", headers={"Content-Encoding": kept})}
    assert outcome_of(web.url("/1.jpg")) == "ok"


def test_headers_may_be_long(web: SmallWeb) -> None:
    web.pages = {"/1.jpg": Page(b"x", headers={"Content-Security-Policy": "x" * 64_000})}
    assert outcome_of(web.url("/1.jpg")) == "ok"


def test_a_lack_of_descriptors_is_waited_for(web: SmallWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing about the url, not even in the number of tries."""
    asked, real = [], HttpClient._socket

    def scarce(client: HttpClient, address: tuple[object, ...]) -> socket.socket:
        asked.append(address)
        if len(asked) in (1, 2, 4):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(client, address)

    monkeypatch.setattr(HttpClient, "_socket", scarce)
    monkeypatch.setattr(http_client, "WAIT_FOR_DESCRIPTORS_S", 0.01)
    web.pages = {"/1.jpg": Page(b"x")}
    assert outcome_of(web.url("/1.jpg")) == "ok"
    assert len(asked) == 5  # three for robots.txt, two for the picture


def most_sockets(urls: list[str], settings: Settings) -> int:
    """How many a client has open that asks for urls one after the other."""

    async def ask() -> int:
        most = 0
        async with HttpClient(settings) as client:
            for url in urls:
                async with client.image(url):
                    pass
                most = max(most, len([kept for kept in client._sockets if kept.fileno() >= 0]))
        return most

    return asyncio.run(ask())


def test_kept_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MAX_KEPT_CONNECTIONS", 3)
    with SmallWeb("0.0.0.0") as everywhere:
        everywhere.pages = {"/1.jpg": Page(b"x"), "/robots.txt": Page()}
        everywhere.keep_connections()
        urls = [everywhere.url("/1.jpg", f"127.0.0.{number}") for number in range(2, 12)]
        assert most_sockets(urls, SETTINGS) <= 3 + 1  # and the one that was used last
        assert everywhere.requests["/1.jpg"] == 10


def through_proxy(proxy: RawWeb, url: str, **options: object) -> str:
    proxies = (("all", f"http://user:secret@127.0.0.1:{proxy.port}"), ("no", "direct.example, .inside.example"))
    return outcome_of(url, dataclasses.replace(SETTINGS, proxies=proxies, **options))


def test_a_proxy_is_asked_for_everything_but_its_exceptions(dns: SmallDns) -> None:
    with RawWeb() as proxy, RawWeb() as direct:
        dns.names = {"direct.example": ["127.0.0.1"]}
        options = {"nameservers": (dns.address,)}
        proxy.pages = {"http://photos.example/1.jpg": answer(body=b"x"), "http://8.8.8.8/1.jpg": answer(body=b"x")}
        direct.pages = {"/1.jpg": answer(body=b"x")}
        assert through_proxy(proxy, "http://photos.example/1.jpg", **options) == "ok"
        assert through_proxy(proxy, "http://8.8.8.8/1.jpg", **options) == "ok"
        assert through_proxy(proxy, direct.url("/1.jpg", "direct.example"), **options) == "ok"
        assert proxy.requests["http://photos.example/robots.txt"] == 1
        assert direct.requests == {"/robots.txt": 1, "/1.jpg": 1}
        assert all(b"\r\nProxy-Authorization: Basic " in head for head in proxy.heads)
        assert not any(b"Proxy-Authorization" in head for head in direct.heads)


def test_what_a_proxy_says_of_itself_is_nothing_of_the_url() -> None:
    with RawWeb() as proxy:
        proxy.pages = {"http://a.example/robots.txt": answer(b"407 Proxy Authentication Required")}
        for url in (
            "http://a.example/1.jpg",
            "https://a.example/1.jpg",
        ):  # the latter: CONNECT, which is not known here
            outcome = through_proxy(proxy, url)
            assert outcome.startswith("connect: robots.txt: the proxy: HTTP 40")
            assert "secret" not in outcome


def test_a_proxy_may_have_a_name_that_only_this_system_knows() -> None:
    with RawWeb() as proxy:
        proxy.pages = {"http://8.8.8.8/1.jpg": answer(body=b"x")}
        proxies = (("http", f"http://localhost:{proxy.port}"),)
        assert (
            outcome_of("http://8.8.8.8/1.jpg", dataclasses.replace(SETTINGS, proxies=proxies, allow_local=False))
            == "ok"
        )


def test_behind_a_proxy_addresses_are_checked_as_far_as_they_are_known(dns: SmallDns) -> None:
    with RawWeb() as proxy:
        dns.names = {"inner.example": ["192.168.0.1"], "mute.example": None}
        proxy.pages = {"http://mute.example/1.jpg": answer(body=b"x")}
        options = {"nameservers": (dns.address,), "allow_local": False, "timeout_s": 0.4}
        for url, outcome in {
            "http://inner.example/1.jpg": "refused: inner.example has the address 192.168.0.1",
            "http://169.254.169.254/latest/meta-data": "refused: address 169.254.169.254",
            f"http://127.0.0.1:{proxy.port}/1.jpg": f"refused: port {proxy.port}",
            "http://mute.example/1.jpg": "ok",
        }.items():
            assert through_proxy(proxy, url, **options) == outcome
        assert set(proxy.requests) == {"http://mute.example/robots.txt", "http://mute.example/1.jpg"}


def test_where_no_name_server_answers_a_proxy_is_not_waited_for(dns: SmallDns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "SILENT_AFTER", 2)
    names = [f"host{number}.example" for number in range(9)]
    dns.names = dict.fromkeys(names)

    async def ask() -> None:
        resolver = Names(AddressPolicy(), [dns.address], 0.2, tries=1, proxies={"all": "http://127.0.0.1:1"})
        for name in names:
            await resolver.check_behind_proxy(name)
        await resolver.close()

    asyncio.run(ask())
    assert set(dns.questions) == set(names[:2])


def test_the_usual_variables_say_which_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert read_proxies(None) == {}
    monkeypatch.setenv("HTTP_PROXY", "one:3128")
    monkeypatch.setenv("https_proxy", "http://two:3128")
    monkeypatch.setenv("NO_PROXY", "cluster.example,*.local")
    found = read_proxies(None)
    assert found == {"http": "http://one:3128", "https": "http://two:3128", "no": "cluster.example,*.local"}
    for url, proxy in {
        "http://a.example/": "http://one:3128", "https://a.example/": "http://two:3128", "http://notcluster.example/": "http://one:3128",
        "http://cluster.example/": None, "https://a.cluster.example/": None, "http://x.local/": None,
    }.items():  # fmt: skip
        assert proxy_for(URL(url), found) == (proxy and URL(proxy))
    assert read_proxies("http://three:1") == {"all": "http://three:1", "no": "cluster.example,*.local"}
    assert read_proxies("none") == {}
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@four:1080")
    with pytest.raises(UserError, match=r"the proxy four:1080 is not http://HOST:PORT: .*--proxy none"):
        read_proxies(None)


def run_turns(limits: HostLimits, count: int, error: FetchError | None = None, work_s: float = 0.0) -> tuple[int, int]:
    """(most requests at once, requests made) of `count` turns at one host."""
    at_once, most, made = 0, 0, 0

    async def one() -> None:
        nonlocal at_once, most, made
        try:
            async with limits.turn("host"):
                made += 1
                at_once += 1
                most = max(most, at_once)
                await asyncio.sleep(work_s)
                at_once -= 1
                if error:
                    raise error
        except FetchError:
            pass

    async def all_turns() -> None:
        await asyncio.gather(*(one() for _ in range(count)))

    asyncio.run(all_turns())
    return most, made


def test_a_host_is_asked_no_faster_than_said() -> None:
    start_s = time.monotonic()
    assert run_turns(HostLimits(3, requests_per_s=1000), 9, work_s=0.02) == (3, 9)
    start_s = time.monotonic()
    run_turns(HostLimits(10, requests_per_s=20), 7)
    assert time.monotonic() - start_s >= 6 / 20


def test_a_dead_host_is_given_up_and_a_missing_file_is_no_reason_to() -> None:
    dead = FetchError("timeout", "no answer", retryable=True)
    assert run_turns(HostLimits(1, 1e6), 100, dead)[1] == manners.GIVE_UP_AFTER
    assert run_turns(HostLimits(1, 1e6), 100, FetchError("4xx", "gone"))[1] == 100


def test_a_host_that_asks_for_a_pause_gets_it_or_is_left_alone() -> None:
    start_s = time.monotonic()
    assert run_turns(HostLimits(1, 1e6), 3, FetchError("429", "busy", retry_after_s=0.1))[1] == 3
    assert time.monotonic() - start_s >= 0.2
    assert run_turns(HostLimits(1, 1e6), 3, FetchError("429", "busy", retry_after_s=3600))[1] == 1
