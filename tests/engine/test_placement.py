"""Peers split between groups of ranks: who trains what, what crosses over, and the same run as on all ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import distributed
from engine.checkpoint import CheckpointError
from engine.config import ConfigError, parse_config
from engine.distributed import Ranks
from engine.placement import Exchange, balanced, describe_placement, place, sizes_note
from engine.trainer import NonFiniteLoss, Trainer
from ranks import run_ranks
from runs import fit, losses

N = 12


# -- sizes


@pytest.mark.parametrize(
    ("costs", "world", "batch", "expected"),
    [
        ([1.0, 1.0], 2, 16, (1, 1)),
        ([1.0, 1.0], 8, 64, (4, 4)),
        ([1.0, 3.0], 8, 96, (2, 6)),
        ([1.0, 3.0], 8, 64, (4, 4)),  # 2 and 6 would be better, and 6 does not divide 64
        ([5.0, 1.0], 3, 12, (2, 1)),
        ([1.0, 100.0], 4, 12, (1, 3)),
    ],
)
def test_sizes_follow_costs(costs, world, batch, expected):
    assert balanced(costs, world, batch) == expected


def test_a_batch_that_no_sizes_divide():
    with pytest.raises(
        ConfigError, match=r"data.batch_size: 7 does not divide by the sizes of any two groups of 3 ranks"
    ):
        balanced([1.0, 1.0], 3, 7)


def test_the_note_says_what_would_fit_better():
    costs = [1.0, 3.0]
    fits = sizes_note(costs, balanced(costs, 8, 96), 96)
    assert fits == "; measured: an image of the second costs 3 times one of the first"
    assert sizes_note(costs, balanced(costs, 8, 64), 64) == fits + (
        ", for which 2 and 6 ranks would be better; they take a data.batch_size that is a multiple of 6, found 64"
    )


def split(settings: dict[str, Any], *sizes: int, **engine: Any) -> dict[str, Any]:
    settings["engine"] = {"precision": "fp32", "concurrency": "split", **engine}
    if sizes:
        settings["engine"]["split"] = list(sizes)
    return settings


def ranks_of(world: int, rank: int = 0) -> Ranks:
    return Ranks(rank=rank, world=world, local_rank=rank, device=torch.device("cpu"), group=None)


def test_what_is_refused(settings):
    def refused(world: int, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            place(parse_config(settings), ranks_of(world), 32)

    split(settings)
    refused(1, "engine.concurrency: split takes a rank a peer at least, found 1 in all")
    split(settings, 1, 2)
    refused(4, "engine.split: 1 and 2 ranks make 3, found 4 in all")
    split(settings, 1, 3)
    refused(4, r"data.batch_size: 16 does not divide by the 3 ranks of peer b \(engine.split\)")


@pytest.mark.parametrize(
    ("engine", "peers", "message"),
    [
        ({"concurrency": "split"}, 1, "engine.concurrency: split takes two peers that train, found one; use serial"),
        (
            {"concurrency": "streams"},
            1,
            "engine.concurrency: streams takes two peers that train, found one",
        ),
        ({"split": [1, 1]}, 2, r"engine.split: \[1, 1\] with engine.concurrency=auto, which splits nothing; unset it"),
        ({"concurrency": "split", "split": [0, 2]}, 2, "engine.split.0: found 0, allowed: greater than 0"),
        ({"concurrency": "streams", "zero_stage": 3}, 2, "engine.concurrency: streams takes engine.zero_stage 0 to 2"),
        ({"concurrency": "threads"}, 2, "engine.concurrency: found 'threads'"),
    ],
)
def test_configurations_that_are_refused(settings, engine, peers, message):
    settings["engine"], settings["peers"] = engine, settings["peers"][:peers]
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


# -- what crosses over


def exchanged(sizes: tuple[int, int], dtype: torch.dtype) -> tuple[list[str], bool]:
    """Whether each rank got the other peer's rows of its own images; an entry tells peer, view, image and column."""
    ranks = distributed.start()
    try:
        peer = {"backbone": "wrn-10-1"}
        cfg = parse_config({
            "run": {"output_dir": "x", "steps": 1}, "data": {"batch_size": N},
            "peers": [{"name": "a", **peer, "projector": {"out": 3}}, {"name": "b", **peer, "projector": {"out": 5}}],
            "engine": {"concurrency": "split", "split": sizes},
        })  # fmt: skip
        placement = place(cfg, ranks, 32)
        (own,) = placement.peers
        n = N // sizes[own]
        rows = slice(placement.own.rank * n, (placement.own.rank + 1) * n)

        def embeddings(of: int) -> list[torch.Tensor]:
            image, column = torch.arange(N)[rows, None], torch.arange(5 if of else 3)
            return [(64 * of + 32 * view + 2 * image + column / 8).to(dtype) for view in range(2)]

        found = Exchange(placement, cfg)(*(z.requires_grad_() for z in embeddings(own)))
        same = all(torch.equal(z, wanted) for z, wanted in zip(found, embeddings(1 - own), strict=True))
        same = same and all(z.dtype == dtype and not z.requires_grad and z.is_contiguous() for z in found)
        return describe_placement(cfg, placement), same
    finally:
        distributed.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (3, 1), (2, 2), (2, 3)])
def test_each_rank_gets_the_rows_of_its_own_images(sizes, dtype):
    a, b = sizes
    for lines, same in run_ranks(exchanged, a + b, sizes, dtype):
        assert same
        on_a = "rank 0" if a == 1 else f"ranks 0 to {a - 1}"
        on_b = f"rank {a}" if b == 1 else f"ranks {a} to {a + b - 1}"
        assert lines == [f"peers are split between the ranks (engine.concurrency): a on {on_a}, b on {on_b}"]


# -- whole runs


def finished(plain: dict[str, Any]) -> tuple[list[list[float]], dict[str, np.ndarray]]:
    """Losses of every step and the weights of both peers at the end."""
    folder = Path(plain["run"]["output_dir"])
    weights = {}
    for file in sorted((folder / "checkpoints" / f"step_{plain['run']['steps']:08d}").glob("peer_*.safetensors")):
        weights |= {f"{file.stem} {key}": value.double().numpy() for key, value in load_file(file).items()}
    return losses(plain), weights


def run(plain: dict[str, Any], world: int, name: str, **engine: Any) -> tuple[list[list[float]], dict[str, np.ndarray]]:
    changed = json.loads(json.dumps({**plain, "engine": {"precision": "fp32", **engine}}))
    changed["run"]["output_dir"] += f"-{name}"
    run_ranks(fit, world, changed)
    return finished(changed)


def assert_same_run(one, other) -> None:
    """The same but for the order of sums, whose roundings grow with every step."""
    np.testing.assert_allclose(one[0][:1], other[0][:1], rtol=2e-6)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-4)
    assert one[1].keys() == other[1].keys()
    for peer in "ab":
        ours, theirs = (
            np.concatenate([value.ravel() for key, value in found[1].items() if key.startswith(f"peer_{peer}")])
            for found in (one, other)
        )
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(ours), peer


def gentle(settings: dict[str, Any]) -> dict[str, Any]:
    """Roundings stay roundings: no kinks, and no Adam, which divides the smallest gradients by themselves."""
    for peer in settings["peers"]:
        peer.update(
            backbone="test_efficientnet", optimizer={"name": "sgd", "lr": 0.0005}, projector={"layers": 1, "out": 8}
        )
    settings["run"]["steps"] = 5
    settings["distill"] = {"weight": [1.0, 0.5]}
    return settings


@pytest.mark.slow
@pytest.mark.parametrize(("world", "sizes"), [(2, (1, 1)), (4, (2, 2)), (3, (1, 2))])
def test_a_split_run_is_the_serial_one(settings, world, sizes):
    gentle(settings)
    settings["data"]["batch_size"] = 12
    serial = run(settings, world, "serial", concurrency="serial")
    halves = run(settings, world, "split", concurrency="split", split=list(sizes))
    assert serial[0][0] != serial[0][-1], "it trained"
    assert_same_run(serial, halves)
    folders = [Path(f"{settings['run']['output_dir']}-{name}") for name in ("serial", "split")]
    wanted, found = (json.loads((folder / "summary.json").read_text())["peers"] for folder in folders)
    for peer in "ab":
        assert found[peer]["knn_after"] == pytest.approx(wanted[peer]["knn_after"], abs=0.05)
    stored = {file.name for file in (folders[1] / "checkpoints" / "step_00000005").glob("*optimizer*")}
    assert stored == {f"peer_{'ab'[r >= sizes[0]]}.optimizer.rank{r}.pt" for r in range(world)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_within_each_group(settings, stage):
    """Gradients clipped at a tenth of their norm: by both peers' together, losses of step 3 are off by a hundredth."""
    gentle(settings)
    settings["run"]["steps"] = 3
    for peer in settings["peers"]:
        peer["optimizer"]["lr"] = 1.0
    clipped = {"zero_stage": stage, "deepspeed": {"gradient_clipping": 0.05}}
    serial = run(settings, 2, "serial", **clipped)
    halves = run(settings, 4, "split", concurrency="split", split=[2, 2], **clipped)
    assert abs(np.diff(serial[0], axis=0)).min() > 0.01, "it trained"
    np.testing.assert_allclose(serial[0], halves[0], rtol=1e-4)


@pytest.mark.slow
def test_shared_views_and_temperatures_that_differ(settings):
    gentle(settings)
    settings["data"]["views"] = "shared"
    settings["peers"][1]["tau"] = 0.3
    assert_same_run(run(settings, 2, "serial"), run(settings, 2, "split", concurrency="split"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_split_run_goes_on_from_its_checkpoint_to_the_bit(settings, stage):
    """Also with sizes that were measured: the checkpoint's are taken."""
    gentle(settings)
    settings["run"].update(steps=6, save_every_steps=3)
    settings["data"]["batch_size"] = 12
    straight = run(settings, 3, "whole", concurrency="split", split=[2, 1], zero_stage=stage)
    half = Path(settings["run"]["output_dir"] + "-whole", "checkpoints", "step_00000003")
    settings["run"]["resume"] = str(half)
    resumed = run(settings, 3, "resumed", concurrency="split", zero_stage=stage)
    assert resumed[0] == straight[0][3:]
    for key, value in straight[1].items():
        np.testing.assert_array_equal(value, resumed[1][key], err_msg=key)


def error_of(plain: dict[str, Any]) -> str:
    try:
        fit(plain)
    except (ConfigError, CheckpointError, NonFiniteLoss) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.slow
def test_a_checkpoint_of_other_groups_is_refused(settings):
    gentle(settings)
    split(settings, 1, 1)
    run_ranks(fit, 2, settings)
    settings["engine"] = {"precision": "fp32"}
    settings["run"]["steps"] = 6
    for message in run_ranks(error_of, 2, settings):
        assert "made by ranks of which 1 and 1 train one peer each; in this run every one trains both" in message


class Poisoned(Trainer):
    """Peer b's weights become NaN before step 3."""

    def train(self, batch):
        if batch.step == 2:
            for engine in self.engines:
                if engine.name == "b":
                    next(engine.module.parameters()).data.fill_(float("nan"))
        return super().train(batch)


def poisoned(plain: dict[str, Any]) -> str:
    ranks = distributed.start()
    try:
        Poisoned(parse_config(plain), ranks).fit()
    except NonFiniteLoss as error:
        return str(error)
    finally:
        distributed.stop()
    return "nothing"


@pytest.mark.slow
def test_both_groups_stop_where_one_peer_is_not_finite(settings):
    split(settings, 1, 2)
    for message in run_ranks(poisoned, 3, settings):
        assert "the loss of step 3 is not finite" in message and "b: nan" in message


@pytest.mark.slow
def test_groups_are_measured_where_they_are_not_set(settings):
    """Peer b is the larger one; on three ranks it gets two."""
    settings["peers"][1]["backbone"] = "wrn-16-4"
    split(settings)
    found = run_ranks(placed, 3, settings)
    assert [sizes for sizes, _ in found] == [(1, 2)] * 3
    assert all("a on rank 0, b on ranks 1 to 2; measured: an image of the second costs" in line for _, line in found)
    settings["peers"][1]["backbone"] = "wrn-11-4"
    assert {message for _, message in run_ranks(placed, 2, settings)} == {
        "peers.1.backbone: 'wrn-11-4': DEPTH must be 6n + 4 (10, 16, 22, 28, ...), WIDTH at least 1"
    }


def placed(plain: dict[str, Any]) -> tuple[tuple[int, int] | None, str]:
    ranks = distributed.start()
    try:
        placement = place(parse_config(plain), ranks, 32)
        return placement.sizes, describe_placement(parse_config(plain), placement)[0]
    except ConfigError as error:
        return None, str(error)
    finally:
        distributed.stop()
