"""`python -m bench loss`: time and peak memory of the losses, over rows M = 2N and embedding width D.

Inputs are float32 embeddings.  On a GPU, PyTorch's and the other libraries' float32 products run as TF32, the fastest
that they have; the table names each provider's number format and its work.  Each provider's losses and gradients are
first compared with float64; one that fails is reported and not timed.  Peak memory counts everything that a step
allocates, its gradients too, but not its inputs.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, NamedTuple

import torch

from bench import harness, limits, loss_report, providers
from bench.baselines import LossFunction, Unavailable
from bench.harness import Call, Failure, guarded
from bench.providers import BACKWARD, FORWARD, GRAPH, Provider, Views
from bench.rows import RESULTS, Environment, Row, Stats, append_rows, environment, make_row

SIZES = {"cuda": (512, 2048, 8192, 32768, 65536, 131072), "cpu": (256, 1024, 4096, 8192, 16384)}
QUICK_SIZES = {"cuda": (2048, 8192, 65536), "cpu": (256, 1024)}
WIDTH, OTHER_WIDTHS = 128, (64, 256, 512)
OTHER_WIDTHS_AT = {"cuda": 8192, "cpu": 1024}
MILLION = 2**20
LARGEST_GRAPH = 8192  # above it, launches are no part of the time
OFFICIAL_BYTES = {"cuda": 20 * 2**30, "cpu": 2 * 2**30}  # of one M x M x D tensor; a step holds nine
SECONDS, QUICK_SECONDS = 2.0, 0.7  # a mode of a case, all providers together


class Case(NamedTuple):
    """One point of the benchmark."""

    loss: str
    M: int
    D: int
    only: tuple[str, ...] = ()  # providers; all where empty

    def modes(self, device: torch.device) -> tuple[str, ...]:
        """What is measured of it."""
        small = device.type == "cuda" and self.M <= LARGEST_GRAPH
        return (FORWARD, BACKWARD, GRAPH) if small else (FORWARD, BACKWARD)


# -- options -------------------------------------------------------------------------------------------------------


def _rows(text: str) -> tuple[int, ...]:
    sizes = integers(text)
    if any(M % 2 or M < 4 for M in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: rows M = 2N, so even numbers from 4")
    return sizes


def _providers(text: str) -> tuple[str, ...]:
    names, known = tuple(text.split(",")), [provider.name for provider in providers.PROVIDERS]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: unknown; allowed: {', '.join(known)}")
    return names


def integers(text: str) -> tuple[int, ...]:
    """Positive integers of an option."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: positive integers with commas between them are expected")
    return values


def parse(argv: list[str], device: str) -> argparse.Namespace:
    """The options; exits with status 2 on bad ones."""
    parser = argparse.ArgumentParser("python -m bench loss", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter: about a minute on a GPU")
    parser.add_argument("--sizes", type=_rows, metavar="M,...", help="rows M = 2N, each with every width")
    parser.add_argument(
        "--widths", type=integers, metavar="D,...", help="embedding widths; alone: at M = 8192 (1024 on a CPU)"
    )
    parser.add_argument("--loss", choices=("mutual", "ntxent"), default="mutual", help="default: %(default)s")
    parser.add_argument("--providers", type=_providers, metavar="NAME,...", default=(), help="these alone")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile on a CPU too")
    parser.add_argument("--million", action="store_true", help="M = 1,048,576 too, `triton` alone")
    parser.add_argument("--no-write", action="store_true", help="neither rows nor plot")
    parser.add_argument("--plot-only", action="store_true", help="redraw the plots from the rows that there are")
    options = parser.parse_args(argv)
    if options.million and device != "cuda":
        parser.error("--million: needs a GPU")
    return options


def cases(options: argparse.Namespace, device: str) -> list[Case]:
    """The points that the options ask for."""
    sizes = options.sizes or (OTHER_WIDTHS_AT[device],)
    points = [(M, D) for D in options.widths or (WIDTH,) for M in sizes]
    if not (options.sizes or options.widths):
        points = [(M, WIDTH) for M in (QUICK_SIZES if options.quick else SIZES)[device]]
        if device == "cuda" and not options.quick:
            points += [(OTHER_WIDTHS_AT[device], D) for D in OTHER_WIDTHS]
    found = [Case(options.loss, M, D, options.providers) for M, D in points]
    return [*found, Case(options.loss, MILLION, WIDTH, ("triton",))] if options.million else found


# -- one case ------------------------------------------------------------------------------------------------------


class Bench:
    """One run: the machine, and what has been checked and told."""

    def __init__(self, env: Environment, *, seconds: float, compiled: bool) -> None:
        self.env = env
        self.seconds = seconds  # a mode of a case
        self.compiled = compiled
        self.wrong: list[str] = []  # our own providers that failed their check
        self.gradient_errors: dict[str, float] = {}  # the worst of each provider
        self._right: dict[tuple[str, str, int], bool] = {}
        self._told: set[tuple[str, str]] = set()

    def run(self, case: Case) -> list[Row]:
        """All modes of one case, all providers in turns."""
        device = self.env.device
        taking_part = [p for p in providers.PROVIDERS if not case.only or p.name in case.only]
        functions = {p: f for p in taking_part if (f := self._prepared(p, case)) is not None}
        count = harness.input_sets(4 * 4 * (case.M // 2) * case.D, device)
        sets = [providers.make_views(case.M, case.D, device, seed) for seed in range(count)]
        rows = [row for mode in case.modes(device) for row in self._measure(case, mode, functions, sets)]
        harness.release_memory()
        return rows

    def _measure(self, case: Case, mode: str, functions: dict[Provider, LossFunction], sets: list[Views]) -> list[Row]:
        calls: dict[str, Call] = {}
        for provider, function in functions.items():
            if mode == GRAPH and not provider.capturable:
                continue
            call = guarded(partial(_call, function, sets, mode))
            if isinstance(call, Failure):
                _say(case, f"{provider.name}, {mode}", call.reason)
            else:
                calls[provider.name] = call
        result = harness.timed(calls, self.env.device, self.seconds)
        for name, failure in result.failures.items():
            _say(case, f"{name}, {mode}", failure.reason)
        if result.retries:
            _say(case, mode, f"memory was reorganised {result.retries} times while the clock ran; see p80")
        rows = []
        for provider in functions:
            if provider.name in result.stats:
                rows.append(self._row(case, mode, provider, "ms", result.stats[provider.name]))
                rows += self._memory(case, mode, provider, calls[provider.name])
        return rows

    def _memory(self, case: Case, mode: str, provider: Provider, call: Call) -> list[Row]:
        if mode == GRAPH:  # its memory stays allocated between replays
            return []
        peak = guarded(partial(harness.peak_bytes, partial(call, 0), self.env.device))
        if isinstance(peak, Failure):
            _say(case, f"{provider.name}, {mode}, memory", peak.reason)
            return []
        return [self._row(case, mode, provider, "bytes", Stats(peak, peak, peak, 1))]

    def _row(self, case: Case, mode: str, provider: Provider, metric: str, stats: Stats) -> Row:
        described: dict[str, Any] = {
            "loss": case.loss, "M": case.M, "D": case.D, "mode": mode, "inputs": "float32",
            "products": provider.products_on(self.env.device),
        }  # fmt: skip
        floor: float | None
        if metric == "ms":
            distill = (provider.quantity or case.loss) == "mutual"
            works = limits.passes(case.M, case.D, distill=distill, backward=mode != FORWARD)
            floor = limits.floor_ms(works, self.env.device_name)
        else:  # the gradients themselves
            floor = None if mode == FORWARD else 4.0 * 2 * case.M * case.D
        return make_row(self.env, "loss", described, provider.name, metric, stats, floor)

    # -- which providers take part

    def _prepared(self, provider: Provider, case: Case) -> LossFunction | None:
        """The provider's loss function, checked; None, with the reason printed once, where it cannot take part."""
        try:
            self._refuse(provider, case)
            function = provider.build(case.loss, self.env.device, case.D)
        except Unavailable as why:
            if (provider.name, str(why)) not in self._told:
                self._told.add((provider.name, str(why)))
                _say(case, provider.name, f"left out: {why}")
            return None
        key = (provider.name, case.loss, case.D)
        if key not in self._right:
            self._right[key] = self._check(provider, function, case)
        return function if self._right[key] else None

    def _refuse(self, provider: Provider, case: Case) -> None:
        kind = self.env.device.type
        if provider.name == "compiled" and kind == "cpu" and not self.compiled:
            raise Unavailable("compiling takes long on a CPU (--compiled)")
        broadcast = 4 * case.M**2 * case.D
        if provider.name == "official" and broadcast > OFFICIAL_BYTES[kind]:
            raise Unavailable(f"one M x M x D tensor is over {OFFICIAL_BYTES[kind] / 2**30:g} GiB")
        # Without a GPU's allocator, too large a case would end this process, not the call.
        needed, free = provider.held(case.M, case.D), harness.available_bytes()
        if kind == "cpu" and free is not None and needed > free:
            raise Unavailable(f"out of memory: about {needed / 2**30:.1f} GiB are needed")

    def _check(self, provider: Provider, function: LossFunction, case: Case) -> bool:
        quantity = provider.quantity or case.loss
        found = guarded(partial(providers.errors, function, quantity, case.D, self.env.device))
        tolerance = providers.TOLERANCE[provider.products_on(self.env.device)]
        refused = isinstance(found, Failure) and found.reason.startswith("ValueError")  # a width, a device
        if isinstance(found, Failure):
            right, told = False, found.reason
        else:
            right = found.loss <= tolerance and found.gradient <= tolerance  # in this order, so that NaN is wrong too
            worst = max(found.gradient, self.gradient_errors.get(provider.name, 0.0))
            self.gradient_errors[provider.name] = worst
            told = f"loss error {found.loss:.1e}, gradient error {found.gradient:.1e}, allowed {tolerance:.0e}"
        verdict = "checked" if right else "left out" if refused else "left out, FAILED its check"
        _say(case, provider.name, f"{verdict}: {told}")
        if not (right or refused) and provider.name in providers.OWN:
            self.wrong.append(provider.name)
        return right


def _say(case: Case, who: str, what: str) -> None:
    print(f"{case.loss}, M = {case.M}, D = {case.D}: {who}: {what}", flush=True)


def _call(function: LossFunction, sets: list[Views], mode: str) -> Call:
    if mode != GRAPH:
        return lambda i: providers.step(function, sets[i % len(sets)], mode)
    replay = harness.captured(lambda: providers.step(function, sets[0], BACKWARD))
    return lambda i: replay()


# -- the command ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Measures, prints, appends rows and draws; 1 where one of our own providers is wrong."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    options = parse(argv, kind)
    if options.plot_only:
        for path in sorted(RESULTS.glob("*/loss.jsonl")):
            loss_report.plot(path)
        return 0
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    env = environment(["loss", *argv])
    path = RESULTS / env.folder / "loss.jsonl"
    bench = Bench(env, seconds=QUICK_SECONDS if options.quick else SECONDS, compiled=options.compiled)
    measured: list[Row] = []
    for case in cases(options, kind):
        rows = bench.run(case)
        loss_report.print_case(rows)
        if not options.no_write:
            append_rows(rows, path)
        measured += rows
    loss_report.print_targets(measured, bench.gradient_errors)
    if measured and not options.no_write:
        loss_report.plot(path)
    for name in dict.fromkeys(bench.wrong):
        print(f"bench: {name} failed its check")
    return 1 if bench.wrong else 0
