"""The `triton` backend: embeddings of all ranks, and the operators that autograd and torch.compile see.

The passes themselves stand in passes_triton.py, the maths in reference.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from kernels import embed_triton, forward_gradients, tiles
from kernels.collectives import group_called, name_of, world_size
from kernels.passes_triton import Embedded, compute
from kernels.problem import pose

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, slowly, for tests
STORAGE = torch.float16  # of unit vectors; the tests of the arithmetic around it set float32


# -- embeddings of all ranks ---------------------------------------------------------------------------------------


def _embed(
    x: Tensor, y: Tensor, tau_contrast: float | None, tau_distill: float | None, group: dist.ProcessGroup | None,
    *, wait: bool = True,
) -> tuple[Embedded, list[dist.Work]]:  # fmt: skip
    """Pass 0 and the gather of its vectors; unless `wait`, the gathers are still under way."""
    n, D = x.shape
    scale = tiles.temperatures(tau_contrast, tau_distill).scale
    world = world_size(group)
    width, pitch = tiles.padded_width(D), tiles.pitch(n * world)
    rows = pitch if world == 1 else n
    own, inverse_norm, positive = embed_triton.embed(x, y, scale=scale, width=width, pitch=rows, dtype=STORAGE)
    if world == 1:
        return Embedded(own, inverse_norm, positive), []
    z = own.new_empty((2, pitch, width))
    z[:, n * world :] = 0
    works = [dist.all_gather_into_tensor(z[v, : n * world], own[v], group=group, async_op=not wait) for v in range(2)]
    return Embedded(z, inverse_norm, positive), [work for work in works if work is not None]


# -- operators -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("dogo::embed", mutates_args=())
def embed_op(
    x: Tensor, y: Tensor, tau_contrast: float | None, tau_distill: float | None, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return tuple(_embed(x, y, tau_contrast, tau_distill, group_called(group))[0])  # type: ignore[return-value]


@embed_op.register_fake
def _(x, y, tau_contrast, tau_distill, group):
    n, D = x.shape
    shape = (2, tiles.pitch(n * world_size(group_called(group))), tiles.padded_width(D))
    return (
        x.new_empty(shape, dtype=STORAGE),
        x.new_empty((2, n), dtype=torch.float32),
        x.new_empty(n, dtype=torch.float32),
    )


@torch.library.custom_op("dogo::ntxent", mutates_args=())
def ntxent_op(
    x: Tensor, y: Tensor, z: Tensor, inverse_norm: Tensor, positive: Tensor, tau: float, group: str, gradients: bool
) -> tuple[Tensor, Tensor]:
    ranks = group_called(group)
    problem = pose(x.shape[0], (x.shape[1],), ranks, tau, None, (0.0, 0.0), False, x.device)
    with torch.cuda.device_of(x):
        loss, _, _, *grads = compute(problem, [(x, y)], [Embedded(z, inverse_norm, positive)], ranks, gradients)
    return loss, grads[0] if gradients else loss.new_empty(0)


@ntxent_op.register_fake
def _(x, y, z, inverse_norm, positive, tau, group, gradients):
    return x.new_empty((), dtype=torch.float32), forward_gradients.fake(x, gradients, torch.float32)


@torch.library.custom_op("dogo::mutual", mutates_args=())
def mutual_op(
    x_a: Tensor, y_a: Tensor, z_a: Tensor, inverse_norm_a: Tensor, positive_a: Tensor,
    x_b: Tensor, y_b: Tensor, z_b: Tensor, inverse_norm_b: Tensor, positive_b: Tensor,
    tau_contrast: float | None, tau_distill: float, weight_a: float, weight_b: float, mean: bool,
    group: str, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ranks = group_called(group)
    D = (x_a.shape[1], x_b.shape[1])
    problem = pose(x_a.shape[0], D, ranks, tau_contrast, tau_distill, (weight_a, weight_b), mean, x_a.device)
    embedded = [Embedded(z_a, inverse_norm_a, positive_a), Embedded(z_b, inverse_norm_b, positive_b)]
    with torch.cuda.device_of(x_a):
        loss_a, loss_b, terms, *grads = compute(problem, [(x_a, y_a), (x_b, y_b)], embedded, ranks, gradients)
    return loss_a, loss_b, terms, *(grads or [terms.new_empty(0), terms.new_empty(0)])  # type: ignore[return-value]


@mutual_op.register_fake
def _(
    x_a, y_a, z_a, inverse_norm_a, positive_a, x_b, y_b, z_b, inverse_norm_b, positive_b,
    tau_contrast, tau_distill, weight_a, weight_b, mean, group, gradients,
):  # fmt: skip
    scalar = [x_a.new_empty(shape, dtype=torch.float32) for shape in ((), (), (4,))]
    return *scalar, *(forward_gradients.fake(x, gradients, torch.float32) for x in (x_a, x_b))


# -- what mutual.py calls ------------------------------------------------------------------------------------------


class Gathering(NamedTuple):
    """Pass 0 of one peer under way: its local part is done, its vectors are on their way between the ranks."""

    embedded: Embedded
    works: list[dist.Work]


def start_gather(
    x: Tensor, y: Tensor, tau_contrast: float, tau_distill: float, group: dist.ProcessGroup | None
) -> Gathering:
    """Begins pass 0 of one peer for a `mutual` of the same temperatures and group."""
    with torch.no_grad(), torch.cuda.device_of(x):
        return Gathering(*_embed(x.detach(), y.detach(), tau_contrast, tau_distill, group, wait=False))


def ntxent(x: Tensor, y: Tensor, tau: float, group: dist.ProcessGroup | None) -> Tensor:
    """NT-Xent of the global batch; gradients W times the true ones."""
    embedded = embed_op(x.detach(), y.detach(), tau, None, name_of(group))
    loss, gradient = ntxent_op(x.detach(), y.detach(), *embedded, tau, name_of(group), forward_gradients.wanted(x, y))
    return forward_gradients.attach(loss, x, y, gradient)


def mutual(
    views: list[tuple[Tensor, Tensor]],
    tau_contrast: float | None,
    tau_distill: float,
    weights: tuple[float, float],
    mean: bool,
    group: dist.ProcessGroup | None,
    started: tuple[Gathering | None, Gathering | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_a, loss_b, [ntxent_a, ntxent_b, kl_a, kl_b]); the KLs alone where `tau_contrast` is None."""
    inputs: list[Tensor] = []
    for (x, y), gathering in zip(views, started, strict=True):
        if gathering is None:
            embedded = embed_op(x.detach(), y.detach(), tau_contrast, tau_distill, name_of(group))
        else:
            for work in gathering.works:
                work.wait()
            embedded = gathering.embedded
        inputs += (x.detach(), y.detach(), *embedded)
    gradients = forward_gradients.wanted(*views[0], *views[1])
    loss_a, loss_b, terms, gradient_a, gradient_b = mutual_op(
        *inputs, tau_contrast, tau_distill, float(weights[0]), float(weights[1]), mean, name_of(group), gradients
    )
    loss_a = forward_gradients.attach(loss_a, *views[0], gradient_a)
    return loss_a, forward_gradients.attach(loss_b, *views[1], gradient_b), terms
