"""Whole small runs that tests of several loaders make."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from engine import distributed, train
from engine.config import parse_config
from engine.trainer import Trainer
from ranks import run_ranks


def fit(plain: dict[str, Any]) -> dict[str, Any]:
    ranks = distributed.start()
    try:
        return Trainer(parse_config(plain), ranks).fit()
    finally:
        distributed.stop()


def command(file: Path) -> str:
    """What engine/train.py prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert train.main(["--config", str(file)]) == 0
    return out.getvalue()


def rows(plain: dict[str, Any]) -> list[dict[str, Any]]:
    found = map(json.loads, Path(plain["run"]["output_dir"], "metrics.jsonl").read_text().splitlines())
    return [row for row in found if "loss/a" in row]


def losses(plain: dict[str, Any]) -> list[list[float]]:
    return [[row["loss/a"], row["loss/b"]] for row in rows(plain)]


def straight_and_resumed(plain: dict[str, Any]) -> list[tuple[list[list[float]], list[dict[str, Tensor]]]]:
    """Losses and weights of 8 steps, and of the same run cut after step 4, inside of an epoch of 3 steps."""
    plain["run"].update(steps=8, save_every_steps=2, keep_checkpoints=4)
    plain["data"].update(batch_size=20, last_batch="fill")  # of 48 images
    checkpoints = Path(plain["run"]["output_dir"], "checkpoints")
    outcomes = []
    for _ in range(2):
        run_ranks(fit, 1, plain)
        weights = [load_file(checkpoints / "step_00000008" / f"peer_{p}.safetensors") for p in "ab"]
        outcomes.append((losses(plain), weights))
        for step in (6, 8):
            shutil.rmtree(checkpoints / f"step_{step:08d}")
    return outcomes
