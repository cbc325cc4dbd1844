"""The order in which samples are drawn: an endless sequence, any part of which can be computed on its own.

One group of images is shuffled anew in every epoch. A weighted mixture is drawn in blocks of 4096 positions
in which every group has its exact share, in shuffled order; within its share each group goes through epochs
of its own.
"""

import threading
from functools import lru_cache, partial

import numpy as np

from dinoreg.data.rng import philox
from dinoreg.data.source import Group
from dinoreg.runtime.errors import UserError

_BLOCK = 4096  # positions in which a mixture's shares are exact
_EPOCH_STREAM, _BLOCK_STREAM, _SUBSTITUTE_STREAM = 0x65706F6368, 0x626C6F636B, 0x62  # names of uses of the seed


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
        # The two latest orders of each kind are remembered: a batch may straddle the end of one.
        self._block_order = lru_cache(2)(partial(_block_order, seed, self._quotas))
        self._epoch_order = lru_cache(2 * len(groups))(partial(_epoch_order, seed, self._lengths))
        self._lock = threading.Lock()  # so that threads do not shuffle the same epoch at the same time

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
            with self._lock:
                order = self._epoch_order(number, epoch)
            ids[rows] = self._starts[number] + order[offsets[rows]]
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
            order = self._block_order(block)
            group[rows] = order[0, offsets[rows]]
            turns[rows] = order[1, offsets[rows]] + block * self._quotas[group[rows]]
        return group, turns


def _block_order(seed: int, quotas: np.ndarray, block: int) -> np.ndarray:
    """(2, _BLOCK): the group of each position, and its rank among the block's positions of that group."""
    group = np.repeat(np.arange(len(quotas)), quotas)
    group = _generator(seed, _BLOCK_STREAM, 0, block).permutation(group)
    rank = np.empty_like(group)
    for number, quota in enumerate(quotas):
        rank[group == number] = np.arange(quota)
    return np.stack([group, rank])


def _epoch_order(seed: int, lengths: np.ndarray, number: int, epoch: int) -> np.ndarray:
    """The permutation of one group's samples in one epoch."""
    length = int(lengths[number])
    samples = np.arange(length, dtype=np.uint32 if length < 2**32 else np.uint64)
    _generator(seed, _EPOCH_STREAM, number, epoch).shuffle(samples)
    return samples


def _generator(seed: int, stream: int, number: int, which: int) -> np.random.Generator:
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, number, which, 0], dtype=np.uint64)))


def _quotas(weights: list[float]) -> np.ndarray:
    """Whole numbers of positions per block, at least one each, that sum to _BLOCK (largest remainders)."""
    exact = np.array(weights) / sum(weights) * (_BLOCK - len(weights))
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: _BLOCK - len(weights) - quotas.sum()]] += 1
    return quotas + 1
