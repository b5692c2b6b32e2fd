"""Embeddings that tests of the losses share."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def embeddings(N: int, D: int, seed: int, noise: float = 0.7) -> list[torch.Tensor]:
    """Two views in float64; the smaller the noise, the more a row's softmax is its positive alone."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return [
        (base + noise * torch.randn(N, D, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
    ]


def on_device(exact: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [z.detach().to(DEVICE, dtype).requires_grad_() for z in exact]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.detach().cpu().double() - wanted.detach()).norm() / wanted.detach().norm()).item()
