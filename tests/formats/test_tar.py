"""The tar reader against `tarfile` on sound archives, and against whatever bytes there may be."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.tar import MAX_MEMBER_BYTES, TarSamples

SLOW_FILES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMES = st.one_of(
    st.sampled_from(
        [
            "a.jpg",
            "a.txt",
            "b.png",
            "b.JSON",
            "a.pkl",
            "x/y.jpg",
            "../a.jpg",
            "é.webp",
            "._a.jpg",
            "README",
            "x/.hidden",
        ]
    ),
    st.just("k" * 90 + "/" + "k" * 60 + ".jpg"),
    st.text("ab./é", min_size=1, max_size=12),
)
KINDS = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
LARGEST, NEGATIVE = b"\x80" + b"\xff" * 11, b"\xff" * 10 + b"\xf0\x00"  # sizes as GNU tar writes what octal cannot
MEMBERS = st.lists(st.tuples(NAMES, KINDS, st.binary(max_size=700)), max_size=12)


def tar_bytes(members: list[tuple[str, bytes, bytes]], tar_format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, kind, content in members:
            header = tarfile.TarInfo(name)
            header.type = kind
            header.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(header, io.BytesIO(content))
    return stream.getvalue()


def by_tarfile(path: Path) -> list[tuple[str, dict[str, bytes], bool]]:
    """(key, members, whether one of them is there twice) of each run of plain files, by the standard library alone."""
    runs: list[tuple[str, list[tuple[str, bytes]]]] = []
    with tarfile.open(path) as tar:
        for header in tar:
            folder, slash, base = header.name.rpartition("/")
            stem, dot, kind = base.partition(".")
            stream = tar.extractfile(header) if header.isreg() else None
            if stream is not None and stem and dot:
                key = f"{folder}{slash}{stem}"
                if not runs or runs[-1][0] != key:
                    runs.append((key, []))
                if kind.lower() in ("jpg", "jpeg", "png", "webp", "txt", "json"):
                    runs[-1][1].append((kind.lower(), stream.read()))
    found = []
    for key, members in runs:
        slots = ["image" if kind in ("jpg", "jpeg", "png", "webp") else kind for kind, _ in members]
        if members:
            found.append((key, dict(members), len(set(slots)) < len(slots)))
    return found


@SLOW_FILES
@given(members=MEMBERS, tar_format=st.sampled_from(FORMATS))
def test_sound_archives_read_as_tarfile_reads_them(
    tmp_path: Path, members: list[tuple[str, bytes, bytes]], tar_format: int
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members, tar_format))
    samples = TarSamples(path)
    ours = [(sample.key, sample.members, "duplicate_member" in sample.complaints) for sample in samples]
    assert ours == by_tarfile(path)
    assert samples.damage is None


@SLOW_FILES
@given(
    members=MEMBERS,
    tar_format=st.sampled_from(FORMATS),
    damage=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=40)), max_size=4),
    keep=st.floats(0, 1),
)
def test_damaged_archives_raise_nothing(
    tmp_path: Path,
    members: list[tuple[str, bytes, bytes]],
    tar_format: int,
    damage: list[tuple[int, bytes]],
    keep: float,
) -> None:
    content = bytearray(tar_bytes(members, tar_format))
    for place, garbage in damage:
        start = place % len(content)
        content[start : start + len(garbage)] = garbage
        _mend_checksum(content, start // 512 * 512)  # or else the damage is seen by the checksum alone
    check_reading(tmp_path, bytes(content[: int(keep * len(content))]))


@SLOW_FILES
@given(st.binary(max_size=4000))
def test_any_bytes_raise_nothing(tmp_path: Path, content: bytes) -> None:
    check_reading(tmp_path, content)


@SLOW_FILES
@given(
    kind=st.sampled_from(list("01234567xgLKSDVN\0")),
    size=st.binary(min_size=12, max_size=12) | st.sampled_from([b"77777777777\0", b"-1\0", LARGEST, NEGATIVE]),
    tail=st.binary(max_size=1200),
)
def test_any_header_raises_nothing(tmp_path: Path, kind: str, size: bytes, tail: bytes) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    header[124:136] = size.ljust(12, b"\0")
    header[156:157] = kind.encode()
    _mend_checksum(header, 0)
    check_reading(tmp_path, bytes(header) + tail)
    check_reading(tmp_path, (bytes(header) + tail).ljust(2048, b"\0") + tar_bytes([("b.txt", b"0", b"x")], FORMATS[0]))


def check_reading(tmp_path: Path, content: bytes) -> None:
    """Nothing raised, and every byte given is one of the file's."""
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    for sample in TarSamples(path):
        for member in sample.members.values():
            assert member in content


def _mend_checksum(content: bytearray, start: int) -> None:
    header = content[start : start + 512]
    if len(header) == 512:
        header[148:156] = b" " * 8
        content[start + 148 : start + 156] = f"{sum(header):06o}\0 ".encode()


@pytest.mark.parametrize("declared_bytes", [10 << 30, 1 << 62, (1 << 63) - 1, 1 << 80])
def test_a_member_that_claims_ten_gigabytes_is_not_believed(tmp_path: Path, declared_bytes: int) -> None:
    path = tmp_path / "x.tar"
    header = tarfile.TarInfo("b.jpg")
    header.size = declared_bytes
    sound = tar_bytes([("a.jpg", tarfile.REGTYPE, b"one"), ("a.txt", tarfile.REGTYPE, b"two")], tarfile.USTAR_FORMAT)
    path.write_bytes(sound[:2048] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    samples = TarSamples(path)
    assert [sample.key for sample in samples if not sample.complaints] == ["a"]
    assert samples.damage is not None


@pytest.mark.parametrize("size", [b"%011o\0" % (1 << 30), NEGATIVE])
@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"S"])
def test_an_extended_header_of_a_gigabyte_is_not_read_into_memory(tmp_path: Path, kind: bytes, size: bytes) -> None:
    path = tmp_path / "x.tar"
    header = tarfile.TarInfo("a.jpg")
    header.type = kind
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    _mend_checksum(block, 0)
    if kind == b"S":  # a sparse file whose map goes on and on
        block[482] = 1
        _mend_checksum(block, 0)
    with path.open("wb") as stream:
        stream.write(block)
        if kind == b"S":
            stream.write((b"00000000001\0" * 42 + b"\1" + bytes(7)) * 20_000)
        stream.truncate((1 << 30) + 4096)
    samples = TarSamples(path)
    tracemalloc.start()
    try:
        assert list(samples) == []
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert samples.damage is not None


def test_a_thousand_extended_headers_in_a_row_are_damage(tmp_path: Path) -> None:
    record = tarfile.TarInfo("x")
    record.type, record.size = tarfile.XHDTYPE, 0
    path = tmp_path / "x.tar"
    path.write_bytes(record.tobuf() * 5000)
    samples = TarSamples(path)
    assert list(samples) == []
    assert samples.damage is not None


def test_a_huge_member_is_left_out_and_what_follows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    header = tarfile.TarInfo("a.jpg")
    header.size = MAX_MEMBER_BYTES + 512
    with path.open("wb") as stream:
        stream.write(header.tobuf())
        stream.seek(header.size, io.SEEK_CUR)
        stream.write(tar_bytes([("b.jpg", tarfile.REGTYPE, b"x")], tarfile.USTAR_FORMAT))
    huge, small = TarSamples(path)
    assert (huge.complaints, huge.members) == ({"member_too_large"}, {})
    assert small.members == {"jpg": b"x"}


def test_sparse_members_are_unknown(tmp_path: Path) -> None:
    """As GNU tar writes them, old format and in pax records."""
    old = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    old[156:157] = b"S"
    _mend_checksum(old, 0)
    new = tarfile.TarInfo("b.jpg")
    new.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}
    new.size = 512
    content = b"1\n0\n0\n".ljust(512, b"\0")
    path = tmp_path / "x.tar"
    end = tar_bytes([("c.jpg", tarfile.REGTYPE, b"x")], tarfile.USTAR_FORMAT)
    path.write_bytes(bytes(old) + new.tobuf(tarfile.PAX_FORMAT) + content + end)
    samples = TarSamples(path)
    assert [sample.key for sample in samples] == ["c"]
    assert (samples.unknown_members, samples.damage) == (2, None)
