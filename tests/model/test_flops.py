"""The count by formula equals torch's own count of the operations that run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.clip import CLIP
from model.config import Pool, TextPool, config_from_name
from model.flops import loss_flops, masked_word_flops, step_flops
from model.heads import Labels
from model.masked_words import MaskedWordCLIP, MaskedWords
from model.masking import PatchSelection
from model.packing import lengths_to_cu_seqlens, pack_tokens


@pytest.mark.parametrize(
    ("name", "pool", "text_pool"),
    [
        ("ViT-test-8", "class", "last"),
        ("ViT-nano-8", "class", "last"),
        ("ViT-nano-8", "average", "mean"),
        ("ViT-nano-8", "attention", "last"),
    ],
)
def test_formula_equals_the_counter(name: str, pool: Pool, text_pool: TextPool) -> None:
    config = config_from_name(name)
    text = replace(config.text, attention="bidirectional" if text_pool == "mean" else "causal", pool=text_pool)
    clip = CLIP(replace(config, vision=replace(config.vision, pool=pool), text=text))
    # lengths that fill their buckets, so that nothing is padded
    kept, lengths = [15, 15, 15, 15], [4, 8, 8, 12]
    L, P = clip.config.vision.num_patches, 3 * clip.config.vision.patch_size**2
    kept_K = torch.cat([torch.arange(count) + L * image for image, count in enumerate(kept)])
    selection = PatchSelection(kept_K, lengths_to_cu_seqlens(torch.tensor(kept)))
    text = pack_tokens(torch.randint(1, 99, (sum(lengths),)), lengths_to_cu_seqlens(torch.tensor(lengths)), 12)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = clip(torch.randn(len(kept_K), P), selection, text)
        (output.image_features.sum() + output.text_features.sum()).backward()
    # torch does not count the products that the loss adds in place
    towers = step_flops(clip.config, kept, lengths) - loss_flops(len(kept), clip.config.embed_dim)
    assert towers == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_formula_of_masked_words_equals_the_counter() -> None:
    config = config_from_name("ViT-test-8")
    clip = MaskedWordCLIP(replace(config, text=replace(config.text, attention="bidirectional")))
    lengths = [4, 8, 8, 12]
    text = pack_tokens(torch.randint(1, 99, (sum(lengths),)), lengths_to_cu_seqlens(torch.tensor(lengths)), 12)
    words = MaskedWords(torch.arange(5), Labels(torch.arange(5), torch.arange(6, dtype=torch.int32)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        clip(text, words).loss.backward()
    assert masked_word_flops(clip.config.text, lengths, 5) == pytest.approx(counter.get_total_flops(), rel=1e-9)
