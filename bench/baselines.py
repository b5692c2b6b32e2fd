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
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TAU_CONTRAST, TAU_DISTILL = 0.5, 0.1

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
