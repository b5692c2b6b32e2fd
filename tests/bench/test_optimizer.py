"""`python -m bench optimizer`: its tensors, its check, rows, tables, the command."""

import gc
import json
import weakref

import pytest
import torch

from bench import optimizer, readme
from bench.optimizer import COPY, PROVIDERS, STEP, TOLERANCE
from bench.rows import ROW_KEYS, Stats, environment, make_row

CPU = torch.device("cpu")
SIZES = [torch.Size(shape) for shape in [(64, 3, 7, 7), (64,), (10, 20), (10,)]]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine take a hundred times as long as the sums themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(optimizer, "shapes", lambda model: SIZES)
    monkeypatch.setattr(optimizer, "QUICK_SECONDS", 0.02)


@pytest.mark.parametrize(
    ("model", "count", "numel"), [("resnet50", 161, 25_557_032), ("vit_base_patch16_224", 152, 86_567_656)]
)
def test_tensors_are_those_of_the_models(model, count, numel):
    sizes = optimizer.shapes(model)
    assert len(sizes) == count
    assert sum(size.numel() for size in sizes) == numel


@pytest.mark.parametrize("name", ["native", "torch", "loop", "timm"])
def test_what_is_compared_computes_the_same(name):
    assert optimizer.error(name, SIZES, CPU) <= TOLERANCE


def test_a_wrong_step_is_found():
    wrong = {**PROVIDERS, "native": lambda groups, lr: PROVIDERS["torch"](groups, 1.01 * lr)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "PROVIDERS", wrong)
        assert optimizer.error("native", SIZES, CPU) > 10 * TOLERANCE


def test_a_wrong_provider_is_reported_and_not_timed(small, monkeypatch, capsys):
    monkeypatch.setattr(optimizer, "error", lambda name, sizes, device: float("nan") if name == "native" else 0.0)
    wrong: list[str] = []
    rows = optimizer.measure("small", STEP, environment(["optimizer"]), 0.02, wrong)
    assert wrong == ["native"]
    assert "native" not in {row.provider for row in rows}
    assert "small, step: native: left out, FAILED its check: error nan" in capsys.readouterr().out


def test_floors_are_the_bytes_at_the_speed_of_the_copy(small):
    rows = optimizer.measure("small", STEP, environment(["optimizer"]), 0.02, [])
    ms = {row.provider: row for row in rows if row.metric == "ms"}
    assert set(ms) == {COPY, *PROVIDERS}
    assert ms[COPY].floor is None
    assert ms["native"].floor == ms["adamw"].floor == pytest.approx(ms[COPY].p50, rel=1e-3)
    assert ms["sgd"].floor == pytest.approx(20 / 28 * ms[COPY].p50, rel=1e-3)
    memory = {row.provider: row.p50 for row in rows if row.metric == "bytes"}
    assert memory["torch"] >= 4 * SIZES[0].numel() > memory["native"]


def test_the_table_holds_the_newest_rows():
    env = environment(["optimizer"])

    def row(name, ms, metric="ms", floor=2.0):
        return make_row(env, "optimizer", {"model": "m", "mode": STEP}, name, metric, Stats(ms, ms, ms, 5), floor)

    rows = [row("native", 9.0), row("adamw", 5.0), row("torch", 8.0), row("native", 4.0), row("native", 2**21, "bytes")]
    ours = next(line for line in optimizer.cells(rows) if line[2] == "native")
    assert ours == ["m", STEP, "native", "4", "4 - 4", "50%", "0.80x", "0.50x", "2.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rows of a CPU")
def test_the_command_writes_rows(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimizer, "RESULTS", tmp_path)
    assert optimizer.main(["--quick", "--no-write"]) == 0
    assert not list(tmp_path.iterdir())
    assert optimizer.main(["--quick"]) == 0
    written = [json.loads(line) for line in (tmp_path / "cpu" / "optimizer.jsonl").read_text().splitlines()]
    assert all(tuple(row) == ROW_KEYS for row in written)
    assert {row["subject"] for row in written} == {"optimizer"}
    assert "│ resnet50 │ step │ native   │" in capsys.readouterr().out
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.optimizer_cpu().splitlines()[2].startswith("| `resnet50` | ")


def test_a_captured_step_keeps_its_optimizer(monkeypatch):
    """A replay reads and writes the optimizer's memory."""
    made = []

    def captured(step):
        made.append(weakref.ref(step.__self__))
        return lambda: made[-1]()

    monkeypatch.setattr(optimizer.harness, "captured", captured)
    params = optimizer.tensors([torch.Size([3, 2]), torch.Size([2])], torch.device("cpu"))
    for name in optimizer.PROVIDERS:
        call = optimizer._call(name, params, optimizer.GRAPH, torch.device("cpu"))
        gc.collect()
        assert made[-1]() is not None, name
        call(0)
