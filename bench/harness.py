"""How every subject measures: interleaved times, peak memory, and failures that end no benchmark.

Times are those of one process: all providers run in turns, one call each a repetition, so that a drifting clock hits
all alike.  Each call starts on an idle device and so includes what its launches cost the host.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from bench.rows import Stats

CPU_CACHE = 32 * 2**20  # last-level cache of a usual server share; torch does not tell it
MOST_INPUT_SETS = 64
MIN_REPETITIONS, MAX_REPETITIONS = 5, 200
SLOW_MS = 4000.0  # a call that takes longer is timed once


# -- failures ------------------------------------------------------------------------------------------------------


T = TypeVar("T")


class Failure(NamedTuple):
    """Why a provider gave no number."""

    reason: str


def guarded(call: Callable[[], T]) -> T | Failure:
    """What `call` returns, or why it failed: one provider's error or lack of memory ends no benchmark."""
    try:
        return call()
    except Exception as error:  # other libraries fail in ways of their own
        failure = Failure(failure_reason(error))
    # Behind the handler: there the traceback still holds the tensors that filled the memory.
    release_memory()
    return failure


def failure_reason(error: Exception) -> str:
    """`out of memory`, or the error's kind and first line."""
    # torch raises a plain RuntimeError where a CPU has no memory left.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def release_memory() -> None:
    """Gives cached memory back, so that a failed provider leaves none short for the others."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- time ----------------------------------------------------------------------------------------------------------

Call = Callable[[int], object]  # takes the number of the repetition, to choose among sets of inputs


def percentiles(samples: list[float]) -> Stats:
    """p20, p50 and p80, interpolated."""
    p20, p50, p80 = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Stats(p20, p50, p80, len(samples))


def input_sets(set_bytes: int, device: torch.device) -> int:
    """Sets of inputs to rotate over, so that a call does not find its own in the cache of the call before."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    return min(MOST_INPUT_SETS, 1 + cache // set_bytes)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call that starts on an idle device."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end)
    started = time.perf_counter()
    result = call()
    elapsed = (time.perf_counter() - started) * 1e3
    del result  # freeing memory is no part of the call
    return elapsed


def interleave(
    calls: Mapping[str, Call], repetitions: Mapping[str, int], device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Failure]]:
    """Milliseconds of each provider's calls, in turns; one that fails on the way leaves."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failures: dict[str, Failure] = {}
    for i in range(max(repetitions.values(), default=0)):
        for name in calls:
            if name in failures or i >= repetitions[name]:
                continue
            taken = guarded(partial(milliseconds, partial(calls[name], i), device))
            if isinstance(taken, Failure):
                failures[name] = taken
                del samples[name]
            else:
                samples[name].append(taken)
    return samples, failures


class Timed(NamedTuple):
    """Results of `timed`: each provider has either times or a failure."""

    stats: dict[str, Stats]
    failures: dict[str, Failure]
    retries: int  # times that the GPU's memory was reorganised while the clock ran: the slow ones paid for it


def timed(calls: Mapping[str, Call], device: torch.device, seconds: float, *, rounds: int | None = None) -> Timed:
    """Times providers in turns for about `seconds` together, after two calls of each to compile and warm up.

    `rounds`: so many calls of each, however long they take.
    """
    warm, failures = interleave(calls, dict.fromkeys(calls, 2), device)
    calls = {name: calls[name] for name in warm}
    repetitions = repetitions_for({name: samples[-1] for name, samples in warm.items()}, seconds)
    if rounds is not None:
        repetitions = dict.fromkeys(calls, rounds)
    before = allocation_retries(device)
    samples, late = interleave(calls, repetitions, device)
    stats = {name: percentiles(values) for name, values in samples.items()}
    return Timed(stats, failures | late, allocation_retries(device) - before)


def repetitions_for(taken: Mapping[str, float], seconds: float) -> dict[str, int]:
    """Calls of each provider, from the milliseconds that one takes, so that all take about `seconds`."""
    slow = {name for name, ms in taken.items() if ms > SLOW_MS}
    a_round = sum(ms for name, ms in taken.items() if name not in slow)
    fitting = int(1e3 * seconds / a_round) if a_round > 0 else 0
    return {name: 1 if name in slow else min(MAX_REPETITIONS, max(MIN_REPETITIONS, fitting)) for name in taken}


def allocation_retries(device: torch.device) -> int:
    """How often torch found no free block on the GPU and gave cached ones back, which takes milliseconds."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: replaying it costs the host one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# -- memory --------------------------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that one call holds at a time, its results included, its inputs not."""
    if device.type != "cuda":
        return _peak_bytes_cpu(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _peak_bytes_cpu(call: Callable[[], object]) -> int:
    # Resident memory says less: the C library keeps what was freed, and a call grows it only where that is too little.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and stop otherwise
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = call()
    del result
    assert profile.profiler is not None
    recorded = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def available_bytes() -> int | None:
    """Memory of the host that is free for a new allocation, None where the system does not tell."""
    info = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", info.read_text(), re.MULTILINE) if info.exists() else None
    return int(found[1]) * 1024 if found else None
