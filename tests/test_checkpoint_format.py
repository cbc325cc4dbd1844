from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.atomic import reason
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import RunError, UserError


def tensors(value: float = 1.0, width: int = 3) -> dict[str, Any]:
    return {
        "student": {"a.weight": torch.full((2, width), value), "b": torch.full((5,), -value)},
        "optimizer": {"a.weight": {"step": torch.tensor(value), "exp_avg": torch.full((2, width), value / 3)}},
        "scale": torch.tensor(value),
    }


def write(folder: Path, step: int, keep: int = 10) -> Path:
    return checkpoint.save(folder, step, tensors(step), {"step": step, "note": "é"}, keep)


def test_a_checkpoint_comes_back_exactly_with_its_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    target = tensors(0.0)
    numbers = checkpoint.load(path, target)
    assert (numbers["step"], numbers["note"]) == (7, "é")
    expected = checkpoint.flatten(tensors(7))
    for name, value in checkpoint.flatten(target).items():
        assert torch.equal(value, expected[name]), name


def test_the_newest_are_kept_and_the_best_besides(tmp_path: Path) -> None:
    write(tmp_path, 10)
    checkpoint.write_pointer(tmp_path, "best", 10)
    for step in (20, 30, 40):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_0000010", "step_0000030", "step_0000040"]
    assert checkpoint.read_pointer(tmp_path, "last") == "step_0000040"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path, damage: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = next(bad.glob("*.distcp"))
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "remove":
        file.unlink()
    elif damage == "no manifest":
        (bad / "manifest.json").unlink()
    else:
        (bad / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="step_0000002"):
        checkpoint.verify(bad)
    path, damaged = checkpoint.newest(tmp_path)
    assert path == good
    assert len(damaged) == 1
    assert "step_0000002" in damaged[0]


def test_an_unfinished_checkpoint_is_never_taken_for_one_and_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    half = tmp_path / ".unfinished-step_0000002"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"torn")
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step_0000001"
    (tmp_path / ".unfinished-step_0000002.abcd").mkdir()
    checkpoint.remove_unfinished(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["last", "step_0000001"]


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    with pytest.raises(UserError, match=r"a.weight is \(2, 3\), this model has \(2, 4\)"):
        checkpoint.load(path, tensors(width=4))
    with pytest.raises(UserError, match=r"has no student\.c"):
        checkpoint.load(path, {"student": {"c": torch.zeros(1)}})


# What a foreign checkpoint may hold. Each of these leaves a file where one of its doors is open.


class Touch:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def sign(path: Path) -> None:
    """The manifest of whatever is in the folder: whoever makes a checkpoint makes its manifest too."""
    files = [file for file in path.iterdir() if file.name != "manifest.json"]
    manifest = {file.name: {"size": file.stat().st_size, "sha256": digest(file)} for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


def refused(path: Path, match: str) -> None:
    """Neither verified, nor taken up as the newest, nor loaded; each time for the same reason."""
    for read in (checkpoint.verify, lambda path: checkpoint.load(path, tensors(), {"step": 1})):
        with pytest.raises(RunError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)
    found, damaged = checkpoint.newest(path.parent)
    assert found is None
    assert re.search(match, damaged[0].removesuffix("; passed over"))


def as_bytes(folder: Path, content: Any, names: Sequence[str] = ("scale",)) -> Path:
    """A checkpoint in which the entries `names` are not tensors but `content`, stored as DCP stores any object."""
    path = write(folder, 1)
    for file in [*path.glob("*.distcp"), path / ".metadata"]:
        file.unlink()
    state = checkpoint.flatten(tensors())
    dcp.save({**state, **dict.fromkeys(names, content)}, checkpoint_id=path, no_dist=True)
    sign(path)
    return path


@pytest.mark.parametrize("names", [("scale",), tuple(checkpoint.flatten(tensors()))], ids=["one", "all"])
@pytest.mark.parametrize("payload", ["object", "torch.save"])
def test_entries_that_are_bytes_are_refused_and_never_unpickled(
    tmp_path: Path, names: Sequence[str], payload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "ran"
    content: Any = Touch(trace)
    if payload == "torch.save":
        content = io.BytesIO()
        torch.save(Touch(trace), content)
    path = as_bytes(tmp_path / "checkpoints", content, names)
    if payload == "torch.save":  # the bytes themselves in place of DCP's pickle of them
        blob = content.getvalue()
        metadata = pickle.loads((path / ".metadata").read_bytes())
        for index, info in metadata.storage_data.items():
            if index.fqn in names:
                (path / f"{index.fqn}.distcp").write_bytes(blob)
                info.relative_path, info.offset, info.length = f"{index.fqn}.distcp", 0, len(blob)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        sign(path)
    refused(path, "BytesStorageMetadata has no place in a checkpoint's metadata")
    assert not trace.exists()

    # The same payload does run where DCP is asked as it comes: without this the test would prove nothing.
    dcp.load(checkpoint.flatten(tensors()), checkpoint_id=path, no_dist=True)
    assert trace.exists()
    trace.unlink()

    # And were the metadata to get through, the planner would still not unpickle it.
    plain = dcp.FileSystemReader(path)
    monkeypatch.setattr(plain, "path", path)
    with pytest.raises(RunError, match="is stored as bytes, not as a tensor"):
        checkpoint._read(plain, checkpoint.flatten(tensors()))
    assert not trace.exists()


def test_metadata_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 1)
    (path / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    sign(path)
    refused(path, "unreadable .*no place in a checkpoint")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["dict", "int", "list", "entry", "size", "storage", "attribute", "empty", "cut"])
def test_metadata_of_another_kind_are_unreadable_in_one_line(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "checkpoints", 1)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    content: Any = {"dict": {}, "int": 7, "list": [metadata]}.get(kind, metadata)
    if kind == "entry":
        metadata.state_dict_metadata["scale"] = metadata
    elif kind == "size":
        metadata.state_dict_metadata["scale"].size = 3
    elif kind == "storage":
        metadata.storage_data = list(metadata.storage_data)
    elif kind == "attribute":
        del metadata.state_dict_metadata["scale"].properties
    data = pickle.dumps(content)
    (path / ".metadata").write_bytes({"empty": b"", "cut": data[:-9]}.get(kind, data))
    sign(path)
    refused(path, r"\.metadata: unreadable \(.+\)$")


def test_tensors_are_read_from_files_of_the_checkpoint_only(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 1)
    (data,) = path.glob("*.distcp")
    data.rename(tmp_path / "outside.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for name in ("../../outside.distcp", str(tmp_path / "outside.distcp")):
        for info in metadata.storage_data.values():
            info.relative_path = name
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        sign(path)
        refused(path, "outside the checkpoint")


@pytest.mark.parametrize("left_out", [".metadata", "state.json", "__0_0.distcp", "all"])
def test_a_manifest_names_every_file_of_a_checkpoint(tmp_path: Path, left_out: str) -> None:
    path = write(tmp_path / "checkpoints", 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in list(manifest) if left_out == "all" else [left_out]:
        del manifest[name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    refused(path, f"its manifest does not name {'.metadata' if left_out == 'all' else left_out}")


@pytest.mark.parametrize("content", ["[]", "3", '{".metadata": 3}', '{".metadata": {}}', "[" * 200_000, "\xff"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_of_another_kind_is_unreadable_in_one_line(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / "checkpoints", 1)
    (path / name).write_bytes(content.encode("latin-1"))
    if name == "state.json":
        sign(path)
    refused(path, r"step_0000001: (unreadable \(.+\)|format version None, expected 1)$")


@pytest.mark.parametrize("numbers", [{}, {"step": "1"}, {"step": None}])
def test_numbers_that_a_run_needs_are_there_and_of_their_type(tmp_path: Path, numbers: dict[str, Any]) -> None:
    path = checkpoint.save(tmp_path, 1, tensors(), numbers, keep=1)
    with pytest.raises(RunError, match=r"unreadable \(state.json has no int step\)"):
        checkpoint.load(path, tensors(), {"step": 1})


def test_a_manifest_may_not_name_files_outside_the_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    (path / "manifest.json").write_text(json.dumps({"../secret": {"size": 1, "sha256": ""}}))
    with pytest.raises(RunError, match="outside"):
        checkpoint.verify(path)


def test_a_disk_that_cannot_be_written_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path, 1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(RunError, match="step_0000002 could not be written: No space left on device"):
        write(tmp_path, 2)
    assert checkpoint.newest(tmp_path)[0] == good
    assert checkpoint.read_pointer(tmp_path, "last") == "step_0000001"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step_0000001"]


@pytest.mark.parametrize("content", ["", "../../etc", "step_", "step_x", "nonsense"])
def test_a_pointer_that_names_no_step_is_no_pointer(tmp_path: Path, content: str) -> None:
    (tmp_path / "last").write_text(content)
    assert checkpoint.read_pointer(tmp_path, "last") is None
    assert checkpoint.read_pointer(tmp_path, "best") is None


def test_teacher_files_hold_float32_weights_and_what_is_needed_to_rebuild_them(tmp_path: Path) -> None:
    weights = {"backbone.x": torch.ones(3, dtype=torch.bfloat16), "dino_head.y": torch.zeros(2, 4).T}
    for step in (1, 2, 3):
        path = checkpoint.write_teacher(tmp_path, step, weights, {"architecture": {"dim": 8}})
    description = json.loads(path.with_suffix(".json").read_text())
    assert description["step"] == 3
    assert description["architecture"] == {"dim": 8}
    assert description["sha256"] == digest(path)
    loaded = load_file(path)
    assert loaded["backbone.x"].dtype == torch.float32
    assert torch.equal(loaded["dino_head.y"], weights["dino_head.y"])

    (tmp_path / "checkpoints").mkdir()
    checkpoint.write_pointer(tmp_path / "checkpoints", "best", 1)
    (tmp_path / "checkpoints" / "step_0000003").mkdir()
    checkpoint.retire_teachers(tmp_path)
    assert sorted(p.name for p in (tmp_path / "teacher").iterdir()) == [
        "step_0000001.json",
        "step_0000001.safetensors",
        "step_0000003.json",
        "step_0000003.safetensors",
    ]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_whoever_reads_the_run_folder_reads_its_weights(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = checkpoint.write_teacher(tmp_path, 1, {"backbone.x": torch.ones(3)}, {})
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (path, path.with_suffix(".json"))] == [mode, mode]


def test_what_torchs_writer_says_of_a_full_disk_is_put_in_words() -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")
    assert reason(error) == "a write was cut short (No space left on device, or a failing disk)"
