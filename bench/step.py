"""`python -m bench step`: source images a second of a whole DoGo step, against plain PyTorch.

A step is everything that a run does for a batch: views of images on disk, both networks forward, the losses, both
backward passes, both optimizers, meters and what is logged every so many steps; no evaluation, no checkpoints.
`captured`, `engine` and `torchvision-loader` are this project's trainer, `plain` and `tuned` bench/reference.py.

Providers take turns, a slice of time each.  Loaders work ahead, so that one which waits for its turn has batches ready
that cost its slice nothing: these are dropped first.  Worker processes started at the same time then deliver at the
same time, so a slice counts whole rounds of them; and a turn begins when the workers of the one before have stopped.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench import harness
from bench.harness import Failure, guarded
from bench.reference_data import VIEWS
from bench.rows import RESULTS, ROOT, Environment, Row, Stats, append_rows, environment, make_row
from bench.step_providers import PLAIN, PRESETS, PROVIDERS, SIZE, Case, Training, configuration, training
from engine import distributed
from engine.data.catalog import open_dataset
from engine.data.dataset import ArrayDataset, DataError
from engine.distributed import Ranks
from engine.engines import precision_of

WARM_UP = 6  # steps: libraries load, optimizers make their state, graphs are captured and replayed
ROUNDS, QUICK_ROUNDS = 5, 3
SECONDS, QUICK_SECONDS = 7.5, 3.0  # of a provider in one case, all its slices together
EPOCHS, EPOCH_IMAGES = 200, 50_000  # of the run whose time is told
IDLE_S, MOST_IDLE_S = 0.1, 30.0


# -- measuring -------------------------------------------------------------------------------------------------------


class Memory:
    """The most GPU memory that one provider holds, others' left out; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self.peak = self._held = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While nobody else takes or gives back any."""
        if self._gpu is None:
            yield
            return
        before = torch.cuda.memory_allocated(self._gpu)
        torch.cuda.reset_peak_memory_stats(self._gpu)
        yield
        torch.cuda.synchronize(self._gpu)
        self.peak = max(self.peak, self._held + torch.cuda.max_memory_allocated(self._gpu) - before)
        self._held += torch.cuda.memory_allocated(self._gpu) - before


class Turns:
    """A provider that has warmed up, and what its turns gave."""

    def __init__(self, build: Callable[[], Training], batch: int, device: torch.device) -> None:
        self.batch, self.device, self.memory = batch, device, Memory(device)
        self.rates: list[float] = []  # source images a second, of each turn
        with self.memory.watched():
            self.training = build()
            try:
                for _ in range(WARM_UP):
                    self.training.step()
            except BaseException:
                self.training.close()
                raise

    def take(self, seconds: float) -> None:
        """One turn: steps for at least so long, whole rounds of the loader's workers."""
        with self.memory.watched():
            self.training.drop_what_lies_ready()
            self._synchronize()
            began, steps = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                for _ in range(self.training.together):
                    self.training.step()
                steps += self.training.together
            self._synchronize()
            self.rates.append(steps * self.batch / (time.perf_counter() - began))
        wait_for_workers()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def wait_for_workers() -> None:
    """Until no child of this process computes: those of a loader have filled their queue."""
    until, before = time.perf_counter() + MOST_IDLE_S, _seconds_of_children()
    while time.perf_counter() < until:
        time.sleep(IDLE_S)
        now = _seconds_of_children()
        if now <= before:
            return
        before = now


def _seconds_of_children() -> float:
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measure(
    case: Case, providers: list[str], images: np.ndarray, ranks: Ranks, *, rounds: int, seconds: float
) -> dict[str, Turns]:
    """Every provider's turns, one after the other in each round; one that fails is named and leaves."""
    running: dict[str, Turns] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in providers:
                build = partial(training, case, name, images, ranks, Path(folder) / name)
                turns = guarded(partial(Turns, build, case.batch, ranks.device))
                if isinstance(turns, Failure):
                    _report(case, name, turns)
                else:
                    running[name] = turns
                wait_for_workers()
            for name in providers * rounds:
                taken = guarded(partial(running[name].take, seconds / rounds)) if name in running else None
                if isinstance(taken, Failure):
                    _report(case, name, taken)
                    running.pop(name).training.close()
                    harness.release_memory()
        finally:
            for turns in running.values():
                turns.training.close()
    return running


def _report(case: Case, name: str, failure: Failure) -> None:
    print(f"{case.pair}, batch {case.batch}: {name}: left out: {failure.reason}")


def rows_of(case: Case, found: dict[str, Turns], env: Environment, precision: str) -> list[Row]:
    """Rates and, on a GPU, peak memory."""
    cell = {"pair": case.pair, "batch": case.batch, "size": SIZE, "views": VIEWS, "precision": precision}
    rows = []
    for name, turns in found.items():
        rows.append(make_row(env, "step", cell, name, "images_per_s", harness.percentiles(turns.rates), None))
        if peak := turns.memory.peak:
            rows.append(make_row(env, "step", cell, name, "bytes", Stats(peak, peak, peak, len(turns.rates)), None))
    return rows


# -- the command -----------------------------------------------------------------------------------------------------

COLUMNS = ("pair", "batch", "provider", "images/s", "p20 - p80", "vs plain", "MiB", f"{EPOCHS} epochs, min")


def cells(rows: list[Row]) -> list[list[str]]:
    """The rows as COLUMNS have them; the last is what so many epochs of CIFAR-10 take at this rate, on a GPU."""
    found = {(row.case["pair"], row.case["batch"], row.provider, row.metric): row for row in rows}
    lines = []
    for (pair, batch, name, metric), row in found.items():
        if metric != "images_per_s":
            continue
        plain, held = found.get((pair, batch, PLAIN, metric)), found.get((pair, batch, name, "bytes"))
        lines.append([
            pair, str(batch), name, f"{row.p50:,.0f}", f"{row.p20:,.0f} - {row.p80:,.0f}",
            "-" if plain is None else f"{row.p50 / plain.p50:.2f}x",
            "-" if held is None else f"{held.p50 / 2**20:,.0f}",
            "-" if held is None else f"{EPOCHS * EPOCH_IMAGES / row.p50 / 60:.1f}",
        ])  # fmt: skip
    return lines


def parse(argv: list[str], device: str) -> argparse.Namespace:
    """The options, with the preset's values for those left out; `images` is the array.

    Exits with 2: what is unknown, or images that are not there.
    """
    parser = argparse.ArgumentParser("python -m bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cifar" if device == "cuda" else "quickstart")
    parser.add_argument("--pairs", metavar="A+B,...", help="of the preset; all by default")
    parser.add_argument("--batches", metavar="N,...", help="source images of a batch; the preset's by default")
    parser.add_argument(
        "--providers", metavar="NAME,...", help=f"of {', '.join(PROVIDERS)}; all that this device has by default"
    )
    parser.add_argument("--seconds", type=float, help="of timed steps, each provider in each case")
    parser.add_argument("--root", type=Path, default=ROOT / "data", help="holds CIFAR-10, or gets it")
    parser.add_argument("--images", type=Path, metavar="FILE.npy", help=f"uint8 [N, {SIZE}, {SIZE}, 3] in its place")
    parser.add_argument("--quick", action="store_true", help="the preset's first pair and batch alone, shorter")
    parser.add_argument("--no-write", action="store_true", help="no rows")
    options = parser.parse_args(argv)
    preset = PRESETS[options.preset]
    own = PROVIDERS if device == "cuda" else PROVIDERS[1:]
    try:
        options.pairs = _chosen(options.pairs, "--pairs", preset.pairs, preset.pairs[: 1 if options.quick else None])
        options.providers = _chosen(options.providers, "--providers", PROVIDERS, own)
        options.batches = _batches(options.batches) or preset.batches[: 1 if options.quick else None]
        options.array = _images(options)
    except ValueError as error:  # a DataError is one
        parser.error(str(error))
    options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    return options


def _chosen(text: str | None, option: str, allowed: tuple[str, ...], default: tuple[str, ...]) -> list[str]:
    """Names with commas between them, each once."""
    names = list(default) if text is None else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in allowed:
            raise ValueError(f"argument {option}: {name!r} is unknown; allowed: {', '.join(allowed)}")
    return names


def _batches(text: str | None) -> list[int]:
    parts = [] if text is None else text.split(",")
    if not all(part.isdecimal() and int(part) >= 2 for part in parts):
        raise ValueError(f"argument --batches: {text!r}: integers from 2 with commas between them are expected")
    return [int(part) for part in parts]


def _images(options: argparse.Namespace) -> np.ndarray:
    """uint8 [N, SIZE, SIZE, 3]."""
    if options.images is None:
        dataset = open_dataset("cifar10", options.root, "train")
        assert isinstance(dataset, ArrayDataset)
        return dataset.images
    try:
        images = np.load(options.images, mmap_mode="r")  # refuses pickles
    except (OSError, ValueError) as error:
        raise DataError(f"argument --images: {options.images}: no array can be read ({error})") from None
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise DataError(
            f"argument --images: {options.images} holds {images.dtype} {list(images.shape)}; "
            f"give uint8 [N, {SIZE}, {SIZE}, 3]"
        )
    return images


def collect(options: argparse.Namespace, ranks: Ranks, env: Environment) -> tuple[list[Row], list[str]]:
    """The rows of all cases, appended to the results one by one, and which provider gave none where."""
    measured, missing = [], []
    for case in (Case(options.preset, pair, batch) for pair in options.pairs for batch in options.batches):
        found = measure(case, options.providers, options.array, ranks, rounds=options.rounds, seconds=options.seconds)
        missing += [f"{case.pair}, batch {case.batch}: {name}" for name in options.providers if name not in found]
        precision = precision_of(configuration(case, PLAIN, Path("unused")), ranks.device)
        rows = rows_of(case, found, env, precision)
        measured += rows
        if not options.no_write:
            append_rows(rows, RESULTS / env.folder / "step.jsonl")
        del found
        harness.release_memory()
    return measured, missing


def main(argv: list[str]) -> int:
    """Measures, prints and appends rows; 1 where a provider gave no number."""
    options = parse(argv, "cuda" if torch.cuda.is_available() else "cpu")
    # Rows say what was measured; where the images lie is this machine's affair.
    places = {str(options.root): "DATA", str(options.images): "FILE.npy"}
    env = environment(["step", *(places.get(argument, argument) for argument in argv)])
    distributed.configure_logging(verbose=False)
    ranks = distributed.start()
    try:
        measured, missing = collect(options, ranks, env)
    finally:
        distributed.stop()
    table = Table(*COLUMNS, title=f"whole steps on {env.device_name}", title_justify="left")
    for line in cells(measured):
        table.add_row(*line)
    Console(width=140).print(table)
    for which in missing:
        print(f"bench: {which} gave no number")
    return 1 if missing else 0
