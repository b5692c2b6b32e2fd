"""Configuration and embeddings -> the loss of each peer.

A peer's loss is its own objective plus what it learns from the others: weight * divergence of similarity distributions,
and embedding graph alignment where it is asked for.  Which embeddings enter (Bhat et al. 2021, arXiv 2104.09866, code):

  a peer with a predictor learns with the predictor's outputs; the others with the projector's
  it learns from the projector outputs of the others; one without a predictor from their predictor outputs, where
  they have a predictor
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from engine.config import Config
from engine.distill_config import DistillConfig, GraphConfig
from engine.objective_config import BarlowTwins, Byol, Mocov2, Simclr, Simsiam, Vicreg
from engine.peer_config import PeerConfig
from engine.peers import Embedded, Views
from kernels import (
    GatheredViews,
    barlow_twins_loss,
    byol_loss,
    gather_views,
    graph_alignment,
    moco_loss,
    mutual_loss,
    ntxent_loss,
    similarity_distillation,
    simsiam_loss,
    vicreg_loss,
)


class PeerLoss(NamedTuple):
    """`loss` carries the gradient to its own peer; the terms are detached scalars for the meters."""

    loss: Tensor
    terms: dict[str, Tensor]


def start_gather(cfg: Config, embedded: Embedded, group: dist.ProcessGroup | None) -> GatheredViews | None:
    """Sets one peer's embeddings on their way between the ranks; None where the losses send them themselves."""
    if group is None or cfg.distill is None or not _fused(cfg):
        return None
    tau = cfg.trained[0][1].temperature
    return gather_views(*embedded.z, tau_contrast=tau, tau_distill=cfg.distill.tau, group=group)


def _fused(cfg: Config) -> bool:
    """Whether one kernel has both peers' objectives and what they learn from each other."""
    if cfg.distill is None or len(cfg.peers) != 2 or len(cfg.trained) != 2:
        return False
    (_, a), (_, b) = cfg.trained
    plain = DistillConfig.model_fields
    kind = ("divergence", "rows", "symmetric", "partition", "ramp")  # a ramped weight is no constant of a kernel
    return (
        a.objective.name == b.objective.name == "simclr"
        and a.tau == b.tau
        and all(getattr(cfg.distill, key) == plain[key].default for key in kind)
    )


def peer_losses(
    cfg: Config,
    embedded: Sequence[Embedded],
    group: dist.ProcessGroup | None,
    gathered: Sequence[GatheredViews | None] = (None, None),
    share: Tensor | float = 1.0,
) -> list[PeerLoss]:
    """The loss of each peer that trains, over the batch of all ranks, equal on every rank.

    `embedded`: of every peer, frozen ones too, in the configuration's order.  `gathered`: what `start_gather` gave for
    each.  `share`: of every distillation weight in this step (distill.ramp).
    """
    if _fused(cfg):
        losses = _fused_losses(cfg, embedded, group, gathered)
    else:
        losses = [own_loss(peer, embedded[i], group) for i, peer in cfg.trained]
        if cfg.distill is not None:
            losses = _distilled(cfg, cfg.distill, losses, embedded, group, share)
    if cfg.distill is not None and cfg.distill.graph is not None:
        losses = _aligned(cfg, cfg.distill.graph, losses, embedded, group, share)
    return losses


def own_loss(peer: PeerConfig, embedded: Embedded, group: dist.ProcessGroup | None) -> PeerLoss:
    """A peer's own objective, without the others."""
    z, p, k = embedded.z, embedded.p, embedded.k
    match peer.objective:
        case Simclr():
            loss = ntxent_loss(*z, tau=peer.temperature, group=group)
            return PeerLoss(loss, {"ntxent": loss.detach()})
        case Simsiam():
            assert p is not None
            loss = simsiam_loss(*p, *z, group=group)
        case Byol():
            assert p is not None
            assert k is not None
            loss = byol_loss(*p, *k, group=group)
        case Mocov2():
            assert k is not None
            assert embedded.queue is not None
            loss = moco_loss(*z, *k, embedded.queue, tau=peer.temperature, group=group)
        case BarlowTwins(off_diagonal=weight):
            loss = barlow_twins_loss(*z, off_diagonal=weight, group=group)
        case Vicreg(invariance=invariance, variance=variance, covariance=covariance):
            loss = vicreg_loss(*z, invariance=invariance, variance=variance, covariance=covariance, group=group)
    return PeerLoss(loss, {peer.objective.name: loss.detach()})


def _fused_losses(
    cfg: Config, embedded: Sequence[Embedded], group: dist.ProcessGroup | None,
    gathered: Sequence[GatheredViews | None],
) -> list[PeerLoss]:  # fmt: skip
    assert cfg.distill is not None
    weight_a, weight_b = cfg.weights
    both = mutual_loss(
        *embedded[0].z, *embedded[1].z,
        tau_contrast=cfg.trained[0][1].temperature, tau_distill=cfg.distill.tau, weights=(weight_a, weight_b),
        kl_reduction=cfg.distill.reduction, group=group, gathered=(gathered[0], gathered[1]),
    )  # fmt: skip
    return [
        PeerLoss(both.loss_a, {"ntxent": both.ntxent_a, "kl": both.kl_a}),
        PeerLoss(both.loss_b, {"ntxent": both.ntxent_b, "kl": both.kl_b}),
    ]


def _distilled(
    cfg: Config, distill: DistillConfig, losses: list[PeerLoss], embedded: Sequence[Embedded],
    group: dist.ProcessGroup | None, share: Tensor | float,
) -> list[PeerLoss]:  # fmt: skip
    """The losses and, of each, weight * divergence from the mean of the others' distributions."""
    views: list[Views] = []
    places: dict[tuple[int, bool], int] = {}  # of peer i's outputs, predictor's or projector's, in `views`

    def place(i: int, predictor: bool) -> int:
        key = (i, predictor and embedded[i].p is not None)
        if key not in places:
            places[key] = len(views)
            views.append(embedded[i].student if key[1] else embedded[i].z)
        return places[key]

    terms = []
    for (i, _), weight in zip(cfg.trained, cfg.weights, strict=True):
        learns_with_one = embedded[i].p is not None
        others = tuple(place(j, not learns_with_one) for j in range(len(embedded)) if j != i)
        student = place(i, True)
        if weight == 0:  # its value is for the meters: no gradient is made
            x, y = views[student]
            student = len(views)
            views.append((x.detach(), y.detach()))
        terms.append((student, others))
    made = similarity_distillation(
        views, terms, tau=distill.tau, divergence=distill.divergence, rows=distill.rows, symmetric=distill.symmetric,
        partition=distill.partition, kl_reduction=distill.reduction, group=group,
    )  # fmt: skip
    whole = []
    for own, weight, term, part in zip(losses, cfg.weights, made.losses, made.shares, strict=True):
        found = {**own.terms, distill.divergence: term.detach()}
        if distill.partition:
            found["distilled"] = part
        whole.append(PeerLoss(own.loss + weight * share * term if weight else own.loss, found))
    return whole


def _aligned(
    cfg: Config, graph: GraphConfig, losses: list[PeerLoss], embedded: Sequence[Embedded],
    group: dist.ProcessGroup | None, share: Tensor | float,
) -> list[PeerLoss]:  # fmt: skip
    """The losses and, of each, embedding graph alignment with the others, its mean over them."""
    whole = []
    for (i, _), own in zip(cfg.trained, losses, strict=True):
        learns_with_one = embedded[i].p is not None
        others = [_seen(each, predictor=not learns_with_one) for j, each in enumerate(embedded) if j != i]
        term = graph_alignment(
            _seen(embedded[i], predictor=True), others, node=graph.node, edge=graph.edge, group=group
        )
        whole.append(PeerLoss(own.loss + share * term, {**own.terms, "graph": term.detach()}))
    return whole


def _seen(embedded: Embedded, *, predictor: bool) -> Views:
    """A peer's embeddings for graph alignment, behind its layer where there is one."""
    if predictor and embedded.p is not None:
        return embedded.p if embedded.graph_p is None else embedded.graph_p
    return embedded.z if embedded.graph_z is None else embedded.graph_z
