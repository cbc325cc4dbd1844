"""The collectives of a training step, and their time over given links.

Bytes are those that one process sends in a ring, as NCCL's bandwidth-bound algorithms do: with n processes an
all-gather or a reduce-scatter sends (n-1)/n of the tensor, an all-reduce twice that. The processes of one machine share
its links to other machines, so that a group with m processes on each machine can use m links.
"""

import math
from dataclasses import dataclass

from dinoreg.plan.devices import HOP_SECONDS, LINK_SHARE, Device
from dinoreg.plan.job import Job
from dinoreg.runtime.device import DTYPES

DDP_BUCKET = 25 * 2**20  # bytes, PyTorch's default


@dataclass(frozen=True)
class Collective:
    """One kind of collective in a step.

    size     bytes of the full (unsharded) tensors of all calls together
    calls    number of calls in a step
    ranks    number of processes that take part
    local    number of these on one machine
    rounds   1 for all-gather and reduce-scatter, 2 for all-reduce
    hidden   whether it overlaps with computing
    """

    name: str
    size: int
    calls: int
    ranks: int
    local: int
    rounds: int
    hidden: bool

    @property
    def sent(self) -> int:
        """Bytes that one process sends in a step."""
        return self.rounds * self.size * (self.ranks - 1) // self.ranks

    def seconds(self, device: Device) -> float:
        """Seconds of all its calls in a step, over the links of `device`."""
        rate = device.local_link
        if self.ranks > self.local:
            rate = min(rate, self.local * device.link)
        hops = self.calls * self.rounds * math.ceil(math.log2(self.ranks))
        return self.sent / (rate * 1e9 * LINK_SHARE) + hops * HOP_SECONDS


@dataclass(frozen=True)
class Step:
    """The time of one step, without waiting for data or checkpoints.

    computing      seconds that one device computes; None where its speed is unknown
    communicating  seconds of all collectives
    hidden         seconds of those that overlap with computing
    sent           bytes that one process sends
    seconds        of the step; None where the device's speed is unknown
    """

    computing: float | None
    communicating: float
    hidden: float
    sent: int
    seconds: float | None


def step_of(job: Job, computing: float | None) -> Step:
    """The time of a job's step; `computing` is the seconds that one device computes in it, None: unknown."""
    exchanges = collectives(job)
    communicating = sum(each.seconds(job.device) for each in exchanges)
    hidden = sum(each.seconds(job.device) for each in exchanges if each.hidden)
    seconds = None if computing is None else max(computing, hidden) + communicating - hidden
    return Step(computing, communicating, hidden, sum(each.sent for each in exchanges), seconds)


def collectives(job: Job) -> list[Collective]:
    """All collectives of a step; [] on one process."""
    if job.world_size == 1:
        return []
    return [each for each in (*_weights(job), *_statistics(job)) if each.ranks > 1]


def _weights(job: Job) -> list[Collective]:
    """The collectives of gradients and, under FSDP, of weights."""
    sizes, options, everyone = job.sizes, job.config.parallel, (job.world_size, job.gpus)
    if job.strategy == "ddp":
        size = 4 * sizes.student
        return [Collective("gradients, all-reduce", size, math.ceil(size / DDP_BUCKET), *everyone, 2, True)]
    parts, blocks, units = job.config.optim.accumulate, sizes.depth + 1, sizes.depth + len(sizes.networks)
    group = (job.shard_size, min(job.shard_size, job.gpus))
    whole, backbone = (DTYPES[options.param_dtype].itemsize * job.padded(*names) for names in ((), ("backbone",)))
    passes = parts * (2 if options.reshard else 1)
    student, calls = passes * whole, passes * units
    if options.reshard and job.config.loss.koleo_weight > 0 and parts > 1:
        # Class tokens first; without `reshard` that pass leaves the weights for the next.
        student, calls = student + parts * backbone, calls + parts * blocks
    found = [Collective("student's weights, all-gather", student, calls, *group, 1, True)]
    if sizes.tutor is None:  # with one, the moving average sees no pictures
        found.append(Collective("teacher's weights, all-gather", parts * whole, parts * units, *group, 1, True))
    if again := parts * (job.config.loss.anchored + (job.config.loss.paka_weight > 0)):
        name = "weights that see global crops again, all-gather"
        found.append(Collective(name, again * backbone, again * blocks, *group, 1, True))
    reduced = parts * DTYPES[options.reduce_dtype].itemsize * job.padded()
    found.append(Collective("gradients, reduce-scatter", reduced, parts * units, *group, 1, True))
    copies = (job.copies, max(1, job.gpus // job.shard_size))
    size = reduced // job.shard_size
    return [*found, Collective("gradients, all-reduce between copies", size, parts * units, *copies, 2, True)]


def _statistics(job: Job) -> list[Collective]:
    """The collectives of prototype masses or centres, of KoLeo's class tokens, and of scalars (losses and norms)."""
    loss, sizes, everyone = job.config.loss, job.sizes, (job.world_size, job.gpus)
    prototypes = sizes.centers  # class tokens and patches are balanced apart
    found = [Collective("centres, all-reduce", 4 * prototypes, 2, *everyone, 2, False)]
    if loss.centering == "sinkhorn":
        size, calls = 4 * loss.sinkhorn_iterations * prototypes, 2 * (loss.sinkhorn_iterations + 1)
        found = [Collective("Sinkhorn, all-reduce", size, calls, *everyone, 2, False)]
    if loss.koleo_weight > 0:
        ranks = job.koleo_ranks
        tokens = 4 * 2 * job.config.batch_size * sizes.dim
        found.append(Collective("KoLeo, all-gather", ranks * tokens, 1, ranks, min(ranks, job.gpus), 1, False))
    scalars = 2 + len(sizes.networks) * (job.strategy == "fsdp")  # one says whether all are finite
    found.append(Collective("losses and norms, all-reduce", 4 * 5 * scalars, scalars, *everyone, 2, False))
    return found
