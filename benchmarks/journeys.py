"""Which of the project's modules a batch, a url and an evaluation image really pass through, in order.

`python benchmarks/journeys.py` makes a little data, runs the real programs on it under Python's profiler hook, notes
each function of the project that is called between the two ends of a journey, and writes docs/journeys.md and
results/journeys.json. A module counts when one of its functions runs; importing it does not.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import http.server
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples")]

from record import record
from serve import QuietHandler

from data_prep.__main__ import main as data_prep
from data_prep.web.passes import Pass, Settings
from data_prep.web.shard_worker import ShardWorker
from pipeline.evaluate import main as evaluate
from pipeline.train import main as train

PACKAGES = ("model", "formats", "data_prep", "pipeline")
PAGE = ROOT / "docs" / "journeys.md"
MOST = {"batch_modules": 20, "url_modules": 15, "evaluation_image_modules": 12, "trainer_imports": 20}


@dataclass
class Journey:
    """The modules met between the call of `first` and the return of `last`, both names of functions.

    skip: how many calls of `first` begin earlier journeys
    """

    first: str
    last: str
    skip: int = 0
    modules: list[str] = field(default_factory=list)
    is_open: bool = False
    is_over: bool = False

    def watch(self, frame: FrameType, event: str, argument: Any) -> None:
        """A profiler function."""
        if self.is_over or event not in ("call", "return"):
            return
        code = frame.f_code
        module = _module_of(code)
        if module is None:
            return
        if event == "call":
            if not self.is_open and code.co_name == self.first:
                self.is_open = self.skip == 0
                self.skip -= 1
            if self.is_open:
                self._meet(module)
        elif self.is_open and code.co_name == self.last:
            self.is_open, self.is_over = False, True

    def _meet(self, module: str) -> None:
        if module not in self.modules:
            self.modules.append(module)


def _module_of(code: CodeType) -> str | None:
    """The project's module of a function; None for others' and for what runs when a module is imported."""
    if code.co_name == "<module>" or not code.co_filename.startswith(str(ROOT)):
        return None
    path = Path(code.co_filename).relative_to(ROOT)
    is_class_body = code.co_flags & 0x2 == 0  # not CO_NEWLOCALS: runs once, when the class is made
    return str(path) if path.parts[0] in PACKAGES and not is_class_body else None


@contextlib.contextmanager
def followed(*journeys: Journey, all_threads: bool = False) -> Iterator[None]:
    """Note what is called meanwhile: in this thread, or also in those that are started, which decode images."""

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        for journey in journeys:
            journey.watch(frame, event, argument)

    if all_threads:
        threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def quietly(program: Callable[[Sequence[str]], int], *arguments: object) -> None:
    """Run a program of the project in this process, its output kept for an error."""
    code = program([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f"{program.__module__} {arguments}: exit {code}")


def make_material(folder: Path, port: int) -> None:
    """Shards, a tokenizer, evaluation sets, and a list of urls whose pictures wait on a port of this machine."""
    address = f"http://127.0.0.1:{port}"
    drawn = folder / "drawn"
    quietly(data_prep, "synthetic", drawn, "--train", 64, "--validation", 16, "--processes", 1, "--base-url", address)
    quietly(data_prep, "ingest", drawn / "train.tsv", "--output", folder / "urls.parquet", "--processes", 1)
    quietly(data_prep, "pack", drawn / "train.csv", "--output", folder / "shards")
    quietly(data_prep, "verify", folder / "shards", "--processes", 1)
    quietly(data_prep, "tokenizer", folder / "shards", "--output", folder / "tok.model", "--vocab-size", 300)


def follow_batches(folder: Path) -> tuple[list[str], list[str]]:
    """From the request for a batch to the update of the weights: the first batch of a shard, and the one after it."""
    arguments = ["--recipe", "tiny_cpu", f"data.train={folder / 'shards'}", f"train.output={folder / 'run'}"]
    arguments += [f"data.tokenizer={folder / 'tok.model'}", f"data.cache_directory={folder / 'cache'}"]
    arguments += ["data.workers=0", "train.max_steps=2", "optimizer.warmup_steps=1", "log.watch_steps=false"]
    arguments += ["train.global_batch_size=16", "train.micro_batch_size=16"]
    first, second = Journey("_next_batches", "train_step"), Journey("_next_batches", "train_step", skip=1)
    with followed(first, second):
        quietly(train, *arguments)
    return first.modules, second.modules


def follow_image(folder: Path) -> list[str]:
    """From the headers of its tar to the keeping of its features."""
    opening, encoding = Journey("read_tar_samples", "read_tar_samples"), Journey("_load_image", "write")
    with followed(opening, encoding, all_threads=True):
        data = folder / "drawn" / "eval" / "retrieval"
        quietly(evaluate, "--checkpoint", folder / "run", "--data", data, "--output", folder / "evaluation")
    return list(dict.fromkeys([*opening.modules, *encoding.modules]))


def follow_url(folder: Path) -> list[str]:
    """From the row of a list of urls to the sample in a tar and the line in the ledger, in the process that does it."""
    one = Pass(0, folder / "urls.parquet", rows=1, classes=(), first_shard=0, samples_per_shard=1)
    worker = ShardWorker(folder / "downloaded", one, Settings(allow_local=True))
    (folder / "downloaded" / "_tmp").mkdir(parents=True)
    with followed(journey := Journey("__call__", "__call__"), all_threads=True):
        is_done, _ = worker((0, one.rows_of(0)))
    if not is_done or not (folder / "downloaded" / "00000.tar").exists():
        raise SystemExit("the url was not downloaded")
    return journey.modules


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[int]:
    """A web server on 127.0.0.1 whose root is a folder, and its port."""
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    tree = ast.parse(path.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name for name in names if name.split(".")[0] in PACKAGES}


def purpose_of(module: str) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / module).read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def follow_all() -> dict[str, list[str]]:
    """The modules of each journey, on data made for it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "drawn").mkdir()
        with serving(folder / "drawn") as port:
            make_material(folder, port)
            url = follow_url(folder)
        new_shard, batch = follow_batches(folder)
        return {"url": url, "batch": batch, "new_shard": new_shard, "image": follow_image(folder)}


def figures_of(journeys: dict[str, list[str]]) -> dict[str, int]:
    """What results/journeys.json holds; the packages' size beside the lengths of the ways."""
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {
        "url_modules": len(journeys["url"]),
        "batch_modules": len(journeys["batch"]),
        "batch_of_a_new_shard_modules": len({*journeys["batch"], *journeys["new_shard"]}),
        "evaluation_image_modules": len(journeys["image"]),
        "trainer_imports": len(imports_of(ROOT / "pipeline" / "training" / "trainer.py")),
        "modules": len([path for path in sources if path.name != "__init__.py"]),
        "python_lines": sum(len(path.read_text().splitlines()) for path in sources),
    }


def page_of(journeys: dict[str, list[str]]) -> str:
    """docs/journeys.md."""
    chapters = [INTRODUCTION]
    for name, title in TITLES.items():
        modules = journeys[name]
        if name == "new_shard":
            modules = [module for module in modules if module not in journeys["batch"]]
        lines = [f"{number}. `{module}`: {purpose_of(module)}" for number, module in enumerate(modules, 1)]
        chapters.append("\n\n".join([*title, "\n".join(lines)]))
    return "\n\n".join(chapters) + "\n"


INTRODUCTION = """# Three journeys

The shortest introduction to the code: the modules that a url, a batch and an evaluation image really pass through, in
the order in which they first do something. `python benchmarks/journeys.py` runs the real programs on a little data,
notes which of the project's functions are called on the way, and writes this page. What only starts, watches or ends a
program is not on it."""
TITLES = {
    "url": (
        "## A url, from the list to the tar",
        "`data-prep download` cuts the list into shards and gives each to a process, which does this:",
    ),
    "batch": (
        "## A batch, from the tar to the weights",
        "One step of `pipeline/train.py`, with cluster masks; begin with `train_step.py`:",
    ),
    "new_shard": (
        "### The first batch of a shard",
        "A shard that has not been read before is opened, and the index of its samples made. That takes these, too:",
    ),
    "image": (
        "## An evaluation image, from the tar to its kept features",
        "`pipeline/evaluate.py` encodes each image once and keeps its features; tasks are arithmetic on them:",
    ),
}


def main() -> None:
    """Follow all, write page and figures; says so, with exit code 1, where a way is longer than it may be."""
    journeys = follow_all()
    figures = figures_of(journeys)
    PAGE.write_text(page_of(journeys))
    path = record("journeys", figures, "python benchmarks/journeys.py", repeats=1)
    for name, figure in figures.items():
        print(f"{name:30}{figure:>8,}" + (f"   (at most {MOST[name]})" if name in MOST else ""))
    print(f"{PAGE.relative_to(ROOT)}, {path.relative_to(ROOT)}")
    too_long = [name for name, most in MOST.items() if figures[name] > most]
    if too_long:
        sys.exit(f"longer than aimed at: {', '.join(too_long)}")


if __name__ == "__main__":
    main()
