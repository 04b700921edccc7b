"""The optimizer's state goes from every ZeRO stage, world size and precision to every other one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from formats.errors import UserError
from pipeline.ranks import Ranks
from pipeline.training.checkpoints.rank_state import load_optimizer_state, optimizer_state
from pipeline.training.engines.engine import Engine
from pipeline.training.engines.fragments import full_weights, load_full_weights

STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
GLOBAL_BATCH = 12


def make_engine(stage: int, precision: str, seed: int, ranks: Ranks) -> Any:
    """A net of odd sizes, so that parts straddle parameters: two groups, a parameter of one element, a frozen layer."""
    import deepspeed

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3, bias=False), nn.PReLU())
    net[0].requires_grad_(False)
    matrices = [parameter for parameter in net[1:].parameters() if parameter.ndim == 2]
    others = [parameter for parameter in net[1:].parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks.world_size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 1 << 62,
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=net, optimizer=torch.optim.AdamW(groups, lr=0.05, fused=True), config=config
        )
    return engine


def take_step(engine: Any, number: int, ranks: Ranks) -> None:
    torch.manual_seed(100 + number)
    inputs = torch.randn(GLOBAL_BATCH, 7)[ranks.rank :: ranks.world_size]
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(inputs.to(dtype)).float().square().mean())
    engine.step()


def seen(engine: Any) -> dict[str, Tensor]:
    """Weights, as computed with and in fp32, and moments; by DeepSpeed's own means, or torch's with stage 0."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed links the first group's only
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
            found[f"computed/{name}"] = parameter.detach().float().clone()
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() > 0:
            found[f"fp32/{name}"] = safe_get_full_fp32_param(parameter).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind).clone()
    if engine.zero_optimization_stage() == 0:
        groups = [group["params"] for group in engine.basic_optimizer.param_groups]
        for parameters, holders in zip(getattr(engine.optimizer, "fp16_groups", groups), groups, strict=True):
            for parameter, holder in zip(parameters, holders, strict=True):
                name = names[id(parameter)]
                found[f"fp32/{name}"] = holder.detach().clone()
                for kind in ("exp_avg", "exp_avg_sq"):
                    found[f"{kind}/{name}"] = engine.basic_optimizer.state[holder][kind].clone()
    found["steps"] = torch.stack([state["step"] for state in engine.basic_optimizer.state.values()]).unique()
    return found


def write_all(ranks: Ranks, directory: Path) -> None:
    """Three steps by every stage and precision: what our code writes, what is seen, and what a fourth step makes."""
    for stage, precision in product(STAGES, PRECISIONS):
        place = directory / f"{ranks.world_size}-{stage}-{precision}"
        engine = make_engine(stage, precision, seed=0, ranks=ranks)
        for number in range(3):
            take_step(engine, number, ranks)
        if ranks.is_main:
            place.mkdir()
        ranks.barrier()
        save_file(optimizer_state(engine, ranks), place / f"rank_{ranks.rank}.safetensors")
        weights, before = full_weights(engine, ranks), seen(engine)
        take_step(engine, 3, ranks)
        after = seen(engine)
        if ranks.is_main:
            save_file(weights, place / "model.safetensors")
            save_file(before, place / "seen")
            save_file(after, place / "seen_after")
        ranks.barrier()
        Engine(engine, "fp32").release()


def read_all(ranks: Ranks, directory: Path, precisions: Sequence[str]) -> int:
    """Every source into every target of this world, one engine after the other and each used before."""
    count = 0
    for stage, precision in product(STAGES, precisions):
        engine = make_engine(stage, precision, seed=1, ranks=ranks)
        for source in sorted(directory.iterdir()):
            what = f"{source.name} -> {ranks.world_size}-{stage}-{precision}"
            load_full_weights(engine, source / "model.safetensors")
            load_optimizer_state(engine, sorted(source.glob("rank_*")))
            expected = load_file(source / "seen")
            for name, value in seen(engine).items():
                if name.startswith("computed/"):
                    wanted = expected.get(name.replace("computed", "fp32"), expected[name])
                    wanted = wanted.bfloat16().float() if precision == "bf16" else wanted
                else:
                    wanted = expected[name]
                assert torch.equal(value, wanted), f"{what}: {name}"
            take_step(engine, 3, ranks)
            expected = load_file(source / "seen_after")
            for name, value in seen(engine).items():
                if source.name == f"{ranks.world_size}-{stage}-{precision}":
                    assert torch.equal(value, expected[name]), f"{what}: {name} after a step"
                elif source.name.endswith("fp32") and precision == "fp32":
                    torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=f"{what}: {name}")
            count += 1
        if ranks.world_size == 1:  # which needs all of it
            with pytest.raises(UserError, match="elements that are this rank's"):
                load_optimizer_state(engine, [directory / "2-1-fp32" / "rank_1.safetensors"])
        Engine(engine, "fp32").release()
    return count


def test_every_stage_world_and_precision_reads_what_every_other_wrote(tmp_path: Path) -> None:
    """In parts, whole and computed with: the same bits; and so is the next step, where the arithmetic is the same."""
    for world in (1, 2):
        run_ranks(write_all, world, tmp_path)
    assert run_ranks(read_all, 1, tmp_path, PRECISIONS) == [16 * 8]
    assert run_ranks(read_all, 3, tmp_path, ["fp32"]) == [16 * 4] * 3
