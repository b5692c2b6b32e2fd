"""`python -m bench accuracy`: its runs, slices of them, what a baseline is, rows."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from bench import accuracy, accuracy_presets, accuracy_runs
from bench.accuracy_presets import ALONE, ARMS, DOGO, PRESETS, SWEEP, Job, Preset
from bench.accuracy_runs import LEAST_S, Clock, OutOfTime
from bench.rows import ROW_KEYS
from engine.config import parse_config
from engine.data.dataset import DataError
from engine.distill_config import DistillConfig
from engine.evaluation import Score
from engine.trainer import NonFiniteLoss
from ranks import run_ranks
from runs import fit

TEST = "test"
BLINK_S = 0.01  # the least of a slice in these tests


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
    accuracy_runs.RESULTS, accuracy_runs.LEAST_S = results, BLINK_S
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


def test_no_two_lists_of_changes_share_a_folder(tmp_path):
    lists = (
        ("k=a/b",), ("k=a_b",), ("k=a b",), ("k=1-l=2",), ("k=1", "l=2"), ("k=" + "x" * 400,), ("k=" + "x" * 401,),
        ("k=../..",), (),
    )  # fmt: skip
    folders = [Job("tiny", ALONE, 0, ("steps", 1), changes).folder(tmp_path).parents[1] for changes in lists]
    assert len(set(folders)) == len(lists)
    assert {folder.parent for folder in folders} == {tmp_path} and max(len(folder.name) for folder in folders) < 255
    assert folders[4].name == "tiny-1steps-k=1-l=2", "plain ones are as they are, as are states from before"


@pytest.mark.parametrize("name", PRESETS)
def test_arms_differ_in_the_distillation_alone(name, tmp_path):
    (unit, count), *_ = PRESETS[name].budget.items()
    jobs = [Job(name, arm, 1, (unit, count), ()) for arm in ARMS]
    plain = [job.config(tmp_path, root=Path("x"), max_seconds=None).resolved() for job in jobs]
    for one, arm in zip(plain, ARMS, strict=True):
        assert one.pop("distill") == DistillConfig(weight=arm.weight, tau=arm.tau).model_dump()
        assert one["run"].pop("output_dir").endswith(f"{arm.folder}/seed1")
        assert (one["run"]["save_every_steps"], one["run"]["keep_checkpoints"]) == (1000, 1)
        assert one["data"]["root"] == "x" and one["run"]["seed"] == 1 and one["run"][unit] == count
    assert plain[0] == plain[1]


def test_settings_go_on_top_of_the_presets(tmp_path):
    cfg = accuracy.jobs(options())[0].config(tmp_path, root=None, max_seconds=None)
    found = accuracy_runs.settings("tiny", cfg, ["knn.k=7", "ood=[{name: mine, file: x.npz}]"])
    assert found.protocols == (*PRESETS["tiny"].evaluation["protocols"], "ood")
    assert (found.knn.k, found.data.dataset, found.noisy.rates) == (7, "cifar10", (0.4, 0.8))


@pytest.mark.parametrize(
    ("argv", "told"),
    [(["nothing"], "invalid choice"), (["tiny", "--steps", "2", "--epochs", "2"], "give one"),
     (["tiny", "--sed", "3"], "unrecognized arguments"), (["tiny", "--seeds", "0"], "--seeds"),
     (["tiny", "--seconds", "29.9"], "argument --seconds: found 29.9, allowed: at least 30"),
     (["tiny", "--seconds", "nan"], "allowed: at least 30"), (["tiny", "--sta", "x"], "unrecognized arguments: --sta"),
     (["tiny", "knn.k"], "an override is section.key=value"), (["tiny", "knn.kk=3"], "knn.kk")],
)  # fmt: skip
def test_bad_arguments_are_refused_before_any_work(argv, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        accuracy.parse(argv)
    assert told in capsys.readouterr().err


def test_every_preset_asks_about_every_claim(tmp_path):
    for name in PRESETS.keys() - {TEST}:
        found = accuracy_runs.asked(accuracy.jobs(accuracy.parse([name]))[0], accuracy.parse([name]))
        assert found.protocols == ("knn", "linear", "few", "noisy", "corruptions")
        assert found.corruptions.images == (200 if name == "tiny" else 500)


@pytest.mark.parametrize(
    ("given", "told"),
    [("--state /x/y --root data/", "--state STATE --root DATA"),
     ("--state=/x --root=data/", "--state=STATE --root=DATA"),
     ("--root --state=/x", "--root DATA"), ("noisy.human=/a/b.npz knn.k=3", "noisy.human=b.npz knn.k=3"),
     ("noisy.human=data/b.npz", "noisy.human=data/b.npz"), ("noisy.human=~/me/b.npz", "noisy.human=b.npz"),
     ("--train data.root=/x/y --train=data.root=/x/z/", "--train data.root=y --train=data.root=z"),
     ("ood=[{name:x,file:/a/b.npz},{file:'/c/d/e.npz'}]", "ood=[{name:x,file:b.npz},{file:'e.npz'}]"),
     ("few.shares=[0.1,0.5] /a/b --seconds 30", "few.shares=[0.1,0.5] b --seconds 30")],
)  # fmt: skip
def test_rows_tell_no_places(given, told):
    assert accuracy.told(given.split()) == told.split()
    spaced = ["ood=[{name: x, file: /a b/c d.npz, root: /e}]", "noisy.human=/a,b/c.npz"]
    assert accuracy.told(spaced) == ["ood=[{name: x, file: c d.npz, root: e}]", "noisy.human=c.npz"]


# -- collections of runs that train nothing ----------------------------------------------------------------------------


class Bench:
    """`bench accuracy` in this process; training and evaluation say what they are told to, in no time."""

    def __init__(self, folder: Path, monkeypatch, ranks) -> None:
        self.state, self.results, self.monkeypatch = folder / "state", folder / "results", monkeypatch
        self.trained: list[str] = []
        self.evaluated = 0
        self.breaks: dict[str, Exception] = {}  # by the end of a run's folder
        self.device = accuracy.environment([])
        fakes = SimpleNamespace(start=lambda: ranks, stop=lambda: None, configure_logging=lambda verbose: None)
        monkeypatch.setattr(accuracy, "distributed", fakes)
        monkeypatch.setattr(accuracy, "environment", lambda argv: replace(self.device, command=" ".join(argv)))
        monkeypatch.setattr(accuracy, "check", lambda cfg: None)
        for name, fake in {
            "Trainer": lambda cfg, ranks: SimpleNamespace(fit=lambda: self.fit(cfg)), "RESULTS": self.results,
            "export_backbone": lambda run, peer, form, file: file.write_text(""), "evaluate": self.evaluate,
            "file_encoder": lambda file, **options: file.stem,
        }.items():  # fmt: skip
            monkeypatch.setattr(accuracy_runs, name, fake)

    def fit(self, cfg) -> dict | None:
        folder = cfg.run.output_dir
        name = "/".join(folder.parts[-2:])
        self.trained.append(name)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if name in self.breaks:
            (folder / "non_finite").mkdir(exist_ok=True)
            raise self.breaks[name]
        (folder / "summary.json").write_text('{"steps": 200}')
        return {"steps": 200}

    def evaluate(self, encoders, cfg, device) -> list[Score]:
        self.evaluated += 1
        return [Score(peer, "wrn-10-1", "knn", f"k={cfg.knn.k}", (0.5,), 10, 5) for peer in encoders]

    def __call__(self, *argv: str) -> int:
        return accuracy.main(["tiny", "--seeds", "1", "--state", str(self.state), *argv])

    @property
    def rows(self) -> list[dict]:
        return rows(self.results)

    def scores(self) -> list[Path]:
        return sorted(self.state.rglob("scores.json"))


@pytest.fixture
def bench(tmp_path, monkeypatch, alone) -> Bench:
    return Bench(tmp_path, monkeypatch, alone)


ROWS = 2 * (2 + 1)  # arms, peers and the seconds


def test_rows_are_appended_once_and_by_the_command_that_writes(bench):
    assert bench("--no-write") == 0 and bench.rows == [] and bench.evaluated == 2
    assert bench("--seconds", "30") == 0 and len(bench.rows) == ROWS and bench.evaluated == 2
    assert {row["command"] for row in bench.rows} == {"accuracy tiny --seeds 1 --state STATE --no-write"}
    assert bench() == 0 and len(bench.rows) == ROWS and len(bench.trained) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_between_scores_and_marker_loses_and_repeats_no_row(bench, monkeypatch, when):
    append = accuracy_runs.append_rows

    def fails(found, path):
        if when == "after":
            append(found, path)
        raise OSError("disk full")

    monkeypatch.setattr(accuracy_runs, "append_rows", fails)
    with pytest.raises(OSError):
        bench()
    assert len(bench.rows) == (ROWS / 2 if when == "after" else 0)
    monkeypatch.setattr(accuracy_runs, "append_rows", append)
    assert bench("--seconds", "40") == 0 and len(bench.rows) == ROWS and bench.evaluated == 2


def test_half_an_evaluation_is_none(bench, monkeypatch):
    write = accuracy_runs.evaluation_report.write

    def fails(folder, scores, facts):
        write(folder, scores, facts)
        raise OSError("disk full")

    monkeypatch.setattr(accuracy_runs.evaluation_report, "write", fails)
    with pytest.raises(OSError):
        bench()
    monkeypatch.setattr(accuracy_runs.evaluation_report, "write", write)
    assert bench() == 0 and bench.evaluated == 3 and len(bench.rows) == ROWS
    file = bench.scores()[0]
    file.write_text(file.read_text()[:100])  # as versions before could leave it
    assert bench() == 0 and bench.evaluated == 4 and len(bench.scores()) == 2
    assert not list(bench.state.rglob("*.new"))


def test_one_state_has_one_evaluation(bench, capsys):
    assert bench("noisy.human=x.npz") == 0
    assert bench("noisy.human=/elsewhere/x.npz", "--root", "elsewhere") == 0 and bench.evaluated == 2
    for other, key in (("noisy.human=null", "noisy.human"), ("knn.tau=0.5", "knn.tau")):
        assert bench("noisy.human=x.npz", other) == accuracy.BAD_INPUT
        assert f"evaluated before with other {key}; remove that folder" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_no_other_run(bench, capsys):
    bench.breaks["alone/seed0"] = NonFiniteLoss("the loss of step 3 is not finite")
    assert bench("--seeds", "2") == accuracy.FAILED
    out = capsys.readouterr()
    assert "error: tiny, alone, seed 0: the loss of step 3 is not finite" in out.err
    assert "1 runs failed" in out.out and "unfinished" not in out.out
    assert len(bench.rows) == 3 * ROWS / 2 and {row["case"]["seed"] for row in bench.rows} == {0, 1}
    bench.trained.clear()
    assert bench("--seeds", "3") == accuracy.FAILED
    assert bench.trained == ["alone/seed2", f"{DOGO.folder}/seed2", "alone/seed0"], "last, so that it takes no slice"
    del bench.breaks["alone/seed0"]
    assert bench("--seeds", "3") == 0 and len(bench.rows) == 6 * ROWS / 2
    (row,) = [r for r in bench.rows if r["metric"] == "seconds" and r["case"]["seed"] == 0 and not r["case"]["weight"]]
    assert not list(bench.state.rglob("non_finite")) and len(row["case"]["devices"]) == 1


def test_data_that_cannot_be_read_end_all_with_a_line(bench, capsys):
    bench.breaks["alone/seed0"] = DataError("data.root: gone")
    assert bench() == accuracy.BAD_INPUT and capsys.readouterr().err.endswith("error: data.root: gone\n")


def test_what_an_evaluation_needs_is_looked_at_before_training(bench, monkeypatch, capsys):
    def refuses(cfg):
        assert cfg.knn.k == 7
        raise DataError("ood: no such file")

    monkeypatch.setattr(accuracy, "check", refuses)
    assert bench("knn.k=7") == accuracy.BAD_INPUT and bench.trained == []
    assert "error: ood: no such file" in capsys.readouterr().err
    assert bench("--train-only") == 0 and len(bench.trained) == 2
    monkeypatch.setattr(accuracy, "check", lambda cfg: None)
    assert bench("knn.k=7", "--no-write") == 0
    monkeypatch.setattr(accuracy, "check", refuses)
    assert bench("knn.k=7") == 0 and len(bench.rows) == ROWS, "none is needed where all are evaluated"


def test_a_run_on_two_machines_says_so(bench, monkeypatch):
    cpu = bench.device
    gpu = replace(cpu, folder="a100", device_name="A100", driver="550.1", commit="bbb")
    bench.device = replace(cpu, commit="aaa")
    bench.breaks["alone/seed0"] = NonFiniteLoss("on this machine")
    assert bench("--train-only") == accuracy.FAILED
    bench.breaks.clear()
    bench.device = gpu
    assert bench("--train-only") == 0
    bench.device = replace(cpu, commit="ccc")
    assert bench() == 0
    ours = [row for row in bench.rows if not row["case"]["weight"]]
    assert {(row["device_name"], row["driver"], row["commit"]) for row in ours} == {("A100", "550.1", "bbb")}
    assert {row["case"].get("evaluated_on") for row in ours} == {cpu.device_name, None}
    assert list(ours[-1]["case"]["devices"]) == [cpu.device_name, "A100"]
    assert ours[-1]["case"]["commits"] == ["aaa", "bbb", "ccc"]
    assert [path.parent.name for path in bench.results.rglob("*.jsonl")].count("a100") == 1


def test_a_slice_that_ends_tells_the_driver(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "fit", lambda cfg: cfg.run.output_dir.mkdir(parents=True))
    assert bench("--seconds", "30") == accuracy.UNFINISHED == 75
    assert "2 runs are unfinished; the same command goes on" in capsys.readouterr().out


def test_a_slice_waits_for_the_usual_evaluation_and_never_for_ever(bench, monkeypatch):
    assert bench() == 0
    (one, other) = bench.scores()
    for file, seconds in ((one, 20.0), (other, 90.0)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": seconds}))
    folder = one.parents[1]
    assert accuracy_runs._usual_seconds(folder) == 90
    assert accuracy_runs._usual_seconds(bench.state / "tiny-7steps" / "alone" / "seed0") == LEAST_S, "another's"
    now = 0.0
    monkeypatch.setattr(accuracy_runs.time, "monotonic", lambda: now)
    clock = Clock(100.0)
    now = 15.0
    assert clock.left(90.0) == 85, "more than 80 % are never waited for"
    now = 21.0
    with pytest.raises(OutOfTime):
        clock.left(90.0)
    assert clock.left(70.0) == clock.left() == 79
    now = 100 - LEAST_S + 1
    with pytest.raises(OutOfTime):
        clock.left()
    assert Clock(None).left(1e9) is None


# -- runs that train ---------------------------------------------------------------------------------------------------


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
    first = [*argv, str(slices), "--seconds", str(2 * BLINK_S)]  # one step, then there is no time left
    wild = [*argv, str(tmp_path / "wild"), "--train", "peers.0.optimizer.lr=1e30"]
    told, trained, evaluated, again, other, failed = run_ranks(
        command, 1, presets, tmp_path / "rows2", first, [*argv, str(slices), "--train-only"], [*argv, str(slices)],
        [*argv, str(slices)], [*argv, str(slices), "knn.k=2"], wild,
    )[0]  # fmt: skip
    assert told.startswith("75 ") and trained[0] == evaluated[0] == again[0] == "0"
    assert failed.startswith("1 ") and failed.count("is not finite (") == 2 and "2 runs failed" in failed
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
