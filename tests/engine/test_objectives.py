"""From configuration and embeddings to losses: which tensors enter which term, against the formulas written out."""

import itertools

import numpy as np
import pytest
import torch

from engine.config import parse_config
from engine.objectives import peer_losses
from engine.peers import Embedded

OBJECTIVES = ("simclr", "simsiam", "byol", "mocov2", "barlow_twins", "vicreg")
N = 6


def config(peers=(("a", "simclr"), ("b", "simclr")), taus=(None, None, None), **changes):
    plain = [
        {"name": name, "backbone": "wrn-10-1", "objective": objective, "tau": tau}
        for (name, objective), tau in zip(peers, taus, strict=False)
    ]
    frozen = [{"name": name, "backbone": "wrn-10-1", "frozen": "weights"} for name in changes.pop("teachers", ())]
    return parse_config({"run": {"output_dir": "x", "steps": 1}, "peers": [*plain, *frozen], **changes})


def pair(D: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))  # type: ignore[return-value]


def embedded(objective: str | None, seed: int, D: int = 5, graph: int | None = None) -> Embedded:
    """What a peer of an objective gives, from random numbers; None: a frozen teacher."""
    generator = torch.Generator().manual_seed(seed)
    made = {"z": pair(D, generator)}
    if objective in ("simsiam", "byol"):
        made["p"] = pair(D, generator)
    if graph is not None:
        made.update({f"graph_{name}": pair(graph, generator) for name in tuple(made)})
    if objective in ("byol", "mocov2"):
        made["k"] = tuple(view.detach() for view in pair(D, generator))
    if objective == "mocov2":
        made["queue"] = torch.nn.functional.normalize(pair(D, generator)[0].detach(), dim=1)
    return Embedded(**made)


# -- the formulas, in NumPy ----------------------------------------------------------------------------------------


def unit(z):
    z = z.detach().numpy()
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def own(objective: str, e: Embedded, tau: float) -> float:
    """Each objective as its paper has it."""
    x, y = (view.detach().numpy() for view in e.z)
    if objective == "simclr":
        z = np.concatenate([unit(view) for view in e.z])
        logits = z @ z.T / tau
        np.fill_diagonal(logits, -np.inf)
        positive = np.roll(np.arange(2 * N), N)
        return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(2 * N), positive]))
    if objective == "simsiam":
        return -0.5 * sum(float((unit(p) * unit(z)).sum(1).mean()) for p, z in zip(e.p, e.z[::-1], strict=True))
    if objective == "byol":
        return sum(2 - 2 * float((unit(p) * unit(k)).sum(1).mean()) for p, k in zip(e.p, e.k[::-1], strict=True))
    if objective == "mocov2":
        total = 0.0
        for q, k in zip(e.z, e.k[::-1], strict=True):
            positive = (unit(q) * unit(k)).sum(1) / tau
            negatives = unit(q) @ e.queue.numpy().T / tau
            total += float(np.mean(np.log(np.exp(positive) + np.exp(negatives).sum(1)) - positive)) / 2
        return total
    if objective == "barlow_twins":
        c = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)).T @ ((y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)) / N
        off = c - np.diag(np.diag(c))
        return float(((1 - np.diag(c)) ** 2).sum() + 0.005 * (off**2).sum())
    variance = sum(np.maximum(0, 1 - np.sqrt(v.var(0, ddof=1) + 1e-4)).mean() / 2 for v in (x, y))
    covariance = 0.0
    for v in (x, y):
        c = np.cov(v.T)
        covariance += ((c - np.diag(np.diag(c))) ** 2).sum() / v.shape[1]
    return float(25 * ((x - y) ** 2).mean() + 25 * variance + covariance)


def distribution(views, tau: float) -> np.ndarray:
    e = np.exp(unit(views[0]) @ unit(views[1]).T / tau)
    return e / e.sum(1, keepdims=True)


def kl(target: np.ndarray, of: np.ndarray) -> float:
    return float((target * np.log(target / of)).sum(1).mean())


# -- pairs of objectives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", list(itertools.product(OBJECTIVES, OBJECTIVES)), ids="+".join)
def test_any_mix_of_two(names):
    """A peer with a predictor learns with its outputs, from the other's projector outputs; one without from the other's
    predictor outputs where there are any (the authors' code, for SimCLR and SimSiam).
    """
    cfg = config(tuple(zip("ab", names, strict=True)), distill={"weight": [3.0, 0.5], "tau": 0.2})
    each = [embedded(name, seed, D=5 - seed) for seed, name in enumerate(names)]
    found = peer_losses(cfg, each, None)
    for i, loss in enumerate(found):
        me, other = each[i], each[1 - i]
        student = me.z if me.p is None else me.p
        teacher = other.z if me.p is not None or other.p is None else other.p
        term = kl(distribution(teacher, 0.2), distribution(student, 0.2))
        alone = own(names[i], me, cfg.peers[i].tau or 0.0)
        assert float(loss.terms["kl"]) == pytest.approx(term)
        assert float(loss.terms["ntxent" if names[i] == "simclr" else names[i]]) == pytest.approx(alone)
        assert loss.loss.item() == pytest.approx(alone + (3.0, 0.5)[i] * term)
        inputs = [view for e in each for views in (e.z, e.p or ()) for view in views]
        gradients = torch.autograd.grad(loss.loss, inputs, allow_unused=True, retain_graph=True)
        counts = [2 if e.p is None else 4 for e in each]
        mine = gradients[: counts[0]] if i == 0 else gradients[counts[0] :]
        others = gradients[counts[0] :] if i == 0 else gradients[: counts[0]]
        assert any(g is not None and g.abs().sum() > 0 for g in mine)
        assert all(g is None or g.abs().sum() == 0 for g in others), "gradient reaches its own peer only"


def test_a_predictor_peer_gets_no_gradient_into_its_targets():
    """SimSiam and BYOL: the projector outputs are constants of the loss itself; the gradient comes by the predictor."""
    for name in ("simsiam", "byol"):
        cfg = config((("a", name), ("b", name)))
        each = [embedded(name, seed) for seed in range(2)]
        loss = peer_losses(cfg, each, None)[0].loss
        into_z = torch.autograd.grad(loss, each[0].z, allow_unused=True)
        assert all(g is None or g.abs().sum() == 0 for g in into_z)


# -- one peer, other temperatures, the fused path ------------------------------------------------------------------


def test_one_peer():
    cfg = config((("a", "simclr"),), taus=(0.2,))
    e = embedded("simclr", 0)
    (found,) = peer_losses(cfg, [e], None)
    assert found.loss.item() == pytest.approx(own("simclr", e, 0.2))
    assert set(found.terms) == {"ntxent"}


@pytest.mark.parametrize("taus", [(0.5, 0.5), (0.5, 0.2)], ids=["fused", "separate"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_two_simclr_peers(taus, reduction):
    cfg = config(taus=taus, distill={"weight": [3.0, 0.5], "tau": 0.2, "reduction": reduction})
    each = [embedded("simclr", 0), embedded("simclr", 1, D=4)]
    P = [distribution(e.z, 0.2) for e in each]
    for i, loss in enumerate(peer_losses(cfg, each, None)):
        term = kl(P[1 - i], P[i]) / (N if reduction == "mean" else 1)
        assert loss.loss.item() == pytest.approx(own("simclr", each[i], taus[i]) + (3.0, 0.5)[i] * term)


def gradients(cfg, each, share=1.0):
    losses = peer_losses(cfg, each, None, share=share)
    return [torch.autograd.grad(loss.loss, e.z, retain_graph=True) for loss, e in zip(losses, each, strict=True)]


def test_a_ramp_scales_the_weight_alone():
    """Half of a weight of 2 is a weight of 1, which the fused kernel has."""
    each = [embedded("simclr", seed) for seed in range(2)]
    ramped = config(distill={"weight": 2.0, "ramp": {"steps": 10}})
    share = torch.tensor(0.5, dtype=torch.float64)
    found = peer_losses(ramped, each, None, share=share)
    wanted = peer_losses(config(distill={"weight": 1.0}), each, None)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(one.terms["kl"], other.terms["kl"])
    for one, other in zip(
        gradients(ramped, each, share), gradients(config(distill={"weight": 1.0}), each), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_weight_of_zero_leaves_the_objective_alone():
    """The term is in the meters, no gradient of it is made, and what is not finite of it stays out of the loss."""
    cfg = config((("a", "vicreg"), ("b", "simsiam")), distill={"weight": [0.0, 1.0]})
    each = [embedded("vicreg", 0), embedded("simsiam", 1)]
    zero, one = peer_losses(cfg, each, None)
    assert float(zero.terms["kl"]) > 0
    assert zero.loss.item() == float(zero.terms["vicreg"])
    (alone,) = peer_losses(config((("a", "vicreg"),)), each[:1], None)
    for found, wanted in zip(
        torch.autograd.grad(zero.loss, each[0].z), torch.autograd.grad(alone.loss, each[0].z), strict=True
    ):
        assert torch.equal(found, wanted)
    assert one.loss.item() != float(one.terms["simsiam"])


# -- other terms ---------------------------------------------------------------------------------------------------


def test_settings_reach_the_term():
    """Jensen-Shannon over rows and columns, of confident rows alone, written out."""
    cfg = config(distill={"weight": 2.0, "tau": 0.3, "divergence": "js", "symmetric": True, "partition": True})
    each = [embedded("simclr", 0), embedded("simclr", 1, D=4)]
    found = peer_losses(cfg, each, None)
    for i, loss in enumerate(found):
        total, shares = 0.0, []
        for flip in (False, True):
            P, Q = (distribution(e.z[::-1] if flip else e.z, 0.3) for e in (each[i], each[1 - i]))
            M = (P + Q) / 2
            rows = 0.5 * (P * np.log(P / M)).sum(1) + 0.5 * (Q * np.log(Q / M)).sum(1)
            chosen = Q.max(1) > P.max(1)
            total += float((rows * chosen).mean()) / 2
            shares.append(chosen.mean())
        assert float(loss.terms["js"]) == pytest.approx(total)
        assert float(loss.terms["distilled"]) == pytest.approx(np.mean(shares))
        assert loss.loss.item() == pytest.approx(own("simclr", each[i], 0.5) + 2 * total)


def test_three_peers_learn_from_the_mean_of_the_others():
    names = ("simclr", "barlow_twins", "simclr")
    cfg = config(tuple(zip("abc", names, strict=True)), distill={"weight": [1.0, 2.0, 0.5], "tau": 0.2})
    each = [embedded(name, seed, D=4 + seed) for seed, name in enumerate(names)]
    P = [distribution(e.z, 0.2) for e in each]
    for i, loss in enumerate(peer_losses(cfg, each, None)):
        mean = sum(P[j] for j in range(3) if j != i) / 2
        wanted = own(names[i], each[i], 0.5) + (1.0, 2.0, 0.5)[i] * kl(mean, P[i])
        assert loss.loss.item() == pytest.approx(wanted)


def test_a_frozen_teacher_teaches_and_has_no_loss():
    cfg = config((("a", "simclr"),), teachers=("t",), distill={"weight": 0.7})
    each = [embedded("simclr", 0), embedded(None, 1, D=9)]
    (found,) = peer_losses(cfg, each, None)
    term = kl(distribution(each[1].z, 0.1), distribution(each[0].z, 0.1))
    assert found.loss.item() == pytest.approx(own("simclr", each[0], 0.5) + 0.7 * term)


def correlation(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.corrcoef(s, t)[: len(s), len(s) :]


@pytest.mark.parametrize("names", [("simclr", "simclr"), ("simsiam", "simclr"), ("simsiam", "byol")], ids="+".join)
@pytest.mark.parametrize("projection", [None, 3])
def test_graph_alignment_beside_the_similarity_term(names, projection):
    graph = {"node": 0.8, "edge": 0.3, "projection": projection}
    peers = [
        {"name": n, "backbone": "wrn-10-1", "objective": o, "projector": {"out": 5}}
        for n, o in zip("ab", names, strict=True)
    ]
    distill = {"weight": 0.0, "graph": graph}
    cfg = parse_config({"run": {"output_dir": "x", "steps": 1}, "peers": peers, "distill": distill})
    each = [embedded(name, seed, graph=projection) for seed, name in enumerate(names)]
    found = peer_losses(cfg, each, None)
    for i, loss in enumerate(found):
        me, other = each[i], each[1 - i]
        predicts, other_predicts = me.p is not None, me.p is None and other.p is not None
        prefix = "" if projection is None else "graph_"
        student = getattr(me, prefix + ("p" if predicts else "z"))
        teacher = getattr(other, prefix + ("p" if other_predicts else "z"))
        total = 0.0
        for s, t in zip(student, teacher, strict=True):
            s, t = s.detach().numpy(), t.detach().numpy()
            node = np.linalg.norm(correlation(t, s) - np.eye(N))
            edge = np.linalg.norm(correlation(t, t) - correlation(s, s))
            total += (0.8 * node + 0.3 * edge) / 2
        assert float(loss.terms["graph"]) == pytest.approx(total)
        assert loss.loss.item() == pytest.approx(own(names[i], me, 0.5) + total)
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss.loss, student, retain_graph=True))
