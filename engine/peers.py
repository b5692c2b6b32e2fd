"""Peers: a backbone with its projector, run on the two views of a batch.

Backbones are timm's, by name, plus the CIFAR WideResNets of the paper (Zagoruyko & Komodakis 2016, arXiv 1605.07146).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from timm.models.resnet import ResNet
from torch import Tensor, nn

from engine.config import ConfigError, PeerConfig, ProjectorConfig

SMALL_IMAGE_PX = 100  # below this a stem that shrinks 4x leaves too little of an image (the authors' code: 100 too)


class WideBlock(nn.Module):
    """Pre-activation residual block: BN-ReLU-conv3x3-BN-ReLU-conv3x3, with a 1x1 shortcut where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        # With a change of shape the shortcut starts after the first activation, as in the authors' code.
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return skip + self.conv2(torch.relu(self.bn2(out)))


class WideResNet(nn.Module):
    """WRN-depth-width for small images, depth = 6n + 4: [N, 3, H, W] -> pooled features [N, 64 width]."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.num_features = 64 * width
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        for stage in range(3):
            for i in range((depth - 4) // 6):
                width_in = widths[stage] if i == 0 else widths[stage + 1]
                blocks.append(WideBlock(width_in, widths[stage + 1], stride=2 if stage > 0 and i == 0 else 1))
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(self.num_features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.blocks(self.conv1(x)))).mean(dim=(2, 3))


def build_backbone(name: str, *, image_size: int, stem: str = "auto") -> tuple[nn.Module, int]:
    """A backbone without classifier and the width of its pooled features: [N, 3, image_size, image_size] -> [N, width].

    `stem`: auto | small | standard, see PeerConfig.  Raises ConfigError: an unknown name (with the nearest ones), a
    depth that is not 6n + 4, a stem or an image size that the backbone does not take.
    """
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if wide:
        depth, width = int(wide[1]), int(wide[2])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ConfigError(f"backbone: {name!r}: DEPTH must be 6n + 4 (10, 16, 22, 28, ...), WIDTH at least 1")
        if stem == "standard":
            raise ConfigError(f"stem: {name} has only the small-image stem; allowed: auto, small")
        return WideResNet(depth, width), 64 * width
    if name not in timm.list_models():
        near = difflib.get_close_matches(
            name, [*timm.list_models(), "wrn-10-2", "wrn-16-2", "wrn-28-2"], n=3, cutoff=0.5
        )
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them, and wrn-DEPTH-WIDTH"
        raise ConfigError(f"backbone: {name!r} is unknown; {hint}")
    backbone = timm.create_model(name, pretrained=False, num_classes=0, **timm_arguments(name, image_size))
    if not isinstance(backbone, ResNet):
        if stem == "small":
            raise ConfigError(f"stem: small is for ResNets; {name} keeps its own, so: auto or standard")
    elif stem == "small" or (stem == "auto" and image_size < SMALL_IMAGE_PX):
        _small_stem(backbone)
    return backbone, _feature_width(name, backbone, image_size)


def timm_arguments(name: str, image_size: int) -> dict[str, Any]:
    """What timm must be told beside the name: the image size, where the network is built for one (transformers)."""
    cfg = timm.get_pretrained_cfg(name)
    return {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}


def load_backbone(file: str | Path) -> nn.Module:
    """A backbone that export.py wrote (format dogo), in evaluation mode: [N, 3, S, S] -> [N, width].

    Raises ConfigError: a file without this project's metadata.
    """
    with safe_open(file, framework="pt") as stream:
        facts = stream.metadata() or {}
        weights = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118  no mapping
    if not {"backbone", "stem", "image_size"} <= facts.keys():
        raise ConfigError(f"{file}: holds no backbone of this project (no metadata)")
    backbone, _ = build_backbone(facts["backbone"], image_size=int(facts["image_size"]), stem=facts["stem"])
    backbone.load_state_dict(weights)
    return backbone.eval()


def _small_stem(resnet: ResNet) -> None:
    """3x3 stride 1 and no max-pool, in place of a stem that shrinks the image 4x (Chen et al. 2020, B.9)."""
    if isinstance(resnet.conv1, nn.Sequential):
        first = resnet.conv1[0]  # the deep stems are three 3x3 convolutions already
        assert isinstance(first, nn.Conv2d)
        first.stride = (1, 1)
    else:
        resnet.conv1 = nn.Conv2d(resnet.conv1.in_channels, resnet.conv1.out_channels, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    setattr(resnet, "maxpool", nn.Identity())  # noqa: B010  timm declares a Sequential


def _feature_width(name: str, backbone: nn.Module, image_size: int) -> int:
    """Asked of the backbone itself: `num_features` is not the pooled width of every timm model (MobileNetV3)."""
    training = backbone.training
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"backbone: {name} does not take data.image_size={image_size} ({text})") from None
    finally:
        backbone.train(training)
    if features.ndim != 2:
        raise ConfigError(f"backbone: {name} gives {list(features.shape)}, not pooled features [N, width]")
    return int(features.shape[1])


def build_projector(width: int, cfg: ProjectorConfig) -> nn.Sequential:
    """width -> hidden (no bias) - BN - ReLU -> ... -> out, as in SimCLR (Chen et al. 2020, arXiv 2002.05709)."""
    layers: list[nn.Module] = []
    for _ in range(cfg.layers - 1):
        layers += [nn.Linear(width, cfg.hidden, bias=False), nn.BatchNorm1d(cfg.hidden), nn.ReLU(inplace=True)]
        width = cfg.hidden
    return nn.Sequential(*layers, nn.Linear(width, cfg.out))


class Peer(nn.Module):
    """Encoder (backbone) and projector; `forward` embeds the two views of a batch.

    `joint=False` runs each view by itself, so that BatchNorm takes its statistics per view (the paper's way).
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, *, joint: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.joint = joint
        self._embedding: Callable[[Tensor], Tensor] = self.embedding

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [n, 3, H, W] twice -> [n, D] twice
        if self.joint:
            z_x, z_y = self._embedding(torch.cat((x, y))).chunk(2)
            return z_x, z_y
        return self._embedding(x), self._embedding(y)

    def embedding(self, images: Tensor) -> Tensor:  # [n, 3, H, W] -> [n, D]
        """One pass through encoder and projector."""
        return self.projector(self.encoder(images))

    def compile_embedding(self) -> None:
        """From now on `forward` runs through torch.compile, each pass one graph; the encoder alone stays as it is.

        A pass, not `forward`: two views by themselves are one graph that is compiled once.  What breaks the graph is an
        error when it is met.
        """
        self._embedding = torch.compile(self.embedding, fullgraph=True, dynamic=False)


def build_peer(cfg: PeerConfig, *, image_size: int) -> Peer:
    """A peer with fresh weights from torch's global generator; raises ConfigError as `build_backbone` does."""
    encoder, width = build_backbone(cfg.backbone, image_size=image_size, stem=cfg.stem)
    return Peer(encoder, build_projector(width, cfg.projector), joint=cfg.bn == "joint")
