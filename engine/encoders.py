"""Trained backbones, frozen: from the newest checkpoint of a run, or from a file of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.config import Config, ConfigError
from engine.data.augment import build_policy
from engine.data.catalog import NATIVE_SIZE
from engine.data_config import AugmentConfig
from engine.features import Statistics
from engine.peer_config import PeerConfig, Stem
from engine.peers import build_backbone


class Encoder(NamedTuple):
    """A backbone in evaluation mode, and what its images look like."""

    name: str
    """The peer's name, or the file's."""
    backbone: str
    stem: str
    module: nn.Module
    width: int
    size: int
    """Side S of its images in pixels."""
    statistics: Statistics

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[c, 3, S, S], normalised -> [c, width] in float32."""
        return self.module(images).float()


def run_encoder(run: Path, cfg: Config, peer: PeerConfig) -> Encoder:
    """The backbone of a peer from the newest checkpoint of a run, on the CPU.

    Raises CheckpointError: no checkpoint in the run, or a damaged one.
    """
    folder = checkpoint.newest(run / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{run / 'checkpoints'}: no complete checkpoint there; train the run first")
    checkpoint.verified(folder, cfg, world=None)
    held = load_file(checkpoint.weights_file(folder, peer.name))
    weights = {key.removeprefix("encoder."): value for key, value in held.items() if key.startswith("encoder.")}
    size = cfg.data.image_size or NATIVE_SIZE[cfg.data.dataset]
    backbone, width = build_backbone(peer.backbone, image_size=size, stem=peer.stem)
    backbone.load_state_dict(weights, strict=True)
    statistics = build_policy(cfg.data.augment, size).statistics
    return Encoder(peer.name, peer.backbone, peer.stem, backbone.eval(), width, size, statistics)


class Keys(NamedTuple):
    """What the caller's settings are called where they are wrong."""

    weights: str = "--weights"
    backbone: str = "--backbone"
    image_size: str = "--image-size"
    stem: str = "stem"


OPTIONS = Keys()


def file_encoder(
    file: Path, *, backbone: str | None, image_size: int | None, otherwise: tuple[int | None, str] = (None, "auto"),
    keys: Keys = OPTIONS,
) -> Encoder:  # fmt: skip
    """A backbone from safetensors: what export.py wrote, which says all by itself, or a state dict of `backbone`.

    `otherwise`: image size and stem where nothing says them.

    Raises ConfigError: no backbone or image size given for a file that names none, or given against one that does;
    weights that are not this backbone's.  CheckpointError: no readable safetensors.
    """
    try:
        with safe_open(file, framework="pt") as stream:
            facts: dict[str, Any] = stream.metadata() or {}
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({str(error).splitlines()[0]})") from None
    name, size, stem = _described(file, facts, backbone, image_size, otherwise, keys)
    module, width = build_backbone(name, image_size=size, stem=stem)
    try:
        module.load_state_dict(_without_classifier(weights, module), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        hint = " (that of large images: stem standard)" if "conv1.weight" in reason else ""
        raise ConfigError(
            f"{keys.weights}: {file} does not fit {keys.backbone} {name} at {size} px with stem {stem}{hint}: "
            f"{reason[:300]}"
        ) from None
    mean, std = build_policy(AugmentConfig(), size).statistics
    if {"mean", "std"} <= facts.keys():
        mean, std = _three(file, facts, "mean"), _three(file, facts, "std")
    return Encoder(file.stem, name, stem, module.eval(), width, size, (mean, std))


def _without_classifier(weights: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Of a whole network by timm's names what belongs to its backbone."""
    classifier = getattr(module, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = module.state_dict().keys()
    return {
        key: value for key, value in weights.items()
        if key in own or not key.startswith(tuple(f"{name}." for name in names))
    }  # fmt: skip


def _three(file: Path, facts: dict[str, str], key: str) -> tuple[float, ...]:
    """A number for each channel."""
    try:
        found = tuple(float(value) for value in json.loads(facts[key]))
        if len(found) != 3 or (key == "std" and min(found) <= 0):
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(f"{file}: its {key} is {facts[key]}; three numbers are expected, of std above 0") from None
    return found


def _described(
    file: Path,
    facts: dict[str, Any],
    backbone: str | None,
    image_size: int | None,
    otherwise: tuple[int | None, str],
    keys: Keys,
) -> tuple[str, int, str]:
    """Backbone, image size and stem: the file's own word, else the caller's."""
    if {"backbone", "stem", "image_size"} <= facts.keys():
        if backbone not in (None, facts["backbone"]):
            raise ConfigError(f"{keys.backbone}: {backbone} is given, and {file} holds {facts['backbone']}")
        if not facts["image_size"].isdecimal() or facts["stem"] not in get_args(Stem):
            raise ConfigError(f"{file}: has image_size {facts['image_size']}, stem {facts['stem']}; export it anew")
        if otherwise[1] not in ("auto", facts["stem"]):
            raise ConfigError(
                f"{keys.stem}: {otherwise[1]} is given, and {file} has stem {facts['stem']}; leave it out"
            )
        if image_size not in (None, int(facts["image_size"])):
            raise ConfigError(f"{keys.image_size}: {image_size} is given, and {file} is for {facts['image_size']} px")
        return facts["backbone"], int(facts["image_size"]), facts["stem"]
    if backbone is None:
        raise ConfigError(f"{keys.backbone}: {file} does not say which backbone it holds; give its name")
    size, stem = image_size or otherwise[0], otherwise[1]
    if size is None:
        raise ConfigError(f"{keys.image_size}: {file} does not say for which images it is; give their side in pixels")
    return backbone, size, stem
