"""Every option of an evaluation: what is evaluated and where, and one section for each protocol.

The defaults are the published protocols.
"""

from dataclasses import dataclass
from functools import partial

from dinoreg.config.option import Options, check, fraction, option, output, section
from dinoreg.config.schema import DEVICE, MAX_SEED, PRECISIONS, VALUE_RANGE
from dinoreg.config.view_settings import MAX_SIDE

pixels = partial(option, unit="pixel", low=1, high=MAX_SIDE)
side_option = partial(option, shapes_result=False)  # the numbers of a result do not depend on it


@dataclass(frozen=True)
class KnnOptions(Options, section="knn"):
    """Weighted k-NN on class tokens: DINOv2's `eval/knn.py`, after Wu et al. (arXiv 1805.01978)."""

    k: tuple[int, ...] = option((10, 20, 100, 200), "neighbours; all are reported", low=1, high=1_000_000)
    temperature: float = option(0.07, "of the votes' softmax", above=0)


@dataclass(frozen=True)
class _PathOptions(Options):
    """Logistic regression along a path of regularisations."""

    min_c: float = option(1e-6, "weakest inverse regularisation of the path", above=0)
    max_c: float = option(1e5, "strongest", above=0)
    num_c: int = option(45, "values of C between them, evenly on a log scale", low=1, high=10_000)
    validation_share: float = option(0.1, "of train, to choose C by without a split", above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = f"at most {self._section}max_c={self.max_c:g}"
        check(self.min_c <= self.max_c, f"{self._section}min_c", self.min_c, limit)


@dataclass(frozen=True)
class LogisticOptions(_PathOptions, section="logistic"):
    """Logistic regression on a frozen token (SimCLR, arXiv 2002.05709, App. B.8.1; DINOv2, arXiv 2304.07193, §7.2)."""

    token: str = option("cls", "cls+mean: class token and mean patch side by side", choices=("cls", "cls+mean"))


@dataclass(frozen=True)
class MultilabelOptions(_PathOptions, section="multilabel"):
    """One binary logistic regression per class, each with its own path (SimCLR, arXiv 2002.05709, App. B.8.1)."""


# Learning rates of the linear grid, per 256 images.
LINEAR_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True)
class _GridOptions(Options):
    """Classifiers of several rates, trained at once on frozen features."""

    epochs: int = option(10, "of `epoch_steps` steps", low=1, high=1_000_000)
    epoch_steps: int | None = option(1250, "none: one pass over the training images", low=1)
    batch_size: int = option(1024, "images a step", low=1, high=1_000_000)
    choose_on: str = option("test", "the best head; train: on a held-out tenth", choices=("test", "train"))
    augment: bool = option(True, "random resized crops and flips; false: heads on the features of centre crops")


@dataclass(frozen=True)
class LinearOptions(_GridOptions, section="linear"):
    """A grid of linear classifiers on frozen features, trained at once (DINOv2, arXiv 2304.07193, App. B.3)."""

    lrs: tuple[float, ...] = option(LINEAR_LRS, "per 256 images", above=0)
    blocks: tuple[int, ...] = option((1, 4), "last blocks whose class tokens are concatenated", low=1)
    avgpool: tuple[int, ...] = option((0, 1), "1: the mean patch token is appended", low=0, high=1)


@dataclass(frozen=True)
class AttentionOptions(_GridOptions, section="attention"):
    """Attention probes on frozen tokens: one learnt query gathers what a linear classifier sees."""

    choose_on: str = option("train", "the best rate: on a held-out tenth; test", choices=("test", "train"))
    lrs: tuple[float, ...] = option((1e-4, 3e-4, 1e-3, 3e-3), "AdamW", above=0)
    weight_decay: float = option(0.01, "of AdamW", low=0)


@dataclass(frozen=True)
class _WindowOptions(Options):
    """A sliding window over test images."""

    size: int = pixels(512, "of the short side, of training crops and of the sliding window")
    stride: int | None = pixels(None, "between windows; none: two thirds of their size")

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = f"at most {self._section}size={self.size} pixels, so that windows leave no gap"
        check((self.stride or 1) <= self.size, f"{self._section}stride", self.stride, limit)


@dataclass(frozen=True)
class SegmentationOptions(_WindowOptions, section="segmentation"):
    """A linear segmentation head on frozen patch tokens (DINOv2, arXiv 2304.07193, §7.4)."""

    steps: int = option(40_000, "of training", low=1)
    warmup_steps: int = option(1500, "linear warm-up", low=0)
    batch_size: int = option(16, "crops a step", low=1, high=1_000_000)
    lrs: tuple[float, ...] = option((1e-3,), "AdamW; several are trained at once and all reported", above=0)
    weight_decays: tuple[float, ...] = option((1e-4,), "each is combined with every rate", low=0)


@dataclass(frozen=True)
class KnnSegmentationOptions(_WindowOptions, section="knn_segmentation"):
    """Segmentation by the nearest patches of training images (Hummingbird, arXiv 2306.01667), without training."""

    k: int = option(30, "neighbours", low=1, high=1_000_000)
    temperature: float = option(0.02, "of the softmax of their cosines", above=0)
    memory: int = option(1_024_000, "patches remembered at most, as many of every image", low=1, high=100_000_000)


@dataclass(frozen=True)
class DepthOptions(Options, section="depth"):
    """Linear depth heads on frozen tokens, expected depth over bins (DINOv2, arXiv 2304.07193, §7.4)."""

    variants: tuple[int, ...] = option((1, 4), "lin.1 (last block) and lin.4 (four blocks)", low=1)
    steps: int = option(38_400, "of training", low=1)
    warmup_steps: int = option(12_800, "linear warm-up; a third of the steps at most", low=0)
    batch_size: int = option(16, "crops a step", low=1, high=1_000_000)
    lrs: tuple[float, ...] = option((1e-4,), "AdamW; several are trained at once, the best is quoted", above=0)
    weight_decay: float = option(0.01, "of AdamW", low=0)
    num_bins: int = option(256, "uniform in depth", low=2, high=65_536)
    min_depth: float = option(1e-3, "of the bins and of what is scored", unit="metre", above=0)
    max_depth: float = option(10.0, "likewise", unit="metre", above=0)
    max_size: int = pixels(640, "of the long side that the backbone sees at most")
    min_size: int = pixels(1, "of the short side that it sees at least")

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = f"less than depth.max_depth={self.max_depth:g} metres"
        check(self.min_depth < self.max_depth, "depth.min_depth", self.min_depth, limit)


@dataclass(frozen=True)
class DiscoveryOptions(Options, section="discovery"):
    """Object discovery by LOST (arXiv 2109.14279), its Gram matrix biased as in Registers (arXiv 2309.16588, §3.3)."""

    feature: str = option("key", "of each patch", choices=("query", "key", "value", "token"))
    blocks: tuple[int, ...] = option((-1,), "blocks to try; the best is quoted and the sweep is shown")
    biases: tuple[float, ...] = option((0.0,), "added to the Gram matrix before thresholding")
    normalise: bool = option(False, "L2-normalise features, so that the Gram matrix holds cosines")
    k_patches: int = option(100, "low-degree patches that the seed may expand to", low=1, high=1_000_000)


@dataclass(frozen=True)
class DetectionOptions(Options, section="detection"):
    """A linear box head on frozen patch tokens, with FCOS's targets and loss; a protocol of this project."""

    size: int = pixels(640, "of the short side")
    max_size: int = pixels(1024, "of the long side at most")
    steps: int = option(20_000, "of training", low=1)
    warmup_steps: int = option(500, "linear warm-up, a tenth of the steps at most, times a cosine to zero", low=0)
    batch_size: int = option(16, "images a step", low=1, high=1_000_000)
    lrs: tuple[float, ...] = option((1e-3,), "AdamW; several are trained at once and all reported", above=0)
    weight_decay: float = option(1e-4, "of AdamW", low=0)
    nms: float = fraction(0.6, "overlap above which the weaker of two boxes of a class goes")
    max_boxes: int = option(100, "kept per image", low=1, high=10_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = f"at least detection.size={self.size}"
        check(self.max_size >= self.size, "detection.max_size", self.max_size, limit)
        check(len(set(self.lrs)) == len(self.lrs), "detection.lrs", self.lrs, "different rates")


@dataclass(frozen=True)
class RetrievalOptions(Options, section="retrieval"):
    """Instance retrieval by cosines of frozen features (Radenovic et al., arXiv 1803.11285; DINOv2, section 7.3)."""

    size: int = pixels(448, "of the long side, of queries as of the others")


@dataclass(frozen=True)
class FlowOptions(Options, section="flow"):
    """Optical flow by matching frozen patch tokens, as they are and projected; a protocol of this project."""

    upscale: int = option(1, "image sides times this before encoding; 2 gives a grid twice as fine", low=1, high=64)
    temperature: float = option(0.05, "of the softmax over matches; the learned one starts here", above=0)
    window: int = option(3, "patches around the best match in the soft-argmax; 0: the frame", low=0, high=1_000)
    dim: int = option(128, "width of the linear projection", low=1, high=65_536)
    steps: int = option(2000, "of training the projection", low=1)
    lr: float = option(1e-3, "AdamW", above=0)
    batch_size: int = option(4, "pairs a step", low=1, high=1_000_000)


@dataclass(frozen=True)
class FewShotOptions(Options, section="few_shot"):
    """Logistic regression on few labels (sources in `protocols/few_shot.py`)."""

    shots: tuple[int, ...] = option((1, 5, 10), "labelled images per class", low=1, empty=True, high=1_000_000)
    shares: tuple[float, ...] = option((0.01, 0.1, 1.0), "of the labels", above=0, high=1, empty=True)
    repeats: int = option(5, "draws of each, averaged", low=1, high=10_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.shots or self.shares), "few_shot.shots", self.shots, "at least one shot or share")


@dataclass(frozen=True)
class SharedOptions(Options):
    """What `dinoreg eval` and `dinoreg verdict` have in common: weights, own pictures, machine."""

    weights: str | None = side_option(None, "a run, RUN/best, file, transformers folder, random:NAME, timm:NAME[:FILE]")
    columns: str = option("", "of own tables, as path:FILE,label:BREED,split:SET; path:RED,path:NIR: a file a channel")
    range: list[float] | None = option(None, "of own pictures, as data.range; none: the weights' own", **VALUE_RANGE)
    out: str | None = output(None, "of results; none: the run's own folder, or runs/eval/WEIGHTS", shapes_result=False)
    seed: int = option(0, "of splits, heads, sampling and bootstrap", low=0, high=MAX_SEED)
    device: str = side_option("auto", **DEVICE)
    precision: str = option("auto", "of the backbone; auto: bf16 where the hardware has it", choices=PRECISIONS)
    image_size: int | None = pixels(None, "of square crops; none: own as the weights state, else 224 or less")
    batch_size: int = side_option(64, "images the backbone sees at once", low=1, high=1_000_000)
    workers: int | None = side_option(None, "decoding threads; none: one for every core but one", low=0, high=1024)
    overwrite: bool = side_option(False, "measure again what has a result already")


@dataclass(frozen=True)
class EvalOptions(SharedOptions):
    """One evaluation: the weights, where datasets and results are, and the options of every protocol."""

    root: str | None = side_option(None, "the folder that holds the datasets' folders")
    protocols: list[str] | None = option(None, "only these; none: all that a dataset declares")
    baselines: bool = option(True, "also random init of the same architecture and raw pixels")
    strict: bool = side_option(False, "counts that differ from the official ones are errors")
    features: str | None = side_option(None, "folder of cached features; none: OUT/features")
    features_dtype: str = option("float32", "on disk", choices=("float32", "float16"))
    examples: int = side_option(8, "pictures of predictions per dataset", low=0, high=10_000)
    report: bool = side_option(True, "write the report and tables; false: dinoreg report does so later")
    knn: KnnOptions = section(KnnOptions)
    logistic: LogisticOptions = section(LogisticOptions)
    linear: LinearOptions = section(LinearOptions)
    attention: AttentionOptions = section(AttentionOptions)
    multilabel: MultilabelOptions = section(MultilabelOptions)
    segmentation: SegmentationOptions = section(SegmentationOptions)
    knn_segmentation: KnnSegmentationOptions = section(KnnSegmentationOptions)
    depth: DepthOptions = section(DepthOptions)
    discovery: DiscoveryOptions = section(DiscoveryOptions)
    detection: DetectionOptions = section(DetectionOptions)
    retrieval: RetrievalOptions = section(RetrievalOptions)
    flow: FlowOptions = section(FlowOptions)
    few_shot: FewShotOptions = section(FewShotOptions)
