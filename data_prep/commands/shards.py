"""Commands: what is done with finished shards, whatever is in them."""

from __future__ import annotations

import argparse

from data_prep.commands.options import (
    Commands,
    add_command,
    add_output,
    add_processes,
    array_slice,
    byte_count,
    jpeg_quality,
    positive,
)
from formats.errors import UserError
from formats.files import path_argument

SAMPLES_PER_SHARD = 10_000  # of reshard, as of download


def add_verify(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep verify`."""
    parser = add_command(commands, "verify", _verify, "decode every image of a shard directory, write its manifest")
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="shard directory")
    add_processes(parser)
    parser.add_argument(
        "--max-bad-ratio", type=float, default=0.01, metavar="R", help="share of unusable samples to accept"
    )
    parser.add_argument("--again", action="store_true", help="decode also what the manifest says was decoded before")
    parser.add_argument(
        "--repair", action="store_true", help="rewrite shards without their unusable members; keep damaged originals"
    )
    parser.add_argument(
        "--slice",
        type=array_slice,
        metavar="I/N",
        help="judge every N-th shard from I (from 0) on; verify collects them",
    )


def _verify(options: argparse.Namespace) -> int:
    from data_prep.shards.verify import verify, verify_slice

    if options.slice is not None:
        if options.repair:
            raise UserError("--repair is for the last step, after the slices: data-prep verify DIR --repair")
        verify_slice(options.directory, options.slice, options.processes, again=options.again)
        return 0
    is_fit = verify(
        options.directory, options.processes, options.max_bad_ratio, repair=options.repair, again=options.again
    )
    return 0 if is_fit else 1


def add_reshard(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep reshard`."""
    parser = add_command(commands, "reshard", _reshard, "shards of another size, shuffled, a subset; smaller pictures")
    parser.add_argument("directories", type=path_argument, nargs="+", metavar="DIR", help="verified shard directories")
    add_output(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=positive, metavar="N", help="in each but the last; usually 10,000")
    size.add_argument("--bytes-per-shard", type=byte_count, metavar="SIZE", help="end a shard at this size: 500M, 1G")
    parser.add_argument("--shuffle", action="store_true", help="shuffle all samples, in bounded memory")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle")
    parser.add_argument("--memory", type=byte_count, default="1G", metavar="SIZE", help="for the shuffle")
    parser.add_argument(
        "--normalise",
        action="store_true",
        help="rewrite pictures that other readers may see otherwise: turned, transparent, of 16 bits, CMYK",
    )
    parser.add_argument(
        "--uids", type=path_argument, metavar="FILE", help="keep only these uids: one per line, or DataComp's npy"
    )
    edition = parser.add_argument_group("an edition: the same shards, samples and keys, with smaller pictures")
    edition.add_argument(
        "--image-size", type=positive, metavar="PX", help="scale larger pictures down, shorter side to PX pixels"
    )
    edition.add_argument("--quality", type=jpeg_quality, default=90, metavar="Q", help="of JPEGs, 1 to 100")
    add_processes(edition)


def _reshard(options: argparse.Namespace) -> int:
    if options.image_size is not None:
        return _write_edition(options)
    from data_prep.shards.reshard import Layout, reshard

    layout = Layout(
        samples_per_shard=options.samples_per_shard or (None if options.bytes_per_shard else SAMPLES_PER_SHARD),
        bytes_per_shard=options.bytes_per_shard,
        seed=options.seed if options.shuffle else None,
        memory_bytes=options.memory,
        normalise=options.normalise,
    )
    reshard(options.directories, options.output, layout, options.uids)
    return 0


def _write_edition(options: argparse.Namespace) -> int:
    from data_prep.editions import write_edition

    others = ("samples_per_shard", "bytes_per_shard", "shuffle", "uids", "normalise")
    if given := [f"--{name.replace('_', '-')}" for name in others if getattr(options, name)]:
        raise UserError(f"--image-size keeps shards and samples as they are: leave out {', '.join(given)}")
    if len(options.directories) > 1:
        raise UserError("an edition is of one directory: run the command for each of them")
    write_edition(options.directories[0], options.output, options.image_size, options.quality, options.processes)
    return 0


def add_merge(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep merge`."""
    parser = add_command(commands, "merge", _merge, "several shard directories -> one, numbered without gaps")
    parser.add_argument("directories", type=path_argument, nargs="+", metavar="DIR", help="verified shard directories")
    add_output(parser)
    parser.add_argument(
        "--keep-keys", action="store_true", help="link or copy the shards unread; keys may then repeat between shards"
    )
    add_processes(parser)


def _merge(options: argparse.Namespace) -> int:
    from data_prep.shards.merge import merge

    merge(options.directories, options.output, options.processes, keep_keys=options.keep_keys)
    return 0


def add_tokenizer(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep tokenizer`."""
    parser = add_command(commands, "tokenizer", _tokenizer, "train a tokenizer on the captions of a shard directory")
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="shard directory")
    parser.add_argument("--output", type=path_argument, required=True, metavar="MODEL", help="model file to write")
    parser.add_argument(
        "--model-type",
        choices=("byte-pairs", "unigram", "bpe"),
        default="unigram",
        help="byte-pairs are in CLIP's form, which open_clip and transformers read too; unigram and bpe are "
        "SentencePiece's, of which bpe suits captions of few distinct words",
    )
    parser.add_argument("--vocab-size", type=positive, default=8192, metavar="N", help="most pieces")
    parser.add_argument(
        "--max-captions", type=positive, default=2_000_000, metavar="N", help="train on a sample of at most N"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for drawing that sample")
    parser.add_argument(
        "--special-tokens", nargs="+", default=[], metavar="TEXT", help="texts that stay one piece, such as <PERSON>"
    )
    parser.add_argument(
        "--clip-merges", type=path_argument, metavar="FILE",
        help="bpe_simple_vocab_16e6.txt.gz, to compare with CLIP's tokenizer (default: an installed open_clip's)",
    )  # fmt: skip


def _tokenizer(options: argparse.Namespace) -> int:
    from data_prep.tokens.training import TokenizerSettings, train_tokenizer

    settings = TokenizerSettings(
        model_type=options.model_type,
        vocab_size=options.vocab_size,
        max_captions=options.max_captions,
        seed=options.seed,
        special_tokens=tuple(options.special_tokens),
    )
    train_tokenizer(options.directory, options.output, settings, options.clip_merges)
    return 0
