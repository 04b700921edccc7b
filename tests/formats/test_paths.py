"""`~` means home in what is a path, wherever one is named."""

import argparse
from pathlib import Path

import pytest

from formats.files import expand, location_argument, path_argument


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~", "/home/ada"),
        ("~/shards", "/home/ada/shards"),
        ("runs/~old", "runs/~old"),
        ("s3://bucket/~/shards", "s3://bucket/~/shards"),
        ("file:///data", "file:///data"),
        ("", ""),
    ],
)
def test_home_at_the_beginning_of_a_path(monkeypatch: pytest.MonkeyPatch, given: str, meant: str) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert expand(given) == location_argument(given) == meant


def test_arguments_are_paths_and_an_empty_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=path_argument)
    assert parser.parse_args(["--output=~/run"]).output == Path("/home/ada/run")
    with pytest.raises(SystemExit):
        parser.parse_args(["--output", ""])
    assert "--output: a path is empty" in capsys.readouterr().err
