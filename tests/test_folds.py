"""Small sets are split in several ways: what each fold holds, what is measured once, and what the interval covers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from encoders import context, small_encoder
from miniatures.pictures import pattern
from torch import Tensor

from dinoreg.data.open import open_source
from dinoreg.data.source import ChosenSource, Source
from dinoreg.evaluation.backbones.encoder import NativeEncoder
from dinoreg.evaluation.features.cache import extract_features, feature_matrix
from dinoreg.evaluation.features.images import CentreCrop

CROP = CentreCrop(32, 32)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "images").mkdir()
    for index in range(9):
        pattern(index % 3, index, 40, 40).save(tmp_path / "images" / f"{index}.png")
    return open_source(str(tmp_path / "images"))


def counting() -> tuple[NativeEncoder, list[int]]:
    """An encoder, and the sizes of the batches that pass its backbone."""
    encoder, seen = small_encoder(depth=3), list[int]()
    inner = encoder._layers
    encoder._layers = lambda x, *rest: seen.append(len(x)) or inner(x, *rest)  # type: ignore[method-assign,func-returns-value]
    return encoder, seen


@pytest.mark.parametrize(
    ("blocks", "mean_patch", "passes"),
    [((-1,), False, 9), ((1, 2), False, 9), ((-1,), True, 9), ((1, 2), True, 9), ((0,), False, 18), ((1,), True, 18)],
)
def test_a_part_of_kept_slots_is_read_and_nothing_else_is(
    source: Source, tmp_path: Path, blocks: tuple[int, ...], mean_patch: bool, passes: int
) -> None:
    encoder, seen = counting()
    where = context(tmp_path)
    extract_features(where, encoder, source, CROP, (1, 2), mean_patch=True)
    found = extract_features(where, encoder, source, CROP, blocks, mean_patch=mean_patch)
    assert sum(seen) == passes
    alone = extract_features(context(tmp_path / "alone"), small_encoder(depth=3), source, CROP, blocks, mean_patch)
    assert np.array_equal(found, alone)
    assert np.array_equal(feature_matrix(found).numpy(), feature_matrix(alone).numpy())


def test_an_unfinished_file_serves_no_one_else(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.evaluation.features.cache.FLUSH_ROWS", 1)
    encoder, seen = counting()
    inner = encoder._layers

    def stopping(x: Tensor, *rest: object) -> list:
        if sum(seen) >= 6:
            raise KeyboardInterrupt
        return inner(x, *rest)  # type: ignore[arg-type]

    where = dataclasses.replace(context(tmp_path), batch_size=3)
    encoder._layers = stopping  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        extract_features(where, encoder, source, CROP, (1, 2), mean_patch=True)
    encoder._layers = inner  # type: ignore[method-assign]
    found = extract_features(where, encoder, source, CROP)
    assert sum(seen) == 6 + 9
    alone = extract_features(dataclasses.replace(where, features=tmp_path / "new"), encoder, source, CROP)
    assert np.array_equal(found, alone)
    extract_features(where, encoder, source, CROP, (1, 2), mean_patch=True)
    assert sum(seen) == 6 + 9 + 9 + 3  # it went on where it was stopped


def test_choices_of_the_same_images_are_extracted_once(source: Source, tmp_path: Path) -> None:
    encoder, seen = counting()
    where = context(tmp_path)
    whole = extract_features(context(tmp_path / "whole"), small_encoder(depth=3), source, CROP)
    for chosen in ([0, 5, 3], [8, 1], list(range(9))):
        part = ChosenSource(source, np.array(chosen), one_of_many=True)
        assert np.array_equal(extract_features(where, encoder, part, CROP), whole[chosen])
    assert sum(seen) == 9
    lone = ChosenSource(source, np.array([2, 4]))  # of a set whose other images nobody measures
    extract_features(where, encoder, lone, CROP)
    assert sum(seen) == 9 + 2
