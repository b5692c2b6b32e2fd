"""Whole small runs with the DALI loader: the training of torchvision's, resumed to the bit, on several ranks."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from engine import distributed
from engine.checkpoint import CheckpointError
from engine.config import ConfigError, parse_config
from engine.data import dali_graph, dali_loader
from engine.data.dataset import DataError
from engine.trainer import Trainer
from kernels import native
from ranks import run_ranks
from runs import fit, losses, rows, straight_and_resumed

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

needs_core = pytest.mark.skipif(native.core is None, reason="the native core is not built")


@pytest.fixture
def dali(settings) -> dict[str, Any]:
    settings["data"].update(loader="dali", workers=1)
    return settings


@needs_core
@pytest.mark.slow
def test_it_trains_as_with_the_torchvision_loader(dali, tmp_path):
    histories = []
    for name in ("dali", "torchvision"):
        dali["data"]["loader"] = name
        dali["run"]["output_dir"] = str(tmp_path / name)
        run_ranks(fit, 1, dali)
        histories.append(losses(dali))
    # Views differ by less than a level of 255; four steps of small networks carry that on.
    np.testing.assert_allclose(*histories, rtol=2e-2)
    np.testing.assert_allclose(histories[0][0], histories[1][0], rtol=5e-3)


@pytest.mark.slow
def test_a_run_cut_in_an_epoch_resumes_to_the_bit(dali):
    outcomes = straight_and_resumed(dali)
    assert outcomes[0][0] == outcomes[1][0]
    for straight, resumed in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    epochs = [row["epoch"] for row in rows(dali)]
    assert epochs[-1] == pytest.approx(8 / 3)


@pytest.mark.slow
def test_two_ranks_train_as_one(dali, tmp_path):
    histories = []
    for world in (1, 2):
        dali["run"]["output_dir"] = str(tmp_path / f"world{world}")
        run_ranks(fit, world, dali)
        histories.append(losses(dali))
    np.testing.assert_allclose(histories[1], histories[0], rtol=2e-3)
    np.testing.assert_allclose(histories[1][0], histories[0][0], rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_after_a_file_went_bad(dali, image_folder, tmp_path):
    """Its place in the order stays, so that the epochs are the same."""
    root = tmp_path / "images"
    shutil.copytree(image_folder, root, ignore=shutil.ignore_patterns(".*"))
    dali["data"].update(root=str(root))
    dali["run"].update(steps=6, save_every_steps=2)
    run_ranks(fit, 1, dali)
    straight = losses(dali)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    for path in (root / "class0" / "000.png", root / "class1" / "001.png"):
        path.write_bytes(path.read_bytes()[:-400])
    (summary,) = run_ranks(fit, 1, dali)
    assert summary["steps"] == 6 and summary["skipped_images"] >= 1  # the other may turn up in the last evaluation
    resumed = losses(dali)
    assert resumed[:4] == straight[:4] and resumed[4:] != straight[4:]
    np.testing.assert_allclose(resumed, straight, rtol=0.1)


def with_own_copy(plain: dict[str, Any], roots: list[str]) -> str:
    ranks = distributed.start()
    try:
        Trainer(parse_config({**plain, "data": {**plain["data"], "root": roots[ranks.rank]}}), ranks)
    except DataError as error:
        return str(error)
    finally:
        distributed.stop()
    return ""


@pytest.mark.slow
def test_ranks_with_other_data_are_found_out(dali, image_folder, tmp_path):
    roots = [tmp_path / "one", tmp_path / "other"]
    for root in roots:
        shutil.copytree(image_folder, root, ignore=shutil.ignore_patterns(".*"))
    (roots[1] / "class0" / "000.png").write_bytes(b"cut")
    errors = run_ranks(with_own_copy, 2, dali, [str(root) for root in roots])
    assert errors[0] == errors[1]
    assert errors[0].startswith("data.root: rank 1 has other data than rank 0: folder, 47 images")


def resumed_with_other_views(plain: dict[str, Any]) -> str:
    dali_loader.dali_version = lambda: "0.1"
    ranks = distributed.start()
    try:
        Trainer(parse_config({**plain, "run": {**plain["run"], "steps": 6}}), ranks)
    except CheckpointError as error:
        return str(error)
    finally:
        distributed.stop()
    return ""


@pytest.mark.slow
def test_a_run_is_not_resumed_with_views_of_another_making(dali, tmp_path):
    dali["run"]["steps"] = 2
    run_ranks(fit, 1, dali)
    (error,) = run_ranks(resumed_with_other_views, 1, dali)
    assert f"its views are of another loader (dali {dali_loader.dali_version()}, " in error
    assert "there is dali 0.1, " in error


def test_a_missing_dali_is_found_out_before_anything_else(dali, alone, monkeypatch):
    monkeypatch.setattr(dali_graph.importlib.util, "find_spec", lambda name: None)
    dali["data"]["root"] = "/nowhere"
    with pytest.raises(ConfigError, match="dali is not installed"):
        Trainer(parse_config(dali), alone)
