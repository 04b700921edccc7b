"""One YAML file -> the whole preparation: stages run one after the other, and what is done is not done again.

    output: /scratch/cc12m
    stages:
      - ingest: {sources: cc12m.tsv, format: cc12m}
      - download: {image-size: 256}
      - verify:

A stage is a command of `data-prep` and its options by name; the command's own parser checks them, all stages before
the first one starts. Where a stage reads and writes follows from `output`, unless its options say otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from formats.errors import UserError, nearest_of
from formats.files import expand, write_json

STATE = "build.json"
SHARDS = "{output}/shards"
# command -> (positional arguments, options) where the YAML gives none; {output} is the file's `output`
DEFAULTS: Mapping[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "ingest": ((), {"output": "{output}/urls.parquet"}),
    "download": (("{output}/urls.parquet",), {"output": SHARDS}),
    "pack": ((), {"output": SHARDS}),
    "tokenizer": ((SHARDS,), {"output": "{output}/tokenizer.model"}),
}
# the option that holds positional arguments
POSITIONAL: Mapping[str, str] = {
    "ingest": "sources",
    "download": "urls",
    "pack": "source",
    "reshard": "directories",
    "merge": "directories",
}

Value = str | list[str]  # of an option in the YAML file
_ABSENT = ("", "null", "~", "false")  # a value that leaves an option out, as the YAML file spells it

Run = Callable[[Sequence[str]], int]  # a data-prep command line -> its exit code
Check = Callable[[Sequence[str]], None]  # raises UserError for arguments that the command does not take


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command line of `data-prep`; `name` tells it from others of the same command."""

    name: str
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a build file asks for."""

    output: Path
    stages: tuple[Stage, ...]


def read_plan(path: Path) -> Plan:
    """Read a build file; relative paths in it are relative to the working directory, as on a command line.

    Raises UserError for a file that is missing or not of the form above.
    """
    try:
        # every scalar is text: a resize mode called `no` shall not become False, nor a version a number
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    form = {"output": str, "stages": list}
    if not isinstance(value, dict) or {name: type(content) for name, content in value.items()} != form:
        raise UserError(f"{path}: must have `output: FOLDER` and `stages:`, a list, and nothing else")
    output = Path(expand(value["output"]))
    stages: list[Stage] = []
    for entry in value["stages"]:
        command, options = _stage_entry(path, entry)
        name = command if command not in {stage.name for stage in stages} else f"{command}-{len(stages) + 1}"
        stages.append(Stage(name, (command, *_arguments(command, options, output))))
    return Plan(output, tuple(stages))


def show(plan: Plan, check: Check) -> None:
    """Print the stages, done or to do. Raises UserError for arguments that a command does not take."""
    for stage in plan.stages:
        check(stage.arguments)
    state = _State(plan)
    for stage in plan.stages:
        print(
            f"  {'done ' if state.is_done(stage) else 'to do'}  {stage.name}: data-prep {shlex.join(stage.arguments)}"
        )


def build(plan: Plan, run: Run, check: Check, only: str | None = None, share: str | None = None) -> bool:
    """Run the stages that are not done, or that one called `only`; print what is done, to do and left.

    A stage is done when its command ended with 0 and neither it nor an earlier stage has changed since. With `share`
    ("I/N", for array jobs) the stage `only` does its share and is not done yet: the call without a share finishes it.
    Returns False when a stage found problems.

    Raises UserError for arguments that a command does not take, or an unknown `only`.
    """
    names = [stage.name for stage in plan.stages]
    if only is not None and only not in names:
        raise UserError(f"no stage {only!r}{nearest_of(only, names)}")
    show(plan, check)
    state = _State(plan)
    for stage in plan.stages:
        if stage.name != (only or stage.name) or state.is_done(stage):
            continue
        arguments = [*stage.arguments, *(["--slice", share] if share else [])]
        check(arguments)
        print(f"\n== {stage.name}: data-prep {shlex.join(arguments)}", flush=True)
        start_s = time.perf_counter()
        code = run(arguments)
        if code:
            print(f"== {stage.name} ended with {code}: mend that and run the same command again")
            return False
        what = f"slice {share} done" if share else "done"
        print(f"== {stage.name}: {what} in {time.perf_counter() - start_s:,.0f} s", flush=True)
        if not share:
            state.set_done(stage)
    left = [stage.name for stage in plan.stages if not state.is_done(stage)]
    print(f"\n{plan.output}: {'left: ' + ', '.join(left) if left else 'all stages are done'}")
    return True


class _State:
    """Which stages are done: in the output folder, the command lines that have ended well, in their order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._path = plan.output / STATE
        try:
            lines = json.loads(self._path.read_text(encoding="utf-8"))["done"] if self._path.exists() else []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path} is damaged: delete it; each stage then finds what it has done") from error
        self._done: list[list[str]] = []
        for stage, arguments in zip(plan.stages, lines, strict=False):
            if list(stage.arguments) != arguments:
                break  # what follows was made from something else
            self._done.append(arguments)

    def is_done(self, stage: Stage) -> bool:
        return self._plan.stages.index(stage) < len(self._done)

    def set_done(self, stage: Stage) -> None:
        if self._plan.stages.index(stage) == len(self._done):
            self._done.append(list(stage.arguments))
            write_json(self._path, {"done": self._done})


def _stage_entry(path: Path, entry: object) -> tuple[str, dict[str, Value]]:
    if isinstance(entry, str):
        entry = {entry: ""}
    if isinstance(entry, dict) and len(entry) == 1:
        ((command, options),) = entry.items()
        options = {} if options in _ABSENT else options
        if isinstance(options, dict) and all(map(_is_text, options.values())):
            return command, options
    raise UserError(f"{path}: a stage must look like `- download: {{image-size: 256}}`, not {str(entry)[:80]!r}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _arguments(command: str, options: Mapping[str, Value], output: Path) -> list[str]:
    """Positional arguments and options of a command line; {output} stands for the folder anywhere in them."""
    positional, defaults = DEFAULTS.get(command, ((SHARDS,), {}))
    merged: dict[str, Value] = {**defaults, **options}
    given = merged.pop(POSITIONAL.get(command, "directory"), [*positional])
    words = [given] if isinstance(given, str) else [*given]
    for name, value in merged.items():
        flag = "--" + name.replace("_", "-")
        if value == "true":
            words.append(flag)
        elif value not in _ABSENT:
            words += [flag, *(value if isinstance(value, list) else [value])]
    return [word.replace("{output}", str(output)) for word in words]
