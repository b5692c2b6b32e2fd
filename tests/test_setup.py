"""setup.py: what it leaves out it says, and a source distribution holds all that a build needs."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path) -> Path:
    """What setup.py reads, in a folder that it may write to."""
    copy = tmp_path / "a tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "kernels", "engine"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.txt"))
    return copy


def setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "setup.py", *arguments]
    done = subprocess.run(program, cwd=tree, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done


def test_without_a_compiler(tree):
    done = setup(tree, "--name", CXX="no-such-compiler -pipe")
    said = "the native core: no C++ compiler found, CXX=no-such-compiler -pipe (install g++, or set CXX)"
    assert f"dogo-engine is built without {said}" in done.stderr
    program = (
        # an editable installation's finder would find the core that it built
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import torch; from kernels import native, ntxent_loss; print(native.describe());"
        "ntxent_loss(torch.eye(4), torch.eye(4))"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert f"kernels._native is not built ({said})" in told.stdout


def test_without_torch(tree, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden')")
    done = setup(tree, "--name", PYTHONPATH=str(hidden))
    assert "the native core: torch cannot be imported here (hidden); with it, use pip install --no-build" in done.stderr


def test_without_nvcc(tree):
    done = setup(tree, "--name", CUDA_HOME=str(tree / "nowhere"))
    assert "the native core's CUDA part: no nvcc found" in done.stderr or "this torch has no CUDA" in done.stderr


def test_a_source_distribution_holds_the_core(tree):
    setup(tree, "sdist")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    assert {path.relative_to(ROOT) for path in (ROOT / "csrc").iterdir()} <= held
    assert Path("kernels/native_build.txt") in held
