"""Logistic regression and weighted k-NN on frozen class tokens, and what every protocol of classification shares.

`logistic` is the protocol of the fine-grained suite (SimCLR B.8.1 and DINOv2 §7.2): no augmentation, short side to the
crop's size and a centre crop; C from a path of 45, chosen by the task's metric on the official validation split or on a
seeded tenth of train, refitted on train and validation, scored once. Unlike in DINOv2's code, that tenth is drawn class
by class, among equal scores the lower validation loss decides, and each fit starts at the one before and goes on until
it has converged. `knn` is DINO's and DINOv2's, for every k of the options, without training.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dinoreg.data.source import Source
from dinoreg.evaluation.comparison import with_majority
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Labelled
from dinoreg.evaluation.dense.pictures import strip
from dinoreg.evaluation.features.cache import extract_features, feature_matrix
from dinoreg.evaluation.features.images import CentreCrop, read_picture, shown
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, draws_interval, mean_per_class_accuracy, top1
from dinoreg.evaluation.metrics.knn_rankme import knn_predict, nearest_neighbours
from dinoreg.evaluation.options import LogisticOptions
from dinoreg.evaluation.protocols.measurement import OFFICIAL, Fold, Measurement, per_fold
from dinoreg.evaluation.result import Row, packed
from dinoreg.evaluation.solvers.regularisation_path import Path, select_and_fit

RESIZE = 256 / 224  # short side over crop, as DINOv2's k-NN and linear evaluations have it
GALLERY = 6  # neighbours shown beside a query
SIDE, BLUE = 112, (59, 125, 216)  # pixels of a picture in a strip, edge of the query
PICTURE_SIZE = 224  # pixels of an example
GREEN, RED = (21, 127, 91), (179, 50, 43)  # of pictures' edges
METRICS = {"top-1": top1, "mean per class": mean_per_class_accuracy}
MOST_CLASSES = 30  # of a whole confusion matrix
MISSING = "the {name} split is missing, or its images do not have one class each"


def knn(measured: Measurement) -> list[Row]:
    """One row for each k, accuracy in [0, 1]; k = 20 first where it is among them: papers do not say which they quote.

    raises  as `labelled_folds` and `extract_features`
    """
    chosen, encoder, context = measured.options.knn, measured.encoder, measured.context
    test, folds = labelled_folds(measured)
    predicted = {k: np.empty(len(test), dtype=np.int64) for k in sorted(chosen.k, key=lambda each: (each != 20, each))}
    if test.among is not None:  # only images of the classes that an answer is chosen from vote
        learnt = (np.flatnonzero(np.isin(fold.train.labels, test.among)) for fold in folds)
        folds = [replace(fold, train=fold.train.chosen(rows)) for fold, rows in zip(folds, learnt)]
    for number, fold in enumerate(folds):
        bank = class_tokens(measured, fold.train.source, "train", resize=RESIZE)
        queries = class_tokens(measured, fold.test.source, "test", resize=RESIZE)
        labels = torch.from_numpy(fold.train.labels)
        votes = knn_predict(bank.to(encoder.device), labels, queries, test.num_classes, chosen.k, chosen.temperature)
        for k, classes in predicted.items():
            classes[fold.rows] = votes[k].argmax(dim=-1).cpu().numpy()
        if number == 0:
            _gallery(bank, queries, fold, context)
    rows: list[Row] = []
    counts = [len(fold.train) for fold in folds]
    equal = equal_features(fold.train.source, bank)
    for k, classes in predicted.items():
        few = (f"knn.k={k}: all of the {min(counts):,} training pictures vote",) * (k > min(counts))
        settings = {"k": k, "temperature": chosen.temperature, "image_size": context.image_size}
        shared = {"n_train": round(np.mean(counts)), "settings": settings, "warnings": equal + few}
        fields = {"variant": f"k = {k}", **shared}
        rows.append(accuracy_row(measured, test, classes, measured.task.metric, tables=not rows, **fields))
        rows += corruption_rows(measured, test, classes, **fields)
    return rows


def _gallery(bank: Tensor, queries: Tensor, fold: Fold[Labelled], context: Context) -> None:
    """Strips of a test image and its nearest training images; green edges for those of its class."""
    if context.examples is None:
        return
    train, test = fold.train, fold.test
    generator = torch.Generator().manual_seed(context.seed)
    picked = torch.randperm(len(test), generator=generator)[: context.num_examples]
    _, nearest = nearest_neighbours(bank, queries[picked], min(GALLERY, len(train)))
    for number, (query, neighbours) in enumerate(zip(picked.tolist(), nearest.tolist())):
        panels = [framed(shown(read_picture(test.source, query)), SIDE, 3, BLUE)]
        for index in neighbours:
            edge = GREEN if train.labels[index] == test.labels[query] else RED
            panels.append(framed(shown(read_picture(train.source, index)), SIDE, 3, edge))
        context.save_example(strip(panels), "knn", number)


def logistic(measured: Measurement) -> list[Row]:
    """The headline (top-1 or mean per class, as the task says) and the other of the two, in [0, 1].

    raises  as `labelled_folds` and `extract_features`
    """
    chosen, encoder, context = measured.options.logistic, measured.encoder, measured.context
    test, folds = labelled_folds(measured)
    pooled = chosen.token == "cls+mean"
    predicted, paths = np.empty(len(test), dtype=np.int64), list[Path]()
    for fold in folds:
        train, val = fold.train, fold.val
        features = class_tokens(measured, train.source, "train", pooled)
        validation = None if val is None else (class_tokens(measured, val.source, "val", pooled), val.labels)
        test_features = class_tokens(measured, fold.test.source, "test", pooled)
        given = {"seed": context.seed, "device": encoder.device, "validation": validation}
        paths.append(fit_classes(features, train, chosen, measured.task.metric, **given))
        predicted[fold.rows] = paths[-1].model.predict(test_features, test.answers).numpy()
    draw_mistakes(measured, test, predicted, "logistic")
    settings = {
        "C": per_fold([path.C.item() for path in paths]),
        "path": per_fold([path.scores for path in paths]),
        # Where it is true, a wider path might score higher.
        "edge": any(path.C.item() in (path.visited[0].C, chosen.max_c) for path in paths),
        "token": chosen.token if encoder.pools else "cls",
        "image_size": context.image_size,
        "converged": all(path.model.converged for path in paths),
    }
    val = folds[0].val
    share = f"a class-balanced {chosen.validation_share:.0%} of train, seed {context.seed}"
    learnt = round(np.mean([len(fold.train) for fold in folds])) + (0 if val is None else len(val))
    fields = {"chosen_on": share if val is None else OFFICIAL, "n_train": learnt, "settings": settings}
    return accuracy_rows(measured, test, predicted, warnings=equal_features(train.source, features), **fields)


def labelled_folds(measured: Measurement) -> tuple[Labelled, list[Fold[Labelled]]]:
    """All test images, with one class each, and every training with those that are tested after it.

    raises  UserError for a metric other than METRICS, and for a split that is missing or of another kind
    """
    measured.check_metric("classification", METRICS)
    return measured.folds(Labelled, MISSING)


def accuracy_rows(measured: Measurement, test: Labelled, predicted: np.ndarray, **fields: Any) -> list[Row]:
    """Top-1 and mean per class accuracy, in [0, 1], of predicted classes (n,); the task's metric comes first."""
    first = measured.task.metric
    metrics = sorted(METRICS, key=lambda each: each != first)
    rows = [accuracy_row(measured, test, predicted, each, tables=each == first, **fields) for each in metrics]
    return rows + corruption_rows(measured, test, predicted, **fields)


def corruption_rows(measured: Measurement, test: Labelled, predicted: np.ndarray, **fields: Any) -> list[Row]:
    """The mean corruption error of predicted classes (n,) where the test images are corrupted; else no row.

    The errors of each corruption, over those of a reference network, are averaged over the corruptions: 1 is as bad as
    the reference (Hendrycks and Dietterich, arXiv 1903.12261, section 4.1). Fields are those of Row.
    """
    if (reference := measured.data.extra.get("reference_errors")) is None:
        return []
    corruption, wrong = measured.data.extra["corruption"], predicted != test.labels
    images = np.bincount(corruption, minlength=len(reference))
    errors = np.bincount(corruption, weights=wrong, minlength=len(reference)) / images
    values, n = np.array(list(reference.values())), len(test)
    cost = wrong * (n / (len(values) * images * values))[corruption]  # its mean is the mean corruption error
    details = {"errors": dict(zip(reference, errors.tolist()))}
    shared = {"metric": "mCE", "higher_is_better": False, "n_test": n, "details": details, **fields}
    return [measured.row(float(cost.mean()), bootstrap_interval(cost, seed=measured.context.seed), **shared)]


def accuracy_row(
    measured: Measurement, test: Labelled, predicted: np.ndarray, metric: str, tables: bool = False, **fields: Any
) -> Row:
    """One of METRICS, in [0, 1], with its 95 % interval, beside chance and the largest class; both metrics in details.

    predicted  (n,) classes of the test images, or (R, n) of them after each of R draws of labels, whose mean it is
    tables     also `class_tables` in the details, and of one's own pictures the class said of each, as "answers"
    fields     of Row
    """
    seed, draws = measured.context.seed, np.atleast_2d(predicted)
    values = {name: float(np.mean([scored(draw, test.labels) for draw in draws])) for name, scored in METRICS.items()}
    details: dict[str, Any] = {"micro and macro": values, **fields.pop("details", {})}
    if tables:
        details |= class_tables(draws[0], test.labels, measured.data.names(test.num_classes))
    if tables and test.source.as_trained:
        details["answers"] = packed(draws[0], "<i4")
    shared = {"metric": metric, "n_test": len(test), "chance": 1.0 / len(test.answers), "details": details, **fields}
    clusters, learnt = measured.clusters(test), measured.data.splits.get("train", test)

    def row(said: np.ndarray, value: float) -> Row:
        return measured.row(value, draws_interval(said, test.labels, metric, seed=seed, clusters=clusters), **shared)

    counts = np.bincount(learnt.labels, minlength=test.num_classes)[test.answers]
    constant = np.full(len(test), test.answers[counts.argmax()])
    return with_majority(row(draws, values[metric]), row(constant[None], METRICS[metric](constant, test.labels)))


def class_tables(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """What became of each class, and which are taken for which.

    predicted, labels  (n,) classes said and true
    returns  "classes"     [{"class", "n" test images, "recall", "precision"}]; NaN where none is of it, or said to be
             "confusion"   for up to MOST_CLASSES [[images of class i said to be of class j]]
             "confusions"  else [[class, said to be, images]], as many of the largest
    """
    K = len(names)
    pairs, counts = np.unique(labels * K + predicted, return_counts=True)
    true, said = np.divmod(pairs, K)
    right = np.bincount(true[true == said], weights=counts[true == said], minlength=K)
    of_class, named = (np.bincount(each, weights=counts, minlength=K) for each in (true, said))
    with np.errstate(invalid="ignore"):
        columns = (names, of_class.astype(int).tolist(), (right / of_class).tolist(), (right / named).tolist())
    found: dict[str, Any] = {
        "classes": [dict(zip(("class", "n", "recall", "precision"), row)) for row in zip(*columns)]
    }
    if K <= MOST_CLASSES:
        matrix = np.zeros((K, K), dtype=int)
        matrix[true, said] = counts
        return found | {"confusion": matrix.tolist()}
    wrong = np.flatnonzero(true != said)
    largest = wrong[np.argsort(-counts[wrong], kind="stable")][:MOST_CLASSES]
    return found | {"confusions": [[names[true[at]], names[said[at]], int(counts[at])] for at in largest]}


def class_tokens(
    measured: Measurement, source: Source, what: str, mean_patch: bool = False, resize: float = 1.0
) -> Tensor:
    """Frozen class tokens of the centre crops of a source, (n, D), on the CPU, of the type on disk.

    what        description of the images, beside the progress
    mean_patch  the mean patch token beside the class token, (n, 2 D), where the encoder's has its width
    resize      short side over the crop's side, as published; of one's own pictures the weights say it
    raises      as `extract_features`
    """
    given: dict[str, Any] = {"mean_patch": mean_patch, "what": f"features of {what}"}
    crop = measured.context.crop(source, resize)
    return feature_matrix(extract_features(measured.context, measured.encoder, source, crop, **given))


def fit_classes(features: Tensor, train: Labelled, options: LogisticOptions, metric: str, **given: Any) -> Path:
    """Logistic regression on the features (n, D) of training images, C chosen by a metric of METRICS.

    given   further options of `select_and_fit`: seed, device, validation
    raises  as `select_and_fit`
    """
    Cs = np.geomspace(options.min_c, options.max_c, options.num_c).tolist()
    given |= {"validation_share": options.validation_share, "pictures": train.pictures, "score": METRICS[metric]}
    return select_and_fit(features, train.labels, train.num_classes, Cs, **given)


def equal_features(source: Source, features: Tensor) -> tuple[str, ...]:
    """A doubt where all training images of a source have the same feature (n, D), with the likely cause; else none."""
    rows = features[torch.linspace(0, len(features) - 1, min(len(features), 256)).long()].double()
    if len(rows) < 2 or bool((rows - rows[0]).norm(dim=1).max() > 1e-5 * rows[0].norm()):
        return ()
    places, crop = (0, len(source) - 1), CentreCrop(PICTURE_SIZE, PICTURE_SIZE)
    first, last = (crop(read_picture(source, place)) for place in places)
    pair = " and ".join(map(source.name, places))
    if np.array_equal(first, last):
        flat = f", every value {first.flat[0]:g}: is the range of values right?" if np.ptp(first) == 0 else ""
        cause = f"the pictures are equal, too, as {pair}{flat}"
    else:
        cause = f"pictures as {pair} differ: the weights tell nothing apart, they have collapsed or are not these"
    return (f"equal features: every training image has the same feature; {cause}",)


def draw_mistakes(measured: Measurement, test: Labelled, predicted: np.ndarray, prefix: str) -> None:
    """Save examples of test images with their predicted class (n,); half of them mistakes, where there are any."""
    names = measured.data.names(test.num_classes)

    def lines(index: int) -> list[str]:
        answer, true = names[predicted[index]], names[test.labels[index]]
        return [answer] if answer == true else [f"said {answer}", f"is {true}"]

    draw_predictions(test.source, predicted != test.labels, lines, measured.context, prefix)


def draw_predictions(
    source: Source, wrong: np.ndarray, lines: Callable[[int], list[str]], context: Context, prefix: str
) -> None:
    """Save examples, with lines of text below and a red edge where `wrong` (n,) bool is true, else a green one.

    lines   index of an image -> its lines of text
    prefix  of the files' names
    """
    if context.examples is None:
        return
    order = np.random.default_rng(context.seed).permutation(len(wrong))
    mistakes, right = order[wrong[order]], order[~wrong[order]]
    at_most = max(context.num_examples // 2, context.num_examples - len(right))
    picked = [*mistakes[:at_most], *right][: context.num_examples]
    for number, index in enumerate(int(each) for each in picked):
        picture = framed(shown(read_picture(source, index)), PICTURE_SIZE, 4, GREEN if not wrong[index] else RED)
        caption = "\n".join(line[:38] for line in lines(index))
        context.save_example(strip([picture], [caption]), prefix, number)


def framed(image: Image.Image, side: int, width: int, edge: tuple[int, int, int]) -> Image.Image:
    """The centre crop of an RGB image, `side` pixels high and wide, in a frame `width` pixels wide.

    edge  RGB colour of the frame, 0..255
    """
    return ImageOps.expand(Image.fromarray(CentreCrop(side, side)(image)), width, edge)
