"""Distillation terms once more from their definitions, row by row in float64: what tests of every form compare with."""

import itertools

import torch

from embeddings import embeddings

DIVERGENCES = ("kl", "reverse_kl", "jeffreys", "js")
MATRICES = (("cross_view", False), ("cross_view", True), ("all", False))  # rows, symmetric
ALL_SETTINGS = [
    (divergence, *matrix, partition)
    for divergence, matrix, partition in itertools.product(DIVERGENCES, MATRICES, (False, True))
]
TERMS = [(0, (1,)), (1, (0,)), (2, (3, 0)), (3, (0, 1, 2)), (0, (2,))]  # one to three teachers; 0 learns twice


def networks(
    N: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four networks of different widths; rows from peaked ones to flat ones."""
    made = [embeddings(N, D, 50 + D, noise) for D, noise in ((5, 0.3), (9, 0.7), (3, 5.0), (6, 1.0))]
    x, y = ([pair[view].detach().to(device, dtype).requires_grad_() for pair in made] for view in range(2))
    return list(zip(x, y, strict=True))


def distributions(x: torch.Tensor, y: torch.Tensor, tau: float, rows: str) -> list[torch.Tensor]:
    """The softmax of each row."""
    x, y = (z / (z * z).sum(dim=1, keepdim=True).sqrt() for z in (x, y))
    z, found = torch.cat((x, y)), []
    for i in range(len(z) if rows == "all" else len(x)):
        columns = [z[j] for j in range(len(z)) if j != i] if rows == "all" else list(y)
        e = torch.stack([((z[i] * column).sum() / tau).exp() for column in columns])
        found.append(e / e.sum())
    return found


def distance(p: torch.Tensor, q: torch.Tensor, divergence: str) -> torch.Tensor:
    """Between two distributions of one row, of the student and of its teachers."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum()

    m = (p + q) / 2
    return {
        "kl": lambda: kl(q, p), "reverse_kl": lambda: kl(p, q), "jeffreys": lambda: (kl(p, q) + kl(q, p)) / 2,
        "js": lambda: (kl(p, m) + kl(q, m)) / 2,
    }[divergence]()  # fmt: skip


def by_rows(views, terms, *, tau, divergence="kl", rows="cross_view", symmetric=False, partition=False, kl_reduction):
    """(losses, shares) of `similarity_distillation`, one a term."""
    p = [distributions(x, y, tau, rows) + (distributions(y, x, tau, rows) if symmetric else []) for x, y in views]
    losses, shares = [], []
    for student, teachers in terms:
        total, counted = 0.0, 0
        for i, own in enumerate(p[student]):
            q = sum(p[teacher][i].detach() for teacher in teachers) / len(teachers)
            if not partition or q.max() > own.max():
                total, counted = total + distance(own, q, divergence), counted + 1
        entries = len(views[0][0]) * (2 if rows == "all" else 1) if kl_reduction == "mean" else 1
        losses.append(total / len(p[student]) / entries)
        shares.append(counted / len(p[student]))
    return losses, shares


def gradients(losses, views) -> list[list[torch.Tensor | None]]:
    """Of each loss alone, of all embeddings."""
    flat = [z for pair in views for z in pair]
    return [list(torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)) for loss in losses]
