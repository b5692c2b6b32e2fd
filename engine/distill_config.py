"""The distill section of a configuration: what a peer learns from the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from engine.optimizer_config import Fraction, NonNegative, Positive, Section, Temperature


class RampConfig(Section):
    epochs: Positive | None = None
    """Length; either this or `steps`."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """Length in optimizer steps; either this or `epochs`."""
    start: Fraction = 0.0
    """Share of every weight at the first step; behind the ramp it is 1."""
    shape: Literal["linear", "cosine"] = "linear"
    """linear, or half a wave of a cosine, flat at both ends."""

    @model_validator(mode="after")
    def _one_length(self) -> RampConfig:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else f"epochs={self.epochs:g} and steps={self.steps}"
            raise ValueError(f"one of epochs and steps is needed, and not both (null unsets one), found {found}")
        return self


class GraphConfig(Section):
    node: NonNegative = 0.8
    """Weight of the distance between the correlations of both peers' embeddings and the identity."""
    edge: NonNegative = 0.24
    """Weight of the distance between either peer's correlations among its own embeddings (both: the authors' code)."""
    projection: Annotated[int, Field(ge=2)] | None = None
    """Width of a linear layer on the embedding of each peer that trains, trained with its loss; left out: none, where
    all are equally wide.  Beside a frozen teacher: the teacher's width."""

    @model_validator(mode="after")
    def _has_a_weight(self) -> GraphConfig:
        if self.node == 0 and self.edge == 0:
            raise ValueError("found node=0 and edge=0, which leave nothing of it; give one above 0, or leave graph out")
        return self


class DistillConfig(Section):
    weight: NonNegative | Annotated[tuple[NonNegative, ...], Field(min_length=1)] = 0.39
    """Weight of the similarity term, one for all peers that train or one each, in the order of `peers`."""
    tau: Temperature = 0.1
    """Temperature of the similarity distributions."""
    reduction: Literal["batchmean", "mean"] = "batchmean"
    """batchmean: mean over rows; mean: over all N^2 entries (the authors' code; weight 100 at N = 256 is 0.39 here)."""
    divergence: Literal["kl", "reverse_kl", "jeffreys", "js"] = "kl"
    """Of a peer's distribution P from the others' Q: KL(Q||P) (the paper), KL(P||Q), half the sum of both, or the
    Jensen-Shannon divergence."""
    rows: Literal["cross_view", "all"] = "cross_view"
    """cross_view: similarities of one view of N images with the other (the paper), N x N; all: of all 2N views with all
    others, 2N x 2N."""
    symmetric: Annotated[bool, Field(validate_default=True)] = False
    """The mean of the term over rows and over columns; with rows=cross_view, whose matrix is not symmetric."""
    partition: bool = False
    """Distil only rows in which the others are the more confident: the largest probability of Q is above that of P
    (after Roth et al. 2023, arXiv 2310.17653)."""
    ramp: RampConfig | None = None
    """Weights that rise from a share of theirs; left out: constant."""
    graph: GraphConfig | None = None
    """Embedding graph alignment beside the similarity term (Ma et al. 2022, arXiv 2211.13264; weight=0 leaves it
    alone); left out: none."""

    @field_validator("symmetric")
    @classmethod
    def _of_one_block(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("rows") == "all":
            raise ValueError("found true with rows=all, whose matrix is symmetric already; allowed: false")
        return value
