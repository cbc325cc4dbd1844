"""What training carries from step to step: student, teacher, optimizer, centres, counters."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh

from dinoreg.config.load import Config
from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.models.heads import PrototypeHead, TokenProjection
from dinoreg.models.registry import parse_name
from dinoreg.models.vit import RegisterViT
from dinoreg.train.optimizer import build_optimizer, start_moments
from dinoreg.train.parallelize import local, parallelize
from dinoreg.train.tutor import Tutor

LARGEST_LOSS_SCALE = 2.0**16
SCALARS = ("loss_scale", "scale_age", "rejected")  # tensors of the state that are one number


class Networks(nn.ModuleDict):
    """A backbone and its heads: {"backbone", "dino_head"} and, untied, "ibot_head"; of a run with `distill=`
    {"backbone", "distill_head"}.
    """

    backbone: RegisterViT
    dino_head: PrototypeHead
    ibot_head: PrototypeHead
    distill_head: TokenProjection

    @property
    def head_of_patches(self) -> PrototypeHead:
        """The head that patch tokens go through: their own, or the DINO head when tied."""
        return self.ibot_head if "ibot_head" in self else self.dino_head


class TrainState:
    """The state of a run; a checkpoint holds all but what is fixed: `train_modules` to `seed`, and a fixed anchor.

    centers        {"dino": (1, K), "ibot": (1, K')}  moving centres of the teacher's logits (softmax centering); with a
                   tutor {"cls": (1, D'), "patch": (1, D')}, of its tokens
    loss_scale ()  multiplies the loss before the backward pass; changes in fp16 only
    scale_age  ()  int32, finite steps since the scale last changed
    rejected   ()  non-finite steps in a row, counted on the device
    step           optimizer steps taken
    position       samples drawn from the data
    rollbacks      how often the run has gone back to an earlier checkpoint
    history        JSON values: fingerprint of the data, identity of the tutor, unreadable images, best probe
    anchor         the frozen backbone that a loss holds to; None where no loss does
    anchor_moves   whether it is an earlier teacher of the run, and so a part of checkpoints; else that of `init=`
    train_modules  the student's modules as a step calls them: the student itself, or DDP around each module
    seen           (I, D) class tokens of all images at the start; None where loss.diet_weight is 0
    tutor          the frozen network of `distill=`, which every process holds whole; None without
    ranks          the processes that train it together
    dtype          of autocast; float16 comes with loss scaling
    loss, optim    the options of the losses and the optimizer; optim.accumulate is the number of micro-batches of a
                   step, which divides that of images
    seed           of the run
    """

    def __init__(
        self,
        config: Config,
        student: Networks,
        teacher: Networks,
        device: torch.device,
        dtype: torch.dtype,
        anchor: RegisterViT | None = None,
        ranks: Ranks = ALONE,
        mesh: DeviceMesh | None = None,
        seen: Tensor | None = None,
        tutor: Tutor | None = None,
    ) -> None:
        """The state at step 0 of a run, with the networks moved to `device` and distributed over `ranks`.

        dtype   of autocast; only float16 uses a loss scale above 1
        anchor  the frozen backbone that a loss holds to, if any
        mesh    of the processes, for FSDP2; None: all of them, in groups of `parallel.shard`
        seen    (I, D) what `diet_loss` tells apart; None: as many as a batch has, all alike
        tutor   on `device`, the one that the networks were built for
        raises  UserError where the processes do not divide into groups of `parallel.shard`
        """
        if config.init is not None and config.adapt.blocks is not None:
            student.backbone.requires_grad_(False)
            for module in (*student.backbone.blocks[-config.adapt.blocks :], student.backbone.norm):
                module.requires_grad_(True)
        if seen is None and config.loss.diet_weight > 0:
            seen = torch.zeros(config.batch_size, student.backbone.dim, device=device)
        if not config.loss.distils:
            for head in {student.dino_head, student.head_of_patches}:
                head.requires_grad_(False)
        student.to(device).train()
        teacher.to(device)
        anchor = None if anchor is None else anchor.to(device)
        self.student, self.teacher = student, teacher
        self.train_modules = parallelize(config.parallel, config.loss, student, teacher, anchor, device, ranks, mesh)
        self.optimizer = build_optimizer(student, student.backbone.depth, config.layer_decay(), config.optim)
        # With a tutor nothing is masked, so that the mask token never gets a gradient.
        if tutor is not None or (config.init is not None and config.adapt.heads > 0):
            start_moments(self.optimizer)
        if tutor is None:
            heads = {"dino": teacher.dino_head, "ibot": teacher.head_of_patches}
            widths = {name: len(head.last_layer.weight_g) for name, head in heads.items()}
        else:
            widths = dict.fromkeys(("cls", "patch"), tutor.encoder.dim)
        self.centers = {name: torch.zeros(1, width, device=device) for name, width in widths.items()}
        self.loss_scale = torch.tensor(LARGEST_LOSS_SCALE if dtype == torch.float16 else 1.0, device=device)
        self.scale_age = torch.zeros((), dtype=torch.int32, device=device)
        self.rejected = torch.zeros((), device=device)
        self.anchor, self.anchor_moves = anchor, config.loss.gram_weight > 0
        self.seen, self.tutor, self.ranks, self.dtype = seen, tutor, ranks, dtype
        self.loss, self.optim, self.seed = config.loss, config.optim, config.seed
        self.step = self.position = self.rollbacks = 0
        self.history: dict[str, Any] = {}

    def tensors(self) -> dict[str, Any]:
        """The tensors of a checkpoint, by name, sharing memory with this state."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": get_optimizer_state_dict(self.student, self.optimizer)["state"],
            "centers": dict(self.centers),
            **({"anchor": self.anchor.state_dict()} if self.anchor is not None and self.anchor_moves else {}),
            **{name: getattr(self, name) for name in SCALARS},
        }

    def replicated(self) -> dict[str, Tensor]:
        """Weights and centres by name: the tensors of which processes hold replicas that must stay equal."""
        networks = {"student": self.student, "teacher": self.teacher}
        weights = {f"{kind}.{name}": p for kind, network in networks.items() for name, p in network.named_parameters()}
        return weights | {f"centers.{name}": center for name, center in self.centers.items()}

    def numbers(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON values: {"step", "position", "rollbacks", "history"}."""
        return {name: getattr(self, name) for name in ("step", "position", "rollbacks", "history")}

    @torch.no_grad()
    def renew_anchor(self) -> None:
        """Make the teacher's backbone of now the one that a loss holds to; it has as many processes share it."""
        assert self.anchor is not None
        pairs = zip(self.anchor.parameters(), self.teacher.backbone.parameters(), strict=True)
        anchors, weights = (list(map(local, side)) for side in zip(*pairs))
        torch._foreach_copy_(anchors, weights)

    def load(self, tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Take over a checkpoint.

        tensors  of this state's `tensors()`, into which the checkpoint has been read
        numbers  as `numbers()` wrote them
        """
        self.student.load_state_dict(tensors["student"])
        self.teacher.load_state_dict(tensors["teacher"])
        groups = get_optimizer_state_dict(self.student, self.optimizer)["param_groups"]
        set_optimizer_state_dict(self.student, self.optimizer, {"state": tensors["optimizer"], "param_groups": groups})
        if "anchor" in tensors:
            assert self.anchor is not None
            self.anchor.load_state_dict(tensors["anchor"])
        elif self.anchor_moves:  # the run had no such loss before
            self.renew_anchor()
        for name, center in tensors["centers"].items():
            self.centers[name].copy_(center)
        for name in SCALARS:
            getattr(self, name).copy_(tensors[name])
        self.step, self.position, self.history = numbers["step"], numbers["position"], numbers["history"]
        self.rollbacks = max(self.rollbacks, numbers["rollbacks"])


def model_arguments(config: Config) -> dict[str, Any]:
    """The arguments of RegisterViT in a run: those that the model's name stands for and, before them, the options'.

    raises UserError for an unknown name
    """
    # Options without a value follow from the model's name; compiling is not an argument of the model.
    given = {key: value for key, value in vars(config.model).items() if value is not None or key == "layerscale"}
    named = parse_name(config.model.name) | given | {"image_size": config.crops.global_size}
    return {key: value for key, value in named.items() if key not in ("name", "compile")}


def build_networks(config: Config, tutor: Tutor | None = None) -> tuple[Networks, Networks]:
    """Student and teacher, on the CPU, with equal weights that depend on config.seed alone.

    tutor  that projections in place of prototype heads shall lead to
    The teacher is in eval mode and needs no gradients. raises UserError for a model that cannot be built
    """
    head = config.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = RegisterViT(**model_arguments(config))
        student = Networks({"backbone": backbone})
        widths = {} if tutor else {"dino_head": (head.prototypes, head.bottleneck_dim)}
        if tutor is not None:
            student["distill_head"] = TokenProjection(backbone.dim, tutor.encoder.dim)
        elif head.separate:
            separate = (head.ibot_prototypes or head.prototypes, head.ibot_bottleneck_dim or head.bottleneck_dim)
            widths["ibot_head"] = separate
        for name, (prototypes, bottleneck) in widths.items():
            options = (prototypes, head.hidden_dim, bottleneck, head.layers, head.init_std)
            student[name] = PrototypeHead(backbone.dim, *options)
    return student, copy.deepcopy(student).requires_grad_(False).eval()
