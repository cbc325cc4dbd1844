"""P2, weighted k-NN on frozen class tokens, for every k of the options: DINO's protocol, no training at all."""

from __future__ import annotations

import time

import torch

from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.features.images import CentreCrop, read_rgb
from dinoreg.evaluation.metrics.bootstrap import knn_predict
from dinoreg.evaluation.metrics.knn_rankme import nearest_neighbours
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.protocols.logistic import accuracy_rows, labelled
from dinoreg.evaluation.result import Row

RESIZE = 256 / 224  # short side over crop, as DINOv2's k-NN and linear evaluations have it
GALLERY = 6  # neighbours shown beside a query


def evaluate(encoder: Encoder, data: Data, task: Task, options: EvalOptions, context: Context) -> list[Row]:
    """One row for each k, the k of 20 first where it is among them: the papers do not say which they quote."""
    started = time.monotonic()
    train, test = labelled(data, "train"), labelled(data, "test")
    crop = CentreCrop(round(context.image_size * RESIZE), context.image_size)
    bank, queries = (
        context.features.extract(encoder, split.source, crop, (-1,), what=f"features of {name}").cls()
        for name, split in (("train", train), ("test", test))
    )
    chosen = options.knn
    labels = torch.from_numpy(train.labels)
    votes = knn_predict(
        bank.to(encoder.device) if encoder.device.type != "cpu" else bank,
        labels,
        queries,
        k=chosen.k,
        temperature=chosen.temperature,
        num_classes=train.num_classes,
    )
    hours = (time.monotonic() - started) / 3600
    if context.examples is not None:
        _gallery(bank, queries, train, test, context)
    rows = []
    for k in sorted(chosen.k, key=lambda each: (each != 20, each)):
        common = {
            "variant": ", ".join(filter(None, (f"k = {k}", data.variant))),
            "seeds": (context.seed,),
            "n_train": len(train),
            "n_test": len(test),
            "chance": 1.0 / train.num_classes,
            "settings": {"k": k, "temperature": chosen.temperature, "image_size": context.image_size},
            "hours": hours,
        }
        predicted = votes[k].argmax(dim=-1).cpu().numpy()
        rows += accuracy_rows("weighted k-NN", predicted, test.labels, task.metric, common)[:1]
    return rows


def _gallery(bank: torch.Tensor, queries: torch.Tensor, train: Labelled, test: Labelled, context: Context) -> None:
    """Strips of a test image and its nearest training images."""
    from PIL import Image

    assert context.examples is not None
    context.examples.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(context.seed)
    picked = torch.randperm(len(test), generator=generator)[: context.num_examples]
    _, nearest = nearest_neighbours(bank, queries[picked], min(GALLERY, len(train)))
    side = 112
    show = CentreCrop(side, side)
    for number, (query, found) in enumerate(zip(picked.tolist(), nearest.tolist())):
        strip = Image.new("RGB", ((len(found) + 1) * (side + 6) + 6, side + 6), (24, 27, 33))
        pictures = [(read_rgb(test.source, query), True), *((read_rgb(train.source, each), False) for each in found)]
        same = [True, *(train.labels[each] == test.labels[query] for each in found)]
        for place, ((picture, is_query), alike) in enumerate(zip(pictures, same)):
            left = place * (side + 6) + (0 if is_query else 6)
            edge = (59, 125, 216) if is_query else (21, 127, 91) if alike else (179, 50, 43)
            strip.paste(edge, (left, 0, left + side + 6, side + 6))
            strip.paste(Image.fromarray(show(picture)), (left + 3, 3))
        strip.save(context.examples / f"knn_{number:02d}.png")
