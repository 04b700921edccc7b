"""Train a SentencePiece tokenizer on the captions of a shard directory."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from data_prep.console import progress_bar
from data_prep.errors import UserError
from data_prep.files import replacing
from data_prep.tar_reader import TarSamples
from data_prep.verify import find_shards

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
# SentencePiece sums its statistics thread by thread: a fixed number gives the same model on every machine
TRAINER_THREADS = 8
BYTE_PIECES = 256
SPECIAL_PIECES = 4


def train_tokenizer(
    directory: Path, output: Path, model_type: str, vocab_size: int, max_captions: int, seed: int
) -> int:
    """Train a model with byte fallback and lower-casing; returns the size of its vocabulary.

    `model_type` is "unigram" or "bpe". Unigram takes as pieces what several words share, so that with few distinct
    words it breaks even common ones apart; there "bpe" is better.
    Ids: 0 padding, 1 unknown, 2 begin, 3 end. `vocab_size` is an upper limit: few captions give fewer pieces.
    With more than `max_captions` captions, a uniform sample drawn from `seed` is used. Prints the mean length.

    Raises UserError for a directory without captions or a vocabulary too small for the byte pieces.
    """
    if vocab_size <= BYTE_PIECES + SPECIAL_PIECES:
        raise UserError(f"--vocab-size must exceed {BYTE_PIECES + SPECIAL_PIECES} (the bytes and special pieces)")
    captions = _sample(_captions(directory), max_captions, seed)
    if not captions:
        raise UserError(f"{directory} has no captions (*.txt members) to train on")
    model = _train(captions, model_type, vocab_size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    with replacing(output) as temporary:
        temporary.write_bytes(model)
    probe = captions[:10_000]
    mean_tokens = sum(map(len, processor.encode(probe))) / len(probe)
    size = int(processor.vocab_size())
    print(f"{output}: {size:,} pieces from {len(captions):,} captions, {mean_tokens:.1f} tokens per caption")
    return size


def _captions(directory: Path) -> Iterator[str]:
    shards = find_shards(directory)
    with progress_bar("read captions", len(shards), "shard") as progress:
        for path in shards:
            for sample in TarSamples(path, types=("txt",)):
                text = sample.members.get("txt", b"").decode("utf-8", "ignore").strip()
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


def _train(captions: list[str], model_type: str, vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"SentencePiece cannot train on these {len(captions):,} captions: {reason}") from error
    return model.getvalue()
