"""Builds the core and its C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer, and runs them."""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++")
FLAGS = [
    "-std=c++20", "-O1", "-g", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized",
    "-Wno-unknown-pragmas", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer", "-DDOGO_CUDA=0",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
X86 = {
    "pixels_avx2": [*AVX2, "-ffp-contract=off"], "pixels_avx512": [*AVX512, "-ffp-contract=off"],
    "tiles_avx2": AVX2, "tiles_avx512": AVX512,
}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if not shutil.which(CXX):
        pytest.skip("no C++ compiler on this machine, and no native core either")
    folder = tmp_path_factory.mktemp("csrc")
    sources = [s for s in (ROOT / "csrc").glob("*.cpp") if s.name != "bindings.cpp"]
    if "x86_64" not in sysconfig.get_platform():
        sources = [s for s in sources if s.stem not in X86]
    sources += (ROOT / "tests/csrc").glob("*.cpp")
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [CXX, *FLAGS, *X86.get(source.stem, []), *includes, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(target) for target in pool.map(compile_one, sources)]
    libraries = Path(torch.__file__).parent / "lib"
    # Libraries that torch's own need stand in other wheels, which Python loads before; here the linker must not mind.
    command = [
        CXX, *FLAGS, *objects, f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10",
        "-Wl,--unresolved-symbols=ignore-in-shared-libs", "-o", str(folder / "core"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "core"


def environment() -> dict[str, str]:
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    folders = [str(folder) for folder in sorted(wheels.glob("*/lib"))]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")]),
        # Leaks are not looked for: torch keeps its registries to the end by design.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


# What this machine has: ATen believes the variable without asking the processor.
CAPABILITIES = ["default", "avx2", "avx512"]
HIGHEST = torch.backends.cpu.get_cpu_capability().lower()
HERE = CAPABILITIES[: CAPABILITIES.index(HIGHEST) + 1] if HIGHEST in CAPABILITIES else ["default"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", HERE)
def test_core_under_sanitizers(program, capability):
    done = subprocess.run(
        [program], capture_output=True, text=True, timeout=300, env={**environment(), "ATEN_CPU_CAPABILITY": capability}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "losses_and_gradients" in done.stdout and "views_of_ragged_images" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_the_sanitizers_see(program, tmp_path):
    """The flags of this file catch what they are there for."""
    source = tmp_path / "bad.cpp"
    for body in ("int* p = new int[n]; return p[n];", "int k = 2147483647; return k + n;"):
        source.write_text(f"int main(int n, char**) {{ {body} }}")
        subprocess.run([CXX, *FLAGS, "-Wno-all", str(source), "-o", str(tmp_path / "bad")], check=True)
        done = subprocess.run([tmp_path / "bad"], capture_output=True, text=True, env=environment())
        assert done.returncode != 0
        assert "ERROR" in done.stderr or "runtime error" in done.stderr
