"""The optimizer section of a configuration, and what every section is made of."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]  # beyond, similarities over it overflow or all look alike
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# These scale the step of each layer by a ratio of its own; of ZeRO's flat shards each would get one ratio.
LAYERWISE = ("lars", "lamb", "apex.fused_lamb")

_TAKEN_BY = {
    "momentum": ("sgd", "lars", "apex.fused_sgd"),
    "betas": ("adam", "adamw", "lamb", "apex.fused_adam", "apex.fused_lamb"),
    "eta": ("lars",),
    "lr_in_momentum": ("lars",),
}


class OptimizerConfig(Section):
    name: Literal[
        "adam", "adamw", "sgd", "lars", "lamb", "apex.fused_sgd", "apex.fused_lamb", "apex.fused_adam"
    ] = "adam"  # fmt: skip
    """Formulas and sources: engine/optimizers.py.  The apex ones want NVIDIA apex, which is not on PyPI, and a GPU."""
    lr: Positive = 3.0e-4
    """Learning rate of the global batch, before `lr_scaling`."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """What the rate becomes at the global batch B: none: lr; linear: lr B / 256; sqrt: lr sqrt(B)
    (Chen et al. 2020, arXiv 2002.05709, B.1: 0.3 B / 256, 0.075 sqrt(B))."""
    weight_decay: NonNegative = 1.0e-6
    """Added to the gradient (adam, sgd, lars and their apex kin) or to the step (adamw, lamb, apex.fused_lamb)."""
    momentum: Fraction = 0.9
    """Of sgd, lars and apex.fused_sgd."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Of adam, adamw, lamb, apex.fused_adam and apex.fused_lamb."""
    eta: Positive = 0.001
    """Trust coefficient of lars."""
    lr_in_momentum: bool = True
    """Of lars.  true: v = m v + lr ratio (g + wd w), w -= v (You et al. 2017, SimCLR's code); false: the rate stands
    outside, w -= lr v (PyTorch's SGD, timm).  They differ only while the rate changes."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up before any schedule: step i of w runs at lr (i + 1) / w."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: Annotated[tuple[Positive, ...], Field(validate_default=True)] = ()
    """Of schedule=step: epochs of the run, rising, from each of which on the rate is `gamma` times what it was."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of schedule=step."""
    exclude_bias_and_norm: Annotated[bool | None, Field(validate_default=True)] = None
    """No weight decay, and no ratio per layer, on biases and norm layers.  Left out: true for lars, lamb and
    apex.fused_lamb (as SimCLR has it with LARS, and BERT with LAMB), else false."""

    @property
    def excludes_bias_and_norm(self) -> bool:
        """`exclude_bias_and_norm` with its default resolved."""
        return self.name in LAYERWISE if self.exclude_bias_and_norm is None else self.exclude_bias_and_norm

    @field_validator(*_TAKEN_BY)
    @classmethod
    def _of_this_optimizer(cls, value: Any, info: ValidationInfo) -> Any:
        # A saved configuration holds every default, so that only another value is a slip.
        name, taken_by = info.data.get("name"), _TAKEN_BY[info.field_name or ""]
        if name is not None and name not in taken_by and value != cls.model_fields[info.field_name or ""].default:
            raise ValueError(f"found {value}, but {name} has no such option, allowed with: {', '.join(taken_by)}")
        return value

    @field_validator("milestones")
    @classmethod
    def _rising_after_warmup(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        schedule, warmup = info.data.get("schedule"), info.data.get("warmup_epochs", 0.0)
        if schedule == "step" and not value:
            raise ValueError("found none, but schedule=step needs at least one, in epochs, e.g. [60, 120, 160]")
        if schedule not in ("step", None) and value:
            raise ValueError(f"found {list(value)}, but schedule={schedule} has none, allowed with: schedule=step")
        if any(later <= earlier for earlier, later in pairwise(value)):
            raise ValueError(f"found {list(value)}, allowed: each later than the one before")
        if value and value[0] < warmup:
            raise ValueError(f"found {list(value)}, allowed: none before the warm-up ends at warmup_epochs={warmup:g}")
        return value

    @field_validator("gamma")
    @classmethod
    def _of_step(cls, value: float, info: ValidationInfo) -> float:
        schedule = info.data.get("schedule")
        if schedule not in ("step", None) and value != cls.model_fields["gamma"].default:
            raise ValueError(f"found {value}, but schedule={schedule} has none, allowed with: schedule=step")
        return value

    @field_validator("exclude_bias_and_norm")
    @classmethod
    def _apex_can(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        # FusedLAMB has one switch (use_nvlamb) for all groups: what has no weight decay is adapted, or is not.
        if info.data.get("name") == "apex.fused_lamb" and info.data.get("weight_decay") == 0 and value is not False:
            raise ValueError(
                f"found {'its default, true,' if value is None else 'true'} with apex.fused_lamb and weight_decay=0, "
                "where FusedLAMB would adapt no layer at all; allowed: false, or a weight_decay above 0, or lamb"
            )
        return value
