"""What an evaluation found: a table on the terminal, JSON, markdown, and pictures with error bars."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from engine.evaluation import Score

COLUMNS = ("protocol", "setting", "trained on", "tested on", "draws")


def write(folder: Path, scores: Sequence[Score], facts: dict[str, Any]) -> list[Path]:
    """scores.json, scores.md and the pictures that there are scores for, into `folder`; returns the files.

    `facts`: what they were made from; JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {**facts, "scores": [{**asdict(s), "mean": s.mean, "std": s.std} for s in scores]}
    (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "scores.md").write_text(as_markdown(scores))
    return [folder / "scores.json", folder / "scores.md", *draw(folder, scores)]


def read(file: Path) -> tuple[list[Score], dict[str, Any]]:
    """Scores and facts of a scores.json."""
    facts = json.loads(file.read_text())
    kept = Score.__dataclass_fields__
    scores = [{key: value for key, value in row.items() if key in kept} for row in facts.pop("scores")]
    return [Score(**{**row, "values": tuple(row["values"])}) for row in scores], facts


# -- tables ----------------------------------------------------------------------------------------------------------


def show(scores: Sequence[Score]) -> None:
    """Prints the table."""
    header, lines = _cells(scores)
    table = Table(*header[:2], *(Column(name, justify="right") for name in header[2:]))
    for line in lines:
        table.add_row(*line)
    # As wide as its cells: a narrower one loses their ends.  Names of data sets are text, not rich's markup.
    Console(width=10_000, markup=False).print(table)


def as_markdown(scores: Sequence[Score]) -> str:
    """The table as markdown."""
    header, lines = _cells(scores)
    rows = [header, ["---", "---", *["---:"] * (len(header) - 2)], *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """A line for each protocol and setting, a column for each encoder."""
    encoders = list(dict.fromkeys((s.peer, s.backbone) for s in scores))
    found = {(s.protocol, s.setting, s.peer, s.backbone): s for s in scores}
    lines = []
    for protocol, setting in dict.fromkeys((s.protocol, s.setting) for s in scores):
        own = [found.get((protocol, setting, *encoder)) for encoder in encoders]
        first = next(s for s in own if s is not None)
        lines.append([
            protocol, setting, f"{first.train:,}", f"{first.test:,}", str(len(first.values)),
            *("-" if s is None else described(s) for s in own),
        ])  # fmt: skip
    return [*COLUMNS, *(f"{peer} ({backbone})" for peer, backbone in encoders)], lines


def described(score: Score) -> str:
    """Mean and standard deviation in percent."""
    return f"{score.mean:.1%}" + ("" if score.std is None else f" ± {100 * score.std:.1f}")


# -- pictures --------------------------------------------------------------------------------------------------------


def draw(folder: Path, scores: Sequence[Score]) -> list[Path]:
    """few.png, noisy.png, corruptions.png, scores.png: means, and bars of one standard deviation over the draws."""
    pictures: dict[str, Callable[[Any, list[Score]], None]] = {
        "few": _draw_few, "noisy": _draw_noisy, "corruptions": _draw_corruptions,
    }  # fmt: skip
    written = []
    for protocol, plot in pictures.items():
        own = [s for s in scores if s.protocol == protocol]
        if own:
            written.append(_picture(folder / f"{protocol}.png", plot, own))
    rest = [s for s in scores if s.protocol not in pictures]
    return [*written, _picture(folder / "scores.png", _draw_bars, rest)] if rest else written


def _picture(path: Path, plot: Callable[[Any, list[Score]], None], scores: list[Score]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure, scores)
    figure.savefig(path, dpi=110)
    return path


def _draw_few(figure: Any, scores: list[Score]) -> None:
    axis = figure.subplots()
    if len({s.setting for s in scores}) > 1:
        axis.set_xscale("log")
    for label, own in _by_encoder(scores):
        _line(axis, label, [float(s.setting.rstrip("%")) for s in own], own)
    _finish(axis, "labels, % of every class")


def _draw_noisy(figure: Any, scores: list[Score]) -> None:
    axis = figure.subplots()
    for label, own in _by_encoder(scores):
        kinds: dict[str, list[Score]] = {}
        for score in own:
            kind, _, rate = score.setting.rpartition(" ")
            if rate.endswith("%"):
                kinds.setdefault(kind, []).append(score)
        for kind, line in kinds.items():
            rates = [float(s.setting.rpartition(" ")[2].rstrip("%")) for s in line]
            _line(axis, f"{label}, {kind}", rates, line)
        for score in own:
            if score.setting.startswith("human"):
                axis.axhline(100 * score.mean, color="0.7", linewidth=0.6)
                place = {"xy": (0.01, 100 * score.mean), "xycoords": axis.get_yaxis_transform()}  # whatever the rates
                axis.annotate(f"{score.setting}, {score.peer}", fontsize=6, color="0.4", **place)
    _finish(axis, "wrong labels, %")


def _draw_corruptions(figure: Any, scores: list[Score]) -> None:
    axis = figure.subplots()
    for label, own in _by_encoder(scores):
        by_severity = [s for s in own if s.setting.startswith("severity")]
        _line(axis, label, [float(s.setting.split()[1]) for s in by_severity], by_severity)
    _finish(axis, "severity")


def _draw_bars(figure: Any, scores: list[Score]) -> None:
    axis = figure.subplots()
    names = list(dict.fromkeys(_name(s) for s in scores))
    encoders = _by_encoder(scores)
    for i, (label, own) in enumerate(encoders):
        height = 0.8 / len(encoders)
        at = [names.index(_name(s)) + i * height for s in own]
        axis.barh(at, [100 * s.mean for s in own], height, xerr=[100 * (s.std or 0) for s in own], label=label)
    axis.set_yticks([i + 0.4 - 0.4 / len(encoders) for i in range(len(names))], names)
    axis.invert_yaxis()
    axis.set_xlabel("accuracy, %")
    axis.legend()


def _name(score: Score) -> str:
    return f"{score.protocol} {score.setting}".strip()


def _by_encoder(scores: list[Score]) -> list[tuple[str, list[Score]]]:
    encoders = dict.fromkeys((s.peer, s.backbone) for s in scores)
    return [
        (f"{peer} ({backbone})", [s for s in scores if (s.peer, s.backbone) == (peer, backbone)])
        for peer, backbone in encoders
    ]


def _line(axis: Any, label: str, x: list[float], scores: list[Score]) -> None:
    means, bars = [100 * s.mean for s in scores], [100 * (s.std or 0) for s in scores]
    axis.errorbar(x, means, yerr=bars, marker="o", capsize=3, label=label)


def _finish(axis: Any, label: str) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel("accuracy, %")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:  # labels by people alone have theirs at the line
        axis.legend(fontsize=8)
