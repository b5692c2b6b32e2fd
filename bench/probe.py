"""`python -m bench probe`: seconds that probes of 50,000 features of width 512 take, as of a ResNet-18 on CIFAR-10.

Of the authors' protocol two epochs are timed, and fifty times that is its row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from bench.harness import percentiles
from bench.rows import RESULTS, append_rows, environment, make_row
from engine.evaluation_config import LinearConfig
from engine.linear_probe import OFFICIAL_EPOCHS, held_out_split, linear_probe, official_probe
from engine.probe import knn_accuracy

IMAGES, QUERIES, WIDTH, CLASSES = 50_000, 10_000, 512, 10
NOISY_SETS = 13  # sets of labels that `noisy` trains at once: two kinds at four rates, and five of people
TIMED_EPOCHS = 2


def main(argv: list[str]) -> int:
    """Times, prints and appends rows."""
    parser = argparse.ArgumentParser("python -m bench probe", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="no rows")
    options = parser.parse_args(argv)
    env = environment(["probe", *argv])
    device, generator = env.device, torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (IMAGES + QUERIES,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    features = (centres[labels] + 3 * torch.randn(IMAGES + QUERIES, WIDTH, generator=generator)).to(device)
    labels = labels.to(device)
    bank, known, asked = features[:IMAGES], labels[:IMAGES], (features[IMAGES:], labels[IMAGES:])
    split = held_out_split(known.cpu().numpy(), 0.15, np.random.default_rng(0))

    def linear(sets: int) -> Callable[[], object]:
        return lambda: linear_probe(bank, known.expand(sets, -1), split, LinearConfig(), classes=CLASSES, seed=0)

    calls: dict[str, tuple[Callable[[], object], float]] = {
        "knn, k = 200": (lambda: knn_accuracy(bank, known, *asked, k=200, tau=0.1), 1),
        "linear": (linear(1), 1),
        f"linear, {NOISY_SETS} sets of labels": (linear(NOISY_SETS), 1),
        "official": (
            lambda: official_probe(bank, known, [split], classes=CLASSES, seeds=[0], epochs=TIMED_EPOCHS),
            OFFICIAL_EPOCHS / TIMED_EPOCHS,
        ),
    }  # fmt: skip
    rows = []
    for name, (call, factor) in calls.items():
        seconds = [factor * _seconds(call, device) for _ in range(options.rounds)]
        case = {"protocol": name, "images": IMAGES, "width": WIDTH, "classes": CLASSES}
        rows.append(make_row(env, "probe", case, "engine", "seconds", percentiles(seconds), None))
        print(f"{name}: {rows[-1].p50:g} s on {env.device_name}", flush=True)
    if not options.no_write:
        append_rows(rows, RESULTS / env.folder / "probe.jsonl")
    return 0


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
