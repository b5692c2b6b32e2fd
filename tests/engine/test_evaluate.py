"""engine/evaluate.py on a run that was just trained, and on exported weights."""

import json

import numpy as np
import pytest
import torch

from engine import evaluate, evaluation_report
from engine.export import export_backbone
from engine.probe import knn_accuracy
from ranks import run_ranks
from runs import fit

QUICK = ["draws=2", "knn.k=5", "linear.steps=30"]


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """Two peers of two steps, on labelled images."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    peer = {"projector": {"hidden": 16, "out": 8}}
    plain = {
        "run": {"output_dir": str(folder), "steps": 2},
        "data": {"dataset": "folder", "root": str(image_folder), "image_size": 32, "batch_size": 16, "workers": 0},
        "peers": [{"name": "a", "backbone": "wrn-10-1", **peer}, {"name": "b", "backbone": "wrn-10-2", **peer}],
        "eval": {"knn": {"k": 5}},
    }
    run_ranks(fit, 1, plain)
    return folder


def scores(folder) -> list[dict]:
    return json.loads((folder / "scores.json").read_text())["scores"]


@pytest.mark.slow
def test_a_run_is_evaluated(run, capsys):
    asked = "protocols=[knn,linear,official,few,noisy,corruptions]"
    small = ["few.shares=[0.2]", "noisy.rates=[0.4]", "corruptions.kinds=[fog]", "corruptions.images=3"]
    assert evaluate.main(["--run", str(run), asked, *QUICK, *small]) == 0
    told = capsys.readouterr()
    found = scores(run / "evaluation")
    assert {(s["peer"], s["backbone"]) for s in found} == {("a", "wrn-10-1"), ("b", "wrn-10-2")}
    names = [(s["protocol"], s["setting"]) for s in found if s["peer"] == "a"]
    assert names[:6] == [("knn", "k=5"), ("linear", ""), ("official", ""), ("few", "20%"), ("noisy", "symmetric 40%"),
                         ("noisy", "pairflip 40%")]  # fmt: skip
    assert "corruptions" in told.out and "a (wrn-10-1): linear:" in told.err
    for name in ("scores.json", "scores.md", "scores.png", "few.png", "noisy.png", "corruptions.png"):
        assert f"evaluation/{name}" in told.out.replace("\n", "") and (run / "evaluation" / name).stat().st_size > 100
    summary = json.loads((run / "summary.json").read_text())
    knn = {s["peer"]: s["mean"] for s in found if s["protocol"] == "knn"}
    assert knn == {name: peer["knn_after"] for name, peer in summary["peers"].items()}, "training says the same"
    assert evaluate.main(["--run", str(run), asked, *QUICK, *small]) == 0
    assert scores(run / "evaluation") == found, "the same seed, the same scores"


@pytest.mark.slow
def test_an_exported_backbone_has_its_peers_scores(run, image_folder, tmp_path):
    data = ["data.dataset=folder", f"data.root={image_folder}", "data.workers=0"]
    assert evaluate.main(["--run", str(run), "--peer", "b", "--output", str(tmp_path / "run"), *QUICK]) == 0
    file, _ = export_backbone(run, "b", "dogo", tmp_path / "b.safetensors")
    assert evaluate.main(["--weights", str(file), *data, *QUICK]) == 0
    assert scores(tmp_path / "run") == scores(tmp_path / "evaluation")
    read, facts = evaluation_report.read(tmp_path / "run" / "scores.json")
    assert [s.peer for s in read] == ["b", "b"] and facts["settings"]["knn"]["k"] == 5
    assert (facts["run"], facts["checkpoint"]) == ("run", "step_00000002")


@pytest.mark.slow
@pytest.mark.gpu
def test_a_gpu_finds_the_same(run):
    assert evaluate.main(["--run", str(run), *QUICK]) == 0
    there = scores(run / "evaluation")
    encoders, settings, _ = evaluate._from_run(evaluate._parsed(["--run", str(run), *QUICK]))
    found = evaluate.evaluate(encoders, settings, torch.device("cpu"))
    assert [s["values"] for s in there] == [list(score.values) for score in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "told"),
    [(["--peer", "c"], "--peer: 'c' is not in this run; allowed: a, b"),
     (["knn.kk=3"], "knn.kk: unknown key; did you mean k?"),
     (["protocols=[knn,lineal]"], "protocols.1: found 'lineal'"),
     (["protocols=[ood]"], "ood: the protocol needs data"),
     (["protocols=[ood]", "ood=[{name: x, file: nothing.npz}]"], "nothing.npz: no such file"),
     (["protocols=[few]", "few.shares=[0.01]"], "few.shares: 0.01 of the 22 images of class 0 are 0"),
     (["data.image_size=64"], "data.image_size: unknown key"),
     (["data.root=/nowhere"], "/nowhere")],
)  # fmt: skip
def test_bad_input_is_one_line(run, argv, told, capsys):
    assert evaluate.main(["--run", str(run), *argv]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and told in error


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert evaluate.main(["--run", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [([], "--run"), (["--run", "x", "--weights", "y"], "not allowed with"),
     (["--run", "x", "--backbone", "z"], "--backbone: says nothing of --run"),
     (["--run", "x", "--image-size", "32"], "--image-size: says nothing of --run"),
     (["--weights", "x", "--peer", "a"], "--peer: says nothing of --weights")],
)  # fmt: skip
def test_arguments_that_do_not_go_together(argv, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(argv)
    assert told in capsys.readouterr().err


def test_knn_of_equal_features_is_no_division_by_zero():
    """A collapsed encoder: every image the same features."""
    features, labels = torch.ones(20, 4), torch.from_numpy(np.arange(20) % 2)
    assert knn_accuracy(features, labels, features, labels, k=20, tau=0.1) == 0.5
