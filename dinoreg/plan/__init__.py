"""What a run will cost, before it starts: memory, operations, traffic, time, and what to change when it does not fit.

`plan(config, nodes=4, gpus=8)` works all of it out in seconds, by running a training step on tensors without values;
speed is measured where the device is at hand, else it is an estimate and says so.
"""

from dinoreg.plan.result import Plan
from dinoreg.plan.run import plan

__all__ = ["Plan", "plan"]
