"""AdamW over named parameter groups: layer-wise decay, no decay on norms and biases, a frozen last layer.

The groups follow DINOv2's code: per submodule (backbone and each head), parameters with the same rate multiplier, decay
multiplier and last-layer flag share one group.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dinoreg.config.schema import OptimConfig
from dinoreg.train.parallelize import full_tensor, local
from dinoreg.train.schedules import Now

_TOKENS = ("pos_embed", "mask_token", "cls_token", "register_tokens")


def lr_multiplier(name: str, depth: int, layer_decay: float, patch_embed_lr: float) -> float:
    """Learning rate multiplier of a backbone parameter: layer_decay ** (depth + 1 - layer id).

    The layer-wise decay of ELECTRA (arXiv 2003.10555). The layer id is 0 for tokens, positions and patch embedding,
    i + 1 for block i, depth + 1 for the final norm.

    name            the parameter's name in RegisterViT
    depth           number of blocks
    layer_decay     in (0, 1]; 1: every layer alike
    patch_embed_lr  further factor of the patch embedding, 0.2 in DINOv2
    """
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        layer = int(block.group(1)) + 1
    elif name in _TOKENS or name.startswith("patch_embed."):
        layer = 0
    else:
        layer = depth + 1
    multiplier = layer_decay ** (depth + 1 - layer)
    return multiplier * patch_embed_lr if name.startswith("patch_embed.") else multiplier


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter of this name: not to biases, norms and LayerScale.

    As in DINOv2, tokens (registers, too), positions and prototypes decay.
    """
    return not (name.endswith(".bias") or "norm" in name or "gamma" in name)


def parameter_groups(student: nn.ModuleDict, depth: int, layer_decay: float, patch_embed_lr: float) -> list[dict]:
    """The optimizer's parameter groups; parameters that do not require gradients are left out.

    student      {"backbone", "dino_head"} and, untied, "ibot_head"
    depth        blocks of the backbone; with layer_decay and patch_embed_lr as for `lr_multiplier`
    returns      dicts {"params", "names", "module", "lr_multiplier", "wd_multiplier", "last_layer"}
    """
    groups: dict[tuple[str, float, float, bool], dict[str, Any]] = {}
    for module_name, module in student.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            lr = lr_multiplier(name, depth, layer_decay, patch_embed_lr) if module_name == "backbone" else 1.0
            key = (module_name, lr, float(decays(name)), "last_layer" in name)
            properties = dict(zip(("module", "lr_multiplier", "wd_multiplier", "last_layer"), key))
            group = groups.setdefault(key, {"params": [], "names": [], **properties})
            group["params"].append(parameter)
            group["names"].append(f"{module_name}.{name}")
    return list(groups.values())


class GroupsAdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, which counts the steps of all groups at once: one kernel a group in place of three.

    found_inf  () 1.0: the next steps change nothing; None: they do
    divisors   {"backbone": (), …} by which the gradients of a module are divided, in the same pass; {}: as they are
    """

    found_inf: Tensor | None = None
    divisors: Mapping[str, Tensor] = MappingProxyType({})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        parts: list[list[list[Tensor]]] = []
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            parts.append([[local(tensor) for tensor in tensors] for tensors in lists])
        counts = [count for *_, steps in parts for count in steps]
        taken: Any = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        torch._foreach_add_(counts, [taken] * len(counts))
        for group, lists in zip(self.param_groups, parts, strict=True):
            rates = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            if lists[0]:
                beta1, beta2 = group["betas"]
                rates |= {"grad_scale": self.divisors.get(group["module"]), "found_inf": self.found_inf}
                torch._fused_adamw_(*lists, **rates, beta1=beta1, beta2=beta2)


def build_optimizer(student: nn.ModuleDict, depth: int, layer_decay: float, options: OptimConfig) -> GroupsAdamW:
    """AdamW over `parameter_groups`, with learning rates of 0: `set_rates` sets them before every step.

    layer_decay  used in place of options.layer_decay
    """
    groups = parameter_groups(student, depth, layer_decay, options.patch_embed_lr)
    betas = (options.beta1, options.beta2)
    return GroupsAdamW(groups, lr=0.0, betas=betas, eps=options.eps, weight_decay=0.0, fused=True)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its AdamW state (step 0, moments of 0) at once, as its first step would.

    Parameters without a gradient (a frozen backbone) would get theirs later, and a checkpoint written before that
    would lack it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def set_rates(optimizer: torch.optim.Optimizer, now: Now) -> None:
    """Set every group's learning rate and weight decay in place: the scheduled value times the group's multiplier."""
    for group in optimizer.param_groups:
        rate = (now.last_layer_lr if group["last_layer"] else now.lr) * group["lr_multiplier"]
        group["lr"] = rate * now.backbone if group["module"] == "backbone" else rate
        group["weight_decay"] = now.weight_decay * group["wd_multiplier"]


def clip_gradients(
    student: nn.ModuleDict, max_norm: float | None, optimizer: GroupsAdamW, loss_scale: Tensor
) -> dict[str, Tensor]:
    """Have the next step undo the loss scale and clip the backbone and each head, each alone, to this L2 norm.

    max_norm       0 or None: no clipping; 3 in DINOv2
    loss_scale ()  by which gradients are too large
    returns        {"grad_norm_backbone": (), …}  norms before clipping, on the device, of the full gradient however it
                   is sharded; none for a module without gradients (frozen)
    """
    norms, optimizer.divisors = {}, {}
    for name, module in student.items():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            norm = full_tensor(torch.nn.utils.get_total_norm(gradients, foreach=True)) / loss_scale
            too_large = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else 1.0
            norms[f"grad_norm_{name}"], optimizer.divisors[name] = norm, loss_scale * too_large
    return norms


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float, accepted: Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, on every parameter that learns (DINO section 3.1).

    momentum     in [0, 1]
    accepted ()  1.0, or 0.0 for a step that was not finite, which leaves the teacher as it is

    Both networks have the same parameters and are sharded alike, or not at all: each process updates its own part.
    """
    pairs = [pair for pair in zip(teacher.parameters(), student.parameters(), strict=True) if pair[1].requires_grad]
    averages, currents = ([local(pair[side]) for pair in pairs] for side in (0, 1))
    if momentum < 0.5:  # the form below is not exact at 0
        torch._foreach_lerp_(averages, currents, [accepted * (1.0 - momentum)] * len(averages))
        return
    # The step of gradient descent a - r (a - c), which is the average: one kernel for all parameters, and the update of
    # PyTorch's that reads on the device whether to happen.
    descent: dict[str, Any] = {"weight_decay": 1.0, "lr": 1.0 - momentum, "maximize": True, "found_inf": 1.0 - accepted}
    plain: dict[str, Any] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False}
    torch._fused_sgd_(averages, currents, [], **descent, **plain)
