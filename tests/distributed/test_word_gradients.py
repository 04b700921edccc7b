"""Masked words on ranks: ZeRO stages x precisions x accumulation have the gradients of one process without any of it.

What they are held against: caption by caption through plain products, all logits, torch's cross-entropy over the masked
tokens of all ranks at once; and what the pass does not use stays as it was, to the bit.

B captions of a micro-batch of a rank, T longest caption, N all tokens, V vocabulary
"""

from __future__ import annotations

import functools
import itertools
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from forked_ranks import run_ranks
from safetensors.torch import save_file
from torch import Tensor

from model.config import config_from_name
from model.heads import Labels
from model.masked_words import MaskedWordCLIP, MaskedWordHead, MaskedWords
from model.masking import MaskingConfig
from model.packing import lengths_to_cu_seqlens
from pipeline.data.data_loader import Batch
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.observing.step_observer import StepObserver
from pipeline.training.step_loss import make_step_loss
from pipeline.training.train_step import Learner, train_step

B, T, VOCABULARY = 3, 7, 50
IDLE = ("visual.", "text.text_projection", "logit_scale")


@dataclass(frozen=True)
class Case:
    stage: int
    precision: str = "fp32"
    accumulation: int = 2

    @property
    def name(self) -> str:
        return f"stage {self.stage} {self.precision} x{self.accumulation}"


CASES = [
    *(Case(stage, accumulation=n) for stage in range(4) for n in (1, 2)),
    *(Case(stage, "bf16") for stage in (1, 2, 3)),
    *(Case(stage, "autocast") for stage in range(4)),
]


def make_clip() -> MaskedWordCLIP:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    text = replace(config.text, vocab_size=VOCABULARY, eot_token_id=49, attention="bidirectional")
    return MaskedWordCLIP(replace(config, text=text))


def make_batch(rank: int, number: int) -> Batch:
    """More masked tokens on one rank than on the other; none at all in one micro-batch."""
    generator = torch.Generator().manual_seed(10 * rank + number)
    lengths_B = torch.randint(3, T + 1, (B,), generator=generator)
    cu_seqlens_B1 = lengths_to_cu_seqlens(lengths_B)
    tokens_N = torch.randint(1, 49, (int(lengths_B.sum()),), generator=generator)
    is_masked_N = torch.rand(len(tokens_N), generator=generator) < [0.6, 0.2][rank]
    if (rank, number) == (1, 1):
        is_masked_N[:] = False
    place_R = is_masked_N.nonzero().flatten()
    labels = Labels(tokens_N[place_R], torch.arange(len(place_R) + 1, dtype=torch.int32))
    words = MaskedWords(place_R, labels)
    if not len(place_R):
        words = MaskedWords(torch.zeros(1, dtype=torch.long), Labels(place_R, torch.zeros(2, dtype=torch.int32)))
    shown_N = torch.where(is_masked_N & (tokens_N % 5 > 0), VOCABULARY, tokens_N)  # a fifth stays
    return Batch(torch.empty(B, 3, 0, 0), shown_N, cu_seqlens_B1, T, [], [], words=words)


def run_cases(ranks: Ranks, folder: str) -> dict[str, tuple[list[float], dict[str, Tensor], dict[str, Tensor]]]:
    logging.disable()
    return {case.name: run_case(ranks, case, Path(folder)) for case in CASES}


def run_case(ranks: Ranks, case: Case, folder: Path) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Figures of a step, gradients, and the weights after it and after they were loaded."""
    recipe = load_recipe("demo", ["optimizer.max_grad_norm=0", f"train.precision={case.precision}"])
    plan = BatchPlan(1000, B * ranks.world_size * case.accumulation, B, ranks.world_size)
    config = deepspeed_config(recipe, plan, "zero1_fp32") | {"zero_optimization": {"stage": case.stage}}
    clip = make_clip()
    engine = make_engine(clip, recipe, config, ranks)
    masks = MaskDrawer(MaskingConfig(strategy="none"), clip.visual, 8, 0, ranks)
    learner = Learner(engine, masks, make_step_loss(recipe.loss, ranks), 0.0, average=None, ranks=ranks)
    gradients: dict[str, Tensor] = {}
    engine.set_learning_rate(1e-2)
    update = engine.update

    def note_and_update(divide_by: Tensor | None, skip: Tensor) -> None:
        trained = [(name, p) for name, p in clip.named_parameters() if p.requires_grad]
        gradients.update({name: safe_get_full_grad(p).clone() for name, p in trained})
        update(divide_by, skip)

    engine.update = note_and_update  # type: ignore[method-assign]
    observer = StepObserver(ranks)
    batches = [make_batch(ranks.rank, number) for number in range(case.accumulation)]
    report = train_step(learner, batches, 0, 0.0, 0, observer)
    watched = observer.read(float(report.grad_norm))
    assert watched["update_norm_image"] == 0 < watched["update_norm_text"]
    assert report.finite_B.all()
    after = engine.weights(ranks)
    if ranks.is_main:
        save_file(after, folder / f"{case.name}.safetensors")
    ranks.barrier()
    engine.load_weights(folder / f"{case.name}.safetensors")
    again = engine.weights(ranks)
    assert all(torch.equal(after[name], again[name]) for name in after)
    engine.release()
    return ranks.mean(report.means_R).tolist(), gradients, after


def obvious_logits(clip: MaskedWordCLIP, batch: Batch) -> Tensor:
    """[N, V]: caption after caption, each through plain torch."""
    head, text = clip.heads["mlm"], clip.text
    assert isinstance(head, MaskedWordHead)
    rows = []
    ends = batch.cu_seqlens_B1.tolist()
    for first, last in itertools.pairwise(ends):
        tokens_T = batch.tokens_N[first:last]
        table_VD = torch.cat((text.token_embedding.weight, head.mask.weight[None]))
        x_TD = table_VD[tokens_T] + text.positional_embedding[: last - first]
        for block in text.transformer.blocks:
            y_TD = block.ln_1(x_TD)
            q, k, v = F.linear(y_TD, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
            H = text.transformer.heads
            q, k, v = (part.unflatten(-1, (H, -1)).transpose(0, 1) for part in (q, k, v))
            attended = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
            x_TD = x_TD + block.attn.out_proj(attended.transpose(0, 1).flatten(1))
            x_TD = x_TD + block.mlp(block.ln_2(x_TD))
        hidden_TD = head.norm(F.gelu(head.transform(text.ln_final(x_TD))))
        rows.append(hidden_TD @ text.token_embedding.weight.T + head.bias)
    return torch.cat(rows)


@functools.cache
def one_process(precision: str, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
    """Figures and gradients."""
    clip = make_clip()
    if precision == "bf16":
        clip.bfloat16()
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    logits, labels, tokens = [], [], 0
    for rank in range(2):
        for number in range(accumulation):
            batch = make_batch(rank, number)
            assert batch.words is not None
            tokens += len(batch.tokens_N)
            with autocast:
                logits.append(obvious_logits(clip, batch)[batch.words.token_R][: batch.words.num_masked])
            labels.append(batch.words.labels.class_M)
    logits_RV, label_R = torch.cat(logits).float(), torch.cat(labels)
    loss = F.cross_entropy(logits_RV, label_R)
    loss.backward()
    hits = (logits_RV.argmax(1) == label_R).float().mean().item()
    parts = 2 * accumulation
    figures = [loss.item(), hits, len(label_R) / parts, tokens / parts]
    return figures, {name: p.grad.float() for name, p in clip.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[list[float], dict[str, Tensor], dict[str, Tensor]]]:
    return run_ranks(run_cases, 2, str(tmp_path_factory.mktemp("weights")))[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_learn_what_one_process_does(
    case: Case, found: dict[str, tuple[list[float], dict[str, Tensor], dict[str, Tensor]]]
) -> None:
    figures, gradients, after = found[case.name]
    expected, expected_gradients = one_process(case.precision, case.accumulation)
    tolerance = 2e-5 if case.precision == "fp32" else 5e-2
    assert figures == pytest.approx(expected, rel=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    assert not [name for name in gradients if name.startswith(IDLE)]
    for names in ([*gradients], ["text.token_embedding.weight"], [n for n in gradients if n.startswith("heads.")]):
        a, b = (torch.cat([values[name].flatten() for name in names]) for values in (gradients, expected_gradients))
        assert float((a - b).norm() / b.norm()) < tolerance, names

    before = dict(make_clip().named_parameters())
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith(IDLE), name
