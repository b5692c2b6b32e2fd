"""`engine.profile`: some steps of a run under torch's profiler, as a trace and a page that says where they went.

    RUN/profile/
        trace.rank0.json.gz    Chrome trace, one a rank, for chrome://tracing or ui.perfetto.dev
        summary.txt            the share of each part, the busiest kernels or operators; of rank 0
        summary.png            the same as a picture, with the timeline of one step

The profiler starts and stops between steps, so never while CUDA graphs are captured.  A captured run is profiled from
the second step behind its capture on at the earliest: the steps before run as it never does again.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.config import Config, ConfigError
from engine.distributed import Ranks
from engine.profile_page import as_text, draw
from engine.profile_trace import IDLE, OTHER, OUTSIDE, PARTS, PREFIX, WHOLE, Breakdown, breakdown

__all__ = ["IDLE", "OTHER", "OUTSIDE", "PARTS", "WHOLE", "Breakdown", "StepProfiler", "breakdown", "part", "profiled"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Clock(Protocol):
    """What counts the time of training."""

    def start(self) -> None:
        """Runs on."""

    def stop(self) -> None:
        """Halts."""


def part(name: str) -> AbstractContextManager[Any]:
    """Marks what happens within as a part of the step, one of PARTS, or as OUTSIDE of it; the innermost mark counts."""
    # record_function costs 4.7 us with no profiler there, this 0.3 (torch 2.14, one of two shared cores).
    return record_function(PREFIX + name) if torch.autograd._profiler_enabled() else nullcontext()


def new_profile(device: torch.device) -> profile:
    """torch's profiler of what a device and its host do, not yet started."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    else:
        # torch's build for CUDA would report on every rank that it finds no driver.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=activities)


def profiled(step: Callable[[], object], steps: int, device: torch.device) -> Breakdown:
    """Where steps go, each a call that marks itself with `part(WHOLE)`, after one that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        with new_profile(device) as recorded:
            for _ in range(1 + steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        recorded.export_chrome_trace(str(path))
        with gzip.open(path, "rt") as file:
            return breakdown(json.load(file), skip=1)


class StepProfiler:
    """Profiles the steps that `engine.profile` asks for, where it does.

    `first`: the step that this run begins with; `steps`: those of the whole run, with the ones before; `captured`: the
    step in which it is captured as CUDA graphs, where it is.  Raises ConfigError: the steps lie outside of the run.
    """

    def __init__(self, cfg: Config, ranks: Ranks, *, first: int, steps: int, captured: int | None = None) -> None:
        self.cfg, self.ranks = cfg, ranks
        self.steps = steps
        self.folder: Path = cfg.run.output_dir / "profile"
        self.notes: list[str] = []
        """Lines for the user on what becomes of `engine.profile`."""
        self._window = self._choose(first, captured)
        # One step before them is recorded too, and not counted: the first one under the profiler is slow, and the
        # device still has work from it when the next begins.
        self._begin = max(first, self._window.start - 1)
        self._profile: profile | None = None

    def _choose(self, first: int, captured: int | None) -> range:
        """The steps to profile; none where there are none left."""
        wanted = self.cfg.engine.profile
        if wanted is None:
            return range(0)
        if reason := self.cfg.not_profilable(self.steps):
            raise ConfigError(f"engine.profile: {reason}")
        if first > wanted.start:
            self.notes.append(
                f"nothing is profiled: the run goes on at step {first}, behind engine.profile.start={wanted.start}"
            )
            return range(0)
        start = wanted.start if captured is None else max(wanted.start, captured + 2)
        window = range(start, start + wanted.steps)
        if start == wanted.start:
            return window
        behind = f"the step is captured as CUDA graphs in step {captured} and can be profiled from {start} on"
        if window.stop <= self.steps:
            self.notes.append(f"steps {start} to {window.stop - 1} are profiled (engine.profile: {behind})")
            return window
        if first == 0:
            raise ConfigError(
                f"engine.profile: {behind}, so that steps {start} to {window.stop - 1} would lie outside of the run, "
                f"whose last is {self.steps - 1}; use fewer steps, or engine.capture=false"
            )
        # An interrupted run must be able to go on, wherever that was.
        self.notes.append(f"nothing is profiled: {behind}, and the run ends before it has enough steps")
        return range(0)

    @property
    def summary(self) -> Path | None:
        """The page that this run wrote, or None."""
        path = self.folder / "summary.txt"
        return path if self._window and path.exists() else None

    def over(self, batches: Iterator[T], *, first: int, clock: Clock) -> Iterator[T]:
        """Hands on the batches of the run's steps from `first` on; what the caller does with one is its step.

        The clock stands still while the profiler starts and writes.
        """
        try:
            for step in range(first, self.steps):
                if self._window and step == self._begin:
                    clock.stop()
                    self._start()
                    clock.start()
                with part(WHOLE) if step in self._window else nullcontext():
                    with part("data"):
                        batch = next(batches)
                    yield batch
                if self._window and step == self._window[-1]:
                    clock.stop()
                    self._write_or_warn(self._stop())
                    if step + 1 < self.steps:
                        clock.start()
            yield from batches  # none, but the loader comes to its end
        finally:
            if self._profile is not None:  # a step failed
                self._stop()

    def _start(self) -> None:
        self._profile = new_profile(self.ranks.device)
        self._profile.start()

    def _stop(self) -> profile:
        """Ends the profile; waits for the device."""
        stopped, self._profile = self._profile, None
        assert stopped is not None
        stopped.stop()
        return stopped

    def _write_or_warn(self, stopped: profile) -> None:
        """No run ends over its page: the other ranks would wait for this one."""
        try:
            self._write(stopped)
        except Exception as error:  # a full disk, whatever a profiler or a plot runs into
            log.warning("engine.profile: %s: not written (%s: %s)", self.folder, type(error).__name__, error)

    def _write(self, stopped: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace.rank{self.ranks.rank}.json.gz"
        stopped.export_chrome_trace(str(trace))
        if not self.ranks.is_first:
            return
        with gzip.open(trace, "rt") as file:
            found = breakdown(json.load(file))
        facts = self._facts(found)
        (self.folder / "summary.txt").write_text(as_text(found, facts))
        draw(found, facts, self.folder / "summary.png")

    def _facts(self, found: Breakdown) -> dict[str, str]:
        """The head of the page."""
        ranks, window = self.ranks, self._window
        peers = " + ".join(peer.backbone for peer in self.cfg.peers)
        where = f", rank 0 of {ranks.world}" if ranks.world > 1 else ""
        device = f"CPU, {torch.get_num_threads()} threads"
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB resident"
        if ranks.device.type == "cuda":
            device = torch.cuda.get_device_name(ranks.device)
            memory = f"{torch.cuda.max_memory_allocated(ranks.device) / 2**30:.2f} GiB of the GPU's allocated"
            if not found.on_device:
                device += " (the profiler saw nothing on it: times are the host's)"
        rate = self.cfg.data.batch_size / found.ms_per_step * 1e3
        return {
            "title": f"{peers}, batch {self.cfg.data.batch_size}: steps {window[0]} to {window[-1]}{where}",
            "device": device,
            "software": f"torch {torch.__version__}",
            "wall time": f"{found.ms_per_step:.2f} ms a step over {found.steps}",
            "rate": f"{rate:,.0f} source images/s under the profiler",
            "peak memory": memory,
        }
