from __future__ import annotations

import numpy as np

from dinoreg.data.rng import philox, uniforms


def test_philox_gives_the_known_answers_of_its_authors() -> None:
    ones = 0xFFFFFFFF
    cases = [
        (0, [0, 0, 0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones << 32) | ones, [ones] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x299F31D0 << 32) | 0xA4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for key, counter, expected in cases:
        words = philox(key, np.array(counter, dtype=np.uint64))
        assert " ".join(f"{word:08x}" for word in words) == expected


def test_numbers_depend_on_every_part_of_their_key_and_on_nothing_else() -> None:
    epochs, ids = np.array([3, 0, 7]), np.array([5, 2**33, 9])
    base = uniforms(11, 1, epochs, ids, 4, 6)
    assert base.shape == (3, 4, 6)
    assert np.array_equal(uniforms(11, 1, epochs[1:], ids[1:], 4, 6), base[1:])
    assert np.array_equal(uniforms(11, 1, epochs, ids, 2, 6), base[:, :2])
    for other in (
        uniforms(12, 1, epochs, ids, 4, 6),
        uniforms(11, 2, epochs, ids, 4, 6),
        uniforms(11, 1, epochs + 1, ids, 4, 6),
        uniforms(11, 1, epochs, ids + 1, 4, 6),
    ):
        assert not (other == base).any()
    assert len(np.unique(base)) == base.size


def test_numbers_are_uniform_and_uncorrelated_between_views() -> None:
    numbers = uniforms(0, 0, np.zeros(5000, dtype=int), np.arange(5000), 2, 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    shares = np.histogram(numbers, bins=10, range=(0, 1))[0] / numbers.size
    np.testing.assert_allclose(shares, 0.1, atol=0.005)
    assert abs(np.corrcoef(numbers[:, 0, 0], numbers[:, 1, 0])[0, 1]) < 0.05
