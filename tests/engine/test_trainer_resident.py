"""Whole small runs with the resident loader: the training of torchvision's, and resumed to the bit."""

from typing import Any

import numpy as np
import pytest
import torch

from engine import distributed
from engine.checkpoint import CheckpointError
from engine.config import ConfigError, parse_config
from engine.trainer import Trainer
from ranks import run_ranks
from runs import fit, losses, straight_and_resumed


def refused(plain: dict[str, Any]) -> str:
    ranks = distributed.start()
    try:
        Trainer(parse_config(plain), ranks)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    finally:
        distributed.stop()
    return "nothing"


@pytest.fixture
def resident(settings) -> dict[str, Any]:
    settings["data"]["loader"] = "resident"
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_it_trains_as_with_the_torchvision_loader(resident, tmp_path, world):
    histories = []
    for name in ("resident", "torchvision"):
        resident["data"]["loader"] = name
        resident["run"]["output_dir"] = str(tmp_path / name)
        run_ranks(fit, world, resident)
        histories.append(losses(resident))
    # The same bytes, normalised with one rounding less; steps of Adam on small gradients carry that on.
    np.testing.assert_allclose(histories[0][0], histories[1][0], rtol=1e-5)
    np.testing.assert_allclose(*histories, rtol=1e-2)


@pytest.mark.slow
def test_a_run_cut_in_an_epoch_resumes_to_the_bit(resident):
    outcomes = straight_and_resumed(resident)
    assert outcomes[0][0] == outcomes[1][0]
    for straight, resumed in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    resident["data"]["loader"] = "torchvision"
    assert "holds another run, which differs in data.loader" in run_ranks(refused, 1, resident)[0]
