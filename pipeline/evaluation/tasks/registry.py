"""All tasks, and which of them a data set is for."""

from __future__ import annotations

from collections.abc import Sequence

from formats.errors import UserError
from pipeline.evaluation.sets.layouts import EvaluationSet
from pipeline.evaluation.tasks import composition, linear_probe, retrieval, zero_shot
from pipeline.evaluation.tasks.task import Task

TASKS: dict[str, Task] = {
    task.option: task
    for task in (
        zero_shot.TASK,
        retrieval.TASK,
        composition.TASK,
        composition.GROUP_TASK,
        linear_probe.TASK,
        linear_probe.FEW_SHOT_TASK,
    )
}


def tasks_of(dataset: EvaluationSet, options: Sequence[str] | None) -> tuple[Task, ...]:
    """The automatic tasks that fit a data set, or those that `options` name.

    Raises UserError for an unknown option.
    """
    for option in options or ():
        if option not in TASKS:
            raise UserError(f"unknown task {option!r}: --tasks takes auto, or a list of {', '.join(TASKS)}")
    wanted = [option for option, task in TASKS.items() if task.automatic] if options is None else options
    return tuple(TASKS[option] for option in wanted if TASKS[option].fits(dataset))
