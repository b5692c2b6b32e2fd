"""FLOPs of a step, counted by hand where that can be done, and peaks that are known or not told."""

import pytest

from bench import flops
from engine.peer_config import PeerConfig


def peer(backbone: str, **more) -> dict:
    return PeerConfig(name="a", backbone=backbone, **more).model_dump(mode="json")


def by_hand(side: int) -> int:
    """Of WRN-10-1 with a head 64-6-5, a view: multiply-adds of each layer, twice that forward, three times backward
    but for the first layer, whose input needs no gradient."""
    first = side**2 * 16 * 3 * 9
    stages = side**2 * 2 * 16 * 16 * 9
    for narrow, wide, step in ((16, 32, 2), (32, 64, 4)):
        stages += (side // step) ** 2 * (narrow * wide * 9 + wide * wide * 9 + narrow * wide)
    return 2 * (2 * first + 3 * (stages + 64 * 6 + 6 * 5))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("bn", ["joint", "per_view"])
def test_a_small_network_by_hand(side, bn):
    small = peer("wrn-10-1", bn=bn, projector={"hidden": 6, "out": 5})
    assert flops.flops_per_image([small], size=side) == 2 * by_hand(side)  # two views
    assert flops.flops_per_image([small, small], size=side) == 4 * by_hand(side)


def test_resnet50_is_as_large_as_published():
    """He et al. 2016: 3.8e9 multiply-adds forward; timm's strides (v1.5) make it 4.1e9."""
    a_view = flops.flops_per_image([peer("resnet50")], size=224) / 2
    assert a_view / (2 * 3) == pytest.approx(4.1e9, rel=0.03)


def test_peaks():
    assert flops.peak_flops("NVIDIA H200", "bf16") == 989e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    for unknown in ("NVIDIA H200 NVL", "NVIDIA H100 PCIe", "2 cores (AMD EPYC)", "NVIDIA GeForce RTX 4090"):
        assert flops.peak_flops(unknown, "bf16") is None
    assert flops.peak_flops("NVIDIA H200", "fp32") is None
