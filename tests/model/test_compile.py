"""Compiled blocks: the same values and gradients, a fixed number of graphs, none of them made anew in steady state."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from flash_on_a_cpu import use_flash_on_a_cpu
from torch import Generator, Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

from model.attention import Backend
from model.clip import CLIP
from model.config import config_from_name
from model.masking import Guidance, MaskingConfig, PatchedImages, choose_patches
from model.packing import lengths_to_cu_seqlens, pack_tokens
from model.transformer import Block

B = 6
STEPS = 5


# Of images and of captions (for any number of tokens); after attention, of images' class tokens alone as well.
COMPILATIONS: dict[Backend, dict[str, int]] = {
    "buckets": {"before_attention": 2, "after_attention": 3},
    "varlen": {"forward": 2, "forward_pooled": 2},
}


def compilations(backend: Backend) -> dict[str, int]:
    """How many there are of each part of a block that is compiled, for both towers."""
    parts = {part: getattr(Block, part) for part in COMPILATIONS[backend]}
    return {part: len(_debug_get_cache_entry_list(function.__code__)) for part, function in parts.items()}


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced, split into forward and backward, and run as they are: no C++ compiler, few seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_clip(layers: int, text_width: int = 48, backend: Backend = "buckets") -> CLIP:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    text = dataclasses.replace(
        config.text, vocab_size=50, eot_token_id=49, context_length=20, layers=layers, width=text_width, heads=4
    )
    clip = CLIP(dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=layers), text=text))
    clip.use_backend(backend)
    if backend == "varlen":
        use_flash_on_a_cpu()
    return clip


def step(clip: CLIP, number: int, masking: MaskingConfig) -> list[Tensor]:
    """One pass over images and captions that differ from step to step: features, then all gradients."""
    generator = Generator().manual_seed(number)
    images = PatchedImages(torch.randn(B, 3, 32, 32, generator=generator), 8)
    selection = choose_patches(images, masking, generator, Guidance(progress=min(1.0, number / STEPS))).selection
    lengths = torch.randint(2, 20, (B,), generator=generator)
    tokens = torch.randint(1, 49, (int(lengths.sum()),), generator=generator)
    text = pack_tokens(tokens, lengths_to_cu_seqlens(lengths), int(lengths.max()))
    output = clip(images.gather(selection.kept_K), selection, text)
    gradients = torch.autograd.grad(
        (output.image_features @ output.text_features.T).diag().sum(),
        [parameter for name, parameter in clip.named_parameters() if name != "logit_scale"],
    )
    return [output.image_features, output.text_features, *gradients]


def assert_equal_in_steady_state(compiled: CLIP, plain: CLIP, masking: MaskingConfig) -> None:
    """Values and gradients, of steps with different masks and captions; from the third on, compiling is an error."""
    for number in range(STEPS):
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            results = step(compiled, number, masking)
        for ours, expected in zip(results, step(plain, number, masking), strict=True):
            assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["buckets", "varlen"])
@pytest.mark.parametrize(
    ("layers", "strategy", "checkpointing"), [(2, "cluster", False), (5, "none", False), (3, "cluster", True)]
)
def test_one_compilation_serves_all_blocks_and_steps(
    backend: Backend, layers: int, strategy: str, checkpointing: bool, without_compiler: None
) -> None:
    plain, compiled = make_clip(layers, backend=backend), make_clip(layers, backend=backend)
    compiled.compile_blocks()
    if checkpointing:
        compiled.checkpoint_blocks()
    masking = MaskingConfig(strategy)
    assert_equal_in_steady_state(compiled, plain, masking)
    graphs = counters["stats"]["unique_graphs"]
    for number in range(STEPS, 50):
        step(compiled, number, masking)
    assert counters["stats"]["unique_graphs"] == graphs
    assert compilations(backend) == COMPILATIONS[backend]
    assert not counters["graph_break"]
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_a_schedule_of_the_ratio_does_not_recompile_either(without_compiler: None) -> None:
    plain, compiled = make_clip(2), make_clip(2)
    masking = MaskingConfig(ratio_schedule="linear", target_mask_ratio=0.2, final_mask_ratio=0.8)
    assert not masking.is_budget_constant
    compiled.compile_blocks(image_tokens_vary=True)
    assert_equal_in_steady_state(compiled, plain, masking)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs g++ on a CPU")
def test_the_default_compiler() -> None:
    torch._dynamo.reset()
    plain, compiled = make_clip(2, backend="varlen"), make_clip(2, backend="varlen")
    compiled.compile_blocks()
    assert_equal_in_steady_state(compiled, plain, MaskingConfig())
    torch._dynamo.reset()
