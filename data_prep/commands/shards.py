"""Commands: what is done with finished shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.commands.options import Commands, add_command, add_processes, positive


def add_verify(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep verify`."""
    parser = add_command(commands, "verify", _verify, "decode every image of a shard directory, write its manifest")
    parser.add_argument("directory", type=Path, metavar="DIR", help="shard directory")
    add_processes(parser)
    parser.add_argument(
        "--max-bad-ratio", type=float, default=0.01, metavar="R", help="share of unusable samples to accept"
    )


def _verify(options: argparse.Namespace) -> int:
    from data_prep.verify import verify

    return 0 if verify(options.directory, options.processes, options.max_bad_ratio) else 1


def add_tokenizer(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep tokenizer`."""
    parser = add_command(commands, "tokenizer", _tokenizer, "train SentencePiece on the captions of a shard directory")
    parser.add_argument("directory", type=Path, metavar="DIR", help="shard directory")
    parser.add_argument("--output", type=Path, required=True, metavar="MODEL", help="model file to write")
    parser.add_argument(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="bpe suits captions of few distinct words"
    )
    parser.add_argument("--vocab-size", type=positive, default=8192, metavar="N", help="most pieces")
    parser.add_argument(
        "--max-captions", type=positive, default=2_000_000, metavar="N", help="train on a sample of at most N"
    )
    parser.add_argument("--seed", type=int, default=0, help="for drawing that sample")
    parser.add_argument(
        "--special-tokens", nargs="+", default=[], metavar="TEXT", help="texts that stay one piece, such as <PERSON>"
    )
    parser.add_argument(
        "--clip-merges", type=Path, metavar="FILE",
        help="bpe_simple_vocab_16e6.txt.gz, to compare with CLIP's tokenizer (default: an installed open_clip's)",
    )  # fmt: skip


def _tokenizer(options: argparse.Namespace) -> int:
    from data_prep.tokenizer import TokenizerSettings, train_tokenizer

    settings = TokenizerSettings(
        model_type=options.model_type,
        vocab_size=options.vocab_size,
        max_captions=options.max_captions,
        seed=options.seed,
        special_tokens=tuple(options.special_tokens),
    )
    train_tokenizer(options.directory, options.output, settings, options.clip_merges)
    return 0
