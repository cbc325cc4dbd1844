"""A run's config and its sections: every option, its default, its meaning, and the range that it must lie in.

The defaults are DINOv2's published short recipe (ViT-L/16 on ImageNet-1k) with registers, antialiased
position resampling and the blur as the paper documents it. Derived values (steps of a run, scaled learning rate) are
methods: printed and logged, never written back.
Crops, augmentation and masks are declared with the code that reads them, in `dinoreg.config.view_settings`.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dinoreg.config.option import Options, check, flat, fraction, option, output, section
from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.runtime.errors import UserError, one_line
from dinoreg.runtime.printable import multiples

BUDGETS = ("steps", "images", "epochs")
DTYPES = ("fp32", "bf16", "fp16")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
DEVICE = {"help": "what computes", "pattern": r"auto|cpu|mps|cuda(:\d+)?", "expected": "auto, cpu, cuda, cuda:N or mps"}
SHAPES = ("cosine", "constant")
METRICS = ("knn_top1", "rankme", "dense_miou", "dse")
MAX_SEED = 2**63 - 1
MAX_WIDTH = 65536
CHANNELS = ("joint", "bag", "bag_mean")
MAX_PROTOTYPES = 2**24


@dataclass(frozen=True)
class ModelConfig(Options, section="model"):
    """The architecture of the backbone, how it is computed, and its stochastic depth."""

    name: str = option("vits14_reg4", "vit{t,s,b,l,g}{8,14,16}_reg{0,4,…}[_rope], or one of Meta, timm or transformers")
    dim: int | None = option(None, "width; none: by the name", low=1, high=MAX_WIDTH)
    depth: int | None = option(None, "blocks; none: by the name", low=1, high=1000)
    heads: int | None = option(None, "attention heads; none: by the name", low=1, high=MAX_WIDTH)
    ffn: str | None = option(None, "feed-forward network; none: by the name, swiglu for g", choices=("mlp", "swiglu"))
    ffn_ratio: float | None = option(None, "hidden width over dim; none: by the name, mostly 4", above=0, high=100)
    layerscale: float | None = option(1e-5, "initial per-channel residual scale; none: no LayerScale")
    drop_path: float = option(0.3, "share of samples that skip a residual branch", low=0, below=1)
    drop_path_uniform: bool = option(True, "the same rate in every block; false: linear from 0")
    in_channels: int = option(3, "image channels", low=1, high=MAX_WIDTH)
    channels: str = option("joint", "bag: seen one by one, features side by side; bag_mean: averaged", choices=CHANNELS)
    antialias: bool = option(True, "position grid resampled with antialiasing")
    position_offset: float = option(0.0, "0: resample by size; 0.1: the reference's scale-factor form")
    init_std: float = option(0.02, "standard deviation of the linear layers at the start", low=0, high=10)
    rope_base: float | None = option(None, "rotary positions of this base; none: by the name", above=1, high=1e6)
    rope_shift: float = option(0.0, "training: moves places by up to this, an image being 2 wide", low=0, high=100)
    rope_jitter: float = option(1.0, "training: stretches each axis by 1/x to x; 1: not", low=1, high=100)
    rope_rescale: float = option(2.0, "training: both axes by one factor, 1/x to x; 1: not", low=1, high=100)
    attention: str = option("auto", "attention kernel", choices=("auto", "xformers", "varlen", "sdpa", "plain"))
    checkpointing: bool = option(False, "recompute activations backwards: less memory, more time", shapes_result=False)
    compile: bool = option(False, "torch.compile: minutes of start-up, faster steps on CUDA", shapes_result=False)

    @property
    def bag_of(self) -> int:
        """Channels that are seen one by one; 0: they are seen together."""
        return 0 if self.channels == "joint" else self.in_channels

    @property
    def crop_channels(self) -> int:
        """Those of a crop in training: of a bag, one."""
        return 1 if self.bag_of else self.in_channels


@dataclass(frozen=True)
class HeadConfig(Options, section="head"):
    """The prototype heads, which turn tokens into logits."""

    prototypes: int = option(65536, "K of the DINO head", low=1, high=MAX_PROTOTYPES)
    hidden_dim: int = option(2048, "width of the head's hidden layers", low=1, high=MAX_WIDTH)
    bottleneck_dim: int = option(256, "width of the embedding before the prototypes", low=1, high=MAX_WIDTH)
    layers: int = option(3, "linear layers before the prototypes", low=1, high=100)
    separate: bool = option(False, "true: iBOT has a head of its own (untied)")
    ibot_prototypes: int | None = option(None, "K of a separate iBOT head; none: the same", low=1, high=MAX_PROTOTYPES)
    ibot_bottleneck_dim: int | None = option(None, "its bottleneck; none: as bottleneck_dim", low=1, high=MAX_WIDTH)
    init_std: float = option(0.02, "standard deviation of the linear layers at the start", low=0, high=10)


@dataclass(frozen=True)
class LossConfig(Options, section="loss"):
    """The weights of the losses, their temperatures, and how teacher targets are centred."""

    dino_weight: float = option(1.0, "of the class-token loss, local and global terms", low=0)
    ibot_weight: float = option(1.0, "of the masked-patch loss", low=0)
    koleo_weight: float = option(0.1, "of the entropy of class tokens, each global view", low=0)
    diet_weight: float = option(0.0, "of telling images apart by class tokens of init= (DIET)", low=0)
    anchor_weight: float = option(0.0, "of the cosine distance to the features of init=; 0: off, at no cost", low=0)
    gram_weight: float = option(0.0, "of patches' cosines to one another, held to an earlier teacher's (Gram)", low=0)
    gram_size: int | None = option(None, "at which that teacher sees them; none: as the student", unit="pixel", low=1)
    paka_weight: float = option(0.0, "of patches of local crops relating as the teacher's global ones (PaKA)", low=0)
    distill_patch_weight: float = option(1.0, "of patch tokens with distill=; class tokens have 1", low=0)
    student_temp: float = option(0.1, "softmax temperature of the student", above=0)
    centering: str = option("softmax", "of the targets; softmax has a moving centre", choices=("softmax", "sinkhorn"))
    sinkhorn_iterations: int = option(3, "row and column normalisations", low=1, high=1_000)
    center_momentum: float = fraction(0.9, "of the moving centre")
    center_by_process: bool = option(False, "patches: mean of processes' means, as the reference; not of all rows")
    koleo_ranks: int | None = option(None, "processes that KoLeo searches together; none: all; reference: 1", low=1)

    def _check_relations(self) -> None:
        positive = "a positive dino_weight, ibot_weight or diet_weight (all are zero)"
        check(self.distils or self.diet_weight > 0, "loss.dino_weight", self.dino_weight, positive)
        one = "0 with loss.anchor_weight: a run is held to one network"
        check(not self.anchor_weight or not self.gram_weight, "loss.gram_weight", self.gram_weight, one)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss that a micro-batch has of its own, by the names of `StepResult.losses`."""
        one_each = {name: getattr(self, f"{name}_weight") for name in ("ibot", "diet", "anchor", "gram", "paka")}
        return {"dino_global": self.dino_weight, "dino_local": self.dino_weight, **one_each}

    @property
    def anchored(self) -> bool:
        """Whether a loss holds the student to a network that does not learn."""
        return self.anchor_weight + self.gram_weight > 0

    def clean_size(self, global_size: int) -> int | None:
        """Pixels a side at which global crops of `global_size` are cut once more, undistorted; None: they are not."""
        gram_size = self.gram_size if self.gram_weight > 0 else None
        return gram_size or (global_size if self.paka_weight > 0 else None)

    @property
    def distils(self) -> bool:
        """Whether a loss has the teacher's targets; without one the teacher is the student's average, no more."""
        return self.dino_weight + self.ibot_weight > 0


@dataclass(frozen=True)
class OptimConfig(Options, section="optim"):
    """AdamW: learning rate and its multipliers, gradient clipping, and micro-batches."""

    base_lr: float | None = option(4e-3, "peak rate at a batch of 1024, scaled by sqrt(batch / 1024)", low=0)
    lr: float | None = option(None, "peak rate, used as given; excludes base_lr", low=0)
    beta1: float = option(0.9, "AdamW: memory of the gradient", low=0, below=1)
    beta2: float = option(0.999, "AdamW: memory of its square", low=0, below=1)
    eps: float = option(1e-8, "AdamW: added to the root of the square", low=0)
    layer_decay: float = option(0.9, "rate multiplier per block, from the last to the first", above=0, high=1)
    patch_embed_lr: float = option(0.2, "extra rate multiplier of the patch embedding")
    clip_grad: float | None = option(3.0, "maximum gradient norm of the backbone and each head; 0, none: any", low=0)
    move_on_skip: bool = option(False, "teacher and centres move in steps that fp16 overflow skips, as the reference")
    accumulate: int = option(1, "micro-batches of a step: less memory, the same statistics", low=1, high=1_000_000)

    def _check_relations(self) -> None:
        if (self.base_lr is None) == (self.lr is None):
            raise UserError("optim.base_lr and optim.lr: give exactly one of the two")


@dataclass(frozen=True)
class ScheduleConfig(Options, section="schedule"):
    """How learning rate, weight decay, teacher momentum and teacher temperature change over the run."""

    warmup: float = fraction(0.1, "fraction of the run in which the learning rate rises from 0")
    final_lr: float | None = option(None, "learning rate at the end (cosine); none: 1e-6, at most the peak", low=0)
    weight_decay: tuple[float, float] = option((0.04, 0.4), "start and end (cosine)")
    momentum: tuple[float, float] = fraction((0.992, 1.0), "of the teacher, start and end (cosine)")
    teacher_temp: tuple[float, float] = option((0.04, 0.07), "start and end (linear, then constant)", above=0)
    teacher_temp_warmup: float = option(0.3, "fraction of the run over which it rises; above 1 it ends below", low=0)
    freeze_last_layer: float = fraction(0.01, "fraction of the run in which the prototypes do not move")
    gram_start: float = fraction(0.5, "fraction of the run after which loss.gram_weight holds to the teacher of then")
    gram_every: float | None = option(None, "fraction after which to a newer one; none: never", above=0, high=1)
    shape: str = option("cosine", "constant: rate, decay and momentum stay; a run may be extended", choices=SHAPES)
    cooldown: int = option(0, "last steps, in which a constant schedule goes to its end values (cosine)", low=0)
    horizon: int | None = option(None, "steps that fractions are of; none: all; constant: of the first start", low=1)

    def _check_relations(self) -> None:
        constant = "0 unless schedule.shape=constant"
        check(self.cooldown == 0 or self.shape == "constant", "schedule.cooldown", self.cooldown, constant)


@dataclass(frozen=True)
class AdaptConfig(Options, section="adapt"):
    """Learning rates of a run that starts from weights (`init=`); without effect otherwise."""

    heads: float = option(0.2, "fraction of the run in which only the fresh heads learn", low=0, below=1)
    warmup: float = fraction(0.1, "fraction of the run, after that, in which the backbone's rate rises from 0")
    lr: float = option(0.1, "learning rate of the backbone over that of the heads", above=0, high=1)
    layer_decay: float = option(0.75, "as optim.layer_decay, which holds where it is lower", above=0, high=1)
    blocks: int | None = option(None, "last blocks that learn, with the final norm; none: all, and the tokens", low=1)
    channels: str | None = option(None, "weights for other channels; none: refuse", choices=("mean", "repeat", "zero"))

    def _check_relations(self) -> None:
        left = f"at most {1 - self.heads:.3g}, what adapt.heads={self.heads:.3g} leaves of the run"
        check(self.heads + self.warmup <= 1, "adapt.warmup", self.warmup, left)


def is_value_range(numbers: Sequence[float]) -> bool:
    """Whether numbers are LOW,HIGH with LOW below HIGH, once or for each channel."""
    lows, highs = numbers[::2], numbers[1::2]
    return len(lows) == len(highs) > 0 and all(low < high for low, high in zip(lows, highs))


COLUMNS = "of a table: which holds paths, as path:FILE; path:RED,path:NIR: a file a channel; empty: usual names"
VALUE_RANGE: dict[str, Any] = {"fits": is_value_range, "expected": "LOW,HIGH, LOW below HIGH, once or for each channel"}


@dataclass(frozen=True)
class DataConfig(Options, section="data"):
    """The images to train on, and how they are read."""

    source: str | list[str] | None = option(None, "folder, [several], list, scenes, imagenet1k:root=FOLDER")
    weights: list[float] | None = option(None, "probability of each of several folders; none: by their size")
    range: list[float] | None = option(None, "LOW,HIGH: values of black, white; none: by the type", **VALUE_RANGE)
    root: str | None = option(None, "folder that the paths of a list may not leave; none: the list's own folder")
    columns: str = option("", COLUMNS)
    workers: int | None = option(None, "threads; none: a core each, at most 16", low=0, high=1024, shapes_result=False)
    prefetch: int = option(2, "batches prepared ahead", low=1, high=1000, shapes_result=False)
    index_dir: str | None = option(None, "of folder indexes; none: the user's cache folder", shapes_result=False)
    max_bad_fraction: float = fraction(0.01, "share of unreadable images that ends a run", shapes_result=False)
    max_pixels: int = option(200_000_000, "larger images count as unreadable")
    reduced_decode: bool = option(True, "decode a large JPEG at 1/2, 1/4 or 1/8 where no crop loses pixels by it")
    reference_decode: bool = option(False, "Pillow's convert(RGB): EXIF turns and alpha ignored, 16 bits cut to 8")

    def _check_relations(self) -> None:
        without = "none with data.reference_decode, which has no range"
        check(self.range is None or not self.reference_decode, "data.range", self.range, without)


@dataclass(frozen=True)
class ParallelConfig(Options, section="parallel"):
    """How a run is distributed over several processes; without effect on one."""

    strategy: str = option("auto", "ddp up to 300 M parameters, then fsdp", choices=("auto", "ddp", "fsdp"))
    shard: int | None = option(None, "fsdp: processes sharing a state; none: all; fewer: HSDP", unit="process", low=1)
    reshard: bool = option(False, "fsdp: gather weights anew backwards: less memory, more traffic")
    param_dtype: str = option("fp32", "fsdp: of weights gathered and computed with", choices=DTYPES, shapes_result=True)
    reduce_dtype: str = option("fp32", "fsdp: of gradients summed", choices=DTYPES, shapes_result=True)
    timeout: float = option(600.0, "without an answer after which others are lost", unit="second", above=0, high=10**8)
    check_every: int = option(1000, "steps between comparisons of all copies of weights; 0: never", low=0)


@dataclass(frozen=True)
class CheckpointConfig(Options, section="checkpoint"):
    """How often training states are written, and how many are kept."""

    every: int | None = option(None, "steps between checkpoints; none: a tenth of the run, at most 2000", low=1)
    keep: int = option(2, "newest training states kept; the best is kept besides", low=1, high=1_000_000)
    keep_hours: float | None = option(None, "besides, a state for every so many hours", above=0, high=1_000_000)
    asynchronous: bool = option(True, "training goes on while a copy in CPU memory is written; false: it waits")
    max_failures: int = option(3, "checkpoints in a row that could not be written and end the run", low=1)

    def period(self, num_steps: int) -> int:
        """Steps between checkpoints of a run of `num_steps`."""
        return self.every or min(2000, max(1, num_steps // 10))


@dataclass(frozen=True)
class LogConfig(Options, section="log"):
    """How often metrics are written, and where."""

    every: int = option(10, "steps between lines of metrics.jsonl; the one place that waits for the device", low=1)
    tensorboard: bool = option(True, "write TensorBoard event files")
    to: tuple[str, ...] = option((), "who gets every number, too", choices=("wandb", "mlflow"), empty=True)


@dataclass(frozen=True)
class ProbeConfig(Options, section="probe"):
    """The evaluation of the teacher during the run."""

    every: int | None = option(None, "steps between probes; none: a tenth of the run; 0: never", low=0)
    data: str | None = option(None, "labelled: folder of classes or of train/, val/, a table, scenes; none: rank only")
    general: str | None = option(None, "as data: what must not be forgotten; followed beside it from step 0 on")
    columns: str = option("", "as data.columns, of a table in data or general; with label:BREED,split:SET")
    root: str | None = option(None, "folder that the paths of such a table may not leave; none: the table's own")
    dense: str | None = option(None, "images/ with masks/, or scenes: patches are segmented by k-NN; none: DSE alone")
    dense_values: str = option("", "numbers or colours of such masks that are classes, as [0,255]; empty: from 0")
    margin: float = option(0.03, "fall of k-NN accuracy on probe.general that is warned of", above=0, below=1)
    num_images: int = option(2000, "images of each set embedded at each probe, half to learn from, half to test", low=4)
    metric: str = option("knn_top1", "of `best`; rankme and dse need no labels", choices=METRICS)
    max_share: float = option(0.05, "of the running time; probes are left out when they would cost more")


@dataclass(frozen=True)
class HealthConfig(Options, section="health"):
    """How many non-finite steps a run accepts before it goes back to a checkpoint or stops."""

    max_nonfinite: int = option(5, "non-finite steps in a row before the run rolls back to its last good state", low=1)
    max_rollbacks: int = option(1, "roll-backs before the run stops", low=0)


@dataclass(frozen=True)
class Config(Options):
    """All options of a run; the sections have dotted keys, such as optim.lr."""

    out: str | None = output(None, "the run folder", shapes_result=False)
    init: str | None = option(None, "weights to start from: a run, a teacher file, a folder or file of another library")
    distill: str | None = option(None, "frozen network to learn from (weights= of eval), not from the own average")
    distill_size: int | None = option(None, "at which it sees crops; none: as many patches", unit="pixel", low=1)
    steps: int | None = option(None, "length of the run in optimizer steps; excludes images and epochs", low=1)
    images: int | None = option(None, "length of the run in images", low=1)
    epochs: float | None = option(None, "length of the run in passes over the data", above=0)
    batch_size: int = option(64, "images a step, per process", low=1, high=2**20)
    seed: int = option(0, "of weights, data order, crops, masks and drop path", low=0, high=MAX_SEED)
    device: str = option("auto", **DEVICE, shapes_result=False)
    precision: str = option("auto", "auto: bf16 where hardware has it; tf32: on CUDA", choices=(*PRECISIONS, "tf32"))
    threads: int | None = option(None, "of the CPU; none: PyTorch's choice", low=1, high=1024, shapes_result=False)
    resume: bool = option(False, "go on with the run in `out`", shapes_result=False)
    overwrite: bool = option(False, "delete what is in `out` first", shapes_result=False)
    takeover: bool = option(False, "although another start of the run seems to be at work", shapes_result=False)
    model: ModelConfig = section(ModelConfig)
    head: HeadConfig = section(HeadConfig)
    crops: CropSettings = section(CropSettings)
    augment: AugmentSettings = section(AugmentSettings)
    mask: MaskSettings = section(MaskSettings)
    loss: LossConfig = section(LossConfig)
    optim: OptimConfig = section(OptimConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    adapt: AdaptConfig = section(AdaptConfig)
    data: DataConfig = section(DataConfig)
    parallel: ParallelConfig = section(ParallelConfig, shapes_result=False)
    checkpoint: CheckpointConfig = section(CheckpointConfig, shapes_result=False)
    log: LogConfig = section(LogConfig, shapes_result=False)
    probe: ProbeConfig = section(ProbeConfig, shapes_result=False)
    health: HealthConfig = section(HealthConfig, shapes_result=False)

    def _check_relations(self) -> None:
        accumulate, divisor = self.optim.accumulate, f"a divisor of batch_size={self.batch_size}"
        check(self.batch_size % accumulate == 0, "optim.accumulate", accumulate, divisor)
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: give exactly one of steps, images and epochs")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite: give one of the two")
        if self.distill is not None:
            without = "0 with distill=, whose network says what features should be"
            for key in ("anchor_weight", "gram_weight", "paka_weight", "diet_weight"):
                check(getattr(self.loss, key) == 0, f"loss.{key}", getattr(self.loss, key), without)
            check(self.crops.stages is None, "crops.stages", self.crops.stages, "none with distill=")
        without = "0 without local crops (crops.num_local=0)"
        check(self.crops.num_local > 0 or not self.loss.paka_weight, "loss.paka_weight", self.loss.paka_weight, without)
        if self.init is not None and not self.loss.distils:
            check(self.adapt.heads == 0, "adapt.heads", self.adapt.heads, "0: no loss has heads that could learn alone")
        _check_model(self)

    def as_trained(self) -> "Config":
        """With `distill=` the same without what such a run leaves out: local crops, masks, KoLeo; otherwise itself."""
        if self.distill is None:
            return self
        crops, mask = replace(self.crops, num_local=0), replace(self.mask, probability=0.0)
        return replace(self, crops=crops, mask=mask, loss=replace(self.loss, koleo_weight=0.0, centering="softmax"))

    def check_start(self) -> None:
        """UserError for a loss that holds to the features of `init=` where there is none."""
        without = "0 without init=, there are no features to begin with"
        for key in ("anchor_weight", "diet_weight") if self.init is None else ():
            check(getattr(self.loss, key) == 0, f"loss.{key}", getattr(self.loss, key), without)
        if self.init is None and self.schedule.gram_start == 0 and not self.resume:
            later = "0 without init= where schedule.gram_start=0, as weights at random have no relations to hold to"
            check(self.loss.gram_weight == 0, "loss.gram_weight", self.loss.gram_weight, later)

    def num_steps(self, num_images: int, world_size: int = 1) -> int:
        """Length of the run in optimizer steps, at least 1, for a data set of `num_images`.

        raises UserError without steps=, images= or epochs=
        """
        if self.steps is not None:
            return self.steps
        images = self.images if self.epochs is None else self.epochs * num_images
        if images is None:
            raise UserError("no budget: give one of steps=, images= or epochs=")
        return max(1, round(images / (self.batch_size * world_size)))

    def stages(self, num_steps: int) -> dict[int, CropSettings]:
        """{first step: crops} of the stages of a run of `num_steps`, in order; those without a step are left out."""
        starts, stages = [0], {}
        for until, global_size, local_size in self.crops.in_stages:
            crops = replace(self.crops, global_size=global_size, local_size=local_size, stages=None)
            stages[starts[-1]] = crops
            starts.append(int(until * (self.schedule.horizon or num_steps)))
        return {first: crops for first, crops in stages.items() if first < num_steps}

    def peak_lr(self, world_size: int = 1) -> float:
        """The peak learning rate: `optim.lr`, or as in DINOv2 `optim.base_lr` times sqrt(global batch / 1024)."""
        if self.optim.lr is not None:
            return self.optim.lr
        assert self.optim.base_lr is not None
        return self.optim.base_lr * math.sqrt(self.batch_size * world_size / 1024)

    def layer_decay(self) -> float:
        """Learning rate factor per block, in (0, 1]: `optim.layer_decay`; with `init=` at most `adapt.layer_decay`."""
        return self.optim.layer_decay if self.init is None else min(self.optim.layer_decay, self.adapt.layer_decay)

    def explain_lr(self, world_size: int = 1) -> str:
        """One line on how the peak learning rate is computed."""
        rate = f"learning rate {self.peak_lr(world_size):.3g}"
        if self.optim.lr is not None:
            return f"{rate} as given"
        return f"{rate} = {self.optim.base_lr:.3g} · √({self.batch_size * world_size}/1024)"

    def explain_start(self, num_steps: int, world_size: int = 1) -> str:
        """One line on how a run with `init=` trains the backbone."""
        frozen = round(self.adapt.heads * num_steps)
        first = f"heads alone for {frozen} steps, then " if frozen else ""
        rate = f"{self.peak_lr(world_size) * self.adapt.lr:.3g} ({self.adapt.lr:.3g} of the heads' rate)"
        return f"{first}backbone at {rate}, {self.layer_decay():.3g} a block"

    def shaping(self) -> dict[str, Any]:
        """The options that the trained weights depend on, by dotted key."""
        return flat(self, shaping=True)

    def hash(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of `shaping`."""
        return hashlib.sha256(json.dumps(self.shaping()).encode()).hexdigest()[:12]


def _check_model(config: Config) -> None:
    """The model's name is known, the crops divide into its patches, its heads divide its width."""
    from dinoreg.models.registry import parse_name

    try:
        named = parse_name(config.model.name)
    except ValueError as error:
        raise UserError(f"model.name={config.model.name}: {one_line(error, 200)}") from None
    patch = int(named["patch_size"])
    *stages, (_, *last) = config.crops.in_stages
    used = 2 if config.crops.num_local and config.distill is None else 1
    sizes = [*zip(("crops.global_size", "crops.local_size"), last[:used])]
    sizes += [("crops.stages", size) for _, *both in stages for size in both[:used]]
    for key, size in sizes:
        check(size % patch == 0, key, size, multiples(size, patch, config.model.name))
    depth = config.model.depth or named["depth"]
    check((config.adapt.blocks or 0) <= depth, "adapt.blocks", config.adapt.blocks, f"at most {depth}, those there are")
    dim, heads = config.model.dim or named["dim"], config.model.heads or named["heads"]
    check(dim % heads == 0, "model.heads", heads, f"a divisor of the width model.dim={dim}")
    channels, seen = config.model.crop_channels, config.model.channels
    fits = f"one number, or one for each of the {channels} channels (model.in_channels)"
    if seen != "joint":
        fits = f"one number, which holds for all channels with model.channels={seen}"
        check(config.loss.diet_weight == 0, "loss.diet_weight", config.loss.diet_weight, f"0 with channels={seen}")
    shipped = AugmentSettings()  # of RGB; for other channels it stands for what is measured when the run begins
    for key, values in ("mean", config.augment.mean), ("std", config.augment.std):
        check(len(values) in (1, channels) or values == getattr(shipped, key), f"augment.{key}", values, fits)
