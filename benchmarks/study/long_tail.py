"""Balanced against uniform sampling of long-tailed data: part `long_tail` of results/study.json.

    nice python benchmarks/study/long_tail.py prepare --train TRAIN.parquet --test TEST.parquet --classes CLASSES.tsv \\
        --output OUT
    nice python benchmarks/study/long_tail.py balance --output OUT        # a model, its embeddings, clusters, rates
    nice python benchmarks/study/long_tail.py train --output OUT --lanes 2
    python benchmarks/study/long_tail.py collect --output OUT

Arms see as many samples, of the same shards: `uniform`; `half`, a random half of the pictures, uniform; `bernoulli` and
`rotation`, the rates of data-prep balance with either draw; `other`, by embeddings of another model, given as `balance
--embeddings FOLDER` (lite0_embeddings.py); `classes`, as if clusters were the classes. Finished runs are not repeated.
Without a GPU set DS_ACCELERATOR=cpu and OMP_NUM_THREADS=1, a lane for each core.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT))

import numpy as np
from lanes import Job, preload, run_jobs
from long_tail_data import LABELS, SHARDS, SUMMARY, THIRDS, TOKENIZER, data_prep, prepare, third_of_ranks
from paired import estimate, paired_p
from record import record
from run_study import read_lines, train, write_job

from data_prep.balancing.rates import fill
from formats.balance import read_balance, write_balance
from formats.files import read_json
from formats.manifest import read_manifest

UNIFORM, EMBEDDER = "uniform", "embedder"
HALF, CLASSES, OWN, OTHER = "half", "classes", "own", "other"  # what rates are by
ARMS: dict[str, tuple[str, str] | None] = {  # rates and draw
    UNIFORM: None,
    "half": (HALF, "rotation"),
    "bernoulli": (OWN, "bernoulli"),
    "rotation": (OWN, "rotation"),
    "other": (OTHER, "rotation"),
    "classes": (CLASSES, "rotation"),
}
EVALUATIONS, BATCH = 4, 128
_EMBEDDER_SEED = 9  # of no run that is compared


def recipe_of(output: Path, directory: Path, arm: str, seed: int, pairs: int) -> dict[str, Any]:
    """The recipe of a run that sees so many pairs."""
    steps = max(1, pairs // BATCH // EVALUATIONS) * EVALUATIONS
    data: dict[str, Any] = {"train": str(output / SHARDS), "tokenizer": str(output / TOKENIZER), "workers": 1}
    if drawn := ARMS[arm]:
        rates, draw = drawn
        data |= {"balance": str(balance_folder(output, rates)), "draw": draw}
    return {
        "base": "tiny_cpu",
        "model": {"name": "ViT-nano-8", "image_size": 64},
        "data": data,
        "masking": {"strategy": "none"},
        "optimizer": {"lr": 1.0e-3, "warmup_steps": steps // 10},
        "train": {
            "output": str(directory),
            "seed": seed,
            "max_steps": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "deepspeed_config": "zero1_fp32",
            "log_every_steps": max(1, steps // EVALUATIONS // 4),
            "save_every_steps": steps,
        },
        "log": {"watch_steps": False},
        "evaluation": {
            "data": [str(output / name) for name in THIRDS],
            "every_steps": steps // EVALUATIONS,
            "batch_size": 500,
            "workers": 1,
        },
    }


def balance_folder(output: Path, rates: str) -> Path:
    """Where rates are."""
    return output / f"balance-{rates}"


@dataclass(frozen=True)
class Balancing:
    """Options of data-prep clusters and balance."""

    clusters: int
    merge_similarity: float
    alpha: float
    keep: float


def make_balance(output: Path, balancing: Balancing, source: str, embeddings: Path) -> None:
    """Rates by embeddings."""
    clusters, balance = output / f"clusters-{source}", balance_folder(output, source)
    sizes = ("--clusters", balancing.clusters, "--merge-similarity", balancing.merge_similarity, "--seed", 0)
    if not clusters.exists():
        data_prep("clusters", embeddings, "--shards", output / SHARDS, "--output", clusters, *sizes)
    if not balance.exists():
        rates = ("--alpha", balancing.alpha, "--keep", balancing.keep)
        data_prep("balance", clusters, *rates, "--output", balance)


def make_known_rates(output: Path, balancing: Balancing) -> None:
    """Rates that need no embeddings: 1 for a random half of the pictures; those of clusters that are the classes."""
    manifest, rank_N = read_manifest(output / SHARDS), np.load(output / LABELS, allow_pickle=False)
    sizes_C = np.bincount(rank_N)
    rates_C = fill(sizes_C, balancing.alpha, balancing.keep * len(rank_N), 1.0)
    half_N = np.random.default_rng(0).permutation(len(rank_N)) < len(rank_N) // 2
    ends = np.cumsum([shard.samples for shard in manifest.shards])[:-1]
    for name, rates_N, of in ((HALF, half_N.astype(np.float32), np.ones(1)), (CLASSES, rates_C[rank_N], rates_C)):
        summary = {"clusters": len(of), "clusters_at_one": int((of == 1).sum())}
        if not balance_folder(output, name).exists():
            write_balance(balance_folder(output, name), manifest, np.split(rates_N, ends), summary)


def embed(output: Path, pairs: int) -> Path:
    """Embeddings by a model that is trained on the same pairs first."""
    directory, embeddings = output / EMBEDDER, output / "embeddings"
    job = write_job(EMBEDDER, directory, recipe_of(output, directory, UNIFORM, _EMBEDDER_SEED, pairs))
    ended: list[bool] = []
    run_jobs(train, [job], 1, math.inf, lambda _, is_well: ended.append(is_well))  # a finished one ends at once
    if ended != [True]:
        raise SystemExit(f"error: the model for embeddings failed, see {job.log}")
    command = [sys.executable, str(ROOT / "pipeline/embed.py"), "--checkpoint", str(directory)]
    subprocess.run([*command, "--data", str(output / SHARDS), "--output", str(embeddings)], check=True)
    return embeddings


def train_arms(output: Path, arms: Sequence[str], seeds: Sequence[int], pairs: int, lanes: int, end_s: float) -> None:
    """All runs that are not finished, every arm once before any a second time."""
    done = {line["name"] for line in read_lines(output / "runs.jsonl")}
    named = {f"{arm.replace(' ', '_')}-{seed}": (arm, seed) for seed in seeds for arm in arms}
    runs = {name: run for name, run in named.items() if name not in done}
    jobs = []
    for name, (arm, seed) in runs.items():
        directory = output / "runs" / name
        jobs.append(write_job(name, directory, recipe_of(output, directory, arm, seed, pairs)))

    def keep(job: Job, is_well: bool) -> None:
        if not is_well:
            print(f"{job.name} failed, see {job.log}", file=sys.stderr, flush=True)
            return
        kept = {"name": job.name, "arm": runs[job.name][0], "seed": runs[job.name][1]}
        kept["curve"] = curve_of(output / "runs" / job.name)
        with (output / "runs.jsonl").open("a") as file:
            file.write(json.dumps(kept) + "\n")
        print(f"{len(read_lines(output / 'runs.jsonl'))} runs: {job.name}  {kept['curve'][-1]}", flush=True)

    run_jobs(train, jobs, lanes, end_s, keep)


def curve_of(directory: Path) -> list[dict[str, float]]:
    """Accuracy of each third at each evaluation of a run."""
    lines = read_lines(directory / "metrics.jsonl")
    return [
        {"pairs": line["samples_seen"], **{name: line[f"eval/{name}/acc1"] for name in THIRDS}}
        for line in lines
        if f"eval/{THIRDS[0]}/acc1" in line
    ]


def collect(output: Path) -> dict[str, Any]:
    """The record's figures."""
    summary = read_json(output / SUMMARY)
    sizes = summary["test_classes"]
    final: dict[str, dict[int, dict[str, float]]] = {}
    for line in read_lines(output / "runs.jsonl"):
        last = {name: line["curve"][-1][name] for name in THIRDS}
        mean = sum(last[name] * sizes[name] for name in THIRDS) / sum(sizes.values())
        final.setdefault(line["arm"], {})[line["seed"]] = {**last, "mean": mean}
    pairs = read_lines(output / "runs.jsonl")[0]["curve"][-1]["pairs"]
    pairs_of_arms = [(one, other) for other in (UNIFORM, HALF, "bernoulli") for one in final if one != other]
    compared = [compare(one, final[one], other, final[other]) for one, other in pairs_of_arms if other in final]
    return {
        **summary,
        "pairs_seen": pairs,
        "balance": {
            source: balance_figures(output, source, summary["classes"])
            for source in (CLASSES, OWN, OTHER)
            if balance_folder(output, source).exists()
        },
        "arms": {arm: arm_figures(by_seed) for arm, by_seed in final.items()},
        "comparisons": [found for found in compared if found],
    }


def arm_figures(by_seed: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Accuracies of an arm: mean over seeds with its interval, and each seed's."""
    metrics = (*THIRDS, "mean")
    means = {name: estimate([found[name] for found in by_seed.values()]).rounded() for name in metrics}
    rounded = {str(seed): {name: round(found[name], 5) for name in metrics} for seed, found in sorted(by_seed.items())}
    return {"seeds": len(by_seed), **means, "by_seed": rounded}


def compare(
    one: str, ours: dict[int, dict[str, float]], other: str, theirs: dict[int, dict[str, float]]
) -> dict[str, Any] | None:
    """Differences one - other, paired by seed; None where they share none."""
    found: dict[str, Any] = {}
    for metric in (*THIRDS, "mean"):
        if differences := [ours[seed][metric] - theirs[seed][metric] for seed in sorted(ours.keys() & theirs.keys())]:
            p = paired_p(differences)
            found[metric] = estimate(differences).rounded() | {"p": None if p is None else round(p, 4)}
    return {"of": one, "over": other, **found} if found else None


def balance_figures(output: Path, source: str, classes: int) -> dict[str, Any]:
    """What the rates of a source came to, and the mean rate of the pictures of each third of the classes."""
    manifest = read_manifest(output / SHARDS)
    balance = read_balance(balance_folder(output, source), manifest)
    rates = np.concatenate([balance.rates(number).astype(np.float64) for number in range(len(manifest.shards))])
    third = third_of_ranks(classes)[np.load(output / LABELS, allow_pickle=False)]
    mean_rate = {name: round(float(rates[third == number].mean()), 4) for number, name in enumerate(THIRDS)}
    wanted = ("achieved_share", "clusters", "clusters_at_one")
    return {**{name: balance.summary[name] for name in wanted}, "mean_rate": mean_rate}


def main() -> None:
    """Prepare, balance, train or collect, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "balance", "train", "collect"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="parquet with image and label (prepare)")
    parser.add_argument("--test", type=Path, help="the same of other pictures (prepare)")
    parser.add_argument("--classes", type=Path, help="label, lemmas, gloss, tabs between (prepare)")
    parser.add_argument("--pictures", type=int, default=15_000, help="of the long-tailed set (prepare)")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law (prepare)")
    parser.add_argument("--pairs", type=int, default=76_800, help="that a run sees (balance, train)")
    parser.add_argument("--clusters", type=int, default=200, help="before they are merged (balance)")
    parser.add_argument("--merge-similarity", type=float, default=0.9, help="of centroids; 1: none (balance)")
    parser.add_argument("--alpha", type=float, default=0.2, help="a cluster counts as its size to this power (balance)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of samples drawn in a pass (balance)")
    parser.add_argument("--embeddings", type=Path, help="that another model gave (balance)")
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS], help="which (train)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13], help="(train)")
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time (train)")
    parser.add_argument("--minutes", type=float, default=1e6, help="then end what is under way (train)")
    options = parser.parse_args()
    output = options.output.resolve()
    if options.action == "prepare":
        prepare(options.train, options.test, options.classes, output, options.pictures, options.exponent)
        return
    if options.action == "collect":
        figures = collect(output)
        seeds = min(arm["seeds"] for arm in figures["arms"].values())
        print(record("study", figures, "python benchmarks/study/long_tail.py collect --output OUT", seeds, "long_tail"))
        return
    preload()
    if options.action == "balance":
        balancing = Balancing(options.clusters, options.merge_similarity, options.alpha, options.keep)
        make_known_rates(output, balancing)
        if options.embeddings:
            make_balance(output, balancing, OTHER, options.embeddings)
        else:
            make_balance(output, balancing, OWN, embed(output, options.pairs))
    else:
        end_s = time.monotonic() + 60 * options.minutes
        train_arms(output, options.arms, options.seeds, options.pairs, options.lanes, end_s)


if __name__ == "__main__":
    main()
