"""Turns of whole steps: each provider trains for a slice of time, then the next one does, again and again.

Loaders work ahead, so that one which waits for its turn has batches ready that cost its slice nothing: these are
dropped first.  Worker processes started at the same time then deliver at the same time, so a slice counts whole rounds
of them; and a turn begins when the workers of the one before have stopped.

With several ranks a slice is a number of steps, which rank 0 finds out in the warm-up and tells the others, and its
clock alone counts.  A provider that cannot be built leaves on all of them.  An error that one rank has in a step ends
the benchmark there: the others wait in that step, and the launcher ends them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from bench import harness
from bench.harness import Failure, guarded
from bench.step_data import Images
from bench.step_providers import Case, Training, training
from engine import distributed
from engine.distributed import Ranks
from engine.profile import Breakdown, profiled

# Steps: libraries load, networks are compiled, optimizers make their state; on a GPU graphs are captured and replayed.
WARM_UP = {"cuda": 6, "cpu": 2}
PROFILED = 4  # steps at least
IDLE_S, MOST_IDLE_S = 0.1, 30.0

T = TypeVar("T")


class Memory:
    """The most GPU memory that one provider holds, others' left out; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self.peak = self._held = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While nobody else takes or gives back any."""
        if self._gpu is None:
            yield
            return
        before = torch.cuda.memory_allocated(self._gpu)
        torch.cuda.reset_peak_memory_stats(self._gpu)
        yield
        torch.cuda.synchronize(self._gpu)
        self.peak = max(self.peak, self._held + torch.cuda.max_memory_allocated(self._gpu) - before)
        self._held += torch.cuda.memory_allocated(self._gpu) - before


class Turns:
    """A provider that has warmed up, and what its turns gave; `seconds` is what a turn takes about."""

    def __init__(self, build: Callable[[], Training], batch: int, ranks: Ranks, *, seconds: float) -> None:
        self.batch, self.ranks, self.memory = batch, ranks, Memory(ranks.device)
        self.rates: list[float] = []  # source images a second, of each turn
        self.parts: Breakdown | None = None  # of steps behind the turns
        with self.memory.watched():
            self.training = distributed.everyone_does(ranks, build)
            try:
                self._warm_up(seconds)
            except BaseException:
                self.training.close()
                raise

    def _warm_up(self, seconds: float) -> None:
        own = self.training
        # Ranks that dropped or trained on different numbers of batches would wait for each other for ever.
        own.ahead, own.together = distributed.first_rank_does(self.ranks, lambda: (own.ahead, own.together))
        self.run(WARM_UP[self.ranks.device.type])
        own.drop_what_lies_ready()
        a_round = self._seconds(own.together)
        rounds = distributed.first_rank_does(self.ranks, lambda: max(1, round(seconds / a_round)))
        self.steps = rounds * own.together  # of a turn

    def take(self) -> None:
        """One turn: whole rounds of the loader's workers."""
        with self.memory.watched():
            self.training.drop_what_lies_ready()
            self.rates.append(self.steps * self.batch / self._seconds(self.steps))
        wait_for_workers()

    def profile(self) -> Breakdown:
        """Where steps go, by torch's profiler, which makes them slower: whole rounds, on every rank at once."""
        self.training.drop_what_lies_ready()
        rounds = -(-PROFILED // self.training.together)
        found = profiled(self.training.step, rounds * self.training.together, self.ranks.device)
        wait_for_workers()
        return found

    def run(self, steps: int) -> None:
        """Trains; the clock is the caller's affair."""
        for _ in range(steps):
            self.training.step()

    def _seconds(self, steps: int) -> float:
        """What so many steps take, from an idle device to an idle device."""
        self._synchronize()
        distributed.barrier(self.ranks)
        began = time.perf_counter()
        self.run(steps)
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)


def wait_for_workers() -> None:
    """Until no child of this process computes: those of a loader have filled their queue."""
    until, before = time.perf_counter() + MOST_IDLE_S, _seconds_of_children()
    while time.perf_counter() < until:
        time.sleep(IDLE_S)
        now = _seconds_of_children()
        if now <= before:
            return
        before = now


def _seconds_of_children() -> float:
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def attempted(call: Callable[[], T], ranks: Ranks) -> T | Failure:
    """What `call` returns, or why it failed.  Raises an error that other ranks may not have."""
    if ranks.world == 1:
        return guarded(call)
    try:
        return call()
    except Exception as error:
        if not getattr(error, "on_every_rank", False):
            raise
        failure = Failure(harness.failure_reason(error))
    harness.release_memory()  # behind the handler, as in `guarded`
    return failure


def measure(
    case: Case, providers: Sequence[str], images: Images | None, ranks: Ranks, *, rounds: int, seconds: float
) -> dict[str, Turns]:
    """Every provider's turns, one after the other in each round; one that fails is named and leaves.

    `seconds` are those of all turns of one provider together.
    """
    running: dict[str, Turns] = {}
    with tempfile.TemporaryDirectory() as own:
        folder = distributed.first_rank_does(ranks, lambda: own)  # a run has one
        try:
            for name in providers:
                build = partial(training, case, name, images, ranks, Path(folder) / name)
                turns = attempted(partial(Turns, build, case.batch, ranks, seconds=seconds / rounds), ranks)
                if isinstance(turns, Failure):
                    _report(case, name, turns, ranks)
                else:
                    running[name] = turns
                wait_for_workers()
            for name in [*providers] * rounds:
                taken = attempted(running[name].take, ranks) if name in running else None
                if isinstance(taken, Failure):
                    _report(case, name, taken, ranks)
                    running.pop(name).training.close()
                    harness.release_memory()
            for name in [*running]:
                parts = attempted(running[name].profile, ranks)
                if isinstance(parts, Failure):
                    _report(case, f"{name}: its parts", parts, ranks)
                else:
                    running[name].parts = parts
            distributed.barrier(ranks)  # the folder is every rank's
        finally:
            for turns in running.values():
                turns.training.close()
    return running


def _report(case: Case, name: str, failure: Failure, ranks: Ranks) -> None:
    if ranks.is_first:
        print(f"{case}: {name}: left out: {failure.reason}")
