"""How the image features of all ranks meet the text features of each (model.loss.Columns).

B columns of this rank, G = B * world size columns of all, D width
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class GatheredColumns:
    """All columns at once: every rank holds [G, D]. Each exchange is one collective."""

    def __init__(self, columns_BD: Tensor) -> None:
        self._columns_GD = _all_gather(columns_BD)
        self._size = len(columns_BD)

    def logsumexp(self, visit: Callable[[Tensor], Tensor]) -> Tensor:
        """See model.loss.Columns."""
        part_G = visit(self._columns_GD)
        largest_G = part_G.clone()
        dist.all_reduce(largest_G, op=dist.ReduceOp.MAX)
        return _reduce_scatter((part_G - largest_G).exp_()).log_() + self._own(largest_G)

    def sum(self, visit: Callable[..., Tensor], *beside_B: Tensor) -> Tensor:
        """See model.loss.Columns."""
        return _reduce_scatter(visit(self._columns_GD, *(_all_gather(values_B) for values_B in beside_B)))

    def _own(self, values_G: Tensor) -> Tensor:
        return values_G.narrow(0, dist.get_rank() * self._size, self._size)


class RingColumns:
    """Block after block: each rank's columns go round the ring of ranks, so that none holds more than two blocks.

    A block moves on while the rank computes with it; what ranks found for it follows, and comes home with the last hop.
    The features travel twice for `info_nce`, where gathering sends them once.
    """

    def __init__(self, columns_BD: Tensor) -> None:
        self._columns_BD = columns_BD

    def logsumexp(self, visit: Callable[[Tensor], Tensor]) -> Tensor:
        """See model.loss.Columns."""
        return self._round(visit, torch.logaddexp, ())

    def sum(self, visit: Callable[..., Tensor], *beside_B: Tensor) -> Tensor:
        """See model.loss.Columns."""
        return self._round(visit, torch.Tensor.add_, beside_B)

    def _round(
        self, visit: Callable[..., Tensor], combine: Callable[[Tensor, Tensor], Tensor], beside_B: tuple[Tensor, ...]
    ) -> Tensor:
        block = [self._columns_BD, *beside_B]
        found: Tensor | None = None
        for hops_left in reversed(range(dist.get_world_size())):
            next_block = _Hop(block) if hops_left else None
            part = visit(*block)
            found = part if found is None else combine(found, part)
            [found] = _Hop([found]).wait()
            block = next_block.wait() if next_block else []
        assert found is not None
        return found


class _Hop:
    """Tensors on their way to the next rank, while those of the rank before come in."""

    def __init__(self, outgoing: list[Tensor]) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._outgoing = outgoing  # not to be freed or written to before they are sent
        self._incoming = [torch.empty_like(tensor) for tensor in outgoing]
        operations = [dist.P2POp(dist.isend, tensor, (rank + 1) % world_size) for tensor in outgoing]
        operations += [dist.P2POp(dist.irecv, tensor, (rank - 1) % world_size) for tensor in self._incoming]
        self._requests = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        """The tensors that came."""
        for request in self._requests:
            request.wait()
        return self._incoming


def _all_gather(rows_B: Tensor) -> Tensor:
    rows_G = rows_B.new_empty(len(rows_B) * dist.get_world_size(), *rows_B.shape[1:])
    dist.all_gather_into_tensor(rows_G, rows_B.contiguous())
    return rows_G


def _reduce_scatter(rows_G: Tensor) -> Tensor:
    rows_B = rows_G.new_empty(len(rows_G) // dist.get_world_size(), *rows_G.shape[1:])
    dist.reduce_scatter_tensor(rows_B, rows_G.contiguous())
    return rows_B
