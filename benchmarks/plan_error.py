"""How far pipeline/plan.py's figures are from measured ones: peak memory and volume of collectives, and a GPU's steps.

    python benchmarks/plan_error.py

Real engines on 1, 2 and 4 ranks take two steps on made-up batches: ZeRO stages 0 to 3, fp32, bf16 and autocast, blocks
stored and recomputed, micro-batches accumulated. Memory is the most bytes of tensors alive at once in the second step,
counted at every allocation; volume is what is given to torch.distributed. DeepSpeed's buckets are made as small as the
models are, so that they do not hide everything else. Between real ranks, gloo copies what it gathers and scatters and
holds on to it, which NCCL does not: `peak` is that of a rank whose collectives do nothing (train.py --simulate-world),
`peak_with_gloo` that of a real one. `gpu` compares with benchmarks/results/gpu_throughput.json: peak
memory as the allocator counted it, and the step's time, to which four constants of the estimate were fitted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from record import RESULTS_DIRECTORY, record
from torch import multiprocessing
from training_steps import LONGEST, SHORTEST

from model.packing import lengths_to_cu_seqlens
from pipeline.data.data_loader import Batch
from pipeline.hardware import find_accelerator, find_interconnect
from pipeline.planning.measurement import Trial, try_steps
from pipeline.planning.memory import estimate_memory
from pipeline.planning.simulated_rank import join_fake_world
from pipeline.planning.step_time import step_time, step_traffic
from pipeline.planning.workload import Workload, workload_of
from pipeline.ranks import Ranks, init_ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.stage_plan import Stage, plan_stages

CAPTION_TOKENS, SAMPLES, VOCABULARY = 16, 1_000_000, (49408, 49407)
# Above the largest parameter, as the templates' is.
BUCKET = 20_000_000
# Collectives of a few numbers are not estimated: the gradients' norm, whether stage 3 runs alike on all ranks.
NEGLIGIBLE_BYTES = 100_000


@dataclass(frozen=True)
class Case:
    """One way to train: a model on some ranks, with options of the recipe."""

    model: str
    ranks: int
    pairs: int
    zero_stage: int
    precision: str
    accumulation: int = 1
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in the table."""
        parts = [self.model, f"{self.ranks} ranks", f"{self.pairs} x {self.accumulation}", f"stage {self.zero_stage}"]
        return ", ".join([*parts, self.precision, *self.options])


RECOMPUTE = "train.activation_checkpointing=true"
CASES = [
    *(Case("ViT-nano-8", ranks, 64, stage, "bf16") for ranks in (1, 2, 4) for stage in (1, 2, 3)),
    *(Case("ViT-nano-8", ranks, 64, 0, "fp32") for ranks in (1, 4)),
    *(Case("ViT-nano-8", 2, 32, stage, "bf16", 2) for stage in (1, 2, 3)),
    *(
        Case("ViT-nano-8", 4, 32, 1, "fp32", 2, (f"loss.{option}",))
        for option in ("exchange=ring", "cache_gradients=true")
    ),
    *(
        Case("ViT-tiny-16", 2, 32, 1, "bf16", 1, (option,))
        for option in ("optimizer.image_lr_ratio=0", "optimizer.name=muon")
    ),
    *(
        Case("ViT-tiny-16", 2, 32, 1, precision, 1, options)
        for precision in ("fp32", "bf16", "autocast")
        for options in ((), (RECOMPUTE,))
    ),
    *(Case("ViT-S-16", 2, 8, stage, "bf16") for stage in (1, 3)),
    Case("ViT-S-16", 1, 16, 0, "fp32"),
    Case("ViT-B-32", 1, 16, 1, "bf16"),
]


def prepare(case: Case, directory: Path) -> tuple[Stage, dict[str, Any]]:
    """The stage and DeepSpeed configuration of a case."""
    template = directory / f"{case.zero_stage}.json"
    template.write_text(json.dumps({"zero_optimization": {"stage": case.zero_stage, "reduce_bucket_size": BUCKET}}))
    recipe = load_recipe(
        "base",
        [
            f"model.name={case.model}",
            "masking.strategy=random",
            f"train.deepspeed_config={template}",
            f"train.precision={case.precision}",
            f"train.micro_batch_size={case.pairs}",
            f"train.global_batch_size={case.pairs * case.accumulation * case.ranks}",
            *case.options,
        ],
    )
    [stage] = plan_stages(recipe, SAMPLES, case.ranks, *VOCABULARY)
    return stage, deepspeed_config(recipe, stage.batches, str(template))


def made_up_batch(pairs: int, image_size: int) -> Batch:
    """Random pixels, captions of one length."""
    return Batch(
        torch.randint(0, 256, (pairs, 3, image_size, image_size), dtype=torch.uint8),
        torch.randint(1, 40_000, (pairs * CAPTION_TOKENS,)),
        lengths_to_cu_seqlens(torch.full((pairs,), CAPTION_TOKENS)),
        CAPTION_TOKENS,
        [],
        [""] * pairs,
    )


def measure(case: Case, ranks: Ranks, directory: Path) -> dict[str, Any]:
    """Predicted beside measured, on this rank."""
    stage, config = prepare(case, directory)
    size = stage.model.vision.image_size
    steps = [[made_up_batch(case.pairs, size) for _ in range(case.accumulation)] for _ in range(2)]
    return compare(workload_of(stage, config, CAPTION_TOKENS, on_gpu=False), try_steps(stage, config, ranks, steps))


def compare(load: Workload, trial: Trial) -> dict[str, Any]:
    """Bytes as predicted and as measured, with relative errors."""
    predicted: dict[str, int] = {}
    for traffic in step_traffic(load):
        predicted[traffic.operation] = predicted.get(traffic.operation, 0) + traffic.payload_bytes
    # a world of one has collectives too, which move nothing
    measured = trial.payload_bytes if load.world_size > 1 else {}
    operations = {
        name
        for name in {*predicted, *measured}
        if max(predicted.get(name, 0), measured.get(name, 0)) > NEGLIGIBLE_BYTES
    }
    return {
        "peak": beside(estimate_memory(load, on_gpu=False).tensor_bytes, trial.peak_bytes),
        "collectives": {name: beside(predicted.get(name, 0), measured.get(name, 0)) for name in sorted(operations)},
    }


def beside(predicted: float, measured: float) -> dict[str, float]:
    """A prediction, what was measured, and the error as a share of that."""
    return {
        "predicted": predicted,
        "measured": measured,
        "error": round(predicted / measured - 1, 4) if measured else 1.0,
    }


def rank_main(rank: int, world_size: int, port: int, directory: str) -> None:
    """All cases of this many ranks; rank 0 writes what it found. Without a port the other ranks are simulated."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if port:
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in launched.items()}, MASTER_PORT=str(port))
        ranks = init_ranks()
    else:
        join_fake_world(rank, world_size)
        ranks = Ranks(rank, 0, world_size, torch.device("cpu"))
    own = Path(directory, str(rank))
    own.mkdir(exist_ok=True)
    found = {case.name: measure(case, ranks, own) for case in CASES if case.ranks == world_size}
    if ranks.is_main:
        (own / "found.json").write_text(json.dumps(found))


def measure_all() -> dict[str, Any]:
    """Every case on its ranks, and as one simulated rank of so many."""
    found: dict[str, Any] = {}
    for world_size in sorted({case.ranks for case in CASES}):
        real, simulated = (in_processes(world_size, port) for port in (free_port(), 0))
        for name, run in real.items():
            found[name] = {
                "peak": simulated[name]["peak"],
                "peak_with_gloo": run["peak"],
                "collectives": run["collectives"],
            }
            print(name, json.dumps(found[name]), flush=True)
    return found


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def in_processes(world_size: int, port: int) -> dict[str, Any]:
    """What rank 0 finds, of as many processes as ranks or, without a port, in one."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (world_size, port, directory)
        multiprocessing.spawn(rank_main, arguments, nprocs=world_size if port else 1)
        found: dict[str, Any] = json.loads(Path(directory, "0", "found.json").read_text())
    return found


def gpu_errors() -> dict[str, dict[str, Any]]:
    """Predictions for the steps of benchmarks/gpu_throughput.py beside what it recorded, for each card."""
    figures = json.loads((RESULTS_DIRECTORY / "gpu_throughput.json").read_text())["figures"]
    return {"gpu": card_errors("h200", figures), "gpu_h100": card_errors("h100", figures["H100_compiled"])}


def card_errors(card: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Bytes and seconds of every model, batch and arm that a card was measured with."""
    accelerator, network = find_accelerator(card), find_interconnect("ndr")
    found: dict[str, Any] = {}
    for model in (name for name in figures if name.startswith("ViT")):
        for size, arms in figures[model].items():
            for arm in ("none", "random_0.5", "cluster_0.5"):
                if "peak_bytes" not in arms.get(arm, {}):
                    continue
                load = plain_torch_load(model, int(size), arm)
                # images and captions lay there before that count began
                batch = 3 * int(size) * load.model.vision.image_size**2 + 8 * load.text.tokens
                found[f"{model}, {size}, {arm}"] = {
                    "peak": beside(estimate_memory(load).tensor_bytes - batch, arms[arm]["peak_bytes"]),
                    "step_s": beside(round(step_time(load, accelerator, network).step_s, 5), arms[arm]["step_s"]),
                }
    return found


def plain_torch_load(model: str, size: int, arm: str) -> Workload:
    """A step of that benchmark: autocast, no DeepSpeed, blocks recomputed from 2,048 pairs on."""
    case = Case(model, 1, size, 0, "autocast", 1, (RECOMPUTE,) if size >= 2048 else ())
    with tempfile.TemporaryDirectory() as directory:
        stage, config = prepare(case, Path(directory))
        masking = stage.recipe.masking.model_copy(update={"strategy": "none" if arm == "none" else "random"})
        stage = replace(stage, recipe=stage.recipe.model_copy(update={"masking": masking}))
        return workload_of(stage, config, (SHORTEST + LONGEST) / 2)


def worst(values: list[dict[str, float]]) -> float:
    """The largest error of either sign."""
    return max(abs(value["error"]) for value in values)


def main() -> None:
    """Measure, compare, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="only beside gpu_throughput.json; what ranks took stays")
    options = parser.parse_args()
    path = RESULTS_DIRECTORY / "plan_error.json"
    runs = json.loads(path.read_text())["figures"]["runs"] if options.gpu else measure_all()
    cards = gpu_errors()
    peaks = [run["peak"] for run in runs.values()]
    volumes = [volume for run in runs.values() for volume in run["collectives"].values()]
    gpu_peaks = [entry["peak"] for card in cards.values() for entry in card.values()]
    figures = {
        "worst_relative_error": worst([*peaks, *volumes, *gpu_peaks]),
        "worst_peak_error": worst(peaks),
        "worst_peak_error_with_gloo": worst([run["peak_with_gloo"] for run in runs.values()]),
        "worst_volume_error": worst(volumes),
        "worst_gpu_peak_error": worst(gpu_peaks),
        "worst_gpu_step_time_error_in_sample": worst([entry["step_s"] for entry in cards["gpu"].values()]),
        "worst_h100_step_time_error": worst([entry["step_s"] for entry in cards["gpu_h100"].values()]),
        "runs": runs,
        **cards,
        "cases": [asdict(case) for case in CASES],
    }
    note = json.loads(path.read_text()).get("note") if options.gpu else None
    print(record("plan_error", figures, "python benchmarks/plan_error.py" + " --gpu" * options.gpu, 1, note=note))


if __name__ == "__main__":
    main()
