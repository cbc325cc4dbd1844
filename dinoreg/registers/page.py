"""The register report as a page: verdict in words, models side by side, norms per block, where outliers sit, maps.

It shows what `measure.py` has measured and measures nothing itself. A picture never says more than its caption: maps
of attention that look clean are no proof that features are (Lappe and Giese, arXiv 2505.05892).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.registers.figures import map_sheet, norm_figure, position_figure
from dinoreg.registers.measure import Measured
from dinoreg.registers.verdict import comparison, judge, or_dash
from dinoreg.reports.html import Scale
from dinoreg.runtime.templates import percent, score
from dinoreg.visualize.gallery import Gallery

VIEW = "registers"


def write_registers(
    measured: Sequence[Measured], images: np.ndarray, out: Path, skipped: Sequence[tuple[str, str]] = ()
) -> Path:
    """`OUT/registers.html`, its pictures and `view.json` in `OUT/registers/`; returns the page.

    images   (k, H, W, 3) uint8: those whose maps are shown
    skipped  (name, reason) of images that could not be read
    """
    gallery = Gallery(VIEW, out)
    records = [each.record for each in measured]
    first, names = records[0], [record["name"] for record in records]
    grids = dict.fromkeys(f"{rows} x {columns} patches" for rows, columns in (each["grid"] for each in records))
    facts = [
        ("models", str(len(records)), ""),
        ("images", f"{first['images']:,}", first["source"]),
        ("resolution", f"{first['image_size'][0]} x {first['image_size'][1]} px", ", ".join(grids)),
    ]
    return gallery.write_page(
        "Register report",
        facts,
        {"models": records},
        folder="registers",
        lead=", ".join(names),
        judged=[(record, judge(record)) for record in records],
        compared_head=["", *names],
        compared=[[name, *cells] for name, cells in comparison(records)],
        probed=[(record, _probe_scale(record)) for record in records if record["probes"]],
        controlled=[(record["name"], [_control_row(row) for row in record["controls"]]) for record in records],
        fitted=[(record, _trial_rows(record)) for record in records if record["test_time"] is not None],
        discovery=[_discovery_row(record) for record in records if record["discovery"] is not None],
        skipped=skipped,
        **_figures(gallery, measured, images),
    )


def _figures(gallery: Gallery, measured: Sequence[Measured], images: np.ndarray) -> dict[str, Any]:
    records = [each.record for each in measured]
    norms = gallery.picture(
        "norms",
        norm_figure(records),
        "norms of patches per block",
        "Left: norms of patches after every block, before the final norm (darker: more of them); dashed: CLS, "
        "thin: registers. Right: after the last block; dotted: the model's own limit, and 150 where it is in range.",
    )
    with_outliers = [record for record in records if record["outliers"]["patches"]]
    positions = None
    if with_outliers:
        positions = gallery.picture(
            "positions",
            position_figure(with_outliers),
            "how often each position holds an outlier",
            "Share of images in which a position holds an outlier.",
        )
    maps = [
        gallery.picture(
            f"maps_{number}",
            map_sheet(each, images),
            f"maps of {each.record['name']}",
            f"{each.record['name']}: norms before the final norm (one scale for all images), then attention in the "
            "last block, each map to its own brightest patch.",
        )
        for number, each in enumerate(measured)
    ]
    return {"norms": norms, "positions": positions, "maps": maps}


def _probe_scale(record: dict[str, Any]) -> Scale:
    return Scale(
        [(p["token"], p["accuracy"], p["low"], p["high"], p["token"].startswith("register")) for p in record["probes"]]
    )


def _control_row(row: dict[str, Any]) -> tuple[Any, ...]:
    accuracies = (or_dash(row[f"{token}_accuracy"], score) for token in ("cls", "patch"))
    return (
        row["what"],
        row["kind"],
        row["images"],
        *accuracies,
        f"{row['cls_cosine']:.3f}",
        f"{row['patch_cosine']:.3f}",
    )


def _trial_rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (trial["neurons"], percent(trial["share"]), f"{trial['patch_cosine']:.3f}", f"{trial['cls_cosine']:.3f}")
        for trial in record["test_time"]["trials"]
    ]


def _discovery_row(record: dict[str, Any]) -> tuple[str, ...]:
    found = record["discovery"]
    return (
        record["name"],
        score(found["plain"]),
        f"{score(found['CorLoc'])} ({score(found['low'])} to {score(found['high'])})",
        f"{found['bias']:g}",
        or_dash(found["chosen_on_other_half"], score),
        score(found["whole_image_box"]),
    )
