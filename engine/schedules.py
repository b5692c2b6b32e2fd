"""What changes from step to step beside learning rates: weights of distillation, momenta.  Pure functions of the step,
so that a resumed run needs no state of theirs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from engine.distill_config import RampConfig
from engine.objective_config import Byol, Mocov2, Objective


class Pace(NamedTuple):
    """How a peer moves in one step."""

    rate: float
    """Learning rate."""
    momentum: float | None
    """m of the momentum network; None where there is none."""


def ramp_share(ramp: RampConfig | None, step: int, *, steps_per_epoch: int) -> float:
    """The share of its weight that a distillation term has in `step` (from 0): from `start` at the first to 1 at the
    ramp's end.

        start + (1 - start) f(step / length)          linear: f(t) = t          cosine: f(t) = (1 - cos(pi t)) / 2
    """
    if ramp is None:
        return 1.0
    length = ramp.steps if ramp.steps is not None else round((ramp.epochs or 0.0) * steps_per_epoch)
    if step >= length:
        return 1.0
    t = step / length
    return ramp.start + (1 - ramp.start) * (t if ramp.shape == "linear" else 0.5 * (1 - math.cos(math.pi * t)))


def momentum_at(objective: Objective, step: int, *, steps: int) -> float | None:
    """The momentum m behind `step` (from 0) of `steps`; None of an objective without one.

    cosine: 1 - (1 - m) (cos(pi step / steps) + 1) / 2 (Grill et al. 2020, arXiv 2006.07733, 3.2).
    """
    if not isinstance(objective, Byol | Mocov2):
        return None
    if objective.momentum_schedule == "constant":
        return objective.momentum
    return 1 - (1 - objective.momentum) * 0.5 * (math.cos(math.pi * step / steps) + 1)
