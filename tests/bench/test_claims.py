"""RESULTS.md: gains within a seed, their interval and what it says, and nothing mixed that is no comparison."""

import json
import math
import statistics
from dataclasses import asdict

import numpy as np
import pytest

from bench import claims, claims_gains
from bench.accuracy_presets import ALONE, DOGO, Arm, Job
from bench.accuracy_runs import FINISHED, HISTORY, rows_of
from bench.claims import Gain
from bench.rows import RESULTS, Row, append_rows, read_rows
from engine.evaluation import Score

PEERS = (("a", "wrn-10-1"), ("b", "wrn-16-2"))
STRONG = Arm(1.56, 0.1)
WARM = Arm(0.39, 0.5)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """A folder for rows, with those of another subject that lie in the same file."""
    folder = tmp_path / "results"
    monkeypatch.setattr(claims, "RESULTS", folder)
    others = [row for row in read_rows(RESULTS / "cpu" / "accuracy.jsonl") if "preset" not in row.case]
    assert others
    append_rows(others, folder / "cpu" / "accuracy.jsonl")
    return folder


NAMES = {"cpu": "2 cores (a CPU)"}


def slice_of(device: str, seconds: float, commit="c0ffee") -> dict:
    """A slice of training, as a run's history has it."""
    return {"device": NAMES.get(device, f"a {device}"), "results": device, "torch": "2.9", "triton": None,
            "driver": None if device == "cpu" else "550.1", "commit": commit, "date": "2026-11-27",
            "seconds": seconds}  # fmt: skip


def measure(
    results, arm: Arm, seed: int, values: dict[tuple[str, str, str], list[float]], *, preset="tiny", steps=200,
    changes=(), device="cpu", seconds=1800.0, command="python -m bench accuracy tiny", history=None, evaluated_on=None,
) -> list[Row]:  # fmt: skip
    """Appends the rows of one run as `bench accuracy` makes them; `values`: (protocol, setting, peer) -> draws."""
    run = results.parent / "run"
    run.mkdir(exist_ok=True)
    history = history or [slice_of(device, seconds / 2)] * 2
    (run / HISTORY).write_text(json.dumps(history))
    (run / FINISHED).write_text(json.dumps({"steps": steps}))
    backbones = dict(PEERS)
    scores = [
        Score(peer, backbones[peer], protocol, setting, tuple(draws), 100, 50)
        for (protocol, setting, peer), draws in values.items()
    ]
    job = Job(preset, arm, seed, ("steps", steps), tuple(changes))
    facts = {"device": evaluated_on or history[-1]["device"], "command": command}
    rows = rows_of(job, run, scores, facts)
    append_rows(rows, results / history[-1]["results"] / "accuracy.jsonl")
    return rows


def linear(value: float, peer: str = "a") -> dict[tuple[str, str, str], list[float]]:
    return {("linear", "", peer): [value]}


def of_device(device: str = "cpu") -> list[Row]:
    return claims.measured(device)


LINEAR = {"protocol": "linear", "setting": "", "peer": "a"}


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 9, 10, 11, 14, 20, 30, 60, 200])
def test_the_interval_is_students(freedom):
    """95 % of t's density, integrated, lie within the quantile."""
    t = np.linspace(0.0, claims_gains.student(freedom), 200_001)
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log - (freedom + 1) / 2 * np.log1p(t * t / freedom))
    assert 2 * np.trapezoid(density, t) == pytest.approx(0.95, abs=5e-5)  # quantiles of three decimals


@pytest.mark.parametrize(
    ("differences", "mean", "half_width"),
    [
        ([0.01, 0.03], 0.02, 12.706 * 0.01),  # the deviation over the root of 2 is half of the distance
        ([0.00, 0.01, 0.05], 0.02, 4.303 * 0.0264575 / 1.7320508),
        ([0.02, -0.01, 0.04, 0.00, 0.05], 0.02, 2.776 * 0.0254951 / 2.2360680),
    ],
)
def test_half_widths_by_hand(differences, mean, half_width):
    alone = [0.5 + 0.03 * i for i in range(len(differences))]
    found = Gain(len(alone), alone, [a + d for a, d in zip(alone, differences, strict=True)])
    assert found.differences == pytest.approx(differences)
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(half_width, rel=1e-5)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.3], "one seed"),
        ([-0.3], "one seed"),
        ([0.010, 0.012, 0.011], "gain"),
        ([-0.010, -0.012, -0.011], "loss"),
        ([0.010, 0.050, -0.011], "no difference seen"),
        ([-0.010, -0.050, 0.011], "no difference seen"),
        ([0.010, 0.020], "no difference seen"),  # 0.015 ± 0.064: two seeds say little
        ([0.010, 0.011], "gain"),
        ([0.0, 0.0], "no difference seen"),
    ],
)
def test_what_an_interval_says(differences, verdict):
    alone = [0.25] * len(differences)
    assert Gain(len(alone), alone, [0.25 + d for d in differences]).verdict == verdict


def test_gains_are_within_a_seed(results):
    """Seeds differ by far more than the arms; 2 and 9 have one arm only, and order in the file says nothing."""
    alone, together = {0: 0.30, 1: 0.60, 2: 0.99, 3: 0.45}, {3: 0.47, 9: 0.01, 0: 0.31, 1: 0.63}
    for seed, value in alone.items():
        measure(results, ALONE, seed, linear(value))
    for seed, value in together.items():
        measure(results, DOGO, seed, linear(value))
    found = claims_gains.gain(of_device(), *DOGO, **LINEAR)
    assert found is not None and found.n == 3
    assert (list(found.alone), list(found.together)) == ([0.30, 0.60, 0.45], [0.31, 0.63, 0.47])
    assert found.mean == pytest.approx(0.02)
    assert found.half_width == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert found.verdict == "no difference seen"


def test_without_a_seed_in_common_there_is_no_gain(results):
    measure(results, ALONE, 0, linear(0.3))
    assert claims_gains.gain(of_device(), *DOGO, **LINEAR) is None
    measure(results, DOGO, 1, linear(0.4))
    assert claims_gains.gain(of_device(), *DOGO, **LINEAR) is None
    assert claims_gains.gain(of_device(), *DOGO, protocol="knn") is None


def test_the_newest_row_of_a_seed_counts(results):
    for arm, values in ((ALONE, (0.9, 0.3)), (DOGO, (0.1, 0.35))):
        for value in values:
            measure(results, arm, 0, linear(value))
    found = claims_gains.gain(of_device(), *DOGO, **LINEAR)
    assert found is not None and (found.n, list(found.alone), list(found.together)) == (1, [0.3], [0.35])


def test_a_score_is_the_mean_of_its_draws(results):
    measure(results, ALONE, 0, {("linear", "", "a"): [0.1, 0.2, 0.6]})
    measure(results, DOGO, 0, {("linear", "", "a"): [0.5, 0.5, 0.8]})
    found = claims_gains.gain(of_device(), *DOGO, **LINEAR)
    assert found is not None and found.mean == pytest.approx(0.3)
    assert found.alone == pytest.approx([0.3])


def test_scores_peers_and_arms_are_kept_apart(results):
    """Each (score, peer, arm) at a value of its own."""
    wanted = {}
    value = 0.10
    for arm in (ALONE, DOGO, STRONG, WARM):
        scores = {}
        for protocol, setting in (("linear", ""), ("few", "1%"), ("few", "10%"), ("noisy", "pairflip 40%")):
            for peer, _ in PEERS:
                value += 0.01
                wanted[arm, protocol, setting, peer] = value
                scores[protocol, setting, peer] = [value]
        measure(results, arm, 0, scores)
    for (arm, protocol, setting, peer), value in wanted.items():
        if arm != ALONE:
            found = claims_gains.gain(of_device(), *arm, protocol=protocol, setting=setting, peer=peer)
            assert found is not None
            assert found.together == pytest.approx([value])
            assert found.alone == pytest.approx([wanted[ALONE, protocol, setting, peer]])


# -- the page ----------------------------------------------------------------------------------------------------------


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, its header first, without the rule."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def section(text: str, title: str) -> str:
    """What stands under a heading."""
    (own,) = [part for part in text.split("\n## ") if part.partition("\n")[0] == title]
    return own


def three_seeds(results, gains: dict[tuple[str, str, str], list[float]], **run) -> None:
    """Runs alone and distilling that differ by `gains` in each seed."""
    for seed in range(3):
        start = dict.fromkeys(gains, 0.4 + 0.1 * seed)
        measure(results, ALONE, seed, {key: [value] for key, value in start.items()}, **run)
        measure(results, DOGO, seed, {key: [value + gains[key][seed]] for key, value in start.items()}, **run)


SURE, UNSURE, WORSE = [0.02, 0.021, 0.022], [0.02, -0.03, 0.07], [-0.031, -0.03, -0.032]


def test_every_figure_of_a_comparison_is_on_the_page(results):
    three_seeds(results, {
        ("knn", "k=50", "a"): SURE, ("knn", "k=50", "b"): UNSURE, ("linear", "", "a"): WORSE,
        ("linear", "", "b"): SURE, ("few", "10%", "a"): SURE,
        ("corruptions", "all weather", "b"): WORSE, ("corruptions", "fog", "b"): SURE,
    })  # fmt: skip
    own = section(claims.page(["cpu"]), "`tiny`, 200 steps, cpu")
    (table,) = tables(own)
    alone = "50.0 ± 10.0"
    sure, unsure, worse = ("+2.1 ± 0.2", "3", "gain"), ("+2.0 ± 12.4", "3", "no difference seen"), (
        "-3.1 ± 0.2", "3", "loss",
    )  # fmt: skip

    def spread(gains) -> str:
        values = [100 * (0.4 + 0.1 * seed + gain) for seed, gain in enumerate(gains)]
        return f"{sum(values) / 3:.1f} ± {statistics.stdev(values):.1f}"

    assert table == [
        ["score, %", "peer", "alone", "distilling", "gain", "seeds", "says"],
        ["knn k=50", "a (wrn-10-1)", alone, spread(SURE), *sure],
        ["knn k=50", "b (wrn-16-2)", alone, spread(UNSURE), *unsure],
        ["linear", "a (wrn-10-1)", alone, spread(WORSE), *worse],
        ["linear", "b (wrn-16-2)", alone, spread(SURE), *sure],
        ["few 10%", "a (wrn-10-1)", alone, spread(SURE), *sure],
        ["corruptions all weather", "b (wrn-16-2)", alone, spread(WORSE), *worse],
    ]


def test_one_seed_has_no_interval(results):
    measure(results, ALONE, 4, linear(0.5))
    measure(results, DOGO, 4, linear(0.512))
    page = claims.page(["cpu"])
    (table,) = tables(section(page, "`tiny`, 200 steps, cpu"))
    assert table[1] == ["linear", "a (wrn-10-1)", "50.0", "51.2", "+1.2", "1", "one seed"]


def test_the_papers_claims_are_counted(results):
    """Corruptions by their mean alone: their kinds and severities are the same pictures again."""
    three_seeds(results, {
        ("knn", "k=50", "a"): SURE, ("linear", "", "a"): WORSE, ("linear", "", "b"): UNSURE,
        ("official", "", "b"): SURE, ("few", "1%", "a"): UNSURE, ("few", "10%", "a"): UNSURE,
        ("noisy", "pairflip 40%", "b"): WORSE,
        ("ood", "stl10", "a"): SURE, ("corruptions", "fog", "a"): WORSE, ("corruptions", "severity 1", "a"): WORSE,
        ("corruptions", "all blur", "a"): WORSE, ("corruptions", "mean", "a"): SURE,
    })  # fmt: skip
    (table,) = tables(section(claims.page(["cpu"]), "The claims"))
    title = "`tiny`, 200 steps, cpu"
    better, few, noisy, elsewhere = claims.CLAIMS
    a, b = "a (wrn-10-1)", "b (wrn-16-2)"
    assert table == [
        ["setting", "claim", "peer", "seeds", "scores", "gain", "no difference seen", "loss", "mean gain", "says"],
        [title, better, a, "3", "2", "1", "0", "1", "-0.5", "mixed"],  # 2.1 - 3.1
        [title, better, b, "3", "2", "1", "1", "0", "+2.1", "holds"],  # 2.0 + 2.1
        [title, few, a, "3", "2", "0", "2", "0", "+2.0", "not seen"],
        [title, few, b, *["-"] * 6, "not measured"],
        [title, noisy, a, *["-"] * 6, "not measured"],
        [title, noisy, b, "3", "1", "0", "0", "1", "-3.1", "contradicted"],
        [title, elsewhere, a, "3", "2", "2", "0", "0", "+2.1", "holds"],
        [title, elsewhere, b, *["-"] * 6, "not measured"],
    ]


@pytest.mark.parametrize(
    ("gains", "losses", "scores", "said"),
    [(1, 0, 1, "holds"), (2, 0, 4, "holds"), (1, 0, 3, "not seen"), (0, 0, 3, "not seen"), (0, 1, 3, "contradicted"),
     (2, 1, 3, "mixed"), (1, 1, 9, "mixed")],
)  # fmt: skip
def test_what_scores_say_of_a_claim(gains, losses, scores, said):
    assert claims.says(gains, losses, scores) == said


def test_a_claim_without_scores_is_not_measured(results):
    """Scores of one arm alone are none."""
    measure(results, ALONE, 0, {("few", "1%", "a"): [0.1], ("linear", "", "a"): [0.3]})
    measure(results, DOGO, 0, {("few", "1%", "a"): [0.2]})
    (table,) = tables(section(claims.page(["cpu"]), "The claims"))
    assert [line[1:] for line in table[1:]] == [
        [claim, "a (wrn-10-1)", "1", "1", "0", "0", "0", "+10.0", "one seed"]
        if "limited" in claim
        else [claim, "-", *["-"] * 6, "not measured"]
        for claim in claims.CLAIMS
    ]


def test_scores_of_fewer_seeds_are_told(results):
    for seed in range(2):
        more = {("knn", "k=50", "a"): [0.5]} if seed else {}
        measure(results, ALONE, seed, linear(0.3) | more)
        measure(results, DOGO, seed, linear(0.31 + 0.001 * seed) | {key: [0.6] for key in more})
    (table,) = tables(section(claims.page(["cpu"]), "The claims"))
    assert table[1][2:] == ["a (wrn-10-1)", "1 to 2", "2", "1", "0", "0", "+5.5", "holds"]


def test_other_presets_steps_changes_and_devices_are_other_comparisons(results):
    """Of the same seed, each pair with a gain of its own; and one that has no partner anywhere."""
    pairs = {
        "`tiny`, 200 steps, cpu": (0.01, {}),
        "`tiny`, 4,000 steps, cpu": (0.02, {"steps": 4000}),
        "`cifar10-wrn16-r50`, 200 steps, cpu": (0.03, {"preset": "cifar10-wrn16-r50"}),
        "`tiny`, 200 steps, data.batch_size=64, run.seed=3, cpu": (
            0.04, {"changes": ("data.batch_size=64", "run.seed=3")},
        ),
        "`tiny`, 200 steps, h200": (0.05, {"device": "h200"}),
    }  # fmt: skip
    for i, (gain, run) in enumerate(pairs.values()):
        measure(results, ALONE, 0, linear(0.3 + 0.1 * i), **run)
        measure(results, DOGO, 0, linear(0.3 + 0.1 * i + gain), **run)
    measure(results, DOGO, 0, linear(0.99), steps=300)
    page = claims.page(["cpu", "h200", "a100"])
    for i, (title, (gain, _)) in enumerate(pairs.items()):
        (table,) = tables(section(page, title))
        assert table[1:] == [
            ["linear", "a (wrn-10-1)", f"{30 + 10 * i}.0", f"{30 + 10 * i + 100 * gain:.1f}", f"+{100 * gain:.1f}",
             "1", "one seed"]
        ]  # fmt: skip
    (table,) = tables(section(page, "`tiny`, 300 steps, cpu"))
    assert table[1:] == [] and "99.0" not in page
    (table,) = tables(section(page, "The claims"))
    assert sorted((line[0], line[-2]) for line in table[1:] if line[-1] != "not measured") == sorted(
        (title, f"+{100 * gain:.1f}") for title, (gain, _) in pairs.items()
    )
    assert [line[1:] for line in table if "300 steps" in line[0]] == [
        [claim, "-", *["-"] * 6, "not measured"] for claim in claims.CLAIMS
    ]


def test_arms_are_compared_where_there_are_several(results):
    for seed, start in ((0, 0.3), (1, 0.5)):
        measure(results, ALONE, seed, linear(start) | linear(start + 0.1, "b"))
        measure(results, DOGO, seed, linear(start + 0.02) | linear(start + 0.13, "b"))
    assert len(tables(section(claims.page(["cpu"]), "`tiny`, 200 steps, cpu"))) == 1, "no sweep of one arm"
    measure(results, STRONG, 0, linear(0.25) | {("knn", "k=50", "b"): [0.9]})
    measure(results, WARM, 1, linear(0.51) | linear(0.59, "b"))
    own = section(claims.page(["cpu"]), "`tiny`, 200 steps, cpu")
    (scores, sweep) = tables(own)
    assert sweep == [
        ["weight", "temperature", "a (wrn-10-1), linear", "b (wrn-16-2), linear"],
        ["0.39", "0.1", "+2.0 ± 0.0", "+3.0 ± 0.0"],
        ["0.39", "0.5", "+1.0", "-1.0"],
        ["1.56", "0.1", "-5.0", "-"],
    ]
    assert [line[4] for line in scores[1:]] == ["+2.0 ± 0.0", "+3.0 ± 0.0"], "of the method's own arm alone"


def test_the_page_says_where_its_rows_come_from(results):
    for i, arm in enumerate((ALONE, DOGO)):
        for device in ("cpu", "h200"):
            measure(results, arm, 0, linear(0.3), device=device, seconds=1800.0 * (1 + i), command=f"command {i}")
    page = claims.page(["cpu", "h200"])
    source = (
        "2 runs of two peers, 1.50 {hours} of training on {device}, torch 2.9, 2026-11-27: "
        "`command 0` (commit c0ffee), `command 1` (commit c0ffee)\n"
    )
    assert source.format(hours="hours", device=NAMES["cpu"]) in section(page, "`tiny`, 200 steps, cpu")
    assert source.format(hours="GPU hours", device="a h200") in section(page, "`tiny`, 200 steps, h200")
    assert "one interval in twenty" in page.partition("\n## ")[0]
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles[:2] == ["## The claims", "## Others' figures on CIFAR-10"] and len(titles) == 4
    (table,) = tables(section(page, "Others' figures on CIFAR-10"))
    assert [tuple(line) for line in table[1:]] == list(claims.YARDSTICKS)


def test_hours_are_told_by_device_and_once_a_run(results):
    """Trained on two machines by two commits, evaluated on a third; and appended again since."""
    history = [slice_of("cpu", 1800.0, "aaa"), slice_of("h200", 360.0, "bbb")]
    for _ in range(2):
        for arm in (ALONE, DOGO):
            measure(results, arm, 0, linear(0.3), history=history, evaluated_on="an A100", command="command")
    assert (
        "2 runs of two peers, 1.00 hours of training on 2 cores (a CPU) and 0.20 GPU hours of training on a h200 "
        "(evaluated on an A100), torch 2.9, 2026-11-27: `command` (commits aaa, bbb)\n"
    ) in section(claims.page(["cpu", "h200"]), "`tiny`, 200 steps, h200")


def test_settings_of_the_probes_are_part_of_a_comparison(results):
    """Those that change a score of the same name; not shares, rates and kinds, nor what --train already says."""
    given = (
        "seed=1 draws=2 data.image_size=64 data.root=x knn.k=7 linear.steps=9 linear.steps=8 corruptions.images=5 "
        "few.shares=[0.1] noisy.kinds=[pairflip] noisy.human=x.npz"
    )
    command = f"python -m bench accuracy tiny --train data.batch_size=64 {given} --train=data.views=shared"
    (row, _) = measure(results, ALONE, 0, linear(0.3), command=command, changes=("data.batch_size=64",))
    key = claims_gains.key_of(row)
    assert key.changes == ("data.batch_size=64",)
    assert key.evaluation == (
        "corruptions.images=5", "data.image_size=64", "draws=2", "knn.k=7", "linear.steps=8", "seed=1",
    )  # fmt: skip


def test_rows_tell_no_folders(results):
    rows = measure(results, ALONE, 0, linear(0.3), changes=("data.manifest=/home/me/m.json", "data.batch_size=64"))
    assert {tuple(row.case["changes"]) for row in rows} == {("data.manifest=m.json", "data.batch_size=64")}


def test_rows_of_other_subjects_are_none_of_its_own(results):
    assert of_device() == [] == claims.measured("nowhere")
    (row, _) = measure(results, ALONE, 0, linear(0.3))
    assert asdict(of_device()[0]) == asdict(row) and len(of_device()) == 2


def test_the_command_writes_the_page_of_every_device(results, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PAGE", tmp_path / "RESULTS.md")
    for device in ("h200", "cpu"):
        measure(results, ALONE, 0, linear(0.3), device=device)
    (results / "notes.txt").write_text("no device")
    assert claims.main([]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == claims.page(["cpu", "h200"])
    assert [line for line in text.splitlines() if line.startswith("## `")] == [
        "## `tiny`, 200 steps, cpu", "## `tiny`, 200 steps, h200",
    ]  # fmt: skip


def test_results_md_says_what_was_measured(monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", RESULTS)
    devices = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())
    assert claims.PAGE.read_text() == claims.page(devices), "python -m bench claims"


def test_the_command_draws_every_comparison(results, tmp_path, monkeypatch):
    for seed, gain in enumerate((0.01, 0.02)):
        measure(results, ALONE, seed, linear(0.3) | linear(0.4, "b"))
        measure(results, DOGO, seed, linear(0.3 + gain) | linear(0.4 - gain, "b"))
        measure(results, ALONE, seed, linear(0.3), steps=7)
    monkeypatch.setattr(claims, "PAGE", tmp_path / "RESULTS.md")
    assert claims.main([]) == 0
    (picture,) = results.rglob("*.png")
    assert picture.name == "accuracy-tiny-200steps.png" and picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "RESULTS.md").read_text()
    assert page == claims.page(["cpu"]) and page.count(picture.name) == 1, "7 steps have no pair to draw"
