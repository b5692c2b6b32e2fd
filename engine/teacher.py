"""Frozen teachers: backbones that other peers distil offline.  No gradient, no optimizer, nothing in a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import timm
import torch
from torch import Tensor, nn

from engine.checkpoint import CheckpointError
from engine.config import Config, ConfigError, keyed
from engine.data.augment import AugmentPolicy
from engine.data.dataset import ImageDataset
from engine.distributed import Ranks, precision_of
from engine.encoders import Encoder, Keys, file_encoder
from engine.features import Reader
from engine.metrics import progress_bar
from engine.peer_config import TeacherConfig
from engine.peers import Embedded, feature_width, timm_arguments


class Teacher:
    """A frozen peer; its embedding is the backbone's pooled feature [n, F] in float32.

    `plain`: of the image as it is, computed once by `remember`; else of the views that it is given.
    """

    def __init__(self, index: int, encoder: Encoder, policy: AugmentPolicy, ranks: Ranks, *, plain: bool, bf16: bool):
        self.index, self.name, self.encoder, self.ranks = index, encoder.name, encoder, ranks
        self.plain, self._bf16 = plain, bf16
        self.module: nn.Module = encoder.module.requires_grad_(False).eval().to(ranks.device)
        self.module.to(memory_format=torch.channels_last)
        # Views are normalised as the run's data are; the backbone was trained on images that were as its own.
        (mean, std), (own_mean, own_std) = (
            (torch.tensor(values, device=ranks.device)[:, None, None] for values in statistics)
            for statistics in (policy.statistics, encoder.statistics)
        )
        alike = policy.statistics == encoder.statistics
        self._affine = None if alike else (std / own_std, (mean - own_mean) / own_std)
        self._bank: _Bank | None = None

    @property
    def width(self) -> int:
        """F."""
        return self.encoder.width

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for key, value in self.module.state_dict().items():
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images [c, 3, S, S], normalised as the backbone's own were -> [c, F] in float32."""
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self._bf16):
            return self.module(images if self._bf16 else images.float()).float()

    def embed(self, views: Sequence[Tensor]) -> Embedded:
        """Of two views [n, 3, S, S], normalised as the run's data are; of none where the teacher is plain."""
        if self.plain:
            assert self._bank is not None, "take comes first"
            return Embedded((self._bank.rows, self._bank.rows))
        # At once: in evaluation mode the images of a batch do not see each other.
        x, y = self.features(self._as_its_own(torch.cat(list(views)))).chunk(2)
        return Embedded((x, y))

    def _as_its_own(self, view: Tensor) -> Tensor:
        if self._affine is None:
            return view
        scale, shift = self._affine
        return view.float() * scale + shift

    def reader(self, reader: Reader) -> Reader:
        """The same reader with images as this backbone has them."""
        return reader._replace(size=self.encoder.size, statistics=self.encoder.statistics)

    def remember(self, dataset: ImageDataset, reader: Reader, rows: int) -> None:
        """Computes the features of all images, the work shared by the ranks, and keeps them in the host's memory; a
        batch has `rows` of them on this rank.
        """
        with progress_bar(f"features of {self.name}", enabled=self.ranks.is_first) as bar:
            task = bar.add_task("", total=len(dataset), rate="", note="")
            features = self.reader(reader).every(
                dataset, self.features, lambda images: bar.advance(task, images * self.ranks.world)
            )
        self._bank = _Bank(features, rows, self.ranks.device)

    def take(self, indices: Tensor) -> None:
        """From here on `embed` gives the features of these images [n], at the same place in memory in every step."""
        if self._bank is not None:
            self._bank.take(indices)


def describe_teachers(teachers: Sequence[Teacher]) -> list[str]:
    """A line for each: what it is."""
    return [
        f"peer {teacher.name} is frozen: {teacher.encoder.backbone}, {teacher.width} features of "
        f"{'images as they are, computed before the first step' if teacher.plain else 'augmented views'}"
        for teacher in teachers
    ]


class _Bank:
    """Features of all images in the host's memory, and on the device, at one place, those of a batch."""

    def __init__(self, features: Tensor, rows: int, device: torch.device) -> None:  # [images, F]
        self._features = features
        self.rows = torch.zeros(rows, features.shape[1], device=device)
        # Two, so that one is filled while the other is still on its way; the host waits for neither in practice.
        self._pinned = [torch.empty(self.rows.shape, pin_memory=True) for _ in range(2)] if self.rows.is_cuda else []
        self._copied = [torch.cuda.Event() for _ in self._pinned]

    def take(self, indices: Tensor) -> None:
        """Fills `rows` with those of these images [rows]."""
        if not self._pinned:
            torch.index_select(self._features, 0, indices, out=self.rows)
            return
        pinned, copied = self._pinned.pop(0), self._copied.pop(0)
        copied.synchronize()
        torch.index_select(self._features, 0, indices, out=pinned)
        self.rows.copy_(pinned, non_blocking=True)
        copied.record()
        self._pinned.append(pinned)
        self._copied.append(copied)


def build_teachers(cfg: Config, ranks: Ranks, policy: AugmentPolicy) -> list[Teacher]:
    """The frozen peers of a run.

    Raises ConfigError: weights that cannot be had or do not fit, an image size that is not the run's, a width that
    graph alignment cannot take.
    """
    teachers = []
    for i, peer in cfg.teachers:
        with keyed(i):
            encoder = _encoder(peer, policy.size)._replace(name=peer.name)
            plain = peer.frozen.views == "plain"
            if encoder.size != policy.size and not plain:
                raise ConfigError(
                    f"frozen.weights: {peer.frozen.weights} is for images of {encoder.size} px, and data.image_size is "
                    f"{policy.size}; make them equal, or use frozen.views=plain"
                )
            bf16 = precision_of(cfg, ranks.device) == "bf16"
            teachers.append(Teacher(i, encoder, policy, ranks, plain=plain, bf16=bf16))
    _check_graph(cfg, teachers)
    return teachers


def _check_graph(cfg: Config, teachers: list[Teacher]) -> None:
    if cfg.distill is None or cfg.distill.graph is None:
        return
    own = cfg.distill.graph.projection or cfg.trained[0][1].projector.out
    for teacher in teachers:
        if teacher.width != own:
            raise ConfigError(
                f"distill.graph.projection: the features of the frozen {teacher.name} are {teacher.width} wide, the "
                f"embeddings of the others {own}; give projection={teacher.width}"
            )


def _encoder(peer: TeacherConfig, size: int) -> Encoder:
    """The backbone with its weights, on the CPU."""
    if peer.frozen.of_timm:
        return _timm_encoder(peer, size)
    file = peer.frozen.weights
    if not file.is_file():
        raise ConfigError(f"frozen.weights: {file} is no file; a safetensors file is expected, or the word timm")
    keys = Keys("frozen.weights", "backbone", "data.image_size")
    try:
        return file_encoder(file, backbone=peer.backbone, image_size=None, otherwise=(size, peer.stem), keys=keys)
    except (ConfigError, CheckpointError) as error:
        of_the_file = str(error).startswith(str(file))
        raise ConfigError(f"frozen.weights: {error}" if of_the_file else str(error)) from None


def _timm_encoder(peer: TeacherConfig, size: int) -> Encoder:
    name = peer.backbone
    known = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    if known is None or not known.has_weights:
        raise ConfigError(f"frozen.weights: timm has no weights of {name!r}; timm.list_pretrained() lists what it has")
    if peer.stem == "small":
        raise ConfigError(f"stem: small is given, and timm's weights of {name} are for its own; leave it out")
    if peer.frozen.views == "plain":
        size = known.input_size[-1]  # as it was trained
    try:
        module = timm.create_model(name, pretrained=True, num_classes=0, **timm_arguments(name, size))
    except Exception as error:  # the hub's client has many
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"frozen.weights: timm could not bring the weights of {name} ({type(error).__name__}: {reason[:200]}); "
            "give a safetensors file of them"
        ) from None
    statistics = (tuple(known.mean), tuple(known.std))
    return Encoder(peer.name, name, "standard", module, feature_width(name, module, size), size, statistics)
