"""Some thousands of damaged files, of one seed, through every reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.readers import fuzz, readers, trial

COUNT = 5_000  # of each of four seeds


def test_the_whole_files_are_read(tmp_path: Path) -> None:
    for name, reader in readers(tmp_path / "whole").items():
        assert trial(reader, reader.whole) == "read", name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_read_or_refused_in_words(tmp_path: Path, seed: int) -> None:
    counts, lines = fuzz(tmp_path, COUNT, seed)
    assert lines == []
    assert sum(count["refused"] for count in counts.values()) > COUNT // 4
    assert all(count["refused"] + count["read"] > 0 for count in counts.values())
