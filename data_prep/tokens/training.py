"""Train a tokenizer on the captions of a shard directory: SentencePiece, or byte pairs in CLIP's form."""

from __future__ import annotations

import dataclasses
import io
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from data_prep.console import print_counts, progress_bar
from data_prep.tokens.clip_merges import SINGLE_BYTES, ClipBytePairs, installed_merges
from data_prep.tokens.fertility import fertility, print_fertility
from formats.errors import UserError
from formats.files import replacing, write_json
from formats.manifest import find_shards
from formats.tar import TarSamples
from formats.texts import TextError, decode_text

BYTE_PAIRS = "byte-pairs"
PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
# SentencePiece sums its statistics thread by thread: a fixed number gives the same model on every machine
TRAINER_THREADS = 8
RESERVED = "\u2585"
LONGEST_BY_DEFAULT_BYTES = 4192
BYTE_PIECES = 256
SPECIAL_PIECES = 4
PROBE_CAPTIONS = 10_000  # of the sample, for the report


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """What to train.

    `model_type` is "byte-pairs", in CLIP's form, which open_clip and transformers read, or SentencePiece's
    "unigram" or "bpe". Unigram takes as pieces what several words share, so that with few distinct words it breaks even
    common ones apart; there "bpe" is better.
    `vocab_size` is an upper limit: few captions give fewer pieces. With more than `max_captions` captions, a uniform
    sample drawn from `seed` is used. `special_tokens` are texts that always are one piece, such as CC12M's <PERSON>.
    """

    model_type: str = "unigram"
    vocab_size: int = 8192
    max_captions: int = 2_000_000
    seed: int = 0
    special_tokens: tuple[str, ...] = ()


def train_tokenizer(directory: Path, output: Path, settings: TokenizerSettings, clip_merges: Path | None = None) -> int:
    """Train a tokenizer that knows every byte and no capitals; returns the size of its vocabulary.

    Ids of SentencePiece: 0 padding, 1 unknown, 2 begin, 3 end, then the special tokens. Prints a fertility report,
    beside CLIP's tokenizer where `clip_merges` or an installed open_clip has its merges, and writes it to
    `*.fertility.json`.

    Raises UserError for a directory without captions or a vocabulary too small for the single bytes.
    """
    _check_settings(settings)
    merges = clip_merges or installed_merges()
    clip = ClipBytePairs.read(merges) if merges else None
    left_out: Counter[str] = Counter()
    captions = _sample(_captions(directory, left_out), settings.max_captions, settings.seed)
    print_counts("left out", "captions", left_out)
    if not captions:
        raise UserError(f"{directory} has no captions (*.txt members) to train on")
    trained = _byte_pairs(captions, settings) if settings.model_type == BYTE_PAIRS else _pieces(captions, settings)
    with replacing(output) as temporary:
        temporary.write_bytes(trained.content)
    print(f"{output}: {trained.size:,} pieces from {len(captions):,} captions")
    probe = captions[:: math.ceil(len(captions) / PROBE_CAPTIONS)]
    reports = {"this": fertility(probe, trained.encode, trained.is_byte)}
    if clip:
        reports["CLIP's"] = fertility(probe, clip.encode, clip.is_byte)
    print_fertility(reports)
    write_json(
        output.with_suffix(".fertility.json"),
        {name: dataclasses.asdict(report) for name, report in reports.items()} | {"captions": len(probe)},
    )
    return trained.size


class _Trained(NamedTuple):
    """A tokenizer: its file's content, and what the report asks of it."""

    content: bytes
    size: int
    encode: Callable[[Sequence[str]], list[list[int]]]
    is_byte: Callable[[int], bool]


def _check_settings(settings: TokenizerSettings) -> None:
    fixed = BYTE_PIECES + SPECIAL_PIECES + len(settings.special_tokens)
    if settings.model_type == BYTE_PAIRS:
        fixed = SINGLE_BYTES + 2
        if settings.special_tokens:
            raise UserError(
                "--special-tokens: CLIP's form has none; leave them out, or take --model-type unigram or bpe"
            )
    if settings.vocab_size <= fixed:
        raise UserError(f"--vocab-size must exceed {fixed} (the bytes and special pieces)")


def _byte_pairs(captions: list[str], settings: TokenizerSettings) -> _Trained:
    pairs = ClipBytePairs.train(captions, settings.vocab_size)
    return _Trained(pairs.to_file(), pairs.vocab_size, pairs.encode, pairs.is_byte)


def _pieces(captions: list[str], settings: TokenizerSettings) -> _Trained:
    model = _train(captions, settings)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    _check(processor, settings.special_tokens)
    return _Trained(model, int(processor.vocab_size()), processor.encode, processor.is_byte)


def _check(processor: sentencepiece.SentencePieceProcessor, special_tokens: Sequence[str]) -> None:
    """Every byte must have a piece, so that no text is unknown, and every special token exactly one."""
    bytes_found = sum(processor.is_byte(token) for token in range(processor.vocab_size()))
    if bytes_found != BYTE_PIECES:
        raise UserError(f"SentencePiece made {bytes_found} of {BYTE_PIECES} byte pieces: raise --vocab-size")
    for token in special_tokens:
        if processor.encode(f"a {token} b", out_type=str).count(token) != 1:
            raise UserError(f"the special token {token!r} does not stay whole: choose one without spaces")


def _captions(directory: Path, left_out: Counter[str]) -> Iterator[str]:
    shards = find_shards(directory)
    with progress_bar("read captions", len(shards), "shard") as progress:
        for path in shards:
            for sample in TarSamples(path, types=("txt",)):
                try:
                    text = decode_text(sample.members.get("txt", b""))
                except TextError:
                    left_out["not UTF-8"] += 1
                    continue
                if text:
                    yield text
            progress.update()


def _sample(captions: Iterator[str], size: int, seed: int) -> list[str]:
    """A uniform sample of at most `size` captions in one pass (Vitter's algorithm R)."""
    rng = random.Random(seed)
    kept: list[str] = []
    for index, caption in enumerate(captions):
        if index < size:
            kept.append(caption)
        elif (slot := rng.randrange(index + 1)) < size:
            kept[slot] = caption
    return kept


def _train(captions: list[str], settings: TokenizerSettings) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # SentencePiece leaves out, unsaid, sentences with this character and those that are too long
            sentence_iterator=(caption.replace(RESERVED, " ") for caption in captions),
            max_sentence_length=max(LONGEST_BY_DEFAULT_BYTES, *(len(caption.encode()) for caption in captions)),
            model_writer=model,
            model_type=settings.model_type,
            vocab_size=settings.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            user_defined_symbols=list(settings.special_tokens),
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"SentencePiece cannot train on these {len(captions):,} captions: {reason}") from error
    return model.getvalue()
