"""The sections of a config: every option, its default and its unit, and the range that it must lie in.

The defaults are DINOv2's published short recipe (ViT-L/16 on ImageNet-1k) with registers, antialiased
position resampling and the blur as the paper documents it. The comment behind an option is its help text.
Crops, augmentation and masks are declared with the code that reads them, in `dinoreg.config.view_settings`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.runtime.errors import UserError


def check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise UserError(f"{key}={value}: expected {expected}")


@dataclass(frozen=True)
class ModelConfig:
    name: str = "vits14_reg4"  # vit{t,s,b,l,g}{8,14,16}_reg{0,1,4,…}, or an alias of Meta, timm or transformers
    dim: int | None = None  # width; none: by the name
    depth: int | None = None  # blocks; none: by the name
    heads: int | None = None  # attention heads; none: by the name
    ffn: str | None = None  # mlp | swiglu; none: by the name (swiglu for g)
    ffn_ratio: float = 4.0  # hidden width of the FFN over dim
    layerscale: float | None = 1e-5  # initial per-channel residual scale; none: no LayerScale
    drop_path: float = 0.3  # share of samples that skip a residual branch
    drop_path_uniform: bool = True  # the same rate in every block; false: linear from 0
    in_channels: int = 3  # image channels
    antialias: bool = True  # position grid resampled with antialiasing
    position_offset: float = 0.0  # 0: resample by size; 0.1: the reference's scale-factor form
    init_std: float = 0.02  # standard deviation of the linear layers at the start
    attention: str = "auto"  # auto | xformers | sdpa | plain
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool = False  # torch.compile the backbones (CUDA: minutes of start-up, faster steps)

    def __post_init__(self) -> None:
        check(0.0 <= self.drop_path < 1.0, "model.drop_path", self.drop_path, "a rate in [0, 1)")
        check(self.ffn in (None, "mlp", "swiglu"), "model.ffn", self.ffn, "mlp or swiglu")
        check(
            self.attention in ("auto", "xformers", "sdpa", "plain"),
            "model.attention",
            self.attention,
            "auto, xformers, sdpa or plain",
        )
        check(self.in_channels > 0, "model.in_channels", self.in_channels, "a positive number")
        for key in ("dim", "depth", "heads"):
            value = getattr(self, key)
            check(value is None or value > 0, f"model.{key}", value, "a positive number")


@dataclass(frozen=True)
class HeadConfig:
    prototypes: int = 65536  # K of the DINO head
    hidden_dim: int = 2048  # width of the head's hidden layers
    bottleneck_dim: int = 256  # width of the L2-normalised embedding before the prototypes
    layers: int = 3  # linear layers before the prototypes
    separate: bool = False  # true: iBOT has a head of its own (untied)
    ibot_prototypes: int | None = None  # K of the iBOT head when separate; none: as prototypes
    ibot_bottleneck_dim: int | None = None  # its bottleneck; none: as bottleneck_dim
    init_std: float = 0.02  # standard deviation of the linear layers at the start

    def __post_init__(self) -> None:
        for key in ("prototypes", "hidden_dim", "bottleneck_dim", "layers"):
            check(getattr(self, key) > 0, f"head.{key}", getattr(self, key), "a positive number")


@dataclass(frozen=True)
class LossConfig:
    dino_weight: float = 1.0  # of the class-token loss (local and global terms)
    ibot_weight: float = 1.0  # of the masked-patch loss
    koleo_weight: float = 0.1  # of the entropy of class tokens, each global view
    anchor_weight: float = 0.0  # of the cosine distance to the features of init=; 0: off, at no cost
    student_temp: float = 0.1  # softmax temperature of the student
    centering: str = "softmax"  # softmax (moving centre) | sinkhorn
    sinkhorn_iterations: int = 3  # row and column normalisations
    center_momentum: float = 0.9  # of the moving centre
    koleo_ranks: int | None = None  # processes whose images KoLeo searches together; none: all; 1: as the reference

    def __post_init__(self) -> None:
        check(self.centering in ("softmax", "sinkhorn"), "loss.centering", self.centering, "softmax or sinkhorn")
        check(self.student_temp > 0, "loss.student_temp", self.student_temp, "a positive temperature")
        check(0 <= self.center_momentum <= 1, "loss.center_momentum", self.center_momentum, "within [0, 1]")
        check(self.sinkhorn_iterations > 0, "loss.sinkhorn_iterations", self.sinkhorn_iterations, "at least 1")
        check(self.koleo_ranks is None or self.koleo_ranks >= 1, "loss.koleo_ranks", self.koleo_ranks, "at least 1")
        for key in ("dino_weight", "ibot_weight", "koleo_weight", "anchor_weight"):
            check(getattr(self, key) >= 0, f"loss.{key}", getattr(self, key), "zero or a positive weight")
        check(
            self.dino_weight + self.ibot_weight > 0,
            "loss.dino_weight",
            self.dino_weight,
            "a positive dino_weight or ibot_weight (both are zero)",
        )


@dataclass(frozen=True)
class OptimConfig:
    base_lr: float | None = 4e-3  # peak rate at a global batch of 1024 images; scaled by sqrt(batch / 1024)
    lr: float | None = None  # peak rate, used as given; excludes base_lr
    beta1: float = 0.9  # AdamW: memory of the gradient
    beta2: float = 0.999  # AdamW: memory of its square
    eps: float = 1e-8  # AdamW: added to the root of the square
    layer_decay: float = 0.9  # rate multiplier per block, from the last to the first
    patch_embed_lr: float = 0.2  # extra rate multiplier of the patch embedding
    clip_grad: float = 3.0  # maximum gradient norm of the backbone and of each head; 0: no clipping
    accumulate: int = 1  # micro-batches a step is computed in: less memory, the same statistics

    def __post_init__(self) -> None:
        if (self.base_lr is None) == (self.lr is None):
            raise UserError("optim.base_lr and optim.lr: give exactly one of the two")
        for key in ("base_lr", "lr"):
            value = getattr(self, key)
            check(value is None or value >= 0, f"optim.{key}", value, "zero or a positive rate")
        for key in ("beta1", "beta2"):
            check(0 <= getattr(self, key) < 1, f"optim.{key}", getattr(self, key), "within [0, 1)")
        check(self.accumulate >= 1, "optim.accumulate", self.accumulate, "at least 1")
        check(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "within (0, 1]")
        check(self.clip_grad >= 0, "optim.clip_grad", self.clip_grad, "zero or a positive norm")


@dataclass(frozen=True)
class ScheduleConfig:
    warmup: float = 0.1  # fraction of the run in which the learning rate rises from 0
    final_lr: float = 1e-6  # learning rate at the end (cosine)
    weight_decay: tuple[float, float] = (0.04, 0.4)  # start and end (cosine)
    momentum: tuple[float, float] = (0.992, 1.0)  # of the teacher, start and end (cosine)
    teacher_temp: tuple[float, float] = (0.04, 0.07)  # start and end (linear, then constant)
    teacher_temp_warmup: float = 0.3  # fraction of the run over which it rises
    freeze_last_layer: float = 0.01  # fraction of the run in which the prototypes do not move

    def __post_init__(self) -> None:
        for key in ("warmup", "teacher_temp_warmup", "freeze_last_layer"):
            check(0 <= getattr(self, key) <= 1, f"schedule.{key}", getattr(self, key), "a fraction of the run")
        check(min(self.teacher_temp) > 0, "schedule.teacher_temp", self.teacher_temp, "positive temperatures")
        check(
            min(self.momentum) >= 0 and max(self.momentum) <= 1,
            "schedule.momentum",
            self.momentum,
            "within [0, 1]",
        )


@dataclass(frozen=True)
class AdaptConfig:
    """What a run that starts from weights (`init=`) does differently; of no effect without `init=`."""

    heads: float = 0.2  # fraction of the run in which only the fresh heads learn, on the frozen backbone
    warmup: float = 0.1  # fraction of the run, after that, in which the backbone's rate rises from 0
    lr: float = 0.1  # learning rate of the backbone over that of the heads
    layer_decay: float = 0.75  # highest rate multiplier per block; optim.layer_decay holds where it is lower
    channels: str | None = None  # weights for another number of image channels: mean | repeat | zero; none: refuse

    def __post_init__(self) -> None:
        check(
            self.channels in (None, "mean", "repeat", "zero"),
            "adapt.channels",
            self.channels,
            "mean, repeat, zero or none",
        )
        check(0 <= self.heads < 1, "adapt.heads", self.heads, "a fraction of the run in [0, 1)")
        check(0 <= self.warmup <= 1, "adapt.warmup", self.warmup, "a fraction of the run")
        check(
            self.heads + self.warmup <= 1,
            "adapt.warmup",
            self.warmup,
            f"at most {1 - self.heads:.3g}, what adapt.heads={self.heads:.3g} leaves of the run",
        )
        check(0 < self.lr <= 1, "adapt.lr", self.lr, "a share of the heads' rate in (0, 1]")
        check(0 < self.layer_decay <= 1, "adapt.layer_decay", self.layer_decay, "within (0, 1]")


@dataclass(frozen=True)
class DataConfig:
    source: str | list[str] | None = None  # folder, [several], list of paths, scenes, or imagenet1k:root=FOLDER
    weights: list[float] | None = None  # probability of each of several folders; none: by their size
    root: str | None = None  # folder that the paths of a list may not leave; none: the list's own folder
    workers: int | None = None  # decoding threads; none: one per core, at most 16
    prefetch: int = 2  # batches prepared ahead
    index_dir: str | None = None  # where folder indexes are kept; none: the user's cache folder
    max_bad_fraction: float = 0.01  # share of unreadable images that ends a run
    max_pixels: int = 200_000_000  # larger images count as unreadable

    def __post_init__(self) -> None:
        check(self.workers is None or self.workers >= 0, "data.workers", self.workers, "zero or more threads")
        check(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "within [0, 1]")
        check(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1 batch")


@dataclass(frozen=True)
class ParallelConfig:
    """Many processes; of no effect on one."""

    strategy: str = "auto"  # auto (ddp up to 300 M parameters, then fsdp) | ddp | fsdp
    shard: int | None = None  # fsdp: processes that share one copy of the state; none: all; fewer: HSDP, copies between
    reshard: bool = False  # fsdp: gather weights anew for the backward pass: less memory, more traffic
    param_dtype: str = "fp32"  # fsdp: what weights are gathered and computed in: fp32 | bf16 | fp16
    reduce_dtype: str = "fp32"  # fsdp: what gradients are summed in: fp32 | bf16 | fp16
    timeout: float = 600.0  # seconds without an answer after which other processes count as lost
    check_every: int = 1000  # steps between comparisons of all copies of the weights; 0: never

    def __post_init__(self) -> None:
        check(self.strategy in ("auto", "ddp", "fsdp"), "parallel.strategy", self.strategy, "auto, ddp or fsdp")
        check(self.shard is None or self.shard >= 1, "parallel.shard", self.shard, "at least 1 process")
        for key in ("param_dtype", "reduce_dtype"):
            check(getattr(self, key) in _DTYPES, f"parallel.{key}", getattr(self, key), "fp32, bf16 or fp16")
        check(self.timeout > 0, "parallel.timeout", self.timeout, "a positive number of seconds")
        check(self.check_every >= 0, "parallel.check_every", self.check_every, "zero or more steps")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None = None  # steps between checkpoints; none: a tenth of the run, at most 2000
    keep: int = 2  # newest training states kept; the best is kept besides
    keep_hours: float | None = None  # one state is kept besides for every so many hours of the run; none: no such
    asynchronous: bool = True  # training goes on while a copy in CPU memory is written; false: it waits
    max_failures: int = 3  # checkpoints in a row that could not be written and end the run

    def __post_init__(self) -> None:
        check(self.every is None or self.every > 0, "checkpoint.every", self.every, "a positive number of steps")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        hours = self.keep_hours
        check(hours is None or hours > 0, "checkpoint.keep_hours", hours, "a positive number of hours")
        check(self.max_failures >= 1, "checkpoint.max_failures", self.max_failures, "at least 1")


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between lines of metrics.jsonl; the one place that waits for the device
    tensorboard: bool = True  # write TensorBoard event files

    def __post_init__(self) -> None:
        check(self.every > 0, "log.every", self.every, "a positive number of steps")


@dataclass(frozen=True)
class ProbeConfig:
    every: int | None = None  # steps between probes; none: a tenth of the run; 0: never
    data: str | None = None  # a folder with one subfolder per class, or scenes; none: label-free rank only
    general: str | None = None  # as data: what must not be forgotten; followed beside it from step 0 on
    margin: float = 0.03  # fall of the k-NN accuracy on probe.general since step 0 that a warning follows
    num_images: int = 2000  # images of each set embedded at each probe, half to learn from, half to test
    metric: str = "knn_top1"  # what `best` follows: knn_top1 | rankme; rankme where there are no labels
    max_share: float = 0.05  # of the running time; probes are left out when they would cost more

    def __post_init__(self) -> None:
        check(self.every is None or self.every >= 0, "probe.every", self.every, "zero or more steps")
        check(self.metric in ("knn_top1", "rankme"), "probe.metric", self.metric, "knn_top1 or rankme")
        check(self.num_images >= 4, "probe.num_images", self.num_images, "at least 4 images")
        check(0 < self.margin < 1, "probe.margin", self.margin, "a share of the test images in (0, 1)")


@dataclass(frozen=True)
class HealthConfig:
    max_nonfinite: int = 5  # non-finite steps in a row before the run rolls back to its last good state
    max_rollbacks: int = 1  # roll-backs before the run stops

    def __post_init__(self) -> None:
        check(self.max_nonfinite >= 1, "health.max_nonfinite", self.max_nonfinite, "at least 1")
        check(self.max_rollbacks >= 0, "health.max_rollbacks", self.max_rollbacks, "zero or more")


def check_views(crops: CropSettings, augment: AugmentSettings, mask: MaskSettings) -> None:
    """Ranges of the options that the data code owns."""
    check(crops.num_local >= 0, "crops.num_local", crops.num_local, "zero or more crops")
    for key in ("global_scale", "local_scale"):
        low, high = getattr(crops, key)
        check(0 < low <= high <= 1, f"crops.{key}", [low, high], "[low, high] within (0, 1]")
    low, high = crops.ratio
    check(0 < low <= high, "crops.ratio", [low, high], "[low, high], both positive")
    for item in dataclasses.fields(augment):
        if item.name in _PROBABILITIES:
            value = getattr(augment, item.name)
            check(0 <= value <= 1, f"augment.{item.name}", value, "a probability in [0, 1]")
    for key in ("brightness", "contrast", "saturation"):
        check(getattr(augment, key) >= 0, f"augment.{key}", getattr(augment, key), "zero or more")
    check(0 <= augment.hue <= 0.5, "augment.hue", augment.hue, "a share of the colour circle in [0, 0.5]")
    low, high = augment.blur_sigma
    check(0 < low <= high, "augment.blur_sigma", [low, high], "[low, high] in pixels, both positive")
    check(
        augment.blur_kernel > 0 and augment.blur_kernel % 2 == 1,
        "augment.blur_kernel",
        augment.blur_kernel,
        "an odd number of taps",
    )
    check(
        0 <= augment.solarize_threshold <= 255,
        "augment.solarize_threshold",
        augment.solarize_threshold,
        "a grey level in 0..255",
    )
    check(len(augment.std) > 0 and min(augment.std) > 0, "augment.std", list(augment.std), "positive numbers")
    check(len(augment.mean) > 0, "augment.mean", list(augment.mean), "one number, or one per channel")
    check(0 <= mask.probability <= 1, "mask.probability", mask.probability, "a share in [0, 1]")
    low, high = mask.ratio
    check(0 <= low <= high <= 1, "mask.ratio", [low, high], "[low, high] within [0, 1]")
    check(mask.min_patches >= 1, "mask.min_patches", mask.min_patches, "at least 1 patch")
    check(0 < mask.aspect <= 1, "mask.aspect", mask.aspect, "height over width within (0, 1]")


_DTYPES = ("fp32", "bf16", "fp16")
_PROBABILITIES = (
    "hflip",
    "vflip",
    "jitter_probability",
    "grayscale",
    "blur_global1",
    "blur_global2",
    "blur_local",
    "solarize_global2",
)
