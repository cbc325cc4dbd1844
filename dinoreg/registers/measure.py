"""All that the register report says of one backbone: `measure` looks inside it on a set of pictures.

Two passes over the pictures: norms after every block, which tell the outliers; then what the tokens hold. Labels add
the probes, boxes LOST; without them these parts are left out and the rest stands.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
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
from dinoreg.registers.outliers import (
    LOW_INFORMATION,
    PAPER_LIMIT,
    Outliers,
    border,
    find_outliers,
    log_histogram,
    low_information,
    mean_cosine,
    neighbour_cosine,
    onset,
    pick_patches,
    robust_limit,
)
from dinoreg.registers.test_time import Fitted, fit_test_time_register
from dinoreg.registers.token_probes import CONTROLS, Probed, moments, probe_token, replaced, replacement, split_labels
from dinoreg.runtime.errors import RunError

BATCH_BYTES = 1 << 28  # of the tokens after every block that are held at a time
BINS = 80  # of the histograms of norms
SHOWN = 6  # images whose maps are drawn
ATTENDED = 16  # images over which attention is averaged
CONTROL_PROBES = {"cls": "CLS", "patch": "mean patch"}  # names in the record: tokens whose probe is tried
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
    """

    record: dict[str, Any]
    norms: Tensor
    special: Tensor
    outliers: Tensor
    attention: Tensor


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
    limit = robust_limit(norms[-1])
    found = find_outliers(norms[-1], limit)
    outliers = norms[-1] > limit.value  # (n, N)
    first = onset(norms, outliers) if found.kind != "none" else None
    # What lies on no outlier at all is a comparison of nothing with something.
    present = outliers if found.kind != "none" else torch.zeros_like(outliers)
    progress("attention")
    attention, attended = _attention(encoder, images, outliers, grid)
    record = {
        **_subject(encoder, pictures, grid, seed),
        "limit": {**limit._asdict(), "paper": PAPER_LIMIT},
        "outliers": _outliers(found, norms[-1], outliers),
        "layers": _layers(norms, special),
        "histogram": _histogram(norms),
        "where": _where(outliers, cosine, grid, first),
        "attention": attended,
        **_token_content(encoder, pictures, present, first, size, seed, progress),
        "discovery": None,
        "test_time": None,
    }
    if pictures.boxes is not None:
        progress("object discovery")
        record["discovery"] = _discovery(encoder, images, pictures.boxes, grid, seed)
    record["seconds"] = time.monotonic() - started
    return Measured(record, norms, special, outliers, attention)


@torch.no_grad()
def fit(encoder: NativeEncoder, pictures: Pictures, measured: Measured) -> Fitted:
    """A test-time register for a backbone whose outliers have been measured; the search goes into its record."""
    most = measured.outliers.sum(dim=1).argsort(descending=True, stable=True)[:FIT_IMAGES]
    size = batch_size(encoder, measured.record["grid"])
    batches = [encoder.prepare(pictures.images[rows]) for rows in most.split(size)]
    masks = [measured.outliers[rows] for rows in most.split(size)]
    last_block = measured.record["where"]["onset"]
    fitted = fit_test_time_register(encoder.module, batches, masks, measured.record["limit"]["value"], last_block)
    measured.record["test_time"] = {
        "neurons": [neuron._asdict() for neuron in fitted.neurons],
        "before": fitted.before,
        "trials": [trial._asdict() for trial in fitted.trials],
        "images": len(most),
    }
    return fitted


def batch_size(encoder: Encoder, grid: Sequence[int]) -> int:
    """Images at a time, so that their tokens after every block stay within 256 MB."""
    one = 4 * encoder.depth * encoder.dim * (1 + encoder.num_registers + grid[0] * grid[1])
    return int(min(max(BATCH_BYTES // one, 1), 64))


def _subject(encoder: Encoder, pictures: Pictures, grid: tuple[int, int], seed: int) -> dict[str, Any]:
    """What is measured, and on what."""
    return {
        "name": encoder.name,
        "identity": encoder.identity,
        "num_registers": encoder.num_registers,
        "dim": encoder.dim,
        "depth": encoder.depth,
        "patch_size": encoder.patch_size,
        "image_size": list(pictures.images.shape[-2:]),
        "grid": list(grid),
        "images": len(pictures.images),
        "source": pictures.source,
        "seed": seed,
    }


def _outliers(found: Outliers, norms: Tensor, outliers: Tensor) -> dict[str, Any]:
    return {
        **found._asdict(),
        "valley": min(found.valley, 1e9),  # JSON knows no infinity
        "paper_share": float((norms > PAPER_LIMIT).double().mean()),
        "images_with": int(outliers.any(dim=1).sum()),
    }


def _norms(encoder: NativeEncoder, images: Tensor, size: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of patches (L, n, N) and of class token and registers (L, n, 1 + R), and neighbour cosines (n, N)."""
    patches, special, cosines = [], [], []
    for batch in images.split(size):
        layers = encoder.layers(batch, range(encoder.depth), norm=False)
        patches.append(torch.stack([each.patches.norm(dim=-1) for each in layers]).cpu())
        special.append(torch.stack([torch.cat([t.cls[:, None], t.registers], 1).norm(dim=-1) for t in layers]).cpu())
        embedded = encoder.module.patch_embed(encoder.prepare(batch))
        cosines.append(neighbour_cosine(embedded, grid).cpu())
    norms = torch.cat(patches, dim=1)
    if not torch.isfinite(norms).all():
        raise RunError(f"{encoder.name}: the norm of a patch is not finite")
    return norms, torch.cat(special, dim=1), torch.cat(cosines)


def _layers(norms: Tensor, special: Tensor) -> list[dict[str, Any]]:
    rows = []
    for block, (patches, others) in enumerate(zip(norms, special)):
        low, median, high = np.quantile(patches.double().numpy(), [0.05, 0.5, 0.95]).tolist()
        cls, *registers = others.median(dim=0).values.tolist()
        limit = robust_limit(patches)
        rows.append(
            {
                "block": block,
                "low": low,
                "median": median,
                "high": high,
                "largest": float(patches.max()),
                "limit": limit.value,
                "share": find_outliers(patches, limit).share,
                "cls": cls,
                "registers": registers,
            }
        )
    return rows


def _histogram(norms: Tensor) -> dict[str, Any]:
    low, high = float(norms.min().clamp(min=1e-6)), float(norms.max())
    edges = torch.logspace(np.log10(low * 0.98), np.log10(high * 1.02), BINS + 1)
    return {"edges": edges.tolist(), "shares": log_histogram(norms, edges).tolist()}


def _where(outliers: Tensor, cosine: Tensor, grid: tuple[int, int], onset: int | None) -> dict[str, Any]:
    low, edge = low_information(cosine), border(grid)
    some = bool(outliers.any())
    return {
        "onset": onset,
        "positions": outliers.double().mean(dim=0).view(grid).tolist(),
        "border": float(edge.expand_as(outliers)[outliers].double().mean()) if some else None,
        "border_expected": float(edge.double().mean()),
        "low_information": float(low[outliers].double().mean()) if some else None,
        "low_information_expected": LOW_INFORMATION,
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


def _token_content(
    encoder: NativeEncoder,
    pictures: Pictures,
    outliers: Tensor,
    first_block: int | None,
    size: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """How alike registers are, what tokens know, and what is lost when their content is replaced.

    outliers (n, N) bool, which stand out from `first_block` on; None where there are none
    """
    progress("tokens")
    tokens = _chosen_tokens(encoder, pictures.images, size, outliers, seed)
    alike = None
    if encoder.num_registers > 1:
        registers = [tokens[f"register {number + 1}"][0] for number in range(encoder.num_registers)]
        alike = mean_cosine(torch.stack(registers, dim=1))
    test, probed = None, {}
    if pictures.labels is not None:
        progress("probes")
        test = split_labels(pictures.labels, seed)
        for name, (features, present) in tokens.items():
            probe = probe_token(features, pictures.labels, pictures.classes, test, present, seed)
            if probe is not None:
                probed[name] = probe
    controls = []
    for what, block in (("registers", 0 if encoder.num_registers else None), ("outliers", first_block)):
        if block is not None:
            progress(f"controls: {what}")
            controls += _controls(encoder, pictures, outliers, what, block, test, probed, size, seed)
    probes = [{"token": name, **probe._asdict()} for name, probe in probed.items()]
    for row in probes:
        del row["model"]
    return {"registers_alike": alike, "probes": probes, "controls": controls}


def _chosen_tokens(
    encoder: NativeEncoder, images: Tensor, size: int, outliers: Tensor, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each kind of token one of every image (n, D), after the final norm, and which images have it (n,)."""
    normal, has_normal = pick_patches(~outliers, seed)
    outlying, has_outlier = pick_patches(outliers, seed)
    names = ["CLS", *(f"register {number + 1}" for number in range(encoder.num_registers)), "mean patch"]
    parts: list[list[Tensor]] = []
    for rows in torch.arange(len(images)).split(size):
        batch = encoder.tokens(images[rows])
        each = torch.arange(len(rows))
        picked = (batch.patches[each, chosen[rows]] for chosen in (normal, outlying))
        parts.append([batch.cls, *batch.registers.unbind(dim=1), batch.patches.mean(dim=1), *picked])
    *columns, normal_patch, outlier_patch = (torch.cat([part.cpu() for part in column]) for column in zip(*parts))
    everywhere = torch.ones(len(images), dtype=torch.bool)
    tokens = {name: (column, everywhere) for name, column in zip(names, columns)}
    tokens["normal patch"] = (normal_patch, has_normal)
    if has_outlier.any():
        if not has_outlier.all():
            tokens["normal patch, images with an outlier"] = (normal_patch, has_normal & has_outlier)
        tokens["outlier patch"] = (outlier_patch, has_outlier)
    return tokens


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
    values: dict[tuple[str, str], list[Tensor]] = defaultdict(list)  # by kind and name of the figure
    for each in batches:
        images = pictures.images[each]
        contents, where = _special(encoder, images, outliers[each], what)
        plain = encoder.tokens(images)
        others = ~where[:, 1 + encoder.num_registers :].to(plain.patches.device)
        for kind in kinds:
            now = plain
            if kind != "as it is":
                put = replacement(kind, contents, known, generators[kind])  # (L, k, S, D)
                with replaced(encoder.module, where, put.flatten(1, 2), first_block):
                    now = encoder.tokens(images)
            values[kind, "cls_cosine"].append(F.cosine_similarity(now.cls, plain.cls, dim=-1).cpu())
            values[kind, "patch_cosine"].append(F.cosine_similarity(now.patches, plain.patches, dim=-1)[others].cpu())
            for name, features in (("cls", now.cls), ("patch", now.patches.mean(dim=1))):
                if pictures.labels is not None and CONTROL_PROBES[name] in probed:
                    predicted = probed[CONTROL_PROBES[name]].model.predict(features).cpu()
                    values[kind, f"{name}_accuracy"].append((predicted == pictures.labels[each]).double())
    figures = [f"{name}_{figure}" for name in CONTROL_PROBES for figure in ("accuracy", "cosine")]
    count = sum(map(len, batches))
    return [
        {"what": what, "kind": kind, "images": count}
        | {name: float(torch.cat(values[kind, name]).mean()) if values[kind, name] else None for name in figures}
        for kind in kinds
    ]


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
    keys = (key for batch in images[:count].split(8) for key in encoder.qkv(batch)["key"])
    for number, key in enumerate(keys):
        similarity = gram(key, normalise=True).cpu()
        for place, bias in enumerate(BIASES):
            found[place, number] = np.array(lost(similarity + bias, grid).box) * encoder.patch_size
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
