"""The main command: pre-trains the peers of a configuration.

deepspeed engine/train.py --config configs/quickstart.yaml [section.key=value ...]
python engine/train.py --config configs/quickstart.yaml [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script: the repository's root in place of this folder, so that `engine` and `kernels` are this project's.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
from collections.abc import Sequence
from typing import Any

from engine import checkpoint, distributed
from engine.checkpoint import CheckpointError
from engine.config import ConfigError, load_config
from engine.data.dataset import DataError
from engine.optimizers import describe_scaling
from engine.placement import describe_placement
from engine.run_dir import describe_summary
from engine.step import describe_capture
from engine.teacher import describe_teachers
from engine.trainer import NonFiniteLoss, Trainer

BAD_INPUT = 2  # exit code: the user's configuration, data or checkpoint
NOT_FINITE = 3  # exit code: the loss


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """--config FILE and, before or after it, overrides, with or without `--`; --local_rank is the launcher's."""
    parser = argparse.ArgumentParser(
        description="Pre-train the peers of a configuration.",
        usage="%(prog)s --config FILE [section.key=value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args(argv)
    arguments.overrides = overrides
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = parse_arguments(argv)
    first = os.environ.get("RANK", "0") == "0"
    distributed.configure_logging(verbose=first)
    ranks = None
    try:
        cfg = load_config(arguments.config, arguments.overrides)
        ranks = distributed.start()
        trainer = Trainer(cfg, ranks)
        if first:
            lines = [*describe_scaling(cfg), *describe_teachers(trainer.teachers)]
            lines += describe_placement(cfg, trainer.placement)
            lines += [*describe_capture(cfg, ranks), *trainer.profiler.notes]
            print("".join(f"{line}\n" for line in lines), end="", flush=True)
        summary = trainer.fit()
    except (ConfigError, DataError, CheckpointError, NonFiniteLoss) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        elif ranks is not None and not getattr(error, "on_every_rank", False):
            print(f"error: rank {ranks.rank}: {error}", file=sys.stderr)
        return NOT_FINITE if isinstance(error, NonFiniteLoss) else BAD_INPUT
    finally:
        distributed.stop()
    if first:
        print("\n".join(_outcome(trainer, summary)))
    return 0


def _outcome(trainer: Trainer, summary: dict[str, Any] | None) -> list[str]:
    """The lines that a run ends with."""
    folder, resumed = trainer.folder, trainer.resume_point
    if summary is None:
        return [f"run.max_seconds: stopped with the state saved in {folder}; the same command goes on"]
    lines = []
    if resumed is not None and resumed[1].step == summary["steps"]:
        bound = any(checkpoint.spans_the_run(peer) for _, peer in trainer.cfg.trained)
        more = "its schedules end with it" if bound else "raise run.steps to go on"
        lines.append(f"this run was finished already: {more}, or remove {folder}")
    lines += [describe_summary(summary), f"run folder: {folder}"]
    if trainer.profiler.summary is not None:
        lines.append(f"profile: {trainer.profiler.summary}")
    return lines


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed.  The interpreter's own end sometimes aborts in the communication libraries'
    # threads ("terminate called without an active exception": 6 of 42 finished runs of two gloo ranks under load).
    os._exit(code)
