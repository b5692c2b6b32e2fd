"""The networks of the plain reference: backbone and projector of a peer, as one writes them without an engine.

Names of parameters are those of the engine's peers, so that both start from the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_IMAGE_PX = 100  # below this a ResNet starts with one 3x3 convolution of stride 1 and does not pool


class Block(nn.Module):
    """Two 3x3 convolutions behind BatchNorm and ReLU each, and what is added to their output."""

    def __init__(self, channels: int, wide: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, wide, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, kernel_size=3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or channels != wide:
            self.shortcut = nn.Conv2d(channels, wide, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-k of Zagoruyko & Komodakis 2016 without its classifier: [N, 3, H, W] -> [N, 64 k]."""

    def __init__(self, depth: int, k: int) -> None:
        super().__init__()
        per_stage = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        channels = 16
        for wide, first_stride in ((16 * k, 1), (32 * k, 2), (64 * k, 2)):
            for stride in [first_stride] + [1] * (per_stage - 1):
                self.blocks.append(Block(channels, wide, stride))
                channels = wide
        self.bn = nn.BatchNorm2d(channels)
        self.num_features = channels
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn(self.blocks(self.conv1(x))))
        return F.adaptive_avg_pool2d(features, 1).flatten(1)


def resnet(name: str, *, small_stem: bool) -> nn.Module:
    """timm's ResNet of this name without its classifier: [N, 3, H, W] -> [N, num_features].

    Raises ValueError: no plain ResNet of timm.
    """
    model: Any = timm.create_model(name, num_classes=0) if name in timm.list_models("resnet*") else None
    usual = isinstance(model, timm.models.resnet.ResNet) and isinstance(model.conv1, nn.Conv2d)
    if not usual:
        raise ValueError(
            f"backbone: found {name}; the reference has wrn-DEPTH-WIDTH and timm's resnets of one 7x7 stem"
        )
    if small_stem:
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out")
        model.maxpool = nn.Identity()
    return model


class Peer(nn.Module):
    """Two views [N, 3, S, S] -> their embeddings [N, D], through the network one by one or, `joint`, at once."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, *, joint: bool) -> None:
        super().__init__()
        self.encoder, self.projector, self.joint = encoder, projector, joint

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if not self.joint:
            return self.projector(self.encoder(x)), self.projector(self.encoder(y))
        z = self.projector(self.encoder(torch.cat([x, y])))
        return z[: len(x)], z[len(x) :]


def build_peer(peer: Mapping[str, Any], *, size: int) -> Peer:
    """The network of one entry of `peers` in a configuration, for views of `size` px, with fresh weights.

    Raises ValueError: a backbone that is not written here.
    """
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", peer["backbone"])
    if wide:
        encoder: Any = WideResNet(int(wide[1]), int(wide[2]))
    else:
        small = peer["stem"] == "small" or (peer["stem"] == "auto" and size < SMALL_IMAGE_PX)
        encoder = resnet(peer["backbone"], small_stem=small)
    head, projector, width = peer["projector"], nn.Sequential(), encoder.num_features
    for _ in range(head["layers"] - 1):
        projector.extend([nn.Linear(width, head["hidden"], bias=False), nn.BatchNorm1d(head["hidden"]), nn.ReLU()])
        width = head["hidden"]
    projector.append(nn.Linear(width, head["out"]))
    return Peer(encoder, projector, joint=peer["bn"] == "joint")
