"""Peers: a backbone with its projector and what its objective adds, run on the two views of a batch.

Backbones are timm's, by name, plus the CIFAR WideResNets of the paper (Zagoruyko & Komodakis 2016, arXiv 1605.07146).
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import safe_open
from timm.models.resnet import ResNet
from torch import Tensor, nn

from engine.config import ConfigError
from engine.objective_config import Mocov2, PredictorConfig
from engine.peer_config import PeerConfig, ProjectorConfig
from kernels import new_queue

Views = tuple[Tensor, Tensor]  # of the two views of a batch, [n, D] each

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
    return backbone, feature_width(name, backbone, image_size)


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


def feature_width(name: str, backbone: nn.Module, image_size: int) -> int:
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
    """width -> hidden - BN - ReLU -> ... -> out, linear layers with a bias where no BatchNorm follows.

    As in SimCLR (Chen et al. 2020, arXiv 2002.05709); `norm` and `out_norm` say where there is BatchNorm.
    """
    layers: list[nn.Module] = []
    for _ in range(cfg.layers - 1):
        layers.append(nn.Linear(width, cfg.hidden, bias=not cfg.norm))
        layers += [nn.BatchNorm1d(cfg.hidden)] if cfg.norm else []
        layers.append(nn.ReLU(inplace=True))
        width = cfg.hidden
    layers.append(nn.Linear(width, cfg.out, bias=not cfg.out_norm))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(cfg.out)] if cfg.out_norm else []))


def build_predictor(width: int, cfg: PredictorConfig) -> nn.Sequential:
    """width -> hidden (no bias) - BN - ReLU -> width (Chen & He 2020, arXiv 2011.10566)."""
    return build_projector(width, ProjectorConfig(hidden=cfg.hidden, out=width, layers=2))


class KeyQueue(nn.Module):
    """The newest `size` embeddings of a momentum network, of unit length, equal on all ranks: keys [size, D] and the
    place of the oldest, `position`, a 0-D integer."""

    keys: Tensor
    position: Tensor
    equal_on_ranks = True  # not averaged over them

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", new_queue(size, width))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))


class Embedded(NamedTuple):
    """What one peer made of a batch: pairs, of both views, of [n, D]."""

    z: Views
    """Projector outputs."""
    p: Views | None = None
    """Predictor outputs, where there is a predictor."""
    graph_z: Views | None = None
    """z through the layer of distill.graph.projection, where there is one; `graph_p`: p."""
    graph_p: Views | None = None
    k: Views | None = None
    """Projector outputs of the momentum network, without gradient."""
    queue: Tensor | None = None
    """Of the momentum network's older ones: [K, D]."""

    @property
    def student(self) -> Views:
        """What a loss of this peer sends its gradient into."""
        return self.z if self.p is None else self.p


class Peer(nn.Module):
    """Encoder (backbone) and projector, and what the objective adds: a predictor, a momentum network, a queue.

    `joint=False` runs each view by itself, so that BatchNorm takes its statistics per view (the paper's way).
    `momentum`: a copy of encoder and projector that no optimizer trains, `target`, which `follow` moves.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, *, joint: bool,
        predictor: nn.Module | None = None, graph: nn.Module | None = None, momentum: bool = False,
        queue: KeyQueue | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor, self.graph = predictor, graph
        self.joint = joint
        copied = copy.deepcopy((encoder, projector)) if momentum else ()
        self.target = nn.Sequential(*copied).requires_grad_(False) if momentum else None
        self.queue = queue
        self._embedding: Callable[[Tensor], tuple[Tensor, ...]] = self.embedding
        self._target_embedding: Callable[[Tensor], tuple[Tensor, ...]] = self.target_embedding

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:  # [n, 3, H, W] twice -> [n, D], view by view
        """What `embedded` takes apart: DeepSpeed's hooks hand on tuples of tensors alone."""
        made = self._of_both(self._embedding, x, y)
        if self.target is not None:
            with torch.no_grad():
                made += self._of_both(self._target_embedding, x, y)
        return made

    def embedded(self, made: tuple[Tensor, ...]) -> Embedded:
        """The outputs of `forward` by name."""
        names = ["z"] + ["p"] * (self.predictor is not None)
        names += [f"graph_{name}" for name in names] if self.graph is not None else []
        names += ["k"] * (self.target is not None)
        pairs = zip(made[::2], made[1::2], strict=True)
        return Embedded(**dict(zip(names, pairs, strict=True)), queue=None if self.queue is None else self.queue.keys)

    def _of_both(self, network: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if self.joint:
            return tuple(view for made in network(torch.cat((x, y))) for view in made.chunk(2))
        return tuple(view for pair in zip(network(x), network(y), strict=True) for view in pair)

    def embedding(self, images: Tensor) -> tuple[Tensor, ...]:  # [n, 3, H, W] -> [n, D] each
        """One pass: z and, where there are a predictor and a graph layer, p, graph_z, graph_p."""
        z = self.projector(self.encoder(images))
        made = (z,) if self.predictor is None else (z, self.predictor(z))
        return made if self.graph is None else (*made, *map(self.graph, made))

    def target_embedding(self, images: Tensor) -> tuple[Tensor, ...]:  # [n, 3, H, W] -> [n, D]
        """One pass through the momentum network."""
        assert self.target is not None
        return (self.target(images),)

    def followed(self) -> list[Tensor]:
        """The weights that the momentum network follows, and its own in the same order."""
        assert self.target is not None
        return [*self.encoder.parameters(), *self.projector.parameters(), *self.target.parameters()]

    def compile_embedding(self) -> None:
        """From now on `forward` runs through torch.compile, each pass one graph; the encoder alone stays as it is.

        A pass, not `forward`: two views by themselves are one graph that is compiled once.  What breaks the graph is an
        error when it is met.
        """
        self._embedding = torch.compile(self.embedding, fullgraph=True, dynamic=False)
        self._target_embedding = torch.compile(self.target_embedding, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def follow(self, step: Tensor) -> None:
        """Moves the momentum network's weights towards the peer's by `step`, 0-D: 1 - m of the momentum m.

        Its BatchNorm statistics are its own.
        """
        every = self.followed()
        own, target = every[: len(every) // 2], every[len(every) // 2 :]
        way = torch._foreach_sub(own, target)
        torch._foreach_mul_(way, step)
        torch._foreach_add_(target, way)


def build_peer(cfg: PeerConfig, *, image_size: int, graph: int | None = None) -> Peer:
    """A peer with fresh weights from torch's global generator; raises ConfigError as `build_backbone` does.

    `graph`: distill.graph.projection.
    """
    encoder, width = build_backbone(cfg.backbone, image_size=image_size, stem=cfg.stem)
    projector, out = build_projector(width, cfg.projector), cfg.projector.out
    return Peer(
        encoder, projector, joint=cfg.bn == "joint",
        predictor=None if cfg.predictor is None else build_predictor(out, cfg.predictor),
        graph=None if graph is None else nn.Linear(out, graph),
        momentum=cfg.momentum is not None,
        queue=KeyQueue(cfg.objective.queue, out) if isinstance(cfg.objective, Mocov2) else None,
    )  # fmt: skip
