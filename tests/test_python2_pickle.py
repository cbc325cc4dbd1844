"""CIFAR's pickles give what pickle itself would give, and a hostile one runs nothing."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoreg.evaluation.readers.python2_pickle import read_dictionary
from dinoreg.runtime.errors import UserError
from tests.miniatures import python2

ROWS = np.random.default_rng(0).integers(0, 256, size=(300, 7), dtype=np.uint8)
BATCH = {"data": ROWS, "labels": [3, 70_000, -1, 255, 256], "filenames": ["é.png", "b" * 300], "batch_label": "1 of 5"}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    assert found.keys() == expected.keys()
    assert found["data"].dtype == np.uint8
    return np.array_equal(found["data"], expected["data"]) and all(
        found[key] == expected[key] for key in found if key != "data"
    )


def refused(path: Path, content: bytes, expected: str, **options: int) -> None:
    """One line that names the dataset, the file and the reason."""
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_dictionary(path, "cifar10", "archive", **options)
    message = str(caught.value)
    assert message.startswith(f"cifar10: {path} ")
    assert "\n" not in message
    assert expected in message


def test_a_python_2_pickle_is_read_as_pickle_itself_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(python2.dumps(BATCH))
    assert same(read_dictionary(path, "cifar10", "archive"), pickle.loads(path.read_bytes(), encoding="latin1"))
    assert same(read_dictionary(path, "cifar10", "archive"), BATCH)


def test_the_text_protocol_is_read_as_pickle_itself_reads_it(tmp_path: Path) -> None:
    path, names = tmp_path / "batches.meta", {"num_vis": 3072, "label_names": ["airplane", "bird"]}
    path.write_bytes(python2.dumps_as_text(names))
    assert read_dictionary(path, "cifar10", "archive") == pickle.loads(path.read_bytes(), encoding="latin1") == names


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_batch_written_anew_by_python_3_is_read_too(tmp_path: Path, protocol: int, order: Any) -> None:
    path, batch = tmp_path / "batch", {**BATCH, "data": np.asarray(ROWS, order=order)}
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    assert same(read_dictionary(path, "cifar10", "archive"), BATCH)


@pytest.mark.parametrize("protocol", range(5))
def test_numbers_of_any_kind_are_read_at_any_depth(tmp_path: Path, protocol: int) -> None:
    arrays = [np.array([3, -70_000], dtype=kind) for kind in ("i4", "i8", "f4", "f8")]
    truth = {"gnd": [{"bbx": [1.5, -2.25, 3, 1e300], "easy": each, "pair": (each, "x")} for each in arrays]}
    path = tmp_path / "gnd"
    path.write_bytes(pickle.dumps(truth, protocol=protocol))
    found = read_dictionary(path, "roxford5k", "archive")["gnd"]
    for each, expected in zip(found, truth["gnd"], strict=True):
        assert each["bbx"] == expected["bbx"]
        for array in (each["easy"], each["pair"][0]):
            assert array.dtype == expected["easy"].dtype  # type: ignore[attr-defined]
            assert array.tolist() == [3, -70_000]


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "was_here"
    hostile = {"data": Hostile(os.system, f"touch {mark}")}
    content = pickle.dumps(hostile, protocol=protocol)
    refused(tmp_path / "batch", content, "system, which is not allowed")
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # it would have


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"(S'touch x'\nios\nsystem\n.", "os.system, which is not allowed"),
        (b"\x80\x02\x82\x01.", "not a readable pickle"),
        (b"Pname\n.", "persistent id"),
        (b"\x80\x02cnumpy\nload\n.", "numpy.load, which is not allowed"),
        (b"\x80\x02c_codecs\ndecode\n.", "_codecs.decode, which is not allowed"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0dfromfile\nnext\x93.", "numpy.fromfile next, which"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "not a readable pickle"),  # a bytearray of a terabyte
        (b"\x80\x02c_codecs\nencode\n}U\x08__code__K\x01sb.", "not a readable pickle"),
        (b"\x80\x02c_codecs\nencode\nN}U\x07__new__K\x01s\x86b.", "not a readable pickle"),
        (b"\x80\x02]q\x00.", "no dictionary with names for keys"),
        (b"\x80\x02}K\x01K\x02s.", "no dictionary with names for keys"),
        (b"\x80\x02}U\x01aU\x01b", "not a readable pickle"),
        (b"\x80\x02}]K\x01s.", "not a readable pickle"),  # a list as key
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "not a readable pickle"),  # says that it is 2 GB long
        (b"", "not a readable pickle"),
        (b"<html>moved</html>", "not a readable pickle"),
    ],
)
def test_what_a_batch_has_no_need_of_is_refused_in_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    refused(tmp_path / "batch", content, expected)


def test_arrays_of_objects_and_arrays_that_do_not_fill_their_shape_are_refused(tmp_path: Path) -> None:
    for odd in (np.array([[], {}], dtype=object), np.zeros(3, dtype="U4"), np.zeros(2, dtype="V4")):
        refused(tmp_path / "batch", pickle.dumps({"data": odd}, protocol=2), "expected u1")
    refused(tmp_path / "batch", pickle.dumps({"data": np.zeros(3, dtype=">i8")}, protocol=2), "highest byte first")
    content = python2.dumps({"data": ROWS[:9]})
    shape = b"K\x09K\x07\x86"
    assert content.count(shape) == 1
    for claimed in (b"K\x08K\x07\x86", b"J" + struct.pack("<i", 2**30) + b"K\x07\x86", b"J\xff\xff\xff\xffK\x07\x86"):
        refused(tmp_path / "batch", content.replace(shape, claimed), "do not fill it")
    begun = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87Rs."
    assert read_dictionary(_written(tmp_path / "batch", begun), "cifar10", "archive")["data"].shape == (0,)


def test_places_far_apart_take_no_memory(tmp_path: Path) -> None:
    path = _written(tmp_path / "batch", b"\x80\x02}r\xff\xff\xff\x7f.")
    tracemalloc.start()
    assert read_dictionary(path, "cifar10", "archive") == {}
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_every_cut_of_a_batch_is_a_readable_message(tmp_path: Path) -> None:
    content = python2.dumps({"data": ROWS[:2], "labels": [1, 2], "filenames": ["a", "b"]})
    assert read_dictionary(_written(tmp_path / "whole", content), "cifar10", "archive")["labels"] == [1, 2]
    for length in range(len(content)):
        refused(tmp_path / "cut", content[:length], "is not a readable pickle")


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_file_above_the_size_limit_is_not_opened(tmp_path: Path) -> None:
    content = python2.dumps(BATCH)
    refused(tmp_path / "batch", content, f"more than the {len(content) - 1:,} bytes", max_bytes=len(content) - 1)
    assert same(read_dictionary(tmp_path / "batch", "cifar10", "archive", max_bytes=len(content)), BATCH)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar10: .*none is missing; it comes from archive"):
        read_dictionary(tmp_path / "none", "cifar10", "archive")
