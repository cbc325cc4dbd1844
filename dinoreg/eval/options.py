"""Every option of an evaluation: what is evaluated and where, and one section for each protocol.

The defaults are the published protocols (reference datasets §3, P1 to P9). The comment behind an option is its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dinoreg.options import check


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
    augment: bool = True  # random resized crops and flips, streamed; false: heads on the cached centre-crop features


@dataclass(frozen=True)
class MultilabelOptions:
    min_c: float = 1e-6  # weakest inverse regularisation of the path
    max_c: float = 1e5  # strongest
    num_c: int = 45  # values of C between them, evenly on a log scale


@dataclass(frozen=True)
class SegmentationOptions:
    size: int = 512  # pixels of the short side, of training crops and of the sliding window
    stride: int = 341  # pixels between windows
    steps: int = 40_000  # of training
    warmup_steps: int = 1500  # linear warm-up
    batch_size: int = 16  # crops a step
    lrs: tuple[float, ...] = (1e-3,)  # AdamW; several are trained at once and all reported
    weight_decays: tuple[float, ...] = (1e-4,)  # each is combined with every rate


@dataclass(frozen=True)
class DepthOptions:
    variants: tuple[int, ...] = (1, 4)  # lin.1 (last block) and lin.4 (four blocks)
    steps: int = 38_400  # of training
    warmup_steps: int = 12_800  # linear warm-up
    batch_size: int = 16  # crops a step
    lrs: tuple[float, ...] = (1e-4,)  # AdamW; several are trained at once and all reported
    weight_decay: float = 0.01  # of AdamW
    num_bins: int = 256  # uniform in depth
    min_depth: float = 1e-3  # metres
    max_depth: float = 10.0  # metres


@dataclass(frozen=True)
class DiscoveryOptions:
    feature: str = "key"  # query | key | value | token
    blocks: tuple[int, ...] = (-1,)  # blocks to try; the best is quoted and the sweep is shown
    biases: tuple[float, ...] = (0.0,)  # added to the Gram matrix before thresholding
    normalise: bool = False  # L2-normalise features, so that the Gram matrix holds cosines
    k_patches: int = 100  # low-degree patches that the seed may expand to


@dataclass(frozen=True)
class DetectionOptions:
    size: int = 640  # pixels of the short side
    max_size: int = 1024  # pixels of the long side at most
    steps: int = 20_000  # of training
    batch_size: int = 16  # images a step
    lrs: tuple[float, ...] = (1e-3,)  # AdamW; several are trained at once and all reported
    nms: float = 0.6  # overlap above which the weaker of two boxes of a class goes
    max_boxes: int = 100  # kept per image


@dataclass(frozen=True)
class FlowOptions:
    upscale: int = 1  # image sides times this before encoding; 2 gives a grid twice as fine
    temperature: float = 0.05  # of the softmax over matches
    window: int = 3  # patches around the best match in the soft-argmax; 0: all
    dim: int = 128  # width of the linear projection
    steps: int = 2000  # of training the projection
    lr: float = 1e-3  # AdamW
    batch_size: int = 4  # pairs a step


@dataclass(frozen=True)
class FewShotOptions:
    shots: tuple[int, ...] = (1, 5, 10)  # labelled images per class
    shares: tuple[float, ...] = (0.01, 0.1, 1.0)  # of the labels
    repeats: int = 5  # draws of each, averaged


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
