"""Draw originals, clusters and kept patches of some images, side by side for several strategies."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from formats.errors import UserError
from formats.files import location_argument, path_argument, write_atomically
from formats.pages import render
from formats.programs import run
from model.masking import STRATEGIES
from pipeline.recipe_files import load_recipe
from pipeline.reporting.masks.painter import paint
from pipeline.reporting.masks.setting import make_setting, parse_strategies
from pipeline.reporting.masks.sheet import SHOWS, Sheet, load_images, make_sheet

_TEMPLATE = Path(__file__).parent / "reporting" / "templates" / "mask_preview.html.j2"
_DEFAULT_RECIPE = "base"
_DEFAULT_STRATEGIES = "random,cluster,pgs"
# All images are in memory at once, and on one sheet.
_MAX_IMAGES, _MAX_SIDE = 200, 2048
_MAX_SEED = (1 << 63) - 1
# Options of a recipe under masking.NAME that have a short name here.
_RATIOS = ("target_mask_ratio", "min_mask_ratio", "max_mask_ratio", "anchor_ratio")


def main(argv: Sequence[str]) -> int:
    """Write the picture or page; returns the exit code. Raises UserError for everything that does not fit."""
    options = _parser().parse_intermixed_args(argv)  # overrides may stand among the options
    encode = _encoder(options.output)
    recipe = load_recipe(options.recipe or _DEFAULT_RECIPE, [*options.overrides, *options.ratios])
    listed = options.strategies or (recipe.masking.strategy if options.recipe else _DEFAULT_STRATEGIES)
    setting = make_setting(
        recipe,
        parse_strategies(listed),
        options.checkpoint,
        options.patch_size,
        options.image_size,
        options.seed,
        options.progress,
    )
    samples, images_BCSS = load_images(options.source, options.images, setting.image_size)
    sheet = make_sheet(setting, samples, images_BCSS, options.show)
    _write(options.output, encode(sheet))
    print(*sheet.summaries, options.output.resolve(), sep="\n", flush=True)
    return 0


def _encoder(output: Path) -> Callable[[Sheet], bytes]:
    """How a sheet becomes the content of this file; UserError for a directory and for an unknown suffix."""
    if output.is_dir():
        raise UserError(f"{output} is a directory: --output takes a file, e.g. {output / 'masks.jpg'}")
    suffix = output.suffix.lower()
    if suffix not in _ENCODERS:
        raise UserError(f"cannot write {str(output)!r}: --output takes a file that ends in {', '.join(_ENCODERS)}")
    return _ENCODERS[suffix]


def _encode_picture(sheet: Sheet, kind: str) -> bytes:
    stream = io.BytesIO()
    paint(sheet).save(stream, kind, progressive=True, optimize=True)
    return stream.getvalue()


_ENCODERS: dict[str, Callable[[Sheet], bytes]] = {
    ".jpg": lambda sheet: _encode_picture(sheet, "JPEG"),
    ".jpeg": lambda sheet: _encode_picture(sheet, "JPEG"),
    ".png": lambda sheet: _encode_picture(sheet, "PNG"),
    ".html": lambda sheet: render(_TEMPLATE, {"sheet": sheet}).encode(),
}


def _write(output: Path, content: bytes) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, content)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mask-preview",
        description="Draw what masking keeps of some images, side by side for several strategies, with the clusters "
        "behind it: patches in the colour of the anchor they resemble most, anchors framed.",
        epilog="example: mask-preview photos --strategies random,cluster,pgs --output masks.jpg",
    )
    parser.add_argument(
        "source", type=path_argument, metavar="SOURCE", help="folder, tar, shard directory or evaluation set"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that override the recipe")
    parser.add_argument("--output", required=True, type=path_argument, metavar="FILE", help=", ".join(_ENCODERS))
    parser.add_argument(
        "--strategies",
        metavar="LIST",
        help=f"of {','.join(STRATEGIES)} (default: the recipe's, without one {_DEFAULT_STRATEGIES})",
    )
    parser.add_argument("--recipe", help="what a run would do: a recipe's name, or a YAML file such as RUN/recipe.yaml")
    parser.add_argument(
        "--checkpoint", type=location_argument, metavar="RUN", help="model for attentive and masking.embedding_mix"
    )
    count, side, seed = _whole(1, _MAX_IMAGES), _whole(1, _MAX_SIDE), _whole(0, _MAX_SEED)
    parser.add_argument("--images", type=count, default=8, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--image-size", type=side, metavar="PX", help="side (default: the recipe's model's)")
    parser.add_argument("--patch-size", type=side, metavar="PX", help="side (default: the recipe's model's)")
    for name in _RATIOS:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest="ratios",
            action="append",
            default=[],
            type=partial("masking.{}={}".format, name),
            metavar="R",
            help=f"the recipe's masking.{name}",
        )
    parser.add_argument("--seed", type=seed, metavar="N", help="of the masks (default: the recipe's, 0)")
    parser.add_argument(
        "--progress",
        type=_share,
        default=1.0,
        metavar="R",
        help="through training, 0 to 1, for schedules and masking.embedding_mix (default: %(default)s, the end)",
    )
    parser.add_argument(
        "--show",
        choices=SHOWS,
        default="clusters",
        help="kept patches alone, the clusters behind them too (default), or also anchors and similarities",
    )
    return parser


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    """A type of argument: whole numbers between two."""

    def number(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} to {highest}, not {text!r}")
        return int(text)

    return number


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, not {text!r}")
    return value


def command() -> NoReturn:
    """The console script."""
    run(main)


if __name__ == "__main__":
    command()
