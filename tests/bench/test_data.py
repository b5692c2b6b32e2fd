"""`python -m bench data`: what it measures, rows, shares, tables, the command."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bench import data, data_stream
from bench.data_stream import CROP, DALI, DALI_GRAPH, DECODE, STAGES, STEP, TORCHVISION, VIEWS
from bench.rows import ROW_KEYS, environment
from engine.data.dali_loader import DaliLoader
from engine.data.torch_loader import TorchLoader

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / f"{i}.jpg")
    return root


def options_for(photos, **changes) -> argparse.Namespace:
    options = data.parse(["--root", str(photos), "--size", "16", "--batch", "8", "--workers", "1", "--seconds", "0.2"])
    options.step_batch = 2
    return argparse.Namespace(**{**vars(options), **changes})


@pytest.mark.parametrize("provider", [DALI, TORCHVISION])
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_gives_whole_batches(photos, provider, stage):
    if provider == DALI:
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    loader = data_stream.build_loader(provider, stage, options_for(photos), CPU)
    batches = list(loader.batches(0, 5))
    assert len(batches) == 5
    if stage == DECODE:
        assert provider == TORCHVISION or all(batch.views == [] for batch in batches)
    else:
        assert isinstance(loader, DaliLoader if provider == DALI else TorchLoader)
        assert [tuple(view.shape) for view in batches[-1].views] == [(8, 3, 16, 16)] * 4
        policy = loader.policy
        assert (policy.jitter == 0 and policy.flip == 0 and policy.blur == 0) == (stage == CROP)


def test_decode_alone_reads_every_image(photos, monkeypatch):
    loader = data_stream.build_loader(TORCHVISION, DECODE, options_for(photos, workers=0, batch=20), CPU)
    seen = []
    image = loader.dataset.image
    monkeypatch.setattr(loader.dataset, "image", lambda index: seen.append(index) or image(index))
    assert len(list(loader.batches(0, 3))) == 3
    assert sorted(seen[:20]) == sorted(loader.order.indices(0).tolist()) and len(seen) == 60


def test_the_graph_is_dali_by_itself(photos):
    loader = data_stream.build_loader(DALI_GRAPH, VIEWS, options_for(photos), CPU)
    assert isinstance(loader, DaliLoader) and not loader.native


def test_a_stream_is_measured(photos):
    found = data_stream.stream(TORCHVISION, CROP, options_for(photos, workers=0, seconds=1.5), CPU)
    assert found["images_per_s"] > 10 and found["gpu_bytes"] == 0


@pytest.mark.slow
def test_a_step_is_measured(photos):
    found = data_stream.step(["resnet18", "resnet18"], options_for(photos, size=32), CPU)
    assert found["images_per_s"] > 0


def samples() -> data.Samples:
    def rates(*values: float) -> list[dict[str, float]]:
        return [{"images_per_s": value, "bytes": 2**20, "gpu_bytes": 0} for value in values]

    return {
        (DALI, DECODE): rates(1000), (DALI, VIEWS): rates(390, 400, 410), (TORCHVISION, VIEWS): rates(100, 100, 100),
        (STEP, "resnet18,resnet50"): [{"images_per_s": 8.0}],
    }  # fmt: skip


def test_rows_have_limits_memory_and_shares(photos):
    rows = data.rows_of(samples(), environment(["data"]), options_for(photos, step="resnet18,resnet50"))
    assert all(tuple(vars(row)) == ROW_KEYS for row in rows)
    found = {(row.provider, row.case.get("stage"), row.metric): row for row in rows}
    assert found[DALI, VIEWS, "images_per_s"].floor == 1000 and found[DALI, DECODE, "images_per_s"].floor is None
    assert found[TORCHVISION, VIEWS, "images_per_s"].floor is None, "its decoder was not measured"
    assert found[DALI, VIEWS, "bytes"].p50 == 2**20 and (DALI, VIEWS, "gpu_bytes") not in found
    share = found[DALI, VIEWS, "share_of_step"]
    assert share.p50 == pytest.approx(8 / 400) and share.p20 < share.p50 < share.p80
    lines = {(line[0], line[1]): line for line in data.cells(rows)}
    assert lines[VIEWS, DALI][2:6] == ["400", "394 - 406", "1,600", "4.00x"]
    assert lines[VIEWS, DALI][-1] == "2.0%" and lines[DECODE, DALI][4] == "-"


def test_the_command_measures_in_processes_of_their_own(photos, monkeypatch, tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    monkeypatch.setattr(data, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(data, "STAGES", (VIEWS,))
    monkeypatch.setattr(data, "providers", lambda env: [DALI])
    arguments = ["--root", str(photos), "--size", "16", "--batch", "8", "--workers", "1", "--seconds", "0.3"]
    # Decode and crop were left out here, which the command says and its status tells.
    assert data.main([*arguments, "--rounds", "1", "--step", "", "--photos", "noise"]) == 1
    printed = capsys.readouterr().out
    assert "all views" in printed and f"bench: {DALI} gave no number for {DECODE}" in printed
    (file,) = (tmp_path / "results").glob("*/data.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["metric"] for row in rows} >= {"images_per_s", "bytes"}
    assert rows[0]["case"]["photos"] == "noise" and str(photos) not in file.read_text()


def test_a_measurement_that_fails_is_left_out(photos, capsys):
    assert data.measured(TORCHVISION, VIEWS, options_for(photos / "none")) is None
    assert "torchvision, all views: left out, " in capsys.readouterr().out
