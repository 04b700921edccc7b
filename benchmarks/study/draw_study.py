"""Tables and plots of docs/results.md, and the README's table, from benchmarks/results/study.json.

python benchmarks/study/draw_study.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import matplotlib as mpl

mpl.use("Agg")
from doc_tables import markdown, replace
from draw_map import draw_map, map_table, regimes
from matplotlib import pyplot
from matplotlib.axes import Axes
from record import RESULTS_DIRECTORY

PAGE, README = ROOT / "docs/results.md", ROOT / "README.md"
IMAGES = ROOT / "docs/images"
BASELINE, PROBE = ("none", "samples"), "linear probe"
COLOURS = {
    "none": "#555555",
    "random": "#1f77b4",
    "cluster": "#d62728",
    "cluster embedding 0.5": "#ff9896",
    "cluster even 0.5": "#8c1a1a",
    "reference": "#9467bd",
    "pgs": "#2ca02c",
}
VIEWS = {"samples": "", "time": ", as long as none", "tail": ", last tenth whole"}


def recorded() -> dict[str, Any]:
    """Figures of the record."""
    figures: dict[str, Any] = json.loads((RESULTS_DIRECTORY / "study.json").read_text())["figures"]
    return figures


def studies(figures: dict[str, Any]) -> dict[str, Any]:
    """Parts that are of trained models."""
    return {name: part for name, part in figures.items() if isinstance(part, dict) and "views" in part}


def headline_metric(study: dict[str, Any]) -> str:
    """The last of a study's own."""
    found: str = [name for name in study["metrics"] if name != PROBE][-1]
    return found


def study_table(study: dict[str, Any]) -> str:
    """A row for each arm of each view."""
    metrics, main_metric = study["metrics"], headline_metric(study)
    has_times = bool(study["step_s"])
    header = ["masks", "seeds", "pairs, k", "image tokens a pair", *(["seconds"] if has_times else [])]
    header += [*metrics, f"{main_metric}: over none", "over random"]
    rows = []
    for view, arms in study["views"].items():
        for arm, found in arms.items():
            row = [arm + VIEWS[view], str(found["seeds"]), f"{found['pairs'] / 1e3:.0f}"]
            row.append(f"{found['image_tokens_per_pair']:.0f}")
            if has_times:
                row.append("" if found["seconds"] is None else f"{found['seconds']:.0f}")
            row += [estimate_cell(found.get(metric)) for metric in metrics]
            row += [difference_cell(study, (arm, view), other, main_metric) for other in (is_baseline, is_random)]
            rows.append(row)
    return markdown(header, rows)


def is_baseline(over: tuple[str, str], view: str) -> bool:
    """Whether a comparison is with the unmasked arm."""
    return over == BASELINE


def is_random(over: tuple[str, str], view: str) -> bool:
    """Whether it is with random masks under the same conditions."""
    return over[0].startswith("random") and over[1] == view


def estimate_cell(estimate: dict[str, Any] | None) -> str:
    """Mean and half the interval, in percent."""
    if estimate is None:
        return ""
    half = "" if estimate["high"] is None else f" ± {100 * (estimate['high'] - estimate['mean']):.1f}"
    return f"{100 * estimate['mean']:.1f}{half}"


def difference_cell(
    study: dict[str, Any], run: tuple[str, str], is_wanted: Callable[[tuple[str, str], str], bool], metric: str
) -> str:
    """A paired difference in points, its interval and p."""
    for compared in study["comparisons"]:
        if tuple(compared["of"]) == run and is_wanted(tuple(compared["over"]), run[1]) and metric in compared:
            return describe_difference(compared[metric])
    return ""


def describe_difference(found: dict[str, Any]) -> str:
    """In points, with interval and p where there is more than one seed."""
    if found["p"] is None:
        return f"{100 * found['mean']:+.1f}"
    interval = f"[{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"{100 * found['mean']:+.1f} {interval}, p {found['p']:.3f}"


def further_table(study: dict[str, Any]) -> str:
    """Paired differences other than over `none` and `random`."""
    metric = headline_metric(study)
    rows = []
    for compared in study["comparisons"]:
        (arm, view), (other, other_view) = compared["of"], compared["over"]
        if metric in compared and other != BASELINE[0] and not (other.startswith("random") and other_view == view):
            difference = describe_difference(compared[metric])
            rows.append([arm + VIEWS[view], other + VIEWS[other_view], difference, str(compared[metric]["n"])])
    return markdown(["masks", "over", metric, "seeds"], rows)


def budget_table(budget: dict[str, Any]) -> str:
    """What the fixed threshold does to each set."""
    header = ["set", "its own threshold", "dropped at the first set's", "lowest and highest batch", "tokens over exact"]
    header += ["fullest of 8 ranks over mean"]
    rows = []
    for name, found in budget.items():
        if not isinstance(found, dict):
            continue
        low, high = found["dropped_lowest_and_highest"]
        rows.append(
            [
                name,
                f"{found['own_threshold']:.3f}",
                f"{100 * found['dropped_mean']:.1f} %",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                f"{found['tokens_over_exact_budget']:.2f}",
                f"{found['fullest_of_8_ranks_over_mean']:.3f}",
            ]
        )
    return markdown(header, rows)


def long_tail_table(study: dict[str, Any]) -> str:
    """Accuracy by thirds of the classes, and what balanced arms have over uniform sampling."""
    thirds = [*study["test_classes"], "mean"]
    over_uniform = {found["of"]: found for found in study["comparisons"] if found["over"] == "uniform"}
    header = ["arm", "seeds", *thirds, "tail: over uniform", "mean: over uniform"]
    rows = []
    for arm, found in study["arms"].items():
        differences = [
            describe_difference(over_uniform[arm][metric]) if arm in over_uniform else "" for metric in ("tail", "mean")
        ]
        rows.append([arm, str(found["seeds"]), *(estimate_cell(found[third]) for third in thirds), *differences])
    return markdown(header, rows)


def confirmed_table(lines: list[dict[str, Any]]) -> str:
    """Differences in points, with p over all of them together."""
    header = ["set", "masks", "over", "metric", "seeds", "difference", "p, corrected"]
    rows = []
    for line in lines:
        interval = f"{100 * line['difference']:+.1f} [{100 * line['low']:+.1f}, {100 * line['high']:+.1f}]"
        names = [line[name] for name in ("regime", "arm", "over", "metric")]
        rows.append([*names, str(line["seeds"]), interval, f"{line['p_corrected']:.3f}"])
    return markdown(header, rows)


def colour(arm: str) -> str:
    """One for each kind of masks."""
    return COLOURS.get(arm, COLOURS.get(arm.split(" ")[0], "#8c564b"))


def draw(study: dict[str, Any], path: Path) -> None:
    """Every seed, mean and interval of all arms; then means of the main arms over tokens, and over time if known."""
    metric = headline_metric(study)
    axes_of_curves = ["tokens", "seconds"] if study["step_s"] else ["tokens"]
    panels = 1 + len(axes_of_curves)
    figure, axes = pyplot.subplots(
        1, panels, figsize=(1.5 + 4.7 * panels, 4.8), width_ratios=(1.2, *[1] * (panels - 1))
    )
    draw_finals(study, metric, axes[0])
    for over, panel in zip(axes_of_curves, axes[1:], strict=True):
        draw_curves(study, metric, over, panel)
    figure.suptitle(study["title"], fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_finals(study: dict[str, Any], metric: str, axes: Axes) -> None:
    """Seeds as dots, mean and 95 % interval as a bar."""
    rows = [(arm, view, found) for view, arms in study["views"].items() for arm, found in arms.items()]
    for place, (arm, _, found) in enumerate(reversed(rows)):
        estimate = found[metric]
        values = [100 * value for value in estimate["by_seed"].values()]
        axes.plot(values, [place] * len(values), "o", color=colour(arm), alpha=0.35, markersize=5)
        mean = 100 * estimate["mean"]
        half = 0 if estimate["high"] is None else 100 * estimate["high"] - mean
        axes.errorbar(mean, place, xerr=half, fmt="|", color=colour(arm), markersize=12, capsize=3)
    axes.set_yticks(range(len(rows)), [arm + VIEWS[view] for arm, view, _ in reversed(rows)], fontsize=8)
    axes.set_xlabel(f"{metric}, %, at the end of training")
    axes.grid(axis="x", alpha=0.3)


def draw_curves(study: dict[str, Any], metric: str, over: str, axes: Axes) -> None:
    """Means of seeds during training; runs that are as long as the unmasked one are dashed."""
    for view, style in (("samples", "-"), ("time", "--")):
        for arm, found in study["views"].get(view, {}).items():
            if (over == "seconds" and found["seconds"] is None) or arm.endswith(("0.3", "0.7")):
                continue
            x = [point["seconds"] if over == "seconds" else point["image_tokens"] / 1e6 for point in found["curve"]]
            y = [100 * point[metric]["mean"] for point in found["curve"]]
            axes.plot(x, y, style, marker=".", color=colour(arm), label=arm + VIEWS[view])
    axes.set_xlabel("seconds of steps, timed alone" if over == "seconds" else "image tokens seen, millions")
    axes.set_ylabel(f"{metric}, %, mean of seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def headline_table(figures: dict[str, Any]) -> str:
    """For the README: the main arms on real pictures."""
    flickr, cifar = figures["flickr8k_gpu"], figures["cifar10_cpu"]
    header = ["masks", "Flickr8k, mean R@10", "CIFAR-10, zero-shot", "CIFAR-10, trained as long as none"]
    rows = []
    for arm in ("none", "random 0.5", "cluster 0.5", "reference"):
        equal_time = cifar["views"]["time"].get(arm) or (cifar["views"]["samples"][arm] if arm == "none" else None)
        rows.append(
            [
                arm,
                estimate_cell(flickr["views"]["samples"][arm]["mean R@10"]),
                estimate_cell(cifar["views"]["samples"][arm]["zero-shot accuracy"]),
                estimate_cell(equal_time and equal_time["zero-shot accuracy"]),
            ]
        )
    return markdown(header, rows)


def tables(figures: dict[str, Any]) -> dict[tuple[Path, str], str]:
    """By page and the name of their place there."""
    cells = regimes(figures)
    found = {
        (PAGE, f"study.json, {name}"): study_table(study)
        for name, study in studies(figures).items()
        if name not in cells
    }
    found[PAGE, "study.json, cifar10_cpu, differences"] = further_table(figures["cifar10_cpu"])
    found[PAGE, "study.json, budget"] = budget_table(figures["budget"])
    if regimes(figures):
        found[PAGE, "study.json, map"] = map_table(figures)
    if "confirmed" in figures:
        found[PAGE, "study.json, confirmed"] = confirmed_table(figures["confirmed"])
    if "long_tail" in figures:
        found[PAGE, "study.json, long_tail"] = long_tail_table(figures["long_tail"])
    found[README, "study.json"] = headline_table(figures)
    return found


def main() -> None:
    """Write tables and plots."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figures = recorded()
    for (page, name), text in tables(figures).items():
        replace(page, name, text)
        print(f"{name}\n{text}\n")
    for name, study in studies(figures).items():
        if name not in regimes(figures):
            draw(study, IMAGES / f"study_{name}.png")
    if regimes(figures):
        draw_map(figures, IMAGES / "masks_map.png")


if __name__ == "__main__":
    main()
