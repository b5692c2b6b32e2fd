"""The gains of one comparison as a picture: a point a score and peer, its bar the 95 % interval, against zero."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(gains: Mapping[tuple[str, str], tuple[float, float]], title: str, path: Path) -> None:
    """Writes a PNG; `gains`: (score, peer) -> gain and half of its interval, in points of accuracy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: no display, no global state
    from matplotlib.figure import Figure

    scores = list(dict.fromkeys(score for score, _ in gains))
    peers = list(dict.fromkeys(peer for _, peer in gains))
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    axis.axvline(0, color="0.5", linewidth=0.8)
    for i, peer in enumerate(peers):
        own = [(scores.index(score), *gains[score, peer]) for score in scores if (score, peer) in gains]
        at, means, widths = zip(*own, strict=True)
        places = [place + 0.3 * (i - (len(peers) - 1) / 2) for place in at]
        axis.errorbar(means, places, xerr=widths, fmt="o", capsize=3, markersize=4, label=peer)
    axis.set_yticks(range(len(scores)), scores)
    axis.invert_yaxis()
    axis.set_xlabel("gain over the same network trained alone, points")
    axis.set_title(title, fontsize=9, loc="left")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
