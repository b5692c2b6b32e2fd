"""`python -m bench parity --root PHOTOS`: short runs on labelled photos with either loader, and the kNN they reach.

Two small peers, the same seeds for every loader; DALI's graph, which is what a GPU runs, is made to run on the CPU too.
Views differ by roundings (and the graph's hue), so the scores differ as two seeds do or less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.data_stream import DALI_GRAPH, PROVIDERS, TORCHVISION
from bench.harness import percentiles
from bench.rows import RESULTS, ROOT, Environment, Row, append_rows, environment, make_row

SEEDS, STEPS = 3, 300
SIZE, BATCH = 32, 64
TIMEOUT_S = 1800

Scores = dict[tuple[str, str], list[float]]  # of (provider, peer), a seed each


def settings(provider: str, seed: int, root: str, steps: int, folder: str) -> dict[str, Any]:
    """The configuration of one run as plain values."""
    peer = {"tau": 0.2, "optimizer": {"name": "adam", "lr": 1e-3, "weight_decay": 1e-6}}
    return {
        "run": {"output_dir": folder, "seed": seed, "steps": steps},
        "data": {
            "dataset": "folder", "root": root, "image_size": SIZE, "batch_size": BATCH, "augment": {"blur": 0.5},
            "loader": TORCHVISION if provider == TORCHVISION else "dali",
        },
        "peers": [{"name": "a", "backbone": "wrn-10-1", **peer}, {"name": "b", "backbone": "wrn-10-1", **peer}],
        "eval": {"knn": {"k": 20}},
    }  # fmt: skip


def run(provider: str, seed: int, root: str, steps: int) -> dict[str, Any]:
    """Trains in this process and returns the summary of the run."""
    from engine import distributed
    from engine.config import parse_config
    from engine.trainer import Trainer

    ranks = distributed.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(parse_config(settings(provider, seed, root, steps, os.path.join(folder, "run"))), ranks)
            if provider == DALI_GRAPH:
                trainer.loader.native = False
            summary = trainer.fit()
            assert summary is not None  # no time limit
            return summary
    finally:
        distributed.stop()


def collect(options: argparse.Namespace) -> Scores:
    """kNN accuracies after (and, as provider `start`, before) every run; each in a process of its own."""
    scores: Scores = {}
    for seed in range(options.seeds):
        for provider in PROVIDERS:
            command = [sys.executable, "-m", "bench", "parity", "--root", options.root, "--steps", str(options.steps)]
            done = subprocess.run(
                [*command, "--one", provider, "--seed", str(seed)], cwd=ROOT, capture_output=True, text=True,
                timeout=TIMEOUT_S,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{provider}, seed {seed}: {done.stderr[-2000:]}")
            summary = json.loads(done.stdout.splitlines()[-1])
            for name, peer in summary["peers"].items():
                scores.setdefault((provider, name), []).append(peer["knn_after"])
                if provider == TORCHVISION:
                    scores.setdefault(("start", name), []).append(peer["knn_before"])
    return scores


def rows_of(scores: Scores, env: Environment, options: argparse.Namespace) -> list[Row]:
    """A row a provider and peer."""
    case = {"photos": options.photos, "size": SIZE, "batch": BATCH, "steps": options.steps, "seeds": options.seeds}
    return [
        make_row(env, "accuracy", {**case, "peer": peer}, provider, "accuracy", percentiles(found), None)
        for (provider, peer), found in scores.items()
    ]


def apart(scores: Scores) -> list[str]:
    """The providers whose mean is further from torchvision's than three standard errors of the difference."""
    found = []
    for (provider, peer), own in scores.items():
        if provider in (TORCHVISION, "start") or len(own) < 2:
            continue
        theirs = scores[TORCHVISION, peer]
        error = ((statistics.variance(own) + statistics.variance(theirs)) / len(own)) ** 0.5
        if abs(statistics.mean(own) - statistics.mean(theirs)) > 3 * error:
            found.append(f"{provider}, peer {peer}")
    return found


def main(argv: list[str]) -> int:
    """Trains, prints and appends rows; 1 where a loader's score is apart from torchvision's."""
    parser = argparse.ArgumentParser("python -m bench parity", description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="photos in class folders, as data.root of data.dataset=folder")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--photos", default=None, help="what the rows call the photos; the folder's name by default")
    parser.add_argument("--no-write", action="store_true", help="no rows")
    parser.add_argument("--one", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(run(options.one, options.seed, options.root, options.steps)))
        return 0
    options.photos = options.photos or os.path.basename(os.path.abspath(options.root))
    env = environment(["parity", *(argument.replace(options.root, "PHOTOS") for argument in argv)])
    scores = collect(options)
    rows = rows_of(scores, env, options)
    if not options.no_write:
        append_rows(rows, RESULTS / env.folder / "accuracy.jsonl")
    table = Table("loader", "peer", "kNN, mean", "standard deviation", title=f"{options.steps} steps, {options.photos}")
    for (provider, peer), found in scores.items():
        spread = f"{statistics.stdev(found):.1%}" if len(found) > 1 else "-"
        table.add_row(provider, peer, f"{statistics.mean(found):.1%}", spread)
    Console(width=100).print(table)
    for which in (far := apart(scores)):
        print(f"bench: {which}: further from torchvision than noise")
    return 1 if far else 0
