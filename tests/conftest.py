"""Small data and configurations that several tests use."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported: Triton's kernels then run on the CPU

from engine.config import Config, parse_config
from engine.distributed import Ranks

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def alone() -> Ranks:
    return Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"), group=None)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """48 images of 40 x 36 px, each a wave of its own, in two classes that differ in the waves' direction."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:36, :40]
    for i in range(48):
        kind = i % 2
        wave = np.sin((y if kind else x) * rng.uniform(0.2, 1.5) + (x if kind else y) * rng.uniform(0, 0.2))
        pixels = 128 + wave[..., None] * rng.uniform(20, 110, 3) + rng.normal(0, 5, (36, 40, 3))
        (root / f"class{kind}").mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"class{kind}" / f"{i:03d}.png")
    return root


@pytest.fixture
def settings(image_folder, tmp_path) -> dict[str, Any]:
    """A tiny run on `image_folder` as plain values; tests change what they are about."""
    peer = {"backbone": "wrn-10-1", "projector": {"hidden": 16, "out": 8}, "optimizer": {"lr": 1e-3}}
    return {
        "run": {"output_dir": str(tmp_path / "run"), "steps": 4, "log_every_steps": 1},
        "data": {"dataset": "folder", "root": str(image_folder), "image_size": 32, "batch_size": 16, "workers": 0},
        "peers": [{"name": "a", **peer}, {"name": "b", **peer, "backbone": "wrn-10-2"}],
        "eval": {"knn": {"k": 3}},
    }


@pytest.fixture
def config(settings) -> Config:
    return parse_config(settings)
