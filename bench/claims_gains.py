"""Gains from rows of `bench accuracy`: which rows are compared, differences within a seed, and their interval."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.rows import Row

# 97.5 % quantiles of Student's t by degrees of freedom, any table of it has them.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# Of a row's command: with others it is another measurement.  Shares, rates, kinds of noise and other data are told
# apart by the scores' own names.
SETTINGS = ("seed=", "draws=", "data.", "knn.", "linear.", "corruptions.")
PLACES = ("data.root=", "data.manifest=", "data.workers=")  # where data are and how they are read measures the same


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


def key_of(row: Row) -> Key:
    """The comparison that a row belongs to."""
    words = shlex.split(row.command)
    # Behind --train stands a change to the configuration, which the row has by itself.
    own = [word for before, word in zip(["", *words], words, strict=False) if before != "--train"]
    given = {word.partition("=")[0]: word for word in own if word.startswith(SETTINGS) and not word.startswith(PLACES)}
    return Key(row.case["preset"], row.case["steps"], tuple(row.case["changes"]), tuple(sorted(given.values())))


def comparisons(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The rows of each comparison that count: of those of one run and score, the newest."""
    found: dict[Key, dict[tuple[object, ...], Row]] = {}
    for row in rows:
        own = found.setdefault(key_of(row), {})
        own[row.metric, *map(row.case.get, ("weight", "tau_distill", "seed", "peer", "protocol", "setting"))] = row
    return {key: list(own.values()) for key, own in found.items()}


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


def peers_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(name, backbone) of every peer with scores."""
    return list(dict.fromkeys((row.case["peer"], row.case["backbone"]) for row in rows if row.metric == "accuracy"))
