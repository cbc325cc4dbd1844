"""Weight files: finding them and bringing them to the encoder's own key names.

`weights=` and `init=` name a run folder, which means its last state, one of its checkpoints (`RUN/best`) or teacher
files, a file of Meta's, a folder or file of transformers or of timm. The library is recognised by the key names;
`convert.py` renames them, `architecture.py` infers the encoder. Files are untrusted (see `files.py`), and a pointer
cannot lead out of its run folder.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dinoreg.models.registry import BASE
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError, readable, reworded
from dinoreg.runtime.json_files import STEP_NAME, as_sides, newest_teacher, read_pointer
from dinoreg.runtime.json_files import read_json as read_lenient
from dinoreg.weights.architecture import Stated, infer_architecture, library_of, preprocessing_of, read_config
from dinoreg.weights.convert import detect, from_dinov3, from_meta, from_timm, from_transformers, is_dinov3
from dinoreg.weights.files import INDEX_SUFFIX, find_backbone, read_file, read_json
from dinoreg.weights.names import not_there, random_name

TEACHER_FORMAT = "dinoreg-teacher"
PIXELS_FORMAT = "dinoreg-pixels"  # of `model.json` in an export for a library whose own files say the rest

# What a folder of transformers or timm calls its weights, in the order in which these libraries look.
FILES = ("model.safetensors", f"model{INDEX_SUFFIX}", "pytorch_model.bin")

POINTERS = ("best", "last")  # files in a run's folder of checkpoints

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

SOURCES = {"dinoreg": "dinoreg", "meta": "Meta", "timm": "timm", "transformers": "transformers"}

# Beside the backbone's own tensors: heads, and in DINOv3's files a norm of local crops, periods and the biases' masks.
_HEAD_KEY = re.compile(
    r"((dino_|ibot_|distill_)?head|classifier|local_cls_norm|rope_embed)\.|.*\.attn\.qkv\.bias_mask$"
)


def find_weights(source: str | Path) -> Path | None:
    """The path of the weight file for `source`; None for random:NAME, and if that path does not exist.

    source   a file: itself. A run folder: its last teacher, else the newest. RUN/best, RUN/last, a checkpoint of a run,
             or a pointer to one: the teacher of that step. A folder of transformers or timm: its weights. Any other
             folder: the only weight file in it
    raises   UserError for a folder without weights or with several files, and for a run without a best step
    """
    path = Path(source)
    if random_name(source) is not None:  # whatever is called so in the current folder
        return None
    with reworded(f"weights {str(source)[:80]!r}: not a path", OSError, ValueError):  # too long, or with a NUL in it
        is_file, is_folder = path.is_file(), path.is_dir()
    if path.name in POINTERS and not (is_file or is_folder):
        path = _pointer(path)
        is_file = path.is_file()
    checkpoint = (is_file and path.name in POINTERS) or (is_folder and STEP_NAME.fullmatch(path.name))
    if checkpoint and path.parent.name == "checkpoints":  # every checkpoint is written together with a teacher file
        run = path.parent.parent
        if (teacher := _teacher_of(run, path.name)) is None:
            raise UserError(f"weights {path}: the teacher file of this checkpoint is not in {run / 'teacher'}")
        return teacher
    if not is_folder:
        return path if is_file else None
    if (library := library_of(path)) is not None:
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"weights {path}: a folder of {library} without weights; expected one of {', '.join(FILES)}")
    return _teacher_of(path, "last") or newest_teacher(path) or _only_file(path)


def _pointer(path: Path) -> Path:
    """RUN/checkpoints/best for RUN/best, else the path itself; UserError for a pointer that the run does not have."""
    folder = path.parent if path.parent.name == "checkpoints" else path.parent / "checkpoints"
    if not folder.is_dir():
        return path
    if not (folder / path.name).is_file():
        why = ": no probe was better than the start by its interval" if path.name == "best" else ""
        raise UserError(f"weights {path}: this run has no {path.name} step{why}; weights={folder.parent} is its last")
    return folder / path.name


def _teacher_of(run: Path, checkpoint: str) -> Path | None:
    """The teacher file of a run's checkpoint, by the checkpoint's own name or that of a pointer to it."""
    step = read_pointer(run / "checkpoints", checkpoint) if checkpoint in POINTERS else checkpoint
    teacher = run / "teacher" / f"{step}.safetensors"
    return teacher if STEP_NAME.fullmatch(step or "") and teacher.is_file() else None


def _only_file(folder: Path) -> Path:
    with readable(f"weights {folder}:"):
        files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"weights {folder}: holds {len(files)} weight files; name one, for example {files[0]}")
    raise UserError(f"weights {folder}: no teacher/step_*.safetensors in it, so no run folder, nor other weights")


class Weights:
    """The content of a weight file, with the encoder's own key names, float32 on the CPU.

    backbone  the encoder's tensors, by name
    left_out  names of the tensors of heads (dino_head.*, ibot_head.*, distill_head.*, head.*, classifier.*), of what
              DINOv3's files have besides (local_cls_norm.*, rope_embed.*, *.bias_mask), and of the entries beside the
              state dict in a training file (optimizer, student, ...)
    metadata  the JSON beside a teacher file; for a library's folder {"preprocessing": ...}, as `preprocessing_of`
    source    "dinoreg" | "meta" | "timm" | "transformers"
    stated    the architecture according to the JSON file beside it
    where     what the names in the file begin with ("teacher.backbone")
    others    the same of other networks in the file, which were not taken
    """

    def __init__(self, source: str | Path) -> None:
        """Read the weight file of `source` (see `find_weights`), of any of the libraries, torch or safetensors.

        raises  UserError if it is missing, damaged, not finite, not the state dict of such an encoder, or contradicts
                the JSON beside it; NotHeld, a UserError, if a library's config has something that the encoder does not
                compute
        """
        path = find_weights(source)
        if path is None:
            raise not_there(source)
        library = library_of(path.parent) if path.name in FILES else None
        if library is not None:  # before the tensors, which may be many
            stated = read_config(path.parent, library)
            ours = read_lenient(path.parent / "model.json")
            own = ours.get("preprocessing") if ours.get("format") == PIXELS_FORMAT else None
            stated_here = preprocessing_of(path.parent, library)  # what somebody edits counts
            metadata: dict[str, Any] = {"preprocessing": (own if isinstance(own, dict) else {}) | stated_here}
        else:
            metadata = _read_metadata(path)
            architecture = metadata.get("architecture")
            stated = Stated(architecture if isinstance(architecture, dict) else {})
        content = read_file(path)
        try:
            found_in_file = find_backbone(content)
            state = _plain(found_in_file.state)  # before tokens and positions are added up
            found = detect(state)
            if library is not None and found != library:
                raise UserError(f"config.json is of {library}, the key names in {path.name} are of {SOURCES[found]}")
            if metadata.get("format") == TEACHER_FORMAT:
                found = "dinoreg"  # without registers the names alone would look like timm's
            if not {"pos_embed", "embeddings.position_embeddings"} & state.keys():
                if not is_dinov3(state) and stated.values.get("rope_base") is None:
                    why = "positions are not learned, and nothing says that they are rotary as DINOv3's"
                    raise UserError(f"no 'pos_embed': {why}; timm runs a model of its own as weights=timm:NAME:FILE")
                stated = replace(stated, values={"rope_base": BASE, **stated.values})
                backbone = from_dinov3(state, found)
            elif found == "timm":
                backbone = from_timm(state, _grid(stated, state))
            else:
                backbone = from_transformers(state) if found == "transformers" else from_meta(state)
        except UserError as error:
            raise UserError(f"weights {path}: {error}") from None
        heads = [key for key in backbone if _HEAD_KEY.match(key)]
        self.path, self.metadata, self.source, self.stated = path, metadata, found, stated
        _, left_out, self.where, self.others = found_in_file
        self.left_out = (*heads, *left_out)
        self.backbone = _plain({key: value for key, value in backbone.items() if key not in heads})
        for key, value in self.backbone.items():
            if not value.isfinite().all():
                raise UserError(f"weights {path}: {key} is not finite (NaN or infinite)")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is stated of pictures, unchecked (`data.preprocess` reads it); {} where nothing is."""
        found = self.metadata.get("preprocessing")
        return found if isinstance(found, dict) else {}

    def architecture(self, heads: int | None = None) -> dict[str, Any]:
        """Arguments of RegisterViT, from the tensors' shapes and the JSON beside them, see `infer_architecture`.

        heads   number of attention heads, for a file that does not state it
        raises  UserError where these contradict one another
        """
        stated = self.stated
        if heads is not None and "heads" not in stated.values:
            stated = Stated({**stated.values, "heads": heads}, "the option", stated.names)
        return infer_architecture(self.backbone, stated, self.path, self.source)


def _grid(stated: Stated, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(rows, columns) of the positions where a config states the image size and the file the patch size."""
    size, patch = as_sides(stated.values.get("image_size")), state.get("patch_embed.proj.weight")
    if size is None or patch is None or patch.ndim != 4:
        return None
    return size[0] // patch.shape[2], size[1] // patch.shape[3]


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().float().contiguous() for key, value in state.items()}


def _read_metadata(path: Path) -> dict[str, Any]:
    """The JSON beside a weight file, after checking the digest in it; {} without one. UserError if it differs.

    Beside a file of PyTorch a JSON may also be another program's; it is then left alone.
    """
    side = path.with_suffix(".json")
    if not side.is_file():
        return {}
    if path.suffix != ".safetensors" and read_lenient(side).get("format") != TEACHER_FORMAT:
        return {}
    metadata = read_json(side)
    if metadata.get("format") == PIXELS_FORMAT:
        return metadata
    if metadata.get("format") != TEACHER_FORMAT:
        raise UserError(f"weights {side}: expected a JSON object with format {TEACHER_FORMAT!r}")
    if metadata.get("version") != 1:
        raise UserError(f"weights {side}: version {metadata.get('version')!r}; this dinoreg reads version 1")
    if metadata.get("sha256") != digest(path):
        raise UserError(f"weights {path}: sha256 is not the one in {side.name}; the file is torn or altered")
    return metadata
