"""`python -m bench optimizer`: one LARS step over a network's tensors, against other ways to write it.

Yardsticks are torch's fused SGD and AdamW, which take the same tensors without norms, and a plain copy that moves as
many bytes as LARS does, were nothing found in a cache.  Parameters and gradients are float32; the rate changes with
every step, as under a schedule.  LARS is first compared with float64; a provider that is wrong is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.optim import Lars as TimmLars
from torch import Tensor, nn

from bench import harness
from bench.harness import Call, Failure, guarded
from bench.rows import RESULTS, Environment, Row, Stats, append_rows, environment, make_row
from kernels import Lars, reference

MODELS = ("resnet50", "vit_base_patch16_224")
STEP, GRAPH = "step", "step in a CUDA graph"
SECONDS, QUICK_SECONDS = 6.0, 1.5  # a mode of a model, all providers together
SMALL = 2**16  # elements of the tensors that are checked
TOLERANCE = 2e-6  # of a weight against float64, relative to its tensor's largest; rounding it twice is 1.2e-7
MOMENTUM, DECAY, ETA, RATE = 0.9, 1e-6, 1e-3, 0.1  # SimCLR's; so few steps leave the weights what they are

# Bytes a parameter: w and g for the norms, then w, g, v read and w, v written; a momentum or two without norms.
BYTES = {"sgd": 20, "adamw": 28}
LARS_BYTES = 28
COPY = "copy"


class LoopLars:
    """LARS a tensor at a time, as most code has it; waits for no GPU."""

    def __init__(self, groups: list[dict[str, Any]], lr: float | Tensor) -> None:
        self.param_groups = [{"lr": lr, "adapt": True, "weight_decay": DECAY, **group} for group in groups]
        self.momenta = {p: torch.zeros_like(p) for group in groups for p in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        """v = m v + lr r (g + wd w), w -= v."""
        for group in self.param_groups:
            for p in group["params"]:
                u = p.grad.add(p, alpha=group["weight_decay"])
                v = self.momenta[p].mul_(MOMENTUM)
                if group["adapt"]:
                    w_norm, u_norm = p.norm(), u.norm()
                    ratio = torch.where((w_norm == 0) | (u_norm == 0), 1.0, ETA * w_norm / u_norm)
                    p -= v.addcmul_(u, ratio * group["lr"])
                else:
                    p -= v.add_(u.mul_(group["lr"]))


def _lars(backend: str) -> Callable[..., Any]:
    return lambda groups, lr: Lars(groups, lr, momentum=MOMENTUM, weight_decay=DECAY, eta=ETA, backend=backend)


def _plain(groups: Iterable[dict[str, Any]]) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def _timm(groups: list[dict[str, Any]], lr: float | Tensor) -> Any:
    # Its ratio divides by |g| + wd |w|, so it is ours without weight decay; the time is the same.
    groups = [{"params": group["params"], "always_adapt": group.get("adapt", True)} for group in groups]
    return TimmLars(groups, lr, momentum=MOMENTUM, trust_coeff=ETA, eps=0.0)


# Each makes an optimizer of parameter groups and a rate.
PROVIDERS: dict[str, Callable[..., Any]] = {
    "native": _lars("native"),
    "torch": _lars("torch"),
    "loop": LoopLars,
    "timm": _timm,
    "sgd": lambda groups, lr: torch.optim.SGD(_plain(groups), lr, momentum=MOMENTUM, weight_decay=DECAY, fused=True),
    "adamw": lambda groups, lr: torch.optim.AdamW(
        _plain(groups), lr, fused=True, capturable=isinstance(lr, Tensor) and lr.is_cuda
    ),
}  # fmt: skip
OWN = ("native", "torch")


# -- one model -----------------------------------------------------------------------------------------------------


def shapes(model: str) -> list[torch.Size]:
    """Those of a timm model's parameters, without its weights."""
    with torch.device("meta"):
        return [p.shape for p in timm.create_model(model).parameters()]


def tensors(sizes: Iterable[torch.Size], device: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator).mul_(0.05).to(device)) for size in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return params


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Weights, and what has one axis: neither adapted nor decayed."""
    plain = {"params": [p for p in params if p.ndim <= 1], "adapt": False, "weight_decay": 0.0}
    return [{"params": [p for p in params if p.ndim > 1]}, plain]


def error(name: str, sizes: Iterable[torch.Size], device: torch.device) -> float:
    """The worst weight after two steps against float64, relative to its tensor's largest."""
    params = tensors((size for size in sizes if size.numel() <= SMALL), device)
    wanted = [
        (p.detach().cpu().double(), p.grad.cpu(), torch.zeros(p.shape).double()) for p in params if p.grad is not None
    ]
    optimizer = PROVIDERS[name](groups_of(params), RATE)
    for _ in range(2):
        optimizer.step()
    worst = 0.0
    for p, (w, g, v) in zip(params, wanted, strict=True):
        for _ in range(2):
            w, v = reference.lars_step(
                w, g, v, lr=RATE, momentum=MOMENTUM, eta=ETA, adapt=p.ndim > 1,
                weight_decay=DECAY if p.ndim > 1 and name != "timm" else 0.0,
            )  # fmt: skip
        worst = max(worst, ((p.detach().cpu() - w).abs().max() / w.abs().max()).item())
    return worst


def measure(model: str, mode: str, env: Environment, seconds: float, wrong: list[str]) -> list[Row]:
    """Times and peak memory of all providers in turns; appends to `wrong` which of ours failed its check."""
    sizes = shapes(model)
    params = tensors(sizes, env.device)  # shared: what they hold does not change the time
    numel = sum(p.numel() for p in params)
    source = torch.ones(LARS_BYTES // 2 * numel // 4, device=env.device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {COPY: lambda i: target.copy_(source)}
    for name in PROVIDERS:
        found = 0.0 if name in BYTES else guarded(partial(error, name, sizes, env.device))
        call = found if isinstance(found, Failure) else guarded(partial(_call, name, params, mode, env.device))
        if isinstance(call, Failure):
            print(f"{model}, {mode}: {name}: left out: {call.reason}")
        elif not (isinstance(found, float) and found <= TOLERANCE):
            print(f"{model}, {mode}: {name}: left out, FAILED its check: error {found:.1e}, allowed {TOLERANCE:.0e}")
            wrong += [name] if name in OWN else []
        else:
            calls[name] = call
    timed = harness.timed(calls, env.device, seconds)
    for name, failure in timed.failures.items():
        print(f"{model}, {mode}: {name}: {failure.reason}")
    case = {"model": model, "tensors": len(params), "parameters": numel, "grads": "float32", "mode": mode}
    copied = timed.stats[COPY].p50
    rows = []
    for name, stats in timed.stats.items():
        floor = None if name == COPY else copied * BYTES.get(name, LARS_BYTES) / LARS_BYTES
        rows.append(make_row(env, "optimizer", case, name, "ms", stats, floor))
        if name != COPY and mode != GRAPH:
            peak = harness.peak_bytes(partial(calls[name], 0), env.device)
            rows.append(make_row(env, "optimizer", case, name, "bytes", Stats(peak, peak, peak, 1), 0.0))
    return rows


def _call(name: str, params: list[nn.Parameter], mode: str, device: torch.device) -> Call:
    rate: float | Tensor = RATE if mode == STEP else torch.tensor(RATE, device=device)
    optimizer = PROVIDERS[name](groups_of(params), rate)
    if mode == GRAPH:
        replay = harness.captured(optimizer.step)
        return lambda i: (replay(), optimizer)[0]  # held here: the graph reads the optimizer's memory

    def step(i: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + i)
        optimizer.step()

    return step


# -- the command ---------------------------------------------------------------------------------------------------

COLUMNS = ("model", "mode", "provider", "ms", "p20 - p80", "of copy", "vs adamw", "vs foreach", "MiB")


def cells(rows: list[Row]) -> list[list[str]]:
    """The newest measurement of each case and provider, as COLUMNS have it."""
    newest = {(row.case["model"], row.case["mode"], row.provider, row.metric): row for row in rows}
    lines = []
    for (model, mode, name, metric), row in newest.items():
        if metric != "ms":
            continue
        others = [newest.get((model, mode, other, "ms")) for other in ("adamw", "torch")]
        peak = newest.get((model, mode, name, "bytes"))
        lines.append([
            model, mode, name, f"{row.p50:.4g}", f"{row.p20:.4g} - {row.p80:.4g}",
            "-" if row.floor is None else f"{row.floor / row.p50:.0%}",
            *("-" if other is None else f"{row.p50 / other.p50:.2f}x" for other in others),
            "-" if peak is None else f"{peak.p50 / 2**20:,.1f}",
        ])  # fmt: skip
    return lines


def main(argv: list[str]) -> int:
    """Measures, prints and appends rows; 1 where one of our own providers is wrong."""
    parser = argparse.ArgumentParser("python -m bench optimizer", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{MODELS[0]} alone, shorter")
    parser.add_argument("--models", type=lambda text: text.split(","), metavar="NAME,...", help="of timm")
    parser.add_argument("--no-write", action="store_true", help="no rows")
    options = parser.parse_args(argv)
    env = environment(["optimizer", *argv])
    wrong: list[str] = []
    measured: list[Row] = []
    for model in options.models or (MODELS[:1] if options.quick else MODELS):
        for mode in (STEP, GRAPH) if env.device.type == "cuda" else (STEP,):
            rows = measure(model, mode, env, QUICK_SECONDS if options.quick else SECONDS, wrong)
            measured += rows
            if not options.no_write:
                append_rows(rows, RESULTS / env.folder / "optimizer.jsonl")
            harness.release_memory()
    table = Table(*COLUMNS, title=f"one step on {env.device_name}", title_justify="left")
    for line in cells(measured):
        table.add_row(*line)
    Console(width=140).print(table)
    for name in dict.fromkeys(wrong):
        print(f"bench: {name} failed its check")
    return 1 if wrong else 0
