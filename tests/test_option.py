"""The language of options: one declaration gives parsing, checks, messages with the nearest spelling, and help."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest

from dinoreg.commands.doctor import explain
from dinoreg.commands.options import ACTIONS, VIEWS
from dinoreg.commands.registry import VERBS
from dinoreg.config.load import Config
from dinoreg.config.option import (
    REQUIRED,
    Options,
    Text,
    convert,
    describe,
    flat,
    fraction,
    keys_of,
    option,
    read,
    section,
)
from dinoreg.data.open import open_source
from dinoreg.evaluation.options import EvalOptions
from dinoreg.runtime.errors import UserError

CLASSES = sorted(
    {verb.options for verb in VERBS.values()} | set(VIEWS.values()) | set(ACTIONS.values()),
    key=lambda cls: cls.__name__,
)


@dataclass(frozen=True)
class Inner(Options, section="inner"):
    share: float = fraction(0.5, "of all", shapes_result=False)
    kind: str = option("cat", "of animal", choices=("cat", "dog", "bird"))
    span: tuple[float, float] = option((0.0, 1.0), "of values", low=0, ascending=True)
    counts: tuple[int, ...] = option((1, 2), "of things", low=1)


@dataclass(frozen=True)
class Outer(Options):
    name: str = option(REQUIRED, "what it is called")
    size: int | None = option(None, "of a side", unit="pixel", low=2, high=64)
    memory: str | None = option(None, "at most", pattern=r"\d+[KMG]", expected="a number with its unit, as 64G")
    inner: Inner = section(Inner)


def refusal(cls: type, *texts: str) -> str:
    with pytest.raises(UserError) as caught:
        read(cls, texts)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_are_read_by_their_types_with_what_was_given() -> None:
    options, given = read(Outer, ["name=12", "size=1e1", "inner.counts=7", "inner.span=[0,.5]", "memory=64g"])
    assert options == Outer("12", 10, "64g", Inner(counts=(7,), span=(0.0, 0.5)))
    assert given == {"name", "size", "memory", "inner.counts", "inner.span"}
    assert read(Outer, {"name": "x", "inner": {"kind": "dog"}})[0] == Outer("x", inner=Inner(kind="dog"))


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("knn", list[str] | None, ["knn"]),
        ("knn,logistic", list[str] | None, ["knn", "logistic"]),
        ("[knn, logistic]", list[str] | None, ["knn", "logistic"]),
        ("none", list[str] | None, None),
        ("10,20", tuple[int, ...], (10, 20)),
        ("0.5,1e3", list[float] | None, [0.5, 1000.0]),
        ("3,4", int | tuple[int, int] | None, (3, 4)),
        ("['a, b',x]", str | list[str], ["a, b", "x"]),
        ('["a, b",x]', str | list[str], ["a, b", "x"]),
        ("[it's,that's]", str | list[str], ["it's", "that's"]),
        ("photos, old", str | list[str], "photos, old"),  # a path with a comma
    ],
)
def test_lists_are_given_with_or_without_brackets(text: str, hint: Any, value: object) -> None:
    assert convert(Text(text), hint, "key", "here") == value


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("size=1", "a number of pixels in [2, 64], or none"),
        ("size=65", "a number of pixels in [2, 64], or none"),
        ("size=big", "a whole number or none"),
        ("memory=lots", "a number with its unit, as 64G, or none"),
        ("inner.share=1.1", "a number in [0, 1]"),
        ("inner.kind=bord", "cat, dog or bird; did you mean bird?"),
        ("inner.span=[1, 0]", "[low, high], each at least 0"),
        ("inner.span=[-1, 0]", "[low, high], each at least 0"),
        ("inner.counts=[]", "one or more, each at least 1"),
        ("inner.counts=[1, 0]", "each at least 1"),
        ("inner.counts=[1, x]", "a list of numbers"),
    ],
)
def test_a_refusal_names_the_key_the_value_and_what_is_accepted(text: str, accepted: str) -> None:
    message = refusal(Outer, "name=x", text)
    assert message.removesuffix(" (command line)") == f"{text}: expected {accepted}"


def test_unknown_and_missing_keys_are_named_with_the_nearest_or_the_meaning() -> None:
    assert refusal(Outer, "nam=x").startswith(
        "nam: unknown key (command line); did you mean name?; accepted: name, size"
    )
    assert refusal(Outer, "name=x", "inner.knd=dog").startswith(
        "inner.knd: unknown key (command line); did you mean inner.kind?"
    )
    assert refusal(Outer) == "name= is missing: what it is called"


def test_options_that_are_made_in_python_are_checked_too() -> None:
    with pytest.raises(UserError, match=r"^inner.share=2: expected a number in \[0, 1\]$"):
        dataclasses.replace(Inner(), share=2)
    with pytest.raises(UserError, match=r"^inner.share=nan: "):
        Inner(share=float("nan"))


def test_help_shows_type_default_meaning_and_range_or_the_values_given() -> None:
    rows = {key: (kind, meaning) for key, kind, meaning in describe(Outer)}
    assert list(rows) == list(keys_of(Outer))
    assert rows["name"] == ("str, required", "what it is called")
    assert rows["size"] == ("int | none = none", "of a side (a number of pixels in [2, 64])")
    assert rows["inner.kind"] == ("str = cat", "of animal (cat, dog or bird)")
    assert rows["inner.span"] == ("tuple[float, float] = [0, 1]", "of values ([low, high], each at least 0)")
    values = {key: kind for key, kind, _ in describe(Outer("x", size=8, inner=Inner(kind="dog")))}
    assert (values["name"], values["size"], values["inner.kind"]) == ("str = x", "int | none = 8", "str = dog")


def test_what_shapes_no_weights_can_be_left_out() -> None:
    options = Outer("x")
    assert set(flat(options)) == set(keys_of(Outer))
    assert set(flat(options)) - set(flat(options, shaping=True)) == {"inner.share"}


# ------------------------------------------------------------------------------------------------------------
# Every option there is


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_has_a_meaning_and_a_default_that_it_accepts(cls: type[Options]) -> None:
    rows = describe(cls)
    assert [key for key, _, _ in rows] == list(keys_of(cls))
    for key, kind, meaning in rows:
        assert (" = " in kind) != kind.endswith(", required"), key
        assert len(meaning) > 5, key


def bounded(cls: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, declaration) of every option."""
    found = []
    for item in dataclasses.fields(cls):
        if "option" in item.metadata:
            found.append((f"{prefix}{item.name}", item.metadata["option"]))
        else:
            found += bounded(item.default_factory, f"{item.name}.")
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_lies_outside_a_range_or_a_choice_is_refused_by_its_full_key(cls: type[Options]) -> None:
    required = [f"{key}=x" for key, kind, _ in describe(cls) if kind.endswith(", required")]
    for key, declared in bounded(cls):
        pair = "tuple[float, float]" in str(keys_of(cls)[key])
        outside = [bound - 1 for bound in (declared.low, declared.above) if bound is not None]
        outside += [bound for bound in (declared.above, declared.below) if bound is not None]
        outside += [bound + 1 for bound in (declared.high, declared.below) if bound is not None]
        for value in [f"[{each}, {each}]" if pair else each for each in outside] + ["hcoice"] * bool(declared.choices):
            message = refusal(cls, *required, f"{key}={value}")
            assert message.startswith(f"{key}="), message
            assert ": expected " in message, message


@pytest.mark.parametrize(
    "text",
    [
        *("threads=1000000", "data.workers=100000", "model.depth=100000", "seed=99999999999999999999999"),
        *("head.prototypes=100000000000", "head.prototypes=4e7", "model.dim=1000000", "crops.global_size=16000000"),
        *("batch_size=100000000", "data.prefetch=10000000"),
    ],
)
def test_numbers_that_no_machine_can_serve_are_refused_by_name(text: str) -> None:
    assert refusal(Config, text).startswith(f"{text.partition('=')[0]}=")


def test_evaluations_refuse_what_their_protocols_cannot_do() -> None:
    for text in ("knn.k=[0]", "linear.lrs=[]", "depth.variants=[1,0]", "workers=100000"):
        assert refusal(EvalOptions, text).startswith(text.partition("=")[0])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_number_has_an_upper_bound_and_the_message_names_its_key(cls: type[Options]) -> None:
    hints = keys_of(cls)
    for key, declared in bounded(cls):
        if re.search(r"\b(int|float)\b", str(hints[key])):
            for value in (2**64, math.inf) if "float" not in str(hints[key]) else (math.inf,):
                with pytest.raises(UserError, match=rf"^{re.escape(key)}=.*: expected "):
                    declared.check(key, value)


@pytest.mark.parametrize(
    "spec", ["count=100000000000", "size=1000000", "size=8", "seed=-1", "seed=9223372036854775808"]
)
def test_sizes_of_scenes_that_no_machine_holds_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match=rf"scenes.{spec}: expected"):
        open_source(f"scenes:{spec}")


def test_running_out_of_memory_names_what_to_lower() -> None:
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes"
    assert "1 GiB at once" in (explain(RuntimeError(text)) or "")
    assert "batch_size" in (explain(MemoryError()) or "")
