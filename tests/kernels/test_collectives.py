"""Collectives with gradients: against the same numbers on one process, without a group, and in a compiled graph."""

import pytest
import torch
import torch.distributed as dist

from kernels import collectives
from ranks import run_ranks

COLLECTIVES = (collectives.sum_over_ranks, collectives.gather_rows)


def rows_of(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, 5, generator=generator, dtype=torch.float64)


def weights_of(rank: int, rows: int) -> torch.Tensor:
    """What each rank multiplies by is its own, so that a gradient which is not summed over ranks shows."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(rows, 5, generator=generator, dtype=torch.float64)


def loss_of_one_rank(collective, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights * collective(x, dist.group.WORLD) ** 3).sum()


def values_and_gradients(world: int) -> dict[str, list]:
    dist.init_process_group("gloo")
    found = {}
    for collective in COLLECTIVES:
        name = collective.__name__
        x = rows_of(dist.get_rank()).requires_grad_()
        with torch.no_grad():
            value = collective(x, dist.group.WORLD)
        weights = weights_of(dist.get_rank(), len(value))
        (gradient,) = torch.autograd.grad(loss_of_one_rank(collective, x, weights), x)
        compiled = torch.compile(loss_of_one_rank, fullgraph=True, backend="aot_eager")
        (of_compiled,) = torch.autograd.grad(compiled(collective, x, weights), x)
        found[name] = [tensor.numpy() for tensor in (value, gradient, of_compiled)]
    transposed = rows_of(dist.get_rank()).T
    found["transposed"] = [collectives.sum_over_ranks(transposed, dist.group.WORLD).numpy()]
    dist.destroy_process_group()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_values_and_gradients_are_those_of_one_process(world):
    x = [rows_of(rank).requires_grad_() for rank in range(world)]
    total, every = x[0], torch.cat(x)
    for other in x[1:]:
        total = total + other
    wanted = {}
    for name, value in (("sum_over_ranks", total), ("gather_rows", every)):
        loss = sum((weights_of(rank, len(value)) * value**3).sum() for rank in range(world))
        wanted[name] = value, torch.autograd.grad(loss, x, retain_graph=True)

    for rank, found in enumerate(run_ranks(values_and_gradients, world, world)):
        for name, (value, gradients) in wanted.items():
            for tensor, expected in zip(found[name], (value, gradients[rank], gradients[rank]), strict=True):
                torch.testing.assert_close(torch.from_numpy(tensor), expected.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(torch.from_numpy(found["transposed"][0]), total.detach().T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_without_a_group_nothing_happens(collective):
    x = rows_of(0)
    assert collective(x, None) is x


def second_derivative_of_one_rank() -> torch.Tensor:
    dist.init_process_group("gloo")
    x = rows_of(dist.get_rank()).requires_grad_()
    loss = loss_of_one_rank(collectives.sum_over_ranks, x, weights_of(dist.get_rank(), 3))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    dist.destroy_process_group()
    return second.numpy()


@pytest.mark.slow
def test_the_sum_has_a_second_derivative():
    x = [rows_of(rank).requires_grad_() for rank in range(2)]
    total = x[0] + x[1]
    loss = sum((weights_of(rank, 3) * total**3).sum() for rank in range(2))
    gradients = torch.autograd.grad(loss, x, create_graph=True)
    wanted = torch.autograd.grad(gradients[0].sum() + gradients[1].sum(), x)
    for found, expected in zip(run_ranks(second_derivative_of_one_rank, 2), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-13, atol=1e-13)


def replaced_value_of_one_rank() -> tuple[float, float, float]:
    dist.init_process_group("gloo")
    local = torch.tensor([1.5, 4.0][dist.get_rank()], requires_grad=True)
    loss = collectives.global_mean(local, dist.group.WORLD)
    (gradient,) = torch.autograd.grad(3 * loss, local)
    infinite = collectives.global_mean(torch.tensor([1.0, float("inf")][dist.get_rank()]), dist.group.WORLD)
    dist.destroy_process_group()
    return loss.item(), infinite.item(), gradient.item()


@pytest.mark.slow
def test_a_global_mean_keeps_the_gradient_of_this_rank():
    for found in run_ranks(replaced_value_of_one_rank, 2):
        assert found == (2.75, float("inf"), 3.0)
