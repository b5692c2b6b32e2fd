"""Package metadata and dependencies; `make setup` installs them into .venv."""

from setuptools import find_packages, setup

setup(
    name="dogo-engine",
    version="0.1.0",
    description="Pre-train two vision networks at once, without labels, each distilling the other",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["kernels", "kernels.*", "engine", "engine.*"]),
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
        "tensorboard",
        "matplotlib",
        "rich",
    ],
    extras_require={
        # What the losses are compared with; each is left out of the benchmark where it is not installed.
        "bench": ["lightly", "memeff", "inf-cl"],
        "dali-cuda13": ["nvidia-dali-cuda130>=2.2"],
        "dali-cuda12": ["nvidia-dali-cuda120>=2.2"],
        "dev": ["pytest>=8", "pytest-xdist", "ruff==0.17.5", "mypy==2.4.1"],
    },
)
