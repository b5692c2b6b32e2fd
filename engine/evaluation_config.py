"""The typed settings of an evaluation: `section.key=value` on the command line of engine/evaluate.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.corruptions import CORRUPTIONS
from engine.data_config import Dataset
from engine.optimizer_config import NonNegative, Positive, Section

Protocol = Literal["knn", "linear", "official", "few", "noisy", "ood", "transfer", "corruptions"]
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


def distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each at most once: two scores of one name would hide each other."""
    if len(set(value)) < len(value):
        raise ValueError(f"each at most once, found {', '.join(map(str, value))}")
    return value


class NeighboursConfig(Section):
    k: Count = 200
    tau: Positive = 0.1
    """A neighbour votes with exp(cosine / tau)."""
    bank: Count | None = None
    """At most this many labelled images in the bank, evenly spaced; left out: all."""


class LinearConfig(Section):
    rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates, all trained at once; held-out images choose."""
    steps: Count = 5000
    """Whatever the number of images: 30 epochs of CIFAR-10."""
    batch_size: Count = 256
    weight_decay: NonNegative = 1.0e-5
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the training images that chooses the rate."""


class FewConfig(Section):
    shares: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.01, 0.05, 0.1, 0.25, 0.5)
    """Shares of every class's labels."""

    _distinct = field_validator("shares")(distinct)


class NoisyConfig(Section):
    kinds: tuple[Literal["symmetric", "pairflip"], ...] = ("symmetric", "pairflip")
    """symmetric: the wrong label is any other class; pairflip: the next class."""
    rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.2, 0.4, 0.6, 0.8)
    """Shares of labels that become wrong."""
    human: Path | None = None
    """CIFAR-10N's labels as .npz; left out: no human noise."""

    _distinct = field_validator("kinds", "rates")(distinct)


class LabelledData(Section):
    """Labelled images; the keys are those of the data section of a run (engine/data_config.py)."""

    dataset: Dataset = "cifar10"
    root: Path = Path("data")
    manifest: Path | None = None
    shards: Count | None = None
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"


class OtherData(Section):
    """Another labelled data set: one by name, or arrays in a file."""

    name: str
    """In the tables."""
    dataset: Dataset | None = None
    """As data.dataset."""
    root: Path = Path("data")
    manifest: Path | None = None
    shards: Count | None = None
    file: Path | None = None
    """.npz with `images` and `labels`."""

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"[\w .+-]+", value):
            raise ValueError(f"found {value!r}, allowed: letters, digits, spaces and _ . + -")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> OtherData:
        if (self.dataset is None) == (self.file is None):
            found = "neither" if self.file is None else "both"
            raise ValueError(f"{self.name}: exactly one of dataset and file is needed, found {found}")
        return self


class CorruptionsConfig(Section):
    kinds: tuple[str, ...] = tuple(CORRUPTIONS)
    images: Count = 2000
    """Test images, evenly spaced; each is corrupted by every kind at five severities."""

    @field_validator("kinds")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [kind for kind in value if kind not in CORRUPTIONS]
        if unknown or not value:
            raise ValueError(f"found {', '.join(unknown) or 'none'}, allowed: {', '.join(CORRUPTIONS)}")
        return value


class EvaluationConfig(Section):
    """A whole evaluation."""

    protocols: Annotated[tuple[Protocol, ...], Field(min_length=1)] = ("knn", "linear")
    """knn; linear: a probe, the best of several rates; official: the authors' probe; few: a share of the labels; noisy:
    labels made wrong; ood: the linear probe on other data of the same classes; transfer: probes of other data sets;
    corruptions: the linear probe on corrupted test images."""
    data: LabelledData = LabelledData()
    """Where labelled images come from; the run's own by default."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    draws: Count = 3
    """Times that held-out images, labels and batches are drawn; tables have their mean and standard deviation."""
    knn: NeighboursConfig = NeighboursConfig()
    linear: LinearConfig = LinearConfig()
    few: FewConfig = FewConfig()
    noisy: NoisyConfig = NoisyConfig()
    ood: tuple[OtherData, ...] = ()
    """Labels are the training data's: by position in a file, by the classes' names elsewhere."""
    transfer: tuple[OtherData, ...] = ()
    corruptions: CorruptionsConfig = CorruptionsConfig()

    _distinct = field_validator("protocols")(distinct)

    @model_validator(mode="after")
    def _has_work(self) -> EvaluationConfig:
        for name in ("ood", "transfer"):
            if name in self.protocols and not getattr(self, name):
                raise ValueError(f"{name}: the protocol needs data, e.g. {name}=[{{name: x, dataset: stl10}}]")
            names = [other.name for other in getattr(self, name)]
            if len(set(names)) < len(names):
                raise ValueError(f"{name}: names must differ, found {', '.join(names)}")
        if "noisy" in self.protocols and self.noisy.human is None and not (self.noisy.kinds and self.noisy.rates):
            raise ValueError("noisy: the protocol needs kinds and rates, or human labels")
        for other in self.transfer:
            if other.file is not None:
                raise ValueError(
                    f"transfer: {other.name} is one file, and a probe learns from some images and is tested on others; "
                    "give a dataset, e.g. folder with train/ and val/"
                )
        return self
