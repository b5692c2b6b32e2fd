"""The objective of a peer: which self-supervised loss, its own settings, and what it makes of the rest of a peer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from engine.optimizer_config import NonNegative, Positive, Section

Momentum = Annotated[float, Field(ge=0, le=1)]
MomentumSchedule = Literal["constant", "cosine"]


class PredictorConfig(Section):
    hidden: Annotated[int, Field(gt=0)]
    """Width of its hidden layer, which BatchNorm and ReLU follow; it ends as wide as the projector."""


class Simclr(Section):
    name: Literal["simclr"] = "simclr"
    """NT-Xent at `tau` (Chen et al. 2020, arXiv 2002.05709)."""


class _Predicting(Section):
    @field_validator("predictor", mode="before", check_fields=False)
    @classmethod
    def _has_one(cls, value: Any) -> Any:
        if value is None:
            raise ValueError(
                "found null, but without a predictor the constant embedding is the best one and training collapses "
                "(Chen & He 2020, arXiv 2011.10566, 4.2); allowed: {hidden: WIDTH}"
            )
        return value


class Simsiam(_Predicting):
    name: Literal["simsiam"] = "simsiam"
    """The predictor's output against the other view's embedding (Chen & He 2020, arXiv 2011.10566)."""
    predictor: PredictorConfig = PredictorConfig(hidden=512)


class Byol(_Predicting):
    name: Literal["byol"] = "byol"
    """The predictor's output against a momentum network's embedding (Grill et al. 2020, arXiv 2006.07733)."""
    predictor: PredictorConfig = PredictorConfig(hidden=4096)
    momentum: Momentum = 0.996
    """m: behind every step the momentum network's weights become m times what they were plus (1 - m) the peer's."""
    momentum_schedule: MomentumSchedule = "cosine"
    """cosine: m rises to 1 at the last step (the paper); constant."""


class Mocov2(Section):
    name: Literal["mocov2"] = "mocov2"
    """InfoNCE at `tau` against a queue of a momentum network's embeddings (Chen et al. 2020, arXiv 2003.04297)."""
    momentum: Momentum = 0.999
    """As of byol."""
    momentum_schedule: MomentumSchedule = "constant"
    queue: Annotated[int, Field(gt=0, le=2**24)] = 65536  # 2^24 of width 128 are 8 GiB
    """Embeddings that it holds; a step replaces twice the batch."""


class BarlowTwins(Section):
    name: Literal["barlow_twins"] = "barlow_twins"
    """The views' cross-correlation against the identity (Zbontar et al. 2021, arXiv 2103.03230)."""
    off_diagonal: NonNegative = 0.005
    """Weight of the entries off its diagonal."""


class Vicreg(Section):
    name: Literal["vicreg"] = "vicreg"
    """Invariance, variance and covariance of the views (Bardes et al. 2021, arXiv 2105.04906)."""
    invariance: NonNegative = 25.0
    variance: Positive = 25.0
    """Above 0: without it the constant embedding is the best one."""
    covariance: NonNegative = 1.0


Objective = Annotated[Simclr | Simsiam | Byol | Mocov2 | BarlowTwins | Vicreg, Field(discriminator="name")]

# What a peer has where its configuration does not say.  The papers' own for ImageNet, but for the width of barlow_twins
# and vicreg, which there is 8,192: 2,048 is what these are trained with on small images elsewhere.
PROJECTORS: dict[str, dict[str, Any]] = {
    "simclr": {"hidden": 512, "out": 128, "layers": 2},
    "simsiam": {"hidden": 2048, "out": 2048, "layers": 3, "out_norm": True},
    "byol": {"hidden": 4096, "out": 256, "layers": 2},
    "mocov2": {"hidden": 2048, "out": 128, "layers": 2, "norm": False},
    "barlow_twins": {"hidden": 2048, "out": 2048, "layers": 3},
    "vicreg": {"hidden": 2048, "out": 2048, "layers": 3},
}
TAUS = {"simclr": 0.5, "mocov2": 0.2}
