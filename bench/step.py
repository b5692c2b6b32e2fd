"""`python -m bench step`: source images a second of a whole DoGo step, against plain PyTorch.

A step is everything that a run does for a batch: views of images on disk, both networks forward, the losses, both
backward passes, both optimizers, meters and what is logged every so many steps; no evaluation, no checkpoints.
`plain` and `tuned` are bench/reference.py, all others this project's trainer: `engine` with one peer behind the other,
`streams`, `split`, `compiled` and `captured` with that setting, `torchvision-loader` with that loader.

Behind the turns some steps run under torch's profiler, which tells what share of a step each of its parts takes.

Each case is measured on real images and on synthetic ones, views that lie ready: the difference is what the loader
costs.  All providers take turns (bench/step_turns.py).  Under a launcher the batch is that of all ranks:

    torchrun --nproc_per_node 2 -m bench step
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from bench import harness
from bench.flops import flops_per_image, peak_flops
from bench.reference_data import VIEWS
from bench.rows import RESULTS, ROOT, Environment, Row, Stats, append_rows, environment, make_row
from bench.step_data import KINDS, REAL, Images, photos, small_images
from bench.step_providers import (
    PLAIN,
    PRESETS,
    PROVIDERS,
    Case,
    available,
    configuration,
    takes_part,
)
from bench.step_report import SMALL_PX, show
from bench.step_turns import Turns, measure
from engine import distributed
from engine.distributed import Ranks
from engine.engines import precision_of

ROUNDS, QUICK_ROUNDS = 5, 3
SECONDS, QUICK_SECONDS = 7.5, 3.0  # of a provider in one case, all its slices together

# -- rows ------------------------------------------------------------------------------------------------------------


def rows_of(
    case: Case, found: dict[str, Turns], env: Environment, *, precision: str, flops: int, ranks: int
) -> list[Row]:
    """Rates, the share of the peak FLOP/s of all devices where that is known and, on a GPU, rank 0's peak memory.

    `flops`: of a source image.
    """
    cell = {
        "pair": case.pair, "batch": case.batch, "size": case.size, "views": VIEWS, "precision": precision,
        "data": case.data, "ranks": ranks,
    }  # fmt: skip
    peak_rate = peak_flops(env.device_name, precision)
    rows = []
    for name, turns in found.items():
        rate = harness.percentiles(turns.rates)
        rows.append(make_row(env, "step", cell, name, "images_per_s", rate, None))
        if peak_rate is not None:
            p20, p50, p80 = (value * flops / (peak_rate * ranks) for value in rate[:3])
            rows.append(make_row(env, "step", cell, name, "mfu", Stats(p20, p50, p80, rate.n), None))
        if peak := turns.memory.peak:
            rows.append(make_row(env, "step", cell, name, "bytes", Stats(peak, peak, peak, rate.n), None))
        if turns.parts is not None:
            for part, share in turns.parts.shares.items():
                ms = share * turns.parts.ms_per_step
                stats = Stats(ms, ms, ms, turns.parts.steps)  # the mean of so many steps
                rows.append(make_row(env, "step", {**cell, "part": part}, name, "ms", stats, None))
    return rows


# -- the command -----------------------------------------------------------------------------------------------------


def parse(argv: list[str], device: str, ranks: int = 1) -> argparse.Namespace:
    """The options, with the preset's values for those left out; `images` are those of real data, None without.

    Exits with 2: what is unknown, or images that are not there.
    """
    parser = argparse.ArgumentParser("python -m bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cifar" if device == "cuda" else "quickstart")
    parser.add_argument("--pairs", metavar="A+B,...", help="of the preset; all by default")
    parser.add_argument("--batches", metavar="N,...", help="source images of a batch; the preset's by default")
    parser.add_argument(
        "--providers", metavar="NAME,...", help=f"of {', '.join(PROVIDERS)}; all that this device has by default"
    )
    parser.add_argument("--data", metavar="KIND,...", help=f"of {', '.join(KINDS)}; both by default")
    parser.add_argument("--seconds", type=float, help="of timed steps, each provider in each case")
    parser.add_argument(
        "--root", type=Path, help="of small images: holds CIFAR-10, or gets it; of photos: their folder"
    )
    parser.add_argument(
        "--images", dest="file", type=Path, metavar="FILE.npy", help="uint8 [N, 32, 32, 3] in place of CIFAR-10"
    )
    parser.add_argument("--quick", action="store_true", help="the first pair and batch on real data alone, shorter")
    parser.add_argument("--no-write", action="store_true", help="no rows")
    options = parser.parse_args(argv)
    preset, first = PRESETS[options.preset], slice(1 if options.quick else None)
    try:
        options.pairs = _chosen(options.pairs, "--pairs", preset.pairs, preset.pairs[first])
        options.providers = _chosen(options.providers, "--providers", PROVIDERS, available(device, ranks))
        options.data = _chosen(options.data, "--data", KINDS, KINDS[first])
        options.batches = _batches(options.batches) or preset.batches[first]
        options.images = _images(options, preset.size) if REAL in options.data else None
    except ValueError as error:  # a DataError is one
        parser.error(str(error))
    options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    return options


def _chosen(text: str | None, option: str, allowed: tuple[str, ...], default: list[str] | tuple[str, ...]) -> list[str]:
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


def _images(options: argparse.Namespace, size: int) -> Images:
    if size == SMALL_PX:
        return small_images(options.root or ROOT / "data", options.file, size)
    if options.file is not None:
        raise ValueError(f"argument --images: {options.file} with --preset {options.preset}; give --root FOLDER")
    return photos(options.root)


def cases(options: argparse.Namespace) -> list[Case]:
    """All that is measured, a batch on real data next to the same on synthetic data."""
    return [
        Case(options.preset, pair, batch, data)
        for pair in options.pairs
        for batch in options.batches
        for data in options.data
    ]


def collect(options: argparse.Namespace, ranks: Ranks, env: Environment) -> tuple[list[Row], list[str]]:
    """The rows of all cases, appended to the results one by one, and which provider gave none where."""
    measured, missing = [], []
    for case in cases(options):
        providers = [name for name in options.providers if takes_part(name, case.data)]
        images = options.images if case.data == REAL else None
        found = measure(case, providers, images, ranks, rounds=options.rounds, seconds=options.seconds)
        missing += [f"{case}: {name}" for name in providers if name not in found]
        cfg = configuration(case, PLAIN, Path("unused"))
        flops = flops_per_image(cfg.resolved()["peers"], size=case.size)
        precision = precision_of(cfg, ranks.device)
        rows = rows_of(case, found, env, precision=precision, flops=flops, ranks=ranks.world)
        measured += rows
        if ranks.is_first:
            print(f"{case}: {flops / 1e9:.2f} GFLOP a source image, both networks forward and backward")
            if not options.no_write:
                append_rows(rows, RESULTS / env.folder / "step.jsonl")
        del found
        harness.release_memory()
    return measured, missing


def main(argv: list[str]) -> int:
    """Measures, prints and appends rows, rank 0 alone; 1 where a provider gave no number."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = parse(argv, "cuda" if torch.cuda.is_available() else "cpu", world)
    # Rows say what was measured; where the images lie is this machine's affair.
    folder = "DATA" if PRESETS[options.preset].size == SMALL_PX else "PHOTOS"
    places = {str(options.root): folder, str(options.file): "FILE.npy"}
    env = environment(["step", *(places.get(argument, argument) for argument in argv)])
    if world > 1:
        launched = env.command.replace("python", f"torchrun --nproc_per_node {world}", 1)
        env = replace(env, command=launched)
    distributed.configure_logging(verbose=False)
    ranks = distributed.start()
    try:
        measured, missing = collect(options, ranks, env)
    finally:
        distributed.stop()
    if ranks.is_first:
        show(measured, env, ranks.world)
        for which in missing:
            print(f"bench: {which} gave no number")
    return 1 if missing else 0
