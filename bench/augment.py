"""`python -m bench augment`: all views of a batch of small images, against other ways to make them.

On a GPU the images lie in its memory; the limit is a copy of the bytes that must move: each image read once, each view
written once.  `graph` replays the launches from a CUDA graph, `call` starts each on an idle device from Python.  Kornia
draws parameters a view, as we do; torchvision's v2 transforms draw one set for the whole batch, which is less than what
is asked for, and are here as the fastest that they offer.  Both get float images and their own random numbers.

On a CPU the yardstick is the loader of torchvision with a process a core; `loader` rows count source images a second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import harness
from bench.harness import Call, Failure, guarded
from bench.reference_data import PREFETCH, cores
from bench.rows import RESULTS, Environment, Row, append_rows, environment, make_row
from engine.data.augment import AugmentPolicy, ViewParams, build_policy, draw_views
from engine.data.dataset import ArrayDataset
from engine.data.order import Batch, BatchOrder
from engine.data.resident_loader import AHEAD, ResidentLoader
from engine.data.skipped import SkippedImages
from engine.data.torch_loader import CHUNK, TorchLoader
from engine.data_config import AugmentConfig
from engine.distributed import Ranks
from kernels import augment_torch, augment_views
from kernels.augment import new_views, scale_and_shift
from kernels.augment_table import table_of

IMAGES = 10_000
VIEWS = 4  # of an image: two a peer
SIDES = {32: False, 96: True}  # of images and views: whether the policy blurs
CALL, GRAPH, LOADER = "call", "graph", "loader"
COPY = "copy"
CAPTURABLE = ("triton", "triton, 3 bytes", COPY)
SECONDS, QUICK_SECONDS = 6.0, 2.0  # of a case, all providers together
ROUNDS, ROUND_SECONDS = 5, 2.0  # of the loaders


def images_of(side: int) -> np.ndarray:
    """Noise: what is in a picture does not change the time."""
    return np.random.default_rng(0).integers(0, 256, (IMAGES if side < 64 else 2_000, side, side, 3), dtype=np.uint8)


def parameters(policy: AugmentPolicy, indices: np.ndarray, side: int) -> ViewParams:
    """Of VIEWS views of each of these images."""
    sizes = np.full((len(indices), 2), side)
    return draw_views(policy, seed=0, epoch=0, indices=indices, sizes=sizes, views=VIEWS)


def policy_of(side: int) -> AugmentPolicy:
    """SimCLR's, with its blur where the side is one at which it is used."""
    return build_policy(AugmentConfig(blur=0.5 if SIDES[side] else 0.0), side)


# -- one call ----------------------------------------------------------------------------------------------------------


def gpu_calls(side: int, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Every provider's way to make the views of one batch that is on the device."""
    from kernels import augment_triton

    policy, n = policy_of(side), batch
    pixels = torch.from_numpy(images_of(side)).to(device)
    four = torch.cat((pixels, torch.zeros_like(pixels[..., :1])), dim=3)
    indices = np.random.default_rng(1).choice(len(pixels), n, replace=False)
    source, m = np.tile(indices, VIEWS), VIEWS * n
    table = table_of(source, **parameters(policy, indices, side)._asdict()).to(device)
    statistics = scale_and_shift(*policy.statistics).to(device)
    out = new_views(m, side, torch.bfloat16, device)
    passes = torch.empty((2, m, side, side, 3), dtype=torch.uint8, device=device)
    read = torch.empty(n * side * side * 3, dtype=torch.uint8, device=device)
    moved = read.numel() + out.numel() * out.element_size()
    halves = torch.empty((2, moved // 2), dtype=torch.uint8, device=device)  # a copy reads and writes each byte
    floats = pixels[torch.from_numpy(source).to(device)].permute(0, 3, 1, 2).contiguous()
    return {
        "triton": partial(augment_triton.launch, four, table, statistics, out, blur=SIDES[side], passes=passes),
        "triton, 3 bytes": partial(
            augment_triton.launch, pixels, table, statistics, out, blur=SIDES[side], passes=passes
        ),
        COPY: lambda: halves[0].copy_(halves[1]),
        "torch": lambda: augment_torch.views(pixels, table, size=side),
        "kornia": _kornia(policy, floats),
        "torchvision v2": _torchvision(policy, floats),
    }


def _kornia(policy: AugmentPolicy, images: Tensor) -> Callable[[], object]:
    """The same policy by kornia, an own draw for each view."""

    def missing() -> object:
        raise ImportError("kornia is not installed")

    try:
        import kornia.augmentation as K
    except ImportError:
        return missing
    size, p = (policy.size, policy.size), policy
    mean, std = (torch.tensor(s, device=images.device) for s in p.statistics)
    steps: list[Any] = [
        K.RandomResizedCrop(size, scale=p.crop_scale, ratio=p.crop_ratio),
        K.RandomHorizontalFlip(p.flip),
        K.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue, p=p.jitter),
        K.RandomGrayscale(p=p.grayscale),
    ]
    if p.blur:
        steps.append(K.RandomGaussianBlur((9, 9), p.blur_sigma, p=p.blur))
    pipeline = torch.nn.Sequential(*steps, K.Normalize(mean, std))
    return lambda: pipeline(images.float() / 255).to(torch.bfloat16)


def _torchvision(policy: AugmentPolicy, images: Tensor) -> Callable[[], object]:
    """The same policy by torchvision, one draw for the whole batch."""
    from torchvision.transforms import v2

    p = policy
    steps: list[Any] = [
        v2.RandomResizedCrop(p.size, p.crop_scale, p.crop_ratio, antialias=True),
        v2.RandomHorizontalFlip(p.flip),
        v2.RandomApply([v2.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)], p.jitter),
        v2.RandomGrayscale(p.grayscale),
    ]
    if p.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(9, p.blur_sigma)], p.blur))
    steps += [v2.ToDtype(torch.bfloat16, scale=True), v2.Normalize(*p.statistics)]
    pipeline = v2.Compose(steps)
    return lambda: pipeline(images)


def cpu_calls(side: int, batch: int) -> dict[str, Callable[[], object]]:
    """The backends of a CPU."""
    policy = policy_of(side)
    indices = np.arange(batch)
    images, source = torch.from_numpy(images_of(side)[:batch]), np.tile(indices, VIEWS)
    mean, std = policy.statistics
    out = new_views(len(source), side, torch.float32, images.device)

    def views(backend: Any) -> Callable[[], object]:
        arguments = parameters(policy, indices, side)._asdict()
        return lambda: augment_views(
            images, source=source, size=side, mean=mean, std=std, out=out, backend=backend, **arguments
        )

    return {"native": views("native"), "torch": views("torch")}


def measure_calls(side: int, batch: int, env: Environment, seconds: float) -> list[Row]:
    """Times of all providers in turns, first as calls, then on a GPU as graphs of those that can be captured."""
    gpu = env.device.type == "cuda"
    made = gpu_calls(side, batch, env.device) if gpu else cpu_calls(side, batch)
    rows = []
    for mode in (CALL, GRAPH) if gpu else (CALL,):
        calls: dict[str, Call] = {}
        for name, call in made.items():
            if mode == GRAPH and name not in CAPTURABLE:
                continue
            ready = guarded(partial(harness.captured, call)) if mode == GRAPH else call
            if isinstance(ready, Failure):
                print(f"{side} px, {batch}, {mode}: {name}: {ready.reason}")
            else:
                calls[name] = _numbered(ready)
        timed = harness.timed(calls, env.device, seconds)
        for name, failure in timed.failures.items():
            print(f"{side} px, {batch}, {mode}: {name}: left out: {failure.reason}")
        floor = timed.stats[COPY].p50 if COPY in timed.stats else None
        case = {"size": side, "batch": batch, "views": VIEWS, "blur": SIDES[side], "mode": mode}
        rows += [
            make_row(env, "augment", case, name, "ms", stats, None if name == COPY else floor)
            for name, stats in timed.stats.items()
        ]
    return rows


def _numbered(call: Callable[[], object]) -> Call:
    return lambda i: call()


# -- loaders -----------------------------------------------------------------------------------------------------------


def loaders(side: int, batch: int, device: torch.device) -> dict[str, Callable[[int, int], Iterator[Batch]]]:
    """The streams of batches of the two loaders, over the same images."""
    ranks = Ranks(rank=0, world=1, local_rank=0, device=device, group=None)
    dataset, policy = ArrayDataset("noise", images_of(side), None), policy_of(side)
    order = BatchOrder(dataset, batch_size=batch, seed=0, ranks=ranks)
    shared: dict[str, Any] = {
        "views": VIEWS, "workers": cores(), "ranks": ranks, "skipped": SkippedImages(ranks),
    }  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "resident": ResidentLoader(dataset, policy, order, dtype=dtype, **shared).batches,
        "torchvision": TorchLoader(dataset, policy, order, **shared).batches,
    }


def measure_loaders(side: int, batch: int, env: Environment, rounds: int) -> list[Row]:
    """Source images a second of both loaders, in turns; each has begun before its first round."""
    streams = {name: batches(0, 10**6) for name, batches in loaders(side, batch, env.device).items()}
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for stream in streams.values():
        for _ in range(3):
            next(stream)
    for _ in range(rounds):
        for name, stream in streams.items():
            rates[name].append(_rate(stream, batch, env.device))
    for stream in streams.values():
        stream.close()  # type: ignore[attr-defined]
    case = {"size": side, "batch": batch, "views": VIEWS, "blur": SIDES[side], "mode": LOADER}
    return [
        make_row(env, "augment", case, name, "images_per_s", harness.percentiles(found), None)
        for name, found in rates.items()
    ]


def _rate(stream: Iterator[Batch], batch: int, device: torch.device) -> float:
    # What workers made while another loader had its turn is no part of the rate.
    for _ in range(max(AHEAD + 1, -(-PREFETCH * cores() * CHUNK // batch))):
        next(stream)
    _wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < ROUND_SECONDS:
        next(stream)
        count += 1
        _wait(device)
    return count * batch / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- the command -------------------------------------------------------------------------------------------------------

COLUMNS = ("px", "batch", "mode", "provider", "p50", "p20 - p80", "of copy", "faster")


def cells(rows: list[Row]) -> list[list[str]]:
    """Each measurement as COLUMNS have it; `faster`: how many times as fast the first of its case is."""
    lines = []
    for row in rows:
        case = row.case
        first = next(r for r in rows if r.case == case)
        faster = row.p50 / first.p50 if row.metric == "ms" else first.p50 / row.p50
        lines.append([
            str(case["size"]), str(case["batch"]), case["mode"], row.provider, f"{row.p50:.4g} {row.metric}",
            f"{row.p20:.4g} - {row.p80:.4g}", "-" if row.floor is None else f"{row.floor / row.p50:.0%}",
            f"{faster:.2f}x",
        ])  # fmt: skip
    return lines


def main(argv: list[str]) -> int:
    """Measures, prints and appends rows."""
    parser = argparse.ArgumentParser("python -m bench augment", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 px and a batch of 256 alone, shorter")
    parser.add_argument("--sides", type=_numbers, metavar="PX,...", help=f"of {', '.join(map(str, SIDES))}")
    parser.add_argument("--batches", type=_numbers, metavar="N,...", help="images of a batch")
    parser.add_argument("--no-write", action="store_true", help="no rows")
    options = parser.parse_args(argv)
    for option, given, allowed in (("--sides", options.sides, SIDES), ("--batches", options.batches, range(1, 2_001))):
        if wrong := [number for number in given or () if number not in allowed]:
            said = ", ".join(map(str, SIDES)) if option == "--sides" else "1 to 2000"
            parser.error(f"argument {option}: {wrong[0]} is not allowed; allowed: {said}")
    env = environment(["augment", *argv])
    measured: list[Row] = []
    sides = options.sides or ([32] if options.quick or env.device.type == "cpu" else list(SIDES))
    for side in sides:
        for batch in options.batches or ([256] if options.quick else [256, 1024]):
            rows = measure_calls(side, batch, env, QUICK_SECONDS if options.quick else SECONDS)
            rows += measure_loaders(side, batch, env, 2 if options.quick else ROUNDS)
            measured += rows
            if not options.no_write:
                append_rows(rows, RESULTS / env.folder / "augment.jsonl")
            harness.release_memory()
    table = Table(*COLUMNS, title=f"{VIEWS} views of each image on {env.device_name}", title_justify="left")
    for line in cells(measured):
        table.add_row(*line)
    Console(width=140).print(table)
    return 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
