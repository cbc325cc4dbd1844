"""`dinoreg view`: attention, patch colours, token norms and crops of any model, as files to look at."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.filters import threshold_otsu
from small_runs import MEAN, STD, STEP, tiny_model, write_run
from test_report import parse

from dinoreg.checkpoint.run_folder import Run
from dinoreg.commands.main import main
from dinoreg.data.preprocess import Preprocessing
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError
from dinoreg.visualize.attention import attention_budget, attention_rows, chosen_layers, overlay
from dinoreg.visualize.gallery import GAP
from dinoreg.visualize.norms import TokenNorms, summary, token_norms
from dinoreg.visualize.pca import foreground_mask, otsu_threshold, patch_basis, patch_colours
from dinoreg.visualize.subject import open_images, open_subject, picture_size, view_folder
from dinoreg.weights.architecture import library_of, preprocessing_of

REGISTERS = (0, 1, 4, 8)


def literal_attention(model: RegisterViT, image: torch.Tensor, layer: int) -> torch.Tensor:
    """(heads, T, T): block after block with every matrix product written out, one head and query at a time."""
    x = model.embed(image[None])[0].detach()  # (T, D)
    for number, block in enumerate(model.blocks):
        state = {key: value.detach() for key, value in block.state_dict().items()}
        normed = torch.nn.functional.layer_norm(x, x.shape[1:], state["norm1.weight"], state["norm1.bias"], 1e-6)
        q, k, v = (normed @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]).chunk(3, dim=1)
        width = x.shape[1] // model.heads
        weights, outputs = [], []
        for head in range(model.heads):
            part = slice(head * width, (head + 1) * width)
            rows = []
            for query in q[:, part]:
                scores = torch.stack([(query * key).sum() / math.sqrt(width) for key in k[:, part]])
                rows.append((scores - scores.max()).exp() / (scores - scores.max()).exp().sum())
            weights.append(torch.stack(rows))
            outputs.append(weights[-1] @ v[:, part])
        if number == layer:
            return torch.stack(weights)
        x = x + torch.cat(outputs, dim=1) @ state["attn.proj.weight"].T + state["attn.proj.bias"]
        normed = torch.nn.functional.layer_norm(x, x.shape[1:], state["norm2.weight"], state["norm2.bias"], 1e-6)
        hidden = torch.nn.functional.gelu(normed @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"])
        x = x + hidden @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]
    raise AssertionError


# Attention


@pytest.mark.parametrize("registers", REGISTERS)
def test_attention_equals_a_literal_computation_at_any_layer_and_size(registers: int) -> None:
    model = tiny_model(registers)
    for size in ((24, 32), (40, 16)):
        images = torch.randn(2, 3, *size)
        rows = attention_rows(model, images, [0, 2])
        assert rows.shape == (2, 2, 3, 1 + registers, 1 + registers + size[0] * size[1] // 64)
        for place, layer in enumerate((0, 2)):
            expected = literal_attention(model, images[1], layer)[:, : 1 + registers]
            torch.testing.assert_close(rows[place, 1], expected, atol=1e-5, rtol=1e-4)
            whole = model.attention(images, layer)[:, :, : 1 + registers]
            torch.testing.assert_close(rows[place], whole)


def test_a_budget_says_where_a_token_looks_and_over_how_many_patches() -> None:
    rows = torch.zeros(1, 2, 3, 7)  # two registers, four patches
    rows[0, :, 0, 0] = 1.0  # CLS looks at itself
    rows[0, :, 1, 1:3] = 0.25
    rows[0, :, 1, 5] = 0.5  # half on the registers, half on one patch
    rows[0, 0, 2, 3:] = 0.25  # evenly over the patches
    rows[0, 1, 2, 4] = 1.0  # in the other head at one
    cls, first, second = attention_budget(rows)
    assert cls[:3] == (1.0, 0.0, 0.0)
    assert first == pytest.approx((0.0, 0.5, 0.5, 1.0))
    assert second == pytest.approx((0.0, 0.0, 1.0, 2.5))


def test_layers_are_chosen_by_number_or_all() -> None:
    assert chosen_layers("-1", 3) == [2]
    assert chosen_layers("[2, 0,-1]", 3) == [0, 2]
    assert chosen_layers("all", 3) == [0, 1, 2]


def test_an_overlay_lights_what_is_attended_to_and_greys_the_rest() -> None:
    pixels = np.full((8, 8, 3), (200, 100, 0), dtype=np.uint8)
    values = np.zeros((2, 2))
    values[0, 1] = 0.3
    drawn = overlay(pixels, values).astype(int)
    assert drawn[0, 7].sum() > drawn[7, 0].sum()
    assert np.ptp(drawn[7, 0]) == 0  # grey
    assert (overlay(pixels, np.zeros((2, 2))) == drawn[7, 0]).all()


# Patch colours


def test_the_threshold_equals_scikit_images() -> None:
    rng = np.random.default_rng(0)
    for weights in ((4000, 6000), (9000, 500)):  # groups that touch: in a gap all thresholds are equally good
        values = np.concatenate([rng.normal(-1, 1, weights[0]), rng.normal(2, 1, weights[1])])
        bin_width = np.ptp(values) / 256
        assert otsu_threshold(values) == pytest.approx(threshold_otsu(values), abs=bin_width)
    assert otsu_threshold(np.array([0.0] * 5 + [10.0] * 3)) == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_foreground_is_found_whichever_way_the_component_points(sign: float) -> None:
    torch.manual_seed(1)
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[1:5, 2:6] = True
    patches = 0.1 * torch.randn(3, 48, 5)
    patches[:, inside.flatten(), 2] += 4 * sign
    mask = foreground_mask(patches, (6, 8))
    assert (mask == inside.flatten()).all()


def test_the_shares_of_variance_are_scikit_learns() -> None:
    from sklearn.decomposition import PCA

    torch.manual_seed(2)
    for count in (5, 40):  # fewer and more patches than the width
        patches = torch.randn(1, count, 9) * torch.linspace(3, 0.2, 9)
        peer = PCA(3).fit(patches[0].double().numpy())
        assert patch_basis(patches).explained.tolist() == pytest.approx(peer.explained_variance_ratio_, abs=1e-5)


# Norms


@pytest.mark.parametrize("registers", REGISTERS)
def test_norms_are_those_before_the_final_norm_of_every_block(registers: int) -> None:
    model, images = tiny_model(registers), torch.randn(2, 3, 24, 32)
    norms = token_norms(model, images)
    assert [tuple(each.shape) for each in norms] == [(3, 2), (3, 2, registers), (3, 2, 12)]
    tokens = model.prenorm(images).detach()
    literal = [[math.sqrt(sum(float(v) ** 2 for v in token)) for token in image] for image in tokens]
    found = torch.cat([norms.cls[2][:, None], norms.registers[2], norms.patches[2]], dim=1)
    torch.testing.assert_close(found, torch.tensor(literal))
    first = model.blocks[0](model.embed(images).flatten(0, 1), ((2, 13 + registers),), ("plain",)).detach()
    torch.testing.assert_close(norms.cls[0], first.unflatten(0, (2, -1))[:, 0].norm(dim=-1))


def test_the_summary_of_norms_is_what_it_says() -> None:
    patches = torch.arange(1.0, 102.0).reshape(1, 1, 101)
    assert summary(TokenNorms(torch.tensor([[3.0]]), torch.tensor([[[4.0, 6.0]]]), patches)) == [
        {"median": 51.0, "p99": 100.0, "max": 101.0, "cls": 3.0, "registers": 5.0}
    ]
    assert summary(TokenNorms(torch.ones(1, 1), torch.ones(1, 1, 0), patches))[0]["registers"] is None


# Images and preprocessing


def test_pictures_are_as_large_as_in_training_or_a_multiple() -> None:
    assert picture_size(tiny_model(image_size=(24, 32))) == (144, 192)
    assert picture_size(tiny_model(image_size=(24, 32)), [40, 16]) == (40, 16)
    assert picture_size(tiny_model(image_size=(24, 32)), 40) == (40, 40)
    assert picture_size(RegisterViT(image_size=518, dim=6, depth=1, heads=1)) == (518, 518)


def test_preprocessing_is_the_models_own(tmp_path: Path) -> None:
    subject = open_subject(str(write_run(tmp_path / "run", tiny_model())))
    assert (subject.encoder.preprocessing.mean, subject.encoder.preprocessing.std, subject.step) == (MEAN, STD, STEP)
    assert subject.name == "run at step 7"
    assert view_folder(subject) == tmp_path / "run" / "view" / "0000007"
    named = open_subject("random:vitt8_reg0", "cpu")
    assert named.encoder.preprocessing.mean == (0.485, 0.456, 0.406)
    assert view_folder(named) == Path("view/vitt8_reg0-random-weights")
    same = open_subject("random:vitt8_reg0", "cpu").model.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in named.model.state_dict().items())
    unknown = Preprocessing.of(None, 2, (32, 32), 8, "x")
    assert (unknown.mean, unknown.std, unknown.assumed) == ((0.5, 0.5), (0.25, 0.25), True)


def test_a_transformers_folder_states_its_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1] * 3})
    )
    stated = Preprocessing.of(preprocessing_of(tmp_path, library_of(tmp_path) or ""), 3, (32, 32), 8, "x")
    assert (stated.mean, stated.std, stated.size, stated.short_side) == ((0.1, 0.2, 0.3), (1.0,) * 3, (32, 32), 32)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"mean": [0.5, 0.5]}, "one for each of 3 channels"),
        ({"std": [0.2, 0, 0.2]}, "positive"),
        ({"mean": "x"}, "mean="),
    ],
)
def test_preprocessing_that_does_not_fit_is_one_line(tmp_path: Path, stated: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_subject(str(write_run(tmp_path / "run", tiny_model(), **stated)))


def test_images_may_be_a_file_a_folder_a_list_archives_or_scenes(photo_folder: Path, tmp_path: Path) -> None:
    photos = sorted(path for path in photo_folder.rglob("*") if path.is_file())
    assert open_images(str(photos[3])).name(0) == str(photos[3])
    assert len(open_images(str(photo_folder))) == 12
    assert len(open_images([str(photos[0]), str(photo_folder), "scenes:count=5"])) == 18
    for name in ("one", "two"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for photo in photos[: 2 if name == "one" else 5]:
                archive.add(photo, photo.name)
    assert len(open_images(str(tmp_path))) == 7
    single = open_images(str(tmp_path / "two.tar"))
    assert [single.name(i) for i in range(5)] == [f"{tmp_path / 'two.tar'}:{photo.name}" for photo in photos[:5]]
    assert single.read(4) == photos[4].read_bytes()


# The verbs


def view(*arguments: str) -> int:
    return main(["view", *arguments])


def page_of(path: Path) -> Any:
    structure = parse(path)
    assert structure.open == []
    assert all(load.startswith("data:") for load in structure.loads)
    return structure


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "view.json").read_text())
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(record["pictures"])
    return record


@pytest.mark.parametrize("registers", REGISTERS)
def test_attention_of_a_run_is_drawn_for_every_head_and_token(
    registers: int, tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", tiny_model(registers))
    photos = [str(path) for path in sorted((photo_folder / "a").iterdir())[:2]]
    assert view("attention", f"weights={run}", f"images=[{','.join(photos)}]", "size=[24,48]") == 0
    folder = run / "view" / f"{STEP:07d}"
    assert capsys.readouterr().out == f"view: {folder / 'attention.html'}\n"
    record = record_of(folder / "attention")
    names = ["CLS", *(f"register {number + 1}" for number in range(registers))]
    assert list(record["budget"]["block 2"]) == names
    for budget in record["budget"]["block 2"].values():
        assert budget["cls"] + budget["registers"] + budget["patches"] == pytest.approx(1)
    assert len(record["pictures"]) == 2 * 2
    with Image.open(folder / "attention" / "01-photo_01-maps.png") as picture:
        left = picture.width - (1 + len(names)) * (236 + GAP) + GAP  # tiles are 118 x 236
        assert 0 < left < 60  # the names of the rows
        assert picture.height == 18 + 4 * 118 + 3 * GAP  # the mean and three heads
    structure = page_of(folder / "attention.html")
    assert {"budget", "image-1", "image-2"} <= structure.ids
    assert Run(run).pictures == {}  # the report's own pictures are others


def test_several_layers_stand_below_one_another(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_model())
    out = tmp_path / "out"
    one = ["attention", f"weights={run}", f"out={out}", "num=1", "size=16"]
    assert view(*one, "layer=all", "head=mean") == 0
    record = record_of(out / "attention")
    assert list(record["budget"]) == ["block 0", "block 1", "block 2"]
    (maps,) = (out / "attention").glob("*-maps.png")
    with Image.open(maps) as picture:
        assert picture.height == 18 + 3 * 118 + 2 * GAP
    assert view(*one, "layer=0,2", "head=all") == 0
    assert [name.rsplit("-", 2)[1] for name in record_of(out / "attention")["pictures"]] == ["block0"] * 2 + [
        "block2"
    ] * 2
    assert not maps.exists()  # of the view before


def test_pictures_of_others_stay_when_a_view_is_drawn_again(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "pca"
    folder.mkdir(parents=True)
    (folder / "mine.png").write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "view.json").write_text(json.dumps({"format": "dinoreg-view", "pictures": ["../../secret.png", 3]}))
    run = write_run(tmp_path / "run", tiny_model())
    for _ in range(2):
        assert view("pca", f"weights={run}", f"out={tmp_path / 'out'}", "num=1", "size=16") == 0
    assert (folder / "mine.png").exists()
    assert (tmp_path / "secret.png").exists()


def test_a_view_of_other_images_stands_beside_the_one_before(
    tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", tiny_model())
    photos = sorted(photo_folder.rglob("*.png"))[:2] or sorted(photo_folder.rglob("*.jpg"))[:2]
    pages = []
    for photo in (*photos, photos[0]):
        assert view("norms", f"weights={run}", f"images={photo}", f"out={tmp_path / 'out'}", "size=16") == 0
        pages.append(capsys.readouterr().out.strip().rpartition(" ")[2])
    assert pages[0] == pages[2] != pages[1]
    records = [json.loads((Path(page).with_suffix("") / "view.json").read_text()) for page in pages]
    assert [record["images"] for record in records] == [[record["images"][0]] for record in records]
    assert [Path(record["images"][0]).name for record in records] == [photos[i].name for i in (0, 1, 0)]
    assert all(
        (Path(page).with_suffix("") / name).exists()
        for page, r in zip(pages, records, strict=True)
        for name in r["pictures"]
    )


def test_pca_paints_each_patch_in_the_colours_of_the_basis_of_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", tiny_model())
    assert view("pca", f"weights={run}", f"out={tmp_path / 'x'}", "images=scenes:count=3,size=32", "size=32") == 0
    record = record_of(tmp_path / "x" / "pca")
    assert record["weights"] == "a at step 7"
    subject = open_subject(str(run))
    source = open_images("scenes:count=3,size=32")
    pixels = torch.from_numpy(np.stack([source.read(i) for i in range(3)])).permute(0, 3, 1, 2)  # type: ignore[arg-type]
    shift, scale = (
        torch.tensor(each)[:, None, None]
        for each in (subject.encoder.preprocessing.mean, subject.encoder.preprocessing.std)
    )
    patches = tiny_model()((pixels / 255 - shift) / scale).patches.detach()
    basis = patch_basis(patches)
    assert record["explained"] == pytest.approx(basis.explained.tolist(), abs=1e-5)
    with Image.open(tmp_path / "x" / "pca" / "01-scenes-0.png") as picture:
        drawn = np.asarray(picture)[4::8, 32 + GAP + 4 :: 8, :3].astype(int)
    assert np.abs(drawn - patch_colours(patches, basis)[0].reshape(4, 4, 3)).max() <= 1


def test_pca_of_the_foreground_hides_the_background(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_model())
    assert view("pca", f"weights={run}", f"out={tmp_path / 'out'}", "num=2", "size=64", "foreground=true") == 0
    with Image.open(next((tmp_path / "out" / "pca").glob("01-*.png"))) as picture:
        drawn = np.asarray(picture)[4::8, 64 + GAP + 4 :: 8, :3].reshape(-1, 3)
    hidden = (drawn == (128, 134, 144)).all(axis=1)
    assert 0 < hidden.sum() < 64
    assert "foreground" in "".join(page_of(tmp_path / "out" / "pca.html").text)


def test_patches_that_do_not_differ_have_no_foreground(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    run = write_run(tmp_path / "run", model)
    assert view("pca", f"weights={run}", f"out={tmp_path / 'out'}", "num=2", "size=64", "foreground=true") == 2
    assert "patches of these images do not differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("registers", [0, 8])
def test_norms_are_drawn_for_every_block(registers: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_model(registers, depth=13))
    assert view("norms", f"weights={run}", "num=2", "size=24", f"out={tmp_path / 'out'}") == 0
    record = record_of(tmp_path / "out" / "norms")
    assert record["pictures"] == ["maps.png", "histograms.png"]
    with Image.open(tmp_path / "out" / "norms" / "maps.png") as picture:
        assert picture.height == 14 * 92 + 13 * GAP  # the images, and below them a row for each block
    assert len(record["blocks"]) == 13
    assert (record["blocks"][0]["registers"] is None) == (registers == 0)
    assert {"histograms", "maps", "numbers"} <= page_of(tmp_path / "out" / "norms.html").ids


def test_grey_images_and_unreadable_ones_are_no_obstacle(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("L", (40, 30), 90).save(photos / "a.png")
    (photos / "b.jpg").write_bytes(b"\xff\xd8 torn")
    run = write_run(tmp_path / "run", tiny_model(1, in_channels=1))
    for kind in ("attention", "pca", "norms"):
        assert view(kind, f"weights={run}", f"images={photos}", "size=32", f"out={tmp_path / 'out'}") == 0
        structure = page_of(tmp_path / "out" / f"{kind}.html")
        assert "skipped" in structure.ids
        assert str(photos / "b.jpg") in structure.text


def test_crops_are_those_of_a_config_with_its_overrides(tmp_path: Path, photo_folder: Path) -> None:
    out = tmp_path / "out"
    arguments = ("crops.num_local=3", "mask.probability=1.0", "num=2", f"data={photo_folder}", f"out={out}")
    assert view("crops", "quickstart", *arguments) == 0
    record = record_of(out / "crops")
    assert len(record["images"]) == 2
    assert all(Path(name).is_file() for name in record["images"])
    with Image.open(out / "crops" / "crops.png") as picture:
        originals = [Image.open(name).size for name in record["images"]]
        widths = [max(round(112 * width / height) for width, height in originals), *[112] * 4, *[67] * 3]
        assert picture.size == (sum(widths) + 7 * GAP, 18 + 2 * 112 + GAP)
    assert "16 of 16" in page_of(out / "crops.html").text  # two crops of eight images, all masked


def test_crops_of_a_run_go_into_its_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_model())
    assert view("crops", str(run), "num=3") == 0
    assert (run / "view" / f"{STEP:07d}" / "crops.html").is_file()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "view: missing what to view: expected attention, pca, norms, crops"),
        (["atention", "weights=run"], "view: atention: expected attention, pca, norms, crops; did you mean attention?"),
        (["attention"], "weights= is missing"),
        (["attention", "weights=random:vitt8_reg4"], "images: missing; name an image"),
        (["attention", "weights=nowhere"], "weights 'nowhere': no such file"),
        (["attention", "weights=torn.pth", "images=scenes"], "weights torn.pth"),
        (["attention", "weights=run", "images=nowhere"], "images: nowhere does not exist"),
        (["attention", "weights=run", "images=[]"], "images=[]: expected at least one"),
        (["attention", "weights=run", "images=torn.jpg"], "images: none of 1 could be read; the first:"),
        (["attention", "weights=run", "layer=3"], "layer=3: the model has 3 blocks"),
        (["attention", "weights=run", "layer=last"], "layer=last: expected the index of a block"),
        (["attention", "weights=run", "head=3"], "head=3: expected all or mean"),
        (["attention", "weights=run", "size=30"], "size=30: expected a multiple of the patch size 8, as 24 or 32"),
        (["attention", "weights=run", "size=[32,0]"], "size=0: expected a multiple"),
        (["attention", "weights=run", "size=big"], "size=big: expected a whole number or 2 numbers"),
        (["attention", "weights=run", "num=0"], "num=0: expected a number of images in"),
        (["attention", "weights=run", "out=torn.jpg"], "out=torn.jpg: torn.jpg is a file"),
        (["attention", "weights=run", "device=tpu"], "device=tpu: expected auto"),
        (["attention", "weights=run", "foreground=true"], "foreground: unknown key (command line)"),
        (["pca", "weights=run", "layer=all"], "layer=all: expected one block"),
        (["norms", "weights=run", "more"], "more: unexpected"),
        (["crops"], "view crops: missing CONFIG"),
        (["crops", "vits14_reg4"], "data: missing; name a folder"),
        (["crops", "quickstart", "data=nowhere"], "data: nowhere does not exist"),
        (["crops", "quickstart", "out=torn.jpg"], "out=torn.jpg: torn.jpg is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", tiny_model())
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8 torn")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    assert view(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"dinoreg: {expected}")
    assert captured.err.count("\n") == 1
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before


def test_a_folder_that_cannot_be_written_is_a_failure_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    run = write_run(tmp_path / "run", tiny_model())
    assert view("pca", f"weights={run}", "num=1", "size=16", f"out={tmp_path / 'out'}") == 1
    assert f"out={tmp_path / 'out'}: cannot be written (No space left on device)" in capsys.readouterr().err
