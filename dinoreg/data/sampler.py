"""The order in which samples are drawn: an endless sequence, any part of which can be computed on its own.

One group of images is shuffled anew in every epoch. A weighted mixture is drawn in blocks of 4096 positions (more for
many groups) in which every group has its share, in shuffled order; within its share each group goes through epochs of
its own. Images that lie in parts that are read as a whole (row groups of parquet) are shuffled in two stages: the
parts, then the images of as many parts as fit into memory.
"""

import threading
from functools import lru_cache, partial

import numpy as np

from dinoreg.data.rng import generator, philox
from dinoreg.data.source import Group
from dinoreg.runtime.errors import UserError

_BLOCK = 4096  # positions in which a mixture's shares are exact, to one position a group
_PER_GROUP = 256  # positions of a block for each of many groups, so that shares are within 1/256 of all draws
_MOST_GROUPS = 4096
_OF_ITS_GROUP = 64  # substitutes that are looked for in the group of a bad image, which may have no good one
_EPOCH_STREAM, _BLOCK_STREAM, _SUBSTITUTE_STREAM = 0x65706F6368, 0x626C6F636B, 0x62  # names of uses of the seed


class Sampler:
    """Maps positions (samples drawn since the start) to samples. Safe to use from many threads."""

    def __init__(self, groups: list[Group], seed: int) -> None:
        """groups  disjoint runs of indices, none empty; raises UserError for too many"""
        if len(groups) > _MOST_GROUPS:
            counted = f"{len(groups):,} different weights of sources and of the images in lists"
            raise UserError(f"data: {counted}, expected at most {_MOST_GROUPS:,}")
        self.groups, self.seed, self.block = groups, seed, max(_BLOCK, _PER_GROUP * len(groups))
        self._starts = np.array([group.start for group in groups], dtype=np.int64)
        self._lengths = np.array([group.length for group in groups], dtype=np.int64)
        self._quotas = _quotas([group.weight for group in groups], self.block)
        # The two latest orders of each kind are remembered: a batch may straddle the end of one.
        self._block_order = lru_cache(2)(partial(_block_order, seed, self._quotas))
        self._epoch_order = lru_cache(2 * len(groups))(partial(_epoch_order, seed, groups))
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
        for number, epoch in sorted(set(zip(group.tolist(), epochs.tolist()))):
            rows = (group == number) & (epochs == epoch)
            with self._lock:
                order = self._epoch_order(number, epoch)
            ids[rows] = self._starts[number] + order[offsets[rows]]
        return ids, epochs

    def substitute(self, epoch: int, sample_id: int, attempt: int) -> int:
        """Another sample, to take the place of a bad one: of the same group, at last of all; attempts count from 0."""
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        high = (sample_id >> 32) | (_SUBSTITUTE_STREAM << 8)
        words = philox(self.seed, np.array([attempt, sample_id & 0xFFFFFFFF, high, epoch], dtype=np.uint64))
        word = (int(words[0]) << 32) | int(words[1])
        if attempt >= _OF_ITS_GROUP:
            return word % int(self._starts[-1] + self._lengths[-1])
        return int(self._starts[number]) + word % int(self._lengths[number])

    def _mix(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which group each position draws from, and how often that group was drawn from before."""
        group, turns = np.empty_like(positions), np.empty_like(positions)
        blocks, offsets = np.divmod(positions, self.block)
        for block in set(blocks.tolist()):
            rows = blocks == block
            order = self._block_order(block)
            group[rows] = order[0, offsets[rows]]
            turns[rows] = order[1, offsets[rows]] + block * self._quotas[group[rows]]
        return group, turns


def _block_order(seed: int, quotas: np.ndarray, block: int) -> np.ndarray:
    """(2, block): the group of each position, and its rank among the block's positions of that group."""
    group = np.repeat(np.arange(len(quotas)), quotas)
    group = generator(seed, _BLOCK_STREAM, 0, block).permutation(group)
    rank = np.empty_like(group)
    rank[np.argsort(group, kind="stable")] = np.concatenate([np.arange(quota) for quota in quotas])
    return np.stack([group, rank])


def _epoch_order(seed: int, groups: list[Group], number: int, epoch: int) -> np.ndarray:
    """The permutation of one group's samples in one epoch."""
    length, parts = groups[number].length, groups[number].parts
    samples = np.arange(length, dtype=np.uint32 if length < 2**32 else np.uint64)
    random = generator(seed, _EPOCH_STREAM, number, epoch)
    if parts is None or len(parts[0]) <= parts[1]:
        random.shuffle(samples)
        return samples
    starts, held = parts
    sizes, order = np.diff(starts, append=length), random.permutation(len(starts))
    ends = np.cumsum(sizes[order])
    samples += np.repeat(starts[order] - ends + sizes[order], sizes[order]).astype(samples.dtype)
    for window in np.split(samples, ends[held - 1 : -1 : held]):
        random.shuffle(window)
    return samples


def _quotas(weights: list[float], block: int) -> np.ndarray:
    """Whole numbers of positions per block, at least one each, that sum to `block` (largest remainders)."""
    exact = np.array(weights) / sum(weights) * (block - len(weights))
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: block - len(weights) - quotas.sum()]] += 1
    return quotas + 1
