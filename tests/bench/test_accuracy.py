"""`python -m bench accuracy`: its runs, slices of them, what a baseline is, rows."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import accuracy, accuracy_presets
from bench.accuracy_presets import ALONE, ARMS, DOGO, PRESETS, SWEEP, Job, Preset
from bench.rows import ROW_KEYS
from engine.config import parse_config
from ranks import run_ranks
from runs import fit

TEST = "test"


def small(root: Path, state: Path) -> dict:
    """The preset of these tests: the quickstart's peers on a few images, for moments."""
    changes = (
        "data.dataset=folder", f"data.root={root}", "data.image_size=32", "data.batch_size=16",
        "data.loader=torchvision", "data.workers=0", "run.log_every_steps=1", "peers.1.backbone=wrn-10-2",
    )  # fmt: skip
    evaluation = {"protocols": ["knn", "linear"], "knn": {"k": 3}, "linear": {"steps": 20}, "draws": 2}
    return {TEST: Preset("quickstart", {"steps": 4}, changes, evaluation)}


def command(presets: dict, results: Path, *argvs: list[str]) -> list[str]:
    """Exit status of each call and what it prints."""
    PRESETS.update(presets)
    accuracy.RESULTS = results
    printed = []
    for argv in argvs:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = accuracy.main([TEST, *argv])
        printed.append(f"{status} {out.getvalue()}")
    return printed


def rows(results: Path) -> list[dict]:
    return [json.loads(line) for file in results.glob("*/accuracy.jsonl") for line in file.read_text().splitlines()]


def options(*argv: str):
    return accuracy.parse(["tiny", *argv])


def test_runs_come_seed_by_seed():
    found = accuracy.jobs(options("--seeds", "2", "--epochs", "3"))
    assert [(job.seed, job.arm) for job in found] == [(0, ALONE), (0, DOGO), (1, ALONE), (1, DOGO)]
    assert {job.budget for job in found} == {("epochs", 3)}
    assert len(accuracy.jobs(options("--sweep", "--seeds", "1"))) == len(SWEEP) == len(set(SWEEP))
    assert set(ARMS) < set(SWEEP)


def test_what_changes_a_run_changes_its_folder(tmp_path):
    folders = {
        job.folder(tmp_path)
        for argv in ([], ["--steps", "7"], ["--epochs", "7"], ["--train", "data.views=shared"])
        for job in accuracy.jobs(options("--sweep", "--seeds", "2", *argv))
    }
    assert len(folders) == 4 * 2 * len(SWEEP)


@pytest.mark.parametrize("name", PRESETS)
def test_arms_differ_in_the_distillation_alone(name, tmp_path):
    (unit, count), *_ = PRESETS[name].budget.items()
    jobs = [Job(name, arm, 1, (unit, count), ()) for arm in ARMS]
    plain = [job.config(tmp_path, root=Path("x"), max_seconds=None).resolved() for job in jobs]
    for one, arm in zip(plain, ARMS, strict=True):
        assert one.pop("distill") == {"weight": arm.weight, "tau": arm.tau, "reduction": "batchmean"}
        assert one["run"].pop("output_dir").endswith(f"{arm.folder}/seed1")
        assert one["data"]["root"] == "x" and one["run"]["seed"] == 1 and one["run"][unit] == count
    assert plain[0] == plain[1]


def test_settings_go_on_top_of_the_presets(tmp_path):
    cfg = accuracy.jobs(options())[0].config(tmp_path, root=None, max_seconds=None)
    found = accuracy.settings("tiny", cfg, ["knn.k=7", "ood=[{name: mine, file: x.npz}]"])
    assert found.protocols == (*PRESETS["tiny"].evaluation["protocols"], "ood")
    assert (found.knn.k, found.data.dataset, found.noisy.rates) == (7, "cifar10", (0.4, 0.8))


@pytest.mark.parametrize(
    ("argv", "told"),
    [(["nothing"], "invalid choice"), (["tiny", "--steps", "2", "--epochs", "2"], "give one"),
     (["tiny", "--sed", "3"], "unrecognized arguments"), (["tiny", "--seeds", "0"], "--seeds"),
     (["tiny", "knn.k"], "an override is section.key=value"), (["tiny", "knn.kk=3"], "knn.kk")],
)  # fmt: skip
def test_bad_arguments_are_refused_before_any_work(argv, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        accuracy.parse(argv)
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_pair_of_weight_0_is_two_networks_trained_alone(settings, tmp_path):
    """The baseline's peer ends with the weights of a run that has it alone, which also sees the same views."""
    settings["run"].update(steps=6)
    both = {**settings, "distill": {"weight": 0.0}}
    run_ranks(fit, 1, both)
    alone = {**settings, "peers": settings["peers"][:1]}
    alone["run"] = {**settings["run"], "output_dir": str(tmp_path / "alone")}
    run_ranks(fit, 1, alone)
    pair, single = (
        load_file(Path(plain["run"]["output_dir"], "checkpoints", "step_00000006", "peer_a.safetensors"))
        for plain in (both, alone)
    )
    for key, value in single.items():
        torch.testing.assert_close(pair[key], value, rtol=1e-4, atol=1e-5)
    distilled = {**settings, "distill": {"weight": 0.39}}
    distilled["run"] = {**settings["run"], "output_dir": str(tmp_path / "distilled")}
    run_ranks(fit, 1, distilled)
    other = load_file(tmp_path / "distilled" / "checkpoints" / "step_00000006" / "peer_a.safetensors")
    key = "encoder.conv1.weight"
    assert (other[key] - single[key]).abs().max() > 1e-4, "or this says nothing"


@pytest.mark.slow
def test_slices_make_the_rows_of_one_go(image_folder, tmp_path):
    presets = small(image_folder, tmp_path)
    argv = ["--seeds", "1", "--state"]
    whole, slices = tmp_path / "whole", tmp_path / "slices"
    run_ranks(command, 1, presets, tmp_path / "rows1", [*argv, str(whole)])
    first = [*argv, str(slices), "--seconds", str(accuracy.LEAST_S + 0.01)]  # one step, then there is no time left
    told, trained, evaluated, again, other = run_ranks(
        command, 1, presets, tmp_path / "rows2", first, [*argv, str(slices), "--train-only"], [*argv, str(slices)],
        [*argv, str(slices)], [*argv, str(slices), "knn.k=2"],
    )[0]  # fmt: skip
    assert told[0] == trained[0] == evaluated[0] == again[0] == "0"
    assert "2 runs are unfinished; the same command goes on" in told
    assert "unfinished" not in trained + evaluated + again
    assert other[0] == "2" and "evaluated before with other knn.k; remove that folder, or give the same" in other
    one, two = rows(tmp_path / "rows1"), rows(tmp_path / "rows2")
    assert len(one) == len(two) == 2 * (2 * 2 + 1), "arms, peers, scores, and the seconds; once each"
    for a, b in zip(one, two, strict=True):
        assert tuple(a) == ROW_KEYS
        assert (a["provider"], a["metric"]) == (b["provider"], b["metric"])
        if a["metric"] == "accuracy":
            assert a["case"] == b["case"] and a["p50"] == b["p50"], "a run in slices is the run"
            assert len(a["case"]["values"]) == a["n"] == (2 if a["case"]["protocol"] == "linear" else 1)
    assert {row["provider"] for row in one} == {"alone", "dogo"}
    assert str(tmp_path) not in json.dumps(one + two), "where the state lies is nobody's affair"
    assert not list(slices.rglob("checkpoints")) and len(list(slices.rglob("*.safetensors"))) == 4


@pytest.mark.gpu
def test_runs_in_one_process_on_a_gpu(image_folder, tmp_path):
    presets = small(image_folder, tmp_path)
    preset = presets[TEST]
    changes = (*(c for c in preset.changes if "loader" not in c and "workers" not in c), "data.loader=resident")
    presets[TEST] = preset._replace(changes=changes, budget={"steps": 40})
    run_ranks(command, 1, presets, tmp_path / "rows", ["--seeds", "2", "--state", str(tmp_path / "state")])
    found = rows(tmp_path / "rows")
    assert len(found) == 4 * (2 * 2 + 1)
    assert {row["device_name"] for row in found} == {torch.cuda.get_device_name()}


def test_the_configurations_of_presets_exist():
    for preset in PRESETS.values():
        assert (accuracy_presets.ROOT / "configs" / f"{preset.config}.yaml").exists()
        parse_config({"run": {"output_dir": "x", **preset.budget}, "peers": [{"name": "a", "backbone": "wrn-10-1"}]})
