"""Export a checkpoint to open_clip or transformers; the folder appears once it has been read back and compared."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import shutil
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from formats.errors import UserError
from formats.files import flush_to_disk, location_argument, path_argument
from formats.programs import run
from pipeline.exporting.export_formats import FORMATS, ExportFormat
from pipeline.exporting.parity import (
    Difference,
    Examples,
    examples_from,
    random_examples,
    reload_difference,
    with_captions,
)
from pipeline.inference import InferenceModel, load_for_inference


def main(argv: Sequence[str]) -> int:
    """Export as the arguments say; returns the exit code. Raises UserError for everything that does not fit."""
    arguments = _parser().parse_args(argv)
    model = load_for_inference(arguments.checkpoint, torch.device("cpu"))
    examples = examples_from(arguments.images, model) if arguments.images else random_examples(model)
    if arguments.captions:
        examples = with_captions(examples, arguments.captions, model)
    export_format = FORMATS[arguments.format]
    difference = export(model, export_format, arguments.output, examples)
    print(
        f"{model.name}, {model.checkpoint}, step {model.step} -> {arguments.output}\n"
        f"read back and compared on {examples.description}: unit-length features differ by at most "
        f"{difference.image:.1e} (images), {difference.text:.1e} (texts)\n"
        f"load it with {export_format.load_with.format(arguments.output)}",
        flush=True,
    )
    return 0


def export(model: InferenceModel, export_format: ExportFormat, directory: Path, examples: Examples) -> Difference:
    """Write `directory`, read its weights back and compare: what is there is complete and gives the same features.

    Raises UserError if the format cannot hold the model, if the directory is already there or cannot be written, or if
    features differ.
    """
    text_files = export_format.text_files(model)
    if directory.exists():
        raise UserError(f"{directory} is already there: choose another --output")
    unfinished = directory.with_name(f".{directory.name}.unfinished")  # a name that nobody else's folder has
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed export left
    try:
        unfinished.mkdir(parents=True)
        for name, content in text_files.items():
            (unfinished / name).write_text(content, encoding="utf-8")
        weights = unfinished / export_format.weights_file
        difference = _write_weights(model, export_format, weights, examples)
        # safetensors makes files for their owner alone
        shutil.copymode(unfinished / next(iter(text_files)), weights)
        for path in unfinished.iterdir():
            flush_to_disk(path)
        unfinished.rename(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def _write_weights(model: InferenceModel, export_format: ExportFormat, path: Path, examples: Examples) -> Difference:
    own = model.clip.state_dict()
    theirs = {name: value.contiguous() for name, value in export_format.to_theirs(own).items()}
    origin = {"step": model.step, "samples_seen": model.samples_seen, "weights_sha256": model.weights_sha256}
    # transformers insists on "format"; the rest says where the file comes from
    save_file(theirs, path, metadata={"format": "pt"} | {name: str(value) for name, value in origin.items()})
    difference = reload_difference(model.clip, export_format.from_theirs(load_file(path), own), examples)
    if not difference.is_small:
        raise UserError(
            f"{model.checkpoint} was not exported: read back, its features differ by {difference.image:.1e} (images), "
            f"{difference.text:.1e} (texts); nan means that its training diverged: choose an earlier checkpoint"
        )
    return difference


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Export a checkpoint to a folder that open_clip or transformers loads, offline.",
        epilog="example: python pipeline/export.py runs/first --format open_clip --output exports/first",
    )
    parser.add_argument("checkpoint", type=location_argument, metavar="RUN", help="run or checkpoint directory")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="the library that is to load it")
    parser.add_argument("--output", required=True, type=path_argument, metavar="DIR", help="new folder")
    parser.add_argument(
        "--images",
        type=path_argument,
        metavar="DIR",
        help="evaluation set, shards, tar or folder of images to compare features on (default: random ones)",
    )
    parser.add_argument(
        "--captions",
        type=path_argument,
        metavar="FILE",
        help="captions to compare features on, one per line (default: those of --images)",
    )
    return parser


if __name__ == "__main__":
    run(main)
