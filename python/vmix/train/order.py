"""The order in which training sees its examples, and what chance gives each of them.

Both depend on the seed and on a number alone: that of the batch, or of the example counted from the
first step on. A run can therefore go on anywhere, and is the same run on one process or several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_BLOCK = 1024
Place = tuple[int, int]  # number of the example since the first step, its index in the set


def generator(*key: int) -> torch.Generator:
    """A stream of its own for this key: what it draws does not depend on what was drawn before."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


class Order:
    """Endless shuffles, one per bucket, of which every batch takes the next of one bucket.

    Buckets are drawn by the number of their images. Where `shards` says which shard an image is in,
    a shuffle takes whole shards in random order and mixes images within a window only, so that
    files are read nearly from front to back.
    """

    def __init__(
        self,
        buckets: Sequence[Any],
        batch: int,
        seed: int,
        shards: Sequence[Any] | None = None,
        window: int = 4096,
    ) -> None:
        self.batch, self.seed, self.shards, self.window = batch, seed, shards, window
        names = sorted(set(buckets))
        self.members = [[i for i, b in enumerate(buckets) if b == name] for name in names]
        self.shares = torch.tensor([len(m) / len(buckets) for m in self.members])
        self._shuffled = lru_cache(maxsize=2 * len(names))(self._shuffle)

    def from_batch(self, first: int) -> Iterator[list[Place]]:
        """Batches of (number, index) from the given one on."""
        taken = [0] * len(self.members)
        for number in range(first):
            taken[self._bucket(number)] += 1
        number = first
        while True:
            bucket = self._bucket(number)
            start, count = taken[bucket] * self.batch, len(self.members[bucket])
            places = range(start, start + self.batch)
            yield [
                (number * self.batch + i, self._shuffled(bucket, place // count)[place % count])
                for i, place in enumerate(places)
            ]
            taken[bucket] += 1
            number += 1

    def _bucket(self, number: int) -> int:
        if len(self.members) == 1:
            return 0
        return int(self._choices(number // _BLOCK)[number % _BLOCK])

    @lru_cache(maxsize=4)  # noqa: B019 — lives as long as the run
    def _choices(self, block: int) -> torch.Tensor:
        return torch.multinomial(
            self.shares, _BLOCK, replacement=True, generator=generator(self.seed, 2, block)
        )

    def _shuffle(self, bucket: int, epoch: int) -> list[int]:
        members = self.members[bucket]
        random = generator(self.seed, 0, bucket, epoch)
        if self.shards is None:
            return [members[i] for i in torch.randperm(len(members), generator=random).tolist()]
        groups: dict[Any, list[int]] = {}
        for index in members:
            groups.setdefault(self.shards[index], []).append(index)
        names = list(groups)
        order = torch.randperm(len(names), generator=random).tolist()
        joined = [index for i in order for index in groups[names[i]]]
        mixed = []
        for start in range(0, len(joined), self.window):
            part = joined[start : start + self.window]
            mixed += [part[i] for i in torch.randperm(len(part), generator=random).tolist()]
        return mixed


class OwnBatches(torch.utils.data.Sampler[list[Place]]):
    """This process's part of every batch from the given one on."""

    def __init__(self, order: Order, first: int, rank: int, world: int) -> None:
        self.order, self.first, self.rank, self.world = order, first, rank, world

    def __iter__(self) -> Iterator[list[Place]]:
        own = self.order.batch // self.world
        for places in self.order.from_batch(self.first):
            yield places[self.rank * own : (self.rank + 1) * own]
