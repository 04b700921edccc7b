"""Linear probes: logistic regression on frozen image features, its weight decay chosen on a validation split.

After Radford et al. 2021 (A.3): L-BFGS, a coarse sweep and a finer one around its best value; features are of unit
length, as in CLIP_benchmark. All weight decays of a sweep are one batched problem.

N samples of a split, D columns of a feature, S weight decays, C classes, K draws
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formats.errors import UserError
from pipeline.evaluation.sets.files import Collection
from pipeline.evaluation.sets.layouts import ClassificationSample, ClassificationSet
from pipeline.evaluation.tasks.intervals import Outcomes
from pipeline.evaluation.tasks.logistic import Solution, fit
from pipeline.evaluation.tasks.task import Features, Scores, Task
from pipeline.evaluation.tasks.zero_shot import classification_chance, outcomes_of_scores

SHOTS = (1, 2, 4, 8, 16)
# Of few-shot training sets; their mean is the figure.
_DRAWS = 5
_COARSE = [10.0**exponent for exponent in range(-8, 1)]
_FINE = [10.0 ** (exponent / 4) for exponent in range(-3, 4)]
_VALIDATION_SHARE = 0.2
_ROWS_AT_ONCE = 4096


class Split(NamedTuple):
    """Features [N, D] and classes [N]."""

    features_ND: Tensor
    labels_N: Tensor

    def rows(self, index_n: Tensor) -> Split:
        """Some of the samples."""
        return Split(self.features_ND[index_n], self.labels_N[index_n])


class Probed(NamedTuple):
    """Outcomes on the test split, and how the probe came about."""

    outcomes: dict[str, Outcomes]
    details: dict[str, Any]


def probe(train: Split, validation: Split, test: Split, num_classes: int, refit: bool = True) -> Probed:
    """Outcomes on `test` of a fit on `train` with the weight decay that is best on `validation`; `refit`: on both."""
    decay, validation_acc1, best = _sweep(train, validation, num_classes)
    if refit:
        train = Split(torch.cat((train.features_ND, validation.features_ND)), torch.cat((train[1], validation[1])))
    solution = _fit(train, [decay], num_classes, best)
    scores = (solution.logits(part_nD)[0].cpu() for part_nD in test.features_ND.split(_ROWS_AT_ONCE))
    outcomes = outcomes_of_scores(scores, test.labels_N.cpu())
    return Probed(
        outcomes={f"lp_{name}": outcome for name, outcome in outcomes.items()},
        details={
            "weight_decay": decay,
            "validation_acc1": validation_acc1,
            "training_samples": len(train.labels_N),
            "converged": bool(solution.converged_S.all()),
        },
    )


def _sweep(train: Split, validation: Split, num_classes: int) -> tuple[float, float, Solution]:
    """The weight decay that is best on `validation` (of equal ones the largest), its accuracy there, and the fit."""
    coarse, _, near = _best(train, validation, num_classes, _COARSE, None)
    return _best(train, validation, num_classes, [coarse * factor for factor in _FINE], near)


def _best(
    train: Split, validation: Split, num_classes: int, decays: Sequence[float], start: Solution | None
) -> tuple[float, float, Solution]:
    solution = _fit(train, decays, num_classes, start)
    predicted = [solution.logits(part_nD).argmax(-1) for part_nD in validation.features_ND.split(_ROWS_AT_ONCE)]
    acc1_S = (torch.cat(predicted, 1) == validation.labels_N).double().mean(1).tolist()
    acc1, decay = max(zip(acc1_S, decays, strict=True))
    return decay, acc1, solution.of(decays.index(decay))


def _fit(train: Split, decays: Sequence[float], num_classes: int, start: Solution | None) -> Solution:
    return fit(train.features_ND, train.labels_N, num_classes, torch.tensor(decays), start)


class _Rows(NamedTuple):
    """Which samples of `train/` train, and which of them validate where there is no `val/`: a fifth, by seed 0."""

    train_n: Tensor
    validation_n: Tensor

    @staticmethod
    def of(dataset: ClassificationSet) -> _Rows:
        total = len(dataset.train)
        if dataset.has_split("val"):
            return _Rows(torch.arange(total), torch.arange(0))
        order_N = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        count = round(_VALIDATION_SHARE * total)
        return _Rows(order_N[count:].sort().values, order_N[:count].sort().values)


def _splits(dataset: ClassificationSet, features: Features) -> tuple[Split, Split, Split, int]:
    """Training, validation and test split, on the device of the features, and the number of classes."""
    splits = {"images": dataset.samples, "train": dataset.train}
    if dataset.has_split("val"):
        splits["val"] = dataset.val
    of = {name: Split(features[name], _labels(samples).to(features[name].device)) for name, samples in splits.items()}
    rows = _Rows.of(dataset)
    validation = of["val"] if "val" in of else of["train"].rows(rows.validation_n)
    return of["train"].rows(rows.train_n), validation, of["images"], len(dataset.class_names)


def _labels(samples: Sequence[ClassificationSample]) -> Tensor:
    return torch.tensor([sample.label for sample in samples])


def _fewest(dataset: ClassificationSet) -> tuple[int, int]:
    """A class with the fewest samples to train on, and how many it has."""
    counts_C = torch.bincount(_labels(dataset.train)[_Rows.of(dataset).train_n], minlength=len(dataset.class_names))
    return int(counts_C.argmin()), int(counts_C.min())


def _collections(dataset: ClassificationSet) -> dict[str, Collection]:
    splits = {"images": dataset.samples, "train": dataset.train}
    if dataset.has_split("val"):
        splits["val"] = dataset.val
    missing = set(range(len(dataset.class_names))) - {sample.label for sample in splits["train"]}
    if missing:
        name = dataset.class_names[min(missing)]
        raise UserError(f"the training split of {dataset.name} has no sample of class {min(missing)} ({name})")
    if "val" not in splits and len(_Rows.of(dataset).validation_n) == 0:
        raise UserError(
            f"{dataset.name} has {len(dataset.train)} training samples, a fifth of which is none to choose the weight "
            "decay by: give it more, or a split val/"
        )
    names = {"images": dataset.name, "train": f"{dataset.name} train", "val": f"{dataset.name} val"}
    return {
        split: Collection(names[split], "images", [sample.image for sample in samples])
        for split, samples in splits.items()
    }


def _few_shot_collections(dataset: ClassificationSet) -> dict[str, Collection]:
    collections = _collections(dataset)
    label, count = _fewest(dataset)
    if count < SHOTS[0]:
        raise UserError(
            f"few_shot has no sample of class {label} ({dataset.class_names[label]}) of {dataset.name} to draw: the "
            "fifth of train/ that chooses the weight decay takes all of them; give it more, or a split val/"
        )
    return collections


def _score(dataset: ClassificationSet, features: Features) -> Scores:
    train, validation, test, num_classes = _splits(dataset, features)
    probed = probe(train, validation, test, num_classes)
    chance = {f"lp_{name}": value for name, value in classification_chance(num_classes).items()}
    return Scores.of(probed.outcomes, chance, len(test.labels_N), details=probed.details)


def _score_few_shot(dataset: ClassificationSet, features: Features) -> Scores:
    train, validation, test, num_classes = _splits(dataset, features)
    _, fewest = _fewest(dataset)
    outcomes, deviations = {}, {}
    for shots in (shots for shots in SHOTS if shots <= fewest):
        draws = [few_shot_rows(train.labels_N, shots, num_classes, seed) for seed in range(_DRAWS)]
        hits_KN = torch.stack(
            [
                probe(train.rows(rows_n), validation, test, num_classes, refit=False).outcomes["lp_acc1"].values_N
                for rows_n in draws
            ]
        )
        name = f"lp_acc1/{shots}_shot"
        outcomes[name], deviations[name] = Outcomes(hits_KN.mean(0)), hits_KN.mean(1).std().item()
    details = {"draws": _DRAWS, "standard_deviation": deviations}
    return Scores.of(outcomes, dict.fromkeys(outcomes, 1 / num_classes), len(test.labels_N), details=details)


def few_shot_rows(labels_N: Tensor, shots: int, num_classes: int, seed: int) -> Tensor:
    """Indices of `shots` samples of each class, drawn at random, ascending."""
    labels_N = labels_N.cpu()
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    rows = [order_N[labels_N[order_N] == label][:shots] for label in range(num_classes)]
    return torch.cat(rows).sort().values


TASK = Task(
    name="linear_probe",
    option="linear_probe",
    sets=(ClassificationSet,),
    score=_score,
    collections=_collections,
    is_probe=True,
)
FEW_SHOT_TASK = replace(
    TASK,
    name="few_shot_linear_probe",
    option="few_shot",
    score=_score_few_shot,
    collections=_few_shot_collections,
)
