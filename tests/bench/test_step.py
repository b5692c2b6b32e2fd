"""`python -m bench step`: turns, failures, rows, options, the command on real trainers."""

import contextlib
import io
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import step, step_providers
from bench.rows import ROW_KEYS, Stats, environment, make_row
from bench.step_providers import CAPTURED, ENGINE, PLAIN, TORCHVISION, TUNED, Case, Training
from engine.distributed import Ranks
from ranks import run_ranks

CPU = torch.device("cpu")
PAIR = "wrn-10-1+wrn-10-1"
CASE = Case("quickstart", PAIR, 16)


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """64 images as a file."""
    path = tmp_path_factory.mktemp("noise") / "noise.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8))
    return path


# -- turns


class Fake:
    """A provider whose batches are numbers; it fails at one of them."""

    def __init__(self, fails_at: int = 10**9, ahead: int = 4, together: int = 3) -> None:
        self.fails_at, self.trained, self.closed = fails_at, [], False
        self.training = Training(iter(range(10**6)), self.train, ahead, together, self.close)

    def train(self, number: int) -> None:
        if number >= self.fails_at:
            raise RuntimeError("a loss of its own\nand more")
        time.sleep(0.01)
        self.trained.append(number)

    def close(self) -> None:
        self.closed = True


def measured(monkeypatch, **fakes: Fake | Exception) -> dict[str, step.Turns]:
    def build(case: Case, name: str, *_: Any) -> Training:
        fake = fakes[name]
        if isinstance(fake, Exception):
            raise fake
        return fake.training

    monkeypatch.setattr(step, "training", build)
    monkeypatch.setattr(step, "IDLE_S", 0.0)
    ranks = Ranks(rank=0, world=1, local_rank=0, device=CPU, group=None)
    return step.measure(CASE, list(fakes), np.empty(0), ranks, rounds=3, seconds=0.15)


def test_what_lies_ready_is_dropped_and_whole_rounds_are_counted(monkeypatch):
    fake = Fake()
    turns = measured(monkeypatch, engine=fake)[ENGINE]
    assert fake.trained[: step.WARM_UP] == list(range(step.WARM_UP))
    assert fake.trained[step.WARM_UP] == step.WARM_UP + 4, "four were ready"
    skipped = set(range(fake.trained[-1])) - set(fake.trained)
    assert len(skipped) == 3 * 4
    assert (len(fake.trained) - step.WARM_UP) % 3 == 0
    assert len(turns.rates) == 3 and max(turns.rates) <= 16 / 0.01
    assert fake.closed


def test_providers_that_fail_are_named_and_the_others_stay(monkeypatch, capsys):
    late, good = Fake(fails_at=20), Fake()
    found = measured(monkeypatch, captured=ValueError("no GPU"), engine=late, plain=good)
    assert list(found) == [PLAIN] and len(found[PLAIN].rates) == 3
    assert capsys.readouterr().out.splitlines() == [
        f"{PAIR}, batch 16: captured: left out: ValueError: no GPU",
        f"{PAIR}, batch 16: engine: left out: RuntimeError: a loss of its own",
    ]
    assert late.closed and good.closed


def test_one_that_fails_in_its_warm_up_is_closed(monkeypatch):
    fake = Fake(fails_at=2)
    assert measured(monkeypatch, engine=fake) == {}
    assert fake.closed


def computes(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    time.sleep(20)


def test_a_turn_begins_when_workers_have_stopped():
    child = multiprocessing.get_context("fork").Process(target=computes, args=(0.5,))
    child.start()
    try:
        began = time.perf_counter()
        step.wait_for_workers()
        assert 0.4 < time.perf_counter() - began < 15
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_memory_is_that_of_one_provider(monkeypatch):
    """Another holds 1000; building this one peaks at 300 and leaves 100; a turn peaks 50 above what lies there."""
    now = {"held": 1000, "most": 1000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["held"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(most=now["held"]))
    memory = step.Memory(torch.device("cuda", 0))
    with memory.watched():
        now.update(held=1100, most=1300)
    assert memory.peak == 300
    now.update(held=2100, most=9000)  # others build meanwhile
    with memory.watched():
        now.update(most=2150)
    assert memory.peak == 300
    with memory.watched():
        now.update(most=2400)
    assert memory.peak == 400
    assert step.Memory(CPU).peak == 0


# -- rows


def test_the_table_compares_with_the_reference_and_tells_the_time_of_a_run():
    env = environment(["step"])
    case = {"pair": PAIR, "batch": 256, "size": 32, "views": 4, "precision": "bf16"}
    held = 3 * 2**20

    def rate(name: str, value: float) -> Any:
        return make_row(env, "step", case, name, "images_per_s", Stats(0.9 * value, value, 1.1 * value, 5), None)

    rows = [rate(CAPTURED, 20_000), rate(PLAIN, 5_000)]
    rows.append(make_row(env, "step", case, CAPTURED, "bytes", Stats(held, held, held, 5), None))
    assert step.cells(rows) == [
        [PAIR, "256", CAPTURED, "20,000", "18,000 - 22,000", "4.00x", "3", "8.3"],
        [PAIR, "256", PLAIN, "5,000", "4,500 - 5,500", "1.00x", "-", "-"],
    ]
    assert step.cells(rows[:1])[0][5] == "-"


@pytest.mark.parametrize("name", step_providers.PRESETS)
def test_configurations_are_those_of_the_presets(name, tmp_path):
    preset = step_providers.PRESETS[name]
    for pair in preset.pairs:
        for provider in step_providers.PROVIDERS:
            cfg = step_providers.configuration(Case(name, pair, 256), provider, tmp_path)
            assert "+".join(peer.backbone for peer in cfg.peers) == pair
            assert cfg.data.batch_size == 256 and cfg.run.steps == step_providers.MOST_STEPS
            assert cfg.run.save_every_steps is cfg.eval.knn.every_steps is None
            assert cfg.engine.capture == (provider == CAPTURED)
            assert cfg.data.loader == ("torchvision" if provider == TORCHVISION else "resident")


# -- options


def test_defaults(noise):
    def chosen(argv, device):
        options = step.parse([*argv, "--images", str(noise)], device)
        return options.preset, list(options.pairs), list(options.batches), options.providers

    cifar = ["wrn-16-2+wrn-16-2", "wrn-16-2+resnet50", "resnet18+resnet18"]
    assert chosen([], "cuda") == ("cifar", cifar, [256, 1024], [CAPTURED, ENGINE, TORCHVISION, PLAIN, TUNED])
    assert chosen(["--quick"], "cuda") == ("cifar", cifar[:1], [256], [CAPTURED, ENGINE, TORCHVISION, PLAIN, TUNED])
    assert chosen([], "cpu") == ("quickstart", [PAIR], [128], [ENGINE, TORCHVISION, PLAIN, TUNED])
    assert chosen(["--quick", "--batches", "8,32", "--providers", "plain"], "cpu")[2:] == ([8, 32], [PLAIN])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "imagenet"], "invalid choice: 'imagenet' (choose from "),
        (["--pairs", "wrn-10-1"], f"argument --pairs: 'wrn-10-1' is unknown; allowed: {PAIR}"),
        (["--preset", "cifar", "--pairs", PAIR], "allowed: wrn-16-2+wrn-16-2, wrn-16-2+resnet50, resnet18+resnet18"),
        (
            ["--providers", "engine,dali"],
            "--providers: 'dali' is unknown; allowed: captured, engine, torchvision-loader, plain, tuned",
        ),
        (["--batches", "16,x"], "--batches: '16,x': integers from 2 with commas between them are expected"),
        (["--images", "/nowhere.npy"], "--images: /nowhere.npy: no array can be read"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        step.parse(argv, "cpu")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_images_of_another_kind_are_refused(tmp_path, capsys):
    np.save(tmp_path / "large.npy", np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(SystemExit):
        step.parse(["--images", str(tmp_path / "large.npy")], "cpu")
    assert "holds uint8 [2, 64, 64, 3]; give uint8 [N, 32, 32, 3]" in capsys.readouterr().err


# -- the command


def command(argv: list[str], results: Path) -> tuple[int, str, int]:
    """Its status, what it prints, and the worker processes that it leaves; in a process that does nothing else."""
    step.RESULTS = results
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = step.main(argv)
    return status, printed.getvalue(), len(multiprocessing.active_children())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the providers of a CPU")
def test_the_command_measures_whole_steps(noise, tmp_path):
    argv = ["--images", str(noise), "--batches", "16", "--seconds", "0.3", "--quick"]
    status, printed, left = run_ranks(command, 1, [*argv, "--no-write"], tmp_path)[0]
    assert (status, left) == (0, 0)
    for name in (ENGINE, TORCHVISION, PLAIN, TUNED):
        assert f"│ {PAIR} │ 16    │ {name:18} │" in printed
    assert "1.00x" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU captures nothing")
def test_the_command_writes_rows_of_those_that_ran(noise, tmp_path):
    argv = ["--images", str(noise), "--batches", "16,65", "--seconds", "0.3", "--quick"]
    argv += ["--providers", "captured,engine,plain"]
    status, printed, left = run_ranks(command, 1, argv, tmp_path)[0]
    assert (status, left) == (1, 0)
    assert f"{PAIR}, batch 16: captured: left out: ConfigError: engine.capture: a CUDA graph needs a GPU" in printed
    assert f"{PAIR}, batch 65: engine: left out: DataError: data.batch_size: 65 is more than the 64 read" in printed
    assert f"{PAIR}, batch 65: plain: left out: ValueError: 64 images are fewer than a batch of 65" in printed
    assert f"bench: {PAIR}, batch 16: captured gave no number" in printed
    rows = [json.loads(line) for line in (tmp_path / "cpu" / "step.jsonl").read_text().splitlines()]
    assert all(tuple(row) == ROW_KEYS for row in rows)
    assert [(row["subject"], row["provider"], row["metric"], row["n"]) for row in rows] == [
        ("step", ENGINE, "images_per_s", step.QUICK_ROUNDS), ("step", PLAIN, "images_per_s", step.QUICK_ROUNDS),
    ]  # fmt: skip
    assert rows[0]["case"] == {"pair": PAIR, "batch": 16, "size": 32, "views": 4, "precision": "fp32"}
    assert rows[0]["floor"] is None and 0 < rows[0]["p20"] <= rows[0]["p50"] <= rows[0]["p80"]
    assert str(noise) not in json.dumps(rows) and "--images FILE.npy" in rows[0]["command"]


@pytest.mark.gpu
def test_the_command_on_a_gpu(noise, tmp_path):
    argv = ["--preset", "quickstart", "--images", str(noise), "--batches", "16", "--seconds", "0.3", "--quick"]
    status, printed, left = run_ranks(command, 1, argv, tmp_path)[0]
    assert (status, left) == (0, 0), printed
    (file,) = tmp_path.glob("*/step.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["provider"], row["metric"]) for row in rows} == {
        (name, metric) for name in step_providers.PROVIDERS for metric in ("images_per_s", "bytes")
    }
    assert all(row["p50"] > 0 for row in rows)
    assert {row["case"]["precision"] for row in rows} == {"bf16"}
