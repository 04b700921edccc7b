"""Started by the launcher: every rank begins with weights of its own, then takes those that training starts from.

usage: start_worker.py SOURCE TOKENIZER OUTPUT_DIRECTORY
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file

from formats.programs import run
from model.clip import CLIP
from pipeline.data.captions import load_tokenizer
from pipeline.ranks import init_ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.weights.start_weights import load_start_weights


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("source")
    parser.add_argument("tokenizer")
    parser.add_argument("output", type=Path)
    options = parser.parse_args(argv)
    ranks = init_ranks()
    torch.manual_seed(ranks.rank)
    tokenizer = load_tokenizer(options.tokenizer, 32)
    recipe = load_recipe("demo", ["model.name=ViT-test-8", "model.pool=attention", "model.activation=quick_gelu"])
    clip = CLIP(recipe.clip_config(tokenizer.encoder.vocab_size, tokenizer.encoder.end_token_id))
    source = options.source if ranks.is_main else "read by nobody"
    sha256 = load_start_weights(clip, source, tokenizer, ranks)
    save_file(clip.state_dict(), options.output / f"{sha256}_{ranks.rank}.safetensors")
    return 0


if __name__ == "__main__":
    run(main)
