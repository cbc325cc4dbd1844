"""What is minimised: functions of tensors, without state, configs or files (DINOv2 section 4)."""

from dinoreg.losses.centering import sinkhorn_knopp, softmax_center, update_center
from dinoreg.losses.dino import dino_loss, soft_cross_entropy
from dinoreg.losses.ibot import ibot_loss
from dinoreg.losses.koleo import koleo_loss

__all__ = [
    "dino_loss",
    "ibot_loss",
    "koleo_loss",
    "sinkhorn_knopp",
    "soft_cross_entropy",
    "softmax_center",
    "update_center",
]
