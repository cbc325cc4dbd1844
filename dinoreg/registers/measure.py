"""The figures of the register report on one backbone, measured on a set of pictures.
Two passes over the pictures: norms after every block, by which outliers are found; then what the tokens hold. Labels
add the probes, boxes LOST; without them these parts are left out.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from dinoreg.evaluation.solvers.regularisation_path import balanced_split
from dinoreg.registers import outliers as measures
from dinoreg.registers.test_time import fit_test_time_register
from dinoreg.registers.token_probes import CONTROLS, TEST_SHARE, Probed, moments, probe_token, replaced, replacement
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.parallel import show_progress
from dinoreg.runtime.printable import print_status
from dinoreg.visualize.norms import histogram, joined, token_norms

SHOWN = 6  # images whose maps are drawn
CONTROL_PROBES = {"cls": "CLS", "patch": "mean patch"}  # {name in the record: token whose probe is scored again}
BESIDE_OUTLIERS = "normal patch, images with an outlier"
BIASES = tuple(-step / 10 for step in range(10))  # added to LOST's cosines; arXiv 2506.08010 sweeps [-1, 0]


class Pictures(NamedTuple):
    """The images of a report, all of one size.

    images   (n, C, H, W) uint8, or float32 in 0..1
    labels   (n,) int64 in [0, classes), or None
    classes  number of classes
    boxes    for each image (k, 4) x0, y0, x1, y1 in pixels, or None
    source   description of where they come from
    """

    images: Tensor
    labels: Tensor | None
    classes: int
    boxes: list[np.ndarray] | None
    source: str


@dataclass(frozen=True)
class Measured:
    """A backbone's figures (fit for JSON) and the arrays behind its pictures.

    norms      (L, n, N) float32, L2 norms of the patches after each block, before the final norm
    outliers   (n, N) bool
    attention  (k, 1 + R, h, w) float32 of the class token and each register to the patches of the first k images, in
               the
               last block, mean over heads
    """

    record: dict[str, Any]
    norms: Tensor
    outliers: Tensor
    attention: Tensor


@torch.no_grad()
def measure(encoder: NativeEncoder, pictures: Pictures, seed: int = 0) -> Measured:
    """Norms, outliers, their places, attention; with labels what tokens hold and the controls; with boxes LOST.

    seed    of probes, picked patches and noise
    raises  RunError where norms are not finite or all zero, UserError where the images do not fit the encoder
    """
    started = time.monotonic()
    inspection = _Inspection(encoder, pictures, seed)
    norms, special, cosine = inspection.norms()
    limit, found, outliers, onset = measures.find(norms)
    # Without outliers there is nothing to compare the other patches with.
    present = outliers if found.kind != "none" else torch.zeros_like(outliers)
    attention, attended = inspection.attention(outliers)
    described = ("name", "identity", "num_registers", "dim", "depth", "patch_size")
    record = {
        **{name: getattr(encoder, name) for name in described},
        "image_size": list(pictures.images.shape[-2:]),
        "grid": list(inspection.grid),
        "images": len(pictures.images),
        "source": pictures.source,
        "seed": seed,
        "limit": {**limit._asdict(), "paper": measures.PAPER_LIMIT},
        "outliers": {
            **found._asdict(),
            "valley": min(found.valley, 1e9),  # JSON knows no infinity
            "paper_share": float((norms[-1] > measures.PAPER_LIMIT).double().mean()),
            "images_with": int(outliers.any(dim=1).sum()),
        },
        "layers": [_layer(block, *pair) for block, pair in enumerate(zip(norms, special))],
        "histogram": histogram(norms),
        "where": {"onset": onset, **_where(outliers, cosine, inspection.grid)},
        "attention": attended,
        **inspection.token_content(present, onset),
        "discovery": inspection.discovery(pictures.boxes) if pictures.boxes is not None else None,
        "test_time": None,
        "added": bool(encoder.module.register_neurons),
        "seconds": time.monotonic() - started,
    }
    return Measured(record, norms, outliers, attention)


def patch_norms(encoder: NativeEncoder, pictures: Pictures) -> Tensor:
    """Norms (L, n, N) of the patches after every block, as in `Measured`; RunError where they are no numbers."""
    return _Inspection(encoder, pictures, 0).norms()[0]


@torch.no_grad()
def fit(encoder: NativeEncoder, pictures: Pictures, norms: Tensor) -> tuple[NativeEncoder, dict[str, Any]]:
    """The backbone with a test-time register for its outliers, by its norms (L, n, N), and a record of the search.

    raises  UserError for a backbone that has registers, or without outliers
    """
    limit, found, outliers, last_block = measures.find(norms)
    if last_block is None:
        largest = f"of {outliers.numel():,} patches the largest norm is {found.largest:.2f} times the median"
        raise UserError(f"{encoder.name}: no outlier tokens, {largest}: nothing that a test-time register could take")
    most = outliers.sum(dim=1).argsort(descending=True, stable=True)[:48]  # images, which suffice to find neurons
    size = batch_size(encoder, encoder.grid(*pictures.images.shape[-2:]))
    batches = [encoder.prepare(pictures.images[rows]) for rows in most.split(size)]
    masks = [outliers[rows] for rows in most.split(size)]
    changed, record = fit_test_time_register(encoder.module, batches, masks, limit.value, last_block)
    name = f"{encoder.name} + test-time register"
    return NativeEncoder(changed, name, encoder.preprocessing, encoder.device), record | {"images": len(most)}


def batch_size(encoder: Encoder, grid: Sequence[int]) -> int:
    """Images at a time, 1 to 64, so that their tokens after every block stay within 256 MiB.

    grid  rows and columns of patches
    """
    one = 4 * encoder.depth * encoder.dim * (1 + encoder.num_registers + grid[0] * grid[1])
    return int(min(max((1 << 28) // one, 1), 64))


def _layer(block: int, patches: Tensor, special: Tensor) -> dict[str, Any]:
    """Norms after one block: of patches (n, N), of the class token and registers (n, 1 + R)."""
    low, median, high = np.quantile(patches.double().numpy(), [0.05, 0.5, 0.95]).tolist()
    cls, *registers = special.median(dim=0).values.tolist()
    limit = measures.robust_limit(patches)
    share = measures.find_outliers(patches, limit).share
    row = {"block": block, "low": low, "median": median, "high": high, "largest": float(patches.max())}
    return row | {"limit": limit.value, "share": share, "cls": cls, "registers": registers}


def _where(outliers: Tensor, cosine: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    low, edge = measures.low_information(cosine).double(), measures.border(grid).double()
    some = bool(outliers.any())
    return {
        "positions": outliers.double().mean(dim=0).view(grid).tolist(),
        "border": float(edge.expand_as(low)[outliers].mean()) if some else None,
        "border_expected": float(edge.mean()),
        "low_information": float(low[outliers].mean()) if some else None,
        "low_information_expected": measures.LOW_INFORMATION,
        "cosine_outliers": float(cosine[outliers].mean()) if some else None,
        "cosine_others": float(cosine[~outliers].mean()),
    }


class _Inspection:
    """The measurements on one backbone and one set of pictures, a method for each."""

    def __init__(self, encoder: NativeEncoder, pictures: Pictures, seed: int) -> None:
        self.encoder, self.pictures, self.seed = encoder, pictures, seed
        self.images = pictures.images
        self.grid = encoder.grid(*self.images.shape[-2:])
        self.size = batch_size(encoder, self.grid)
        self.first = 1 + encoder.num_registers  # of the patches in a sequence

    def begin(self, part: str) -> None:
        """Say that a part of the measurement begins."""
        print_status(f"{self.encoder.name}: {part}")

    def batches(self, what: str) -> Iterator[Tensor]:
        """Numbers of all images (b,), a batch at a time, with the progress of `what`."""
        rows = torch.arange(len(self.images)).split(self.size)
        return show_progress(rows, len(rows), f"{self.encoder.name}: {what}")

    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Norms of patches (L, n, N) and of class token and registers (L, n, 1 + R), and neighbour cosines (n, N)."""
        self.begin("norms")
        norms, cosines = [], []
        for rows in self.batches("norms"):
            batch = self.encoder.prepare(self.images[rows])
            norms.append(token_norms(self.encoder.module, batch))
            cosines.append(measures.neighbour_cosine(self.encoder.module.patch_embed(batch), self.grid).cpu())
        cls, registers, patches = joined(norms)
        if not torch.isfinite(patches).all() or not patches[-1].any():
            raise RunError(f"{self.encoder.name}: the norms of its patches are not finite, or all zero")
        return patches, torch.cat([cls[..., None], registers], dim=2), torch.cat(cosines)

    def attention(self, outliers: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Maps (k, 1 + R, h, w) of the first images, and how the class token shares its attention out in the last
        block."""
        self.begin("attention")
        first, maps, shares, entropy = self.first, [], [], []
        for image, mask in zip(self.images[:16], outliers):  # enough for means
            weights = self.encoder.module.attention(self.encoder.prepare(image[None]))[0].float().mean(dim=0).cpu()
            row, patches = weights[0], weights[0, first:]
            shares.append([row[0], row[1:first].sum(), patches[mask].sum(), patches[~mask].sum()])
            unit = patches / patches.sum()
            entropy.append(float(torch.special.entr(unit).sum()) / np.log(len(unit)) if len(unit) > 1 else 1.0)
            maps.append(weights[:first, first:].unflatten(1, self.grid))
        names = ("cls_to_itself", "cls_to_registers", "cls_to_outliers", "cls_to_patches")
        return torch.stack(maps[:SHOWN]), {
            "images": len(maps),
            **dict(zip(names, torch.tensor(shares).mean(dim=0).tolist())),
            "cls_entropy": float(np.mean(entropy)),  # over patches, 1 is even
        }

    def token_content(self, outliers: Tensor, first_block: int | None) -> dict[str, Any]:
        """How alike registers are, what tokens know, and what is lost when their content is replaced.

        outliers (n, N) bool, which stand out from `first_block` on; None where there are none
        """
        self.begin("tokens")
        tokens = self.tokens(outliers)
        registers = [features for name, (features, _) in tokens.items() if name.startswith("register")]
        alike = measures.mean_cosine(torch.stack(registers, dim=1)) if len(registers) > 1 else None
        test, probed, labels = None, {}, self.pictures.labels
        if labels is not None:
            self.begin("probes")
            test = balanced_split(labels, TEST_SHARE, self.seed)
            for name, (features, present) in tokens.items():
                probe = probe_token(features, labels, self.pictures.classes, test, present, self.seed)
                if probe is not None:
                    probed[name] = probe
        rows = torch.arange(len(self.images)) if test is None else test.nonzero()[:, 0]
        controls = self.controls("registers", rows, outliers, 0, probed) if registers else []
        if first_block is not None:
            controls += self.controls("outliers", rows[outliers[rows].any(dim=1)], outliers, first_block, probed)
        probes = [{"token": name, **probe.record()} for name, probe in probed.items()]
        for each in probes:
            if each["token"] == "outlier patch":
                normal = next((probed[name] for name in (BESIDE_OUTLIERS, "normal patch") if name in probed), None)
                each["against"] = normal and probed["outlier patch"].against(normal)
        return {"registers_alike": alike, "probes": probes, "controls": controls}

    def tokens(self, outliers: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For each kind of token one of every image (n, D), after the final norm, and which images have it (n,)."""
        normal, has_normal = measures.pick_patches(~outliers, self.seed)
        outlying, has_outlier = measures.pick_patches(outliers, self.seed)
        parts: list[list[Tensor]] = []
        for rows in self.batches("tokens"):
            batch = self.encoder.tokens(self.images[rows])
            each = torch.arange(len(rows))
            picked = (batch.patches[each, chosen[rows]] for chosen in (normal, outlying))
            parts.append([batch.cls, *batch.registers.unbind(dim=1), batch.patches.mean(dim=1), *picked])
        *columns, normal_patch, outlier_patch = (torch.cat([part.cpu() for part in column]) for column in zip(*parts))
        names = ["CLS", *(f"register {number}" for number in range(1, self.first)), "mean patch"]
        everywhere = torch.ones(len(self.images), dtype=torch.bool)
        tokens = {name: (column, everywhere) for name, column in zip(names, columns)}
        tokens["normal patch"] = (normal_patch, has_normal)
        if has_outlier.any():
            if not has_outlier.all():
                tokens[BESIDE_OUTLIERS] = (normal_patch, has_normal & has_outlier)
            tokens["outlier patch"] = (outlier_patch, has_outlier)
        return tokens

    def controls(
        self, what: str, rows: Tensor, outliers: Tensor, first_block: int, probed: dict[str, Probed]
    ) -> list[dict[str, Any]]:
        """What the class token and the other patches lose when the content of registers or outliers is replaced.

        rows    numbers of the images that are tried
        probed  the probes of the untouched backbone
        """
        self.begin(f"controls: {what}")
        parts = rows[:256].split(max(self.size, 2))  # images, at most
        batches = [each for each in parts if len(each) > 1 or what == "outliers"]
        if not batches:
            return []
        known = moments(self.contents(each, outliers[each], what)[0] for each in batches)
        kinds = ("as it is", *CONTROLS)
        generators = {kind: torch.Generator().manual_seed(self.seed) for kind in kinds}
        values: dict[tuple[str, str], list[Tensor]] = defaultdict(list)  # by kind and name of the figure
        for each in batches:
            contents, where = self.contents(each, outliers[each], what)
            plain = self.encoder.tokens(self.images[each])
            others = ~where[:, self.first :].to(plain.patches.device)
            for kind in kinds:
                now = plain
                if kind != "as it is":
                    put = replacement(kind, contents, known, generators[kind])  # (L, k, S, D)
                    with replaced(self.encoder.module, where, put.flatten(1, 2), first_block):
                        now = self.encoder.tokens(self.images[each])
                values[kind, "cls_cosine"].append(F.cosine_similarity(now.cls, plain.cls, dim=-1).cpu())
                cosine = F.cosine_similarity(now.patches, plain.patches, dim=-1)
                values[kind, "patch_cosine"].append(cosine[others].cpu())
                for name, features in (("cls", now.cls), ("patch", now.patches.mean(dim=1))):
                    if self.pictures.labels is not None and CONTROL_PROBES[name] in probed:
                        predicted = probed[CONTROL_PROBES[name]].model.predict(features).cpu()
                        values[kind, f"{name}_accuracy"].append((predicted == self.pictures.labels[each]).double())
        figures = [f"{name}_{figure}" for name in CONTROL_PROBES for figure in ("accuracy", "cosine")]
        return [
            {"what": what, "kind": kind, "images": sum(map(len, batches))}
            | {name: float(torch.cat(values[kind, name]).mean()) if values[kind, name] else None for name in figures}
            for kind in kinds
        ]

    def contents(self, rows: Tensor, outliers: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Contents (L, k, S, D) of the tokens to be replaced, after every block, and where they are (B, T) bool."""
        layers = self.encoder.layers(self.images[rows], range(self.encoder.depth), norm=False)
        where = torch.zeros(len(rows), self.first + outliers.shape[1], dtype=torch.bool)
        if what == "registers":
            where[:, 1 : self.first] = True
            return torch.stack([each.registers for each in layers]).cpu(), where  # (L, B, R, D)
        where[:, self.first :] = outliers
        mask = outliers.to(layers[0].patches.device)
        return torch.stack([each.patches[mask] for each in layers])[:, :, None].cpu(), where  # (L, k, 1, D)

    def discovery(self, boxes: Sequence[np.ndarray]) -> dict[str, Any]:
        """LOST's CorLoc with normalised keys of the last block, plain and with the best of ten biases."""
        self.begin("object discovery")
        images = self.images[:500]  # at most
        truth, (height, width) = boxes[: len(images)], images.shape[-2:]
        found = np.zeros((len(BIASES), len(images), 4), dtype=np.float32)
        keys = (key for batch in images.split(8) for key in self.encoder.qkv(batch)["key"])
        for number, key in enumerate(keys):
            similarity = gram(key, normalise=True).cpu()
            for place, bias in enumerate(BIASES):
                found[place, number] = np.array(lost(similarity + bias, self.grid).box) * self.encoder.patch_size
        hits = np.array([correct(each, truth) for each in found])  # (S, n)
        whole = correct(np.array([[0, 0, width, height]] * len(images), dtype=np.float32), truth)
        shares = hits.mean(axis=1)
        best = int(shares.argmax())
        interval = bootstrap_interval(hits[best], seed=self.seed)
        return {
            "feature": "normalised keys of the last block",
            "images": len(images),
            "CorLoc": float(shares[best]),
            "low": interval.low,
            "high": interval.high,
            "bias": BIASES[best],
            "plain": float(shares[0]),
            "chosen_on_other_half": crosswise(hits) if len(images) > 1 else None,
            "whole_image_box": float(whole.mean()),
            "sweep": dict(zip(map(str, BIASES), shares.tolist())),
        }
