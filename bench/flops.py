"""FLOPs of a training step and peak rates of GPUs: what share of its arithmetic a step makes use of.

Counted are convolutions and matrix products of both networks, forward and backward, a multiply-add as two.  Left out
are the losses, whose matrices grow with the batch, the optimizers, normalisations and views: of what the networks do it
is little, and a rate by this count says how fast the networks are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.reference_networks import build_peer

COUNTED = 2  # images: the fewest that BatchNorm takes

# Dense bf16 FLOP/s by the name that torch gives the device, from NVIDIA's data sheets.  A name stands for one power
# limit: H100 PCIe and H200 NVL have other rates, and what is not here has none.
PEAK_BF16 = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device reaches at most; None where this table does not know: another device, or fp32."""
    return PEAK_BF16.get(device_name) if precision == "bf16" else None


def flops_per_image(peers: Sequence[Mapping[str, Any]], *, size: int) -> int:
    """FLOPs of forward and backward of all peers for one source image, two views of `size` px each.

    `peers` as in a configuration's plain values.
    """
    with torch.device("meta"):  # shapes alone: nothing is computed
        networks = [build_peer(peer, size=size) for peer in peers]
        view = torch.empty(COUNTED, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        for network in networks:
            x, y = network(view, view)
            (x.sum() + y.sum()).backward()
    return counter.get_total_flops() // COUNTED
