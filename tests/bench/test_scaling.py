"""`python -m bench scaling`: the model against figures by hand, rows found, where bottlenecks set in."""

import json
from dataclasses import asdict

import pytest

from bench import scaling
from bench.providers import BACKWARD
from bench.rows import Stats, environment, make_row
from bench.scaling import Cluster, Link, Peer, Step, both, measured_step, peers_of, sets_in, split

SLOW = Link(1e9, 1e-3)  # a byte in a nanosecond, a hop in a millisecond
CLUSTER = Cluster(node=2, inside=Link(4e9, 0.0), between=SLOW)
STEP = Step(
    size=32, images=12, data=4.0, forward=20.0, networks=60.0, losses=2.0, optimizer=9.0, other=1.0, pair=0.01
)  # fmt: skip
PEERS = [Peer(share=0.25, parameters=1_000_000, norms=3, width=100), Peer(0.75, 2_000_000, 5, 100)]


def test_one_gpu_is_the_step_that_was_measured():
    parts = both(STEP, PEERS, CLUSTER, 1)
    assert sum(parts.values()) == pytest.approx(4 + 60 + 2 + 9 + 1)
    assert all(parts[part] == 0 for part in scaling.TRAVEL)


def test_every_gpu_both_peers():
    """Four GPUs on two nodes: messages take two hops, 2 ms."""
    parts = both(STEP, PEERS, CLUSTER, 4)
    assert parts["networks"] == 60 and parts["data"] == 4 and parts["optimizer"] == 9
    assert parts["losses"] == pytest.approx(2 + 0.01 * 576 * 3), "rows of one GPU against columns of four"
    assert parts["BatchNorm"] == pytest.approx(8 * 6 * 2.0)
    # 12 MB once over in each of two phases, three quarters of it from others: 9 ms and 2 of hops each.
    assert parts["gradients"] == pytest.approx(2 * (9 + 2))
    # 48 images x 2 views x 100 x 2 bytes = 19.2 kB: 0.0144 ms; the first peer's hide behind 15 ms of forward.
    assert parts["embeddings"] == pytest.approx(2.0144)


def test_inside_of_a_node_its_links_count():
    parts = both(STEP, PEERS, CLUSTER, 2)
    assert parts["BatchNorm"] == 0 and parts["gradients"] == pytest.approx(2 * 1e3 * 12e6 / 2 / 4e9)


def test_split_by_cost():
    """One of four GPUs for a quarter of the work: each trains what one GPU does alone."""
    parts = split(STEP._replace(pair=0.001), PEERS, CLUSTER, 4)
    # The second peer's three GPUs: 2,000,000 parameters over log2 3 hops.
    assert parts["networks"] == pytest.approx(60 * 0.75 * 4 / 3)
    assert parts["data"] == pytest.approx(4 * (4 / 3) / 2)
    assert parts["losses"] == pytest.approx(2 + 0.001 * 576 * (4 / 3 * 4 - 1))
    assert parts["optimizer"] == pytest.approx(6)
    assert parts["gradients"] == pytest.approx(2 * (1.584963 + 8 * 2 / 3), rel=1e-5)
    assert parts["BatchNorm"] == pytest.approx(5 * 6 * 1.584963, rel=1e-5)
    # 16 images x 2 views x 100 x 2 bytes cross over, 38.4 kB of both peers are gathered, two thirds from others.
    assert parts["embeddings"] == pytest.approx(1 + 0.0064 + 1.584963 + 0.0256, rel=1e-5)


def test_split_takes_the_sizes_that_the_engine_would():
    eight = split(STEP._replace(images=16), PEERS, CLUSTER, 8)
    assert eight["networks"] == pytest.approx(60 * 0.75 * 2), "2 and 6 would fit, and 6 does not divide 128 images"


def test_split_is_the_slower_group():
    halves = split(STEP, PEERS, CLUSTER, 2)
    assert halves["networks"] == pytest.approx(60 * 0.75 * 2), "the larger peer, alone on one of two"


def test_where_bottlenecks_set_in():
    quiet = {"losses": 1.0, "BatchNorm": 0.0, "gradients": 9.0, "embeddings": 0.0, "networks": 90.0}
    busy = {"losses": 30.0, "BatchNorm": 0.0, "gradients": 15.0, "embeddings": 0.0, "networks": 90.0}
    assert sets_in({1: quiet, 2: busy, 4: busy}) == {"losses": 2, "gradients": 2}


def test_networks_by_name():
    """Counted by hand: ResNet-18 with a small stem and a 512-512-128 head; 20 BatchNorm layers and the head's."""
    small, same = peers_of("resnet18+resnet18", 32, 128)
    assert small == same and small.share == 0.5
    assert small.norms == 20 + 1
    assert small.parameters == 11_168_832 + 512 * 512 + 2 * 512 + 512 * 128 + 128
    narrow, wide = peers_of("wrn-10-1+wrn-16-2", 32, 128)
    assert narrow.share + wide.share == pytest.approx(1) and wide.share > 3 * narrow.share


# -- rows


def rows(pair="a+b", batch=16, scale=1.0, commit="one"):
    env = environment(["step"])
    env = type(env)(**{**asdict(env), "device": env.device, "commit": commit})
    case = {"pair": pair, "batch": batch, "size": 32, "views": 4, "precision": "fp32", "data": "real", "ranks": 1}
    parts = {"data": 1, "forward": 20, "loss": 3, "backward": 40, "optimizer": 5, "other": 2, "communication": 0}
    return [
        make_row(env, "step", {**case, "part": part}, "engine", "ms", Stats(ms, ms * scale, ms, 3), None)
        for part, ms in parts.items()
    ]


def test_the_newest_step_with_parts():
    found = measured_step([*rows(), *rows(scale=2.0, commit="two")], 0.5, pair="a+b", batch=None, provider="engine")
    assert found == Step(32, 16, 2.0, 40.0, 120.0, 6.0, 10.0, 4.0, 0.5)
    with pytest.raises(ValueError, match="no parts of a step of engine with a"):
        measured_step(rows(), 0.5, pair="a+c", batch=None, provider="engine")
    with pytest.raises(ValueError, match="no parts of a step of engine"):
        measured_step(rows(), 0.5, pair="a+b", batch=32, provider="engine")


def test_the_largest_losses_count():
    env = environment(["loss"])

    def row(M: int, ms: float, mode: str = BACKWARD, D: int = 128):
        return make_row(env, "loss", {"M": M, "D": D, "mode": mode}, "native", "ms", Stats(ms, ms, ms, 3), None)

    found = [row(100, 9.0), row(1000, 20.0), row(2000, 1.0, mode="forward"), row(2000, 1.0, D=64)]
    assert scaling.milliseconds_of_a_pair(found, "native") == pytest.approx(20 / 1e6)
    with pytest.raises(ValueError, match="no losses of triton were measured"):
        scaling.milliseconds_of_a_pair(found, "triton")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path / "bench" / "results")
    folder = tmp_path / "bench" / "results" / "cpu"
    folder.mkdir(parents=True)
    argv = ["--device", "cpu", "--pair", "wrn-10-1+wrn-16-2"]
    with pytest.raises(SystemExit):
        scaling.main(argv)
    assert "argument --device: bench/results/cpu/loss.jsonl is not there" in capsys.readouterr().err
    env = environment(["loss"])
    loss = make_row(
        env, "loss", {"M": 64, "D": 128, "mode": BACKWARD}, "native", "ms", Stats(1.0, 1.0, 1.0, 3), None
    )  # fmt: skip
    (folder / "loss.jsonl").write_text(json.dumps(asdict(loss)) + "\n")
    (folder / "step.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows("wrn-10-1+wrn-16-2")))
    assert scaling.main(argv) == 0
    printed = capsys.readouterr().out
    assert "A prediction for wrn-10-1+wrn-16-2, 16 images a GPU" in printed
    for placement in (scaling.BOTH, scaling.SPLIT):
        assert f"{placement}: losses: 10% of a step from" in printed
    assert "│ 1024 │" in printed and "100%" in printed
