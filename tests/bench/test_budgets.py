"""The kernels stay within what the compiler made of them when they were measured: registers, spills, instructions."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import budgets

ROOT = Path(__file__).parents[2]
ALL = json.loads(budgets.BUDGETS.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(budgets.CASES))
def test_kernels_are_within_their_budgets(capability):
    done = subprocess.run(
        [sys.executable, "-m", "bench", "budgets", "--arch", str(capability)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"sm_{capability}  mutual, D 128              gradient_kernel" in done.stdout


# The compiler of triton 3.8 (torch 2.14) spills up to 104 bytes on sm_90, 3.6 and 3.9 at most 72.  Its own budgets
# hold what it makes, so that it gets no worse; these goals are for the others.
SPILLS_MORE = {"3.8"}


def test_no_other_version_is_excused():
    worst = {
        version: max(kernel["stack"] for kernels in ALL[version]["sm_90"].values() for kernel in kernels.values())
        for version in ALL
    }
    assert {version for version, stack in worst.items() if stack > 72} == SPILLS_MORE
    assert max(worst.values()) <= 112, worst


@pytest.mark.parametrize("version", sorted(set(ALL) - SPILLS_MORE))
def test_what_the_budgets_themselves_allow(version):
    """Spilled bytes: none in training at D = 128 on Hopper with triton 3.6, 40 in pass 2 with 3.9; little elsewhere."""
    for name, kernels in ALL[version]["sm_90"].items():
        assert all(kernel["stack"] <= (72 if "safe" in name else 48) for kernel in kernels.values()), name
        if name.startswith("views"):  # 16 bytes at 96 px with 3.9
            assert all(kernel["stack"] <= 16 for kernel in kernels.values()), name
            continue
        spilled = {kernel for kernel, values in kernels.items() if values["stack"]}
        assert spilled <= ({"stats_kernel"} if "forward" in name else {"gradient_kernel"}), name
    assert all(kernel["stack"] <= 40 for kernels in ALL[version]["sm_100"].values() for kernel in kernels.values())
    mutual = ALL[version]["sm_90"]["mutual, D 128"]
    assert sum(kernel["stack"] for kernel in mutual.values()) <= (0 if version == "3.6" else 40)
    # Instructions a pair: one peer's exponential each in pass 1, two in pass 2.
    assert max(instructions / exponentials for instructions, exponentials in mutual["stats_kernel"]["loops"]) < 9
    assert (
        max(2 * instructions / exponentials for instructions, exponentials in mutual["gradient_kernel"]["loops"]) < 37
    )
    for capability in (90, 100):
        for kernels in ALL[version][f"sm_{capability}"].values():
            assert all(kernel["loops"] for name, kernel in kernels.items() if name.startswith(("stats", "gradient")))


@pytest.fixture
def allowed() -> dict:
    return copy.deepcopy(ALL["3.9"])


def test_its_own_budget_exceeds_nothing(allowed):
    assert budgets.exceeded(allowed, ALL["3.9"]) == []


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("registers", 1, "registers"),
        ("stack", 8, "stack 8, allowed 0"),
        ("shared", 200_000, "the device has 232448"),
    ],
)
def test_what_is_above_its_budget_is_named(allowed, what, change, message):
    allowed["sm_90"]["mutual, D 128"]["stats_kernel"][what] += change
    wrong = budgets.exceeded(allowed, ALL["3.9"])
    assert any(line.startswith("sm_90, mutual, D 128, stats_kernel: ") and message in line for line in wrong)


def test_a_slower_or_missing_loop_is_named(allowed):
    loops = allowed["sm_90"]["mutual, D 128"]["stats_kernel"]["loops"]
    loops[0][0] *= 1.05
    assert len(budgets.exceeded(allowed, ALL["3.9"])) == 1
    loops[0][0] *= 0.5
    loops[0][1] *= 2
    assert len(budgets.exceeded(allowed, ALL["3.9"])) == 1, "more exponentials, though fewer instructions for each"
    loops.clear()
    assert len(budgets.exceeded(allowed, ALL["3.9"])) == 1


def test_other_warps_and_stages_are_named(allowed):
    kernel = allowed["sm_90"]["mutual, D 128"]["gradient_kernel"]
    kernel["warps"], kernel["stages"] = 8, 1
    assert len(budgets.exceeded(allowed, ALL["3.9"])) == 2


def test_a_kernel_that_vanished_is_named(allowed):
    del allowed["sm_90"]["mutual, D 128"]["gradient_kernel"]
    wrong = budgets.exceeded(allowed, ALL["3.9"])
    assert wrong == ["sm_90, mutual, D 128, gradient_kernel: has a budget, but was not compiled"]


def test_a_kernel_without_budget_is_named(allowed):
    allowed["sm_90"]["mutual, D 128"]["new_kernel"] = allowed["sm_90"]["mutual, D 128"]["stats_kernel"]
    assert budgets.exceeded(allowed, ALL["3.9"]) == ["sm_90, mutual, D 128, new_kernel: no budget"]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.6", "3.6"), ("3.7", "3.6"), ("3.8", "3.8"), ("3.9", "3.9"), ("3.10", "3.9"), ("3.1", "3.9")],
)
def test_the_budget_of_a_version(monkeypatch, version, expected):
    monkeypatch.setattr(budgets, "version", lambda: version)
    assert budgets.budget_of(ALL)[0] == expected
