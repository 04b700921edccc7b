"""Export a checkpoint to open_clip or transformers; the folder appears once it has been read back and compared."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.errors import UserError
from formats.files import flush_to_disk, location_argument, path_argument, read_text
from formats.programs import run
from model.clip import CLIP
from model.config import CLIPConfig
from model.open_clip_weights import from_open_clip, to_open_clip
from model.packing import normalize_pixels
from model.transformers_weights import from_transformers, to_transformers
from pipeline.data.captions import TextEncoder
from pipeline.foreign import open_clip_folder, transformers_folder
from pipeline.image_sources import load_image, read_images
from pipeline.inference import InferenceModel, load_for_inference

Weights = Mapping[str, Tensor]

TOLERANCE = 1e-5
MAX_CAPTIONS = 256


@dataclass(frozen=True)
class ExportFormat:
    """One library's folder: the weights' file and names, the text files beside it, and how to load it.

    `from_theirs` takes their weights and the state dict of the model to be loaded. `text_files` raises ValueError if
    the library cannot hold the model.
    """

    weights_file: str
    to_theirs: Callable[[Weights], dict[str, Tensor]]
    from_theirs: Callable[[Weights, Weights], dict[str, Tensor]]
    text_files: Callable[[CLIPConfig, TextEncoder], dict[str, str]]
    load_with: str


FORMATS = {
    "open_clip": ExportFormat(
        open_clip_folder.WEIGHTS,
        to_open_clip,
        lambda theirs, _: from_open_clip(theirs),
        open_clip_folder.text_files,
        'open_clip.create_model("local-dir:{}")',
    ),
    "transformers": ExportFormat(
        transformers_folder.WEIGHTS,
        to_transformers,
        from_transformers,
        transformers_folder.text_files,
        'transformers.CLIPModel.from_pretrained("{}")',
    ),
}


@dataclass(frozen=True)
class Examples:
    """Normalised pixels [B, 3, S, S] and token ids [n, T], and where they are from."""

    images_BCHW: Tensor
    tokens_BT: Tensor
    images_from: str
    captions_from: str

    @property
    def description(self) -> str:
        """What is compared, in words."""
        return (
            f"{len(self.images_BCHW)} images of {self.images_from}, {len(self.tokens_BT)} captions of "
            f"{self.captions_from}"
        )


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference between two models' unit-length features."""

    image: float
    text: float

    @property
    def is_small(self) -> bool:
        """Within TOLERANCE; false for features that are not finite."""
        return self.image <= TOLERANCE and self.text <= TOLERANCE


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
    try:
        text_files = export_format.text_files(model.clip.config, model.tokenizer.encoder)
    except ValueError as error:
        raise UserError(f"{model.checkpoint} was trained with {error}") from error
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


def random_examples(model: InferenceModel, count: int = 4) -> Examples:
    """Noise images, and captions of 1 to `count` random tokens; the same in every call."""
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randint(0, 256, (count, 3, model.image_size, model.image_size), generator=generator)
    encoder, config = model.tokenizer.encoder, model.clip.config.text
    longest = min(count, config.context_length - 2)
    tokens_BT = torch.full((count, longest + 2), encoder.end_token_id)
    tokens_BT[:, 0] = encoder.start_token_id
    for row in range(count):
        words = torch.randint(0, encoder.start_token_id, (min(row + 1, longest),), generator=generator)
        tokens_BT[row, 1 : 1 + len(words)] = words
    return Examples(normalize_pixels(images_BCHW), tokens_BT, "random noise", "random tokens")


def examples_from(directory: Path, model: InferenceModel) -> Examples:
    """Some images and captions of an evaluation set, a shard directory or a folder.

    Raises UserError if the directory is none of these, or an image does not decode.
    """
    samples = read_images(directory)
    images = [load_image(sample.image, model.image_size) for sample in samples]
    tokens_BT = model.tokenizer.encode_batch([sample.caption for sample in samples])
    return Examples(normalize_pixels(torch.stack(images)), tokens_BT, str(directory), str(directory))


def with_captions(examples: Examples, path: Path, model: InferenceModel) -> Examples:
    """The same images, and the captions of a text file, one per line: the first MAX_CAPTIONS that are not empty.

    Raises UserError if there are none.
    """
    captions = [line.strip() for line in read_text(path).splitlines() if line.strip()][:MAX_CAPTIONS]
    if not captions:
        raise UserError(f"{path} is empty: expected captions, one per line")
    return replace(examples, tokens_BT=model.tokenizer.encode_batch(captions), captions_from=str(path))


@torch.inference_mode()
def reload_difference(clip: CLIP, weights: Mapping[str, Tensor], examples: Examples) -> Difference:
    """How far a new model with these weights is from `clip` (in evaluation mode, on the CPU)."""
    reloaded = CLIP(clip.config)
    reloaded.load_state_dict(weights)
    reloaded.eval()
    image_BD = clip.encode_image(examples.images_BCHW) - reloaded.encode_image(examples.images_BCHW)
    text_BD = clip.encode_text(examples.tokens_BT) - reloaded.encode_text(examples.tokens_BT)
    return Difference(image_BD.abs().max().item(), text_BD.abs().max().item())


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
