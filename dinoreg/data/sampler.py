"""The order in which samples are drawn: an endless sequence, any part of which can be computed on its own.

One group of images is shuffled anew in every epoch. A weighted mixture is drawn in blocks of 4096 positions
in which every group has its exact share, in shuffled order; within its share each group goes through epochs
of its own.
"""

import functools
import threading
from collections.abc import Callable

import numpy as np

from dinoreg.data.rng import philox
from dinoreg.data.source import Group
from dinoreg.runtime.errors import UserError

_BLOCK = 4096  # positions in which a mixture's shares are exact
_EPOCH_STREAM, _BLOCK_STREAM, _SUBSTITUTE_STREAM = (
    0x65706F6368,
    0x626C6F636B,
    0x62,
)  # names of uses of the seed


class Sampler:
    """Maps positions (samples drawn since the start) to samples. Safe to use from many threads."""

    def __init__(self, groups: list[Group], seed: int) -> None:
        """groups  disjoint runs of indices, none empty; raises UserError for more than a block can hold"""
        if len(groups) > _BLOCK // 4:
            raise UserError(f"data: {len(groups)} weighted sources, expected at most {_BLOCK // 4}")
        self.groups, self.seed = groups, seed
        self._starts = np.array([group.start for group in groups], dtype=np.int64)
        self._lengths = np.array([group.length for group in groups], dtype=np.int64)
        self._quotas = _quotas([group.weight for group in groups])
        self._kept: dict[tuple[str, int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions (B,) -> sample ids (B,) and the epoch of each sample's group (B,), int64."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.groups) == 1:
            group, turns = np.zeros_like(positions), positions
        else:
            group, turns = self._mix(positions)
        epochs, offsets = np.divmod(turns, self._lengths[group])
        ids = np.empty_like(positions)
        for number, epoch in {*zip(group.tolist(), epochs.tolist())}:
            rows = (group == number) & (epochs == epoch)
            ids[rows] = self._starts[number] + self._epoch_order(number, epoch)[offsets[rows]]
        return ids, epochs

    def substitute(self, epoch: int, sample_id: int, attempt: int) -> int:
        """Another sample of the same group, to take the place of a bad one; attempts count from 0."""
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        high = (sample_id >> 32) | (_SUBSTITUTE_STREAM << 8)
        words = philox(self.seed, np.array([attempt, sample_id & 0xFFFFFFFF, high, epoch], dtype=np.uint64))
        word = (int(words[0]) << 32) | int(words[1])
        return int(self._starts[number]) + word % int(self._lengths[number])

    def _mix(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which group each position draws from, and how often that group was drawn from before."""
        group, turns = np.empty_like(positions), np.empty_like(positions)
        blocks, offsets = np.divmod(positions, _BLOCK)
        for block in set(blocks.tolist()):
            rows = blocks == block
            order = self._keep("block", 0, block, functools.partial(self._block_order, block))
            group[rows] = order[0, offsets[rows]]
            turns[rows] = order[1, offsets[rows]] + block * self._quotas[group[rows]]
        return group, turns

    def _block_order(self, block: int) -> np.ndarray:
        """(2, _BLOCK): the group of each position, and its rank among the block's positions of that group."""
        who = np.repeat(np.arange(len(self._quotas)), self._quotas)
        who = _generator(self.seed, _BLOCK_STREAM, 0, block).permutation(who)
        rank = np.empty_like(who)
        for number, quota in enumerate(self._quotas):
            rank[who == number] = np.arange(quota)
        return np.stack([who, rank])

    def _epoch_order(self, number: int, epoch: int) -> np.ndarray:
        """The permutation of one group's samples in one epoch."""
        length = int(self._lengths[number])
        dtype = np.uint32 if length < 2**32 else np.uint64

        def shuffle() -> np.ndarray:
            samples = np.arange(length, dtype=dtype)
            _generator(self.seed, _EPOCH_STREAM, number, epoch).shuffle(samples)
            return samples

        return self._keep("epoch", number, epoch, shuffle)

    def _keep(self, kind: str, number: int, which: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """`make()`, remembered for the two latest values of `which`: a batch may straddle the end of one."""
        with self._lock:
            key = (kind, number, which)
            if key not in self._kept:
                others = sorted(k for k in self._kept if k[:2] == (kind, number))
                for old in others[:-1]:
                    del self._kept[old]
                self._kept[key] = make()
            return self._kept[key]


def _generator(seed: int, stream: int, number: int, which: int) -> np.random.Generator:
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, number, which, 0], dtype=np.uint64)))


def _quotas(weights: list[float]) -> np.ndarray:
    """Whole numbers of positions per block, at least one each, that sum to _BLOCK (largest remainders)."""
    exact = np.array(weights) / sum(weights) * (_BLOCK - len(weights))
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: _BLOCK - len(weights) - quotas.sum()]] += 1
    return quotas + 1
