"""The typed configuration of a run: YAML in, dotted overrides, every mistake an error before any work.

    cfg = load_config("configs/quickstart.yaml", ["run.steps=100", "peers.0.optimizer.lr=1e-3"])

Each field states its unit and meaning after it; what a section refuses, it refuses here with the dotted key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, field_validator, model_validator
from yaml import YAMLError

from engine.data_config import DataConfig
from engine.distill_config import DistillConfig
from engine.engine_config import EngineConfig
from engine.objective_config import Mocov2
from engine.optimizer_config import LAYERWISE, Positive, Section
from engine.peer_config import AnyPeer, PeerConfig, TeacherConfig
from engine.settings import ConfigError, one_line, overridden, parse_section

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
    peers: Annotated[tuple[AnyPeer, ...], Field(min_length=1, max_length=8)]
    """One peer is the plain self-supervised baseline, two distil each other; of more, each distils the mean of the
    others' distributions.  With `frozen` a peer is a teacher."""
    distill: DistillConfig | None = None
    """Only with two peers or more, where leaving it out means its defaults."""
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_distill(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("distill") is None:
            peers = data.get("peers")
            if isinstance(peers, Sequence) and len(peers) >= 2:
                return {**data, "distill": {}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if len(self.peers) == 1 and self.distill is not None:
            raise ValueError("distill: needs two peers or more, found one; leave the section out")
        self._check_engine()
        if self.engine.capture is True and (reason := self.not_capturable()):
            raise ValueError(f"engine.capture: {reason}; use engine.capture=false")
        if self.run.steps is not None and (reason := self.not_profilable(self.run.steps)):
            raise ValueError(f"engine.profile: {reason}")
        self._check_peers()
        for i, peer in self.trained:
            name = peer.optimizer.name
            if name in LAYERWISE and self.engine.zero_stage >= 1:
                raise ValueError(
                    f"peers.{i}.optimizer.name: {name} under engine.zero_stage={self.engine.zero_stage} would be "
                    "silently wrong: ZeRO flattens the parameters into one shard, so that its ratio per layer is lost; "
                    "use engine.zero_stage=0, or adam, adamw or sgd"
                )
        return self

    def _check_peers(self) -> None:
        names = [peer.name for peer in self.peers]
        if len(set(names)) < len(names):
            raise ValueError(f"peers: names must differ, found {', '.join(names)}")
        if not self.trained:
            raise ValueError("peers: every one is frozen, so that nothing would train; leave out frozen in one of them")
        for i, peer in self.trained:
            queue = peer.objective.queue if isinstance(peer.objective, Mocov2) else None
            if queue is not None and queue < 2 * self.data.batch_size:
                raise ValueError(
                    f"peers.{i}.objective.queue: found {queue}, allowed: at least {2 * self.data.batch_size}, the two "
                    f"views of data.batch_size={self.data.batch_size}"
                )
        if self.distill is not None:
            self._check_distill(self.distill)

    def _check_distill(self, distill: DistillConfig) -> None:
        weight = distill.weight
        if isinstance(weight, tuple) and len(weight) != len(self.trained):
            raise ValueError(
                f"distill.weight: found {list(weight)}, allowed: one number, or one for each of the "
                f"{len(self.trained)} peers that train"
            )
        widths = {peer.name: peer.projector.out for _, peer in self.trained}
        if distill.graph is not None and distill.graph.projection is None and 1 in widths.values():
            raise ValueError(
                "distill.graph.projection: embeddings of width 1 (projector.out) have no correlations; give the width "
                "of a layer, at least 2"
            )
        if distill.graph is not None and distill.graph.projection is None and len(set(widths.values())) > 1:
            found = ", ".join(f"{width} ({name})" for name, width in widths.items())
            raise ValueError(
                f"distill.graph.projection: embeddings of widths {found} have no correlations with one another; give "
                "the width of a layer that makes them equal, or peers of one projector.out"
            )

    @property
    def trained(self) -> tuple[tuple[int, PeerConfig], ...]:
        """The peers that train, each with its place in `peers`."""
        return tuple((i, peer) for i, peer in enumerate(self.peers) if isinstance(peer, PeerConfig))

    @property
    def teachers(self) -> tuple[tuple[int, TeacherConfig], ...]:
        """The frozen ones."""
        return tuple((i, peer) for i, peer in enumerate(self.peers) if isinstance(peer, TeacherConfig))

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of the similarity term of each peer that trains; none without distillation."""
        if self.distill is None:
            return ()
        weight = self.distill.weight
        return weight if isinstance(weight, tuple) else (weight,) * len(self.trained)

    def _check_engine(self) -> None:
        engine = self.engine
        if engine.concurrency in ("streams", "split") and len(self.trained) == 1:
            raise ValueError(
                f"engine.concurrency: {engine.concurrency} takes two peers that train, found one; use serial"
            )
        if engine.concurrency == "split" and (reason := self._not_splittable()):
            raise ValueError(f"engine.concurrency: split {reason}; use serial")
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

    def _not_splittable(self) -> str:
        """Why the peers cannot have ranks of their own, which exchange projector outputs; empty where they can."""
        if len(self.peers) != 2:
            return f"takes two peers, found {len(self.peers)}"
        if self.teachers:
            return f"has ranks for each peer, and {self.teachers[0][1].name} is frozen"
        for i, peer in self.trained:
            if peer.objective.name != "simclr":
                # Every rank computes both losses of the whole batch, and of the others needs more than that.
                return f"takes simclr alone, found peers.{i}.objective.name={peer.objective.name}"
        if self.distill is not None and self.distill.graph is not None:
            return "takes no distill.graph"
        return ""

    def peer(self, name: str) -> PeerConfig:
        """The peer of that name, one that trains; raises ConfigError."""
        for _, peer in self.trained:
            if peer.name == name:
                return peer
        allowed = ", ".join(peer.name for _, peer in self.trained)
        for _, teacher in self.teachers:
            if teacher.name == name:
                raise ConfigError(
                    f"--peer: {name} is frozen: its weights are those of {teacher.frozen.weights}; allowed: {allowed}"
                )
        raise ConfigError(f"--peer: {name!r} is not in this run; allowed: {allowed}")

    def not_capturable(self) -> str:
        """Why no CUDA graph can hold a step of this configuration; empty where one can."""
        if self.engine.zero_stage > 0:
            return f"takes engine.zero_stage=0, found {self.engine.zero_stage}"
        if self.engine.deepspeed:
            # At ZeRO 0 on one GPU they clip, time, profile or report: each waits for the device or runs but once.
            return f"takes no engine.deepspeed settings, found {', '.join(self.engine.deepspeed)}"
        for i, peer in self.trained:
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
