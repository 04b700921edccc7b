"""What a run trains on: one shard directory, or several that are mixed by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from formats.errors import UserError
from formats.manifest import Manifest, Shard, read_manifest
from pipeline.data.sample_order import MixedOrder, SampleOrder
from pipeline.recipe import DataSection


@dataclass(frozen=True)
class TrainingData:
    """Shard directories and the weights of their samples in the mixture, in lowest integers."""

    sets: tuple[Manifest, ...]
    weights: tuple[int, ...]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Those of all sets, in the order in which MixedOrder numbers them."""
        return tuple(shard for manifest in self.sets for shard in manifest.shards)

    @property
    def num_samples(self) -> int:
        """Usable samples of all sets: what an epoch has."""
        return sum(manifest.num_samples for manifest in self.sets)

    @property
    def sha256(self) -> str:
        """Names the data in a run's records: that of the manifest, or of the manifests and weights of a mixture."""
        if len(self.sets) == 1:
            return self.sets[0].sha256
        lines = (f"{manifest.sha256} {weight}\n" for manifest, weight in zip(self.sets, self.weights, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """The directories of the sets."""
        return tuple(manifest.directory for manifest in self.sets)

    def record(self) -> list[dict[str, Any]]:
        """What run.json says of the sets."""
        return [
            {"path": m.directory, "samples": m.num_samples, "weight": weight, "manifest_sha256": m.sha256}
            for m, weight in zip(self.sets, self.weights, strict=True)
        ]

    def describe_mixture(self) -> str:
        """A line for each set: its share of the samples that are read; nothing if it is the only one."""
        if len(self.sets) == 1:
            return ""
        lines = []
        for manifest, weight in zip(self.sets, self.weights, strict=True):
            share = weight / sum(self.weights)
            passes = share * self.num_samples / manifest.num_samples
            lines.append(f"data: {share:.1%} from {manifest.directory}, {passes:.2f} passes over it per epoch\n")
        return "".join(lines)

    def check_batch(self, global_batch_size: int) -> None:
        """Raise UserError if a batch would have a sample twice because its set is small for its weight."""
        for manifest, weight in zip(self.sets, self.weights, strict=True):
            in_batch = global_batch_size * weight // sum(self.weights)
            if in_batch > manifest.num_samples:
                raise UserError(
                    f"{manifest.directory} has {manifest.num_samples:,} samples, and its weight gives it {in_batch:,} "
                    f"of a global batch of {global_batch_size:,}: lower its weight in data.train, or the batch"
                )

    def order(self, section: DataSection, seed: int) -> MixedOrder:
        """The order in which a run with this seed reads the samples."""
        orders = [
            SampleOrder(
                [shard.samples for shard in manifest.shards],
                section.window_shards,
                seed,
                set_number=number,
                with_replacement=section.sampling == "with_replacement",
            )
            for number, manifest in enumerate(self.sets)
        ]
        return MixedOrder(orders, self.weights)


def read_training_data(section: DataSection) -> TrainingData:
    """Read the manifests of `data.train`; raises UserError as `read_manifest` does.

    Sets without weights have their numbers of samples: together they are one set, and each sample comes once per epoch.
    """
    if isinstance(section.train, str):
        return TrainingData((_read_set(section.train),), (1,))
    manifests = tuple(_read_set(source.path) for source in section.train)
    weights = [
        Fraction(manifest.num_samples) if source.weight is None else Fraction(repr(source.weight))
        for source, manifest in zip(section.train, manifests, strict=True)
    ]
    return TrainingData(manifests, _in_lowest_integers(weights))


def _read_set(directory: str) -> Manifest:
    """The shards of a directory that hold a usable sample."""
    if not directory:
        raise UserError("no training data: give data.train=SHARD_DIRECTORY (make one with `data-prep`)")
    manifest = read_manifest(directory)
    if not manifest.num_samples:
        raise UserError(f"{directory} holds no usable sample; `data-prep verify {directory}` says why")
    return replace(manifest, shards=tuple(shard for shard in manifest.shards if shard.samples))


def _in_lowest_integers(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """0.7 and 0.3, as they were written, are 7 and 3."""
    denominator = math.lcm(*(weight.denominator for weight in weights))
    integers = [int(weight * denominator) for weight in weights]
    divisor = math.gcd(*integers)
    return tuple(integer // divisor for integer in integers)
