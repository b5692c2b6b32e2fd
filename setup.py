"""Package metadata, and the native core `kernels._native`.

C++ is built wherever torch can be imported and a compiler is found, CUDA sources where torch has CUDA and an nvcc of
the same major version is found.  What is left out, and why, is printed, and written beside the package, as pip shows
nothing that is printed here; a core that cannot be built does not fail the installation, a compiler's error does.
Use `pip install --no-build-isolation`: in an isolated environment there is no torch to build against.

DOGO_STRICT=1 makes warnings errors.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as missing:
    torch, NO_TORCH = None, f"torch cannot be imported here ({missing}); with it, use pip install --no-build-isolation"

# -Wno-maybe-uninitialized: GCC 12 finds its own AVX-512 header guilty of it.
STRICT = os.environ.get("DOGO_STRICT") == "1"
CXX_FLAGS = ["-O3", "-fopenmp", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-g0", *["-Werror"] * STRICT]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", *AVX2]
# -ffp-contract=off: a fused product and sum is rounded once, and a pixel would not be the same everywhere.
X86_FLAGS = {
    "csrc/pixels_avx2.cpp": [*AVX2, "-ffp-contract=off"],
    "csrc/pixels_avx512.cpp": [*AVX512, "-ffp-contract=off"],
    "csrc/tiles_avx2.cpp": AVX2,
    "csrc/tiles_avx512.cpp": AVX512,
}
X86 = platform.machine() in ("x86_64", "AMD64")


def cuda_left_out() -> str:
    """Why CUDA sources cannot be built here; empty where they can."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    home = cpp_extension.CUDA_HOME
    nvcc = home and shutil.which(os.path.join(home, "bin", "nvcc"))
    if not nvcc:
        return f"no nvcc found (CUDA_HOME={home})"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = version.partition("release ")[2].partition(",")[0]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {release}, torch of {torch.version.cuda}"
    return ""


def include_dirs() -> list[str]:
    """torch's headers, and those of CUDA that its own wheels carry where the toolkit came without."""
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    return [*cpp_extension.include_paths(), *sorted(str(p) for p in wheels.glob("cu*/include"))]


def native() -> tuple[list, dict, str]:
    """(ext_modules, cmdclass, what is left out) for the native core."""
    if torch is None:
        return [], {}, f"the native core: {NO_TORCH}"
    os.environ.setdefault("CXX", "c++")  # setuptools would take the name that Python was built with
    if not shutil.which(shlex.split(os.environ["CXX"])[0]):
        return [], {}, f"the native core: no C++ compiler found, CXX={os.environ['CXX']} (install g++, or set CXX)"
    no_cuda = cuda_left_out()
    sources = sorted(set(glob("csrc/*.cpp")) - set(X86_FLAGS))
    extension = cpp_extension.CppExtension(
        "kernels._native",
        sources + ([] if no_cuda else sorted(glob("csrc/*.cu"))),
        define_macros=[("DOGO_CUDA", int(not no_cuda))],
        extra_compile_args={
            # -isystem: warnings are about these sources, not about torch's.
            "cxx": [*CXX_FLAGS, f'-DDOGO_LEFT_OUT="{no_cuda}"', *(f"-isystem{path}" for path in include_dirs())],
            "nvcc": [
                "-O3",
                "-lineinfo",
                *["-Werror", "all-warnings"] * STRICT,
                *(f"-isystem={path}" for path in include_dirs()),
            ],
        },
        # Neither libgomp nor libcudart is linked: both come with torch, and a second one would be a second thread pool.
        libraries=[] if no_cuda else ["c10_cuda", "torch_cuda"],
    )

    class Build(cpp_extension.BuildExtension):
        """Adds the objects of one instruction set each; dispatch is at run time (csrc/tiles_default.cpp)."""

        def build_extensions(self) -> None:
            for source, flags in X86_FLAGS.items() if X86 else ():
                arguments = [*CXX_FLAGS, *flags, "-std=c++20", "-fPIC", *(f"-isystem{p}" for p in include_dirs())]
                extension.extra_objects += self.compiler.compile(
                    [source], output_dir=self.build_temp, extra_postargs=arguments
                )
            super().build_extensions()

    # What a wheel of today's GPUs needs; torch would build for the GPU it sees, or for all.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    return [extension], {"build_ext": Build}, no_cuda and f"the native core's CUDA part: {no_cuda}"


ext_modules, cmdclass, left_out = native()
if left_out:
    print(f"dogo-engine is built without {left_out}", file=sys.stderr)
Path("kernels/native_build.txt").write_text(left_out)

setup(
    name="dogo-engine",
    version="0.1.0",
    description="Pre-train two vision networks at once, without labels, each distilling the other",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["kernels", "kernels.*", "engine", "engine.*"]),
    package_data={"kernels": ["native_build.txt"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        # 0.19.3: ZeRO with several engines and streams no longer reads unfinished gradients (DeepSpeed #8061, #8080).
        "deepspeed>=0.19.3",
        "timm>=1.0.20",
        "numpy",
        "pillow",
        "pydantic>=2.8",
        "omegaconf>=2.3",
        "pyyaml",
        "safetensors",
        "filelock",
        "psutil",
        "tensorboard",
        "matplotlib",
        "rich",
    ],
    extras_require={
        # What losses and views are compared with; each is left out of the benchmark where it is not installed.
        "bench": ["lightly", "memeff", "inf-cl", "kornia"],
        # The DALI loader, for the CUDA release of torch's own wheel; on a CPU either does.
        "dali-cuda13": ["nvidia-dali-cuda130>=2.2"],
        "dali-cuda12": ["nvidia-dali-cuda120>=2.2"],
        "dev": ["pytest>=8", "pytest-xdist", "hypothesis", "ruff==0.17.5", "mypy==2.4.1", "clang-format==23.1.5"],
    },
)
