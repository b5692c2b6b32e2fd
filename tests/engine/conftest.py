"""What several tests of the engine use."""

import pytest
import torch

from engine import distributed


@pytest.fixture(scope="module")
def gpu():
    """This process's GPU, with convolutions that give the same sums every time."""
    torch.backends.cudnn.deterministic = True
    yield distributed.start()
    distributed.stop()
    torch.backends.cudnn.deterministic = False
