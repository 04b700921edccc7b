"""Weights that training starts from (`model.start_from`): found, checked, fitted to the image size, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from formats.errors import UserError
from formats.files import sha256_of
from model.clip import CLIP
from model.config import CLIPConfig
from model.packing import PIXEL_MEAN, PIXEL_STD
from model.towers import fit_positions
from pipeline.data.captions import ClipBytePairs, Tokenizer
from pipeline.foreign.byte_pairs import byte_pairs_of
from pipeline.foreign.foreign_model import ForeignModel, find_foreign, read_foreign
from pipeline.ranks import Ranks
from pipeline.training.checkpoints.checkpoint import MODEL_CARD, read_tensors
from pipeline.training.run_record import read_record
from pipeline.training.weights.run_weights import find_model, is_ours, read_card

RECORD_KEY = "start_weights_sha256"
_BIAS = "logit_bias"


def load_start_weights(clip: CLIP, source: str, tokenizer: Tokenizer, ranks: Ranks) -> str:
    """Give `clip` the weights of a run, or of a model of another library, on all ranks; returns their file's sha256.

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
    if not source:
        return ""
    path = _existing(Path(source))
    foreign = None if is_ours(path) else find_foreign(path)
    return foreign.sha256 if foreign else sha256_of(find_model(path)[1])


def _existing(path: Path) -> Path:
    if not path.exists() and not is_ours(path):
        raise UserError(f"no weights at {path}: give a run, open_clip's file or folder, or transformers' folder")
    return path


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


@dataclass(frozen=True)
class _Start:
    """Weights under our names, and what is known of the model they are of (None: a file without a configuration)."""

    path: Path
    sha256: str
    config_file: Path
    config: CLIPConfig | None
    weights: dict[str, Tensor]


def _load(clip: CLIP, source: Path, tokenizer: Tokenizer) -> str:
    path = _existing(source)
    foreign = None if is_ours(path) else find_foreign(path)
    start = _read_foreign(read_foreign(foreign), clip, tokenizer) if foreign else _read_ours(path, tokenizer)
    _check_traits(clip.config, start)
    weights = _fitted(clip, start)
    clip.load_weights(weights)
    print(f"starting from {start.path} (sha256 {start.sha256[:12]}…)", flush=True)
    return start.sha256


def _read_ours(path: Path, tokenizer: Tokenizer) -> _Start:
    checkpoint, file = find_model(path)
    card = read_card(checkpoint)
    if card.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(f"{checkpoint} was trained with another tokenizer: give its tokenizer.bin as data.tokenizer")
    try:
        config = CLIPConfig.from_dict(card["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint / MODEL_CARD} does not describe a model: {error}") from error
    return _Start(file, sha256_of(file), checkpoint / MODEL_CARD, config, read_tensors(file))


def _read_foreign(model: ForeignModel, clip: CLIP, tokenizer: Tokenizer) -> _Start:
    files = model.files
    if not isinstance(tokenizer.encoder, ClipBytePairs):
        raise UserError(
            f"{files.path} was trained with CLIP's byte pairs, and data.tokenizer is a SentencePiece model: its ids "
            "mean other words; use data.tokenizer=clip-bpe"
        )
    theirs = model.own_tokenizer(tokenizer.context_length)
    if theirs is not None and byte_pairs_of(theirs.encoder).merges != tokenizer.encoder.merges:
        raise UserError(f"{files.folder} was trained with other byte pairs than those of data.tokenizer: use its own")
    if model.config is None and model.is_openai and clip.config.activation != "quick_gelu":
        raise UserError(f"{files.path} is of OpenAI's form, which has QuickGELU: set model.activation=quick_gelu")
    _note_other_pixels(model)
    return _Start(files.path, files.sha256, model.config_file, model.config, model.weights(clip.state_dict()))


def _note_other_pixels(model: ForeignModel) -> None:
    """Training makes pixels its own way; weights of other ones can still learn from them."""
    size = model.config.vision.image_size if model.config else 1
    try:
        pixels = model.preprocessing(size)
    except UserError as error:
        print(f"note: {error}")
        return
    if (pixels.mean, pixels.std) != (PIXEL_MEAN, PIXEL_STD):
        print(f"note: {model.files.path} was trained on pixels with mean {pixels.mean}, here it is {PIXEL_MEAN}")


def _check_traits(ours: CLIPConfig, start: _Start) -> None:
    """What a model does that its weights do not show."""
    for name, value in _traits(start.config).items() if start.config else ():
        expected = _traits(ours)[name]
        if value != expected:
            raise UserError(
                f"{start.config_file}: {name} {value}, and the recipe's model has {expected}: set model.name, "
                "model.activation and model.pool to what the weights were trained with"
            )
    if start.config:
        _note_other_text(ours, start.config, start.config_file)


def _note_other_text(ours: CLIPConfig, theirs: CLIPConfig, file: Path) -> None:
    """A text tower can learn to see less or more, as after a stage that predicts masked words."""
    for name, here, there in (
        ("text_attention", ours.text.attention, theirs.text.attention),
        ("text_pool", ours.text.pool, theirs.text.pool),
    ):
        if here != there:
            print(f"note: {file}: trained with model.{name}={there}, here it is {here}")


def _traits(config: CLIPConfig) -> dict[str, str | int]:
    return {
        "activation": config.activation,
        "image pooling": config.vision.pool,
        "image heads": config.vision.heads,
        "text heads": config.text.heads,
    }


def _fitted(clip: CLIP, start: _Start) -> dict[str, Tensor]:
    """The weights at the model's image size and context length; UserError if they are of another model."""
    config = clip.config
    try:
        weights = fit_positions(start.weights, config.vision.num_patches, config.text.context_length)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{start.path} does not fit a {config.name}: {error}") from error
    if clip.logit_bias is None and _BIAS in weights:
        raise UserError(f"{start.path} has a {_BIAS}, which is of the sigmoid loss: set loss.kind=sigmoid")
    if clip.logit_bias is not None and _BIAS not in weights:
        weights[_BIAS] = clip.logit_bias.detach()
        print(f"note: {start.path} has no {_BIAS}: it begins at {clip.logit_bias.item():g}")
    mismatch = clip.first_mismatch(weights)
    if mismatch:
        raise UserError(f"{start.path} does not fit a {config.name}: {mismatch}; choose the model.name they are of")
    return weights
