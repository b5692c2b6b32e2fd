"""The peers section of a configuration: what trains, and what teaches without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from engine.objective_config import PROJECTORS, TAUS, Objective, PredictorConfig, Simclr
from engine.optimizer_config import OptimizerConfig, Section, Temperature

Stem = Literal["auto", "small", "standard"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]{0,15}$")]


class ProjectorConfig(Section):
    hidden: Annotated[int, Field(gt=0)] = 512
    """Width of the hidden layers."""
    out: Annotated[int, Field(gt=0)] = 128
    """Width D of the embedding."""
    layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Linear layers; all but the last are followed by ReLU."""
    norm: bool = True
    """BatchNorm before each ReLU."""
    out_norm: bool = False
    """BatchNorm behind the last layer too."""


class PeerConfig(Section):
    name: Name
    """Key of the peer in metrics, checkpoints and commands."""
    backbone: str
    """wrn-DEPTH-WIDTH (DEPTH = 6n + 4) or any timm name."""
    stem: Stem = "auto"
    """small: 3x3 stride 1 and no max-pool (ResNets); auto: small below 100 px for ResNets, else the backbone's own.
    ResNets are timm's first version; ResNetV2 and others keep their own stem."""
    objective: Objective = Simclr()
    """simclr, simsiam, byol, mocov2, barlow_twins or vicreg; or a mapping of its name and its settings, which
    objective_config.py lists."""
    tau: Annotated[Temperature | None, Field(validate_default=True)] = None
    """Temperature of simclr (left out: 0.5) and mocov2 (0.2); the others have none."""
    bn: Literal["per_view", "joint"] = "per_view"
    """BatchNorm statistics of each view by itself (the paper) or of both views together."""
    projector: ProjectorConfig = ProjectorConfig()
    """What it leaves out is the objective's own: PROJECTORS in objective_config.py."""
    optimizer: OptimizerConfig = OptimizerConfig()
    frozen: None = None
    """Of teachers alone: see TeacherConfig."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_objective_has_it(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        objective = data.get("objective", "simclr")
        objective = {"name": objective} if isinstance(objective, str) else objective
        name = objective.get("name") if isinstance(objective, Mapping) else getattr(objective, "name", None)
        filled = {**data, "objective": objective}
        if filled.get("tau") is None:
            filled["tau"] = TAUS.get(str(name))
        projector = data.get("projector", {})
        if isinstance(projector, Mapping):
            filled["projector"] = {**PROJECTORS.get(str(name), {}), **projector}
        return filled

    @field_validator("tau")
    @classmethod
    def _has_a_temperature(cls, value: float | None, info: ValidationInfo) -> float | None:
        objective = info.data.get("objective")
        if objective is not None and value is not None and objective.name not in TAUS:
            raise ValueError(
                f"found {value}, but {objective.name} has no temperature, allowed with: {', '.join(TAUS)} (null unsets "
                "it)"
            )
        return value

    @property
    def temperature(self) -> float:
        """tau, of an objective that has one."""
        assert self.tau is not None, self.objective.name
        return self.tau

    @property
    def predictor(self) -> PredictorConfig | None:
        """The objective's predictor."""
        return getattr(self.objective, "predictor", None)

    @property
    def momentum(self) -> float | None:
        """Of the momentum network at the first step; None where there is no such network."""
        return getattr(self.objective, "momentum", None)


class FrozenConfig(Section):
    weights: Path
    """A safetensors file of the backbone: what engine/export.py wrote, or a state dict by timm's names; or the word
    timm: the pretrained weights that timm has for the backbone's name, which it downloads."""
    views: Literal["augmented", "plain"] = "augmented"
    """augmented: two views of its own, as of any peer, through the network in every step; plain: the image as it is
    for both, so that its features are computed once, when the run starts, and kept."""

    @field_validator("weights")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()

    @property
    def of_timm(self) -> bool:
        """Whether timm brings the weights."""
        return str(self.weights) == "timm"


class TeacherConfig(Section):
    """A peer that is not trained: the others distil it offline.  Its embedding is the backbone's pooled feature."""

    name: Name
    backbone: str
    """As of any peer."""
    stem: Stem = "auto"
    """Where the file of weights does not say."""
    frozen: FrozenConfig
    """What makes it a teacher; a file of weights, the word timm, or a mapping."""
    objective: None = None
    tau: None = None
    bn: None = None
    projector: None = None
    optimizer: None = None

    @field_validator("objective", "tau", "bn", "projector", "optimizer", mode="before")
    @classmethod
    def _does_not_train(cls, value: Any, info: ValidationInfo) -> None:
        if value is not None:
            raise ValueError(
                f"found {value!r}, but a frozen teacher does not train and has no {info.field_name}; leave it out, or "
                "leave out frozen"
            )

    @field_validator("frozen", mode="before")
    @classmethod
    def _file_name(cls, value: Any) -> Any:
        if not isinstance(value, str | Path | Mapping | FrozenConfig):
            raise ValueError(f"found {value!r}, allowed: a file of weights, the word timm, or a mapping")
        return {"weights": value} if isinstance(value, str | Path) else value


def _kind(value: Any) -> str:
    frozen = value.get("frozen") if isinstance(value, Mapping) else getattr(value, "frozen", None)
    return "PeerConfig" if frozen is None else "TeacherConfig"


AnyPeer = Annotated[
    Annotated[PeerConfig, Tag("PeerConfig")] | Annotated[TeacherConfig, Tag("TeacherConfig")], Discriminator(_kind)
]
