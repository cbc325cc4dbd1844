"""The keys of `dinoreg plan` other than those of the config."""

from dataclasses import dataclass

from dinoreg.config.option import Options, option, output


@dataclass(frozen=True)
class PlanOptions(Options):
    """The machines that `dinoreg plan` computes for, and figures that it uses in place of its own."""

    nodes: int | None = option(None, "machines; with none of nodes, gpus, gpu and memory: one process here", low=1)
    gpus: int | None = option(None, "devices of a machine; none: 8, or 1 on a CPU", low=1)
    gpu: str | None = option(None, "their kind, as h100, a100-40, rtx4090; none: the one here, else h100")
    memory: float | None = option(None, "GiB of a device; none: what that kind has", above=0)
    link: float | None = option(None, "GB/s from a device to other machines; none: what is usual for its kind", above=0)
    local_link: float | None = option(None, "GB/s from a device to its neighbours; none: its maker's figure", above=0)
    utilisation: float | None = option(
        None, "where nothing is measured; none: by the width", above=0, high=1, expected="a share of the peak in (0, 1]"
    )
    num_images: int | None = option(None, "in the data set; none: counted in data=, where that is here", low=1)
    disk: float = option(1.0, "GB/s at which all processes together write a checkpoint", above=0)
    probe: bool | None = option(None, "run a few steps here; none: on CUDA if it fits, on a CPU if quick")
    out: str | None = output(None, "JSON file for every figure")
