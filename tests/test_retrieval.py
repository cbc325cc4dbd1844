"""Instance retrieval: average precision as Oxford's code has it, junk and ties, planted queries, hostile annotation."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import context, small_encoder
from PIL import Image

from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Data, Searched
from dinoreg.evaluation.features.images import read_picture
from dinoreg.evaluation.options import EvalOptions, RetrievalOptions
from dinoreg.evaluation.protocols import retrieval
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.protocols.retrieval import LEVELS, average_precisions
from dinoreg.runtime.errors import UserError
from tests.miniatures import roxford5k, rparis6k
from tests.reading import read


def measured(data: Data, where: Path) -> Measurement:
    options = EvalOptions(retrieval=RetrievalOptions(size=48))
    return Measurement(small_encoder(), data, find_benchmark("roxford5k").tasks[0], options, context(where))


def literal(cosines: np.ndarray, relevance: np.ndarray, wanted: tuple[int, ...], neither: tuple[int, ...]) -> float:
    """Walk down the ranking without junk; the area is a trapezoid for each image that is found."""
    places = [int(place) for place in np.argsort(-cosines) if relevance[place] not in neither]
    positives = sum(relevance[place] in wanted for place in places)
    area, found = 0.0, 0
    for rank, place in enumerate(places):
        if relevance[place] in wanted:
            before = 1.0 if rank == 0 else found / rank
            found += 1
            area += (before + found / (rank + 1)) / 2 / positives
    return area


@pytest.mark.parametrize("level", LEVELS)
def test_average_precision_is_that_of_a_walk_down_the_ranking(level: str) -> None:
    rng = np.random.default_rng(0)
    cosines, relevance = rng.normal(size=(12, 60)), rng.choice([0, 0, 0, 1, 2, -1], size=(12, 60)).astype(np.int8)
    relevance[3] = np.where(relevance[3] > 0, 0, relevance[3])
    found = average_precisions(cosines, relevance, *LEVELS[level])
    for query in range(12):
        if query == 3:
            assert np.isnan(found[query])
        else:
            assert found[query] == pytest.approx(literal(cosines[query], relevance[query], *LEVELS[level]), abs=1e-12)


def test_junk_moves_nothing_and_hard_does_without_what_is_easy() -> None:
    cosines, truth = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]]), np.array([[-1, 1, -1, 0, 2]], dtype=np.int8)
    assert average_precisions(cosines, truth, *LEVELS["Medium"]) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precisions(cosines, truth, *LEVELS["Hard"]) == pytest.approx((0 + 1 / 2) / 2)


def test_equal_cosines_are_one_rank_in_whatever_order_they_come() -> None:
    rng = np.random.default_rng(1)
    cosines, relevance = rng.integers(0, 3, (1, 30)) / 2, rng.choice([0, 1, 2, -1], size=(1, 30)).astype(np.int8)
    values = []
    for _ in range(5):
        order = rng.permutation(30)
        values.append(average_precisions(cosines[:, order], relevance[:, order], *LEVELS["Medium"])[0])
    assert values == pytest.approx([values[0]] * 5, abs=1e-12)
    collapsed = average_precisions(np.zeros((1, 30)), relevance, *LEVELS["Medium"])
    share = (relevance > 0).sum() / (relevance >= 0).sum()
    assert collapsed <= (1 + share) / 2


@pytest.mark.parametrize("module", [roxford5k, rparis6k])
def test_a_query_is_the_box_and_truths_are_places_in_the_list(tmp_path: Path, module: Any) -> None:
    folder = module.write(tmp_path)
    data = read(folder.name, tmp_path)
    queries, database = data.splits["test"], data.splits["database"]
    truth = pickle.loads((folder / f"gnd_{folder.name}.pkl").read_bytes(), encoding="latin1")
    assert [Path(database.source.name(place)).stem for place in range(len(database))] == truth["imlist"]
    for number, query in enumerate(truth["gnd"]):
        with Image.open(folder / "jpg" / f"{truth['qimlist'][number]}.jpg") as image:
            assert np.array_equal(queries.source.read(number), np.asarray(image.crop((30, 8, 70, 38))))
        for kind, value in (("easy", 1), ("hard", 2), ("junk", -1)):
            assert np.flatnonzero(queries.relevance[number] == value).tolist() == list(query[kind])
    moved = replace(queries, relevance=queries.relevance[::-1].copy())
    assert moved.truth_stamp() != queries.truth_stamp()


def test_planted_queries_find_their_images_with_their_own_shape(tmp_path: Path) -> None:
    roxford5k.write(tmp_path)
    data = read("roxford5k", tmp_path)
    rows = retrieval.evaluate(measured(data, tmp_path / "own"))
    assert [row.variant for row in rows] == [f"{kind}, {level}" for kind in ("class token", "GeM") for level in LEVELS]
    assert {row.metric for row in rows} == {"mAP"}
    assert [row.n_test for row in rows] == [7] * 4  # one query has nothing to find
    assert rows[0].value > 0.7
    roxford5k.write(tmp_path / "b", shuffled=True, seed=4)
    shuffled = retrieval.evaluate(measured(read("roxford5k", tmp_path / "b"), tmp_path / "other"))
    assert shuffled[0].value < rows[0].value - 0.25


def test_the_generalised_mean_is_its_literal_form_and_size_is_of_the_long_side(tmp_path: Path) -> None:
    roxford5k.write(tmp_path)
    data = read("roxford5k", tmp_path)
    found = measured(data, tmp_path)
    _, pooled = retrieval._described(found, data.splits["database"], "database")
    picture = read_picture(data.splits["database"].source, 0).resize((48, 34), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    mean = torch.tensor(found.encoder.preprocessing.mean)[:, None, None]
    padded = torch.cat([pixels, mean.expand(3, 6, 48)], dim=1)[None]
    tokens = found.encoder.tokens(padded).patches[0]
    mean = sum(torch.where(token > 1e-6, token, torch.tensor(1e-6)) ** 3 for token in tokens) / len(tokens)
    torch.testing.assert_close(pooled[0], mean ** (1 / 3) / (mean ** (2 / 3)).sum().sqrt())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"imlist": None}, "of another form"),
        ({"gnd": [{"bbx": [0, 0, 9, 9], "easy": [99], "hard": [], "junk": []}]}, "of another form"),
        (
            {"gnd": [{"bbx": [0, 0, 9, 9], "easy": [-1], "hard": [], "junk": []}]},
            "easy has places that are not in imlist",
        ),
        ({"gnd": [{"bbx": [9, 0, 9, 9], "easy": [0], "hard": [], "junk": []}]}, "a box is empty"),
        ({"gnd": []}, "of another form"),
        ({"imlist": ["thing_000000", "../../etc/passwd"]}, "leaves"),
        ({"imlist": ["thing_000000", "absent"]}, "absent.jpg is missing; it comes from oxbuild_images.tgz"),
    ],
)
def test_annotation_of_another_form_is_one_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    folder = roxford5k.write(tmp_path)
    good = {
        "imlist": ["thing_000000", "thing_000001"],
        "qimlist": ["query_000000"],
        "gnd": [{"bbx": [0, 0, 9, 9], "easy": [0], "hard": [1], "junk": []}],
    }
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({**good, **change}, protocol=2))
    with pytest.raises(UserError, match=told) as caught:
        read("roxford5k", tmp_path)
    assert "\n" not in str(caught.value)
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(good, protocol=2))
    assert isinstance(read("roxford5k", tmp_path).splits["test"], Searched)


def test_published_figures_stand_with_their_level() -> None:
    for name, medium, hard in (("roxford5k", 68.8, 43.2), ("rparis6k", 84.6, 68.5)):
        (task,) = find_benchmark(name).tasks
        assert next(each.value for each in task.published if each.variant == "Medium") == medium
        assert next(each.value for each in task.published if each.variant == "Hard") == hard
        assert {each.variant for each in task.published} == {"Medium", "Hard"}
