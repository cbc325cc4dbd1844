"""What single tokens hold: a logistic probe from one kind of token, and the loss when a token's content is replaced.
The probe is that of Registers (arXiv 2309.16588, tables 1 and 4): the class of the image from the class token, from a
register, from an ordinary patch, from an outlier. The controls are those of Parodi et al. (arXiv 2604.14433): zeros are
outside the distribution that the network knows, so a loss under zeros proves little; the token's mean, noise of the
same mean and deviation, or its content in another image are replacements within that distribution.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinoreg.evaluation.comparison import compare
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.logistic_regression import LogisticModel
from dinoreg.evaluation.solvers.regularisation_path import select_and_fit
from dinoreg.models.vit import RegisterViT

CONTROLS = ("zero", "mean", "noise", "shuffle")
TEST_SHARE = 0.3  # of the labelled images
CS = tuple(10.0**power for power in range(-4, 4))  # inverse L2 strengths to choose from on held-out training images


class Probed(NamedTuple):
    """Accuracy of one token's probe in [0, 1] with its 95 % bootstrap interval over the test images, and the fit.

    tested  (n,) bool, the images that are tested on
    """

    row: Row
    model: LogisticModel
    tested: Tensor

    def record(self) -> dict[str, Any]:
        """The figures alone."""
        return {
            "accuracy": self.row.value,
            **{key: getattr(self.row, key) for key in ("low", "high", "n_train", "n_test")},
        }

    def against(self, other: "Probed") -> dict[str, Any] | None:
        """The paired difference to another token's probe, as `comparison.compare` gives it; None on other images."""
        return compare(self.row, other.row) if torch.equal(self.tested, other.tested) else None


def probe_token(
    features: Tensor, labels: Tensor, num_classes: int, test: Tensor, present: Tensor | None = None, seed: int = 0
) -> Probed | None:
    """The class of an image from one token of it, by logistic regression (Registers, arXiv 2309.16588, table 1).

    features  (n, D)  one token an image
    labels    (n,)    int64 in [0, num_classes)
    test      (n,)    bool: images to test on; the others train
    present   (n,)    bool: images that have such a token; the others take no part
    returns   None where fewer than 20 images are left to learn from, none to test on, or one class alone
    """
    present = torch.ones_like(test) if present is None else present
    train, tested = present & ~test, present & test
    # From fewer images, what is learnt says nothing.
    if int(train.sum()) < 20 or not tested.any() or len(labels[train].unique()) < 2:
        return None
    fitted = select_and_fit(features[train], labels[train], num_classes, CS, seed=seed, standardize=True).model
    right = (fitted.predict(features[tested]).cpu() == labels[tested]).numpy()
    interval = bootstrap_interval(right, seed=seed)
    counts: dict[str, Any] = {"n_train": int(train.sum()), "n_test": int(tested.sum())}
    ends = interval.low, interval.high
    row = Row("probe", "top-1", float(right.mean()), *ends, **counts, replicates=tuple(interval.replicates))
    return Probed(row, fitted, tested)


def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the content of some tokens after every block; in one pass, with float64 sums.

    batches  (L, k, S, D), k rows, at least one, of S tokens: each register, or a single outlier wherever it is
    returns  (L, S, D) float32 each
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        rows = batch.double()
        count, total, squares = count + rows.shape[1], total + rows.sum(dim=1), squares + rows.square().sum(dim=1)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()


def replacement(
    kind: str, contents: Tensor, known: tuple[Tensor, Tensor], generator: torch.Generator | None = None
) -> Tensor:
    """What to put in place of the contents (L, k, S, D) of some tokens, of the same shape.

    kind    "zero"; "mean" of that slot and block; "noise" with that mean and deviation, one draw for all blocks;
            "shuffle": the contents of another row, half the rows away
    known   `moments` of such tokens
    """
    if kind == "zero":
        return torch.zeros_like(contents)
    mean, std = (each[:, None].to(contents) for each in known)
    if kind == "mean":
        return mean.expand_as(contents)
    if kind == "noise":
        return mean + std * torch.randn(contents.shape[1:], generator=generator).to(contents)
    return contents.roll(max(contents.shape[1] // 2, 1), dims=1)


@contextmanager
def replaced(model: RegisterViT, where: Tensor, contents: Tensor, first_block: int = 0) -> Iterator[None]:
    """Context in which every block's output has its tokens at `where` replaced, for a batch of the same images.

    where        (B, T) bool: tokens of the sequence, class token first
    contents     (L, k, D): what they become after each block, k = where.sum(), image by image
    first_block  number from 0 of the first block whose output is changed
    """
    rows = where.flatten().nonzero()[:, 0]

    def replace(block: int, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[rows.to(output.device)] = contents[block].to(output)
        return changed

    with ExitStack() as handles:
        for block in range(first_block, model.depth):
            hook: Any = partial(replace, block)
            handles.enter_context(model.blocks[block].register_forward_hook(hook))
        yield
