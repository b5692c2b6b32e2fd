"""A profile on one page: as text, and as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.profile_trace import IDLE, OTHER, PARTS, Breakdown, Busiest

COLOURS = {  # Okabe and Ito's, which differ for the colour-blind too
    "data": "#E69F00", "forward": "#0072B2", "loss": "#56B4E9", "backward": "#D55E00", "optimizer": "#009E73",
    "communication": "#CC79A7", OTHER: "#8C8C8C", IDLE: "#E4E4E4",
}  # fmt: skip
WIDTH = 60  # characters of a name
MOST_ROWS = 9  # of the timeline


def as_text(found: Breakdown, facts: Mapping[str, str]) -> str:
    """The page as plain text; `facts`: what stands at its head, title first."""
    title, *head = facts.items()
    whose = "the device's" if found.on_device else "the host's"
    lines = [title[1], "=" * len(title[1]), ""]
    lines += [f"{key:<16}{value}" for key, value in head]
    lines += ["", f"{'part':<16}{whose + ' time':>18}{'ms a step':>12}"]
    for part in (*PARTS, OTHER, IDLE):
        if part != IDLE or found.on_device:
            lines.append(f"{part:<16}{found.shares[part]:>18.1%}{found.shares[part] * found.ms_per_step:>12.3f}")
    lines += ["", *_remarks(found)]
    what = "kernel" if found.on_device else "operator"
    lines += ["", f"{f'busiest {what}s':<{WIDTH}}  {'part':<14}{'ms a step':>10}{'calls':>9}{'share':>8}"]
    for row in found.busiest:
        calls = f"{row.calls:,.1f}" if row.calls else "-"
        lines.append(f"{shortened(row.name):<{WIDTH}}  {row.part:<14}{row.ms:>10.3f}{calls:>9}{row.share:>8.1%}")
    return "\n".join(lines) + "\n"


def _remarks(found: Breakdown) -> list[str]:
    if not found.on_device:
        return ["An operator's time is its own, without that of operators inside of it."]
    lines = []
    waits = [f"{part} {share:.1%}" for part, share in _by_size(found.idle_host) if share >= 0.0005]
    if waits:
        lines.append(f"While the device idled, the host was in: {', '.join(waits)}.")
    if found.graphs:
        lines.append("A CUDA graph counts as the part that launches it: forward holds views, networks and losses.")
    return [*lines, "Kernels that overlap count in full in the list, and share the time by parts."]


def _by_size(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(shares.items(), key=lambda item: -item[1])


def shortened(name: str, width: int = WIDTH) -> str:
    """The name of a kernel or operator without what tells nothing, cut in the middle where it is still too long."""
    name = re.sub(r"\(anonymous namespace\)::|^void |at::native::|autograd::engine::", "", name)
    name = re.sub(r", (std::array|at::detail::Array)<char\*, \w+>| (?=>)", "", name)  # of every elementwise kernel
    name = re.sub(r"(?<=\w)\([^<>]*\)$|(?<=>)\(.*\)$", "", name)  # a C++ kernel's parameters
    tail = width // 3
    return name if len(name) <= width else f"{name[: width - 3 - tail]}...{name[-tail:]}"


def draw(found: Breakdown, facts: Mapping[str, str], path: Path) -> None:
    """Writes the page as a PNG: the step by parts, the busiest kernels or operators, the timeline of a step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: no display, no global state
    from matplotlib.figure import Figure

    rows = _rows(found)
    heights = [1.0, 0.29 * max(len(found.busiest), 3), 0.34 * len(rows) + 0.2]
    figure = Figure(figsize=(11, sum(heights) + 2.7), layout="constrained")
    FigureCanvasAgg(figure)
    title, *head = facts.items()
    parts, busiest, timeline = figure.subplots(3, 1, height_ratios=heights)
    parts.set_title(title[1], loc="left", fontweight="bold", pad=22)
    line = " · ".join(value for _, value in head)
    parts.text(0, 1.06, line, transform=parts.transAxes, fontsize=8.5, color="#555555")
    _draw_parts(parts, found)
    _draw_busiest(busiest, found.busiest, "kernels" if found.on_device else "operators")
    _draw_timeline(timeline, found, rows)
    figure.savefig(path, dpi=120)


def _draw_parts(axis: Any, found: Breakdown) -> None:
    """One bar, each part labelled on it, or below it where it is too narrow."""
    left, narrow = 0.0, []
    for part, share in found.shares.items():
        if share <= 0:
            continue
        (bar,) = axis.barh(0, share, left=left, color=COLOURS[part], edgecolor="white", linewidth=0.8)
        if share >= 0.012 * len(part) and share >= 0.06:
            colour = "black" if part in (IDLE, "data", "loss", "communication") else "white"
            axis.text(left + share / 2, 0, f"{part}\n{share:.1%}", ha="center", va="center", color=colour, fontsize=9)
        else:
            narrow.append((bar, f"{part} {share:.1%}"))
        left += share
    if narrow:
        axis.legend(
            *zip(*narrow, strict=True), loc="upper left", bbox_to_anchor=(-0.008, 0.0), ncols=len(narrow), fontsize=8.5,
            frameon=False, handlelength=1, handleheight=1, columnspacing=1.4,
        )  # fmt: skip
    axis.set_xlim(0, 1)
    axis.axis("off")


def _draw_busiest(axis: Any, busiest: list[Busiest], what: str) -> None:
    places = range(len(busiest))
    axis.barh(places, [row.ms for row in busiest], color=[COLOURS[row.part] for row in busiest], height=0.72)
    for place, row in zip(places, busiest, strict=True):
        times = f", {row.calls:,.4g} x" if row.calls else ""
        axis.text(row.ms, place, f"  {row.ms:.3g} ms, {row.share:.1%}{times}", va="center", fontsize=8)
    axis.set_yticks(places, [shortened(row.name, 48) for row in busiest], fontsize=8)
    axis.set_ylim(len(busiest) - 0.4, -0.6)
    axis.set_xlim(0, 1.25 * max((row.ms for row in busiest), default=1))
    axis.set_title(f"busiest {what}: ms a step, share, calls", loc="left", fontsize=10)
    _bare(axis)


def _rows(found: Breakdown) -> list[str]:
    """The host, then the other rows with most time."""
    time: dict[str, float] = {}
    for bar in found.timeline:
        time[bar.row] = time.get(bar.row, 0.0) + bar.length
    others = [row for row, _ in _by_size(time) if row != "host"]
    return ["host", *sorted(others[: MOST_ROWS - 1], key=lambda row: (len(row), row))]


def _draw_timeline(axis: Any, found: Breakdown, rows: list[str]) -> None:
    for place, row in enumerate(rows):
        bars = [bar for bar in found.timeline if bar.row == row]
        axis.broken_barh(
            [(bar.start, bar.length) for bar in bars], (place - 0.36, 0.72), color=[COLOURS[bar.part] for bar in bars],
            linewidth=0,
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, max((bar.start + bar.length for bar in found.timeline), default=1))
    axis.set_title("the step of median length, ms", loc="left", fontsize=10)
    _bare(axis)


def _bare(axis: Any) -> None:
    """Nothing around the bars but the axis that they are measured on."""
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
