"""`python -m bench data --root PHOTOS`: source images a second of the loaders, decode, crop and all views apart.

Each measurement runs in a process of its own (bench/data_stream.py), several rounds of all in turns.  The share of a
training step is the loader's time for an image over that of forward, losses and backward of two peers on this device;
a loader that works beside the step costs less than its share.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from bench.data_stream import CROP, DALI, DALI_GRAPH, DECODE, PROVIDERS, STAGES, STEP, TORCHVISION, VIEWS, parser
from bench.harness import percentiles
from bench.rows import RESULTS, ROOT, Environment, Row, Stats, append_rows, environment, make_row
from kernels import native

ROUNDS, QUICK_ROUNDS, QUICK_SECONDS = 5, 2, 3.0
TIMEOUT_S = 600

Samples = dict[tuple[str, str], list[dict[str, float]]]  # of (provider, stage)


def providers(env: Environment) -> list[str]:
    """On a GPU, and where there is no native core, the DALI loader is DALI's graph alone."""
    same = env.device.type == "cuda" or native.core is None
    return [name for name in PROVIDERS if not (same and name == DALI_GRAPH)]


def measured(what: str, stage: str, options: argparse.Namespace) -> dict[str, float] | None:
    """What a process of its own found; None, with the reason printed, where it failed."""
    command = [sys.executable, "-m", "bench.data_stream", what, stage]
    for name in ("root", "size", "views", "batch", "workers", "seconds", "step_batch"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        print(f"{what}, {stage}: left out, {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def collect(env: Environment, options: argparse.Namespace, rounds: int) -> Samples:
    """Samples of every provider and stage, in turns, and of the step."""
    samples: Samples = {}
    cells = [(name, stage) for stage in STAGES for name in providers(env) if (name, stage) != (DALI_GRAPH, DECODE)]
    cells += [(STEP, options.step)] if options.step else []
    failed = set()
    for _ in range(rounds):
        for cell in cells:
            found = None if cell in failed else measured(*cell, options)
            if found is None:
                failed.add(cell)
            else:
                samples.setdefault(cell, []).append(found)
    return samples


def rows_of(samples: Samples, env: Environment, options: argparse.Namespace) -> list[Row]:
    """Rates with the decoder's own as their limit, memory, and the share of a training step."""
    case = {
        "photos": options.photos, "size": options.size, "views": options.views, "batch": options.batch,
        "workers": options.workers,
    }  # fmt: skip
    rates = {cell: percentiles([sample["images_per_s"] for sample in found]) for cell, found in samples.items()}
    step = rates.get((STEP, options.step))
    rows = []
    for (name, stage), rate in rates.items():
        if name == STEP:
            step_case = {"size": options.size, "peers": stage, "batch": options.step_batch}
            rows.append(make_row(env, "data", step_case, STEP, "images_per_s", rate, None))
            continue
        decoder = rates.get((DALI if name == DALI_GRAPH else name, DECODE))
        floor = decoder.p50 if decoder and stage != DECODE else None
        cell = {**case, "stage": stage}
        rows.append(make_row(env, "data", cell, name, "images_per_s", rate, floor))
        for metric in ("bytes", "gpu_bytes"):
            held = percentiles([sample[metric] for sample in samples[name, stage]])
            if metric == "bytes" or held.p50:
                rows.append(make_row(env, "data", cell, name, metric, held, None))
        if step is not None and stage == VIEWS:
            shares = Stats(step.p50 / rate.p80, step.p50 / rate.p50, step.p50 / rate.p20, rate.n)
            rows.append(make_row(env, "data", {**cell, "peers": options.step}, name, "share_of_step", shares, None))
    return rows


COLUMNS = (
    "stage",
    "provider",
    "source images/s",
    "p20 - p80",
    "views/s",
    "vs torchvision",
    "MiB",
    "GPU MiB",
    "of step",
)


def cells(rows: list[Row]) -> list[list[str]]:
    """The rows as COLUMNS have them."""
    found: dict[tuple[str, str, str], Row] = {
        (row.case["stage"], row.provider, row.metric): row for row in rows if "stage" in row.case
    }
    lines = []
    for (stage, name, metric), row in found.items():
        if metric != "images_per_s":
            continue
        other = found.get((stage, TORCHVISION, metric))
        more = {key: found.get((stage, name, key)) for key in ("bytes", "gpu_bytes", "share_of_step")}
        lines.append([
            stage, name, f"{row.p50:,.0f}", f"{row.p20:,.0f} - {row.p80:,.0f}",
            "-" if stage == DECODE else f"{row.p50 * row.case['views']:,.0f}",
            "-" if other is None else f"{row.p50 / other.p50:.2f}x",
            *("-" if held is None else f"{held.p50 / 2**20:,.0f}" for held in (more["bytes"], more["gpu_bytes"])),
            "-" if more["share_of_step"] is None else f"{more['share_of_step'].p50:.1%}",
        ])  # fmt: skip
    return lines


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with this machine's values for those left out."""
    arguments = parser()
    arguments.add_argument("--rounds", type=int, default=None, help=f"of every measurement, {ROUNDS} by default")
    arguments.add_argument("--step", default="resnet18,resnet50", help="peers of the training step; empty: none")
    arguments.add_argument("--photos", default=None, help="what the rows call the photos; the folder's name by default")
    arguments.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    arguments.add_argument("--no-write", action="store_true", help="no rows")
    options = arguments.parse_args(argv)
    if options.quick:
        options.seconds = QUICK_SECONDS
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    options.photos = options.photos or os.path.basename(os.path.abspath(options.root))
    return options


def main(argv: list[str]) -> int:
    """Measures, prints and appends rows; 1 where our own loader gave no number."""
    options = parse(argv)
    # Rows name the photos; where they lie is this machine's affair.
    env = environment(["data", *(argument.replace(options.root, "PHOTOS") for argument in argv)])
    if options.step_batch is None:
        options.step_batch = 128 if env.device.type == "cuda" else 8
    samples = collect(env, options, options.rounds)
    rows = rows_of(samples, env, options)
    if not options.no_write:
        append_rows(rows, RESULTS / env.folder / "data.jsonl")
    table = Table(*COLUMNS, title=f"loaders on {env.device_name}, {options.photos}", title_justify="left")
    for line in cells(rows):
        table.add_row(*line)
    Console(width=140).print(table)
    missing = [stage for stage in (DECODE, CROP, VIEWS) if (DALI, stage) not in samples]
    for stage in missing:
        print(f"bench: {DALI} gave no number for {stage}")
    return 1 if missing else 0
