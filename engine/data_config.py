"""The data section of a configuration: which images, how they are loaded, how they are augmented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.optimizer_config import Fraction, NonNegative, Positive, Section

Range = tuple[NonNegative, NonNegative]

SHARDED = ("webdataset", "tfrecord")
ENCODED = ("tiny-imagenet", "folder", *SHARDED)  # data sets of encoded images, a file or a record each


Dataset = Literal[
    "cifar10", "cifar100", "stl10", "fashion-mnist", "tiny-imagenet", "folder", "webdataset", "tfrecord"
]  # fmt: skip


class AugmentConfig(Section):
    """Changes to an augmentation preset; a field left out keeps the preset's value (engine/data/augment.py)."""

    preset: Literal["simclr", "simsiam"] = "simclr"
    crop_scale: Range | None = None
    """Area of the random crop as a share of the image, (low, high)."""
    crop_ratio: Range | None = None
    """Aspect ratio width / height of the random crop, (low, high)."""
    flip: Fraction | None = None
    """Probability of a horizontal flip."""
    jitter: Fraction | None = None
    """Probability of the colour jitter."""
    brightness: NonNegative | None = None
    contrast: NonNegative | None = None
    saturation: NonNegative | None = None
    """Strength s: the factor is uniform in [max(0, 1 - s), 1 + s]."""
    hue: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """Hue shift as a share of the colour circle, uniform in [-hue, hue]."""
    grayscale: Fraction | None = None
    """Probability of greyscale."""
    blur: Fraction | None = None
    """Probability of the Gaussian blur."""
    blur_sigma: Range | None = None
    """Standard deviation of the blur in pixels, (low, high)."""
    solarize: Fraction | None = None
    """Probability of solarising (values of 128 and above are inverted)."""

    @field_validator("crop_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _ordered(cls, value: Range | None) -> Range | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError(f"must be (low, high) with 0 < low <= high, found {value}")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _at_most_whole(cls, value: Range | None) -> Range | None:
        if value is not None and value[1] > 1:
            raise ValueError(f"must not exceed the whole image (1.0), found {value}")
        return value


class DataConfig(Section):
    dataset: Dataset = "cifar10"
    root: Path = Path("data")
    """Folder of the data set; the named ones are downloaded there."""
    manifest: Path | None = None
    """File that remembers what a scan found of every image; left out: in `root`, or in the user's cache where `root`
    cannot be written."""
    shards: Annotated[int, Field(gt=0)] | None = None
    """How many training shards there must be (webdataset, tfrecord); left out: as many as their names tell."""
    loader: Literal["torchvision", "dali", "resident"] = "torchvision"
    """torchvision: worker processes, any data set; dali: NVIDIA DALI, on the GPU where there is one, for folders and
    shards; resident: the whole data set in memory, the GPU's where there is one, for images of one size.  All give the
    same crops and colours of the same images in the same order."""
    resident_gib: Positive | None = None
    """resident: the most of the GPU's memory that images may take, in GiB; a larger data set stays in the host's, from
    where each batch is copied.  Left out: half of what is free when the run starts."""
    image_size: Annotated[int, Field(ge=8)] | None = None
    """Side of a view in pixels; left out: the data set's own (32, 32, 96, 28, 64; folders and shards 224)."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images of the global batch, over all ranks."""
    last_batch: Literal["drop", "fill"] = "drop"
    """Images left at the end of an epoch that make no whole batch: dropped, or filled up with the epoch's first."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Loader processes (torchvision) or threads (dali) a rank; auto: the rank's share of the cores, at most 8.  The
    views do not depend on it."""
    views: Literal["per_peer", "shared"] = "per_peer"
    """per_peer: each peer its own two views of an image; shared: both see the same two."""
    augment: AugmentConfig = AugmentConfig()
    """simclr, simsiam, or a mapping of changes to one of them."""

    @field_validator("augment", mode="before")
    @classmethod
    def _preset_name(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    @field_validator("root", "manifest")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @model_validator(mode="after")
    def _loader_fits(self) -> DataConfig:
        if self.loader == "dali" and self.dataset not in ENCODED:
            raise ValueError(
                f"data.loader: dali decodes files, and {self.dataset} is one array; use data.loader=torchvision, or "
                f"data.dataset one of {', '.join(ENCODED)}"
            )
        if self.resident_gib is not None and self.loader != "resident":
            raise ValueError(
                f"data.resident_gib: {self.resident_gib} with data.loader={self.loader}, which keeps no images; "
                "unset it"
            )
        if self.shards is not None and self.dataset not in SHARDED:
            raise ValueError(
                f"data.shards: {self.shards} with data.dataset={self.dataset}, which has no shards; unset it"
            )
        return self
