"""What a balance costs a training run: its start, an epoch's plan, and memory, for 10, 100 and 213 million samples.

Manifests and rates are made up: shards of 10,000 samples in clusters of lognormal sizes, no pictures. Each figure is
taken in a process of its own; "peak" is what its memory grew by, pages of mapped files among it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import record

from formats.balance import read_balance, write_balance
from formats.manifest import Manifest, Shard, read_manifest
from pipeline.data.balanced_order import BalancedOrder
from pipeline.data.draws import Draws
from pipeline.data.training_data import read_training_data
from pipeline.recipe import Recipe
from pipeline.recipe_files import parse_recipe
from pipeline.training.stage_plan import plan_stages

SAMPLES_PER_SHARD = 10_000
BATCH_SIZE = 32_768
MILLION = 1_000_000


def main() -> None:
    """Measure each size in a process of its own and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[10, 100, 213], help="of samples")
    parser.add_argument("--epochs", type=float, default=32, help="of the planned run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="for what is made up, 2 bytes a sample; default: a temporary one")
    parser.add_argument("--child", choices=_CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_CHILDREN[options.child](Path(options.folder), options.epochs)))
        return
    figures: dict[str, float] = {}
    for millions in options.millions:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            make_up(Path(folder), millions * MILLION)
            for child in _CHILDREN:
                command = [sys.executable, __file__, "--child", child, "--folder", folder]
                command += ["--epochs", str(options.epochs)]
                rounds = [json.loads(subprocess.check_output(command)) for _ in range(options.rounds)]
                for name in rounds[0]:
                    figures[f"{name}_{millions}m"] = float(np.median([measured[name] for measured in rounds]))
                    print(f"{name}_{millions}m {figures[f'{name}_{millions}m']:,.2f}", flush=True)
    command_line = f"python benchmarks/balance.py --epochs {options.epochs:g} --rounds {options.rounds}"
    print(record("balance", figures, command_line, options.rounds, keep_others=True))


def make_up(folder: Path, num_samples: int) -> None:
    """A manifest and a balance at half of its samples: sizes of clusters as web data's, rates as size^-0.8."""
    shards = folder / "shards"
    shards.mkdir()
    lines = (Shard(f"{n:06d}.tar", SAMPLES_PER_SHARD, 10**9, "") for n in range(num_samples // SAMPLES_PER_SHARD))
    (shards / "manifest.jsonl").write_text("".join(json.dumps(line.to_json()) + "\n" for line in lines))
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 1.5, 30_000)
    cluster_of = rng.choice(len(sizes), 1 << 20, p=sizes / sizes.sum())  # of a sample, drawn from these
    rates = (sizes / sizes.max()) ** -0.8
    scale = 0.5 / rates[cluster_of].mean()
    for _ in range(50):  # until half is drawn although no rate is above 1
        scale *= 0.5 / np.minimum(1, scale * rates[cluster_of]).mean()
    column = np.minimum(1, scale * rates[cluster_of])
    manifest: Manifest = read_manifest(shards)
    starts = rng.integers(len(column) - SAMPLES_PER_SHARD, size=len(manifest.shards))
    write_balance(
        folder / "balance",
        manifest,
        (column[start : start + SAMPLES_PER_SHARD] for start in starts),
        {"clusters": len(sizes), "clusters_at_one": int((scale * rates >= 1).sum())},
    )


def _start(folder: Path, epochs: float) -> dict[str, float]:
    """All that a run does with its balance before the first sample is read, and without one for comparison."""
    whole_s, balanced_s = (_start_s(_recipe(folder, epochs, name)) for name in ("", str(folder / "balance")))
    return {"start_s": balanced_s, "start_whole_s": whole_s}


def _plan(folder: Path, epochs: float) -> dict[str, float]:
    """A balance is read and checked, and one epoch laid out to its first sample."""
    manifest = read_manifest(folder / "shards")
    before_bytes, begun_s = _status_bytes("VmRSS"), time.perf_counter()
    balance = read_balance(folder / "balance", manifest)
    read_s = time.perf_counter() - begun_s
    BalancedOrder(Draws(balance, "rotation", 0), 8, 0).locate(0)
    plan_s = time.perf_counter() - begun_s - read_s
    return {"read_s": read_s, "plan_s": plan_s, "plan_peak_bytes": _status_bytes("VmHWM") - before_bytes}


_CHILDREN = {"start": _start, "plan": _plan}


def _recipe(folder: Path, epochs: float, balance: str) -> Recipe:
    data = {"train": str(folder / "shards"), "balance": balance}
    train = {"global_batch_size": BATCH_SIZE, "micro_batch_size": 256, "epochs": epochs}
    return parse_recipe({"data": data, "train": train}, "benchmark")


def _start_s(recipe: Recipe) -> float:
    begun_s = time.perf_counter()
    data = read_training_data(recipe.data)
    data.balance_sha256(recipe)
    (stage,) = plan_stages(recipe, data.epochs, 8, 49408, 49407)
    order = data.order(recipe.data, stage.seed)
    data.check_batch(order, stage.own_positions, BATCH_SIZE)
    order.locate(stage.first_position)
    return time.perf_counter() - begun_s


def _status_bytes(name: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
