"""The register report as a page: verdict in words, models side by side, norms per block, where outliers sit, maps.

It shows what `measure.py` has measured and measures nothing itself. A picture never says more than its caption: maps
of attention that look clean are no proof that features are (Lappe and Giese, arXiv 2505.05892).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg.registers.figures import Seen, map_sheet, norm_figure, position_figure
from dinoreg.registers.verdict import comparison, judge, or_dash, percent
from dinoreg.reports import html
from dinoreg.reports.verdict import score
from dinoreg.visualize.gallery import Gallery, in_gallery

VIEW = "registers"


def write_registers(
    seen: Sequence[Seen], images: np.ndarray, out: Path, skipped: Sequence[tuple[str, str]] = ()
) -> Path:
    """`OUT/registers.html`, its pictures and `view.json` in `OUT/registers/`; returns the page.

    images   (k, H, W, 3) uint8: those whose maps are shown
    skipped  (name, reason) of images that could not be read
    """
    gallery = Gallery(VIEW, out)
    first = seen[0].record
    rows = comparison([each.record for each in seen])
    head = ["", *(each.record["name"] for each in seen)]
    compared = html.table(head, [[name, *cells] for name, cells in rows], numeric=range(1, len(head)))
    norms = gallery.picture(
        "norms",
        norm_figure([each.record for each in seen]),
        "norms of patches per block",
        "Left: norms of patches after every block, before the final norm (darker: more of them); dashed: CLS, "
        "thin: registers. Right: after the last block; dotted: the model's own limit, and 150 where it is in range.",
    )
    with_outliers = [each for each in seen if each.record["outliers"]["patches"]]
    places = ""
    if with_outliers:
        places = gallery.picture(
            "positions",
            position_figure([each.record for each in with_outliers]),
            "how often each position holds an outlier",
            "Share of images in which a position holds an outlier.",
        )
    maps = [
        gallery.picture(
            f"maps_{number}",
            map_sheet(each, images),
            f"maps of {each.record['name']}",
            f"{each.record['name']}: norms before the final norm (one scale for all images), then "
            "attention in the last block, each map to its own brightest patch.",
        )
        for number, each in enumerate(seen)
    ]
    sections: list[tuple[str, str, Sequence[str]]] = [
        ("verdict", "Verdict", [_verdict_card(each.record) for each in seen]),
        ("compare", "Side by side", [f'<div class="card">{compared}</div>']),
        ("norms", "Norms", [in_gallery([norms])]),
        ("places", "Where outliers sit", [in_gallery([places])]),
        ("maps", "Maps", [in_gallery(maps)]),
        ("probes", "What each token knows", _probe_cards([each.record for each in seen])),
        ("controls", "Replacement controls", _control_cards([each.record for each in seen])),
        ("test-time", "Test-time register", _test_time_cards([each.record for each in seen])),
        ("lost", "Object discovery", _discovery_cards([each.record for each in seen])),
        ("how", "How it is measured", [f'<div class="card">{_HOW}</div>']),
    ]
    if skipped:
        sections.append(("skipped", "Images left out", [html.table(("image", "reason"), skipped)]))
    facts = [
        ("models", str(len(seen)), ""),
        ("images", f"{first['images']:,}", first["source"]),
        ("resolution", f"{first['image_size'][0]} x {first['image_size'][1]} px", _grids(seen)),
    ]
    record = {"models": [each.record for each in seen]}
    return gallery.finish("Register report", ", ".join(head[1:]), facts, sections, record)


_HOW = (
    "<p>Norms are those of the tokens after a block, before the final norm. A patch is an outlier above the model's "
    "own limit: the median norm times the larger of 2 and exp(4 s), s being 1.4826 MAD of the log norms. Outliers are "
    "a group where tokens between them and the bulk are at most half as dense as among them, else a tail; fewer than "
    "5, or 0.05 % of patches, are taken for chance. The fixed limit of 150 is the registers paper's, for DINOv2-g.</p>"
    "<p>Neighbour cosine is taken after the patch embedding, before positions. Probes are logistic regressions on one "
    "token of every image, on 30 % of the images held out; intervals are 95 % bootstrap intervals over these. Controls "
    "put something else in place of a token after every block (of outliers: from the block on that they stand out "
    "from) and keep the probes as they were. Zero is content that no network meets in training; judge by the "
    "others.</p>"
)


def _verdict_card(record: dict[str, Any]) -> str:
    words = judge(record)
    sentences = "".join(f"<p>{html.escape(each)}</p>" for each in words.sentences)
    name = f'<p class="note">{html.escape(record["name"])}</p>'
    return f'<div class="card verdict {words.tone}"><p>{html.escape(words.headline)}</p>{sentences}{name}</div>'


def _probe_cards(records: Sequence[dict[str, Any]]) -> list[str]:
    cards = []
    for record in records:
        rows = [
            (p["token"], p["accuracy"], p["low"], p["high"], p["token"].startswith("register"))
            for p in record["probes"]
        ]
        if rows:
            counts = record["probes"][0]
            body = html.interval_rows(rows, score, None, 0.0, 1.0)
            note = f"{record['name']}: top-1; {counts['n_train']} images to learn from, {counts['n_test']} to test"
            cards.append(
                f'<div class="card"><p class="note">{html.escape(note)}</p>'
                f'<div class="scroll"><table><tbody>{body}</tbody></table></div></div>'
            )
    return cards


def _control_cards(records: Sequence[dict[str, Any]]) -> list[str]:
    cards = []
    head = ("replaced", "by", "images", "CLS probe", "mean patch probe", "CLS cosine", "patch cosine")
    for record in records:
        rows = [
            (
                row["what"],
                row["kind"],
                row["images"],
                or_dash(row["cls_accuracy"], score),
                or_dash(row["patch_accuracy"], score),
                f"{row['cls_cosine']:.3f}",
                f"{row['patch_cosine']:.3f}",
            )
            for row in record["controls"]
        ]
        if rows:
            table = html.table(head, rows, numeric=range(2, 7))
            cards.append(f'<div class="card"><p class="note">{html.escape(record["name"])}</p>{table}</div>')
    return cards


def _test_time_cards(records: Sequence[dict[str, Any]]) -> list[str]:
    cards = []
    for record in records:
        tried = record["test_time"]
        if tried is None:
            continue
        neurons = ", ".join(f"block {n['block'] + 1} unit {n['unit']}" for n in tried["neurons"][:12])
        more = f" and {len(tried['neurons']) - 12} more" if len(tried["neurons"]) > 12 else ""
        head = ("neurons", "outliers left", "cosine of other patches", "cosine of CLS")
        rows = [
            (t["neurons"], percent(t["share"]), f"{t['patch_cosine']:.3f}", f"{t['cls_cosine']:.3f}")
            for t in tried["trials"]
        ]
        text = (
            f"{record['name']}: the activation of {len(tried['neurons'])} register neurons ({neurons}{more}) goes to "
            f"an added token. Found and tried on the {tried['images']} images with most outliers "
            f"({percent(tried['before'])} of their patches); the model with it is measured on all images above."
        )
        table = html.table(head, rows, numeric=range(4))
        cards.append(f'<div class="card"><p class="note">{html.escape(text)}</p>{table}</div>')
    return cards


def _discovery_cards(records: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        (
            record["name"],
            score(found["plain"]),
            f"{score(found['CorLoc'])} ({score(found['low'])} to {score(found['high'])})",
            f"{found['bias']:g}",
            or_dash(found["chosen_on_other_half"], score),
            score(found["whole_image_box"]),
        )
        for record in records
        if (found := record["discovery"]) is not None
    ]
    if not rows:
        return []
    head = ("model", "plain", "best of ten biases", "bias", "bias chosen on the other half", "whole-image box")
    note = "LOST CorLoc with the normalised keys of the last block; a box that is the whole image needs no model."
    return [f'<div class="card"><p class="note">{note}</p>{html.table(head, rows)}</div>']


def _grids(seen: Sequence[Seen]) -> str:
    grids = dict.fromkeys(f"{each.record['grid'][0]} x {each.record['grid'][1]} patches" for each in seen)
    return ", ".join(grids)
