"""What is declared as a dependency is used, documented and bounded; what is announced to go fails the tests."""

from __future__ import annotations

import warnings

import pytest


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_call_of_ours_that_is_announced_to_go_is_an_error(kind: type[Warning]) -> None:
    def warn(module: str) -> None:
        exec("import warnings; warnings.warn('old', kind)", {"__name__": module, "kind": kind})

    for module in ("dinoreg", "dinoreg.data.decode", "dinoreg_declared_pets"):
        with pytest.raises(kind, match="old"):
            warn(module)
    with pytest.warns(kind, match="old"):
        warn("another_package.module")
    with pytest.raises(Warning, match="deprecated since torchvision"):
        warnings.warn("decode_jpeg is deprecated since torchvision 0.29", stacklevel=1)
