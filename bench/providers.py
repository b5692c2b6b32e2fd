"""The providers of `python -m bench loss`: what each is, its inputs, one step of it, and the check of its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench import baselines
from bench.baselines import TAU_CONTRAST, TAU_DISTILL, LossFunction, Unavailable, both_peers
from kernels import mutual_loss, native, ntxent_loss, reference

FORWARD, BACKWARD = "forward", "forward+backward"
GRAPH = "forward+backward in a CUDA graph"  # what the GPU alone takes; small sizes wait for the host otherwise

CHECK_ROWS = 256
# Of losses and gradients against float64, relative, by the number format of the products.  TF32 and float16 keep 11
# bits; a whole gradient's error is about 2e-4 with them and 2e-3 with bfloat16, so these bounds catch mistakes alone.
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 2e-2}

Views = tuple[Tensor, Tensor, Tensor, Tensor]  # x_a, y_a, x_b, y_b, each [N, D]


class Provider(NamedTuple):
    """One way to compute a loss."""

    name: str
    build: Callable[[str, torch.device, int], LossFunction]  # of loss, device and D; may raise Unavailable
    products: str  # number format of its matrix products on a GPU; float32 on a CPU
    work: tuple[float, float] | None  # FLOP / (M^2 D) of both peers: forward, forward and backward
    quantity: str | None = None  # what it computes where that is not the case's loss
    capturable: bool = True  # False where it waits for the GPU on its way, which a CUDA graph cannot hold
    held: Callable[[int, int], float] = lambda M, D: 0.0  # bytes that a step needs at least, of M and D

    def products_on(self, device: torch.device) -> str:
        """Number format of the products on a device."""
        return self.products if device.type == "cuda" else "float32"


# Measured: 7 to 8 float32 matrices M x M, and 9 tensors M x M x D of the official formulation.
def _matrices(M: int, D: int) -> float:
    return 8 * 4.0 * M * M


def _broadcasts(M: int, D: int) -> float:
    return 9 * 4.0 * M * M * D


def _ours(backend: str) -> Callable[[str, torch.device, int], LossFunction]:
    def build(loss: str, device: torch.device, D: int) -> LossFunction:
        if backend == "triton" and device.type != "cuda":
            raise Unavailable("runs on GPUs only; the interpreter is not timed")
        if backend == "native" and (device.type != "cpu" or native.missing):
            raise Unavailable(native.missing or "runs on CPUs only")
        if loss == "ntxent":
            return both_peers(lambda x, y: ntxent_loss(x, y, tau=TAU_CONTRAST, backend=backend))

        def mutual(x_a: Tensor, y_a: Tensor, x_b: Tensor, y_b: Tensor) -> tuple[Tensor, Tensor]:
            both = mutual_loss(x_a, y_a, x_b, y_b, tau_contrast=TAU_CONTRAST, tau_distill=TAU_DISTILL, backend=backend)
            return both.loss_a, both.loss_b

        return mutual

    return build


def _triton_twice(loss: str, device: torch.device, D: int) -> LossFunction:
    if loss == "ntxent":
        raise Unavailable("is `triton` itself for this loss")
    return _ours("triton")("ntxent", device, D)


TWO_NTXENT = "triton, two ntxent"  # beside `triton` it tells what the KL costs
OWN = ("triton", TWO_NTXENT, "native", "torch")
PROVIDERS = (
    Provider("triton", _ours("triton"), "float16", (2, 10)),
    Provider(TWO_NTXENT, _triton_twice, "float16", (2, 10), "ntxent"),
    Provider("native", _ours("native"), "float32", (3, 8)),
    Provider("torch", _ours("torch"), "tf32", (4, 12), held=_matrices),
    Provider("eager", baselines.build_eager, "tf32", (4, 12), held=_matrices),
    Provider("compiled", baselines.build_compiled, "tf32", (4, 12), held=_matrices),
    Provider("official", baselines.build_official, "float32", None, capturable=False, held=_broadcasts),
    Provider("lightly", baselines.build_lightly, "tf32", (4, 12), capturable=False, held=_matrices),
    Provider("memeff", baselines.build_memeff, "tf32", (4, 20), "selfish"),
    Provider("memeff-bf16", baselines.build_memeff_bf16, "bfloat16", (4, 20), "selfish"),
    Provider("inf-cl", baselines.build_inf_cl, "tf32", (4, 20), "selfish"),
)


# -- one step ------------------------------------------------------------------------------------------------------


def make_views(M: int, D: int, device: torch.device, seed: int = 0) -> Views:
    """Embeddings of M / 2 images as training makes them: both views and both peers share a part."""
    generator = torch.Generator(device).manual_seed(seed)
    shared, *own = (torch.randn(M // 2, D, device=device, generator=generator) for _ in range(5))
    x_a, y_a, x_b, y_b = ((shared + view).requires_grad_() for view in own)
    return x_a, y_a, x_b, y_b


def step(loss: LossFunction, views: Views, mode: str) -> tuple[Tensor, ...]:
    """The losses of both peers, or the gradients of their sum with respect to the four views."""
    if mode == FORWARD:
        with torch.no_grad():
            return loss(*views)
    return torch.autograd.grad(loss(*views), views)


# -- check ---------------------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Relative errors against float64: the larger of both losses', and that of all gradients together."""

    loss: float
    gradient: float


def reference_losses(quantity: str, views: Views) -> tuple[Tensor, Tensor]:
    """Both peers' losses by the plain formulas, in the inputs' dtype."""
    x_a, y_a, x_b, y_b = views
    if quantity == "selfish":
        return baselines.selfish(x_a, y_a), baselines.selfish(x_b, y_b)
    ntxent_a, ntxent_b = (reference.ntxent(x, y, tau=TAU_CONTRAST) for x, y in ((x_a, y_a), (x_b, y_b)))
    if quantity == "ntxent":
        return ntxent_a, ntxent_b
    kl_a, kl_b = reference.similarity_kl(*views, tau=TAU_DISTILL)
    return ntxent_a + kl_a, ntxent_b + kl_b


def errors(loss: LossFunction, quantity: str, D: int, device: torch.device, rows: int = CHECK_ROWS) -> Errors:
    """How far a loss function is from the float64 formula of the quantity, on random embeddings."""
    x_a, y_a, x_b, y_b = (view.detach() for view in make_views(rows, D, torch.device("cpu")))
    given = tuple(view.to(device).requires_grad_() for view in (x_a, y_a, x_b, y_b))
    exact = tuple(view.double().requires_grad_() for view in (x_a, y_a, x_b, y_b))
    actual, expected = loss(*given), reference_losses(quantity, exact)  # type: ignore[arg-type]
    off = max(abs(a.item() / e.item() - 1) for a, e in zip(actual, expected, strict=True))
    gradients = torch.cat([g.double().cpu() for g in torch.autograd.grad(actual, given)])
    true = torch.cat(torch.autograd.grad(expected, exact))
    return Errors(off, float((gradients - true).norm() / true.norm()))
