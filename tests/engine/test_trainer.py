"""The loop over whole small runs: what it writes, that it learns, that ranks and views are as configured."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import engine.trainer as trainer_module
from engine import checkpoint, distributed
from engine.config import parse_config
from engine.trainer import NonFiniteLoss, Trainer
from ranks import run_ranks
from runs import command, fit, losses


def rows(plain: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in open(f"{plain['run']['output_dir']}/metrics.jsonl")]


@pytest.mark.slow
def test_a_run_leaves_what_the_design_says(settings, tmp_path):
    settings["run"]["save_every_steps"] = 2
    settings["eval"]["knn"]["every_steps"] = 2
    (summary,) = run_ranks(fit, 1, settings)
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "losses.png", "embeddings.png", "knn.png",
        "summary.json",
    }  # fmt: skip
    assert summary == json.loads((folder / "summary.json").read_text())
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    by_step = {step: {} for step in range(5)}
    for row in rows(settings):
        by_step[row["step"]].update(row)
    for step in range(1, 5):
        row = by_step[step]
        for peer in "ab":
            assert row[f"loss/{peer}"] == pytest.approx(row[f"ntxent/{peer}"] + 0.39 * row[f"kl/{peer}"], rel=1e-6)
            assert 0 < row[f"std/{peer}"] < 1.5
            assert 1 <= row[f"rank/{peer}"] <= 8
        assert row["images_per_s"] > 0
        assert row["epoch"] == pytest.approx(step / 3)
    assert [step for step in by_step if "knn/a" in by_step[step]] == [0, 2, 4]
    assert summary["peers"]["a"] == {
        "backbone": "wrn-10-1",
        "knn_before": by_step[0]["knn/a"],
        "knn_after": by_step[4]["knn/a"],
    }
    last = json.loads((folder / "checkpoints" / "step_00000004" / "meta.json").read_text())["progress"]
    again = run_ranks(fit, 1, settings)[0]
    # The clock goes on from the checkpoint's, which stood before the first run drew its plots.
    assert again["seconds"] > round(last["seconds"], 1)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}, "a finished run resumes at its end"


@pytest.mark.slow
def test_training_lowers_the_loss_without_collapse(settings):
    settings["run"]["steps"] = 60
    settings["data"]["augment"] = {"crop_scale": [0.5, 1.0], "jitter": 0.0}
    for peer in settings["peers"]:
        peer["tau"] = 0.2
    run_ranks(fit, 1, settings)
    history = [row for row in rows(settings) if "loss/a" in row]
    for peer in "ab":
        losses = [row[f"ntxent/{peer}"] for row in history]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
        assert history[-1][f"std/{peer}"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("views", ["per_peer", "shared"])
def test_two_ranks_train_as_one(settings, tmp_path, views):
    settings["data"]["views"] = views
    for world in (1, 2):
        settings["run"]["output_dir"] = str(tmp_path / f"world{world}")
        run_ranks(fit, world, settings)
    histories = []
    for world in (1, 2):
        settings["run"]["output_dir"] = str(tmp_path / f"world{world}")
        histories.append([[row["loss/a"], row["loss/b"]] for row in rows(settings) if "loss/a" in row])
    np.testing.assert_allclose(histories[1], histories[0], rtol=2e-3)
    np.testing.assert_allclose(histories[1][0], histories[0][0], rtol=1e-5)


def fit_without_sync_bn(plain: dict[str, Any]) -> list[dict[str, list]]:
    """This rank's own running means just before they are averaged for saving, and what was saved."""
    ranks = distributed.start()
    trainer = Trainer(parse_config({**plain, "engine": {"sync_bn": False}}), ranks)
    own: list[list] = []
    average = checkpoint.average_buffers

    def watched(module, group):
        own.append(module.encoder.bn.running_mean.tolist())
        average(module, group)

    checkpoint.average_buffers = watched
    trainer_module.average_buffers = lambda module, group: None  # the evaluation's own would come first
    trainer.fit()
    distributed.stop()
    return own


@pytest.mark.slow
def test_buffers_of_ranks_that_do_not_share_batchnorm_are_averaged_before_saving(settings, tmp_path):
    every = run_ranks(fit_without_sync_bn, 2, settings)
    for i, peer in enumerate("ab"):
        one, other = (np.array(own[i]) for own in every)
        assert np.abs(one - other).max() > 1e-4, "the ranks saw other images"
        saved = load_file(tmp_path / "run/checkpoints/step_00000004" / f"peer_{peer}.safetensors")
        np.testing.assert_allclose(saved["encoder.bn.running_mean"], (one + other) / 2, rtol=1e-5, atol=1e-7)


def evaluate_without_sync_bn(plain: dict[str, Any]) -> list[float]:
    """The running mean of peer a in the last evaluation's first forward pass, on this rank."""
    ranks = distributed.start()
    trainer = Trainer(parse_config({**plain, "engine": {"sync_bn": False}}), ranks)
    seen: list[list[float]] = []
    accuracy = trainer.knn.accuracy

    def watched(features):
        seen.append(trainer.engines[0].module.encoder.bn.running_mean.tolist())
        return accuracy(features)

    trainer.knn.accuracy = watched
    trainer.fit()
    distributed.stop()
    return seen[-2]


@pytest.mark.slow
def test_buffers_are_equal_on_all_ranks_when_evaluated(settings):
    one, other = run_ranks(evaluate_without_sync_bn, 2, settings)
    assert one == other


@pytest.mark.slow
def test_the_learning_rate_follows_its_schedule(settings):
    settings["run"]["steps"] = 6
    settings["peers"][0]["optimizer"] = {"lr": 1e-2, "schedule": "cosine", "warmup_epochs": 1}
    settings["engine"] = {"zero_stage": 1}
    run_ranks(fit, 1, settings)
    rates = [(row["lr/a"], row["lr/b"]) for row in rows(settings) if "lr/a" in row]
    # 3 steps an epoch: warm-up, then half a cosine over the other three
    expected = [1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 7.5e-3, 2.5e-3]
    np.testing.assert_allclose(rates, [(rate, 1e-3) for rate in expected], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("lamb", "sgd"), ("lars", "adamw")])
def test_a_resumed_run_has_the_rates_and_weights_of_an_uninterrupted_one(settings, tmp_path, names):
    """By named optimizers, scaled rates and schedules with a warm-up; the configuration keeps the rule."""
    settings["run"].update(steps=6, save_every_steps=2, keep_checkpoints=3)
    settings["peers"][0]["optimizer"] = {
        "name": names[0], "lr": 0.16, "lr_scaling": "linear", "warmup_epochs": 2 / 3,
        "schedule": "step", "milestones": [1], "gamma": 0.5,
    }  # fmt: skip
    settings["peers"][1]["optimizer"] = {"name": names[1], "lr": 0.0025, "lr_scaling": "sqrt", "schedule": "cosine"}
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(settings))
    second, last = (folder / "checkpoints" / f"step_{step:08d}" for step in (2, 6))
    outcomes, second_written = [], set()
    for _ in range(2):
        (printed,) = run_ranks(command, 1, file)
        assert printed.splitlines()[:2] == [
            "peer a: learning rate 0.01 = 0.16 x 16 / 256 (peers.0.optimizer.lr_scaling=linear, data.batch_size=16)",
            "peer b: learning rate 0.01 = 0.0025 x sqrt(16) (peers.1.optimizer.lr_scaling=sqrt, data.batch_size=16)",
        ]
        second_written.add((second / "meta.json").stat().st_mtime_ns)
        found = [(row["lr/a"], row["lr/b"]) for row in rows(settings) if "lr/a" in row]
        outcomes.append((found, [load_file(last / f"peer_{peer}.safetensors") for peer in "ab"]))
        # What a run leaves that was cut after its second step.
        for step in (4, 6):
            shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    assert len(second_written) == 1, "the second run went on from there"
    # 16 images a batch and 3 steps an epoch: 0.16 x 16 / 256, 0.0025 x sqrt(16)
    expected_a = [0.005, 0.01, 0.01, 0.005, 0.005, 0.005]
    expected_b = [0.01 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    np.testing.assert_allclose(outcomes[0][0], list(zip(expected_a, expected_b, strict=True)), rtol=1e-9)
    assert outcomes[1][0] == outcomes[0][0]
    for straight, resumed in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    saved = yaml.safe_load((folder / "config.yaml").read_text())["peers"][0]["optimizer"]
    assert (saved["lr"], saved["lr_scaling"]) == (0.16, "linear")


@pytest.mark.slow
def test_one_peer_trains_alone_and_epochs_count_steps(settings):
    settings["peers"] = settings["peers"][:1]
    settings["run"].update(steps=None, epochs=2)
    summary = run_ranks(fit, 1, settings)[0]
    assert summary["steps"] == 6
    assert list(summary["peers"]) == ["a"]
    assert not any("kl" in key for row in rows(settings) for key in row)


def stop(plain: dict[str, Any]) -> tuple[str, list[bool]]:
    """The error of a run that diverges, and whether the weights it left are finite."""
    ranks = distributed.start()
    trainer = Trainer(parse_config(plain), ranks)
    try:
        trainer.fit()
    except NonFiniteLoss as error:
        parameters = [p for engine in trainer.engines for p in engine.module.parameters()]
        return str(error), [bool(p.isfinite().all()) for p in parameters]
    finally:
        distributed.stop()
    return "", []


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 2)])
def test_a_non_finite_loss_stops_every_rank_before_the_optimizer(settings, tmp_path, world, stage):
    settings["engine"] = {"zero_stage": stage}
    # the second step of peer a overflows; peer b is sound, and its weights must not move either
    settings["peers"][0]["optimizer"] = {"name": "sgd", "lr": 1e30, "momentum": 0.0}
    settings["run"]["steps"] = 20
    every = run_ranks(stop, world, settings)
    for error, finite in every:
        assert "is not finite (a: " in error
        assert all(finite), "the optimizer saw it"
    assert len({error for error, _ in every}) == 1
    (folder,) = (tmp_path / "run" / "non_finite").iterdir()
    step = int(folder.name.removeprefix("step_"))
    batch = torch.load(folder / "batch.rank0.pt", weights_only=True)
    assert len(batch["views"]) == 4
    assert batch["views"][0].shape == (16 // world, 3, 32, 32)
    # the replay: the same step fails again, from the saved state
    settings["run"].update(resume=str(folder), output_dir=str(tmp_path / "replay"))
    replayed = run_ranks(stop, world, settings)[0][0]
    assert f"the loss of step {step + 1} is not finite" in replayed


def in_slices(plain: dict[str, Any]) -> list[Any]:
    """Summaries of a run that stops at every step that logs, until it is through."""
    ranks = distributed.start()
    found: list[Any] = []
    try:
        while len(found) < 20 and (not found or found[-1] is None):
            found.append(Trainer(parse_config(plain), ranks).fit())
    finally:
        distributed.stop()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_in_slices_is_the_run(settings, tmp_path, world):
    settings["run"].update(steps=5, log_every_steps=2)
    run_ranks(fit, world, settings)
    whole = losses(settings)
    sliced = {**settings, "run": {**settings["run"], "output_dir": str(tmp_path / "slices"), "max_seconds": 1e-6}}
    for found in run_ranks(in_slices, world, sliced):
        assert found[:2] == [None, None] and found[2]["steps"] == 5 and len(found) == 3, (
            "at steps 2 and 4, then the end"
        )
    assert losses(sliced) == whole
    last = "checkpoints/step_00000005/peer_a.safetensors"
    one, other = (load_file(Path(plain["run"]["output_dir"], last)) for plain in (settings, sliced))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_run_without_knn(settings, tmp_path, capsys):
    settings["eval"] = {"knn": None}
    summary = run_ranks(fit, 1, settings)[0]
    assert summary["peers"]["a"] == {"backbone": "wrn-10-1", "knn_before": None, "knn_after": None}
    rows = Path(settings["run"]["output_dir"], "metrics.jsonl").read_text()
    assert "knn" not in rows and "loss/a" in rows
