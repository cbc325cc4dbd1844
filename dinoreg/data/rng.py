"""Counter-based random numbers: every draw is a function of (seed, stream, epoch, sample id, view).

Philox 4x32-10 (Salmon et al., 2011) over whole arrays of counters at once, so that a batch's draws cost a
millisecond and do not depend on which worker, process or restart asks for them.
"""

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox(key: int, counters: np.ndarray) -> np.ndarray:
    """Encrypt counters.

    key       a non-negative integer; its low 64 bits are used
    counters  (..., 4) unsigned integers below 2**32
    returns   (..., 4) uint32, uniform and independent for different (key, counter)
    """
    a, b, c, d = (counters[..., word].astype(np.uint64) for word in range(4))
    low_key, high_key = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (second >> _SHIFT) ^ b ^ np.uint64(low_key)
        b = second & _LOW
        c = (first >> _SHIFT) ^ d ^ np.uint64(high_key)
        d = first & _LOW
        low_key = (low_key + _KEY_STEPS[0]) & 0xFFFFFFFF
        high_key = (high_key + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)


def uniforms(
    seed: int, stream: int, epochs: np.ndarray, sample_ids: np.ndarray, num_views: int, count: int
) -> np.ndarray:
    """Independent uniform numbers in [0, 1) for every view of every sample.

    stream      0..255, what the numbers are for, so that two uses never share them
    epochs      (B,) how often each sample was seen before, below 2**32
    sample_ids  (B,) below 2**40
    returns     (B, num_views, count) float64 with a resolution of 2**-32
    """
    blocks = -(-count // 4)
    ids = np.asarray(sample_ids, dtype=np.uint64)
    counters = np.empty((len(ids), num_views, blocks, 4), dtype=np.uint64)
    views = np.arange(num_views, dtype=np.uint64)[:, None] << np.uint64(16)
    counters[..., 0] = views | np.arange(blocks, dtype=np.uint64)
    counters[..., 1] = (ids & _LOW)[:, None, None]
    counters[..., 2] = ((ids >> _SHIFT) | np.uint64(stream << 8))[:, None, None]
    counters[..., 3] = np.asarray(epochs, dtype=np.uint64)[:, None, None]
    words = philox(seed, counters).reshape(len(ids), num_views, blocks * 4)
    return words[..., :count] * 2.0**-32


def generator(seed: int, stream: int, first: int, second: int, third: int = 0) -> np.random.Generator:
    """The random numbers of one use of the seed at one place, which no other place has.

    stream         below 2**64, what the numbers are for
    first … third  below 2**64, the place
    """
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    # The lowest word counts the draws, the others tell the places apart.
    counter = np.array([0, first, second, third], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
