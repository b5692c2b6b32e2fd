"""What the rows of `python -m bench loss` say: tables on the terminal, targets, plots."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.limits import passes, total_limits
from bench.providers import BACKWARD, FORWARD, GRAPH, PROVIDERS, TWO_NTXENT
from bench.rows import Row, read_rows

PLOTTED_WIDTH = 128


def _console() -> Console:
    # Piped output keeps its columns.
    return Console(width=None if sys.stdout.isatty() else 140)


def _p50(rows: Iterable[Row], provider: str, metric: str = "ms", *, case: Mapping[str, Any]) -> float | None:
    """The newest p50 of a provider in a case, None where there is none."""
    found = [
        row.p50
        for row in rows
        if (row.provider, row.metric) == (provider, metric) and all(row.case[k] == v for k, v in case.items())
    ]
    return found[-1] if found else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below is not None and below > 0 else None


# -- table ---------------------------------------------------------------------------------------------------------

COLUMNS = ("mode", "provider", "products", "FLOP/M²D", "ms", "p20 - p80", "MiB", "vs eager", "vs compiled", "of limit")


def print_case(rows: list[Row]) -> None:
    """The table of one case, with the limits under it."""
    if not rows:
        return
    loss, M, D = (rows[0].case[key] for key in ("loss", "M", "D"))
    table = Table(title=f"{loss}, M = {M:,}, D = {D}, both peers, on {rows[0].device_name}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right")
    for mode in (FORWARD, BACKWARD, GRAPH):
        for row in rows:
            if row.metric == "ms" and row.case["mode"] == mode:
                table.add_row(*_cells(row, rows))
        table.add_section()
    console = _console()
    console.print(table)
    for mode in (FORWARD, BACKWARD):
        if (line := limits_line(mode, loss, M, D, rows[0].device_name)) is not None:
            console.print(line, highlight=False)


def _cells(row: Row, rows: list[Row]) -> list[str]:
    mode = row.case["mode"]
    work = next((p.work for p in PROVIDERS if p.name == row.provider), None)
    memory = _p50(rows, row.provider, "bytes", case={"mode": mode})
    eager, compiled = (_ratio(_p50(rows, name, case={"mode": mode}), row.p50) for name in ("eager", "compiled"))
    return [
        mode, row.provider, row.case["products"], "-" if work is None else f"{work[mode != FORWARD]:g}",
        f"{row.p50:.4g}", f"{row.p20:.4g} - {row.p80:.4g}", "-" if memory is None else f"{memory / 2**20:,.1f}",
        *("-" if times is None else f"{times:.3g}x" for times in (eager, compiled)),
        "-" if row.floor is None else f"{row.floor / row.p50:.0%}",
    ]  # fmt: skip


def limits_line(mode: str, loss: str, M: int, D: int, device_name: str) -> str | None:
    """What each unit of the device needs for the two-pass algorithm; None for a device of unknown rates."""
    units = total_limits(passes(M, D, distill=loss == "mutual", backward=mode != FORWARD), device_name)
    if units is None:
        return None
    return (
        f"limits of {mode}: tensor cores {units.tensor_core:.3g} ms, exponentials {units.exponentials:.3g} ms, "
        f"instruction issue {units.issue:.3g} ms"
    )


# -- targets -------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A bound on one of our providers for the mutual loss at D = 128."""

    M: int
    mode: str
    what: str  # ms; bytes; `time/NAME`: NAME's time over ours; `memory/NAME`; `own/NAME`: our time over NAME's
    bound: float

    @property
    def at_most(self) -> bool:
        """Whether the bound is an upper one."""
        return self.what in ("ms", "bytes") or self.what.startswith("own/")


H200_TARGETS = (
    *(Target(M, mode, "ms", 0.040) for M in (512, 2048) for mode in (BACKWARD, GRAPH)),
    *(Target(8192, mode, "ms", 0.25) for mode in (BACKWARD, GRAPH)),
    *(Target(8192, mode, "time/eager", 20) for mode in (BACKWARD, GRAPH)),
    *(Target(8192, mode, "time/compiled", 8) for mode in (BACKWARD, GRAPH)),
    Target(65536, FORWARD, "ms", 2.3),
    Target(65536, BACKWARD, "ms", 11),
    *(Target(M, BACKWARD, f"own/{TWO_NTXENT}", 1.10) for M in (8192, 32768, 65536)),
    Target(2**20, BACKWARD, "ms", 3000),
    Target(2**20, BACKWARD, "bytes", 2.5e9),
)
CPU_TARGETS = (  # two cores
    Target(256, BACKWARD, "time/torch", 1),
    Target(4096, BACKWARD, "time/torch", 1.3),
    Target(8192, BACKWARD, "time/torch", 3),
    Target(16384, BACKWARD, "time/torch", 3),
    Target(16384, BACKWARD, "memory/torch", 50),
)
GRADIENT_ERROR = 3e-4  # of `triton` against float64, relative, at temperatures from 0.1


def _targets(device_name: str) -> tuple[str, tuple[Target, ...]]:
    """Whose targets hold for a device, and which; none where none were set."""
    if device_name == "NVIDIA H200":
        return "triton", H200_TARGETS
    return "native", CPU_TARGETS if device_name.startswith("2 cores") else ()


def print_targets(rows: list[Row], gradient_errors: Mapping[str, float]) -> None:
    """Measured values beside the targets, which hold for one kind of device each."""
    if not rows or rows[0].case["loss"] != "mutual":
        return
    ours, targets = _targets(rows[0].device_name)
    values = [(target, value) for target in targets if (value := measured(target, ours, rows)) is not None]
    if not values:
        return
    table = Table(title=f"targets of {ours} ({rows[0].device_name}, D = 128, both peers)", title_justify="left")
    for column in ("M", "mode", "what", "measured", "target", ""):
        table.add_column(column)
    for target, value in values:
        table.add_row(*_target_cells(target, value))
    if ours == "triton" and ours in gradient_errors:
        met = "met" if gradient_errors[ours] <= GRADIENT_ERROR else "not met"
        table.add_row("", "", "gradient error", f"{gradient_errors[ours]:.1e}", f"<= {GRADIENT_ERROR:g}", met)
    _console().print(table)


def measured(target: Target, ours: str, rows: list[Row]) -> float | None:
    """The target's quantity in these rows, None where they do not hold it."""
    case = {"M": target.M, "D": 128, "mode": target.mode}
    if target.what in ("ms", "bytes"):
        return _p50(rows, ours, target.what, case=case)
    kind, _, other = target.what.partition("/")
    metric = "bytes" if kind == "memory" else "ms"
    own, others = _p50(rows, ours, metric, case=case), _p50(rows, other, metric, case=case)
    return _ratio(own, others) if kind == "own" else _ratio(others, own)


def _target_cells(target: Target, value: float) -> list[str]:
    kind, _, other = target.what.partition("/")
    names = {
        "bytes": "bytes, inputs not counted", "time": f"times as fast as {other}", "own": f"time / {other}",
        "memory": f"memory of {other} / ours",
    }  # fmt: skip
    met = value <= target.bound if target.at_most else value >= target.bound
    return [
        f"{target.M:,}", target.mode, names.get(kind, kind), f"{value:.4g}",
        f"{'<=' if target.at_most else '>='} {target.bound:g}", "met" if met else "not met",
    ]  # fmt: skip


# -- plot ----------------------------------------------------------------------------------------------------------


def plot(path: Path) -> list[Path]:
    """loss_<loss>.png beside the rows: time and memory over M, the newest row of each case; returns what it wrote."""
    rows = read_rows(path)
    losses = dict.fromkeys(row.case["loss"] for row in rows if row.case["D"] == PLOTTED_WIDTH)
    return [_plot(path.with_name(f"loss_{loss}.png"), rows, loss) for loss in losses]


def _plot(path: Path, rows: list[Row], loss: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: no display, no global state
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.case["loss"] == loss and row.case["D"] == PLOTTED_WIDTH]
    figure = Figure(figsize=(10.5, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for column, mode in enumerate((FORWARD, BACKWARD)):
        for axis, metric, label in zip(axes[:, column], ("ms", "bytes"), ("ms", "peak MiB"), strict=True):
            _draw(axis, [row for row in rows if (row.case["mode"], row.metric) == (mode, metric)])
            axis.set_xscale("log", base=2)
            axis.set(yscale="log", ylabel=label)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(mode)
        axes[1, column].set_xlabel("rows M = 2N")
    handles, labels = axes[1, 1].get_legend_handles_labels()  # memory has a limit on every device
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.suptitle(f"{loss} loss, both peers, D = {PLOTTED_WIDTH}, {rows[-1].device_name}")
    figure.savefig(path, dpi=110)
    return path


def _draw(axis, rows: list[Row]) -> None:
    scale = 1 / 2**20 if rows and rows[0].metric == "bytes" else 1.0
    for i, provider in enumerate(p.name for p in PROVIDERS):  # one colour a provider in every panel
        newest = {row.case["M"]: row.p50 * scale for row in rows if row.provider == provider}
        if newest:
            axis.plot(*zip(*sorted(newest.items()), strict=True), label=provider, marker="os"[i // 10], color=f"C{i}")
    floors = {row.case["M"]: row.floor * scale for row in rows if row.floor is not None}
    if floors:
        axis.plot(*zip(*sorted(floors.items()), strict=True), label="limit", color="black", linestyle="--")
