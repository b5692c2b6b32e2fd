"""Turns of whole steps: what lies ready is dropped, ranks agree, one that fails leaves."""

import multiprocessing
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import step_turns
from bench.harness import Failure
from bench.step_providers import ENGINE, PLAIN, Case, Training
from bench.step_turns import Turns
from engine import distributed
from engine.distributed import Ranks
from ranks import run_ranks

CPU = torch.device("cpu")
PAIR = "wrn-10-1+wrn-10-1"
CASE = Case("quickstart", PAIR, 16)


class Fake:
    """A provider whose batches are numbers; it fails at one of them."""

    def __init__(self, fails_at: int = 10**9, ahead: int = 4, together: int = 3) -> None:
        self.fails_at, self.trained, self.closed = fails_at, [], False
        self.training = Training(iter(range(10**6)), self.train, ahead, together, self.close)

    def train(self, number: int) -> None:
        if number >= self.fails_at:
            raise RuntimeError("a loss of its own\nand more")
        time.sleep(0.01)
        self.trained.append(number)

    def close(self) -> None:
        self.closed = True


def measured(monkeypatch, **fakes: Fake | Exception) -> dict[str, Turns]:
    def build(case: Case, name: str, *_: Any) -> Training:
        fake = fakes[name]
        if isinstance(fake, Exception):
            raise fake
        return fake.training

    monkeypatch.setattr(step_turns, "training", build)
    monkeypatch.setattr(step_turns, "IDLE_S", 0.0)
    ranks = Ranks(rank=0, world=1, local_rank=0, device=CPU, group=None)
    return step_turns.measure(CASE, list(fakes), None, ranks, rounds=3, seconds=0.27)


def test_what_lies_ready_is_dropped_and_whole_rounds_are_counted(monkeypatch):
    fake = Fake()
    turns = measured(monkeypatch, engine=fake)[ENGINE]
    warm = step_turns.WARM_UP["cpu"]
    assert fake.trained[: warm + 1] == [*range(warm), warm + 4], "four were ready"
    skipped = set(range(fake.trained[-1])) - set(fake.trained)
    assert len(skipped) == (1 + 3 + 1) * 4, "before the round whose time is taken, each turn, and the profile"
    assert turns.steps % 3 == 0 and 3 <= turns.steps <= 9, "whole rounds, of steps of 10 ms, in 90 ms"
    assert len(fake.trained) == warm + (3 + 3) + 3 * (3 + turns.steps) + (3 + 1 + 6)
    assert turns.parts.steps == 6 and turns.parts.ms_per_step > 10, "whole rounds are profiled"
    assert len(turns.rates) == 3 and max(turns.rates) <= 16 / 0.01
    assert fake.closed


def test_providers_that_fail_are_named_and_the_others_stay(monkeypatch, capsys):
    late, good = Fake(fails_at=20), Fake()
    found = measured(monkeypatch, captured=ValueError("no GPU"), engine=late, plain=good)
    assert list(found) == [PLAIN] and len(found[PLAIN].rates) == 3
    assert capsys.readouterr().out.splitlines() == [
        f"{PAIR}, batch 16, real: captured: left out: ValueError: no GPU",
        f"{PAIR}, batch 16, real: engine: left out: RuntimeError: a loss of its own",
    ]
    assert late.closed and good.closed


def test_one_that_fails_in_its_warm_up_is_closed(monkeypatch):
    fake = Fake(fails_at=1)
    assert measured(monkeypatch, engine=fake) == {}
    assert fake.closed


def computes(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    time.sleep(20)


def test_a_turn_begins_when_workers_have_stopped():
    child = multiprocessing.get_context("fork").Process(target=computes, args=(0.5,))
    child.start()
    try:
        began = time.perf_counter()
        step_turns.wait_for_workers()
        assert 0.4 < time.perf_counter() - began < 15
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_memory_is_that_of_one_provider(monkeypatch):
    """Another holds 1000; building this one peaks at 300 and leaves 100; a turn peaks 50 above what lies there."""
    now = {"held": 1000, "most": 1000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["held"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(most=now["held"]))
    memory = step_turns.Memory(torch.device("cuda", 0))
    with memory.watched():
        now.update(held=1100, most=1300)
    assert memory.peak == 300
    now.update(held=2100, most=9000)  # others build meanwhile
    with memory.watched():
        now.update(most=2150)
    assert memory.peak == 300
    with memory.watched():
        now.update(most=2400)
    assert memory.peak == 400
    assert step_turns.Memory(CPU).peak == 0


def test_a_turn_takes_about_as_long_as_it_should():
    ranks = Ranks(rank=0, world=1, local_rank=0, device=CPU, group=None)
    turns = Turns(lambda: Fake(together=1).training, 16, ranks, seconds=0.5)
    assert turns.steps == pytest.approx(50, rel=0.5)  # a busy machine sleeps longer than 10 ms
    shorter = Turns(lambda: Fake(together=1).training, 16, ranks, seconds=0.001)
    assert shorter.steps == 1


# -- ranks


def of_several() -> tuple[list[int], int, int, list[str]]:
    """Of a provider, each rank of which would drop and train on other numbers of batches: what it was trained on, the
    steps of a turn and the turns; and who is left, where one rank could not build another."""
    ranks = distributed.start()
    try:
        slow = 0.02 if ranks.rank else 0.005
        fake = Fake(ahead=2 + ranks.rank, together=1 + ranks.rank)

        def train(number: int) -> None:
            time.sleep(slow)
            torch.distributed.all_reduce(torch.zeros(1))  # as a step does: steps that do not match would wait
            fake.trained.append(number)

        def build(case: Case, name: str, *_: Any) -> Training:
            if name == PLAIN and ranks.rank == 1:
                raise ValueError("on this rank alone")
            return fake.training

        fake.training.train = train
        step_turns.training = build  # this process ends with the test
        found = step_turns.measure(CASE, [PLAIN, ENGINE], None, ranks, rounds=2, seconds=0.4)
        return fake.trained, found[ENGINE].steps, len(found[ENGINE].rates), list(found)
    finally:
        distributed.stop()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of a CPU under gloo")
def test_ranks_agree():
    """On the batches, on the steps of a turn, which rank 0's clock gives, and on who takes part."""
    first, second = run_ranks(of_several, 2)
    assert first == second
    trained, steps, turns, left = first
    warm = step_turns.WARM_UP["cpu"]
    assert trained[: warm + 2] == [*range(warm), warm + 2, warm + 3], "rank 0 has two ready, rank 1 would have three"
    profiled = 1 + 1 + step_turns.PROFILED  # a round, and a step that is not counted
    assert len(trained) == warm + 2 + 2 * (1 + steps) + profiled
    assert turns == 2 and left == [ENGINE]


def test_an_error_of_one_rank_ends_the_benchmark(alone):
    """The other ranks wait for this one, whatever it would do next."""

    def fails() -> None:
        raise ValueError("in a step")

    def fails_everywhere() -> None:
        error = ValueError("in a step")
        error.on_every_rank = True
        raise error

    two = replace(alone, world=2)
    with pytest.raises(ValueError, match="in a step"):
        step_turns.attempted(fails, two)
    assert step_turns.attempted(fails, alone) == Failure("ValueError: in a step")
    assert step_turns.attempted(fails_everywhere, two) == Failure("ValueError: in a step")
    assert step_turns.attempted(lambda: "taken", two) == "taken"
