"""Reading untrusted checkpoints of torch.distributed.checkpoint (DCP) without running code.

DCP unpickles twice: its `.metadata`, and every entry that is stored as bytes instead of as a tensor. Here the first
goes through an unpickler that admits DCP's plain data classes only, and entries of bytes are refused where the metadata
is read and once more where DCP would load them. Tensors are read by torch.load with weights_only=True.
"""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties, TensorStorageMetadata

from dinoreg.checkpoint.atomic import reason
from dinoreg.runtime.errors import RunError
from dinoreg.runtime.regular_files import read_regular

METADATA = ".metadata"
MAX_BYTES = 256 << 20  # of what describes a checkpoint; that of ViT-7B on a thousand processes has some tens of MiB


class Reader(dcp.FileSystemReader):
    """DCP's reader; RunError for metadata that describe anything but tensors in files of the checkpoint's folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read `.metadata` without running code; RunError when it is damaged or describes anything but tensors."""
        path = Path(self.path) / METADATA
        try:
            metadata = _Unpickler(io.BytesIO(read_regular(path, MAX_BYTES))).load()
            _check(metadata)
        except Exception as error:  # a hostile pickle can end in any of them
            raise RunError(f"checkpoint {path}: unreadable ({reason(error)})") from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def stored(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of every tensor, by name; RunError when the metadata cannot be read."""
        return cast(dict[str, TensorStorageMetadata], self.read_metadata().state_dict_metadata)

    def data_files(self) -> set[str]:
        """Names of the files in the checkpoint's folder that hold tensors; RunError when metadata cannot be read."""
        return {info.relative_path for info in self.read_metadata().storage_data.values()}


class TensorPlanner(DefaultLoadPlanner):
    """DCP's planner, which never unpickles an entry of bytes."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Always raise UnpicklingError: DCP would unpickle `value`."""
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is stored as bytes, not as a tensor")


def _check(metadata: Any) -> None:
    """UnpicklingError unless these are metadata of tensors, stored in files that lie in the checkpoint's own folder."""
    if type(metadata) is not Metadata:
        raise pickle.UnpicklingError(f"a {type(metadata).__name__} in place of DCP's Metadata")
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry) is not TensorStorageMetadata:
            raise pickle.UnpicklingError(f"{name} is a {type(entry).__name__}, not a tensor")
        if type(entry.size) is not torch.Size or type(entry.properties) is not TensorProperties:
            raise pickle.UnpicklingError(f"{name} has no size or no properties of a tensor")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise pickle.UnpicklingError(f"{info.relative_path} is outside the checkpoint")
        if info.transform_descriptors:
            raise pickle.UnpicklingError(f"{info.relative_path} is encoded ({info.transform_descriptors})")


class _Unpickler(pickle.Unpickler):
    """Reads DCP's `.metadata`, which is a pickle, admitting only the plain data classes it consists of."""

    _NAMES: ClassVar = {
        "torch.distributed.checkpoint.metadata": ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                                                  "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size", "device"),
        "torch.serialization": ("_get_layout",),
        "collections": ("OrderedDict",),
        "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name in self._NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.memory_format)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
