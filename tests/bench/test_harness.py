"""The harness measures what it says: order of calls, percentiles, memory, failures, rows."""

import json
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import harness, rows
from bench.harness import Failure
from bench.rows import Row, Stats

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
KEYS = (
    "subject", "case", "provider", "metric", "p20", "p50", "p80", "n", "floor",
    "device_name", "torch", "triton", "driver", "commit", "date", "command",
)  # fmt: skip


# -- time ----------------------------------------------------------------------------------------------------------


def test_percentiles_interpolate():
    assert harness.percentiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2, 5))
    assert harness.percentiles([7.0]) == (7.0, 7.0, 7.0, 1)


def test_providers_take_turns():
    calls = []
    named = {name: partial(lambda name, i: calls.append((name, i)), name) for name in "abc"}
    samples, failures = harness.interleave(named, {"a": 3, "b": 1, "c": 3}, CPU)
    assert calls == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2), ("c", 2)]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 1, "c": 3}
    assert failures == {}


def test_a_call_is_timed():
    assert 20 <= harness.milliseconds(lambda: time.sleep(0.02), CPU) < 200


def test_repetitions_fit_the_budget():
    assert harness.repetitions_for({"a": 30.0, "b": 10.0}, 1.0) == {"a": 25, "b": 25}
    assert harness.repetitions_for({"a": 900.0}, 1.0) == {"a": harness.MIN_REPETITIONS}
    assert harness.repetitions_for({"a": 0.001}, 1.0) == {"a": harness.MAX_REPETITIONS}
    assert harness.repetitions_for({"slow": 4001.0, "b": 40.0}, 1.0) == {"slow": 1, "b": 25}
    assert harness.repetitions_for({}, 1.0) == {}


def test_timed_warms_up_and_counts():
    seen = []

    def call(i):
        seen.append(i)
        time.sleep(0.002)

    result = harness.timed({"a": call}, CPU, seconds=0.001)
    assert seen == [0, 1, *range(harness.MIN_REPETITIONS)]
    assert result.stats["a"].n == harness.MIN_REPETITIONS
    assert result.stats["a"].p20 >= 2
    assert result.failures == {}
    assert result.retries == 0


def test_rounds_can_be_asked_for():
    seen = []
    result = harness.timed({"a": seen.append, "b": lambda i: None}, CPU, seconds=60.0, rounds=3)
    assert seen == [0, 1, 0, 1, 2]
    assert [stats.n for stats in result.stats.values()] == [3, 3]


def test_sets_of_inputs_overflow_the_cache():
    assert harness.input_sets(2**20, CPU) == 1 + harness.CPU_CACHE // 2**20
    assert harness.input_sets(10 * harness.CPU_CACHE, CPU) == 1
    assert harness.input_sets(1, CPU) == harness.MOST_INPUT_SETS


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_provider_without_memory_leaves_the_others_alone():
    def full(i):
        if i == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    samples, failures = harness.interleave({"full": full, "fits": lambda i: None}, {"full": 4, "fits": 4}, CPU)
    assert failures == {"full": Failure("out of memory")}
    assert list(samples) == ["fits"]
    assert len(samples["fits"]) == 4


def test_out_of_memory_on_a_cpu():
    assert harness.guarded(lambda: torch.empty(2**60, dtype=torch.uint8)) == Failure("out of memory")


def test_other_errors_keep_their_first_line():
    def breaks():
        raise ValueError("D = 3 is not supported\nand more")

    assert harness.guarded(breaks) == Failure("ValueError: D = 3 is not supported")
    assert harness.guarded(lambda: 5) == 5


def test_a_failure_holds_no_tensor():
    held = []

    def breaks():
        tensor = torch.ones(4)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("full")

    harness.guarded(breaks)
    assert held[0]() is None


def test_timed_with_nothing_left():
    def breaks(i):
        raise RuntimeError("no")

    assert harness.timed({"a": breaks}, CPU, 1.0) == ({}, {"a": Failure("RuntimeError: no")}, 0)


# -- memory --------------------------------------------------------------------------------------------------------


def three_tensors(device: torch.device) -> torch.Tensor:
    """8 MB at a time: the first of three tensors of 4 MB leaves before the third comes."""
    a = torch.ones(1000, 1000, device=device)
    b = a + 1
    del a
    return b + 1


def test_peak_memory_on_a_cpu():
    peaks = [harness.peak_bytes(partial(three_tensors, CPU), CPU) for _ in range(2)]
    assert all(8_000_000 <= peak < 8_010_000 for peak in peaks)


def test_memory_of_the_host():
    free = harness.available_bytes()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.gpu
def test_peak_memory_and_times_on_a_gpu():
    device = torch.device("cuda")
    assert 8_000_000 <= harness.peak_bytes(partial(three_tensors, device), device) < 8_400_000
    x = torch.ones(4096, 4096, device=device)
    alone = harness.milliseconds(lambda: x @ x, device)
    replay = harness.captured(lambda: x @ x)
    assert 0 < min(harness.milliseconds(replay, device) for _ in range(5)) <= 2 * max(alone, 1.0)


# -- rows ----------------------------------------------------------------------------------------------------------


def some_row(**changes) -> Row:
    env = rows.environment(["loss", "--sizes", "32"])
    return rows.make_row(env, "loss", {"M": 32}, "torch", "ms", Stats(1.23456, 2.0, 3.0, 7), changes.get("floor"))


def test_rows_have_exactly_these_keys(tmp_path):
    path = tmp_path / "device" / "loss.jsonl"
    rows.append_rows([some_row()], path)
    rows.append_rows([some_row(floor=0.123456)], path)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert tuple(first) == tuple(second) == KEYS == rows.ROW_KEYS
    assert (first["p20"], first["n"], first["floor"]) == (1.235, 7, None)
    assert second["floor"] == 0.1235
    assert first["command"] == "python -m bench loss --sizes 32"
    assert rows.read_rows(path) == [some_row(), some_row(floor=0.123456)]


def test_bytes_stay_whole():
    env = rows.environment(["loss"])
    row = rows.make_row(env, "loss", {}, "torch", "bytes", Stats(123456789, 123456789, 123456789, 1), None)
    assert (row.p20, row.p50, row.p80) == (123456789,) * 3


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*/*.jsonl")), ids=lambda p: p.stem)
def test_recorded_rows_can_be_read(path):
    assert all(row.p20 is not None for row in rows.read_rows(path))


def test_the_environment_of_this_machine():
    env = rows.environment(["loss"])
    assert env.torch == torch.__version__.partition("+")[0]
    assert (env.folder == "cpu") == (not torch.cuda.is_available())
    assert len(env.date) == len("2026-01-31")
    assert rows.installed_version("no-such-package") is None
    assert rows.first_line("git", "no-such-command") is None
    assert rows.first_line("no-such-program") is None


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_folders_by_gpu(name, folder):
    assert rows.slug(name) == folder
