from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from killed_at import kill_at
from make_images import encoded

from data_prep.__main__ import main
from data_prep.build import Plan, build, read_plan
from formats.errors import UserError

ROOT = Path(__file__).parents[2]


class Commands:
    """Notes what is run; the command `fails` ends with 1 as often as it says."""

    def __init__(self, fails: str = "", times: int = 0) -> None:
        self.ran: list[str] = []
        self._fails, self._times = fails, times

    def __call__(self, arguments: Sequence[str]) -> int:
        self.ran.append(" ".join(arguments))
        if arguments[0] == self._fails and self._times:
            self._times -= 1
            return 1
        return 0


def accept(arguments: Sequence[str]) -> None:
    pass


def plan_of(folder: Path, *stages: object) -> Plan:
    path = folder / "build.yaml"
    path.write_text(json.dumps({"output": str(folder / "out"), "stages": stages}))  # JSON is YAML
    return read_plan(path)


def test_options_become_command_lines(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        {"ingest": {"sources": ["a.tsv", "b c.tsv"], "unique": ["url", "caption"], "min_side": 200, "language": None}},
        {"download": {"image-size": 256, "resize_mode": "no", "fast": True, "slow": False}},
        "verify",
        {"verify": {"directory": "{output}/more", "max-bad-ratio": 0.5}},
        {"tokenizer": None},
    )
    out = tmp_path / "out"
    assert [stage.name for stage in plan.stages] == ["ingest", "download", "verify", "verify-4", "tokenizer"]
    assert [" ".join(stage.arguments) for stage in plan.stages] == [
        f"ingest a.tsv b c.tsv --output {out}/urls.parquet --unique url caption --min-side 200",
        f"download {out}/urls.parquet --output {out}/shards --image-size 256 --resize-mode no --fast",
        f"verify {out}/shards",
        f"verify {out}/more --max-bad-ratio 0.5",
        f"tokenizer {out}/shards --output {out}/tokenizer.model",
    ]


def test_words_of_yaml_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("output: 0123\nstages: [{download: {resize-mode: no, timeout-s: 1_0, retries: }}, verify: ]")
    plan = read_plan(path)
    assert " ".join(plan.stages[0].arguments[2:]) == "--output 0123/shards --resize-mode no --timeout-s 1_0"
    assert plan.stages[1].arguments == ("verify", "0123/shards")


def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, {"ingest": {"sources": "a"}}, "download", "verify")
    run = Commands(fails="download", times=1)
    assert not build(plan, run, accept)
    assert [line.split()[0] for line in run.ran] == ["ingest", "download"]
    assert build(plan, run, accept)
    assert [line.split()[0] for line in run.ran] == ["ingest", "download", "download", "verify"]
    assert build(plan, run, accept)
    assert len(run.ran) == 4
    assert "all stages are done" in capsys.readouterr().out


def test_a_changed_stage_and_those_after_it_run_again(tmp_path: Path) -> None:
    build(plan_of(tmp_path, {"ingest": {"sources": "a"}}, "download", "verify"), Commands(), accept)
    run = Commands()
    build(plan_of(tmp_path, {"ingest": {"sources": "a"}}, {"download": {"image-size": 1}}, "verify"), run, accept)
    assert [line.split()[0] for line in run.ran] == ["download", "verify"]


def test_slices_of_one_stage_leave_it_to_be_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, {"ingest": {"sources": "a"}}, "download", "verify")
    run = Commands()
    assert build(plan, run, accept, only="ingest")
    assert "left: download, verify" in capsys.readouterr().out
    for index in range(2):
        assert build(plan, run, accept, only="download", share=f"{index}/2")
    assert build(plan, run, accept)
    assert [line.split()[0] for line in run.ran] == ["ingest", "download", "download", "download", "verify"]
    assert [line.partition("--slice ")[2] for line in run.ran] == ["", "0/2", "1/2", "", ""]
    with pytest.raises(UserError, match="did you mean 'download'"):
        build(plan, run, accept, only="downlaod")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\nstages: {ingest: 1}", "must have"),
        ("output: x", "must have"),
        ("stages: [ingest]\noutput: x\nmore: 1", "must have"),
        ("output: [", "line 1"),
        ("output: x\nstages: [[1]]", "must look like"),
        ("output: x\nstages: [{ingest: [1]}]", "must look like"),
        ("output: x\nstages: [{ingest: {}, verify: {}}]", "must look like"),
        ("output: x\nstages: [verify, {download: {imagesize: 3}}]", "download: unrecognized arguments: --imagesize 3"),
        ("output: x\nstages: [{ingest: {format: cc12m}}]", "ingest: the following arguments are required: SOURCE"),
        ("output: x\nstages: [verify, {dawnload: {}}]", "dawnload: .*invalid choice"),
        ("output: x\nstages: [{verify: {processes: 0}}]", "must be at least 1"),
        ("output: !!python/object/apply:os.system [id]\nstages: []", "must have"),
        ("output: x\nstages: [{ingest: {sources: {a: 1}}}]", "must look like"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    config = tmp_path / "build.yaml"
    config.write_text(text)
    assert main(["build", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["build.yaml"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00"])
def test_a_damaged_note_of_what_is_done_is_named(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "build.yaml"
    config.write_text(f"output: {tmp_path}\nstages: [verify]\n")
    (tmp_path / "build.json").write_text(content)
    assert main(["build", str(config), "--dry-run"]) == 2
    assert "build.json is damaged: delete it" in capsys.readouterr().err


def test_a_slice_needs_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(tmp_path / "x.yaml"), "--slice", "0/2"]) == 2
    assert "--only" in capsys.readouterr().err


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(example), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["ingest:", "download:", "verify:", "tokenizer:"]


def write_inputs(folder: Path) -> Path:
    """A url list, local pictures, and a build file for both."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for index in range(120):
        (photos / f"{index:03d}.jpg").write_bytes(encoded(size=8))
        (photos / f"{index:03d}.txt").write_text(f"picture {index} of a red circle and a blue square")
    urls = "".join(f"http://a.example/{index % 9000}\tcaption {index}\n" for index in range(10_000))
    (folder / "list.tsv").write_text(urls)
    config = folder / "build.yaml"
    stages = [
        {"ingest": {"sources": str(folder / "list.tsv")}},
        {"pack": {"source": str(photos), "samples-per-shard": 10, "overwrite": True}},
        {"verify": {"processes": 1}},
        {"tokenizer": {"vocab-size": 300}},
    ]
    config.write_text(json.dumps({"output": str(folder / "out"), "stages": stages}))
    return config


def content(folder: Path) -> dict[str, object]:
    """Every file of a built folder; what says how it was made or when, in a form that can be compared."""
    files: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".parquet":
            files[name] = pq.read_table(path).to_pydict()
        elif name not in ("build.json", "urls.ingest.json") and path.suffix != ".part":  # what a kill left
            files[name] = path.read_bytes()
    return files


@pytest.mark.slow
def test_a_build_killed_at_any_stage_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    calm, rough = write_inputs(tmp_path / "calm"), write_inputs(tmp_path / "rough")
    assert main(["build", str(calm)]) == 0
    out = tmp_path / "rough" / "out"
    for moment in (
        "urls.parquet.ingest-work/*.arrow",
        "build.json",
        "shards.partial/00005.tar",
        "shards",
        "shards/manifest.jsonl",
        "tokenizer.model",
    ):
        kill_at(out / moment, "-m", "data_prep", "build", str(rough))
    assert main(["build", str(rough)]) == 0
    assert content(out) == content(tmp_path / "calm" / "out")
    shutil.rmtree(out / "shards")  # done is done: nothing looks at the files again
    assert main(["build", str(rough)]) == 0
    assert not (out / "shards").exists()
