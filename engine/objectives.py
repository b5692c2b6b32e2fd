"""Configuration and embeddings -> the loss of each peer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from engine.config import Config
from kernels import GatheredViews, gather_views, mutual_loss, ntxent_loss, similarity_kl

Views = tuple[Tensor, Tensor]  # embeddings of one peer's two views, [n, D] each


class PeerLoss(NamedTuple):
    """`loss` carries the gradient to its own peer; the terms are detached scalars for the meters."""

    loss: Tensor
    terms: dict[str, Tensor]


def start_gather(cfg: Config, views: Views, group: dist.ProcessGroup | None) -> GatheredViews | None:
    """Sets one peer's embeddings on their way between the ranks; None where the losses send them themselves."""
    if group is None or cfg.distill is None or not _one_tau(cfg):
        return None
    return gather_views(*views, tau_contrast=cfg.peers[0].tau, tau_distill=cfg.distill.tau, group=group)


def _one_tau(cfg: Config) -> bool:
    return len({peer.tau for peer in cfg.peers}) == 1


def peer_losses(
    cfg: Config,
    embeddings: list[Views],
    group: dist.ProcessGroup | None,
    gathered: Sequence[GatheredViews | None] = (None, None),
) -> list[PeerLoss]:
    """NT-Xent of each peer and, with two peers, weight * KL; over the batch of all ranks, equal on every rank.

    `gathered`: what `start_gather` gave for each peer.
    """
    if cfg.distill is None:
        (x, y), tau = embeddings[0], cfg.peers[0].tau
        loss = ntxent_loss(x, y, tau=tau, group=group)
        return [PeerLoss(loss, {"ntxent": loss.detach()})]
    (x_a, y_a), (x_b, y_b) = embeddings
    weights = cfg.distill.weights
    tau_a, tau_b = (peer.tau for peer in cfg.peers)
    if _one_tau(cfg):
        both = mutual_loss(
            x_a, y_a, x_b, y_b,
            tau_contrast=tau_a, tau_distill=cfg.distill.tau, weights=weights,
            kl_reduction=cfg.distill.reduction, group=group, gathered=(gathered[0], gathered[1]),
        )  # fmt: skip
        return [
            PeerLoss(both.loss_a, {"ntxent": both.ntxent_a, "kl": both.kl_a}),
            PeerLoss(both.loss_b, {"ntxent": both.ntxent_b, "kl": both.kl_b}),
        ]
    # Temperatures that differ have no common kernel: the same three terms one by one.
    kls = similarity_kl(x_a, y_a, x_b, y_b, tau=cfg.distill.tau, kl_reduction=cfg.distill.reduction, group=group)
    losses = []
    for (x, y), tau, weight, kl in zip(embeddings, (tau_a, tau_b), weights, kls, strict=True):
        ntxent = ntxent_loss(x, y, tau=tau, group=group)
        losses.append(PeerLoss(ntxent + weight * kl, {"ntxent": ntxent.detach(), "kl": kl.detach()}))
    return losses
