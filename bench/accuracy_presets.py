"""What `python -m bench accuracy` can run: pairs of networks, their data and budgets, and what is asked of them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.rows import ROOT
from engine.config import Config, parse_config
from engine.settings import overridden

LOG_STEPS = 50  # rows wait for the device; a slice ends at one of them
SAVE_STEPS = 1000  # a kill, which asks nobody, costs no more
MEASURED = {"protocols": ["knn", "linear", "few", "noisy", "corruptions"], "corruptions": {"images": 500}}
PLAIN_CHANGE = re.compile(r"[A-Za-z0-9._]+=[A-Za-z0-9._-]*")
MOST_LETTERS = 150  # of a folder's name that are changes


class Preset(NamedTuple):
    """A pair of peers on a data set."""

    config: str
    """In configs/: everything but the budget."""
    budget: dict[str, int]
    """run.steps or run.epochs, where the command gives no other."""
    changes: tuple[str, ...]
    """To the configuration."""
    evaluation: dict[str, Any]
    """As the settings of engine/evaluate.py, on top of their defaults."""


PRESETS = {
    "tiny": Preset(
        "quickstart", {"steps": 200}, (),
        {**MEASURED, "knn": {"k": 50}, "linear": {"steps": 1000}, "noisy": {"rates": [0.4, 0.8]},
         "few": {"shares": [0.01, 0.1]}, "corruptions": {"images": 200}},
    ),
    "cifar10-wrn16-wrn16": Preset("cifar10_wrn16_wrn16", {"epochs": 200}, (), MEASURED),
    "cifar10-wrn16-r50": Preset("cifar10_wrn16_r50", {"epochs": 200}, (), MEASURED),
    "cifar10-r18-r18": Preset("cifar10_r18_r18", {"epochs": 200}, (), MEASURED),
    "imagewoof-r18-r50": Preset("folder_r18_r50", {"epochs": 200}, ("data.image_size=128",), MEASURED),
}  # fmt: skip


class Arm(NamedTuple):
    """What the peers learn from each other; weight 0 leaves each alone."""

    weight: float
    tau: float

    @property
    def provider(self) -> str:
        """In rows."""
        return "dogo" if self.weight else "alone"

    @property
    def folder(self) -> str:
        """Of its runs."""
        return f"weight{self.weight:g}-tau{self.tau:g}" if self.weight else "alone"


# The method's own setting against the same pair with weight 0, where no peer feels the other: each is the same network
# trained alone, from the same weights, on the same views, for as many steps (a test holds it against runs of one peer).
DOGO = Arm(0.39, 0.1)
ALONE = Arm(0.0, DOGO.tau)
ARMS = (ALONE, DOGO)
# One at a time around the method's own.
SWEEP = (*ARMS, Arm(0.1, 0.1), Arm(1.56, 0.1), Arm(6.25, 0.1), Arm(0.39, 0.05), Arm(0.39, 0.2), Arm(0.39, 0.5))


class Job(NamedTuple):
    """One run of pre-training and its evaluation."""

    preset: str
    arm: Arm
    seed: int
    budget: tuple[str, int]  # steps or epochs, how many
    changes: tuple[str, ...]  # to the configuration, beyond the preset's

    def folder(self, state: Path) -> Path:
        """Of the run: told apart by everything that changes it."""
        names = [self.preset, f"{self.budget[1]}{self.budget[0]}", *self._named_changes()]
        return state / "-".join(names) / self.arm.folder / f"seed{self.seed}"

    def _named_changes(self) -> list[str]:
        """As they are where that makes one folder name of them only; else readable, and told apart by a digest."""
        if all(map(PLAIN_CHANGE.fullmatch, self.changes)) and sum(map(len, self.changes)) <= MOST_LETTERS:
            return list(self.changes)
        digest = hashlib.sha256(json.dumps(self.changes).encode()).hexdigest()[:8]
        return [re.sub(r"[^A-Za-z0-9.=_-]", "_", "-".join(self.changes))[:MOST_LETTERS], digest]

    def config(self, state: Path, *, root: Path | None, max_seconds: float | None) -> Config:
        """The run's configuration."""
        preset = PRESETS[self.preset]
        plain = yaml.safe_load((ROOT / "configs" / f"{preset.config}.yaml").read_text())
        plain["run"] = {
            "output_dir": str(self.folder(state)), "seed": self.seed, self.budget[0]: self.budget[1],
            "save_every_steps": SAVE_STEPS, "keep_checkpoints": 1, "max_seconds": max_seconds,
            "log_every_steps": LOG_STEPS,
        }  # fmt: skip
        plain["distill"] = {**plain.get("distill", {}), "weight": self.arm.weight, "tau": self.arm.tau}
        plain["eval"] = {"knn": None}  # what comes behind a run tells more
        places = [] if root is None else [f"data.root={root}"]
        return parse_config(overridden(plain, [*preset.changes, *self.changes, *places]))
