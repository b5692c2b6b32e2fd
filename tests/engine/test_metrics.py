"""Meters, collapse indicators, rows, clocks and plots."""

import json
import math
import time

import pytest
import torch

from engine.metrics import Meters, Recorder, Stopwatch, collapse_indicators, plot_run, read_rows


def test_meters_average_since_the_last_read():
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add({"loss/a": torch.tensor(value), "kl/a": torch.tensor(-value)})
    assert meters.read() == {"loss/a": 3.0, "kl/a": -3.0}
    meters.add({"loss/a": torch.tensor(5.0)})
    assert meters.read() == {"loss/a": 5.0}
    assert meters.read() == {}


def test_meters_keep_no_graph_and_no_alias():
    meters = Meters()
    value = torch.tensor(1.0, requires_grad=True)
    meters.add({"x": value * 2})
    held = torch.zeros(())
    meters.add({"x": held})
    held.fill_(100.0)
    assert meters.read() == {"x": 1.0}


def test_indicators_tell_spread_from_collapse():
    torch.manual_seed(0)
    spread = {k: v.item() for k, v in collapse_indicators(torch.randn(2000, 16)).items()}
    assert spread["std"] == pytest.approx(1.0, abs=0.02)
    assert spread["rank"] == pytest.approx(16, abs=0.1)
    point = {k: v.item() for k, v in collapse_indicators(torch.ones(50, 16)).items()}
    assert point["std"] == pytest.approx(0.0, abs=1e-6)
    assert point["rank"] == pytest.approx(1.0, abs=1e-4)
    # three equal directions have effective rank three
    lines = torch.eye(8)[torch.arange(60) % 3]
    assert collapse_indicators(lines)["rank"].item() == pytest.approx(3.0, rel=1e-6)


def test_effective_rank_is_the_entropy_of_singular_values():
    torch.manual_seed(1)
    z = torch.randn(40, 7) * torch.linspace(0.1, 3, 7)
    s = torch.linalg.svdvals(torch.nn.functional.normalize(z, dim=1).double())
    p = s / s.sum()
    assert collapse_indicators(z)["rank"].item() == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


def test_recorder_appends_and_drops_what_a_resumed_run_repeats(tmp_path):
    recorder = Recorder(tmp_path, enabled=True, from_step=0)
    for step in (0, 10, 20):
        recorder.write(step, {"loss/a": float(step)})
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')  # cut by a crash
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 10, 20]
    recorder = Recorder(tmp_path, enabled=True, from_step=10)
    recorder.write(15, {"loss/a": 15.0})
    recorder.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 10, 15]
    assert list((tmp_path / "tensorboard").iterdir())


def test_other_ranks_write_nothing(tmp_path):
    recorder = Recorder(tmp_path, enabled=False, from_step=0)
    recorder.write(1, {"x": 1})
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_stopwatch_counts_only_while_it_runs():
    watch = Stopwatch()
    watch.seconds = 5.0
    watch.start()
    time.sleep(0.02)
    watch.stop()
    held = watch.read()
    time.sleep(0.02)
    assert 5.02 <= held == watch.read()
    watch.start()
    watch.start()
    assert watch.read() < held + 0.02


def test_plots_show_what_there_is(tmp_path):
    recorder = Recorder(tmp_path, enabled=True, from_step=0)
    for step in range(1, 4):
        recorder.write(step, {"loss/a": 1.0 / step, "ntxent/a": 1.0, "kl/a": 0.1, "std/a": 0.5, "lr/a": 1e-3})
    recorder.close()
    assert [path.name for path in plot_run(tmp_path)] == ["losses.png", "embeddings.png"]
    recorder = Recorder(tmp_path, enabled=True, from_step=3)
    recorder.write(3, {"knn/a": 0.5})
    recorder.close()
    written = plot_run(tmp_path)
    assert [path.name for path in written] == ["losses.png", "embeddings.png", "knn.png"]
    for path in written:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000
