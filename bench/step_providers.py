"""Who takes part in `python -m bench step`: the engine in three settings, the plain reference in two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from bench.reference import Reference
from bench.reference_data import PREFETCH, cores
from bench.rows import ROOT
from engine.config import Config, load_config
from engine.data.dataset import ArrayDataset
from engine.data.resident_loader import AHEAD
from engine.data.torch_loader import CHUNK
from engine.distributed import Ranks
from engine.trainer import MAX_AUTO_WORKERS, Trainer

SIZE = 32
CAPTURED, ENGINE, TORCHVISION = "captured", "engine", "torchvision-loader"
PLAIN, TUNED = REFERENCES = "plain", "tuned"
PROVIDERS = (CAPTURED, ENGINE, TORCHVISION, *REFERENCES)
MOST_STEPS = 20_000  # of a run; none gets there


class Preset(NamedTuple):
    """What is measured unless told otherwise."""

    config: str  # in configs/; networks, batch, loader and length are replaced
    pairs: tuple[str, ...]
    batches: tuple[int, ...]


PRESETS = {
    "cifar": Preset(
        "cifar10_wrn16_wrn16.yaml", ("wrn-16-2+wrn-16-2", "wrn-16-2+resnet50", "resnet18+resnet18"), (256, 1024)
    ),
    "quickstart": Preset("quickstart.yaml", ("wrn-10-1+wrn-10-1",), (128,)),
}


class Case(NamedTuple):
    """One pair of networks at one batch size."""

    preset: str
    pair: str
    batch: int


def configuration(case: Case, provider: str, folder: Path) -> Config:
    """The preset's configuration with the case's networks and the provider's loader and step."""
    a, b = case.pair.split("+")
    loader = "torchvision" if provider == TORCHVISION else "resident"
    changes = [
        f"run.output_dir={folder}", "run.epochs=null", f"run.steps={MOST_STEPS}", "run.save_every_steps=null",
        "run.resume=never", "eval.knn.every_steps=null", f"data.batch_size={case.batch}", f"data.loader={loader}",
        f"engine.capture={str(provider == CAPTURED).lower()}", f"peers.0.backbone={a}", f"peers.1.backbone={b}",
    ]  # fmt: skip
    return load_config(ROOT / "configs" / PRESETS[case.preset].config, changes)


# -- providers -------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A provider: its batches, what trains on one, and how far its loader works ahead."""

    batches: Iterator[Any]
    train: Callable[[Any], object]
    ahead: int  # batches that may lie ready
    together: int  # batches that workers deliver at about the same time
    close: Callable[[], None]

    def step(self) -> None:
        """One whole step."""
        self.train(next(self.batches))

    def drop_what_lies_ready(self) -> None:
        """Of the pause; then a round with training, so that the clock starts in the middle of things."""
        for _ in range(self.ahead):
            next(self.batches)
        for _ in range(self.together):
            self.step()


def training(case: Case, provider: str, images: np.ndarray, ranks: Ranks, folder: Path) -> Training:
    """A provider, ready for its first step."""
    cfg = configuration(case, provider, folder)
    if provider not in REFERENCES:
        return _of_trainer(cfg, images, ranks)
    torch.manual_seed(cfg.run.seed)
    reference, workers = Reference(cfg.resolved(), ranks.device, size=SIZE, tuned=provider == TUNED), cores()
    batches = reference.batches(images, workers=workers)
    return Training(batches, reference.step, ahead=PREFETCH * workers, together=workers, close=batches.close)


def _of_trainer(cfg: Config, images: np.ndarray, ranks: Ranks) -> Training:
    """What `Trainer.fit` does between its first evaluation and its end."""
    with _trained_on(images):
        trainer = Trainer(cfg, ranks)
    trainer.start_clock(trainer.begin())
    batches = trainer.loader.batches(0, trainer.steps)

    def close() -> None:
        batches.close()
        trainer.recorder.close()

    ahead, together = AHEAD, 1
    if cfg.data.loader == "torchvision":
        chunks = min(cores(), MAX_AUTO_WORKERS)  # at a time
        together, ahead = (-(-n * chunks * CHUNK // cfg.data.batch_size) for n in (1, PREFETCH))
    return Training(batches, trainer.train, ahead, together, close)


@contextmanager
def _trained_on(images: np.ndarray) -> Iterator[None]:
    """Trainers that are built meanwhile take these images, and have none to evaluate with."""

    def opened(_: object, split: str) -> ArrayDataset | None:
        return ArrayDataset("images", images, None) if split == "train" else None

    with patch("engine.trainer.open_split", opened), patch("engine.probe.open_split", opened):
        yield
