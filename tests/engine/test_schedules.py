"""Weights of distillation and momenta, step by step."""

import math

import pytest

from engine.distill_config import RampConfig
from engine.objective_config import Byol, Mocov2, Simsiam
from engine.schedules import momentum_at, ramp_share


def test_without_a_ramp_weights_are_whole():
    assert [ramp_share(None, step, steps_per_epoch=3) for step in (0, 7)] == [1.0, 1.0]


def test_a_linear_ramp_goes_from_its_start_to_one():
    ramp = RampConfig(steps=4, start=0.2)
    found = [ramp_share(ramp, step, steps_per_epoch=100) for step in range(7)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_a_cosine_ramp_is_flat_at_both_ends():
    ramp = RampConfig(epochs=1.5, shape="cosine")  # of 4 steps: 6
    found = [ramp_share(ramp, step, steps_per_epoch=4) for step in range(8)]
    half = [math.sin(math.pi * step / 12) ** 2 for step in range(6)]
    assert found == pytest.approx([*half, 1.0, 1.0])


def test_a_ramp_of_less_than_a_step_is_none():
    assert ramp_share(RampConfig(epochs=0.1), 0, steps_per_epoch=3) == 1.0


def test_the_momentum_of_byol_rises_to_one():
    found = [momentum_at(Byol(momentum=0.9), step, steps=8) for step in (0, 4, 8)]
    assert found == pytest.approx([0.9, 0.95, 1.0])
    assert [momentum_at(Byol(momentum_schedule="constant"), step, steps=8) for step in (0, 8)] == [0.996, 0.996]


def test_the_momentum_of_moco_stays():
    assert [momentum_at(Mocov2(), step, steps=8) for step in (0, 8)] == [0.999, 0.999]
    assert momentum_at(Mocov2(momentum_schedule="cosine"), 8, steps=8) == 1.0


def test_others_have_none():
    assert momentum_at(Simsiam(), 3, steps=8) is None
