"""`python -m bench parity`: its runs, what it calls apart, rows, the command."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from bench import parity
from bench.data_stream import DALI, DALI_GRAPH, PROVIDERS, TORCHVISION
from bench.rows import ROW_KEYS, environment
from engine.config import parse_config


@pytest.mark.parametrize("provider", PROVIDERS)
def test_loaders_differ_in_nothing_else(provider):
    plain = [parse_config(parity.settings(name, 1, "photos", 9, "run")).resolved() for name in (provider, TORCHVISION)]
    assert plain[0]["data"].pop("loader") == (TORCHVISION if provider == TORCHVISION else "dali")
    assert plain[1]["data"].pop("loader") == TORCHVISION
    assert plain[0] == plain[1]


def test_three_standard_errors_are_apart():
    theirs = [0.30, 0.32, 0.31]
    scores = {(TORCHVISION, "a"): theirs, (DALI, "a"): [0.31, 0.33, 0.30], (DALI_GRAPH, "a"): [0.20, 0.22, 0.21],
              ("start", "a"): [0.1, 0.1, 0.1]}  # fmt: skip
    assert parity.apart(scores) == [f"{DALI_GRAPH}, peer a"]


def test_rows_name_provider_and_peer():
    options = argparse.Namespace(photos="dogs", steps=9, seeds=2)
    (row,) = parity.rows_of({(DALI, "b"): [0.2, 0.3]}, environment(["parity"]), options)
    assert tuple(vars(row)) == ROW_KEYS and (row.provider, row.case["peer"], row.metric) == (DALI, "b", "accuracy")
    assert row.p50 == pytest.approx(0.25) and row.n == 2


@pytest.mark.slow
def test_the_command_trains_every_loader(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    monkeypatch.setattr(parity, "RESULTS", tmp_path / "results")
    rng = np.random.default_rng(0)
    for i in range(90):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    root = str(tmp_path / "photos")
    parity.main(["--root", root, "--seeds", "1", "--steps", "1"])
    (file,) = (tmp_path / "results").glob("*/accuracy.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["provider"], row["case"]["peer"]) for row in rows} == {
        (name, peer) for name in (*PROVIDERS, "start") for peer in "ab"
    }
    assert root not in file.read_text() and "kNN, mean" in capsys.readouterr().out
