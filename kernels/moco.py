"""MoCo: the contrastive loss of one peer against a queue of keys from earlier batches.

Legend
  N  images of the global batch     n  images of this rank     W  ranks, N = W n
  D  embedding width                K  keys in the queue       m = 2n rows of this rank
  q  [m, D] unit queries [q_x; q_y] k  [m, D] unit keys [k_y; k_x]: of the same image, from the momentum encoder
  c  [K, D] the queue: unit keys of earlier batches, the negatives of every query

With s_i = q_i.k_i / tau and e_ij = exp(q_i.c_j / tau),

    l_i = log(exp(s_i) + sum_j e_ij) - s_i          dl_i/dq_i = sum_j e_ij (c_j - k_i) / (tau (exp(s_i) + sum_j e_ij))

Both sums are taken over strips of the queue, with exponents less the greatest one so far, so that no [m, K] matrix
stands in memory.  The gradient is made on the way: a strip of e serves its row sums and its product with c.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import checks, forward_gradients, strips
from kernels.collectives import gather_rows, global_mean, world_size
from kernels.precision import full_precision, unit_rows

# The largest temporary is a strip's logits.  On a CPU they are to stay in the core's cache between their passes: the
# loss and gradient of n = 256, K = 65,536, D = 128 took 0.12 s, with one strip of 128 MiB 0.21 s, and by autograd from
# the whole matrices 0.52 s (float32, one core of a Xeon with AVX-512, torch 2.14; two cores and memory:
# bench/results/cpu/terms.jsonl).  Between 0.5 and 2 MiB it hardly matters, also for n = 64 and 1024.
STRIP_BYTES = 2**20
# On a GPU there is no such cache, and few large products are best: that of n = 256, K = 65,536 is one of 128 MiB.
GPU_STRIP_BYTES = 256 * 2**20


def moco_loss(
    q_x: Tensor,  # [n, D] queries of view 1, by the network that is trained
    q_y: Tensor,  # [n, D] queries of view 2
    k_x: Tensor,  # [n, D] keys of view 1, by the momentum encoder
    k_y: Tensor,  # [n, D] keys of view 2
    queue: Tensor,  # [K, D] unit rows: keys of earlier batches
    *,
    tau: float = 0.2,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """InfoNCE of each view's queries with the other's keys and those in the queue (He et al. 2019, arXiv 1911.05722).

    tau as in MoCo v2 (Chen et al. 2020, arXiv 2003.04297).  The paper takes one view as the query and the other as the
    key; here each view serves as both, since both are embedded anyway for distillation.  BatchNorm over all ranks takes
    the place of the paper's shuffling between GPUs: either keeps a small batch's statistics from giving the key away.

    Raw queries and keys in, normalised inside; float16, bfloat16, float32 or float64, at least float32 inside and out;
    the queue float32 or float64.  Only queries get a gradient, and one that is made with the loss: it has no second
    derivative.  A single image will do.  `group=None` is this process alone; else every rank passes the same shape and
    the same queue, gets the loss of the global batch, and gradients W times the true ones, which the mean over W ranks
    of data parallelism makes exact.

        1/2 [ mean_i l(q_x_i, k_y_i) + mean_i l(q_y_i, k_x_i) ]
        l(q, k) = log( exp(q.k / tau) + sum_j exp(q.queue_j / tau) ) - q.k / tau

    Raises ValueError, naming the argument: shapes, widths or devices that differ, dtypes that differ between two views
    or are not supported, an empty batch or queue, tau not positive and finite.
    """
    checks.check_positive("tau", tau)
    checks.check_pair(q_x=q_x, q_y=q_y)
    checks.check_targets(q_x=q_x, k_x=k_x, k_y=k_y)
    checks.check_queue(queue, q_x=q_x)
    # The gradient is that of the raw queries, so that nothing behind it can pass for a part of a second derivative.
    wanted = forward_gradients.wanted(q_x, q_y)
    local, gradient = loss_op(*(z.detach() for z in (q_x, q_y, k_x, k_y, queue)), float(tau), wanted)
    return global_mean(forward_gradients.attach(local, q_x, q_y, gradient), group)


@torch.no_grad()
def enqueue(
    queue: Tensor,  # [K, D] unit rows, overwritten in place
    position: Tensor,  # [] int64, where the oldest row stands; advanced in place
    k_x: Tensor,  # [n, D] keys of view 1
    k_y: Tensor,  # [n, D] keys of view 2
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Puts the unit keys of all ranks in the place of the queue's oldest rows (He et al. 2019, arXiv 1911.05722).

    The keys [k_x; k_y] of the global batch, in rank order within a view, go to the rows (position + 0 .. 2N - 1) mod K,
    so that queues which are equal on all ranks stay so.  Nothing waits for the device: a CUDA graph can hold the call.
    Raises ValueError, naming the argument, as `moco_loss` does, and where 2N > K.
    """
    checks.check_pair(k_x=k_x, k_y=k_y)
    checks.check_queue(queue, k_x=k_x)
    checks.check_position(position, queue)
    K, fresh = queue.shape[0], 2 * k_x.shape[0] * world_size(group)
    if fresh > K:
        raise ValueError(f"queue: {K} rows do not hold the {fresh} keys of one batch over all ranks")
    both = torch.stack((unit_rows(k_x), unit_rows(k_y)), dim=1).to(queue.dtype)  # [n, 2, D]
    keys = gather_rows(both, group).transpose(0, 1).flatten(0, 1)  # [2N, D]
    queue.index_copy_(0, (position + torch.arange(fresh, device=queue.device)) % K, keys)
    position.add_(fresh).remainder_(K)


def new_queue(K: int, D: int, *, device: torch.device | str | None = None) -> Tensor:
    """[K, D] random unit rows in float32, as the authors start; from torch's global generator of the CPU.

    Ranks and devices that are seeded alike get the same rows.  Raises ValueError where K or D is less than 1.
    """
    if K < 1 or D < 1:
        raise ValueError(f"K, D: at least 1 is expected, found {K}, {D}")
    return unit_rows(torch.randn(K, D)).to(device)


def _compute(q: Tensor, k: Tensor, queue: Tensor, tau: float, gradients: bool) -> tuple[Tensor, Tensor]:
    """The mean of l over unit rows q and k [m, D], and its gradient [m, D]; in the dtype of q and k."""
    q = q / tau
    positive = (q * k).sum(dim=1)  # [m]
    # Sums of the negatives alone: added to the positive's exponential they would lose the digits of a loss near 0.
    offset, total, weighted = positive, torch.zeros_like(positive), torch.zeros_like(q)
    for strip in _strips(queue, len(q), q.dtype):
        strip = strip.to(q.dtype)
        logits = q @ strip.T
        raised = torch.maximum(offset, logits.amax(dim=1))
        shrink = (offset - raised).exp()
        e = logits.sub_(raised[:, None]).exp_()
        total = total * shrink + e.sum(dim=1)
        if gradients:
            weighted.mul_(shrink[:, None]).addmm_(e, strip)
        offset = raised
    others = total + (positive - offset).expm1()  # exp(s) + sum_j e_j, less 1
    loss = (others.log1p() + (offset - positive)).mean()
    if not gradients:
        return loss, loss.new_empty(0)
    return loss, (weighted - total[:, None] * k) / ((others + 1) * tau * len(q))[:, None]


def _strips(queue: Tensor, m: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    limit = STRIP_BYTES if queue.device.type == "cpu" else GPU_STRIP_BYTES
    return queue.split(max(1, limit // (m * dtype.itemsize)))


# One operator, so that torch.compile does not unroll the strips.
@torch.library.custom_op("dogo::moco", mutates_args=())
def loss_op(
    q_x: Tensor, q_y: Tensor, k_x: Tensor, k_y: Tensor, queue: Tensor, tau: float, gradients: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mean of l over this rank's rows, and its gradient [2, n, D] of the raw queries."""
    with full_precision(q_x):
        dtype = forward_gradients.computed_in(q_x, k_x, queue)
        q, k = strips.unit_rows(q_x.to(dtype), q_y.to(dtype)), unit_rows(torch.cat((k_y, k_x)).to(dtype))
        loss, gradient = _compute(q.rows.flatten(0, 1), k, queue, tau, gradients)
        return loss, strips.through_unit_rows(gradient.view(2, *q_x.shape), q) if gradients else gradient


@loss_op.register_fake
def _(q_x, q_y, k_x, k_y, queue, tau, gradients):
    dtype = forward_gradients.computed_in(q_x, k_x, queue)
    return q_x.new_empty((), dtype=dtype), forward_gradients.fake(q_x, gradients, dtype)
