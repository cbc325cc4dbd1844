"""The declaration of ADE20K on its miniature."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoreg.config.bundled import bundled
from dinoreg.evaluation.benchmark import Benchmark, load_benchmark
from dinoreg.evaluation.data import Segmented
from dinoreg.runtime.errors import UserError
from tests.miniatures import ade20k


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    return load_benchmark(bundled("eval") / "ade20k.py")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    ade20k.write(root, per_class=2)
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "datasets"))


def splits(benchmark: Benchmark, root: Path) -> dict[str, Segmented]:
    return benchmark.tasks[0].read(benchmark.find(root), {}).splits


def test_masks_are_the_files_less_one_with_other_ignored(benchmark: Benchmark, root: Path) -> None:
    found = splits(benchmark, root)
    assert {name: len(split) for name, split in found.items()} == {"train": 6, "test": 2}
    seen: set[int] = set()
    for name, folder in (("train", "training"), ("test", "validation")):
        split = found[name]
        assert split.num_classes == 150
        for index in range(len(split)):
            path = Path(split.source.name(index))
            assert path.parent.name == folder
            stored = np.asarray(Image.open(path.parents[2] / "annotations" / folder / f"{path.stem}.png")).astype(int)
            mask = split.mask(index)
            assert mask.dtype == np.uint8
            assert mask.shape == Image.open(path).size[::-1]
            for y in range(stored.shape[0]):
                for x in range(stored.shape[1]):
                    assert mask[y, x] == (255 if stored[y, x] == 0 else stored[y, x] - 1)
            seen |= set(np.unique(mask).tolist())
    assert {0, 149, 255} <= seen


def test_images_are_in_the_order_of_their_names_and_of_many_sizes(benchmark: Benchmark, root: Path) -> None:
    split = splits(benchmark, root)["train"]
    names = [Path(split.source.name(index)).name for index in range(len(split))]
    assert names == [f"ADE_train_{number:08d}.jpg" for number in range(1, 7)]
    assert len({split.mask(index).shape for index in range(len(split))}) == len(ade20k.SIZES)


def test_there_are_150_names(benchmark: Benchmark, root: Path) -> None:
    names = benchmark.tasks[0].read(benchmark.find(root), {}).class_names
    assert len(names) == 150
    assert (names[0], names[149]) == ("object 1, thing 1", "object 150, thing 150")


def test_hidden_files_are_no_images(benchmark: Benchmark, root: Path) -> None:
    (root / "ADEChallengeData2016/images/training/._ADE_train_00000001.jpg").write_bytes(b"")
    assert len(splits(benchmark, root)["train"]) == 6


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("annotations/training/ADE_train_00000003.png", r"ADE_train_00000003\.png is missing; it comes from ADEChall"),
        ("images/validation/ADE_val_00000002.jpg", r"ADE_val_00000002\.jpg is missing; it comes from ADEChallenge"),
        ("objectInfo150.txt", r"objectInfo150\.txt is missing; it comes from ADEChallengeData2016\.zip"),
        ("annotations/validation", r"annotations/validation is missing; it comes from ADEChallengeData2016\.zip"),
    ],
)
def test_a_missing_file_is_named_with_its_archive(benchmark: Benchmark, root: Path, path: str, message: str) -> None:
    target = root / "ADEChallengeData2016" / path
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    with pytest.raises(UserError, match=f"^ade20k: .*{message}"):
        splits(benchmark, root)


def test_folders_without_images_are_refused(benchmark: Benchmark, root: Path) -> None:
    for path in (root / "ADEChallengeData2016").glob("*/validation/*"):
        path.unlink()
    with pytest.raises(UserError, match=r"ade20k: .*images/validation has no \.jpg images"):
        splits(benchmark, root)


def test_a_mask_of_another_size_or_with_more_than_150_is_named(benchmark: Benchmark, root: Path) -> None:
    folder = root / "ADEChallengeData2016/annotations/training"
    Image.new("L", (9, 8)).save(folder / "ADE_train_00000001.png")
    mask = np.asarray(Image.open(folder / "ADE_train_00000002.png")).copy()
    mask[0, 0] = 151
    Image.fromarray(mask).save(folder / "ADE_train_00000002.png")
    split = splits(benchmark, root)["train"]
    with pytest.raises(UserError, match=r"ADE_train_00000001\.png is 9 x 8 pixels, its image .* is 70 x 56"):
        split.mask(0)
    with pytest.raises(UserError, match=r"ADE_train_00000002\.png has the value 151, expected 0\.\.150"):
        split.mask(1)


def test_names_that_are_not_150_numbered_rows_are_refused(benchmark: Benchmark, root: Path) -> None:
    path = root / "ADEChallengeData2016/objectInfo150.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match=r"objectInfo150\.txt has 149 rows below its titles, expected 150"):
        splits(benchmark, root)


def test_published_figures_are_percent_with_a_source(benchmark: Benchmark) -> None:
    task = benchmark.tasks[0]
    assert (task.protocol, task.metric) == ("segmentation", "mIoU")
    assert dict(task.counts) == {"train": 20_210, "test": 2_000}
    values = {each.model: each.value for each in task.published}
    assert len(values) == len(task.published)
    assert values["DINOv2 ViT-L/14 on ImageNet-22k, 4 registers"] == 47.9
    assert values["DINOv2 ViT-S/14 (distilled)"] == 44.3
    assert all(20 < each.value < 60 and "arXiv" in each.source for each in task.published)
