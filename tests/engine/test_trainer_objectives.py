"""Whole small runs of every objective: on real images, over ranks and ZeRO stages, cut and resumed, with more peers and
with frozen ones.
"""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine import distributed
from engine.checkpoint import CheckpointError
from engine.config import ConfigError, parse_config
from engine.export import export_backbone
from engine.peers import build_backbone
from engine.trainer import Trainer
from ranks import run_ranks
from runs import command, fit, losses, rows, straight_and_resumed

ROOT = Path(__file__).parents[2]
HEAD = {"hidden": 64, "out": 32}


# Small, and with momenta for runs of some steps.
OBJECTIVES = {
    "simclr": {"objective": "simclr", "tau": 0.2},
    "simsiam": {"objective": {"name": "simsiam", "predictor": {"hidden": 16}}},
    "byol": {"objective": {"name": "byol", "predictor": {"hidden": 16}, "momentum": 0.99}},
    "mocov2": {"objective": {"name": "mocov2", "queue": 512, "momentum": 0.99}, "tau": 0.2},
    "barlow_twins": {"objective": "barlow_twins"},
    "vicreg": {"objective": "vicreg"},
}


def peer(name: str, objective: str, **own) -> dict[str, Any]:
    return copy.deepcopy({"name": name, "backbone": "wrn-10-1", "projector": HEAD, **OBJECTIVES[objective], **own})


# -- on real images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, Any]:
    """CIFAR-10 where the quickstart has fetched it; else crops of the photograph that comes with matplotlib."""
    if (ROOT / "data" / "cifar10").is_dir():
        return {"dataset": "cifar10", "root": str(ROOT / "data"), "loader": "resident"}
    root = tmp_path_factory.mktemp("photograph")
    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    rng = np.random.default_rng(0)
    with Image.open(file) as photo:
        for i in range(512):
            side = int(rng.integers(48, 200))
            x, y = (int(rng.integers(0, edge - side)) for edge in photo.size)
            photo.convert("RGB").crop((x, y, x + side, y + side)).resize((32, 32)).save(root / f"{i:03d}.png")
    return {"dataset": "folder", "root": str(root), "image_size": 32, "loader": "resident"}


# How far each loss falls from steps 8 to 12, when the queue holds no random keys any more, to the last five: about half
# of what was found on CIFAR-10.
FALLS = {"simclr": 0.08, "simsiam": 0.06, "byol": 0.4, "mocov2": 0.05, "barlow_twins": 1.5, "vicreg": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("simclr", "simsiam"), ("byol", "mocov2"), ("barlow_twins", "vicreg")], ids="+".join)
def test_every_objective_learns_on_real_images_without_collapse(real, tmp_path, pair):
    plain = {
        "run": {"output_dir": str(tmp_path / "run"), "steps": 45, "log_every_steps": 1},
        "data": {**real, "batch_size": 64},
        "peers": [peer(name, objective, optimizer={"lr": 1e-3}) for name, objective in zip("ab", pair, strict=True)],
        # To a peer of random weights all images are alike: at full weight from the start that would be learned from it.
        "distill": {"weight": 0.1, "ramp": {"steps": 45}},
        "eval": {"knn": None},
    }
    run_ranks(fit, 1, plain)
    history = rows(plain)
    for name, objective in zip("ab", pair, strict=True):
        term = "ntxent" if objective == "simclr" else objective
        values = [row[f"{term}/{name}"] for row in history]
        first, last = np.mean(values[8:13]), np.mean(values[-5:])
        print(objective, first, last, min(row[f"std/{name}"] for row in history), history[-1][f"rank/{name}"])
        assert all(np.isfinite(values))
        assert last < first - FALLS[objective], f"{objective}: {first} -> {last}"
        assert min(row[f"std/{name}"] for row in history) > 0.1, "embeddings stay spread: 0 is one point"
        assert history[-1][f"rank/{name}"] > 4


# -- over ranks, cut and resumed -----------------------------------------------------------------------------------

PAIRS = [("simsiam", "byol"), ("mocov2", "barlow_twins"), ("vicreg", "simclr")]
TERMS = {
    "weight": [0.5, 0.3], "divergence": "jeffreys", "symmetric": True, "ramp": {"steps": 3, "start": 0.2},
    "graph": {"projection": 6},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_ranks_train_as_one(settings, tmp_path, pair):
    settings["peers"] = [peer(name, objective) for name, objective in zip("ab", pair, strict=True)]
    settings["distill"] = TERMS
    histories = []
    for world in (1, 2):
        settings["run"]["output_dir"] = str(tmp_path / f"world{world}")
        run_ranks(fit, world, settings)
        histories.append(losses(settings))
    np.testing.assert_allclose(histories[1][0], histories[0][0], rtol=1e-4)
    # Adam divides the smallest gradients by themselves, so that roundings grow.
    np.testing.assert_allclose(histories[1], histories[0], rtol=3e-2)


@pytest.mark.slow
def test_weights_rise_and_momenta_move_in_a_run(settings):
    """The loss of every step is what its terms and the share of their weights make it."""
    settings["peers"] = [peer("a", "byol"), peer("b", "mocov2")]
    settings["distill"] = {**TERMS, "ramp": {"steps": 3, "start": 0.25}}
    run_ranks(fit, 1, settings)
    found = rows(settings)
    assert [row["distill_share"] for row in found] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    for row, share in zip(found, (0.25, 0.5, 0.75, 1.0), strict=True):
        for name, term, weight in (("a", "byol", 0.5), ("b", "mocov2", 0.3)):
            learned = weight * row[f"jeffreys/{name}"] + row[f"graph/{name}"]
            assert row[f"loss/{name}"] == pytest.approx(row[f"{term}/{name}"] + share * learned, rel=1e-5)
    cosine = [1 - 0.01 * (np.cos(np.pi * step / 4) + 1) / 2 for step in range(4)]
    assert [row["momentum/a"] for row in found] == pytest.approx(cosine)
    assert [row["momentum/b"] for row in found] == [0.99] * 4


@pytest.mark.slow
def test_the_momentum_of_a_step_moves_the_network_in_it(settings):
    """m = 0: behind every step the momentum network is the peer."""
    settings["peers"] = [peer("a", "byol"), peer("b", "simclr")]
    settings["peers"][0]["objective"].update(momentum=0.0, momentum_schedule="constant")
    run_ranks(fit, 1, settings)
    weights = load_file(Path(settings["run"]["output_dir"], "checkpoints/step_00000004/peer_a.safetensors"))
    followed = [key for key in weights if key.startswith("target.0.") and "running" not in key and "num_b" not in key]
    assert followed
    for key in followed:
        torch.testing.assert_close(weights[key], weights[key.replace("target.0.", "encoder.")], rtol=0, atol=1e-7)


@pytest.mark.slow
def test_momentum_and_queue_resume_to_the_bit(settings):
    settings["peers"] = [peer("a", "byol"), peer("b", "mocov2")]
    settings["peers"][1]["objective"]["queue"] = 50  # of 40 a step: it wraps
    outcomes = straight_and_resumed(settings)
    assert outcomes[0][0] == outcomes[1][0]
    for straight, resumed in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    a, b = outcomes[0][1]
    assert any(key.startswith("target.") for key in a)
    assert b["queue.position"] == 8 * 40 % 50


# -- more peers, and frozen ones -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_peers(settings):
    settings["peers"] = [peer("a", "simclr"), peer("b", "byol"), peer("c", "vicreg", backbone="wrn-10-2")]
    settings["distill"] = {"weight": [1.0, 0.5, 2.0], "rows": "all", "partition": True}
    (summary,) = run_ranks(fit, 1, settings)
    assert set(summary["peers"]) == {"a", "b", "c"}
    for row in rows(settings):
        for name, term, weight in (("a", "ntxent", 1.0), ("b", "byol", 0.5), ("c", "vicreg", 2.0)):
            assert row[f"loss/{name}"] == pytest.approx(row[f"{term}/{name}"] + weight * row[f"kl/{name}"], rel=1e-5)
            assert 0 <= row[f"distilled/{name}"] <= 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A backbone whose BatchNorms have seen images, as a plain state dict."""
    torch.manual_seed(0)
    module, _ = build_backbone("wrn-10-2", image_size=32)
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(8, 3, 32, 32) * 2 + 0.5)
    file = tmp_path_factory.mktemp("teacher") / "backbone.safetensors"
    save_file(module.state_dict(), file)
    return file


def frozen(file: Path, **own) -> dict[str, Any]:
    return {"name": "t", "backbone": "wrn-10-2", "frozen": {"weights": str(file), **own}}


@pytest.mark.slow
@pytest.mark.parametrize("views", ["augmented", "plain"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_frozen_teacher(settings, teacher, tmp_path, views, first):
    """It teaches, does not move, is in no checkpoint, and the student's own objective sees what it would alone."""
    student = peer("a", "simclr", optimizer={"lr": 1e-3})
    settings["run"]["steps"] = 2
    both = [frozen(teacher, views=views), student]
    settings["peers"] = both if first else both[::-1]
    settings["distill"] = {"weight": 0.5, "tau": 0.3}
    (summary,) = run_ranks(fit, 1, settings)
    found = rows(settings)
    folder = Path(settings["run"]["output_dir"])
    assert {file.name for file in (folder / "checkpoints/step_00000002").iterdir()} == {
        "meta.json", "peer_a.safetensors", "peer_a.optimizer.rank0.pt", "rng.rank0.pt",
    }  # fmt: skip
    assert all("loss/t" not in row and "lr/t" not in row for row in found)
    assert all(row["loss/a"] == pytest.approx(row["ntxent/a"] + 0.5 * row["kl/a"], rel=1e-5) for row in found)
    assert summary["peers"]["t"]["knn_before"] == summary["peers"]["t"]["knn_after"] > 0
    settings["peers"], settings["distill"] = [student], None
    settings["run"]["output_dir"] = str(tmp_path / "alone")
    run_ranks(fit, 1, settings)
    alone = rows(settings)
    if views == "plain" or not first:  # the same views of the same images: the student's own
        assert found[0]["ntxent/a"] == pytest.approx(alone[0]["ntxent/a"], rel=1e-6)
    assert found[1]["ntxent/a"] != alone[1]["ntxent/a"], "it has learned from the teacher"


@pytest.mark.slow
@pytest.mark.parametrize("views", ["augmented", "plain"])
def test_a_frozen_teacher_on_two_ranks(settings, teacher, tmp_path, views):
    settings["peers"] = [peer("a", "simclr"), frozen(teacher, views=views)]
    settings["distill"] = {"divergence": "js", "graph": {"projection": 128}}
    histories = []
    for world in (1, 2):
        settings["run"]["output_dir"] = str(tmp_path / f"world{world}")
        run_ranks(fit, world, settings)
        histories.append([[row["loss/a"], row["js/a"], row["graph/a"]] for row in rows(settings)])
    np.testing.assert_allclose(histories[1][0], histories[0][0], rtol=1e-4)
    np.testing.assert_allclose(*histories, rtol=3e-2)


@pytest.mark.slow
def test_an_exported_backbone_teaches_the_next_run(settings, tmp_path):
    """The whole way: train, export, distil offline; and its image statistics travel in the file."""
    run_ranks(fit, 1, settings)
    file, _ = export_backbone(Path(settings["run"]["output_dir"]), "b", "dogo")
    settings["run"]["output_dir"] = str(tmp_path / "second")
    settings["peers"] = [peer("a", "simclr"), frozen(file)]
    config_file = tmp_path / "run.yaml"
    config_file.write_text(json.dumps(settings))
    printed = run_ranks(command, 1, config_file)[0]
    assert "peer t is frozen: wrn-10-2, 128 features of augmented views" in printed
    assert "peer t (wrn-10-2): kNN" in printed


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_with_the_same_weights_alone(settings, teacher, tmp_path):
    file = tmp_path / "own.safetensors"
    weights = load_file(teacher)
    save_file(weights, file)
    settings["peers"] = [peer("a", "byol"), frozen(file, views="plain")]
    settings["peers"][0]["objective"]["momentum_schedule"] = "constant"  # which lets a run become longer
    run_ranks(fit, 1, settings)
    settings["run"]["steps"] = 6
    found = run_ranks(fit, 1, settings)[0]
    assert found["steps"] == 6
    settings["run"]["steps"] = 8
    save_file({**weights, "conv1.weight": weights["conv1.weight"] * 1.01}, file)
    message = run_ranks(refused, 1, settings)[0]
    assert re.search(
        r"step_00000006: made with other weights of the frozen t \(peers.*frozen.weights\); restore", message
    )


def test_a_teachers_knn_is_read_for_it_and_once():
    """Of images as the backbone has them, not as the run has; its features do not change."""
    seen = []
    knn = SimpleNamespace(reader="of the run", accuracy=lambda features, reader: seen.append((features, reader)) or 0.5)
    trainer = SimpleNamespace(knn=knn, taught={})
    teacher = SimpleNamespace(name="t", features="its features", reader=lambda reader: ("as it has them", reader))
    assert [Trainer._knn_of(trainer, teacher) for _ in range(2)] == [0.5, 0.5]
    assert seen == [("its features", ("as it has them", "of the run"))]


def refused(plain: dict[str, Any]) -> str:
    ranks = distributed.start()
    try:
        Trainer(parse_config(plain), ranks)
    except (ConfigError, CheckpointError) as error:
        return str(error)
    finally:
        distributed.stop()
    return "nothing"


def test_teachers_that_do_not_fit_are_refused(settings, teacher, tmp_path):
    cases = [
        (
            {"frozen": {"weights": str(tmp_path / "no")}},
            "peers.1.frozen.weights: .*no is no file",
        ),
        ({"backbone": "wrn-10-1"}, "peers.1.frozen.weights: .* does not fit backbone wrn-10-1 at 32 px"),
        ({"distill": {"graph": {}}}, "distill.graph.projection: .* frozen t are 128 wide, .* 32; give projection=128"),
        (
            {"backbone": "wrn-10-2", "frozen": {"weights": "timm"}},
            "peers.1.frozen.weights: timm has no weights",
        ),
    ]
    for change, message in cases:
        own = dict(change)
        distill = own.pop("distill", {})
        plain = {**settings, "peers": [peer("a", "simclr"), {**frozen(teacher), **own}], "distill": distill}
        found = refused(plain)
        assert re.search(message, found), found


# -- captured ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("pair", [("simsiam", "byol"), ("mocov2", "barlow_twins"), ("vicreg", "simclr")], ids="+".join)
@pytest.mark.parametrize("views", ["augmented", "plain"])
def test_a_captured_run_is_the_run_without(settings, teacher, tmp_path, pair, views):
    """Momenta, queues, ramps and the features of a teacher change from replay to replay."""
    settings["run"]["steps"] = 12
    settings["data"]["loader"] = "resident"
    settings["peers"] = [peer(name, objective) for name, objective in zip("ab", pair, strict=True)]
    settings["peers"].append(frozen(teacher, views=views))
    settings["distill"] = {**TERMS, "graph": {"projection": 128}, "divergence": "js", "ramp": {"steps": 8}}
    outcomes = []
    for capture in (False, True):
        settings["run"]["output_dir"] = str(tmp_path / f"capture{capture}")
        settings["engine"] = {"precision": "fp32", "capture": capture}
        fit(settings)
        folder = tmp_path / f"capture{capture}" / "checkpoints" / "step_00000012"
        outcomes.append((losses(settings), [load_file(folder / f"peer_{name}.safetensors") for name in "ab"]))
    assert outcomes[0][0] == outcomes[1][0]
    for plain, captured in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert all(torch.equal(plain[key], captured[key]) for key in plain)
