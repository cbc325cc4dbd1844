"""Files that would run a command where a reader obeyed them, and the commands of dinoreg that read them.

Each payload makes a folder, so that whether it ran can be seen. A door is a command and the place of the file that it
is given; a trial is one payload at one door, with the exit codes that it may end with.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miniatures.pictures import pattern
from safetensors.torch import save_file

from dinoreg.checkpoint.format import MANIFEST, METADATA, _entry
from dinoreg.runtime.digest import digest
from tests.hostile import Payload

RUN = "run"  # a whole run of two steps, in the folder of every trial
SCENES = "data=scenes:count=4,size=32"
OWN = ["model.name=vitt8_reg4", "steps=2", "batch_size=2", "probe.every=0", "data.workers=0", "log.tensorboard=false"]


@dataclass(frozen=True)
class Trial:
    """A payload at a door.

    name      door: format
    lay       (folder, mark) puts the payload into the folder and returns the command's arguments; it would make `mark`
    codes     exit codes that are a good end
    slow      whether it takes more than a moment
    payloads  of which one would be enough
    """

    name: str
    lay: Callable[[Path, Path], list[str]]
    codes: tuple[int, ...] = (2,)
    slow: bool = False
    payloads: int = 1


# ------------------------------------------------------------------------------------------------------------
# Pickles, by the instruction that calls


def _reduced(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


def _text(mark: Path) -> bytes:
    return b"cos\nmkdir\n(V" + bytes(mark) + b"\ntR."


def _instance(mark: Path) -> bytes:
    return b"(V" + bytes(mark) + b"\nios\nmkdir\n."


def _object(mark: Path) -> bytes:
    return b"(cos\nmkdir\nV" + bytes(mark) + b"\no."


def _evaluated(mark: Path) -> bytes:
    return b"cbuiltins\neval\n(V__import__('os').mkdir('" + bytes(mark) + b"')\ntR."


def _by_attribute(mark: Path) -> bytes:
    """`os.mkdir` as an attribute of a module that readers of weights know."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    path = bytes(mark)
    name = text("torch.serialization") + text("os.mkdir")
    return b"\x80\x04" + name + b"\x93X" + struct.pack("<I", len(path)) + path + b"\x85R."


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "pickle": _reduced,
    "pickle of protocol 0": _text,
    "pickle by INST": _instance,
    "pickle by OBJ": _object,
    "pickle by eval": _evaluated,
    "pickle by an attribute": _by_attribute,
}


def _zipped(mark: Path) -> bytes:
    return _saved({"model": Payload(mark)})


def _legacy(mark: Path) -> bytes:
    return _saved({"model": Payload(mark)}, _use_new_zipfile_serialization=False)


def _beside_tensors(mark: Path) -> bytes:
    state = {"cls_token": torch.zeros(1, 1, 12), "pos_embed": torch.zeros(1, 5, 12)}
    return _saved({"model": state, "args": Payload(mark)})


def _saved(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def _old_tar(mark: Path) -> bytes:
    """What torch wrote before version 0.2."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            _add(archive, name, _reduced(mark))
    return file.getvalue()


def _objects(mark: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload(mark)], dtype=object))
    return file.getvalue()


def _objects_zipped(mark: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, evidence=np.array([Payload(mark)], dtype=object), paths=np.array([Payload(mark)], dtype=object))
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


TORCH: dict[str, Callable[[Path], bytes]] = {
    "torch's zip": _zipped,
    "torch's zip, beside tensors": _beside_tensors,
    "torch's file of before 1.6": _legacy,
    "torch's tar": _old_tar,
    "objects of numpy": _objects,
    "objects of numpy, zipped": _objects_zipped,
    **PICKLES,
}


# ------------------------------------------------------------------------------------------------------------
# Weights


def _weights() -> Iterator[Trial]:
    def file(name: str, verb: str, write: Callable[[Path], bytes]) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            (folder / name).write_bytes(write(mark))
            for number in range(4 if "labelled" in verb else 0):
                (folder / "labelled" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
                pattern(number % 2, number).save(folder / "labelled" / "ab"[number % 2] / f"{number}.png")
            return [part.format(file=folder / name, folder=folder) for part in verb.split()]

        return lay

    embed = f"embed {SCENES} weights={{file}} out={{folder}}/out.safetensors device=cpu"
    for what, write in TORCH.items():
        for name in ("w.pth", "w.safetensors"):
            yield Trial(f"embed weights={name}: {what}", file(name, embed, write))
    yield Trial("embed weights=w.onnx: torch's zip", file("w.onnx", embed, _zipped))
    few = {what: TORCH[what] for what in ("torch's zip", "torch's file of before 1.6", "pickle of protocol 0")}
    own = " ".join(OWN)
    doors = {
        "pretrain init": f"pretrain quickstart {own} {SCENES} init={{file}} out={{folder}}/out",
        "pretrain distill": f"pretrain quickstart {own} {SCENES} distill={{file}} out={{folder}}/out",
        "export": "export weights={file} format=safetensors out={folder}/out",
        "view": "view norms weights={file} images=scenes:count=2,size=32 out={folder}/out",
        "registers": "registers weights={file} images=scenes:count=2,size=32 out={folder}/out",
        "eval": "eval {folder}/labelled weights={file} out={folder}/out",
        "verdict": "verdict {folder}/labelled weights={file} out={folder}/out",
        "verdict public": "verdict {folder}/labelled weights={folder}/run public={file} out={folder}/out",
        "plan init": f"plan quickstart {SCENES} init={{file}}",
    }
    for door, verb in doors.items():
        for what, write in few.items():
            slow, codes = door.startswith(("pretrain", "plan")), (0, 2) if door == "plan init" else (2,)
            yield Trial(f"{door}: {what}", file("w.pt", verb, write), codes, slow)


def _folders() -> Iterator[Trial]:
    """Folders as those of other libraries, with code for them to follow."""

    def folder_with(files: Callable[[Path, Path], None]) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            (folder / "w").mkdir()
            files(folder / "w", mark)
            return ["embed", SCENES, f"weights={folder / 'w'}", f"out={folder / 'out.safetensors'}", "device=cpu"]

        return lay

    def code(mark: Path) -> str:
        return f"import os\nos.mkdir({str(mark)!r})\n"

    def config(folder: Path, **more: Any) -> None:
        sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "patch_size": 8, "image_size": 32}
        content = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "mlp_ratio": 4, **sizes, **more}
        (folder / "config.json").write_text(json.dumps(content))

    def auto_map(folder: Path, mark: Path) -> None:
        config(
            folder, auto_map={"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"}, trust_remote_code=True
        )
        (folder / "modeling.py").write_text(code(mark))
        save_file({"embeddings.cls_token": torch.zeros(1, 1, 12)}, folder / "model.safetensors")

    def pickled(folder: Path, mark: Path) -> None:
        config(folder)
        torch.save({"embeddings.cls_token": Payload(mark)}, folder / "pytorch_model.bin")

    def processor(folder: Path, mark: Path) -> None:
        pickled(folder, mark)
        own = {"auto_map": {"AutoImageProcessor": "modeling.Processor"}, "image_processor_type": "Processor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(own))
        (folder / "modeling.py").write_text(code(mark))

    def index(folder: Path, mark: Path) -> None:
        config(folder)
        content = {"weight_map": {"embeddings.cls_token": "part.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        torch.save({"embeddings.cls_token": Payload(mark)}, folder / "part.bin")

    def index_of_pickles(folder: Path, mark: Path) -> None:
        config(folder)
        content = {"weight_map": {"embeddings.cls_token": "part.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        (folder / "part.safetensors").write_bytes(_zipped(mark))

    def torch_index(folder: Path, mark: Path) -> None:
        config(folder)
        content = {"weight_map": {"embeddings.cls_token": "pytorch_model-1.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        torch.save({"embeddings.cls_token": Payload(mark)}, folder / "pytorch_model-1.bin")

    def timm(folder: Path, mark: Path) -> None:
        content = {"architecture": "vit_small_patch16_224", "pretrained_cfg": {"custom_load": "modeling:load"}}
        (folder / "config.json").write_text(json.dumps(content))
        torch.save({"cls_token": Payload(mark)}, folder / "pytorch_model.bin")
        (folder / "modeling.py").write_text(code(mark))

    def hub(folder: Path, mark: Path) -> None:
        (folder / "hubconf.py").write_text(code(mark))
        torch.save({"cls_token": Payload(mark)}, folder / "model.pth")

    def package(folder: Path, mark: Path) -> None:
        for name in ("__init__.py", "setup.py", "conftest.py", "sitecustomize.py", "torch.py", "model.py"):
            (folder / name).write_text(code(mark))
        torch.save({"cls_token": Payload(mark)}, folder / "model.pth")

    def header(folder: Path, mark: Path) -> None:
        texts = {"format": "pt", "config": f"!!python/object/apply:os.mkdir [{mark}]", "code": code(mark)}
        texts["__reduce__"] = json.dumps(["os.mkdir", [str(mark)]])
        save_file({"cls_token": torch.zeros(1, 1, 12)}, folder / "w.safetensors", texts)

    for what, files in {
        "transformers' auto_map": auto_map,
        "transformers' pytorch_model.bin": pickled,
        "transformers' image processor": processor,
        "an index of a pickle": index,
        "an index of a pickle called safetensors": index_of_pickles,
        "transformers' index of pickles": torch_index,
        "timm's custom_load": timm,
        "torch.hub's hubconf.py": hub,
        "a package": package,
        "texts in a safetensors header": header,
    }.items():
        yield Trial(f"embed weights=FOLDER: {what}", folder_with(files))


# ------------------------------------------------------------------------------------------------------------
# Run folders and checkpoints


def _resume(folder: Path) -> list[str]:
    return ["pretrain", str(folder / RUN), "resume=true", "steps=4", f"out={folder / RUN}"]


def _checkpoint(folder: Path) -> Path:
    return max((folder / RUN / "checkpoints").glob("step_*"))


def _signed(path: Path) -> None:
    """Give a changed checkpoint a manifest that says it is whole, as whoever changes it would."""
    entries = {file.name: _entry(file) for file in sorted(path.iterdir()) if file.name != MANIFEST}
    (path / MANIFEST).write_text(json.dumps(entries))


def _checkpoints() -> Iterator[Trial]:
    def changed(change: Callable[[Path, Path], None]) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            for path in (folder / RUN / "checkpoints").glob("step_*"):
                change(path, mark)
                _signed(path)
            return _resume(folder)

        return lay

    def metadata(write: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
        def change(path: Path, mark: Path) -> None:
            (path / METADATA).write_bytes(write(mark))

        return change

    for what, write in PICKLES.items():
        yield Trial(f"resume, .metadata: {what}", changed(metadata(write)), (1,), slow=True)

    def as_bytes(content: Callable[[Path], bytes], every: bool) -> Callable[[Path, Path], None]:
        """Entries of tensors declared as bytes, which DCP unpickles, and the files in their place."""

        def change(path: Path, mark: Path) -> None:
            from torch.distributed.checkpoint.metadata import BytesStorageMetadata

            found = pickle.loads((path / METADATA).read_bytes())
            data, where = content(mark), sorted(found.storage_data, key=lambda index: index.fqn)
            for index in where if every else where[:1]:
                info = found.storage_data[index]
                found.state_dict_metadata[index.fqn] = BytesStorageMetadata()
                info.relative_path, info.offset, info.length = "evil.distcp", 0, len(data)
            (path / "evil.distcp").write_bytes(data)
            (path / METADATA).write_bytes(pickle.dumps(found))

        return change

    for what in ("torch's zip", "torch's file of before 1.6", "pickle of protocol 0"):
        yield Trial(f"resume, an entry of bytes: {what}", changed(as_bytes(TORCH[what], False)), (1,), slow=True)
        yield Trial(f"resume, all entries of bytes: {what}", changed(as_bytes(TORCH[what], True)), (1,), slow=True)

    def data(write: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
        def change(path: Path, mark: Path) -> None:
            found, content = pickle.loads((path / METADATA).read_bytes()), write(mark)
            for info in found.storage_data.values():
                info.offset, info.length = 0, len(content)
            for file in path.glob("*.distcp"):
                file.write_bytes(content)
            (path / METADATA).write_bytes(pickle.dumps(found))

        return change

    for what in ("torch's zip", "torch's file of before 1.6", "pickle"):
        yield Trial(f"resume, the file of tensors: {what}", changed(data(TORCH[what])), (1,), slow=True)

    def elsewhere(path: Path, mark: Path) -> None:
        found = pickle.loads((path / METADATA).read_bytes())
        for info in found.storage_data.values():
            info.relative_path = "../../../outside.distcp"
        (path.parents[2] / "outside.distcp").write_bytes(_zipped(mark))
        (path / METADATA).write_bytes(pickle.dumps(found))

    yield Trial("resume, relative_path: torch's zip", changed(elsewhere), (1,), slow=True)

    def encoded(path: Path, mark: Path) -> None:
        found = pickle.loads((path / METADATA).read_bytes())
        for info in found.storage_data.values():
            info.transform_descriptors = [str(mark)]
        (path / METADATA).write_bytes(pickle.dumps(found))

    yield Trial("resume, transform_descriptors", changed(encoded), (1,), slow=True)

    def planned(path: Path, mark: Path) -> None:
        found = pickle.loads((path / METADATA).read_bytes())
        found.planner_data = Payload(mark)
        (path / METADATA).write_bytes(pickle.dumps(found))

    yield Trial("resume, planner_data", changed(planned), (1,), slow=True)


def _run_folders() -> Iterator[Trial]:
    embed = "embed data=scenes:count=4,size=32 weights={run} out={folder}/out.safetensors"

    def in_run(name: str, write: Callable[[Path], bytes], verb: str = embed) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            for path in [*(folder / RUN).glob(name)] or [folder / RUN / name]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(write(mark))
                if (stated := path.with_suffix(".json")).is_file() and path.suffix == ".safetensors":
                    stated.write_text(json.dumps(json.loads(stated.read_text()) | {"sha256": digest(path)}))
            return [part.format(run=folder / RUN, folder=folder) for part in verb.split()]

        return lay

    for what in ("torch's zip", "pickle"):
        yield Trial(f"embed, teacher file: {what}", in_run("teacher/*.safetensors", TORCH[what]))
    last = in_run("checkpoints/last", lambda mark: f"step_$(mkdir {mark})".encode())
    yield Trial("embed RUN/last: command", last, (0,))
    resume = "pretrain {run} resume=true steps=3 out={run}"
    lay = in_run("init.safetensors", TORCH["torch's zip"], resume)
    yield Trial("resume, init.safetensors: torch's zip", lay, (0, 1, 2), slow=True)

    def job(mark: Path) -> bytes:
        """A job of the files beside it, whose process is not one of ours."""
        record = {"job": "1", "launch": 1, "kind": "pretrain", "group": "pretrain", "cluster": "local", "nodes": 1}
        record |= {"command": ["mkdir", str(mark)], "tasks": 1, "run": "", "after": [], "runner": [1, 1.0], "code": ""}
        return json.dumps({**record, "directory": "", "time": 1.5}).encode() + b"\n"

    for name in ("1_submitted.pkl", "1_0_result.pkl", "1_0_events.jsonl", "jobs.jsonl"):
        for verb in ("status", "logs", "cancel"):

            def lay_job(folder: Path, mark: Path, name: str = name, verb: str = verb) -> list[str]:
                in_run("launch/jobs.jsonl", job)(folder, mark)
                return in_run(f"launch/{name}", _reduced, f"launch {verb} {{run}}")(folder, mark)

            yield Trial(f"launch {verb}, {name}: pickle", lay_job, (0, 1, 2))

    def texts(mark: Path) -> bytes:
        evil = f"__import__('os').mkdir({str(mark)!r})"
        content = {"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [str(mark)]}], "__reduce__": evil}
        content |= dict.fromkeys(("format", "architecture", "preprocessing", "phase", "packages", "command"), evil)
        return json.dumps(content).encode() + b"\n"

    files = ("environment.json", "status.json", "metrics.jsonl", "probe.jsonl", "health/events.jsonl", "owner.json")
    for name in files:
        yield Trial(f"doctor, {name}: code as text", in_run(name, texts, "doctor {run}"), (0,))
        yield Trial(f"report, {name}: code as text", in_run(name, texts, "report {run}"), (0,), slow=True)
    yield Trial("embed, teacher JSON: code as text", in_run("teacher/*.json", texts))


# ------------------------------------------------------------------------------------------------------------
# Configs

YAML = {
    "object/apply": "!!python/object/apply:os.mkdir ['{mark}']",
    "object/new": "!!python/object/new:os.mkdir ['{mark}']",
    "name": "!!python/name:os.mkdir ''",
    "module": "!!python/module:antigravity ''",
    "unsafe subprocess": "!!python/object/apply:subprocess.getoutput ['mkdir {mark}']",
    "resolver eval": "${{eval:\"__import__('os').mkdir('{mark}')\"}}",
    "resolver oc.env": "${{oc.env:HOME}}",
    "resolver oc.decode": "${{oc.decode:'!!python/object/apply:os.mkdir [{mark}]'}}",
    "resolver oc.create": "${{oc.create:'_target_: os.mkdir'}}",
    "hydra's _target_": "{{_target_: os.mkdir, path: '{mark}'}}",
}


def _configs() -> Iterator[Trial]:
    def written(text: str, key: str, *verb: str) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            path = folder / "c.yaml"
            path.write_text(f"{key}: {text.format(mark=mark)}\n")
            return [part.format(yaml=path, folder=folder) for part in " ".join(verb).split()]

        return lay

    for what, text in YAML.items():
        pretrain = f"pretrain {{yaml}} {SCENES} steps=2 out={{folder}}/out"
        codes = (0, 2) if what == "resolver oc.env" else (2,)
        yield Trial(f"pretrain, YAML: {what}", written(text, "batch_size", pretrain), codes)
        yield Trial(f"plan, YAML: {what}", written(text, "steps", "plan {yaml} data=scenes"), codes)
    for what in ("object/apply", "resolver eval"):
        crops = f"view crops {{yaml}} {SCENES} out={{folder}}/out"
        yield Trial(f"view crops, YAML: {what}", written(YAML[what], "batch_size", crops))

        def lay(folder: Path, mark: Path, text: str = YAML[what]) -> list[str]:
            (folder / RUN / "config.yaml").write_text(f"batch_size: {text.format(mark=mark)}\n")
            return _resume(folder)

        yield Trial(f"resume, config.yaml: {what}", lay, slow=True)


# ------------------------------------------------------------------------------------------------------------
# Data


def _data() -> Iterator[Trial]:
    def picture(name: str, content: Callable[[Path], bytes]) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            (folder / "data").mkdir()
            pattern(0, 0).save(folder / "data" / "a.png")
            (folder / "data" / name).write_bytes(content(mark))
            return ["inspect", f"data={folder / 'data'}"]

        return lay

    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n"
    postscript += "({mark}) (w) file closefile (%pipe%mkdir {mark}) (w) file\n"
    pictures: dict[str, tuple[str, Callable[[Path], bytes]]] = {
        "PostScript": ("b.png", lambda mark: postscript.format(mark=mark).encode()),
        "PostScript by its name": ("b.eps", lambda mark: postscript.format(mark=mark).encode()),
        "SVG": ("b.png", lambda mark: f'<svg xmlns="x"><script href="file://{mark}"/></svg>'.encode()),
        "PHP behind a picture": ("b.jpg", lambda mark: b"\xff\xd8\xff\xe0<?php mkdir('" + bytes(mark) + b"'); ?>"),
        "MVG": ("b.png", lambda mark: f"push graphic-context\nfill 'url(https://x|mkdir {mark}')\n".encode()),
        "pickle": ("b.png", _reduced),
        "shell script": ("b.png", lambda mark: f"#!/bin/sh\nmkdir {mark}\n".encode()),
    }
    for what, (name, content) in pictures.items():
        yield Trial(f"inspect, a picture: {what}", picture(name, content), (0,))

    names = {"command": "$(mkdir {mark})", "backquotes": "`mkdir {mark}`", "semicolon": "a;mkdir {mark};"}
    names |= {"pipe": "|mkdir {mark}", "newline": "a\nmkdir {mark}\n", "option": "--eval=mkdir {mark}"}
    names |= {"format": "{{0.__class__}}%n%s", "HTML": "<img src=x onerror=alert(1)>", "TeX": "$\\frac{{$_^{{"}

    def called(folder: Path, mark: Path) -> list[str]:
        (folder / "data").mkdir()
        slash = f"$(printf '\\{ord('/'):o}')"
        for name in names.values():
            text = name.format(mark=slash.join(str(mark).split("/")))
            pattern(0, 0).save(folder / "data" / f"{text}.png", format="png")
            (folder / "data" / f"{text} bad.png").write_bytes(b"")
        return ["pretrain", "quickstart", *OWN, f"data={folder / 'data'}", f"out={folder / 'out'}"]

    yield Trial("pretrain and report, names of pictures", called, (0,), slow=True, payloads=len(names))

    def listed(line: str, verb: str) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            (folder / "list.csv").write_text(line.format(mark=mark))
            return [part.format(list=folder / "list.csv", folder=folder) for part in verb.split()]

        return lay

    lines = {"pipe": "path\n|mkdir {mark}\n", "command": "path\n$(mkdir {mark})\n", "address": "path\nfile://{mark}\n"}
    for what, line in lines.items():
        yield Trial(f"inspect, a list: {what}", listed(line, "inspect data={list}"))

    def archive(fill: Callable[[tarfile.TarFile, Path], None]) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            (folder / "data").mkdir()
            with tarfile.open(folder / "data" / "n01440764.tar", "w") as file:
                fill(file, mark)
            return ["inspect", f"data=imagenet22k:root={folder / 'data'}"]

        return lay

    def upwards(file: tarfile.TarFile, mark: Path) -> None:
        _add(file, f"../../../../../../../../..{mark}/a.jpg", b"x")
        _add(file, f"{mark}/b.jpg", b"x")

    def linked(file: tarfile.TarFile, mark: Path) -> None:
        _add(file, "a.jpg", b"", type=tarfile.SYMTYPE, linkname=str(mark.parent))
        _add(file, "a.jpg/ran", b"x")
        _add(file, "c.jpg", b"x")

    for what, fill in {"a way upwards": upwards, "a link": linked}.items():
        yield Trial(f"inspect, tar: {what}", archive(fill), (0, 1, 2))

    def beside_archives(name: str, content: Callable[[Path], bytes]) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            arguments = archive(lambda file, _: _add(file, "a.jpg", b"x"))(folder, mark)
            (folder / "data" / name).parent.mkdir()
            (folder / "data" / name).write_bytes(content(mark))
            return arguments

        return lay

    for what, content in {"objects of numpy": _objects, "pickle": _reduced}.items():
        yield Trial(f"inspect, entries.npy: {what}", beside_archives("extra/entries.npy", content), (0, 2))
    log = beside_archives("blocks/n01440764.log", lambda mark: f"block 0: ../../$(mkdir {mark}).jpg\n".encode())
    yield Trial("inspect, block log: command", log, (0, 2))

    def cifar(write: Callable[[Path], bytes]) -> Callable[[Path, Path], list[str]]:
        def lay(folder: Path, mark: Path) -> list[str]:
            batches = folder / "cifar-10-batches-py"
            batches.mkdir()
            for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
                (batches / name).write_bytes(write(mark))
            return ["eval", "cifar10", f"root={folder}", f"weights={folder / RUN}", f"out={folder / 'out'}"]

        return lay

    for what in ("torch's file of before 1.6", *PICKLES):
        yield Trial(f"eval cifar10: {what}", cifar(TORCH[what]))


def _jobs() -> Iterator[Trial]:
    """Lines of a shell in what reaches a job's script."""
    keys = ("account", "qos", "constraint", "exclude", "reservation", "partition", "name", "mem", "container", "python")
    for key in (*keys, "out"):

        def lay(folder: Path, mark: Path, key: str = key) -> list[str]:
            given = {"out": f"{folder}/out", key: f"{folder}/a\nmkdir {mark}\n#"}
            words = [f"{name}={value}" for name, value in given.items()]
            return ["launch", "pretrain", "quickstart", "cluster=slurm", "dry_run=true", SCENES, *words]

        yield Trial(f"launch, {key}: lines of a shell", lay)


def trials() -> list[Trial]:
    """All payloads at all doors, that run in this process."""
    parts = (_weights, _folders, _checkpoints, _run_folders, _configs, _data, _jobs)
    return [trial for part in parts for trial in part()]
