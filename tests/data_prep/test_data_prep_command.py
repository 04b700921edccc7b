from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from make_images import good_sample, write_tar
from plain_user import outcome

from data_prep.__main__ import main

COMMANDS = (
    *("build", "sources", "synthetic", "ingest", "download", "retry", "report", "pack", "tokenizer"),
    *(
        "verify",
        "reshard",
        "merge",
        "stats",
        "words",
        "concepts",
        "dedup",
        "forget",
        "embeddings",
        "clusters",
        "balance",
    ),
)


def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return capsys.readouterr().out


def test_the_help_lists_every_command_once_in_the_order_of_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(monkeypatch, capsys).splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  -")]
    assert sorted(listed) == sorted(COMMANDS)
    assert [name for name in listed if name in ("ingest", "download", "verify", "tokenizer")] == [
        "ingest", "download", "verify", "tokenizer",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_shown_as_they_are_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = " ".join(help_of(monkeypatch, capsys, command).split())
    defaults = re.findall(r"\(default: (.*?)\)", text)
    assert defaults or command in ("build", "sources")
    assert not [default for default in defaults if re.match(r"[(\['\"]|None", default)]


def test_a_home_is_a_home_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.tsv").write_text("http://a.example/1.jpg\ta cat\n")
    assert main(["ingest", "~/list.tsv", "--output=~/urls.parquet"]) == 0
    (tmp_path / "build.yaml").write_text("output: ~/built\nstages: [{ingest: {sources: ~/list.tsv, processes: 1}}]")
    assert main(["build", "~/build.yaml"]) == 0
    assert (tmp_path / "urls.parquet").is_file()
    assert (tmp_path / "built" / "urls.parquet").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_heavy_import(command: str) -> None:
    code = (
        "import sys; from data_prep.__main__ import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'pyarrow', 'numpy', 'img2dataset', 'sentencepiece', 'PIL'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "absent"], "is not a directory"),
        (["verify", "."], "holds no *.tar"),
        (["verify", "absent", "--slice", "1/2"], "is not a directory"),
        (["verify", ".", "--slice", "1/2", "--repair"], "--repair is for the last step"),
        (["stats", "absent", "--output", "x"], "is not a directory"),
        (["words", "absent", "--output", "x.json"], "is not a directory"),
        (["dedup", "absent", "--output", "x"], "is not a directory"),
        (["forget", "absent", "--host", "/dev/null"], "is empty"),
        (["merge", "absent", "--output", "x"], "is not a directory"),
        (["tokenizer", "absent", "--output", "x.model"], "is not a directory"),
        (["ingest", "absent.tsv", "--output", "x.parquet"], "no such file"),
        (["build", "absent.yaml"], "No such file"),
        (["sources", "cc11m"], "did you mean 'cc12m'"),
        (["download", "absent.parquet", "--output", "x"], "no such file"),
        (["pack", "absent", "--output", "x"], "no such file"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "data_prep", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_verify_exits_with_1_when_the_data_is_not_fit(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [*good_sample("a"), ("b.jpg", b""), ("b.txt", b"x")])
    assert main(["verify", str(tmp_path), "--processes", "1"]) == 1
    assert main(["verify", str(tmp_path), "--processes", "1", "--max-bad-ratio", "0.5"]) == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "00000.tar", good_sample("a"))
    folder.chmod(0o500)
    code, said = outcome(main, ["verify", str(folder), "--processes", "1"], tmp_path / "log")
    assert code == 2
    assert said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_counts_must_be_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "x", "--processes", value])
    assert "--processes" in capsys.readouterr().err
