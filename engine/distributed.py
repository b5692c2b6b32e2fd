"""Ranks, seeds, and work that ranks agree on; the identity when this process is alone.

Ranks come from the launcher's environment (deepspeed, torchrun, or none).  gloo on a CPU, NCCL on a GPU.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from engine.config import Config, ConfigError

MAX_AUTO_WORKERS = 8


@dataclass(frozen=True)
class Ranks:
    """Where this process stands; `group` is None when it is alone."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0


def start() -> Ranks:
    """Joins the process group that the launcher's environment describes and picks this rank's device."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn on every rank before it picks the same
    import deepspeed  # slow to import, and it probes the machine: only a run pays for it

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _share_cores()
        # DeepSpeed would compile its shared-memory all-reduce at start: 22 s here, and it needs a C++ compiler.
        # gloo does the same job.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ and not dist.is_initialized():
        # No launcher: one process, whose store needs no port that another program might take.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, verbose=False)
    world = dist.get_world_size()
    return Ranks(dist.get_rank(), world, local_rank, device, dist.group.WORLD if world > 1 else None)


def stop() -> None:
    """Leaves the process group; without it gloo's threads abort the process at exit.  `start` may follow."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # torch's own, and DeepSpeed forgets the groups that it made


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE", "1"))


def cores_per_rank() -> int:
    """This rank's share of the machine's cores, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def workers_of(setting: int | Literal["auto"]) -> int:
    """Loader processes or threads of a rank: `data.workers`, where auto is its share of the cores, at most 8."""
    return min(cores_per_rank(), MAX_AUTO_WORKERS) if setting == "auto" else setting


def rows_per_rank(batch_size: int, ranks: Ranks) -> int:
    """Images of the global batch that each rank takes; raises ConfigError where they do not divide."""
    if batch_size % ranks.world:
        raise ConfigError(f"data.batch_size: {batch_size} does not divide by {ranks.world} ranks")
    return batch_size // ranks.world


def precision_of(cfg: Config, device: torch.device) -> str:
    """bf16 or fp32: the setting, with auto resolved for this device."""
    if cfg.engine.precision != "auto":
        return cfg.engine.precision
    return "bf16" if device.type == "cuda" else "fp32"


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch alike on every rank, so that all ranks build the same initial weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def barrier(ranks: Ranks) -> None:
    """Waits for every rank."""
    if ranks.group is not None:
        dist.barrier(group=ranks.group)


def first_rank_does(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Runs `work` on rank 0 and hands its result to all; an exception there is raised on every rank."""
    outcome: list[Any] = [_attempt(work) if ranks.is_first else None]
    if ranks.group is not None:
        dist.broadcast_object_list(outcome, src=0, group=ranks.group, device=ranks.device)
    return _result(outcome[0])


def everyone_does(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Runs `work` on every rank; an exception on any of them is raised on all, so that none is left waiting."""
    own = _attempt(work)
    errors = gather_objects(ranks, own.error)
    return _result(next((_Outcome(error=error) for error in errors if error is not None), own))


class _Outcome(NamedTuple):
    value: Any = None
    error: Exception | None = None


def _attempt(work: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=work())
    except Exception as error:
        error.on_every_rank = True  # type: ignore[attr-defined]  # whoever reports errors: once is enough
        return _Outcome(error=error)


def _result(outcome: _Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def gather_objects(ranks: Ranks, value: Any) -> list[Any]:
    """What every rank passed, in rank order; small Python objects, not in a step."""
    if ranks.group is None:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value, group=ranks.group)
    return values


def _share_cores() -> None:
    """torch uses every core by default; several ranks on one machine must share them."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_per_rank())


def configure_logging(*, verbose: bool) -> None:
    """Warnings of this project on the console of one rank; errors alone of DeepSpeed, which reports dozens of lines."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if verbose else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
