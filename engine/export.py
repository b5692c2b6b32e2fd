"""Exports a trained backbone as safetensors that timm or torchvision load, without this project.

    python engine/export.py --run RUN_DIR --peer a --format timm|torchvision|dogo [--output FILE]

timm         any backbone but this project's own
torchvision  the ResNets whose layers timm and torchvision name alike
dogo         any backbone, loaded by engine.peers.load_backbone(FILE)

The command prints the lines that load the file: a ResNet trained on small images has another stem than its library's,
a transformer its own image size.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script: the repository's root in place of this folder, so that `engine` and `kernels` are this project's.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence

from safetensors.torch import save_file
from timm.models.resnet import ResNet
from torch import nn

from engine.checkpoint import CheckpointError
from engine.config import ConfigError, load_config
from engine.encoders import run_encoder
from engine.peer_config import PeerConfig
from engine.peers import timm_arguments

FORMATS = ("timm", "torchvision", "dogo")

# timm and torchvision name the layers of these alike.
TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2",
               "wide_resnet101_2")  # fmt: skip


def export_backbone(run: Path, peer_name: str, form: str, output: Path | None = None) -> tuple[Path, list[str]]:
    """Writes the newest checkpoint's backbone of one peer; returns the file and the lines that load it.

    Raises ConfigError: no such peer or format, a backbone that the format does not know.  CheckpointError: no
    checkpoint in the run, or a damaged one.
    """
    cfg = load_config(run / "config.yaml")
    peer = cfg.peer(peer_name)
    if form not in FORMATS:
        raise ConfigError(f"--format: {form!r} is unknown; allowed: {', '.join(FORMATS)}")
    _check_format(peer, form)
    encoder = run_encoder(run, cfg, peer)  # what is exported is what this project would run
    size, (mean, std) = encoder.size, encoder.statistics
    file = output or run / "export" / f"{peer.name}_{form}" / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "backbone": encoder.backbone, "stem": encoder.stem, "image_size": str(size), "features": str(encoder.width),
        "mean": json.dumps(mean), "std": json.dumps(std),
    }  # fmt: skip
    save_file(encoder.module.state_dict(), file, metadata=facts)
    images = f"# images: RGB in [0, 1], {size} x {size} px, minus the mean {list(mean)}, over {list(std)}"
    return file, [*_usage(form, peer, encoder.module, file, size), images]


def _check_format(peer: PeerConfig, form: str) -> None:
    if peer.backbone.startswith("wrn-") and form != "dogo":
        raise ConfigError(f"--format: {form} has no {peer.backbone}, which is this project's own; use --format dogo")
    if form == "torchvision" and peer.backbone not in TORCHVISION:
        names = ", ".join(TORCHVISION)
        raise ConfigError(f"--format: torchvision knows other layers than timm for {peer.backbone}; allowed: {names}")


def _usage(form: str, peer: PeerConfig, backbone: nn.Module, file: Path, size: int) -> list[str]:
    if form == "dogo":
        return ["from engine.peers import load_backbone", f'model = load_backbone("{file}")']
    if form == "timm":
        arguments = "".join(f", {key}={value}" for key, value in timm_arguments(peer.backbone, size).items())
        create = f'model = timm.create_model("{peer.backbone}", num_classes=0{arguments})'
    else:
        create = f"model = torchvision.models.{peer.backbone}()"
    lines = [f"import torch, {form}", "from safetensors.torch import load_file", create]
    if isinstance(backbone, ResNet) and isinstance(backbone.maxpool, nn.Identity):
        lines += _small_stem_lines(backbone)
    if form == "torchvision":
        lines.append("model.fc = torch.nn.Identity()")
    return [*lines, f'model.load_state_dict(load_file("{file}"))']


def _small_stem_lines(backbone: nn.Module) -> list[str]:
    assert isinstance(backbone, ResNet)
    stem = (
        "model.conv1[0].stride = (1, 1)"
        if isinstance(backbone.conv1, nn.Sequential)
        else f"model.conv1 = torch.nn.Conv2d(3, {backbone.conv1.out_channels}, 3, 1, 1, bias=False)"
    )
    return [stem, "model.maxpool = torch.nn.Identity()"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Export a trained backbone as safetensors.")
    parser.add_argument("--run", required=True, type=Path, metavar="RUN_DIR")
    parser.add_argument("--peer", required=True, metavar="NAME", help="the peer's name, e.g. a")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=" | ".join(FORMATS))
    parser.add_argument("--output", type=Path, metavar="FILE", help="RUN_DIR/export/PEER_FORMAT/model.safetensors")
    arguments = parser.parse_args(argv)
    try:
        file, usage = export_backbone(arguments.run, arguments.peer, arguments.format, arguments.output)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {file}; to load it:\n")
    print("\n".join(f"    {line}" for line in usage))
    return 0


if __name__ == "__main__":
    sys.exit(main())
