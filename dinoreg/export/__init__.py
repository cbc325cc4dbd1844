"""Exporting a model for other libraries. The package is called as a function: `dinoreg.export(weights, …)`.

Python binds a package's name in its parent as soon as anything inside it is imported, so a function of the name
`dinoreg.export` would be overwritten by this module; making the module callable keeps both meanings.
"""

import sys
import types
from collections.abc import Sequence
from pathlib import Path


class _Export(types.ModuleType):
    def __call__(
        self, weights: str | Path, format: str, out: str | Path, size: int | Sequence[int] | None = None
    ) -> Path:
        """See `dinoreg.export.run.export`."""
        from dinoreg.export.run import export

        return export(weights, format=format, out=out, size=size)


sys.modules[__name__].__class__ = _Export
