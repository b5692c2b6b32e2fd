"""The engine section of a configuration: how a run computes, whatever it learns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from engine.optimizer_config import Section


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
