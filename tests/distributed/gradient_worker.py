"""Started by the launcher: gradients of one global batch spread over ranks, and this rank's masks.

usage: gradient_worker.py --template NAME --masking JSON BATCH.pt OUTPUT_DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from model.clip import CLIP
from model.config import config_from_name
from model.heads import ConceptHead, Labels, NamedConcepts
from model.masking import MaskingConfig, PatchSelection
from model.packing import PackedTokens, lengths_to_cu_seqlens
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import init_ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.step_loss import make_step_loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--template")
    parser.add_argument("--masking", type=json.loads, help="settings by name")
    parser.add_argument("batch")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    ranks = init_ranks()
    batch = torch.load(options.batch, weights_only=True)
    G, L, _ = batch["patches"].shape
    B = G // ranks.world_size
    mine = slice(ranks.rank * B, (ranks.rank + 1) * B)

    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    clip = CLIP(replace(config, vision=replace(config.vision, pool=batch["pool"])))
    clip.heads["concepts"] = ConceptHead(config.embed_dim, batch["concept_counts"].tolist(), 100)
    recipe = load_recipe("demo", ["optimizer.max_grad_norm=0"])
    engine_config = deepspeed_config(recipe, BatchPlan(G, G, B, ranks.world_size), options.template)
    engine = make_engine(clip, recipe, engine_config, ranks)

    counts = batch["kept"].view(G, L)[mine].sum(1)
    kept = batch["kept"].view(G, L)[mine].flatten().nonzero().squeeze(1)
    text = PackedTokens.from_padded(batch["tokens"][mine], clip.config.text.eot_token_id)
    patches = batch["patches"][mine].flatten(0, 1)[kept]
    is_named = batch["is_named"][mine]
    named = NamedConcepts(Labels(is_named.nonzero()[:, 1], lengths_to_cu_seqlens(is_named.sum(1))), batch["num_taught"])
    output = engine(patches, PatchSelection(kept, lengths_to_cu_seqlens(counts)), text, None, named)
    loss = make_step_loss(recipe.loss, ranks).pairs(*output.for_pairs) + 0.7 * output.concepts.loss
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in clip.named_parameters()}
    mean_loss = ranks.mean(loss.detach().clone())

    drawn = {}
    for name, settings in options.masking.items():
        masks = MaskDrawer(MaskingConfig(**settings), clip.visual, 8, 0, ranks)
        masks.update_copy()
        _, chosen = masks.draw(batch["images"][mine], step=5, micro_batch=0, progress=0.5)
        drawn[name] = chosen.selection.kept_K
    save_file(drawn, options.output / f"masks_{ranks.rank}.safetensors")
    if ranks.is_main:
        save_file({**gradients, "loss": mean_loss.view(1)}, options.output / "gradients.safetensors")


if __name__ == "__main__":
    main()
