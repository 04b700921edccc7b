"""The comparisons that a protocol confirms, corrected for how many they are: `confirmed` of results/study.json.

    python benchmarks/study/confirm.py OUT/confirm_tiny OUT/confirm_cifar OUT/confirm_flickr

Each arm over `none` and over `random 0.5`, by the last metric of its study, over the seeds that both have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from collect_study import Outcomes
from paired import estimate, holm, paired_p
from record import record
from study_plan import BASELINE

RIVALS = (BASELINE, "random 0.5")
_LEAST_SEEDS = 2


def comparisons(outcomes: Outcomes, view: str) -> list[dict[str, Any]]:
    """Of one study, in one view, with `p` as it is alone."""
    metric = [*outcomes.study.metrics][-1]
    found = []
    for arm in outcomes.study.views[view]:
        for over in RIVALS[: RIVALS.index(arm)] if arm in RIVALS else RIVALS:
            ours, theirs = outcomes.at(arm, view, metric), outcomes.at(over, view, metric)
            seeds = sorted(ours.keys() & theirs.keys())
            differences = [ours[seed] - theirs[seed] for seed in seeds]
            if len(seeds) < _LEAST_SEEDS:
                print(f"{outcomes.study.title}: {arm} over {over} has {len(seeds)} seeds so far: left out")
                continue
            mean, p = estimate(differences).rounded(), paired_p(differences)
            found.append(
                {
                    "set": outcomes.study.evaluation[0],
                    "regime": outcomes.study.title,
                    "metric": metric,
                    "arm": arm,
                    "over": over,
                    "view": view,
                    "seeds": len(seeds),
                    "difference": mean["mean"],
                    "low": mean["low"],
                    "high": mean["high"],
                    "p": float(mean["mean"] == 0) if p is None else p,  # None: the same in every seed
                }
            )
    return found


def corrected(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With `p_corrected` over all of them."""
    corrections = holm([line["p"] for line in found])
    both = zip(found, corrections, strict=True)
    return [line | {"p": round(line["p"], 5), "p_corrected": round(p, 5)} for line, p in both]


def main() -> None:
    """Compare and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="OUT/NAME")
    options = parser.parse_args()
    found = [line for path in options.studies for line in comparisons(Outcomes(path), "time")]
    names = " ".join(f"OUT/{path.name}" for path in options.studies)
    seeds = min((line["seeds"] for line in found), default=0)
    command = f"python benchmarks/study/confirm.py {names}"
    print(record("study", {"confirmed": corrected(found)}, command, seeds, keep_others=True))


if __name__ == "__main__":
    main()
