"""iBOT's loss (iBOT section 3, DINOv2 section 4): predict the teacher's targets of the hidden patches."""

from torch import Tensor

from dinoreg.losses.dino import soft_cross_entropy


def ibot_loss(logits: Tensor, targets: Tensor, weights: Tensor, num_crops: int, student_temp: float) -> Tensor:
    """The cross-entropy of masked patches, averaged within each crop, then over all crops (iBOT, arXiv 2111.07832).

    logits        (M, K)   student logits of the masked patches of masked global crops; M may be 0
    targets       (M, K)   teacher targets of the same patches, which the teacher sees unmasked; each sums to one
    weights       (M,)     1 / (number of masked patches of the patch's crop)
    num_crops              > 0: all 2B global crops, the unmasked ones included. With half of the crops masked the
                           value is half of the mean over masked crops
    student_temp           > 0; 0.1 in the papers
    returns       ()       in nats, float32 (float64 for float64 logits); without masked patches 0, with an (empty)
                           gradient for the logits
    """
    return soft_cross_entropy(logits, targets, student_temp, weights, mass=1.0) / num_crops
