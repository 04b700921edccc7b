"""Whether ranks agree: on what they began with, on where they stand, on the weights they hold.

P parameters, W ranks
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from formats.errors import UserError
from pipeline.ranks import PendingMaximum, Ranks

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES_SHOWN = 3


def check_same_start(facts: Mapping[str, str], ranks: Ranks) -> None:
    """Raise UserError, on all ranks, if they do not agree on what they are to do; facts are by name. Collective."""
    everyones = ranks.gather_objects(dict(facts))
    for rank, others in enumerate(everyones):
        for name, value in others.items():
            if value != everyones[0][name]:
                raise UserError(
                    f"rank {rank} differs from rank 0 in {name}: give all nodes the same "
                    f"(rank 0: {_different_line(everyones[0][name], value)}; "
                    f"rank {rank}: {_different_line(value, everyones[0][name])})"
                )


def _different_line(value: str, other: str) -> str:
    """The first line of a text that differs from another's."""
    pairs = itertools.zip_longest(value.splitlines(), other.splitlines(), fillvalue="nothing")
    return next((line.strip() for line, others in pairs if line != others), "")


class StepVote:
    """After every step ranks tell each other what each wants and where it stands; the host waits for none of it.

    What one step's votes came to is known after the next step, on all ranks alike.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: PendingMaximum | None = None

    def cast(self, step: int, samples_seen: int, stop: bool) -> bool:
        """Whether any rank wanted to stop when the step before this one was over.

        Raises UserError if ranks were not at the same step or the same place in the data then.
        """
        before = self._pending
        place = [step, samples_seen]
        self._pending = self._ranks.start_maximum([int(stop), *place, *(-value for value in place)])
        return before is not None and _read(before)

    def close(self) -> None:
        """Wait for the last votes, which nobody reads."""
        if self._pending is not None:
            self._pending.read()
            self._pending = None


def _read(pending: PendingMaximum) -> bool:
    stop, last_step, most_samples, first_step, fewest_samples = pending.read()
    if (last_step, most_samples) != (-first_step, -fewest_samples):
        raise UserError(
            f"ranks have run apart: they stand at steps {-first_step} to {last_step} and at samples {-fewest_samples} "
            f"to {most_samples}; nothing is saved, the last checkpoint is intact"
        )
    return bool(stop)


class RankCheck:
    """Compares the weights that a forward pass uses, every so many steps; collective, waits for the device.

    Under ZeRO stage 3 every rank has other pieces of them: nothing is compared.
    """

    def __init__(self, module: nn.Module, every_steps: int, ranks: Ranks) -> None:
        self._module = module
        self._every_steps = every_steps
        self._next_step = 0
        self._ranks = ranks
        is_sharded = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
        self._is_needed = ranks.world_size > 1 and not is_sharded

    def compare(self, step: int) -> None:
        """Compare if it is time; raises UserError that names the first parameters that differ, and the ranks."""
        if not self._is_needed or step < self._next_step:
            return
        self._next_step = step + self._every_steps
        sums_WP = self._ranks.gather_rows(bit_sums(self._module)[None])
        differs_WP = sums_WP != sums_WP.mode(dim=0).values
        if not differs_WP.any():
            return
        names = [name for name, _ in self._module.named_parameters()]
        different = [name for name, differs in zip(names, differs_WP.any(0).tolist(), strict=True) if differs]
        odd_ranks = differs_WP.any(1).nonzero().flatten().tolist()
        more = f" and {len(different) - _NAMES_SHOWN} more" * (len(different) > _NAMES_SHOWN)
        # of two ranks neither is in the majority
        who = f"rank {', '.join(map(str, odd_ranks))}" if self._ranks.world_size > 2 else "ranks 0 and 1"
        raise UserError(
            f"step {step:,}: weights are no longer the same on all ranks: {', '.join(different[:_NAMES_SHOWN])}{more} "
            f"on {who}; suspect that device, its memory or its network; nothing is saved, the last checkpoint is intact"
        )


@torch.no_grad()
def bit_sums(module: nn.Module) -> Tensor:
    """Of each parameter the sum of its elements' bits as integers, [P]: the same for the same bits, in any order."""
    values = [parameter.detach() for parameter in module.parameters()]
    return torch.stack([value.view(_INTEGERS[value.element_size()]).sum(dtype=torch.int64) for value in values])
