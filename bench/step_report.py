"""What `python -m bench step` prints and draws: rates side by side, where a step goes, which setting is fastest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.rows import Environment, Row
from bench.step_data import REAL
from bench.step_providers import CONCURRENT, ENGINE, PLAIN
from engine.profile import IDLE, OTHER, PARTS
from engine.profile_page import COLOURS

SMALL_PX = 32
EPOCHS, EPOCH_IMAGES = 200, 50_000  # of the run on CIFAR-10 whose time is told

COLUMNS = (
    "pair", "batch", "data", "provider", "images/s", "p20 - p80", "views/s", f"vs {PLAIN}", "MFU", "MiB",
    f"{EPOCHS} epochs, min",
)  # fmt: skip


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as COLUMNS have them; the last is what so many epochs of CIFAR-10 take at this rate, on a GPU."""
    found = {(row.case["pair"], row.case["batch"], row.case["data"], row.provider, row.metric): row for row in rows}
    lines = []
    for (*case, name, metric), row in found.items():
        if metric != "images_per_s":
            continue
        pair, batch, data = case
        plain, mfu, held = (
            found.get((pair, batch, data, *other)) for other in ((PLAIN, metric), (name, "mfu"), (name, "bytes"))
        )
        cifar = held is not None and data == REAL and row.case["size"] == SMALL_PX
        lines.append([
            pair, str(batch), data, name, _digits(row.p50), f"{_digits(row.p20)} - {_digits(row.p80)}",
            _digits(row.p50 * row.case["views"]),
            "-" if plain is None else f"{row.p50 / plain.p50:.2f}x",
            "-" if mfu is None else f"{mfu.p50:.1%}",
            "-" if held is None else f"{held.p50 / 2**20:,.0f}",
            f"{EPOCHS * EPOCH_IMAGES / row.p50 / 60:.1f}" if cifar else "-",
        ])  # fmt: skip
    return lines


def _digits(rate: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


PART_COLUMNS = ("pair", "batch", "data", "provider", "ms", *PARTS, OTHER, IDLE)


def part_cells(rows: Iterable[Row]) -> list[list[str]]:
    """What share of a step each part takes, as PART_COLUMNS have it."""
    lines = []
    for (pair, batch, data, name), ms in parts_of(rows).items():
        whole = sum(ms.values())
        shares = [f"{ms[part] / whole:.1%}" if ms.get(part) else "-" for part in (*PARTS, OTHER, IDLE)]
        lines.append([pair, str(batch), data, name, _digits(whole), *shares])
    return lines


def parts_of(rows: Iterable[Row]) -> dict[tuple[str, int, str, str], dict[str, float]]:
    """Milliseconds of the parts of a step by pair, batch, data and provider."""
    found: dict[tuple[str, int, str, str], dict[str, float]] = {}
    for row in rows:
        if row.metric == "ms":
            key = row.case["pair"], row.case["batch"], row.case["data"], row.provider
            found.setdefault(key, {})[row.case["part"]] = row.p50
    return found


def fastest(rows: Iterable[Row]) -> list[str]:
    """For each case in which the peers were run at once in several ways, the fastest, against one behind the other."""
    rates: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric == "images_per_s" and row.provider in CONCURRENT:
            case = f"{row.case['pair']}, batch {row.case['batch']}, {row.case['data']}"
            rates.setdefault(case, {})[row.provider] = row.p50
    lines = []
    for case, of in rates.items():
        if len(of) > 1 and ENGINE in of:
            best = max(of, key=lambda name: of[name])
            lines.append(f"{case}: fastest of {', '.join(of)}: {best}, {of[best] / of[ENGINE]:.2f}x of {ENGINE}")
    return lines


def show(rows: Sequence[Row], env: Environment, world: int) -> None:
    """Prints both tables and the fastest."""
    where = f"{env.device_name}, {world} ranks" if world > 1 else env.device_name
    console = Console(width=170)
    for title, columns, lines in (
        (f"whole steps on {where}", COLUMNS, cells(rows)),
        ("where a step under the profiler goes", PART_COLUMNS, part_cells(rows)),
    ):
        table = Table(*columns, title=title, title_justify="left")
        for cell in lines:
            table.add_row(*cell)
        console.print(table)
    for line in fastest(rows):
        print(line)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a picture: a bar a provider and case, its length the milliseconds of a step, by parts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: no display, no global state
    from matplotlib.figure import Figure

    found = parts_of(rows)
    cases = list(dict.fromkeys(key[:3] for key in found))
    bars = {case: [key for key in found if key[:3] == case] for case in cases}
    figure = Figure(figsize=(10, 0.9 + sum(0.9 + 0.36 * len(keys) for keys in bars.values())), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes = figure.subplots(len(cases), 1, squeeze=False, height_ratios=[len(keys) + 2 for keys in bars.values()])
    for axis, (case, keys) in zip(axes[:, 0], bars.items(), strict=True):
        _draw_case(axis, "{}, batch {}, {} data".format(*case), {key[3]: found[key] for key in keys})
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=110)


def _draw_case(axis: Any, title: str, found: dict[str, dict[str, float]]) -> None:
    ends = [0.0] * len(found)
    for part in (*PARTS, OTHER, IDLE):
        lengths = [ms.get(part, 0.0) for ms in found.values()]
        axis.barh(range(len(found)), lengths, left=ends, color=COLOURS[part], label=part, height=0.74)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for place, end in enumerate(ends):
        axis.text(end, place, f"  {_digits(end)} ms", va="center", fontsize=8.5)
    axis.set_yticks(range(len(found)), list(found), fontsize=9)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(0, 1.12 * max(ends))
    axis.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
