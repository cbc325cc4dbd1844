"""The attention probe: PyTorch's multi-head attention by another way, and what patches know and the class token not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import context, small_encoder
from miniatures.pictures import labels_for, pattern
from PIL import Image
from torch import nn

from dinoreg.commands.main import main
from dinoreg.data.folder_index import PathBlock
from dinoreg.data.source import PathSource
from dinoreg.evaluation.backbones.encoder import NativeEncoder, PixelEncoder
from dinoreg.evaluation.benchmark import Task, find_benchmark
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.options import AttentionOptions, EvalOptions, LinearOptions
from dinoreg.evaluation.protocols import linear
from dinoreg.evaluation.protocols.linear import AttentionGrid, AttentionHead, Encoded
from dinoreg.evaluation.protocols.measurement import Measurement

TASK = Task("attention", lambda folder, options: Data({}), "top-1")
QUICK = {"lrs": (0.003, 0.01), "epochs": 2, "epoch_steps": 15, "batch_size": 24, "augment": False}


def blind(**options: Any) -> NativeEncoder:
    """An encoder whose class token says nothing."""
    encoder = small_encoder(**options)
    inner = encoder._layers

    def layers(*arguments: Any) -> Any:
        return [tokens._replace(cls=torch.ones_like(tokens.cls)) for tokens in inner(*arguments)]

    encoder._layers = layers  # type: ignore[method-assign]
    return encoder


def data(folder: Path, shuffled: bool = False, **counts: int) -> Data:
    """The class is that of one patch at a place by chance; all else is noise of its own."""
    splits = {}
    for number, (name, count) in enumerate({"train": 60, "test": 30, **counts}.items()):
        rng, paths = np.random.default_rng([number, 5]), []
        shown, told = labels_for(count, 3, shuffled, seed=number)
        for index, label in enumerate(shown):
            picture = Image.fromarray(rng.integers(90, 160, (32, 32, 3), dtype=np.uint8))
            picture.paste(pattern(int(label), index, 8, 8), tuple(int(8 * each) for each in rng.integers(0, 4, 2)))
            paths.append(f"{name}_{shuffled}_{index}.png")
            picture.save(folder / paths[-1])
        splits[name] = Labelled(PathSource(str(folder), PathBlock.of(paths)), told, 3)
    return Data(splits, ("a", "b", "c"))


def measured(found: Data, where: Path, encoder: Any = None, **changes: Any) -> Measurement:
    options = EvalOptions(attention=AttentionOptions(**{**QUICK, **changes}))
    return Measurement(encoder or blind(), found, TASK, options, context(where))


def test_it_is_the_multi_head_attention_of_pytorch() -> None:
    torch.manual_seed(0)
    head, dim, heads = AttentionHead(192, 5), 192, 3
    nn.init.normal_(head.classify.weight)
    nn.init.normal_(head.classify.bias)
    query = torch.randn(1, 1, dim)
    theirs = nn.MultiheadAttention(dim, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(torch.eye(dim))
        theirs.out_proj.bias.zero_()
        asked = (theirs.in_proj_weight[:dim] @ query[0, 0]).view(heads, -1)
        keys = theirs.in_proj_weight[dim : 2 * dim].view(heads, -1, dim)
        head.query.copy_(torch.einsum("hv,hvd->hd", asked, keys) / (dim // heads) ** 0.5)
        head.value.copy_(theirs.in_proj_weight[2 * dim :].view(heads, -1, dim).mT)
    tokens = torch.randn(4, 7, dim)
    expected = head.classify(theirs(query.expand(4, -1, -1), tokens, tokens)[0][:, 0])
    torch.testing.assert_close(head(tokens), expected, atol=1e-5, rtol=1e-4)


def test_patches_tell_what_the_class_token_does_not(tmp_path: Path) -> None:
    found = data(tmp_path)
    rows = linear.attention(measured(found, tmp_path / "own"))
    assert [row.metric for row in rows] == ["top-1", "mean per class"]
    assert rows[0].value > 0.8
    assert "that no head was trained on" in rows[0].chosen_on
    assert rows[0].n_train == 54
    assert set(rows[0].settings["grid"]) == {"attention, lr 0.003", "attention, lr 0.01"}
    options = EvalOptions(
        linear=LinearOptions(
            lrs=(0.1,), blocks=(1,), avgpool=(0,), epochs=2, augment=False, epoch_steps=10, batch_size=24
        )
    )
    alone = linear.evaluate(Measurement(blind(), found, Task("linear", TASK.read, "top-1"), options, context(tmp_path)))
    assert alone[0].value <= 0.4


@pytest.mark.slow
def test_of_shuffled_classes_nothing_is_found(tmp_path: Path) -> None:
    lost = linear.attention(measured(data(tmp_path, shuffled=True), tmp_path))
    assert lost[0].value < 0.55


def test_tokens_that_are_not_kept_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = data(tmp_path, train=18, test=9)
    quick = {"epochs": 1, "epoch_steps": 4}
    kept = linear.attention(measured(found, tmp_path / "kept", **quick))
    monkeypatch.setattr(linear, "KEPT_TOKENS", 0)
    streamed = linear.attention(measured(found, tmp_path / "streamed", **quick))
    assert streamed[0].settings == kept[0].settings
    probe = measured(found, tmp_path)
    grid = AttentionGrid(probe.encoder, found.splits["train"], np.arange(18), probe.options.attention, probe.context)
    encoded = grid.features(found.splits["train"], "train")
    assert isinstance(encoded, Encoded)
    assert encoded.shape == (18, 17, 64)
    rows = np.array([7, 2])
    seen = torch.from_numpy(
        np.stack([encoded.crop(Image.open(found.splits["train"].source.name(row))) for row in rows])
    )
    tokens = probe.encoder.tokens(seen.permute(0, 3, 1, 2))
    assert np.allclose(encoded[rows][:, 0], tokens.cls, atol=1e-5)
    assert np.allclose(encoded[rows][:, 1:], tokens.patches, atol=1e-5)


@pytest.mark.slow
def test_random_crops_and_pixels_go_through_as_well(tmp_path: Path) -> None:
    found = data(tmp_path, train=18, test=9)
    rows = linear.attention(measured(found, tmp_path / "crops", augment=True, epochs=1, epoch_steps=2))
    assert rows[0].settings["augment"] is True
    pixels = linear.attention(measured(found, tmp_path / "pixels", PixelEncoder(8, (32, 32)), epochs=1))
    assert pixels[0].n_test == 9


@pytest.mark.slow
def test_a_probe_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    found = data(tmp_path, train=18, test=9)
    whole, broken = linear.attention(measured(found, tmp_path / "whole"))[0], measured(found, tmp_path / "broken")

    def stopping(items: Any, _total: int, what: str) -> Any:
        for number, item in enumerate(items):
            if what == "attention" and number == 12:
                raise KeyboardInterrupt
            yield item

    broken.context.progress = stopping
    with pytest.raises(KeyboardInterrupt):
        linear.attention(broken)
    assert linear.attention(measured(found, tmp_path / "broken"))[0].settings == whole.settings


def test_it_is_declared_as_asked_for() -> None:
    for name in ("imagenet1k", "inat2018", "places205", "imagenet_a"):
        assert [task.asked for task in find_benchmark(name).tasks] == [False, False, True]


@pytest.mark.slow
def test_it_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for label in range(3):
        for index in range(8):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            pattern(label, index).save(folder / str(label) / f"{index}.png")
    common = [
        "eval",
        str(folder),
        "weights=random:vitt14_reg4",
        "image_size=28",
        "device=cpu",
        "baselines=false",
        "report=false",
    ]
    quick = ["attention.epochs=1", "attention.epoch_steps=2", "knn.k=1", "workers=0", f"out={tmp_path / 'out'}"]
    assert main([*common, *quick, "protocols=knn,attention"]) == 0
    (path,) = (tmp_path / "out").glob("eval/*/own.json")
    text = path.read_text()
    assert '"protocol": "attention probe"' in text
