"""A self-contained result: the number, its uncertainty, its settings, and what it is compared with."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Row:
    """One figure of one protocol on one dataset.

    value, low, high  the figure and its 95 % bootstrap interval, in `unit`; shares lie in [0, 1]
    variant           what distinguishes it in words: "k = 20", "11-point", "lin.4", "final, matched"
    chosen_on         where hyper-parameters were chosen: "the official validation split", "a tenth of train, seed 0",
                      "the reported split itself", or "" where nothing was chosen
    hours             that it took, in wall time
    chance, majority  the figures of guessing, and of always answering the most frequent class of train, or None
    settings          of the protocol: every option that was used, and what was chosen
    details           further figures of the same predictions: {"micro": …, "macro": …}
    n_train, n_test   images (or pairs) learnt from and scored
    warnings          doubts that the protocol has about its own figure, each begins with a name
    against           {baseline: {"difference", "low", "high", "verdict"}}, as `comparison.compare` gives them
    tested            16 hexadecimal digits over the images, their truth and the seed: equal ones pair replicates
    replicates        the figure of each bootstrap resample; figures of the same images and seed have the same resamples
    """

    protocol: str
    metric: str
    value: float
    low: float
    high: float
    unit: str = "share"  # share (shown as %) | m | px
    higher_is_better: bool = True
    variant: str = ""
    chosen_on: str = ""
    seeds: tuple[int, ...] = (0,)
    n_train: int = 0
    n_test: int = 0
    hours: float = 0.0
    chance: float | None = None
    majority: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    warnings: tuple[str, ...] = ()
    tested: str = ""
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    replicates: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def as_dict(self, replicates: bool = True) -> dict[str, Any]:
        """The fields in JSON's types, NaN and infinity as text; replicates as base64 of float64, or left out."""
        kept = packed(self.replicates if replicates else (), "<f8")
        return {**plain(asdict(replace(self, replicates=()))), "replicates": kept}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The row of a dictionary from `as_dict`, without unknown keys; KeyError, TypeError or ValueError for
        another."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        known["seeds"], known["warnings"] = tuple(known.get("seeds", (0,))), tuple(known.get("warnings", ()))
        known["replicates"] = tuple(unpacked(known.get("replicates", ""), "<f8").tolist())
        for key in ("value", "low", "high"):
            known[key] = float(known[key])
        return cls(**known)

    @property
    def key(self) -> tuple[str, str, str]:
        """(protocol, metric, variant): rows of two encoders with the same key are comparable."""
        return self.protocol, self.metric, self.variant


def packed(values: ArrayLike, kind: str) -> str:
    """Numbers (n,) as text: base64 of a type of NumPy's, such as "<f8"."""
    return base64.b64encode(np.asarray(values, dtype=kind).tobytes()).decode()


def unpacked(text: str, kind: str) -> np.ndarray:
    """The numbers (n,) in the text of `packed`."""
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def headlines(rows: Sequence[Row]) -> list[Row]:
    """The first row of each protocol."""
    return list({row.protocol: row for row in reversed(rows)}.values())[::-1]


def plain(value: Any) -> Any:
    """A value in JSON's types: keys as text, tuples and arrays as lists, NaN and infinity as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if hasattr(value, "tolist"):  # a number or an array of NumPy or PyTorch
        return plain(value.tolist())
    return value


@dataclass(frozen=True, repr=False)
class Result:
    """One dataset, measured: the rows of the model and of each baseline, with what identifies the measurement.

    key       hash over everything that shapes the numbers: the same key need not be measured again
    rows      of the model, the headline first
    baselines {"random init": rows, "raw pixels": rows}
    facts     of the evaluation: weights, title, task, published numbers, precision, date, …
    """

    dataset: str
    key: str
    rows: tuple[Row, ...]
    baselines: dict[str, tuple[Row, ...]]
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        row = self.headline
        return f"<{row.metric} on {self.dataset}: {row.value:.4g} [{row.low:.4g}, {row.high:.4g}]>"

    @property
    def headline(self) -> Row:
        """The model's first row."""
        return self.rows[0]

    def baseline(self, name: str, row: Row) -> Row | None:
        """The row of the baseline `name` with the same protocol, metric and variant; None without one."""
        return next((each for each in self.baselines.get(name, ()) if each.key == row.key), None)

    def as_dict(self) -> dict[str, Any]:
        """The content of `eval/<step>/<dataset>.json`: the headline on top, every row below.

        The model's rows keep their replicates, by which other weights can be compared with these.
        """
        top = self.headline
        return {
            "format": FORMAT,
            "version": 1,
            "dataset": self.dataset,
            "key": self.key,
            "probe": top.protocol,
            **{key: value for key, value in top.as_dict(replicates=False).items() if key in _ON_TOP},
            "baselines": {
                name: {key: plain(getattr(row, key)) for key in ("value", "low", "high")}
                for name in self.baselines
                if (row := self.baseline(name, top)) is not None
            },
            **plain(self.facts),
            "rows": [row.as_dict() for row in self.rows],
            "baseline_rows": {
                name: [row.as_dict(replicates=False) for row in rows] for name, rows in self.baselines.items()
            },
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """The result of a dictionary from `as_dict`; KeyError, TypeError or ValueError for another."""
        if values.get("format") != FORMAT or values.get("version") != 1 or not values["rows"]:
            raise ValueError(f"not a {FORMAT} record of version 1")
        known = {*_ON_TOP, "format", "version", "dataset", "key", "probe", "baselines", "rows", "baseline_rows"}
        return cls(
            values["dataset"],
            values["key"],
            tuple(Row.from_dict(row) for row in values["rows"]),
            {name: tuple(Row.from_dict(row) for row in rows) for name, rows in values["baseline_rows"].items()},
            {key: value for key, value in values.items() if key not in known},
        )


FORMAT = "dinoreg-evaluation"
_ON_TOP = (
    *("metric", "value", "low", "high", "unit", "higher_is_better"),
    *("chance", "majority", "n_train", "n_test", "variant", "against"),
)
