"""What a run trains on: one shard directory, or several that are mixed by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from formats.balance import read_balance
from formats.errors import UserError
from formats.manifest import Manifest, Shard, read_manifest
from pipeline.data.balanced_order import BalancedOrder
from pipeline.data.draws import Draws
from pipeline.data.sample_order import Epochs, MixedOrder, SampleOrder
from pipeline.recipe import DataSection, Recipe


@dataclass(frozen=True)
class TrainingData:
    """Shard directories and the weights of their samples in the mixture, in lowest integers.

    has_own_weights: whether they were given; else each set has its number of samples, or of those that a balance draws
    """

    sets: tuple[Manifest, ...]
    weights: tuple[int, ...]
    has_own_weights: bool = False
    _draws: dict[tuple[object, ...], Draws] = field(default_factory=dict, compare=False, repr=False)
    _editions: dict[tuple[str, str], Manifest] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Those of all sets, in the order in which MixedOrder numbers them."""
        return tuple(shard for manifest in self.sets for shard in manifest.shards)

    def shards_of(self, section: DataSection) -> tuple[Shard, ...]:
        """Those that a stage reads instead of `shards`, sample for sample: of its `data.train`, editions of these sets.

        Raises UserError for a set that is no edition of the one in its place, and for other sets or weights.
        """
        sources = _sources(section)
        weights = [Fraction(repr(weight)) for _, weight in sources if weight is not None]
        if len(sources) != len(self.sets) or (weights and _in_lowest_integers(weights) != self.weights):
            raise UserError(
                f"a stage's data.train must name editions of the {len(self.sets)} sets of data.train, in their order "
                "and without weights or with the same"
            )
        paired = zip(self.sets, sources, strict=True)
        return tuple(shard for manifest, (path, _) in paired for shard in self._edition(manifest, path).shards)

    def _edition(self, of: Manifest, path: str) -> Manifest:
        """The set at a path, or a UserError that says why it is no edition of another; read once."""
        if (path.rstrip("/") or "/") == of.directory:
            return of
        key = (of.directory, path)
        if key not in self._editions:
            edition = _read_set(path)
            if why := _why_no_edition(edition, of):
                raise UserError(
                    f"{path} is no edition of {of.directory}: {why}; make one with `data-prep reshard {of.directory} "
                    "--image-size PX`"
                )
            self._editions[key] = edition
        return self._editions[key]

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

    def describe_mixture(self, section: DataSection, seed: int) -> str:
        """A line for each set of a mixture: its share of what is read; one for each balance, and for other editions."""
        order = self.order(section, seed)
        lines = []
        if editions := [path for path, _ in _sources(section) if (path.rstrip("/") or "/") not in self.names]:
            lines.append(f"data: the same samples from {', '.join(editions)}\n")
        for manifest, own, weight in zip(self.sets, order.orders, order.weights, strict=True):
            share = weight / sum(order.weights)
            passes = share * order.num_samples / own.epochs.num_samples
            if len(self.sets) > 1:
                lines.append(f"data: {share:.1%} from {manifest.directory}, {passes:.2f} passes over it per epoch\n")
            if isinstance(own, BalancedOrder):
                lines.append(f"balance: {own.draws.describe()}\n")
        return "".join(lines)

    def check_batch(self, order: MixedOrder, positions: range, global_batch_size: int) -> None:
        """Raise UserError if a batch of a stage that reads these positions would have a sample twice.

        Without a balance that is looked into within an epoch alone, not where one ends and the next begins.
        """
        for manifest, own, weight, own_positions in zip(
            self.sets, order.orders, order.weights, order.by_set(positions), strict=True
        ):
            in_batch = global_batch_size * weight // sum(order.weights)
            size = own.epochs.num_samples
            if in_batch > size:
                raise UserError(
                    f"{manifest.directory} has {size:,} samples, and its weight gives it {in_batch:,} of a global "
                    f"batch of {global_batch_size:,}: lower its weight in data.train, or the batch"
                )
            if not isinstance(own, BalancedOrder):
                continue
            at_most = own.largest_batch(own_positions)
            if order.most_of_set(global_batch_size, weight) > at_most:
                raise UserError(
                    f"of {manifest.directory}, as {own.draws.balance.directory} draws it, only {at_most:,} samples in "
                    f"a row are sure to differ, fewer than a global batch of {global_batch_size:,} takes: lower the "
                    "batch, raise low rates, or lower those above 1"
                )

    def order(self, section: DataSection, seed: int) -> MixedOrder:
        """The order in which a run with this seed reads the samples; raises UserError as `read_balance` does."""
        draws = self._draws_of(section, seed)
        weights = self.weights
        if section.balances and not self.has_own_weights:
            weights = _in_lowest_integers(
                [
                    d.balance.drawn_per_epoch if d else Fraction(m.num_samples)
                    for d, m in zip(draws, self.sets, strict=True)
                ]
            )
        orders = [
            BalancedOrder(of_set, section.window_shards, seed, number)
            if of_set
            else SampleOrder(
                [shard.samples for shard in manifest.shards],
                section.window_shards,
                seed,
                set_number=number,
                with_replacement=section.sampling == "with_replacement",
            )
            for number, (manifest, of_set) in enumerate(zip(self.sets, draws, strict=True))
        ]
        return MixedOrder(orders, weights)

    def epochs(self, recipe: Recipe) -> Epochs:
        """Where the epochs of a recipe, or of a stage of one, begin."""
        return self.order(recipe.data, recipe.train.seed).epochs

    def balance_sha256(self, recipe: Recipe) -> str | None:
        """Names the balances of all stages in a run's records; None where there is none."""
        of_stages = [self._draws_of(stage.data, stage.train.seed) for _, stage in recipe.by_stage()]
        hashes = [" ".join(draws.balance.sha256 if draws else "none" for draws in of_sets) for of_sets in of_stages]
        has_any = any(draws for of_sets in of_stages for draws in of_sets)
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if has_any else None

    def _draws_of(self, section: DataSection, seed: int) -> list[Draws | None]:
        """Of each set; made once, as they count what each lap has."""
        folders = section.balances or ("",) * len(self.sets)
        found: list[Draws | None] = []
        for number, (manifest, folder) in enumerate(zip(self.sets, folders, strict=True)):
            key = (number, folder, section.draw, seed)
            if folder and key not in self._draws:
                self._draws[key] = Draws(read_balance(folder, manifest), section.draw, seed, number)
            found.append(self._draws.get(key))
        return found


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
    return TrainingData(manifests, _in_lowest_integers(weights), section.train[0].weight is not None)


def _read_set(directory: str) -> Manifest:
    """The shards of a directory that hold a usable sample."""
    if not directory:
        raise UserError("no training data: give data.train=SHARD_DIRECTORY (make one with `data-prep`)")
    manifest = read_manifest(directory)
    if not manifest.num_samples:
        raise UserError(f"{directory} holds no usable sample; `data-prep verify {directory}` says why")
    return replace(manifest, shards=tuple(shard for shard in manifest.shards if shard.samples))


def _sources(section: DataSection) -> list[tuple[str, float | None]]:
    """(path, weight) of each set."""
    if isinstance(section.train, str):
        return [(section.train, None)]
    return [(source.path, source.weight) for source in section.train]


def _why_no_edition(edition: Manifest, of: Manifest) -> str:
    """What keeps two sets from holding the same samples in the same order; "" for nothing."""
    for shard, other in zip(edition.shards, of.shards, strict=False):
        if (shard.name, shard.samples) != (other.name, other.samples):
            return f"it has {shard.samples:,} samples in {shard.name} where that has {other.samples:,} in {other.name}"
    if len(edition.shards) != len(of.shards):
        return f"it has {len(edition.shards):,} shards, that has {len(of.shards):,}"
    if edition.sha256 == of.sha256:
        return ""
    claims = {shard.edition.manifest_sha256 for shard in (*edition.shards, *of.shards) if shard.edition}
    if not claims:
        return "its manifest names no source"
    return (
        f"manifest_sha256 {edition.sha256[:12]}, not {of.sha256[:12]}: one of them changed since, or is another set's"
    )


def _in_lowest_integers(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """0.7 and 0.3, as they were written, are 7 and 3."""
    denominator = math.lcm(*(weight.denominator for weight in weights))
    integers = [int(weight * denominator) for weight in weights]
    divisor = math.gcd(*integers)
    return tuple(integer // divisor for integer in integers)
