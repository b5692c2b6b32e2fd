"""`python -m bench terms`: forward and backward of losses of one network and of distillation terms, ours and plain.

Plain is autograd over whole matrices in PyTorch (baselines.py).  Inputs are raw float32 embeddings; distillation terms
are those of all peers, each with the others as its teachers.  On a GPU float32 products run as TF32, and those of the
fused kernels in float16.  Both forms are first compared with the plain one in float64, and a wrong one is not timed.
Peak memory counts all that a step allocates, its gradients too, but not its inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines, harness
from bench.harness import Failure, guarded
from bench.loss import integers
from bench.providers import BACKWARD, TOLERANCE, Errors
from bench.rows import RESULTS, Environment, Row, Stats, append_rows, environment, make_row
from kernels import barlow_twins_loss, graph_alignment, moco_loss, similarity_distillation, vicreg_loss

OURS, PLAIN = "ours", "plain"
K = 65536  # keys in the queue: MoCo's
SECONDS, QUICK_SECONDS = 2.0, 0.3  # a size of a case, both forms together
CHECK_N = 64

Tensors = tuple[Tensor, ...]
Loss = Callable[..., Tensor | Tensors]  # of a case's inputs


# -- cases ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A loss in two forms."""

    name: str
    sizes: tuple[int, ...]  # images N
    D: int
    inputs: Callable[[int, int, torch.device, int], Tensors]  # of N, D, device and seed
    ours: Loss
    plain: Loss
    products: str = "tf32"  # number format of our matrix products on a GPU
    more: Mapping[str, int] = {}  # further sizes


def embeddings(count: int, N: int, D: int, device: torch.device, seed: int) -> Tensors:
    """`count` views of the same N images, by any network, as training makes them: all share a part."""
    generator = torch.Generator(device).manual_seed(seed)
    shared, *own = (torch.randn(N, D, device=device, generator=generator) for _ in range(1 + count))
    return tuple((shared + view).requires_grad_() for view in own)


def _queries_and_keys(N: int, D: int, device: torch.device, seed: int) -> Tensors:
    q_x, q_y, k_x, k_y = embeddings(4, N, D, device, seed)
    (keys,) = embeddings(1, K, D, device, ~seed)  # of the same seed, some would be of these images
    return q_x, q_y, k_x.detach(), k_y.detach(), F.normalize(keys.detach(), dim=1)


def _pairs(views: Tensors) -> list[tuple[Tensor, Tensor]]:
    return list(zip(views[::2], views[1::2], strict=True))


def _distillation(name: str, *, peers: int = 2, products: str = "tf32", **options: Any) -> Case:
    terms = [(student, tuple(other for other in range(peers) if other != student)) for student in range(peers)]

    def ours(*views: Tensor) -> Tensors:
        return similarity_distillation(_pairs(views), terms, tau=baselines.TAU_DISTILL, **options).losses

    def plain(*views: Tensor) -> Tensors:
        return baselines.eager_distillation(_pairs(views), terms, **options)

    return Case(name, (1024, 4096), 128, partial(embeddings, 2 * peers), ours, plain, products)


def _both_ways(alignment: Callable[[Any, Any], Tensor]) -> Loss:
    def loss(*views: Tensor) -> Tensors:
        a, b = _pairs(views)
        return alignment(a, b), alignment(b, a)

    return loss


CASES = (
    Case("moco", (256,), 128, _queries_and_keys, moco_loss, baselines.eager_moco, more={"K": K}),
    Case("barlow_twins", (512,), 2048, partial(embeddings, 2), barlow_twins_loss, baselines.eager_barlow_twins),
    Case("vicreg", (512,), 2048, partial(embeddings, 2), vicreg_loss, baselines.eager_vicreg),
    _distillation("kl", products="float16"),
    _distillation("kl-symmetric", products="float16", symmetric=True),
    _distillation("reverse_kl", divergence="reverse_kl"),
    _distillation("jeffreys", divergence="jeffreys"),
    _distillation("js", divergence="js"),
    _distillation("js-partition", divergence="js", partition=True),
    _distillation("kl-rows-all", rows="all"),
    _distillation("kl-three-peers", peers=3),
    Case(
        "graph", (1024, 4096), 128, partial(embeddings, 4),
        _both_ways(lambda student, teacher: graph_alignment(student, [teacher])), _both_ways(baselines.eager_graph),
    ),
)  # fmt: skip


# -- one case ------------------------------------------------------------------------------------------------------


def step(loss: Loss, sets: Sequence[Tensors], i: int) -> Tensors:
    """The gradients of the sum of all losses."""
    tensors = sets[i % len(sets)]
    return torch.autograd.grad(loss(*tensors), [z for z in tensors if z.requires_grad])


def outcome(loss: Loss, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The losses, and the gradients of their sum in one vector, in float64."""
    found = loss(*tensors)
    losses = torch.stack(found if isinstance(found, tuple) else (found,))
    gradients = torch.autograd.grad(losses.sum(), [z for z in tensors if z.requires_grad])
    return losses.detach().cpu().double(), torch.cat([g.flatten() for g in gradients]).cpu().double()


def errors(case: Case, loss: Loss, device: torch.device, N: int = CHECK_N) -> Errors:
    """How far a form is from the plain one in float64."""
    drawn = case.inputs(N, case.D, torch.device("cpu"), 0)
    losses, gradient = outcome(loss, [z.detach().to(device).requires_grad_(z.requires_grad) for z in drawn])
    exact, true = outcome(case.plain, [z.detach().double().requires_grad_(z.requires_grad) for z in drawn])
    return Errors(float((losses / exact - 1).abs().max()), float((gradient - true).norm() / true.norm()))


def checked(case: Case, env: Environment, wrong: list[str]) -> dict[str, Loss]:
    """The forms that compute the case; names those that do not, and appends them to `wrong`."""
    forms = {}
    for name, loss in ((OURS, case.ours), (PLAIN, case.plain)):
        found, allowed = guarded(partial(errors, case, loss, env.device)), TOLERANCE[_products(case, name, env.device)]
        if isinstance(found, Failure):
            told = found.reason
        elif found.loss <= allowed and found.gradient <= allowed:  # in this order, so that NaN is wrong too
            forms[name] = loss
            continue
        else:
            told = f"loss error {found.loss:.1e}, gradient error {found.gradient:.1e}, allowed {allowed:.0e}"
        print(f"{case.name}: {name}: left out, FAILED its check: {told}")
        wrong.append(f"{case.name}, {name}")
    return forms


def measure(case: Case, N: int, forms: Mapping[str, Loss], env: Environment, options: argparse.Namespace) -> list[Row]:
    """Time and memory of each form that computes the case, in turns."""
    sets = [case.inputs(N, case.D, env.device, 0)]
    count = harness.input_sets(sum(z.nbytes for z in sets[0]), env.device)
    sets += [case.inputs(N, case.D, env.device, seed) for seed in range(1, count)]
    calls = {name: partial(step, loss, sets) for name, loss in forms.items()}
    seconds = QUICK_SECONDS if options.quick else SECONDS
    timed = harness.timed(calls, env.device, seconds, rounds=options.rounds)
    for name, failure in timed.failures.items():
        print(f"{case.name}, N = {N:,}: {name}: {failure.reason}")
    rows = []
    for name, stats in timed.stats.items():
        described = {
            "term": case.name, "N": N, "D": case.D, **case.more, "mode": BACKWARD, "inputs": "float32",
            "products": _products(case, name, env.device),
        }  # fmt: skip
        peak = harness.peak_bytes(partial(calls[name], 0), env.device)
        for metric, found in (("ms", stats), ("bytes", Stats(peak, peak, peak, 1))):
            rows.append(make_row(env, "terms", described, name, metric, found, None))
    harness.release_memory()
    return rows


def _products(case: Case, name: str, device: torch.device) -> str:
    if device.type == "cpu":
        return "float32"
    return case.products if name == OURS else "tf32"


# -- the command ---------------------------------------------------------------------------------------------------


def size_of(case: Mapping[str, Any]) -> str:
    """A row's size."""
    return ", ".join(f"{letter} = {case[letter]:,}" for letter in ("N", "D", "K") if letter in case)


def line(rows: list[Row]) -> str:
    """What was measured of one size of a case."""
    said = [
        f"{row.provider} {row.p50:.4g} ms ({row.p20:.4g} - {row.p80:.4g}), {memory.p50 / 2**20:,.1f} MiB"
        for row, memory in zip(rows[::2], rows[1::2], strict=True)
    ]
    return f"{rows[0].case['term']}, {size_of(rows[0].case)}: {'; '.join(said)}"


def _names(text: str) -> list[str]:
    names, known = text.split(","), [case.name for case in CASES]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: unknown; allowed: {', '.join(known)}")
    return names


def main(argv: list[str]) -> int:
    """Measures, prints and appends rows; 1 where a form is wrong."""
    parser = argparse.ArgumentParser("python -m bench terms", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest size of each case, shorter")
    parser.add_argument("--cases", type=_names, metavar="NAME,...", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--sizes", type=integers, metavar="N,...", help="images, in place of each case's own")
    parser.add_argument("--rounds", type=int, help=f"timed calls of each; default: {SECONDS:g} s of them, at least 5")
    parser.add_argument("--no-write", action="store_true", help="no rows")
    options = parser.parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"argument --rounds: at least 1 is needed, found {options.rounds}")
    env = environment(["terms", *argv])
    if env.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    wrong: list[str] = []
    for case in CASES:
        if options.cases and case.name not in options.cases:
            continue
        forms = checked(case, env, wrong)
        for N in options.sizes or (case.sizes[:1] if options.quick else case.sizes):
            if rows := measure(case, N, forms, env, options):
                print(line(rows), flush=True)
            if not options.no_write:
                append_rows(rows, RESULTS / env.folder / "terms.jsonl")
    for what in wrong:
        print(f"bench: {what} failed its check")
    return 1 if wrong else 0
