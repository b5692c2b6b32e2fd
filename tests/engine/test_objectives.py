"""From configuration and embeddings to losses."""

import pytest
import torch

from engine.config import parse_config
from engine.objectives import peer_losses
from kernels import ntxent_loss, similarity_kl


def config(**changes):
    peers = [{"name": n, "backbone": "wrn-10-1", "tau": t} for n, t in changes.pop("peers", [("a", 0.5), ("b", 0.5)])]
    return parse_config({"run": {"output_dir": "x", "steps": 1}, "peers": peers, **changes})


def views(N=6, widths=(5, 4)):
    torch.manual_seed(0)
    return [tuple(torch.randn(2, N, D, dtype=torch.float64).requires_grad_().unbind()) for D in widths]


@pytest.mark.parametrize("taus", [(0.5, 0.5), (0.5, 0.2)], ids=["fused", "separate"])
def test_two_peers(taus):
    cfg = config(
        peers=[("a", taus[0]), ("b", taus[1])], distill={"weight": [3.0, 0.5], "tau": 0.2, "reduction": "mean"}
    )
    z = views()
    kls = similarity_kl(*z[0], *z[1], tau=0.2, kl_reduction="mean")
    found = peer_losses(cfg, z, None)
    for p, (weight, tau) in enumerate(zip((3.0, 0.5), taus, strict=True)):
        ntxent = ntxent_loss(*z[p], tau=tau)
        torch.testing.assert_close(found[p].loss, ntxent + weight * kls[p])
        torch.testing.assert_close(found[p].terms["kl"], kls[p].detach())
        torch.testing.assert_close(found[p].terms["ntxent"], ntxent.detach())
        assert not any(term.requires_grad for term in found[p].terms.values())


def test_one_peer_is_the_plain_baseline():
    z = views(widths=(5,))
    (found,) = peer_losses(config(peers=[("a", 0.2)]), z, None)
    torch.testing.assert_close(found.loss, ntxent_loss(*z[0], tau=0.2))
    assert set(found.terms) == {"ntxent"}
