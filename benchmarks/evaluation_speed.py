"""How long an evaluation takes beside CLIP_benchmark's, on one core each, and how far their figures are apart.

    PEERS_PYTHON=.peers/bin/python python benchmarks/evaluation_speed.py EXPORT SET…        # after `make peers`

EXPORT is an exported open_clip folder, a SET a webdataset for classification or retrieval. Both evaluate the same files
at batch 64 in fp32, as whole processes from start to results, in turns. The probes are fitted to the first half of the
features of the first classification set and tested on the other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from peers.client import Peer, peers_python
from record import record
from safetensors.torch import load_file, save_file

from pipeline.evaluation.features import FeatureStore
from pipeline.evaluation.sets.layouts import ClassificationSet, EvaluationSet, open_evaluation_set
from pipeline.evaluation.tasks.logistic import fit
from pipeline.evaluation.tasks.zero_shot import TASK

_TASKS = {True: "zeroshot_classification", False: "zeroshot_retrieval"}
_DECAYS = (1e-6, 1e-5, 1e-4)


class Cost(NamedTuple):
    """Of a process and its children on one core."""

    cpu_s: float
    wall_s: float


def main() -> None:
    """Measure every set and write the record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("sets", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    python = peers_python()
    if python is None:
        sys.exit("error: no environment with CLIP_benchmark: run `make peers`, or set PEERS_PYTHON")
    peer = Peer(python)
    merges = str(peer("merges"))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for data in options.sets:
            figures[data.name] = compare(options.export, data, merges, python, options.repeats, Path(folder))
            print(data.name, json.dumps(figures[data.name]), flush=True)
            if "probe" not in figures and isinstance(open_evaluation_set(data), ClassificationSet):
                figures["probe"] = compare_probes(Path(folder) / data.name, data, peer)
    peer.close()
    speed_ups = [figures[data.name]["cpu_s"] for data in options.sets]
    total = sum(cost["clip_benchmark"] for cost in speed_ups) / sum(cost["ours"] for cost in speed_ups)
    result = {"over_clip_benchmark": round(total, 2), **figures}
    command = f"python benchmarks/evaluation_speed.py EXPORT {' '.join(data.name for data in options.sets)}"
    print(record("evaluation_speed", result, command, options.repeats))


def compare(export: Path, data: Path, merges: str, python: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of both, in turns, and the largest difference of their metrics."""
    dataset = open_evaluation_set(data)
    is_classification = isinstance(dataset, ClassificationSet)
    task, theirs_file = _TASKS[is_classification], folder / f"{data.name}.json"
    output = folder / data.name
    costs: dict[str, list[Cost]] = {"ours": [], "clip_benchmark": []}
    for repeat in range(repeats):
        output = folder / data.name / str(repeat)  # nothing is there to be used again
        ours = ["pipeline/evaluate.py", "--checkpoint", export, "--data", data, "--output", output, "--workers", 1]
        costs["ours"].append(run([sys.executable, *ours, "--tokenizer", merges]))
        request = json.dumps(["clip_benchmark", *map(str, (export, data, task, theirs_file))])
        costs["clip_benchmark"].append(run([python, "tests/peers/peer.py"], request))
    ours_metrics = json.loads((output / "results.jsonl").read_text())["metrics"]
    theirs_metrics = json.loads(theirs_file.read_text())["metrics"]
    difference = max(abs(ours_metrics[name] - value) for name, value in theirs_metrics.items())
    return {
        "samples": len(dataset.samples),
        "cpu_s": {name: round(median(cost.cpu_s for cost in runs), 2) for name, runs in costs.items()},
        "wall_s": {name: round(median(cost.wall_s for cost in runs), 2) for name, runs in costs.items()},
        "largest_difference_of_metrics": difference,
        **(_right(dataset, ours_metrics, theirs_metrics) if is_classification else {}),
        "metrics": {name: round(value, 6) for name, value in ours_metrics.items()},
    }


def _right(dataset: EvaluationSet, ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """How many images each has right, which is a whole number where no two classes tie."""
    counts = {"ours": ours["acc1"], "clip_benchmark": theirs["acc1"]}
    return {"right": {name: round(share * len(dataset.samples), 3) for name, share in counts.items()}}


def run(command: Sequence[object], stdin: str = "") -> Cost:
    """One process, and what it starts, on one core with one thread."""
    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    core = str(max(os.sched_getaffinity(0)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = ["taskset", "-c", core, *map(str, command)]
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, check=False
    )
    if done.returncode or '"error"' in done.stdout:
        sys.exit(f"error: {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu_s, time.monotonic() - start_s)


def compare_probes(output: Path, data: Path, peer: Peer) -> dict[str, Any]:
    """Accuracy of our probe, scikit-learn's and CLIP_benchmark's on the same features."""
    dataset = open_evaluation_set(data)
    assert isinstance(dataset, ClassificationSet)
    features_ND = _image_features(output / "0", dataset)
    labels_N = torch.tensor([sample.label for sample in dataset.samples])
    half, num_classes = len(labels_N) // 2, len(dataset.class_names)
    train_ND, test_ND, target_n = features_ND[:half], features_ND[half:], labels_N[half:]
    splits, logits_file = output / "splits.safetensors", output / "logits.safetensors"
    save_file({"train": train_ND.clone(), "labels": labels_N[:half].clone(), "test": test_ND.clone()}, splits)
    solution = fit(train_ND, labels_N[:half], num_classes, torch.tensor(_DECAYS))
    ours_SNC = solution.logits(test_ND)
    result: dict[str, Any] = {"training_samples": half, "test_samples": len(target_n)}
    for decay, ours_NC in zip(_DECAYS, ours_SNC, strict=True):
        peer("logistic_regression", splits, str(decay), logits_file)
        theirs_NC = load_file(logits_file)["logits"]
        result[f"weight_decay_{decay:g}"] = {
            "ours": _accuracy(ours_NC, target_n),
            "scikit_learn": _accuracy(theirs_NC, target_n),
            "other_predictions": int((ours_NC.argmax(1) != theirs_NC.argmax(1)).sum()),
        }
    peer("clip_benchmark_probe", splits, logits_file)
    result["clip_benchmark_without_decay"] = _accuracy(load_file(logits_file)["logits"], target_n)
    return result


def _image_features(output: Path, dataset: ClassificationSet) -> torch.Tensor:
    """What the evaluation stored."""
    images = TASK.collections(dataset)["images"]
    for folder in (output / "features").iterdir():
        identity = json.loads((folder / "collection.json").read_text())
        if identity["kind"] == "images":
            store = FeatureStore(output, images, identity["model"], identity["batch_size"])
            return store.load()[0]
    raise FileNotFoundError(f"no features of images in {output}")


def _accuracy(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> float:
    return round((logits_NC.argmax(1) == labels_N).double().mean().item(), 6)


if __name__ == "__main__":
    main()
