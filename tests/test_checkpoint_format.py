from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dinoreg.checkpoint import format as checkpoint
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
    own = tmp_path / ".unfinished-step_0000002.abcd"
    own.mkdir()
    checkpoint.remove_unfinished(tmp_path, "abcd")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [own.name, "last", "step_0000001"]


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    with pytest.raises(UserError, match=r"a.weight is \(2, 3\), this model has \(2, 4\)"):
        checkpoint.load(path, tensors(width=4))
    with pytest.raises(UserError, match=r"has no student\.c"):
        checkpoint.load(path, {"student": {"c": torch.zeros(1)}})


def test_metadata_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    witness = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (witness,))

    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[".metadata"] = {
        "size": (path / ".metadata").stat().st_size,
        "sha256": checkpoint.digest(path / ".metadata"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="no place in a checkpoint"):
        checkpoint.load(path, tensors())
    assert not witness.exists()


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
    assert description["sha256"] == checkpoint.digest(path)
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


def test_what_torchs_writer_says_of_a_full_disk_is_put_in_words() -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")
    assert checkpoint.reason(error) == "a write was cut short (No space left on device, or a failing disk)"
