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

from engine import distributed
from engine.checkpoint import CheckpointError
from engine.config import ConfigError, load_config
from engine.data.dataset import DataError
from engine.run_dir import describe_summary
from engine.trainer import NonFiniteLoss, Trainer

BAD_INPUT = 2  # exit code: the user's configuration, data or checkpoint
NOT_FINITE = 3  # exit code: the loss


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """--config FILE and overrides; --local_rank is the DeepSpeed launcher's."""
    parser = argparse.ArgumentParser(description="Pre-train the peers of a configuration.")
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. run.steps=100 peers.0.tau=0.2")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = parse_arguments(argv)
    first = os.environ.get("RANK", "0") == "0"
    distributed.configure_logging(verbose=first)
    try:
        cfg = load_config(arguments.config, arguments.overrides)
        ranks = distributed.start()
        summary = Trainer(cfg, ranks).fit()
    except (ConfigError, DataError, CheckpointError, NonFiniteLoss) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return NOT_FINITE if isinstance(error, NonFiniteLoss) else BAD_INPUT
    finally:
        distributed.stop()
    if first:
        print(describe_summary(summary))
        print(f"run folder: {cfg.run.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
