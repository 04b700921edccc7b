"""What the runs of studies reached, summed up: parts of benchmarks/results/study.json.

    python benchmarks/study/collect_study.py OUT/flickr8k_gpu OUT/cifar10_cpu

Arms are compared over the seeds that both have. Seconds are those of steps timed alone (`run_study.py time`), where
they were, times the steps: runs side by side disturb each other's clocks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paired import estimate, paired_p
from record import record
from run_study import read_lines, step_times
from study_plan import BASELINE, TAIL_SHARE, Study, read_study

PROBE = "linear probe"


class Outcomes:
    """Runs of one study by arm and view; a value is one seed's."""

    def __init__(self, directory: Path) -> None:
        self.study: Study = read_study(directory / "study.yaml")
        self.times = step_times(self.study, directory)
        self._timed = read_lines(directory / "times.jsonl")
        self._probes = _read_probes(directory)
        self._runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        for line in read_lines(directory / "runs.jsonl"):
            # the baseline takes as long as itself
            is_samples = line["view"] == "further" or line["arm"] == BASELINE
            view = "samples" if is_samples else line["view"]
            self._runs.setdefault((line["arm"], view), {})[line["seed"]] = line

    @property
    def metrics(self) -> list[str]:
        """Names of what is compared."""
        return [*self.study.metrics, *self.study.last, *([PROBE] if self._probes else [])]

    def final(self, arm: str, view: str, metric: str) -> dict[int, float]:
        """By seed."""
        runs = self._runs.get((arm, view), {})
        if metric == PROBE:
            return {seed: self._probes[run["name"]] for seed, run in runs.items() if run["name"] in self._probes}
        if metric in self.study.last:
            return {seed: run["last"][metric] for seed, run in runs.items() if metric in run["last"]}
        return {seed: run["curve"][-1][metric] for seed, run in runs.items()}

    def at(self, arm: str, view: str, metric: str) -> dict[int, float]:
        """`final`; the baseline at equal samples is the baseline at equal time."""
        return self.final(arm, "samples" if arm == BASELINE and view == "time" else view, metric)

    def arm(self, arm: str, view: str) -> dict[str, Any]:
        """What is recorded of an arm."""
        runs = [*self._runs[arm, view].values()]
        last = runs[0]["curve"][-1]
        figures: dict[str, Any] = {
            "seeds": len(runs),
            "pairs": last["pairs"],
            "image_tokens_per_pair": round(last["image_tokens"] / last["pairs"], 2),
            "text_tokens_per_pair": round(last["text_tokens"] / last["pairs"], 2),
            "seconds": self._seconds(arm, view, last["step"]),
            "curve": [self._point(arm, view, [run["curve"][i] for run in runs]) for i in range(len(runs[0]["curve"]))],
        }
        for metric in self.metrics:
            if values := self.final(arm, view, metric):
                by_seed = {str(seed): round(value, 5) for seed, value in sorted(values.items())}
                figures[metric] = estimate([*values.values()]).rounded() | {"by_seed": by_seed}
        return figures

    def _point(self, arm: str, view: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("step", "pairs", "image_tokens", "text_tokens")
        point = {name: round(sum(line[name] for line in lines) / len(lines)) for name in names}
        thresholds = [line["mask_threshold"] for line in lines if line["mask_threshold"] is not None]
        return {
            **point,
            "seconds": self._seconds(arm, view, point["step"]),
            "mask_threshold": round(sum(thresholds) / len(thresholds), 4) if thresholds else None,
            **{metric: estimate([line[metric] for line in lines]).rounded() for metric in self.study.metrics},
        }

    def _seconds(self, arm: str, view: str, step: int) -> float | None:
        """Of so many steps; of a run with a tail as if it had reached its tail in proportion."""
        if arm not in self.times or (view == "tail" and BASELINE not in self.times):
            return None
        own = self.times[arm]
        return round(step * (own + TAIL_SHARE * (self.times[BASELINE] - own) if view == "tail" else own), 2)

    def compare(self, first: tuple[str, str], second: tuple[str, str]) -> dict[str, Any] | None:
        """Differences first - second over the seeds that both have; None where they share none."""
        found: dict[str, Any] = {}
        for metric in self.metrics:
            ours, theirs = self.final(*first, metric), self.final(*second, metric)
            if differences := [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]:
                p = paired_p(differences)
                found[metric] = estimate(differences).rounded() | {"p": None if p is None else round(p, 4)}
        return {"of": list(first), "over": list(second), **found} if found else None

    def figures(self) -> dict[str, Any]:
        """All that is recorded."""
        views: dict[str, dict[str, Any]] = {}
        for arm, view in self._arms():
            views.setdefault(view, {})[arm] = self.arm(arm, view)
        return {
            "title": self.study.title,
            "study": self.study.model_dump(mode="json", exclude_defaults=True),
            "batch": self.study.batch,
            "pairs": self.study.steps() * self.study.batch,
            "metrics": self.metrics,
            "step_s": {arm: round(step_s, 5) for arm, step_s in self.times.items()},
            "step_s_rounds": len(self._timed) // max(1, len(self.times)),
            "views": views,
            "comparisons": [found for pair in self._pairs() if (found := self.compare(*pair))],
        }

    def _arms(self) -> list[tuple[str, str]]:
        """What has runs, in the order of the study's file."""
        views = [view for view in ("samples", "time", "tail") if any(view == found for _, found in self._runs)]
        return [(arm, view) for view in views for arm in self.study.arms if (arm, view) in self._runs]

    def _pairs(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        pairs = []
        for arm, view in self._arms():
            if (arm, view) != (BASELINE, "samples"):
                pairs.append(((arm, view), (BASELINE, "samples")))
            if arm not in (BASELINE, _random_like(arm)):
                pairs.append(((arm, view), (_random_like(arm), view)))
            if view == "tail":
                pairs.append(((arm, view), (arm, "samples")))
        cluster = "cluster 0.5"
        pairs += [((cluster, view), ("reference", view)) for view in ("samples", "time")]
        return [*pairs, (("cluster even 0.5", "samples"), (cluster, "samples"))]


def _random_like(arm: str) -> str:
    """The random arm of an arm's ratio; of half the patches for an arm without one in its name."""
    last = arm.rsplit(" ", 1)[-1]
    return f"random {last}" if last[0].isdigit() else "random 0.5"


def _read_probes(directory: Path) -> dict[str, float]:
    """Accuracy of linear probes by the name of the run."""
    found = {}
    for line in read_lines(directory / "probes" / "results.jsonl"):
        parts = Path(line["checkpoint"]).parts
        found[parts[parts.index("runs") + 1]] = line["metrics"]["lp_acc1"]
    return found


def main() -> None:
    """Collect and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="OUT/NAME")
    options = parser.parse_args()
    for directory in options.studies:
        name = directory.name
        figures = Outcomes(directory).figures()
        seeds = min(arm["seeds"] for arms in figures["views"].values() for arm in arms.values())
        print(record("study", figures, f"python benchmarks/study/collect_study.py OUT/{name}", seeds, name), name)


if __name__ == "__main__":
    main()
