"""Ranks: work for one, work for all, and the environment."""

import dataclasses

import pytest
import torch

from engine import distributed
from engine.distributed import seed_everything
from ranks import run_ranks
from runs import fit


def attempts() -> list[str]:
    """What each kind of failing work raises on this rank."""
    ranks = distributed.start()

    def fails_on(bad: int) -> int:
        if ranks.rank == bad:
            raise ValueError(f"rank {bad} saw it")
        return ranks.rank

    told = [str(distributed.first_rank_does(ranks, lambda: 40 + ranks.rank))]
    for attempt in (
        lambda: distributed.first_rank_does(ranks, lambda: fails_on(0)),
        lambda: distributed.everyone_does(ranks, lambda: fails_on(1)),
        lambda: distributed.everyone_does(ranks, lambda: fails_on(5)),
    ):
        try:
            told.append(str(attempt()))
        except ValueError as error:
            told.append(f"{error}, known to all: {error.on_every_rank}")
    told.append(str(distributed.gather_objects(ranks, {"rank": ranks.rank})))
    distributed.stop()
    return told


@pytest.mark.slow
def test_ranks_share_results_and_errors():
    for rank, told in enumerate(run_ranks(attempts, 2)):
        assert told == [
            "40",
            "rank 0 saw it, known to all: True",
            "rank 1 saw it, known to all: True",
            str(rank),
            "[{'rank': 0}, {'rank': 1}]",
        ]


def starts(settings: list) -> int:
    """Runs in one process, each between a start and a stop."""
    return len([fit(plain) for plain in settings])


@pytest.mark.slow
def test_a_process_can_start_again(settings, tmp_path):
    settings["run"]["steps"] = 1
    other = {**settings, "run": {**settings["run"], "output_dir": str(tmp_path / "other")}}
    assert run_ranks(starts, 1, [settings, other]) == [2]


def test_alone_everything_is_the_identity(alone):
    distributed.barrier(alone)
    assert distributed.first_rank_does(alone, lambda: 5) == 5
    assert distributed.everyone_does(alone, lambda: 6) == 6
    assert distributed.gather_objects(alone, 7) == [7]
    with pytest.raises(KeyError):
        distributed.everyone_does(alone, lambda: {}["x"])


def test_same_seed_same_weights():
    draws = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        draws.append(torch.randn(5).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_cores_are_shared(monkeypatch):
    cores = distributed.cores_per_rank()
    monkeypatch.setenv("WORLD_SIZE", "1000")
    assert distributed.cores_per_rank() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert distributed.cores_per_rank() == cores


def test_ranks_say_who_is_first(alone):
    assert alone.is_first
    assert not dataclasses.replace(alone, rank=2).is_first
