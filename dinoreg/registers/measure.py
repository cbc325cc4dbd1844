"""All that the register report says of one backbone: `measure` looks inside it on a set of pictures.

Two passes over the pictures: norms after every block, which tell the outliers; then what the tokens hold. Labels add
the probes, boxes LOST; without them these parts are left out and the rest stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder, NativeEncoder
from dinoreg.evaluation.dense.lost import gram, lost
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.protocols.discovery import correct, crosswise
from dinoreg.registers import outliers as artifacts
from dinoreg.registers.test_time import Fitted, fit_test_time_register
from dinoreg.registers.token_probes import (
    CONTROLS,
    Probed,
    moments,
    probe_token,
    replaced,
    replacement,
    split_labels,
)
from dinoreg.runtime.errors import RunError

BATCH_BYTES = 1 << 28  # of the tokens after every block that are held at a time
BINS = 80  # of the histograms of norms
SHOWN = 6  # images whose maps are drawn
ATTENDED = 16  # images over which attention is averaged
CONTROL_PROBES = ("CLS", "mean patch")
CONTROL_IMAGES = 256  # to which replacements are applied, at most
DISCOVERY_IMAGES = 500
BIASES = tuple(-step / 10 for step in range(10))  # added to LOST's cosines (datasets reference, P7)
FIT_IMAGES = 48  # for finding register neurons


class Pictures(NamedTuple):
    """What the report looks at, all of one size.

    images  (n, C, H, W) uint8
    labels  (n,) int64, or None
    classes how many classes there are
    boxes   for each image (k, 4) x0, y0, x1, y1 in pixels, or None
    source  what they are called
    """

    images: Tensor
    labels: Tensor | None
    classes: int
    boxes: list[np.ndarray] | None
    source: str


@dataclass(frozen=True)
class Measured:
    """A backbone's figures (fit for JSON) and the arrays behind its pictures.

    norms      (L, n, N) of the patches after each block, before the final norm
    special    (L, n, 1 + R) of the class token and the registers
    outliers   (n, N) bool
    attention  (k, 1 + R, h, w) of the class token and each register, last block, mean over heads, first k images
    fitted     a test-time register that was found for it, or None
    """

    record: dict[str, Any]
    norms: Tensor
    special: Tensor
    outliers: Tensor
    attention: Tensor
    fitted: Fitted | None = None


Progress = Callable[[str], None]


@torch.no_grad()
def measure(
    encoder: NativeEncoder, pictures: Pictures, seed: int = 0, progress: Progress = lambda _line: None
) -> Measured:
    """Norms, outliers, where they sit, attention; with labels what tokens know and the controls; with boxes LOST.

    raises RunError where a norm is not finite, UserError where the images do not fit the encoder
    """
    started = time.monotonic()
    images = pictures.images
    grid = encoder.grid(images.shape[-2], images.shape[-1])
    size = batch_size(encoder, grid)
    progress("norms")
    norms, special, cosine = _norms(encoder, images, size, grid)
    limit = artifacts.robust_limit(norms[-1])
    found = artifacts.find_outliers(norms[-1], limit)
    outliers = norms[-1] > limit.value  # (n, N)
    first = artifacts.onset(norms, outliers) if found.kind != "none" else None
    progress("attention")
    attention, attended = _attention(encoder, images, outliers, grid)
    record: dict[str, Any] = {
        "name": encoder.name,
        "identity": encoder.identity,
        "num_registers": encoder.num_registers,
        "dim": encoder.dim,
        "depth": encoder.depth,
        "patch_size": encoder.patch_size,
        "image_size": list(images.shape[-2:]),
        "grid": list(grid),
        "images": len(images),
        "source": pictures.source,
        "seed": seed,
        "limit": {**limit._asdict(), "paper": artifacts.PAPER_LIMIT},
        "outliers": {
            **found._asdict(),
            "valley": min(found.valley, 1e9),  # JSON knows no infinity
            "paper_share": float((norms[-1] > artifacts.PAPER_LIMIT).double().mean()),
            "images_with": int(outliers.any(dim=1).sum()),
        },
        "layers": _layers(norms, special),
        "histogram": _histogram(norms),
        "where": _where(outliers, cosine, grid, first),
        "attention": attended,
        "registers_alike": None,
        "probes": [],
        "controls": [],
        "discovery": None,
        "test_time": None,
    }
    # What lies on no outlier at all is a comparison of nothing with something.
    present = outliers if found.kind != "none" else torch.zeros_like(outliers)
    progress("tokens")
    tokens = _chosen_tokens(encoder, images, size, present, seed)
    if encoder.num_registers > 1:
        held = [tokens[f"register {number + 1}"][0] for number in range(encoder.num_registers)]
        record["registers_alike"] = artifacts.mean_cosine(torch.stack(held, dim=1))
    test, probed = None, {}
    if pictures.labels is not None:
        progress("probes")
        test = split_labels(pictures.labels, seed)
        probed = _probes(tokens, pictures.labels, pictures.classes, test, seed)
        record["probes"] = [
            {"token": name, **{key: value for key, value in each._asdict().items() if key != "model"}}
            for name, each in probed.items()
        ]
    targets = [("registers", 0)] if encoder.num_registers else []
    targets += [("outliers", first)] if first is not None else []  # type: ignore[list-item]
    for what, block in targets:
        progress(f"controls: {what}")
        record["controls"] += _controls(encoder, pictures, present, what, block, test, probed, size, seed)
    if pictures.boxes is not None:
        progress("object discovery")
        record["discovery"] = _discovery(encoder, images, pictures.boxes, grid, seed)
    record["seconds"] = time.monotonic() - started
    return Measured(record, norms, special, outliers, attention)


@torch.no_grad()
def fit(encoder: NativeEncoder, pictures: Pictures, measured: Measured) -> Fitted:
    """A test-time register for a backbone whose outliers have been measured."""
    most = measured.outliers.sum(dim=1).argsort(descending=True, stable=True)[:FIT_IMAGES]
    size = batch_size(encoder, measured.record["grid"])
    batches = [encoder.prepare(pictures.images[rows]) for rows in most.split(size)]
    masks = [measured.outliers[rows] for rows in most.split(size)]
    onset = measured.record["where"]["onset"]
    return fit_test_time_register(encoder.module, batches, masks, measured.record["limit"]["value"], onset)


def describe(fitted: Fitted, images: int) -> dict[str, Any]:
    """The search for a test-time register, fit for JSON."""
    return {
        "neurons": [neuron._asdict() for neuron in fitted.neurons],
        "before": fitted.before,
        "trials": [trial._asdict() for trial in fitted.trials],
        "images": images,
    }


def batch_size(encoder: Encoder, grid: Sequence[int]) -> int:
    """Images at a time, so that their tokens after every block stay within 256 MB."""
    one = 4 * encoder.depth * encoder.dim * (1 + encoder.num_registers + grid[0] * grid[1])
    return int(min(max(BATCH_BYTES // one, 1), 64))


def _norms(encoder: NativeEncoder, images: Tensor, size: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of patches (L, n, N) and of class token and registers (L, n, 1 + R), and neighbour cosines (n, N)."""
    patches, special, cosines = [], [], []
    for batch in images.split(size):
        layers = encoder.layers(batch, range(encoder.depth), norm=False)
        patches.append(torch.stack([each.patches.norm(dim=-1) for each in layers]).cpu())
        special.append(torch.stack([torch.cat([t.cls[:, None], t.registers], 1).norm(dim=-1) for t in layers]).cpu())
        embedded = encoder.module.patch_embed(encoder.prepare(batch))
        cosines.append(artifacts.neighbour_cosine(embedded, grid).cpu())
    norms = torch.cat(patches, dim=1)
    if not torch.isfinite(norms).all():
        raise RunError(f"{encoder.name}: the norm of a patch is not finite")
    return norms, torch.cat(special, dim=1), torch.cat(cosines)


def _layers(norms: Tensor, special: Tensor) -> list[dict[str, Any]]:
    quantiles = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    rows = []
    for block, (patches, others) in enumerate(zip(norms, special)):
        values = np.quantile(patches.double().numpy(), quantiles.numpy())
        middle = others.median(dim=0).values.tolist()
        limit = artifacts.robust_limit(patches)
        rows.append(
            {
                "block": block,
                "low": float(values[0]),
                "median": float(values[1]),
                "high": float(values[2]),
                "largest": float(patches.max()),
                "limit": limit.value,
                "share": artifacts.find_outliers(patches, limit).share,
                "cls": middle[0],
                "registers": middle[1:],
            }
        )
    return rows


def _histogram(norms: Tensor) -> dict[str, Any]:
    low, high = float(norms.min().clamp(min=1e-6)), float(norms.max())
    edges = torch.logspace(np.log10(low * 0.98), np.log10(high * 1.02), BINS + 1)
    return {"edges": edges.tolist(), "shares": artifacts.log_histogram(norms, edges).tolist()}


def _where(outliers: Tensor, cosine: Tensor, grid: tuple[int, int], onset: int | None) -> dict[str, Any]:
    low, edge = artifacts.low_information(cosine), artifacts.border(grid)
    some = bool(outliers.any())
    return {
        "onset": onset,
        "positions": outliers.double().mean(dim=0).view(grid).tolist(),
        "border": float(edge.expand_as(outliers)[outliers].double().mean()) if some else None,
        "border_expected": float(edge.double().mean()),
        "low_information": float(low[outliers].double().mean()) if some else None,
        "low_information_expected": artifacts.LOW_INFORMATION,
        "cosine_outliers": float(cosine[outliers].mean()) if some else None,
        "cosine_others": float(cosine[~outliers].mean()),
    }


def _attention(
    encoder: NativeEncoder, images: Tensor, outliers: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, dict[str, Any]]:
    """Maps (k, 1 + R, h, w) of the first images, and how the class token shares its attention out in the last block."""
    first = 1 + encoder.num_registers
    maps, shares, entropy = [], [], []
    for number, image in enumerate(images[:ATTENDED]):
        weights = encoder.module.attention(encoder.prepare(image[None]))[0].float().mean(dim=0).cpu()  # (T, T)
        row = weights[0]
        patches = row[first:]
        shares.append([row[0], row[1:first].sum(), patches[outliers[number]].sum(), patches[~outliers[number]].sum()])
        unit = patches / patches.sum()
        entropy.append(float(-(unit * unit.clamp(min=1e-12).log()).sum() / np.log(len(unit))) if len(unit) > 1 else 1.0)
        if number < SHOWN:
            maps.append(weights[:first, first:].unflatten(1, grid))
    itself, registers, outlying, others = torch.tensor(shares).mean(dim=0).tolist()
    return torch.stack(maps), {
        "images": min(len(images), ATTENDED),
        "cls_to_itself": itself,
        "cls_to_registers": registers,
        "cls_to_outliers": outlying,
        "cls_to_patches": others,
        "cls_entropy": float(np.mean(entropy)),  # over patches, 1 is even
    }


def _chosen_tokens(
    encoder: NativeEncoder, images: Tensor, size: int, outliers: Tensor, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each kind of token one of every image (n, D), after the final norm, and which images have it (n,)."""
    normal, has_normal = artifacts.pick_patches(~outliers, seed)
    strange, has_strange = artifacts.pick_patches(outliers, seed)
    rows: list[list[Tensor]] = []
    for start in range(0, len(images), size):
        batch = encoder.tokens(images[start : start + size])
        stop = start + len(batch.cls)
        each = torch.arange(len(batch.cls))
        rows.append(
            [
                batch.cls.cpu(),
                *batch.registers.unbind(dim=1),
                batch.patches.mean(dim=1).cpu(),
                batch.patches[each, normal[start:stop]].cpu(),
                batch.patches[each, strange[start:stop]].cpu(),
            ]
        )
    columns = [torch.cat([part.cpu() for part in column]) for column in zip(*rows)]
    everywhere = torch.ones(len(images), dtype=torch.bool)
    names = ["CLS", *(f"register {number + 1}" for number in range(encoder.num_registers)), "mean patch"]
    chosen = {name: (column, everywhere) for name, column in zip(names, columns)}
    chosen["normal patch"] = (columns[-2], has_normal)
    if has_strange.any():
        if not has_strange.all():
            chosen["normal patch, images with an outlier"] = (columns[-2], has_normal & has_strange)
        chosen["outlier patch"] = (columns[-1], has_strange)
    return chosen


def _probes(
    tokens: dict[str, tuple[Tensor, Tensor]], labels: Tensor, classes: int, test: Tensor, seed: int
) -> dict[str, Probed]:
    probed = {
        name: probe_token(features, labels, classes, test, present, seed)
        for name, (features, present) in tokens.items()
    }
    return {name: each for name, each in probed.items() if each is not None}


def _controls(
    encoder: NativeEncoder,
    pictures: Pictures,
    outliers: Tensor,
    what: str,
    first_block: int,
    test: Tensor | None,
    probed: dict[str, Probed],
    size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """What the class token and the other patches lose when the content of registers or outliers is replaced.

    The probes are those of the untouched backbone, and the images their test images.
    """
    rows = test.nonzero()[:, 0] if test is not None else torch.arange(len(pictures.images))
    if what == "outliers":
        rows = rows[outliers[rows].any(dim=1)]
    batches = [each for each in rows[:CONTROL_IMAGES].split(max(size, 2)) if len(each) > 1 or what == "outliers"]
    if not batches:
        return []
    known = moments(_special(encoder, pictures.images[each], outliers[each], what)[0] for each in batches)
    kinds = ("as it is", *CONTROLS)
    generators = {kind: torch.Generator().manual_seed(seed) for kind in kinds}
    right: dict[tuple[str, str], list[Tensor]] = {(kind, name): [] for kind in kinds for name in CONTROL_PROBES}
    cosines: dict[tuple[str, str], list[Tensor]] = {(kind, name): [] for kind in kinds for name in CONTROL_PROBES}
    for each in batches:
        images = pictures.images[each]
        contents, where = _special(encoder, images, outliers[each], what)
        plain = encoder.tokens(images)
        kept = ~where[:, 1 + encoder.num_registers :].to(plain.patches.device)
        for kind in kinds:
            now = plain
            if kind != "as it is":
                put = replacement(kind, contents, known, generators[kind])  # (L, k, S, D)
                with replaced(encoder.module, where, put.flatten(1, 2), first_block):
                    now = encoder.tokens(images)
            cosines[kind, "CLS"].append(F.cosine_similarity(now.cls, plain.cls, dim=-1).cpu())
            cosines[kind, "mean patch"].append(F.cosine_similarity(now.patches, plain.patches, dim=-1)[kept].cpu())
            for name, features in zip(CONTROL_PROBES, (now.cls, now.patches.mean(dim=1))):
                if pictures.labels is not None and name in probed:
                    right[kind, name].append(probed[name].model.predict(features).cpu() == pictures.labels[each])
    lines = []
    for kind in kinds:
        line: dict[str, Any] = {"what": what, "kind": kind, "images": sum(map(len, batches))}
        for name, key in zip(CONTROL_PROBES, ("cls", "patch")):
            hits = right[kind, name]
            line[f"{key}_accuracy"] = float(torch.cat(hits).double().mean()) if hits else None
            line[f"{key}_cosine"] = float(torch.cat(cosines[kind, name]).mean())
        lines.append(line)
    return lines


def _special(encoder: NativeEncoder, images: Tensor, outliers: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Contents (L, k, S, D) of the tokens to be replaced, after every block, and where they are (B, T) bool."""
    layers = encoder.layers(images, range(encoder.depth), norm=False)
    head = torch.zeros(len(images), 1, dtype=torch.bool)
    registers = torch.full((len(images), encoder.num_registers), what == "registers")
    where = torch.cat([head, registers, outliers & (what == "outliers")], dim=1)
    if what == "registers":
        return torch.stack([each.registers for each in layers]).cpu(), where  # (L, B, R, D)
    mask = outliers.to(layers[0].patches.device)
    return torch.stack([each.patches[mask] for each in layers])[:, :, None].cpu(), where  # (L, k, 1, D)


def _discovery(
    encoder: NativeEncoder, images: Tensor, boxes: Sequence[np.ndarray], grid: tuple[int, int], seed: int
) -> dict[str, Any]:
    """LOST's CorLoc with normalised keys of the last block, plain and with the best of ten biases."""
    count = min(len(images), DISCOVERY_IMAGES)
    height, width = images.shape[-2:]
    found = np.zeros((len(BIASES), count, 4), dtype=np.float32)
    for number, keys in enumerate(_keys(encoder, images[:count])):
        similarity = gram(keys, normalise=True).cpu()
        for place, bias in enumerate(BIASES):
            box = lost(similarity + bias, grid).box
            found[place, number] = np.array(box) * encoder.patch_size
    truth = list(boxes[:count])
    hits = np.array([correct(each, truth) for each in found])  # (S, n)
    whole = correct(np.tile(np.array([[0, 0, width, height]], dtype=np.float32), (count, 1)), truth)
    shares = hits.mean(axis=1)
    best = int(shares.argmax())
    low, high = bootstrap_interval(hits[best], seed=seed)
    return {
        "feature": "normalised keys of the last block",
        "images": count,
        "CorLoc": float(shares[best]),
        "low": low,
        "high": high,
        "bias": BIASES[best],
        "plain": float(shares[0]),
        "chosen_on_other_half": crosswise(hits) if count > 1 else None,
        "whole_image_box": float(whole.mean()),
        "sweep": dict(zip(map(str, BIASES), shares.tolist())),
    }


def _keys(encoder: NativeEncoder, images: Tensor) -> Iterator[Tensor]:
    for batch in images.split(8):
        yield from encoder.qkv(batch)["key"]


def as_json(measured: Measured) -> dict[str, Any]:
    """The record, with the search for a test-time register where there was one."""
    record = dict(measured.record)
    if measured.fitted is not None:
        record["test_time"] = describe(measured.fitted, min(FIT_IMAGES, len(measured.outliers)))
    return record
