"""Other ways to compute the losses: plain PyTorch without this project's kernels, and other libraries from PyPI.

A loss function takes raw embeddings (x_a, y_a, x_b, y_b), each [N, D], and returns one loss a peer.  M = 2N.

  mutual     NT-Xent (tau 0.5) plus both KL terms (tau 0.1, batchmean, weights 1)
  ntxent     NT-Xent of each peer, in two calls
  selfish    NT-Xent whose denominator keeps the self-similarity (InfoNCE of z against z); nearly the same work

Work in FLOP / (M^2 D), both peers, forward and backward together (this project's kernels: 2 + 8):

  eager, compiled   4 + 8     products with the whole matrix and two from its gradient; the matrix lies in memory
  official          none by tensor cores: three M x M x D products of single numbers forward, as many again backward
  lightly           4 + 8     NTXentLoss: ntxent exactly; four N x N products, boolean masks that wait for the GPU
  memeff            4 + 16    MemoryEfficientCLIPLoss of z against z with its halves exchanged: selfish exactly.  A loss
                              for two different towers: it recomputes the matrix for each one's gradient
  inf-cl            4 + 16    cal_inf_loss of z against z, labels at the other view: selfish exactly.  Backward is two
                              kernels that recompute the matrix each

Losses of one network and distillation terms, in plain PyTorch alone, stand at the end; their callers are in terms.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TAU_CONTRAST, TAU_DISTILL, TAU_QUEUE = 0.5, 0.1, 0.2

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
PeerLoss = Callable[[Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """This provider cannot run here; the message says why."""


def both_peers(loss: PeerLoss) -> LossFunction:
    """A loss of one peer's two views, called for each peer."""
    return lambda x_a, y_a, x_b, y_b: (loss(x_a, y_a), loss(x_b, y_b))


def normalized(x: Tensor, y: Tensor) -> Tensor:
    """Rows z = [x; y] of unit length, [M, D]."""
    return F.normalize(torch.cat((x, y)), dim=1)


def selfish(x: Tensor, y: Tensor) -> Tensor:
    """The plain formula of what memeff and inf-cl compute: mean_i [logsumexp_j z_i.z_j / tau - z_i.z_pos(i) / tau]."""
    z = normalized(x, y)
    logits = z @ z.T / TAU_CONTRAST
    positive = (z * z.roll(len(x), 0)).sum(1) / TAU_CONTRAST
    return (logits.logsumexp(1) - positive).mean()


# -- eager PyTorch, and the same compiled --------------------------------------------------------------------------


def _ntxent_of(cosine: Tensor) -> Tensor:
    M = len(cosine)
    itself = torch.eye(M, dtype=torch.bool, device=cosine.device)
    target = torch.arange(M, device=cosine.device).roll(M // 2)
    return F.cross_entropy((cosine / TAU_CONTRAST).masked_fill(itself, float("-inf")), target)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    z = normalized(x, y)
    return z @ z.T


def eager_ntxent(x: Tensor, y: Tensor) -> Tensor:
    """Normalise, one matrix product, mask, cross entropy."""
    return _ntxent_of(_cosine(x, y))


def eager_mutual(x_a: Tensor, y_a: Tensor, x_b: Tensor, y_b: Tensor) -> tuple[Tensor, Tensor]:
    """NT-Xent as above; the KL from the cross-view block of the same matrix, in logarithms."""
    N = len(x_a)
    cosine_a, cosine_b = _cosine(x_a, y_a), _cosine(x_b, y_b)
    log_a = (cosine_a[:N, N:] / TAU_DISTILL).log_softmax(1)
    log_b = (cosine_b[:N, N:] / TAU_DISTILL).log_softmax(1)
    kl_a = F.kl_div(log_a, log_b.detach(), log_target=True, reduction="batchmean")
    kl_b = F.kl_div(log_b, log_a.detach(), log_target=True, reduction="batchmean")
    return _ntxent_of(cosine_a) + kl_a, _ntxent_of(cosine_b) + kl_b


def build_eager(loss: str, device: torch.device, D: int) -> LossFunction:
    """`eager`."""
    return eager_mutual if loss == "mutual" else both_peers(eager_ntxent)


def build_compiled(loss: str, device: torch.device, D: int) -> LossFunction:
    """`compiled`: torch.compile of the eager functions, for one shape."""
    torch.compiler.reset()  # else shape after shape runs into the limit of recompilations
    return torch.compile(build_eager(loss, device, D), dynamic=False, fullgraph=True)


# -- the authors' formulation --------------------------------------------------------------------------------------


def _broadcast_cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a[:, None], b[None], dim=2)  # several [rows, columns, D] on the way


def official_ntxent(x: Tensor, y: Tensor) -> Tensor:
    """NT-Xent as the authors write it: broadcast cosines, the positive in front of all negatives, target 0."""
    N = len(x)
    z = torch.cat((x, y))
    logits = _broadcast_cosine(z, z) / TAU_CONTRAST
    positive = torch.cat((logits.diagonal(N), logits.diagonal(-N)))[:, None]
    image = torch.arange(2 * N, device=z.device) % N
    negatives = logits[image[:, None] != image[None]].view(2 * N, -1)
    target = torch.zeros(2 * N, dtype=torch.long, device=z.device)
    return F.cross_entropy(torch.cat((positive, negatives), dim=1), target, reduction="sum") / (2 * N)


def official_mutual(x_a: Tensor, y_a: Tensor, x_b: Tensor, y_b: Tensor) -> tuple[Tensor, Tensor]:
    """The authors' KL: a softmax and then its logarithm, of cosines computed anew (theirs divides by N once more)."""
    P_a = (_broadcast_cosine(x_a, y_a) / TAU_DISTILL).softmax(1)
    P_b = (_broadcast_cosine(x_b, y_b) / TAU_DISTILL).softmax(1)
    kl_a = F.kl_div(P_a.log(), P_b.detach(), reduction="batchmean")
    kl_b = F.kl_div(P_b.log(), P_a.detach(), reduction="batchmean")
    return official_ntxent(x_a, y_a) + kl_a, official_ntxent(x_b, y_b) + kl_b


def build_official(loss: str, device: torch.device, D: int) -> LossFunction:
    """`official`."""
    return official_mutual if loss == "mutual" else both_peers(official_ntxent)


# -- other libraries: one softmax, so NT-Xent alone ----------------------------------------------------------------


def build_lightly(loss: str, device: torch.device, D: int) -> LossFunction:
    """`lightly`."""
    _refuse_mutual(loss)
    try:
        from lightly.loss.ntx_ent_loss import NTXentLoss
    except ImportError as error:
        raise Unavailable(f"not importable ({error})") from None
    return both_peers(NTXentLoss(temperature=TAU_CONTRAST))


def build_memeff(loss: str, device: torch.device, D: int, dtype: torch.dtype = torch.float32) -> LossFunction:
    """`memeff`, and `memeff-bf16` whose products are bfloat16: its fastest form (float16 underflows in backward)."""
    _refuse_mutual(loss)
    _need_gpu(device)
    try:
        from memeff import MemoryEfficientCLIPLoss
    except ImportError as error:
        raise Unavailable(f"not importable ({error})") from None
    clip = MemoryEfficientCLIPLoss(temperature=TAU_CONTRAST, normalized_inputs=True, stable=False)

    def peer(x: Tensor, y: Tensor) -> Tensor:
        z = normalized(x, y).to(dtype)
        return clip(z, z.roll(len(x), 0))

    return both_peers(peer)


def build_memeff_bf16(loss: str, device: torch.device, D: int) -> LossFunction:
    """`memeff-bf16`."""
    return build_memeff(loss, device, D, torch.bfloat16)


def build_inf_cl(loss: str, device: torch.device, D: int) -> LossFunction:
    """`inf-cl`."""
    _refuse_mutual(loss)
    _need_gpu(device)
    head = min(D, 256)
    if D < 16 or D % head or head & (head - 1):  # it would read past its tensors
        raise Unavailable(f"D = {D}: a power of two from 16 to 256, or a multiple of 256, is needed")
    try:
        from inf_cl import cal_inf_loss
    except ImportError as error:
        raise Unavailable(f"not importable ({error})") from None

    def peer(x: Tensor, y: Tensor) -> Tensor:
        z = normalized(x, y)
        other_view = torch.arange(len(z), device=z.device).roll(len(x))
        return cal_inf_loss(z / TAU_CONTRAST, z, labels=other_view, head_dim=head)

    return both_peers(peer)


def _refuse_mutual(loss: str) -> None:
    if loss == "mutual":
        raise Unavailable("computes NT-Xent alone (--loss ntxent)")


def _need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("runs on GPUs only")


# -- losses of one network, and distillation terms, by autograd over whole matrices --------------------------------


def eager_moco(q_x: Tensor, q_y: Tensor, k_x: Tensor, k_y: Tensor, queue: Tensor) -> Tensor:
    """MoCo v2 at tau 0.2, each view's queries with the other's keys: positives in front of the queue, target 0."""
    q, k = normalized(q_x, q_y), normalized(k_y, k_x)
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), dim=1)
    return F.cross_entropy(logits / TAU_QUEUE, torch.zeros(len(q), dtype=torch.long, device=q.device))


def _off_diagonal_squares(matrix: Tensor) -> Tensor:
    itself = torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(itself, 0).square().sum()


def eager_barlow_twins(x: Tensor, y: Tensor) -> Tensor:
    """Both views through BatchNorm without parameters; their product; weight 0.005 off its diagonal."""
    u, v = (F.batch_norm(z, None, None, training=True) for z in (x, y))
    correlation = u.T @ v / len(x)
    return (1 - correlation.diagonal()).square().sum() + 0.005 * _off_diagonal_squares(correlation)


def eager_vicreg(x: Tensor, y: Tensor) -> Tensor:
    """Distance of the views, and of each its standard deviations and its covariance; weights 25, 25, 1."""
    loss = 25 * F.mse_loss(x, y)
    for z in (x, y):
        centred = z - z.mean(0)
        covariance = centred.T @ centred / (len(z) - 1)
        lacking = F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        loss = loss + 25 * lacking + _off_diagonal_squares(covariance) / z.shape[1]
    return loss


def _log_distribution(x: Tensor, y: Tensor, rows: str, symmetric: bool) -> Tensor:
    """log P of all rows: [N, N], symmetric [2N, N] with those over the other axis, rows `all` [2N, 2N]."""
    if rows == "all":
        cosine = _cosine(x, y)
        itself = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
        cosine = cosine.masked_fill(itself, -1e9)  # finite, since the divergences subtract logarithms
    else:
        cosine = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
        cosine = torch.cat((cosine, cosine.T)) if symmetric else cosine
    return (cosine / TAU_DISTILL).log_softmax(1)


def _row_divergence(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    def kl(log_of: Tensor, log_from: Tensor) -> Tensor:  # KL(of || from)
        return F.kl_div(log_from, log_of, reduction="none", log_target=True).sum(1)

    if divergence == "kl":
        return kl(log_q, log_p)
    if divergence == "reverse_kl":
        return kl(log_p, log_q)
    if divergence == "jeffreys":
        return (kl(log_q, log_p) + kl(log_p, log_q)) / 2
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def eager_distillation(
    views: Sequence[tuple[Tensor, Tensor]],  # of each network
    terms: Sequence[tuple[int, Sequence[int]]],  # student, teachers
    *,
    divergence: str = "kl",
    rows: str = "cross_view",
    symmetric: bool = False,
    partition: bool = False,
) -> tuple[Tensor, ...]:
    """`similarity_distillation` at tau 0.1 from whole matrices of logarithms, one a network."""
    logs = [_log_distribution(x, y, rows, symmetric) for x, y in views]
    losses = []
    for student, (teacher, *others) in terms:
        log_p, log_q = logs[student], logs[teacher].detach()
        if others:
            taught = torch.stack([log_q, *(logs[other].detach() for other in others)])
            log_q = taught.logsumexp(0) - math.log(len(taught))
        distance = _row_divergence(log_p, log_q, divergence)
        if partition:
            distance = distance * (log_q.amax(1) > log_p.amax(1))
        losses.append(distance.mean())
    return tuple(losses)


def eager_graph(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Embedding graph alignment with the weights 0.8 of nodes and 0.24 of edges, the mean over both views."""
    loss = student[0].new_zeros(())
    for own, other in zip(student, teacher, strict=True):
        s, t = (F.normalize(z - z.mean(1, keepdim=True), dim=1) for z in (own, other.detach()))
        nodes = s @ t.T - torch.eye(len(s), device=s.device)
        edges = t @ t.T - s @ s.T
        loss = loss + (0.8 * nodes.norm() + 0.24 * edges.norm()) / 2
    return loss
