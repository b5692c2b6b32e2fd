"""Evaluates the frozen backbones of a run, or one from a file, on labelled images.

python engine/evaluate.py --run RUN_DIR [--peer NAME] [section.key=value ...]
python engine/evaluate.py --weights FILE [--backbone NAME --image-size PX] [section.key=value ...]

e.g.  data.dataset=cifar10 data.root=data
      protocols=[knn,linear,official,few,noisy,corruptions]   knn.k=20   few.shares=[0.01,0.1]   draws=5
      noisy.human=cifar10n.npz   ood=[{name: mine, file: mine.npz}]   transfer=[{name: stl10, dataset: stl10}]

engine/evaluation_config.py lists every setting.  Writes scores.json, scores.md and pictures to RUN_DIR/evaluation.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script: the repository's root in place of this folder, so that `engine` and `kernels` are this project's.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from engine import checkpoint, evaluation_report
from engine.checkpoint import CheckpointError
from engine.config import Config, ConfigError, load_config
from engine.data.dataset import DataError
from engine.data.skipped import SkippedImages
from engine.distributed import Ranks, workers_of
from engine.encoders import Encoder, file_encoder, run_encoder
from engine.evaluation import Evaluation, Score
from engine.evaluation_config import EvaluationConfig, LabelledData
from engine.evaluation_data import check
from engine.features import Reader
from engine.settings import overridden, parse_section

BAD_INPUT = 2  # exit code: the user's settings, data or checkpoint


def evaluate(encoders: Sequence[Encoder], cfg: EvaluationConfig, device: torch.device) -> list[Score]:
    """Every score of every encoder, printed as it is found; encoders are moved to `device`.  Raises DataError."""
    ranks = Ranks(rank=0, world=1, local_rank=0, device=device, group=None)
    workers, skipped = workers_of(cfg.data.workers), SkippedImages(ranks)
    check(cfg)  # once for all encoders
    scores = []
    for encoder in encoders:
        encoder.module.to(device).to(memory_format=torch.channels_last)
        reader = Reader(encoder.size, encoder.statistics, workers, ranks, skipped)
        for score in Evaluation(encoder, cfg, reader).scores():
            scores.append(score)
            line = f"{score.peer} ({score.backbone}): {score.protocol} {score.setting}".rstrip()
            print(f"{line}: {evaluation_report.described(score)}", file=sys.stderr, flush=True)
    return scores


def run_settings(cfg: Config, overrides: Sequence[str]) -> EvaluationConfig:
    """The settings for the encoders of a run: its own data unless told otherwise.  Raises ConfigError."""
    own = {key: value for key, value in cfg.resolved()["data"].items() if key in LabelledData.model_fields}
    return parse_section(EvaluationConfig, overridden({"data": own}, overrides))


def _from_run(arguments: argparse.Namespace) -> tuple[list[Encoder], EvaluationConfig, dict[str, Any]]:
    """Encoders, settings, and what scores.json says of where they come from."""
    run: Path = arguments.run
    cfg = load_config(run / "config.yaml")
    peers = [peer for _, peer in cfg.trained] if arguments.peer is None else [cfg.peer(arguments.peer)]
    settings = run_settings(cfg, arguments.overrides)
    encoders = [run_encoder(run, cfg, peer) for peer in peers]
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None  # an encoder came from there
    return encoders, settings, {"run": run.name, "checkpoint": newest.name}


def _from_file(arguments: argparse.Namespace) -> tuple[list[Encoder], EvaluationConfig, dict[str, Any]]:
    settings = parse_section(EvaluationConfig, overridden({}, arguments.overrides))
    file: Path = arguments.weights
    encoder = file_encoder(file, backbone=arguments.backbone, image_size=arguments.image_size)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return [encoder], settings, {"weights": file.name, "sha256": digest}


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate frozen backbones on labelled images.",
        usage="%(prog)s (--run RUN_DIR [--peer NAME] | --weights FILE [--backbone NAME --image-size PX]) "
        "[section.key=value ...]",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="RUN_DIR", help="a run folder: its peers, from the last checkpoint")
    source.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, as export.py writes them")
    parser.add_argument("--peer", metavar="NAME", help="one peer of the run only")
    parser.add_argument("--backbone", metavar="NAME", help="of weights that do not say it: timm's name or wrn-D-W")
    parser.add_argument("--image-size", type=int, metavar="PX", help="of weights that do not say it: side of an image")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: evaluation/ in RUN_DIR or beside FILE")
    arguments, overrides = parser.parse_known_args(argv)
    arguments.overrides = overrides
    idle = ("peer",) if arguments.weights else ("backbone", "image_size")
    for name in idle:
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')}: says nothing of --{'weights' if arguments.weights else 'run'}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parsed(argv)
    try:
        encoders, settings, source = _from_run(arguments) if arguments.run else _from_file(arguments)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        scores = evaluate(encoders, settings, device)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    folder = arguments.output or (arguments.run or arguments.weights.parent) / "evaluation"
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    facts = {**source, "settings": settings.model_dump(mode="json"), "device": where, "torch": torch.__version__}
    evaluation_report.show(scores)
    for file in evaluation_report.write(folder, scores, facts):
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
