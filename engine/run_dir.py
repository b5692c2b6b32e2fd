"""The folder of a run: whose it is, where to resume from, and its summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from engine import checkpoint
from engine.config import Config, ConfigError, save_config
from engine.metrics import read_rows


def resume_point(cfg: Config, world: int) -> tuple[Path, checkpoint.Progress] | None:
    """The checkpoint to resume from and how far it is, or None for a run from the start.

    Raises ConfigError: the folder holds another run or files of no run.  CheckpointError: see `checkpoint.verified`.
    """
    folder = cfg.run.output_dir
    _check_writable(folder)
    own = _holds_this_run(folder, cfg)
    if own and cfg.run.resume == "never":
        raise ConfigError(f"run.resume: never, but {folder} holds this run already; remove it or choose another folder")
    if cfg.run.resume == "auto":
        checkpoint.recover(folder / "checkpoints")
        source = checkpoint.newest(folder / "checkpoints")
    else:
        source = None if cfg.run.resume == "never" else Path(cfg.run.resume).expanduser()
    return None if source is None else (source, checkpoint.verified(source, cfg, world))


def claim(cfg: Config) -> None:
    """Makes `run.output_dir` this run's: its configuration stands in it from now on."""
    try:
        cfg.run.output_dir.mkdir(parents=True, exist_ok=True)
        save_config(cfg, cfg.run.output_dir / "config.yaml")
    except OSError as error:
        raise _not_writable(cfg.run.output_dir, error.strerror) from None


def _not_writable(folder: Path, reason: str | None) -> ConfigError:
    return ConfigError(f"run.output_dir: {folder} cannot be written ({reason}); choose another folder")


def _check_writable(folder: Path) -> None:
    """Asks the nearest folder above that exists, so that a run does not find out after a download."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise _not_writable(folder, f"{existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _not_writable(folder, f"no permission in {existing}")


def _holds_this_run(folder: Path, cfg: Config) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        if not isinstance(saved, dict):
            raise ValueError
    except (OSError, ValueError, yaml.YAMLError):
        raise ConfigError(
            f"run.output_dir: {folder} holds files but no run (no readable config.yaml); give an empty or a new folder"
        ) from None
    differing = checkpoint.changed_keys(saved, cfg)
    if differing:
        raise ConfigError(
            f"run.output_dir: {folder} holds another run, which differs in {', '.join(differing)}; "
            "choose another folder, or the same values to resume it"
        )
    return True


def write_summary(folder: Path, cfg: Config, *, steps: int, seconds: float, train_seconds: float) -> dict[str, Any]:
    """Writes summary.json from metrics.jsonl and returns it.

    `seconds`: wall time of the run over all its resumes; `images_per_s`: source images over the training time alone,
    without evaluation and checkpoints.
    """
    rows = read_rows(folder / "metrics.jsonl")

    def knn(peer: str, step: int) -> float | None:
        return next((row[f"knn/{peer}"] for row in rows if row["step"] == step and f"knn/{peer}" in row), None)

    summary = {
        "peers": {
            peer.name: {"backbone": peer.backbone, "knn_before": knn(peer.name, 0), "knn_after": knn(peer.name, steps)}
            for peer in cfg.peers
        },
        "steps": steps,
        "seconds": round(seconds, 1),
        "images_per_s": round(steps * cfg.data.batch_size / max(train_seconds, 1e-9), 1),
        "skipped_images": max((row.get("skipped_images", 0) for row in rows), default=0),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def describe_summary(summary: dict[str, Any]) -> str:
    """The summary as the lines that a run ends with."""
    lines = [f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['images_per_s']:,.0f} images/s"]
    for name, peer in summary["peers"].items():
        before, after = peer["knn_before"], peer["knn_after"]
        # Without `before`: a run that another folder's checkpoint started.
        start = "not measured" if before is None else f"{before:.1%}"
        scores = "no kNN (no labels, or eval.knn=null)" if after is None else f"kNN {start} before, {after:.1%} after"
        lines.append(f"peer {name} ({peer['backbone']}): {scores}")
    return "\n".join(lines)
