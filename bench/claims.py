"""`python -m bench claims`: RESULTS.md, what the paper claims against what was measured, from rows of `bench accuracy`.

Runs of one seed start from the same weights and see the same views with and without distillation, so gains are
differences within a seed; their interval is Student's, at 95 %.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import claims_picture
from bench.accuracy_presets import DOGO
from bench.readme import markdown
from bench.rows import RESULTS, ROOT, Row, read_rows

PAGE = ROOT / "RESULTS.md"

# 97.5 % quantiles of Student's t by degrees of freedom, any table of it has them.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# Of a row's command: with others it is another measurement.
SETTINGS = ("seed=", "draws=", "knn.", "linear.", "corruptions.images=")

# What the abstract says (Bhat, Arani & Zonooz 2021, arXiv 2104.09866), and the scores that would show it.
CLAIMS = {
    "better features than the same network trained alone": ("linear", "knn", "official"),
    "also with limited labels": ("few",),
    "also with noisy labels": ("noisy",),
    "also out of distribution": ("ood", "transfer", "corruptions"),
}
VERDICTS = ("gain", "no difference seen", "loss", "one seed")
YARDSTICKS = (
    ("ResNet-18, SimCLR, 1,000 epochs, linear", "90.7 %", "solo-learn"),
    ("ResNet-18, SimCLR, 200 epochs, kNN (k = 200)", "84.8 %", "lightly"),
)


class Key(NamedTuple):
    """What runs that are compared have in common."""

    preset: str
    steps: int
    changes: tuple[str, ...]
    evaluation: tuple[str, ...]
    """Settings of the probes that change their scores."""


class Gain(NamedTuple):
    """Differences of one score over seeds."""

    n: int
    alone: Sequence[float]
    together: Sequence[float]

    @property
    def mean(self) -> float:
        """Of the differences."""
        return statistics.fmean(self.differences)

    @property
    def differences(self) -> list[float]:
        """With minus without distillation, a seed each."""
        return [b - a for a, b in zip(self.alone, self.together, strict=True)]

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval; None for one seed."""
        if self.n < 2:
            return None
        return student(self.n - 1) * statistics.stdev(self.differences) / self.n**0.5

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.half_width is None:
            return "one seed"
        if abs(self.mean) <= self.half_width:
            return "no difference seen"
        return "gain" if self.mean > 0 else "loss"


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t: beyond the table by Abramowitz & Stegun 26.7.5, right to four digits there."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**i for i, term in enumerate(terms))


# -- numbers -----------------------------------------------------------------------------------------------------------


def measured(device: str) -> list[Row]:
    """Rows of `bench accuracy` of one device."""
    path = RESULTS / device / "accuracy.jsonl"
    return [row for row in read_rows(path) if "preset" in row.case] if path.exists() else []


def key_of(row: Row) -> Key:
    """The comparison that a row belongs to."""
    given = [word for word in shlex.split(row.command) if word.startswith(SETTINGS)]
    return Key(row.case["preset"], row.case["steps"], tuple(row.case["changes"]), tuple(sorted(given)))


def by_seed(rows: Iterable[Row], weight: float, tau: float, **where: object) -> dict[int, float]:
    """Mean score of each seed, the newest row of each."""
    found = {}
    for row in rows:
        case = row.case
        same = row.metric == "accuracy" and where.items() <= case.items() and case["weight"] == weight
        if same and (weight == 0 or case["tau_distill"] == tau):
            found[case["seed"]] = statistics.fmean(case["values"])
    return found


def gain(rows: Sequence[Row], weight: float, tau: float, **where: object) -> Gain | None:
    """Over the seeds that have both; None where there are none."""
    alone, together = by_seed(rows, 0.0, tau, **where), by_seed(rows, weight, tau, **where)
    seeds = sorted(alone.keys() & together.keys())
    return Gain(len(seeds), [alone[s] for s in seeds], [together[s] for s in seeds]) if seeds else None


# -- the page ----------------------------------------------------------------------------------------------------------


def page(devices: Sequence[str]) -> str:
    """RESULTS.md."""
    parts = [
        "# What was measured of the paper's claims\n",
        "Distill on the Go (Bhat, Arani & Zonooz 2021, arXiv 2104.09866): two peers that distil each other should each "
        "learn better features than the same network trained alone.  Generated by `python -m bench claims` from "
        "`bench/results/*/accuracy.jsonl`; every figure is a row there.\n",
        "Each seed is run twice, with the distillation's weight at 0 and above: the same weights at the start, views, "
        "batches and steps.  A gain is the difference within a seed, ± half of its 95 % interval (Student's t over "
        "seeds); a gain within its interval is no difference seen.  Scores of one run depend on each other, so that "
        "many gains are not many proofs.\n",
    ]
    found = {device: rows for device in devices if (rows := measured(device))}
    parts.append(_claims(found))
    for device, rows in found.items():
        for key in dict.fromkeys(map(key_of, rows)):
            parts.append(_section(device, key, [row for row in rows if key_of(row) == key]))
    parts.append(_yardsticks())
    return "\n".join(parts)


def _claims(found: dict[str, list[Row]]) -> str:
    """The paper's claims against every comparison there is."""
    lines = []
    for device, rows in found.items():
        for key in dict.fromkeys(map(key_of, rows)):
            own = [row for row in rows if key_of(row) == key]
            for claim, protocols in CLAIMS.items():
                gains = list(_gains(own, protocols))
                if gains:
                    lines.append([_title(device, key), claim, *_verdicts(gains)])
    header = ["setting", "claim", "scores", *VERDICTS, "mean gain"]
    return "## The claims\n\n" + markdown(header, lines)


def _gains(rows: list[Row], protocols: Sequence[str]) -> Iterable[Gain]:
    """Of every peer and score, corruptions as their mean alone."""
    scores = dict.fromkeys(
        (row.case["protocol"], row.case["setting"], row.case["peer"])
        for row in rows
        if row.metric == "accuracy" and row.case["protocol"] in protocols
    )
    for protocol, setting, peer in scores:
        if protocol == "corruptions" and setting != "mean":
            continue
        found = gain(rows, *DOGO, protocol=protocol, setting=setting, peer=peer)
        if found is not None:
            yield found


def _verdicts(gains: list[Gain]) -> list[str]:
    count = {verdict: sum(g.verdict == verdict for g in gains) for verdict in VERDICTS}
    mean = statistics.fmean(g.mean for g in gains)
    return [str(len(gains)), *map(str, count.values()), f"{100 * mean:+.1f}"]


def _title(device: str, key: Key) -> str:
    changes = "".join(f", {change}" for change in (*key.changes, *key.evaluation))
    return f"`{key.preset}`, {key.steps:,} steps{changes}, {device}"


def _section(device: str, key: Key, rows: list[Row]) -> str:
    """All scores of one comparison."""
    lines = [[score, peer, *_cells(found)] for (score, peer), found in every_gain(rows).items()]
    table = markdown(["score, %", "peer", "alone", "distilling", "gain", "seeds", "says"], lines)
    picture = f"![Gains]({picture_of(device, key).relative_to(RESULTS.parents[1])})\n" if lines else ""
    parts = [f"## {_title(device, key)}\n", table, picture, _sweep(rows), _source(rows)]
    return "\n".join(part for part in parts if part)


def every_gain(rows: Sequence[Row]) -> dict[tuple[str, str], Gain]:
    """(score, peer) -> its gain by the method's own distillation."""
    peers = dict.fromkeys((row.case["peer"], row.case["backbone"]) for row in rows if row.metric == "accuracy")
    scores = dict.fromkeys(
        (row.case["protocol"], row.case["setting"]) for row in rows if row.metric == "accuracy"
    )  # fmt: skip
    found = {
        (f"{protocol} {setting}".strip(), f"{peer} ({backbone})"): gain(
            rows, *DOGO, protocol=protocol, setting=setting, peer=peer
        )
        for protocol, setting in scores
        for peer, backbone in peers
    }
    return {key: own for key, own in found.items() if own is not None}


def picture_of(device: str, key: Key) -> Path:
    """Where the picture of a comparison lies."""
    words = [key.preset, f"{key.steps}steps", *key.changes, *key.evaluation]
    return RESULTS / device / ("accuracy-" + re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()) + ".png")


def _cells(found: Gain) -> list[str]:
    width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    return [
        _spread(found.alone), _spread(found.together), f"{100 * found.mean:+.1f}{width}", str(found.n), found.verdict,
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    std = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{std}"


def _sweep(rows: list[Row]) -> str:
    """Gains of the linear score by weight and temperature, where more than one was tried."""
    arms = sorted({(row.case["weight"], row.case["tau_distill"]) for row in rows if row.case["weight"]})
    if len(arms) < 2:
        return ""
    peers = dict.fromkeys((row.case["peer"], row.case["backbone"]) for row in rows if row.metric == "accuracy")
    lines = []
    for weight, tau in arms:
        gains = [gain(rows, weight, tau, protocol="linear", peer=peer) for peer, _ in peers]
        lines.append([f"{weight:g}", f"{tau:g}", *("-" if g is None else _cells(g)[2] for g in gains)])
    header = ["weight", "temperature", *(f"{peer} ({backbone}), linear" for peer, backbone in peers)]
    return "The gain by weight and temperature of the distillation:\n\n" + markdown(header, lines)


def _source(rows: list[Row]) -> str:
    """Machine, time and commands."""
    spent = sum(row.p50 for row in rows if row.metric == "seconds")
    runs = sum(row.metric == "seconds" for row in rows)
    last = rows[-1]
    commands = ", ".join(f"`{c}` (commit {k})" for k, c in dict.fromkeys((row.commit, row.command) for row in rows))
    what = "GPU hours" if last.driver else "hours"
    return (
        f"{runs} runs of two peers, {spent / 3600:.2f} {what} of training on {last.device_name}, torch {last.torch}, "
        f"{last.date}: {commands}\n"
    )


def _yardsticks() -> str:
    lines = [list(line) for line in YARDSTICKS]
    return (
        "## Others' figures on CIFAR-10\n\nFrom their own pages, not measured here; of much longer runs than ours.\n\n"
        + markdown(["what", "accuracy", "from"], lines)
    )


def main(argv: list[str]) -> int:
    """Writes RESULTS.md and its pictures."""
    argparse.ArgumentParser("python -m bench claims", description=__doc__.splitlines()[0]).parse_args(argv)
    devices = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())
    PAGE.write_text(page(devices))
    for device in devices:
        rows = measured(device)
        for key in dict.fromkeys(map(key_of, rows)):
            own = every_gain([row for row in rows if key_of(row) == key])
            points = {which: (100 * g.mean, 100 * (g.half_width or 0)) for which, g in own.items()}
            if points:
                claims_picture.draw(points, _title(device, key).replace("`", ""), picture_of(device, key))
    return 0
