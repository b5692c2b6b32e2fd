"""Atomic checkpoints of a run and its exact, verified resume.

    checkpoints/step_00000600/
        meta.json                    step, ranks, configuration, versions, and size and SHA-256 of every other file
        peer_a.safetensors           all weights and BatchNorm buffers of peer a, whole
        peer_a.optimizer.rank0.pt    its optimizer state, one file a rank
        rng.rank0.pt                 random states of torch, CUDA, NumPy and Python

A checkpoint is written into a hidden folder that is renamed when everything in it is on the disk: a folder of that name
is complete.  Nothing is unpickled: weights are safetensors, the rest is read with torch's weights-only loader.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.batchnorm import average_buffers
from engine.config import Config, ConfigError, differing_keys, parse_config
from engine.distributed import Ranks, barrier, first_rank_does
from engine.engines import PeerEngine
from engine.peer_config import PeerConfig

FORMAT = 2

# A resumed run may change these: they do not change what the steps to come compute.
FREE_KEYS = ("run.output_dir", "run.resume", "run.save_every_steps", "run.keep_checkpoints", "run.log_every_steps",
             "run.max_seconds", "run.epochs", "run.steps", "data.root", "data.manifest", "data.shards",
             "data.workers", "data.resident_gib", "engine.capture", "engine.concurrency", "engine.split",
             "engine.profile", "eval")  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign or from another configuration; names the file and what to do."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.  The loader's position is the step: its batches are a function of seed and step."""

    step: int
    """Finished steps."""
    data: str
    """Fingerprint of the data set; with other images the epochs would run in another order."""
    loader: str
    """Fingerprint of the loader; another one's views differ in rounding."""
    seconds: float
    """Wall time of the run."""
    train_seconds: float
    """Thereof training, without evaluation and checkpoints."""
    split: tuple[int, int] | None = None
    """Ranks of each peer where the peers were split between them."""
    teachers: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the weights of frozen peers, by their names."""


def save(root: Path, progress: Progress, engines: list[PeerEngine], cfg: Config, ranks: Ranks) -> Path:
    """Writes the state of a run below `root` and returns its folder; called by all ranks together."""
    final = root / f"step_{progress.step:08d}"
    partial = root / f".{final.name}.partial"

    def start() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    first_rank_does(ranks, start)
    for engine in engines:
        average_buffers(engine.module, engine.ranks.group)
        weights = engine.weights()
        if engine.ranks.is_first:
            # safetensors refuses tensors that share memory; `weights` cloned each, only the strides need settling
            save_file({key: value.contiguous() for key, value in weights.items()}, weights_file(partial, engine.name))
        _save_plain(engine.optimizer_state(), _optimizer_file(partial, engine, ranks))
    _save_plain(_rng_state(), _rng_file(partial, ranks))
    barrier(ranks)
    first_rank_does(ranks, lambda: _commit(partial, final, progress, cfg, ranks))
    return final


def _commit(partial: Path, final: Path, progress: Progress, cfg: Config, ranks: Ranks) -> None:
    files = {}
    for file in sorted(partial.iterdir()):
        _flush(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    meta = {"format": FORMAT, "progress": asdict(progress), "world": ranks.world, "torch": torch.__version__,
            "config": cfg.resolved(), "files": files}  # fmt: skip
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    _flush(partial / "meta.json")
    _flush(partial)
    stale = final.with_name(f".{final.name}.stale.partial")
    if final.exists():  # a run resumed from an older checkpoint has come by here again
        os.replace(final, stale)
    os.replace(partial, final)
    _flush(final.parent)
    shutil.rmtree(stale, ignore_errors=True)


def check_fits(
    folder: Path, progress: Progress, *, steps: int, data: str, loader: str, split: tuple[int, int] | None,
    teachers: dict[str, str],
) -> None:  # fmt: skip
    """Raises CheckpointError: the run would end before this checkpoint, or data set, loader, the ranks that its peers
    are split between or the weights of its teachers are not its own.
    """
    if progress.step > steps:
        raise CheckpointError(
            f"{folder}: has {progress.step} steps behind it, and this run ends at {steps}; "
            "give a run.steps (or run.epochs) of no less, or another run.output_dir"
        )
    if progress.data != data:
        raise CheckpointError(
            f"{folder}: made of another data set ({progress.data}; there is {data} now); "
            "restore the data, or give another run.output_dir for a new run"
        )
    if progress.split != split:
        raise CheckpointError(
            f"{folder}: made by ranks of which {_described(progress.split)}; in this run {_described(split)} "
            "(engine.concurrency, engine.split); use the same, or give another run.output_dir for a new run"
        )
    if progress.teachers != teachers:
        changed = sorted(name for name in teachers if teachers[name] != progress.teachers.get(name))
        raise CheckpointError(
            f"{folder}: made with other weights of the frozen {', '.join(changed)} (peers.*.frozen.weights); "
            "restore the file, or give another run.output_dir for a new run"
        )
    if progress.loader != loader:
        raise CheckpointError(
            f"{folder}: its views are of another loader ({progress.loader}; there is {loader} now); "
            "go on where it was begun and with the same version, or give another run.output_dir for a new run"
        )


def _described(split: tuple[int, int] | None) -> str:
    return "every one trains both peers" if split is None else f"{split[0]} and {split[1]} train one peer each"


def load(folder: Path, engines: list[PeerEngine], ranks: Ranks) -> None:
    """Restores engines and random states from a `verified` folder; called by all ranks together.

    Raises CheckpointError: a file that is not what its name says.
    """
    for engine in engines:
        engine.load_weights(_guarded(load_file, weights_file(folder, engine.name)))
        engine.load_optimizer_state(_guarded(_load_plain, _optimizer_file(folder, engine, ranks)))
    _set_rng_state(_guarded(_load_plain, _rng_file(folder, ranks)))
    barrier(ranks)


def newest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step below `root`."""
    found = sorted(root.glob("step_[0-9]*")) if root.is_dir() else []
    return found[-1] if found else None


def recover(root: Path) -> None:
    """Puts back a checkpoint that a save of the same step had moved aside when it was cut."""
    for stale in root.glob(".step_*.stale.partial") if root.is_dir() else []:
        final = root / stale.name.removeprefix(".").removesuffix(".stale.partial")
        if not final.exists():
            os.replace(stale, final)


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what an interrupted save left."""
    for old in [*sorted(root.glob("step_[0-9]*"))[:-keep], *root.glob(".step_*.partial")]:
        shutil.rmtree(old, ignore_errors=True)


def verified(folder: Path, cfg: Config, world: int | None) -> Progress:
    """The progress stored in `folder`, after every check that needs no engine; `world` None takes any number of ranks.

    Raises CheckpointError: no such folder, no checkpoint of this project, a file that is missing, truncated or changed,
    another configuration, another number of ranks under ZeRO >= 1.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        progress, files, saved = Progress(**meta["progress"]), meta["files"], meta["config"]
        if progress.split is not None:
            a, b = progress.split
            progress = replace(progress, split=(a, b))  # JSON has lists
        assert meta["format"] == FORMAT
    except OSError:
        raise CheckpointError(f"{folder}: no checkpoint there (meta.json cannot be read)") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise CheckpointError(f"{folder / 'meta.json'}: not a checkpoint of this project (format {FORMAT})") from None
    for name, expected in files.items():
        _verify_file(folder / name, expected)
    _same_configuration(folder, saved, cfg)
    if world is not None and meta["world"] != world:
        raise CheckpointError(
            f"{folder}: written by {meta['world']} ranks, this run has {world}; "
            "optimizer and random states are stored per rank, so resume with the same number"
        )
    return progress


def _verify_file(file: Path, expected: dict[str, Any]) -> None:
    advice = "remove this checkpoint and resume from an older one"
    size = file.stat().st_size if file.is_file() else None
    if size is None:
        raise CheckpointError(f"{file}: missing from the checkpoint; {advice}")
    if size != expected["bytes"]:
        raise CheckpointError(f"{file}: truncated ({size} of {expected['bytes']} bytes); {advice}")
    if _sha256(file) != expected["sha256"]:
        raise CheckpointError(f"{file}: changed since it was written (SHA-256 differs); {advice}")


def _same_configuration(folder: Path, saved: dict[str, Any], cfg: Config) -> None:
    differing = changed_keys(saved, cfg)
    if differing:
        raise CheckpointError(
            f"{folder}: from another configuration; it differs in {', '.join(differing)}; "
            "use the same values, or another run.output_dir for a new run"
        )


def changed_keys(saved: dict[str, Any], cfg: Config) -> list[str]:
    """Dotted keys in which a saved configuration would compute something else than `cfg`."""
    with suppress(ConfigError):
        saved = parse_config(saved).resolved()  # a key that there was not yet has its default
    free: tuple[str, ...] = FREE_KEYS
    if any(spans_the_run(peer) for _, peer in cfg.trained):
        free = tuple(key for key in free if key not in ("run.steps", "run.epochs"))
    return [
        key for key in differing_keys(saved, cfg.resolved())
        if not any(key == f or key.startswith(f + ".") for f in free)
    ]  # fmt: skip


def spans_the_run(peer: PeerConfig) -> bool:
    """Whether a schedule of the peer ends with the run, so that a longer run's steps differ from the first on."""
    momentum = getattr(peer.objective, "momentum_schedule", "constant")
    return "cosine" in (peer.optimizer.schedule, momentum)


def weights_file(folder: Path, peer: str) -> Path:
    """The safetensors file of a peer in a checkpoint."""
    return folder / f"peer_{peer}.safetensors"


def _optimizer_file(folder: Path, engine: PeerEngine, ranks: Ranks) -> Path:
    return folder / f"peer_{engine.name}.optimizer.rank{ranks.rank}.pt"


def _rng_file(folder: Path, ranks: Ranks) -> Path:
    return folder / f"rng.rank{ranks.rank}.pt"


def _save_plain(value: Any, file: Path) -> None:
    torch.save(value, file)
    _flush(file)


def _load_plain(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _guarded(read: Any, file: Path) -> Any:
    try:
        return read(file)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file}: cannot be read as part of a checkpoint ({reason})") from None


def device_rng() -> dict[str, Any]:
    """The random states that a forward pass draws from; no wait for the device."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_device_rng(state: dict[str, Any]) -> None:
    """Takes what `device_rng` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        **device_rng(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, [int(k) for k in keys], position, has_gauss, cached],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    set_device_rng(state)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
