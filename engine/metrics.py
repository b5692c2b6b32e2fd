"""What a run records: meters on the device, metrics.jsonl, TensorBoard, plots and the progress bar.

A meter stays on the device until a logging step reads all of them back at once; no other step waits for the device.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Meters:
    """Means of 0-D tensors over the steps since the last read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one step's detached scalars; launches no copy to the host."""
        for key, value in values.items():
            held = self._sums.get(key)
            # A fresh tensor each step would keep the first loss's memory alive; adding in place does not.
            self._sums[key] = value.detach().double().clone() if held is None else held.add_(value.detach())
        self._count += 1

    def read(self) -> dict[str, float]:
        """The means, in one transfer; starts anew."""
        if not self._sums:
            return {}
        values = (torch.stack(list(self._sums.values())) / self._count).tolist()
        means = dict(zip(self._sums, values, strict=True))
        self._sums, self._count = {}, 0
        return means


@torch.no_grad()
def collapse_indicators(z: Tensor) -> dict[str, Tensor]:
    """Two signs of collapse of embeddings z [n, D], as 0-D tensors.

    `std`: mean over dimensions of the normalised embeddings' standard deviation times sqrt(D): 1 when they spread
    evenly, 0 when they are one point (Chen & He 2020, arXiv 2011.10566).  `rank`: effective rank, the exponential of
    the entropy of the singular values (Garrido et al. 2022, arXiv 2210.02885), between 1 and min(n, D).
    """
    z = torch.nn.functional.normalize(z.detach().float(), dim=1)
    std = z.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5
    # The D x D Gram matrix instead of z itself: eigvalsh is many times faster than svd on a GPU.
    spectrum = torch.linalg.eigvalsh(z.double().T @ z.double()).clamp(min=0).sqrt()
    p = spectrum / spectrum.sum().clamp(min=1e-12)
    rank = torch.special.entr(p).sum().exp()
    return {"std": std, "rank": rank}


class Recorder:
    """Writes rows to metrics.jsonl and TensorBoard; rank 0 only, the others hold one that does nothing."""

    def __init__(self, folder: Path, *, enabled: bool, from_step: int) -> None:
        self._file = None
        self._board = None
        if enabled:
            path = folder / "metrics.jsonl"
            kept = [row for row in read_rows(path) if row["step"] <= from_step]
            rewritten = folder / ".metrics.jsonl.partial"
            rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))  # drops what the resumed run repeats
            os.replace(rewritten, path)
            self._file = path.open("a", buffering=1)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One row; `step` counts finished steps."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Stopwatch:
    """Seconds while running, over many starts and stops."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Runs on; nothing where it runs already."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Halts."""
        self.seconds, self._started = self.read(), None

    def read(self) -> float:
        """Seconds run until now."""
        return self.seconds + (0.0 if self._started is None else time.perf_counter() - self._started)


def progress_bar(description: str, *, enabled: bool) -> Progress:
    """A bar with rate and remaining time on stderr; silent where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not (enabled and sys.stderr.isatty()),
    )


# Parts of a loss, as objectives.py names them.
TERMS = ("ntxent", "simsiam", "byol", "mocov2", "barlow_twins", "vicreg", "kl", "reverse_kl", "jeffreys", "js", "graph")


def plot_run(folder: Path) -> list[Path]:
    """losses.png, embeddings.png and, where there are kNN rows, knn.png from metrics.jsonl; returns what it wrote."""
    rows = read_rows(folder / "metrics.jsonl")
    panels = {
        "losses": ("loss", ("loss", *TERMS)),
        "embeddings": ("spread (1 = even, 0 = collapsed)", ("std",)),
        "knn": ("kNN accuracy", ("knn",)),
    }
    return [
        _plot(folder / f"{name}.png", rows, label, prefixes)
        for name, (label, prefixes) in panels.items()
        if any(_is_series(key, prefixes) for row in rows for key in row)
    ]


def _is_series(key: str, prefixes: tuple[str, ...]) -> bool:
    return key.partition("/")[0] in prefixes


def _plot(path: Path, rows: list[dict[str, Any]], label: str, prefixes: tuple[str, ...]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: no display, no global state
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for row in rows for key in row if _is_series(key, prefixes)))
    quantities = list(dict.fromkeys(key.partition("/")[0] for key in keys))
    figure = Figure(figsize=(4.5 * len(quantities), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        for key in keys:
            name, _, peer = key.partition("/")
            if name == quantity:
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                axis.plot(*zip(*points, strict=True), label=peer, marker="o" if len(points) < 12 else None)
        axis.set_xlabel("step")
        axis.set_ylabel(quantity if quantity in TERMS else label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    return path
