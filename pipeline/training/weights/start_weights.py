"""Weights that training starts from (`model.start_from`): found, checked, fitted to the image size, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from formats.errors import UserError
from formats.files import sha256_of
from model.clip import CLIP
from model.positions import fit_positions
from pipeline.data.tokenizer import ClipBytePairs, Tokenizer
from pipeline.inference import first_mismatch, read_card
from pipeline.ranks import Ranks
from pipeline.training.run_record import read_record
from pipeline.training.weights.weight_sources import WeightsFile, find_weights, own_traits, read_traits, read_weights

RECORD_KEY = "start_weights_sha256"


def load_start_weights(clip: CLIP, source: str, tokenizer: Tokenizer, ranks: Ranks) -> str:
    """Give `clip` the weights at `source` (`weight_sources.find_weights`) on all ranks; returns their file's sha256.

    The main rank alone reads (collective). Positions of patches are resized to the model's grid, those of captions
    cut to its context length. Raises UserError if anything else does not fit: sizes, vocabulary or tokenizer,
    activation, pooling, heads.
    """
    sha256 = _from_main(lambda: _load(clip, Path(source), tokenizer), ranks)
    ranks.broadcast(clip.state_dict().values())
    return sha256


def check_start_weights(resumed_run: Path | None, source: str, ranks: Ranks) -> str:
    """The sha256 of the weights at `source` that a run starts from, "" for none (collective).

    resumed_run: directory of a run to be continued, which has weights of its own: those at `source` may be gone, but
    UserError if they are others than it started from
    """
    if resumed_run is None:
        return _from_main(lambda: _sha256(source), ranks)
    return _from_main(lambda: _check_unchanged(resumed_run, source), ranks)


def _sha256(source: str) -> str:
    return sha256_of(find_weights(Path(source)).path) if source else ""


def _check_unchanged(run_directory: Path, source: str) -> str:
    before = str(read_record(run_directory).get(RECORD_KEY, ""))
    if source and not Path(source).exists():
        return before
    now = _sha256(source)
    if before != now:
        raise UserError(
            f"{run_directory} was started from {_describe(before)}, now model.start_from={source} is "
            f"{_describe(now)}: give the same, or choose another train.output"
        )
    return before


def _describe(sha256: str) -> str:
    return f"weights with sha256 {sha256[:12]}…" if sha256 else "no weights"


def _from_main(make_sha256: Callable[[], str], ranks: Ranks) -> str:
    """What the main rank makes, on all ranks; if it raises UserError, all do, so that none waits for ever."""
    sha256, error = "", None
    if ranks.is_main:
        try:
            sha256 = make_sha256()
        except UserError as caught:
            error = caught
    if ranks.any(error is not None):
        raise error or UserError("stopped, since rank 0 could not read model.start_from")
    return ranks.broadcast_sha256(sha256)


def _load(clip: CLIP, source: Path, tokenizer: Tokenizer) -> str:
    file = find_weights(source)
    _check_traits(clip, file)
    _check_tokenizer(file, tokenizer)
    config = clip.config
    weights = read_weights(file, clip.state_dict())
    try:
        weights = fit_positions(weights, config.vision.num_patches, config.text.context_length)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{file.path} does not fit a {config.name}: {error}") from error
    mismatch = first_mismatch(clip, weights)
    if mismatch:
        raise UserError(f"{file.path} does not fit a {config.name}: {mismatch}; choose the model.name they are of")
    clip.load_state_dict(weights)
    sha256 = sha256_of(file.path)
    print(f"starting from {file.path} (sha256 {sha256[:12]}…)", flush=True)
    return sha256


def _check_traits(clip: CLIP, file: WeightsFile) -> None:
    theirs, ours = read_traits(file), own_traits(clip.config)
    for name, value in (theirs or {}).items():
        if value != ours[name]:
            raise UserError(
                f"{file.config}: {name} {value}, and the recipe's model has {ours[name]}: set model.name, "
                "model.activation and model.pool to what the weights were trained with"
            )


def _check_tokenizer(file: WeightsFile, tokenizer: Tokenizer) -> None:
    if file.library == "ours":
        assert file.config is not None
        if read_card(file.config.parent).get("tokenizer_sha256") != tokenizer.sha256:
            raise UserError(
                f"{file.config.parent} was trained with another tokenizer: give its tokenizer.bin as data.tokenizer"
            )
    elif not isinstance(tokenizer.encoder, ClipBytePairs):
        raise UserError(
            f"{file.path} was trained with CLIP's byte pairs, and data.tokenizer is a SentencePiece model: its ids "
            "mean other words; use data.tokenizer=clip-bpe"
        )
