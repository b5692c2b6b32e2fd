"""The compiled core `kernels._native` (csrc/), where it was built; importing this does not fail where it was not."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

core: ModuleType | None = None
missing = ""  # why there is no core; empty where there is one
broken = False  # built, but cannot be loaded: another torch was installed since, most likely

try:
    import torch  # noqa: F401  loads the libraries that the core is linked with

    core = importlib.import_module("kernels._native")
except ImportError as error:
    broken = importlib.util.find_spec("kernels._native") is not None
    if broken:
        missing = f"kernels._native cannot be loaded ({error}); `make clean setup` builds it for the torch there is now"
    else:
        _reason = Path(__file__).with_name("native_build.txt")  # what setup.py left out
        _said = _reason.read_text().strip() if _reason.exists() else ""
        missing = f"kernels._native is not built ({_said or 'setup.py has not run'}); `make setup` builds it"


def describe() -> str:
    """One line on what was built and what was left out."""
    if core is None:
        return f"native core: {missing}"
    cuda = "with CUDA" if core.has_cuda else f"without CUDA: {core.left_out}"
    return f"native core: C++ {cuda}"
