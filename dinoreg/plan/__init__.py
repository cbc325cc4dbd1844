"""What a run will cost, before it starts: memory, operations, traffic, time, and what to change when it does not fit.

`plan(config, nodes=4, gpus=8)` computes all of it in seconds, by running a training step on tensors without values.
Speed is measured where the device is available; otherwise it is an estimate and marked as such.
"""

from dinoreg.plan.result import Plan
from dinoreg.plan.run import plan

__all__ = ["Plan", "plan"]
