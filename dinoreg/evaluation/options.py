"""Every option of an evaluation: what is evaluated and where, and one section for each protocol.

The defaults are the published protocols. The comment behind an option is its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dinoreg.config.schema import check


@dataclass(frozen=True)
class KnnOptions:
    k: tuple[int, ...] = (10, 20, 100, 200)  # neighbours; all are reported
    temperature: float = 0.07  # of the votes' softmax


@dataclass(frozen=True)
class LogisticOptions:
    min_c: float = 1e-6  # weakest inverse regularisation of the path
    max_c: float = 1e5  # strongest
    num_c: int = 45  # values of C between them, evenly on a log scale
    patience: int | None = 6  # end the path after this many values without gain; none: visit all
    validation_share: float = 0.1  # of train, held out for choosing C where no validation split is official
    token: str = "cls"  # cls | cls+mean (class token and mean patch side by side)


@dataclass(frozen=True)
class LinearOptions:
    lrs: tuple[float, ...] = (
        1e-5,
        2e-5,
        5e-5,
        1e-4,
        2e-4,
        5e-4,
        1e-3,
        2e-3,
        5e-3,
        1e-2,
        2e-2,
        5e-2,
        0.1,
    )  # per 256 images
    blocks: tuple[int, ...] = (1, 4)  # last blocks whose class tokens are concatenated
    avgpool: tuple[int, ...] = (0, 1)  # 1: the mean patch token is appended
    epochs: int = 10  # of `epoch_steps` steps
    epoch_steps: int | None = 1250  # none: one pass over the training images
    batch_size: int = 1024  # images a step
    choose_on: str = "test"  # the best head: test (as published, on the reported split) | train (on a held-out tenth)
    augment: bool = True  # random resized crops and flips, streamed; false: heads on the cached centre-crop features


@dataclass(frozen=True)
class MultilabelOptions:
    min_c: float = 1e-6  # weakest inverse regularisation of the path
    max_c: float = 1e5  # strongest
    num_c: int = 45  # values of C between them, evenly on a log scale
    patience: int | None = 6  # end a class's path after this many values without gain; none: visit all
    validation_share: float = 0.1  # of train, held out for choosing C where no validation split is official

    def __post_init__(self) -> None:
        check(0 < self.min_c <= self.max_c, "multilabel.min_c", self.min_c, "above 0 and at most multilabel.max_c")
        check(self.num_c >= 1, "multilabel.num_c", self.num_c, "at least 1 value")
        check(self.patience is None or self.patience >= 1, "multilabel.patience", self.patience, "none or at least 1")
        check(0 < self.validation_share < 1, "multilabel.validation_share", self.validation_share, "between 0 and 1")


@dataclass(frozen=True)
class SegmentationOptions:
    size: int = 512  # pixels of the short side, of training crops and of the sliding window
    stride: int = 341  # pixels between windows
    steps: int = 40_000  # of training
    warmup_steps: int = 1500  # linear warm-up
    batch_size: int = 16  # crops a step
    lrs: tuple[float, ...] = (1e-3,)  # AdamW; several are trained at once and all reported
    weight_decays: tuple[float, ...] = (1e-4,)  # each is combined with every rate

    def __post_init__(self) -> None:
        check(self.size >= 1, "segmentation.size", self.size, "a positive number of pixels")
        check(
            1 <= self.stride <= self.size,
            "segmentation.stride",
            self.stride,
            f"1 to segmentation.size={self.size} pixels, so that windows leave no gap",
        )
        check(self.steps >= 1, "segmentation.steps", self.steps, "at least 1 step")
        check(self.warmup_steps >= 0, "segmentation.warmup_steps", self.warmup_steps, "zero or more steps")
        check(self.batch_size >= 1, "segmentation.batch_size", self.batch_size, "at least 1 crop")
        check(
            bool(self.lrs) and all(0 < lr < math.inf for lr in self.lrs),
            "segmentation.lrs",
            list(self.lrs),
            "one or more positive numbers",
        )
        check(
            bool(self.weight_decays) and all(0 <= decay < math.inf for decay in self.weight_decays),
            "segmentation.weight_decays",
            list(self.weight_decays),
            "one or more numbers, none negative",
        )


@dataclass(frozen=True)
class DepthOptions:
    variants: tuple[int, ...] = (1, 4)  # lin.1 (last block) and lin.4 (four blocks)
    steps: int = 38_400  # of training
    warmup_steps: int = 12_800  # linear warm-up; a third of the steps at most
    batch_size: int = 16  # crops a step
    lrs: tuple[float, ...] = (1e-4,)  # AdamW; several are trained at once, the best is quoted
    weight_decay: float = 0.01  # of AdamW
    num_bins: int = 256  # uniform in depth
    min_depth: float = 1e-3  # metres
    max_depth: float = 10.0  # metres
    max_size: int = 640  # pixels of the long side that the backbone sees at most; scored at the image's own size

    def __post_init__(self) -> None:
        check(len(self.variants) > 0 and min(self.variants) >= 1, "depth.variants", self.variants, "numbers of blocks")
        check(len(self.lrs) > 0 and min(self.lrs) > 0, "depth.lrs", self.lrs, "positive rates")
        for key in ("steps", "batch_size", "max_size"):
            check(getattr(self, key) >= 1, f"depth.{key}", getattr(self, key), "at least 1")
        check(self.num_bins >= 2, "depth.num_bins", self.num_bins, "at least 2 bins")
        check(self.warmup_steps >= 0, "depth.warmup_steps", self.warmup_steps, "zero or more steps")
        check(
            0 < self.min_depth < self.max_depth, "depth.min_depth", self.min_depth, f"metres in (0, {self.max_depth})"
        )


@dataclass(frozen=True)
class DiscoveryOptions:
    feature: str = "key"  # query | key | value | token
    blocks: tuple[int, ...] = (-1,)  # blocks to try; the best is quoted and the sweep is shown
    biases: tuple[float, ...] = (0.0,)  # added to the Gram matrix before thresholding
    normalise: bool = False  # L2-normalise features, so that the Gram matrix holds cosines
    k_patches: int = 100  # low-degree patches that the seed may expand to

    def __post_init__(self) -> None:
        kinds = ("query", "key", "value", "token")
        check(self.feature in kinds, "discovery.feature", self.feature, "query, key, value or token")
        check(len(self.blocks) > 0, "discovery.blocks", self.blocks, "at least one block")
        check(len(self.biases) > 0, "discovery.biases", self.biases, "at least one bias")
        check(self.k_patches >= 1, "discovery.k_patches", self.k_patches, "at least one patch")


@dataclass(frozen=True)
class DetectionOptions:
    size: int = 640  # pixels of the short side
    max_size: int = 1024  # pixels of the long side at most
    steps: int = 20_000  # of training
    warmup_steps: int = 500  # linear warm-up, a tenth of the steps at most; a cosine to zero follows
    batch_size: int = 16  # images a step
    lrs: tuple[float, ...] = (1e-3,)  # AdamW; several are trained at once and all reported
    weight_decay: float = 1e-4  # of AdamW
    nms: float = 0.6  # overlap above which the weaker of two boxes of a class goes
    max_boxes: int = 100  # kept per image

    def __post_init__(self) -> None:
        check(self.size >= 1, "detection.size", self.size, "a positive number of pixels")
        check(self.max_size >= self.size, "detection.max_size", self.max_size, "at least detection.size")
        check(self.steps >= 1, "detection.steps", self.steps, "at least one step")
        check(self.batch_size >= 1, "detection.batch_size", self.batch_size, "at least one image")
        rates = len(set(self.lrs)) == len(self.lrs) > 0 and all(rate > 0 for rate in self.lrs)
        check(rates, "detection.lrs", self.lrs, "one or more different positive rates")
        check(0 <= self.nms <= 1, "detection.nms", self.nms, "an overlap in [0, 1]")
        check(self.max_boxes >= 1, "detection.max_boxes", self.max_boxes, "at least one box")


@dataclass(frozen=True)
class FlowOptions:
    upscale: int = 1  # image sides times this before encoding; 2 gives a grid twice as fine
    temperature: float = 0.05  # of the zero-shot softmax over matches; the projection's learned one starts here
    window: int = 3  # patches to each side of the best match in the zero-shot soft-argmax; 0: the whole frame
    dim: int = 128  # width of the linear projection
    steps: int = 2000  # of training the projection
    lr: float = 1e-3  # AdamW
    batch_size: int = 4  # pairs a step

    def __post_init__(self) -> None:
        for key in ("upscale", "dim", "steps", "batch_size"):
            check(getattr(self, key) >= 1, f"flow.{key}", getattr(self, key), "at least 1")
        check(0 < self.temperature < math.inf, "flow.temperature", self.temperature, "a positive number")
        check(self.window >= 0, "flow.window", self.window, "zero or more patches")
        check(0 < self.lr < math.inf, "flow.lr", self.lr, "a positive number")


@dataclass(frozen=True)
class FewShotOptions:
    shots: tuple[int, ...] = (1, 5, 10)  # labelled images per class
    shares: tuple[float, ...] = (0.01, 0.1, 1.0)  # of the labels
    repeats: int = 5  # draws of each, averaged

    def __post_init__(self) -> None:
        check(all(each >= 1 for each in self.shots), "few_shot.shots", self.shots, "whole numbers of at least 1")
        check(all(0 < each <= 1 for each in self.shares), "few_shot.shares", self.shares, "shares above 0 and up to 1")
        check(bool(self.shots or self.shares), "few_shot.shots", self.shots, "at least one shot or share")
        check(self.repeats >= 1, "few_shot.repeats", self.repeats, "at least 1 draw")


@dataclass(frozen=True)
class EvalOptions:
    weights: str | None = (
        None  # a run, a weight file, a model name (random weights), timm:NAME[:FILE], a transformers folder
    )
    root: str | None = None  # the folder that holds the datasets' folders
    out: str | None = None  # where results go; none: the run's own folder, or runs/eval/WEIGHTS
    protocols: list[str] | None = None  # only these; none: all that a dataset declares
    seed: int = 0  # of splits, heads, sampling and bootstrap
    device: str = "auto"  # auto | cpu | cuda | cuda:0 | mps
    precision: str = "auto"  # of the backbone: auto (bf16 where the hardware has it) | bf16 | fp16 | fp32
    image_size: int | None = None  # pixels of square crops; none: 224, or the model's own where that is less
    batch_size: int = 64  # images the backbone sees at once
    workers: int | None = None  # decoding threads; none: one for every core but one
    baselines: bool = True  # also random init of the same architecture and raw pixels
    strict: bool = False  # counts that differ from the official ones are errors
    overwrite: bool = False  # measure again what has a result already
    features: str | None = None  # folder of cached features; none: OUT/features
    features_dtype: str = "float32"  # float32 | float16, on disk
    examples: int = 8  # pictures of predictions per dataset
    report: bool = True  # write the report and tables; false: several evaluations share `out`, dinoreg report is later
    knn: KnnOptions = field(default_factory=KnnOptions)
    logistic: LogisticOptions = field(default_factory=LogisticOptions)
    linear: LinearOptions = field(default_factory=LinearOptions)
    multilabel: MultilabelOptions = field(default_factory=MultilabelOptions)
    segmentation: SegmentationOptions = field(default_factory=SegmentationOptions)
    depth: DepthOptions = field(default_factory=DepthOptions)
    discovery: DiscoveryOptions = field(default_factory=DiscoveryOptions)
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    few_shot: FewShotOptions = field(default_factory=FewShotOptions)

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1 image")
        check(self.seed >= 0, "seed", self.seed, "zero or a positive whole number")
        check(
            self.precision in ("auto", "bf16", "fp16", "fp32"), "precision", self.precision, "auto, bf16, fp16 or fp32"
        )
        check(
            self.image_size is None or self.image_size > 0, "image_size", self.image_size, "a positive number of pixels"
        )
        check(self.workers is None or self.workers >= 0, "workers", self.workers, "zero or more threads")
        check(self.examples >= 0, "examples", self.examples, "zero or more pictures")
        check(
            self.features_dtype in ("float32", "float16"), "features_dtype", self.features_dtype, "float32 or float16"
        )
