"""The embedded scenes: determinism, ground truths that agree with each other, and no colour shortcut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dinoreg.data.source import ScenesSource
from dinoreg.runtime.errors import UserError
from dinoreg.scenes import render as scenes
from dinoreg.scenes import shapes as scene_shapes
from dinoreg.scenes import textures as scene_textures
from dinoreg.scenes.render import CLASS_NAMES, NUM_CLASSES, Scene, render, render_image

FIELDS = ("image", "labels", "boxes", "box_labels", "segmentation", "instances", "depth")


def assert_same(a: Scene, b: Scene) -> None:
    assert a.label == b.label
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_a_scene_depends_on_seed_and_index_only_and_not_on_the_order_of_rendering() -> None:
    forward = {i: render(i, 40, seed=3) for i in range(9)}
    for i in reversed(range(9)):
        assert_same(forward[i], render(i, 40, seed=3))


def test_a_fresh_process_state_renders_the_same_scene() -> None:
    before = render(5, 48)
    for table in ("cells", "dash_table", "noise_table", "scale_table"):
        getattr(scene_textures, table).cache_clear()
    scenes._centres.cache_clear()
    scenes._label_block.cache_clear()
    assert_same(before, render(5, 48))


@pytest.mark.parametrize("size", [32, 45, 64, 97, 128])
def test_shapes_types_and_ranges_hold_at_any_size(size: int) -> None:
    for i in range(2 * NUM_CLASSES):
        scene = render(i, size)
        objects = len(scene.boxes)
        assert 1 <= objects <= 3
        assert (scene.image.shape, scene.image.dtype) == ((size, size, 3), np.uint8)
        assert (scene.segmentation.shape, scene.segmentation.dtype) == ((size, size), np.uint8)
        assert (scene.instances.shape, scene.instances.dtype) == ((size, size), np.uint8)
        assert (scene.depth.shape, scene.depth.dtype) == ((size, size), np.float32)
        assert (scene.boxes.shape, scene.boxes.dtype) == ((objects, 4), np.float32)
        assert (scene.box_labels.shape, scene.box_labels.dtype) == ((objects,), np.int64)
        assert (scene.labels.shape, scene.labels.dtype) == ((NUM_CLASSES,), bool)
        assert np.isfinite(scene.depth).all()
        assert scene.depth.min() > 0
        assert scene.image.std() > 8


def test_the_image_only_path_equals_the_image_with_ground_truth() -> None:
    for i in range(40):
        np.testing.assert_array_equal(render_image(i, 33, seed=1), render(i, 33, seed=1).image)


def test_seeds_and_indices_give_different_scenes() -> None:
    pictures = {render_image(i, 32, seed).tobytes() for i in range(20) for seed in range(3)}
    assert len(pictures) == 60


def test_boxes_are_tight_around_the_visible_pixels_and_cover_every_instance() -> None:
    for i in range(60):
        scene = render(i, 50)
        assert set(np.unique(scene.instances)) - {0} == set(range(1, len(scene.boxes) + 1))
        for k, (x0, y0, x1, y1) in enumerate(scene.boxes.astype(int)):
            visible = scene.instances == k + 1
            assert visible[y0:y1, x0:x1].sum() == visible.sum()
            for line in (visible[y0, :], visible[y1 - 1, :], visible[:, x0], visible[:, x1 - 1]):
                assert line.any()


def test_segmentation_instances_boxes_and_labels_agree() -> None:
    for i in range(60):
        scene = render(i, 50, seed=2)
        by_instance = np.concatenate([[0], scene.box_labels + 1])
        np.testing.assert_array_equal(scene.segmentation, by_instance[scene.instances])
        assert set(np.flatnonzero(scene.labels)) == set(scene.box_labels)
        assert scene.box_labels[0] == scene.label


def test_the_labelled_object_is_the_largest() -> None:
    for i in range(250):
        scene = render(i, 64, seed=5)
        areas = np.bincount(scene.instances.ravel(), minlength=len(scene.boxes) + 1)[1:]
        assert areas.argmax() == 0, i
        assert areas[0] > 0.04 * 64 * 64


def test_an_object_without_a_visible_pixel_is_in_no_ground_truth() -> None:
    drawn = scenes.plan(4, 0)
    main = drawn.things[0]
    inside = main.pose._replace(radius=0.2 * main.pose.radius)
    hidden = main._replace(label=(main.label + 1) % NUM_CLASSES, pose=inside, near=main.near + 1.0)
    outside = hidden._replace(pose=inside._replace(x=500.0))
    seen = scenes.Scene(drawn._replace(things=[outside, main, hidden]), 4, 64, 0)
    alone = scenes.Scene(drawn._replace(things=[main]), 4, 64, 0)
    np.testing.assert_array_equal(seen.instances, alone.instances)
    np.testing.assert_array_equal(seen.segmentation, alone.segmentation)
    np.testing.assert_array_equal(seen.boxes, alone.boxes)
    assert seen.box_labels.tolist() == [main.label]


def test_what_is_visible_is_nearer_than_what_it_hides() -> None:
    compared = 0
    for i in range(120):
        drawn = scenes.plan(i, 7)
        together = scenes.Scene(drawn, i, 64, 7)
        empty = scenes.Scene(drawn._replace(things=[]), i, 64, 7)
        assert (together.depth <= empty.depth).all()
        for k, thing in enumerate(drawn.things):
            alone = scenes.Scene(drawn._replace(things=[thing]), i, 64, 7)
            assert (alone.depth[alone.instances == 1] < empty.depth[alone.instances == 1]).all()
            hidden = (alone.instances == 1) & (together.instances != 0) & (together.instances != k + 1)
            assert (together.depth[hidden] < alone.depth[hidden]).all()
            compared += hidden.sum()
    assert compared > 500


def test_every_block_of_consecutive_scenes_holds_each_class_once() -> None:
    labels = np.array([scenes.label_of(i, seed=6) for i in range(40 * NUM_CLASSES)])
    assert (np.sort(labels.reshape(40, NUM_CLASSES), axis=1) == np.arange(NUM_CLASSES)).all()
    assert len({tuple(block) for block in labels.reshape(40, NUM_CLASSES)}) > 30
    assert all(render(i, 32, seed=6).label == labels[i] for i in range(15))


def test_usual_surroundings_are_common_but_not_certain() -> None:
    usual = [drawn.background == scene_shapes.KINDS[drawn.label].background for drawn in map(scenes.plan, range(600))]
    assert 0.70 < np.mean(usual) < 0.88


def test_sources_with_disjoint_ranges_share_no_picture_and_index_the_same_world() -> None:
    train, test = ScenesSource(30, size=32, seed=8), ScenesSource(20, size=32, seed=8, first=30)
    assert (len(train), len(test)) == (30, 20)
    np.testing.assert_array_equal(test.read(3), render_image(33, 32, seed=8))
    assert scenes.label_of(33, seed=8) == render(33, 32, seed=8).label
    pictures = {train.read(i).tobytes() for i in range(30)} | {test.read(i).tobytes() for i in range(20)}
    assert len(pictures) == 50


@pytest.mark.parametrize(
    "call",
    [
        lambda: render(-1),
        lambda: render_image(0, seed=-2),
        lambda: render(0, size=0),
    ],
)
def test_impossible_arguments_are_refused_in_words(call: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"scenes: .* at least|scenes: .* or more"):
        call()


def test_class_names_are_distinct_and_every_object_stays_within_its_reach() -> None:
    assert len(set(CLASS_NAMES)) == NUM_CLASSES >= 10
    axis = np.linspace(-2, 2, 161, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    rng = np.random.default_rng(0)
    for kind in scene_shapes.KINDS:
        for _ in range(20):
            outline = kind.form(x, y, rng.random(6).tolist())
            inside = (outline.body if outline.parts is None else np.minimum(outline.body, outline.parts)) < 0
            assert inside.mean() > 0.02, kind.name
            assert np.hypot(x, y)[inside].max() < scenes.REACH, kind.name


def test_textures_are_bounded_and_continue_across_the_edge_of_their_tables() -> None:
    x = np.linspace(-9, 9, 90, dtype=np.float32)[None, :].repeat(70, 0)
    y = np.linspace(-7, 7, 70, dtype=np.float32)[:, None].repeat(90, 1)
    for texture in (*(kind.material for kind in scene_shapes.KINDS), *scene_textures.BACKGROUNDS):
        pattern = texture(x, y, 7.0, [0.1, 0.6, 0.3])
        assert pattern.shape == (70, 90)
        assert pattern.dtype == np.float32, texture
        assert pattern.min() >= 0
        assert pattern.max() <= 1
        assert pattern.std() > 0.05
    table = scene_textures.cells(0.3).nearest.reshape(scene_textures.SIDE, scene_textures.SIDE)
    step_inside = np.abs(np.diff(table, axis=1)).max()
    assert np.abs(table[:, 0] - table[:, -1]).max() <= 1.01 * step_inside
    assert np.abs(table[0] - table[-1]).max() <= 1.01 * np.abs(np.diff(table, axis=0)).max()


def test_the_distance_in_a_cell_table_is_the_one_to_the_site_of_the_same_cell() -> None:
    table = scene_textures.cells(0.9)
    side, samples = scene_textures.SIDE, scene_textures.SAMPLES
    nearest, border = table.nearest.reshape(side, side), table.border.reshape(side, side)
    value = table.value.reshape(side, side)
    # A site lies where the distance is smallest among the entries of its cell's value.
    rows, columns = np.divmod(np.arange(0, side * side, 4099), side)
    for row, column in zip(rows, columns):
        where = np.argwhere(value == value[row, column])
        site = where[nearest[where[:, 0], where[:, 1]].argmin()]
        gap = np.abs(site - (row, column))
        gap = np.minimum(gap, side - gap) / samples
        assert abs(np.hypot(*gap) - nearest[row, column]) < 2.5 / samples
    assert border.min() >= 0
    assert nearest.max() < 1.5


def histogram_features(indices: range) -> np.ndarray:
    rows = []
    for i in indices:
        level = (render_image(i, 48) >> 6).astype(int)
        cell = level[..., 0] * 16 + level[..., 1] * 4 + level[..., 2]
        rows.append(np.sqrt(np.bincount(cell.ravel(), minlength=64)))
    return np.array(rows)


@pytest.mark.slow
def test_colour_histograms_do_not_solve_the_classes() -> None:
    """Palettes tell a third of the classes from the rest, so a histogram has to do better than chance and to miss
    more than half of the held-out scenes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler()
    train = scale.fit_transform(histogram_features(range(3000)))
    test = scale.transform(histogram_features(range(3000, 4500)))
    truth = np.array([scenes.label_of(i) for i in range(4500)])
    model = LogisticRegression(C=0.1, max_iter=200).fit(train, truth[:3000])
    assert 1 / NUM_CLASSES < model.score(test, truth[3000:]) < 0.5


def test_the_data_modules_read_no_files() -> None:
    for module in (scenes, scene_shapes, scene_textures):
        source = Path(str(module.__file__)).read_text()
        assert "open(" not in source
        assert "np.load" not in source
