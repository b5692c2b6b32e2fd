"""CUDA sources compile for the GPUs that they are written for, without a spilled register, on machines without one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
NVCC = shutil.which(str(Path(cpp_extension.CUDA_HOME or "/usr/local/cuda") / "bin" / "nvcc"))

# Registers of each kernel at most: what leaves 4 blocks of 256 threads on a multiprocessor, and 8 of those that read.
REGISTERS = {"squares": 48, "ratios": 48, "update": 64}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA"),
    pytest.mark.skipif(NVCC is None, reason="no nvcc"),
]


def compiled(source: Path, capability: str, to: Path) -> str:
    """What ptxas says of a source; what setup.py gives nvcc, warnings as errors with it."""
    wheels = Path(torch.__file__).parents[1] / "nvidia"  # headers that a toolkit may come without
    headers = [*cpp_extension.include_paths(), *sorted(str(p) for p in wheels.glob("cu*/include"))]
    done = subprocess.run(
        [str(NVCC), "-cubin", f"-arch=sm_{capability}", "-std=c++20", "-O3", "-lineinfo", "-Werror", "all-warnings",
         "-DDOGO_CUDA=1", *(f"-isystem={path}" for path in headers), "-Xptxas", "-v", str(source), "-o", str(to)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*.cu")), ids=lambda path: path.name)
def test_sources_compile_without_spills(source, capability, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    told = compiled(source, capability, cubin)
    assert cubin.stat().st_size > 1000
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
    assert spills
    assert set(spills) == {("0", "0", "0")}, told


@pytest.mark.parametrize("capability", ["80", "90"])
def test_lars_keeps_its_registers(capability, tmp_path):
    told = compiled(ROOT / "csrc" / "lars_cuda.cu", capability, tmp_path / "kernels.cubin")
    found = {
        name: int(registers)
        for entry, registers in re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", told, re.DOTALL)
        for name in REGISTERS
        if re.search(rf"\d{name}E", entry)  # a mangled name
    }
    assert found.keys() == REGISTERS.keys(), told
    assert all(found[name] <= most for name, most in REGISTERS.items()), found
