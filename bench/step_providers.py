"""Who takes part in `python -m bench step`: the engine in several settings, the plain reference in two."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.reference import Reference
from bench.reference_data import PREFETCH
from bench.rows import ROOT
from bench.step_data import READY_LOADER, REAL, Images, trained_on
from engine.config import Config, load_config
from engine.data import dali_loader, resident_loader
from engine.data.torch_loader import CHUNK
from engine.distributed import Ranks, cores_per_rank, workers_of
from engine.profile import WHOLE, part
from engine.trainer import Trainer

CAPTURED, BOTH, ENGINE, STREAMS, SPLIT, COMPILED, TORCHVISION = OURS = (
    "captured", "captured+compiled", "engine", "streams", "split", "compiled", "torchvision-loader",
)  # fmt: skip
PLAIN, TUNED = REFERENCES = "plain", "tuned"
PROVIDERS = (*OURS, *REFERENCES)
# The engine's settings; a reference takes those of `engine`, which it does not read.
SETTINGS = {
    CAPTURED: {"capture": "true"},
    BOTH: {"capture": "true", "compile": "true"},
    STREAMS: {"concurrency": "streams"},
    SPLIT: {"concurrency": "split"},
    COMPILED: {"compile": "true"},
}
BASE = {"capture": "false", "compile": "false", "concurrency": "serial"}
CONCURRENT = (CAPTURED, ENGINE, STREAMS, SPLIT)  # ways to run both peers; captured saves launches, too
MOST_STEPS = 20_000  # of a run; none gets there

# Batches that may lie ready, those that DALI itself holds included.
AHEAD = {"resident": resident_loader.AHEAD, "dali": dali_loader.AHEAD + 2}


class Preset(NamedTuple):
    """What is measured unless told otherwise."""

    config: str  # in configs/; networks, batch, loader and length are replaced
    pairs: tuple[str, ...]
    batches: tuple[int, ...]
    size: int  # side of a view in pixels
    loader: str  # of the engine
    changes: tuple[str, ...] = ()  # of the configuration


# The reference has one optimizer.
ADAM = tuple(
    f"peers.{i}.optimizer.{change}"
    for i in range(2)
    for change in ("name=adam", "schedule=constant", "warmup_epochs=0", "exclude_bias_and_norm=null")
)
_FOLDER = "folder_r18_r50.yaml"
PRESETS = {
    "cifar": Preset(
        "cifar10_wrn16_wrn16.yaml", ("wrn-16-2+wrn-16-2", "wrn-16-2+resnet50", "resnet18+resnet18"), (256, 1024),
        size=32, loader="resident",
    ),
    "photos": Preset(
        _FOLDER, ("resnet18+resnet18", "resnet18+resnet50", "resnet50+resnet50"), (256,),
        size=224, loader="dali", changes=ADAM,
    ),
    "quickstart": Preset("quickstart.yaml", ("wrn-10-1+wrn-10-1",), (128,), size=32, loader="resident"),
    "photos-cpu": Preset(_FOLDER, ("resnet18+resnet18",), (16,), size=224, loader="dali", changes=ADAM),
}  # fmt: skip


class Case(NamedTuple):
    """One pair of networks at one batch size (of all ranks), on real or on synthetic data."""

    preset: str
    pair: str
    batch: int
    data: str = REAL

    @property
    def size(self) -> int:
        """Side of a view in pixels."""
        return PRESETS[self.preset].size

    def __str__(self) -> str:
        return f"{self.pair}, batch {self.batch}, {self.data}"


def configuration(case: Case, provider: str, folder: Path) -> Config:
    """The preset's configuration with the case's networks and the provider's loader and step."""
    preset, (a, b) = PRESETS[case.preset], case.pair.split("+")
    loader = "torchvision" if provider == TORCHVISION else preset.loader
    changes = [
        f"run.output_dir={folder}", "run.epochs=null", f"run.steps={MOST_STEPS}", "run.save_every_steps=null",
        "run.resume=never", "eval.knn.every_steps=null", f"data.batch_size={case.batch}",
        f"data.image_size={preset.size}", f"data.loader={loader if case.data == REAL else READY_LOADER}",
        f"peers.0.backbone={a}", f"peers.1.backbone={b}",
    ]  # fmt: skip
    settings = {**BASE, **SETTINGS.get(provider, {})}
    if "capture" in SETTINGS.get(provider, {}):
        settings["concurrency"] = "auto"
    changes += [f"engine.{key}={value}" for key, value in settings.items()]
    return load_config(ROOT / "configs" / preset.config, [*changes, *preset.changes])


def takes_part(provider: str, data: str) -> bool:
    """Whether a provider differs from the others on this data: without a loader no loader's name means anything."""
    return data == REAL or provider != TORCHVISION


def available(device: str, ranks: int) -> list[str]:
    """The providers that such a machine has: graphs and streams take a GPU, graphs one alone, split two ranks."""
    lacking = {SPLIT} if ranks == 1 else {CAPTURED, BOTH}
    lacking |= {CAPTURED, BOTH, STREAMS} if device != "cuda" else set()
    return [name for name in PROVIDERS if name not in lacking]


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
        with part(WHOLE):
            with part("data"):
                batch = next(self.batches)
            self.train(batch)

    def drop_what_lies_ready(self) -> None:
        """Of the pause; then a round with training, so that the clock starts in the middle of things."""
        for _ in range(self.ahead):
            next(self.batches)
        for _ in range(self.together):
            self.step()


def training(case: Case, provider: str, images: Images | None, ranks: Ranks, folder: Path) -> Training:
    """A provider, ready for its first step; `images` None: on views that lie ready."""
    cfg = configuration(case, provider, folder)
    if provider in REFERENCES:
        return _of_reference(cfg, images, ranks, size=case.size, tuned=provider == TUNED)
    return _of_trainer(cfg, images, ranks)


def _of_reference(cfg: Config, images: Images | None, ranks: Ranks, *, size: int, tuned: bool) -> Training:
    torch.manual_seed(cfg.run.seed)
    reference = Reference(cfg.resolved(), ranks.device, size=size, tuned=tuned, group=ranks.group)
    workers = 0 if images is None else cores_per_rank()
    made = reference.same_views() if images is None else reference.batches(images.source, workers=workers)

    def close() -> None:
        made.close()
        if tuned:
            torch.compiler.reset()  # it compiles a function for a few networks, and then runs others eagerly

    return Training(_begun(made), reference.step, ahead=PREFETCH * workers, together=max(1, workers), close=close)


def _begun(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, their workers forked: those must not collect a DALI pipeline that they inherit.

    See engine/data/torch_loader.py.
    """
    gc.freeze()
    try:
        first = next(batches)
    finally:
        gc.unfreeze()
    return itertools.chain((first,), batches)


def _of_trainer(cfg: Config, images: Images | None, ranks: Ranks) -> Training:
    """What `Trainer.fit` does between its first evaluation and its end."""
    with trained_on(images, cfg.data.batch_size):
        trainer = Trainer(cfg, ranks)
    trainer.start_clock(trainer.begin())
    batches = trainer.loader.batches(0, trainer.steps)

    def close() -> None:
        batches.close()
        trainer.recorder.close()

    ahead, together = 0, 1
    if images is not None and cfg.data.loader == "torchvision":
        workers = workers_of("auto")
        a_batch = -(-trainer.order.rows // CHUNK)  # chunks, each made by one worker
        together, ahead = (-(-n * workers // a_batch) for n in (1, PREFETCH))
    elif images is not None:
        ahead = AHEAD[cfg.data.loader]
    return Training(batches, trainer.train, ahead, together, close)
