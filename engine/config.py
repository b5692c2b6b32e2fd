"""The typed configuration of a run: YAML in, dotted overrides, every mistake an error before any work.

    cfg = load_config("configs/quickstart.yaml", ["run.steps=100", "peers.0.optimizer.lr=1e-3"])

Each field states its unit and meaning after it; what a section refuses, it refuses here with the dotted key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, field_validator, model_validator
from yaml import YAMLError

from engine.data_config import DataConfig
from engine.optimizer_config import LAYERWISE, NonNegative, OptimizerConfig, Positive, Section
from engine.settings import ConfigError, one_line, overridden, parse_section

Stem = Literal["auto", "small", "standard"]
CAPTURABLE = ("adam", "adamw", "sgd", "lars")  # optimizers that a CUDA graph can hold


@contextmanager
def keyed(peer: int) -> Iterator[None]:
    """What a peer's parts refuse gets the peer's place in the configuration."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"peers.{peer}.{error}") from None


class RunConfig(Section):
    output_dir: Path
    """Where config.yaml, metrics, plots and checkpoints go."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    epochs: Annotated[int, Field(gt=0)] | None = None
    """Passes over the data; either this or `steps`."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps; either this or `epochs`."""
    save_every_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps between checkpoints; one is written at the end in any case."""
    keep_checkpoints: Annotated[int, Field(gt=0)] = 2
    """How many of the newest checkpoints stay."""
    log_every_steps: Annotated[int, Field(gt=0)] = 20
    """Steps between rows of metrics.jsonl; only these steps read values back from the device."""
    max_seconds: Positive | None = None
    """Save and stop once so many seconds have passed since the set-up began, at the next step that logs; the same
    command goes on from there.  For machines that are lent for a while."""
    resume: str = "auto"
    """auto: from the newest checkpoint in output_dir where there is one; never; or a checkpoint folder."""

    @field_validator("output_dir")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else f"epochs={self.epochs} and steps={self.steps}"
            raise ValueError(f"exactly one of run.epochs and run.steps is needed (null unsets one), found {found}")
        return self


class ProjectorConfig(Section):
    hidden: Annotated[int, Field(gt=0)] = 512
    """Width of the hidden layers."""
    out: Annotated[int, Field(gt=0)] = 128
    """Width D of the embedding."""
    layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Linear layers; all but the last are followed by BatchNorm and ReLU."""


class PeerConfig(Section):
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9]{0,15}$")]
    """Key of the peer in metrics, checkpoints and commands."""
    backbone: str
    """wrn-DEPTH-WIDTH (DEPTH = 6n + 4) or any timm name."""
    stem: Stem = "auto"
    """small: 3x3 stride 1 and no max-pool (ResNets); auto: small below 100 px for ResNets, else the backbone's own.
    ResNets are timm's first version; ResNetV2 and others keep their own stem."""
    objective: Literal["simclr"] = "simclr"
    tau: Positive = 0.5
    """Temperature of NT-Xent."""
    bn: Literal["per_view", "joint"] = "per_view"
    """BatchNorm statistics of each view by itself (the paper) or of both views together."""
    projector: ProjectorConfig = ProjectorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class DistillConfig(Section):
    weight: NonNegative | tuple[NonNegative, NonNegative] = 0.39
    """Weight of the KL term, one for both peers or one each, in the order of `peers`."""
    tau: Positive = 0.1
    """Temperature of the similarity distributions."""
    reduction: Literal["batchmean", "mean"] = "batchmean"
    """batchmean: mean over rows; mean: over all N^2 entries (the authors' code; weight 100 at N = 256 is 0.39 here)."""

    @property
    def weights(self) -> tuple[float, float]:
        """The weight of each peer."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight, self.weight)


class ProfileConfig(Section):
    start: Annotated[int, Field(ge=0)]
    """The first step that is profiled; 0 is the run's first."""
    steps: Annotated[int, Field(ge=1)]
    """How many are."""


class EngineConfig(Section):
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 (autocast; weights stay fp32) on a GPU, fp32 on a CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    capture: bool | Literal["auto"] = "auto"
    """The training step as CUDA graphs: the same run with less work for the host.  On one GPU, at zero_stage 0, with
    adam, adamw, sgd or lars; auto: where that is so and data.loader is resident."""
    compile: bool = False
    """Peers through torch.compile, at zero_stage 0 to 2: a minute or more at the start, other roundings."""
    concurrency: Literal["auto", "serial", "streams", "split"] = "auto"
    """serial: one peer's work behind the other's; streams: each peer on a CUDA stream of its own, which become branches
    of the graphs where the step is captured; split: two groups of ranks, one peer each, between which embeddings alone
    travel.  auto: streams where the step is captured, else serial.  The same run each time, but for rounding; split
    only with sync_bn, since its ranks hold more images each."""
    split: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    """concurrency split: the ranks of each peer, in the order of `peers`; both numbers must divide the batch.  Left
    out: those of all that do whose slower group is the fastest, by the time that forward and backward of each peer
    take, measured when the run starts."""
    profile: ProfileConfig | None = None
    """Some steps under torch's profiler: a trace and a page on where they went, in output_dir/profile."""
    sync_bn: bool = True
    """BatchNorm statistics over the global batch of all ranks."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged into each peer's DeepSpeed configuration; what contradicts this file is an error."""


class KnnConfig(Section):
    every_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps between evaluations; left out: before the first step and after the last only."""
    k: Annotated[int, Field(gt=0)] = 50
    tau: Positive = 0.1
    """A neighbour votes with exp(cosine / tau)."""
    bank: Annotated[int, Field(gt=0)] | None = None
    """At most this many labelled images in the bank, evenly spaced; left out: all."""


class EvalConfig(Section):
    knn: KnnConfig | None = KnnConfig()
    """null: none in training; engine/evaluate.py has it and more."""


class Config(Section):
    """A whole run."""

    run: RunConfig
    data: DataConfig = DataConfig()
    peers: Annotated[tuple[PeerConfig, ...], Field(min_length=1, max_length=2)]
    """One peer is the plain self-supervised baseline, two distil each other."""
    distill: DistillConfig | None = None
    """Only with two peers, where leaving it out means its defaults."""
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_distill(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("distill") is None:
            peers = data.get("peers")
            if isinstance(peers, Sequence) and len(peers) == 2:
                return {**data, "distill": {}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if len(self.peers) == 1 and self.distill is not None:
            raise ValueError("distill: needs two peers to distil between, found one; leave the section out")
        self._check_engine()
        if self.engine.capture is True and (reason := self.not_capturable()):
            raise ValueError(f"engine.capture: {reason}; use engine.capture=false")
        if self.run.steps is not None and (reason := self.not_profilable(self.run.steps)):
            raise ValueError(f"engine.profile: {reason}")
        names = [peer.name for peer in self.peers]
        if len(set(names)) < len(names):
            raise ValueError(f"peers: names must differ, found {', '.join(names)}")
        for i, peer in enumerate(self.peers):
            name = peer.optimizer.name
            if name in LAYERWISE and self.engine.zero_stage >= 1:
                raise ValueError(
                    f"peers.{i}.optimizer.name: {name} under engine.zero_stage={self.engine.zero_stage} would be "
                    "silently wrong: ZeRO flattens the parameters into one shard, so that its ratio per layer is lost; "
                    "use engine.zero_stage=0, or adam, adamw or sgd"
                )
        return self

    def _check_engine(self) -> None:
        engine = self.engine
        if engine.concurrency in ("streams", "split") and len(self.peers) == 1:
            raise ValueError(f"engine.concurrency: {engine.concurrency} takes two peers, found one; use serial")
        if engine.split is not None and engine.concurrency != "split":
            raise ValueError(
                f"engine.split: {list(engine.split)} with engine.concurrency={engine.concurrency}, which splits "
                "nothing; unset it"
            )
        if engine.compile and engine.zero_stage == 3:
            raise ValueError(
                "engine.compile: takes engine.zero_stage 0 to 2, found 3, whose hooks in every layer break the graph"
            )
        if engine.concurrency == "streams" and engine.zero_stage == 3:
            # Parameters that it gathers ahead belong to one stream (deepspeedai/DeepSpeed #7898).
            raise ValueError("engine.concurrency: streams takes engine.zero_stage 0 to 2, found 3; use serial or split")

    def peer(self, name: str) -> PeerConfig:
        """The peer of that name; raises ConfigError."""
        for peer in self.peers:
            if peer.name == name:
                return peer
        raise ConfigError(f"--peer: {name!r} is not in this run; allowed: {', '.join(p.name for p in self.peers)}")

    def not_capturable(self) -> str:
        """Why no CUDA graph can hold a step of this configuration; empty where one can."""
        if self.engine.zero_stage > 0:
            return f"takes engine.zero_stage=0, found {self.engine.zero_stage}"
        if self.engine.deepspeed:
            # At ZeRO 0 on one GPU they clip, time, profile or report: each waits for the device or runs but once.
            return f"takes no engine.deepspeed settings, found {', '.join(self.engine.deepspeed)}"
        for i, peer in enumerate(self.peers):
            if peer.optimizer.name not in CAPTURABLE:
                return f"takes {', '.join(CAPTURABLE)}, found peers.{i}.optimizer.name={peer.optimizer.name}"
        return ""

    def not_profilable(self, steps: int) -> str:
        """Why a run of so many steps cannot be profiled as configured; empty where it can."""
        wanted = self.engine.profile
        if wanted is None or wanted.start + wanted.steps <= steps:
            return ""
        return (
            f"start={wanted.start} and steps={wanted.steps} end outside of the run, which has {steps} steps; their sum "
            "must be no more"
        )

    def resolved(self) -> dict[str, Any]:
        """Plain values of every field, as written to config.yaml."""
        return self.model_dump(mode="json")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `section.key=value` overrides (list items by index) and checks everything.

    Raises ConfigError: a file that is not there or no YAML mapping, a malformed override, unknown keys (with the
    nearest allowed ones), wrong types and values.
    """
    path = Path(path)
    try:
        tree = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path} ({error.strerror})") from None
    except YAMLError as error:
        raise ConfigError(f"--config: {path} is not valid YAML: {one_line(error)}") from None
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"--config: {path} must hold a mapping of sections")
    try:
        plain = overridden(tree, overrides)
    except OmegaConfBaseException as error:
        raise ConfigError(f"--config: {path}: {one_line(error)}") from None
    return parse_config(plain)


def parse_config(plain: Any) -> Config:
    """Checks a tree of plain values; raises ConfigError."""
    return parse_section(Config, plain)


def save_config(cfg: Config, path: Path) -> None:
    """Writes every field of the configuration as YAML that `load_config` reads back."""
    path.write_text(yaml.safe_dump(cfg.resolved(), sort_keys=False))


def differing_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose plain values differ between two trees."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys((*one, *other))
        return [d for key in keys for d in differing_keys(one.get(key), other.get(key), f"{prefix}{key}.")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differing_keys(a, b, f"{prefix}{i}.")
        ]
    return [] if one == other else [prefix.removesuffix(".")]
