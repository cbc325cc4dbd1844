"""What a training step launches, waits for, moves and holds on a CUDA device, counted without one.

    python benchmarks/counts.py vits14_reg4 batch_size=128
    python benchmarks/counts.py vitl16_short_reg4_in1k batch_size=64 --traffic --kernels 20
    python benchmarks/counts.py vitl16_short_reg4_in1k batch_size=64 model.compile=true --traffic

PyTorch's CUDA code runs on a runtime that computes nothing (`tests/fake_cuda`; it is built on first use, with g++ and
PyTorch's CUDA packages). Counts are of one step without augmentation, after two others. There is no time in them. With
model.compile only the traffic counts: of the kernels that torch.compile plans, none is compiled or launched.
"""

from __future__ import annotations

import argparse
from collections import Counter

import measure
import yaml


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("config", help="a name in configs/, or a YAML file")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    options.add_argument("--traffic", action="store_true", help="list the bytes that operations move")
    options.add_argument("--kernels", type=int, default=0, metavar="N", help="list those launched most")
    given = options.parse_args()
    from tests.fake_cuda.build import problem
    from tests.fake_cuda.fixture import counts_of, run

    if reason := problem():
        raise SystemExit(f"no fake CUDA device: {reason}")
    overrides = {key: yaml.safe_load(value) for key, value in (each.split("=", 1) for each in given.overrides)}
    found = run("step", config=given.config, overrides=overrides, traffic=given.traffic)
    counts = counts_of(found["counts"])
    kernels = sum(counts.kernels.values())
    rows = [
        {"counted": "kernels", "in a step": kernels},
        {"counted": "matrix products", "in a step": counts.products},
        {"counted": "waits of the host", "in a step": sum(counts.waits.values())},
        {"counted": "GiB allocated, peak", "in a step": f"{counts.allocated / 2**30:.2f}"},
        {"counted": "GiB reserved, peak", "in a step": f"{counts.reserved / 2**30:.2f}"},
    ]
    if overrides.get("model.compile"):
        rows = []
    traffic = found["traffic"]
    if traffic:
        outside = sum(moved for kind, moved in traffic.items() if kind != "products")
        rows.append({"counted": "GB outside matrix products", "in a step": f"{outside / 1e9:.1f}"})
    moved = [{"operation": kind, "GB": f"{size / 1e9:.2f}"} for kind, size in Counter(traffic).most_common(25)]
    launched = [{"kernel": name[:160], "launches": n} for name, n in Counter(counts.kernels).most_common(given.kernels)]
    tables = [measure.table(table) for table in (rows, moved, launched) if table]
    results = {row["counted"]: row["in a step"] for row in rows}
    results |= {"attention": found["attention"], "waits": counts.waits}
    measure.report("counts", {"config": given.config, **overrides}, results, *tables)


if __name__ == "__main__":
    main()
