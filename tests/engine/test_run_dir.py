"""Whose folder it is, where a run resumes, and its summary."""

import json
from pathlib import Path

import pytest

from engine import run_dir
from engine.checkpoint import CheckpointError
from engine.config import ConfigError, load_config, parse_config


def test_a_new_folder_is_claimed(config):
    assert run_dir.resume_point(config, 1) is None
    assert not config.run.output_dir.exists(), "asking writes nothing"
    run_dir.claim(config)
    assert load_config(config.run.output_dir / "config.yaml") == config
    assert run_dir.resume_point(config, 1) is None, "interrupted before its first checkpoint: starts again"


def test_the_folder_of_another_run_is_refused(config, settings):
    run_dir.claim(config)
    settings["distill"] = {"tau": 0.3}
    with pytest.raises(ConfigError, match=r"run.output_dir: .*run holds another run, which differs in distill.tau"):
        run_dir.resume_point(parse_config(settings), 1)


def test_a_folder_of_other_files_is_left_alone(config):
    config.run.output_dir.mkdir()
    (config.run.output_dir / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="run.output_dir: .* holds files but no run"):
        run_dir.resume_point(config, 1)
    assert [path.name for path in config.run.output_dir.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "- 1", "[", "text"])
def test_a_folder_with_another_kind_of_config_is_left_alone(config, content):
    config.run.output_dir.mkdir()
    (config.run.output_dir / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match="run.output_dir: .* holds files but no run"):
        run_dir.resume_point(config, 1)


def test_a_place_that_cannot_be_written_is_found_early(config, settings, monkeypatch):
    config.run.output_dir.write_text("")
    with pytest.raises(ConfigError, match="run.output_dir: .* cannot be written .*is a file"):
        run_dir.resume_point(config, 1)
    settings["run"]["output_dir"] = "/dev/null/x"
    with pytest.raises(ConfigError, match="run.output_dir: /dev/null/x cannot be written"):
        run_dir.resume_point(parse_config(settings), 1)
    settings["run"]["output_dir"] = "/proc/run"  # exists, but takes no folders, not even root's
    with pytest.raises(ConfigError, match="run.output_dir: /proc/run cannot be written"):
        run_dir.claim(parse_config(settings))
    monkeypatch.setattr(run_dir.os, "access", lambda path, mode: False)
    settings["run"]["output_dir"] = "new"
    with pytest.raises(ConfigError, match="run.output_dir: new cannot be written .no permission"):
        run_dir.resume_point(parse_config(settings), 1)


def test_the_home_folder_is_understood(settings):
    settings["run"]["output_dir"] = "~/runs/x"
    assert parse_config(settings).run.output_dir == Path.home() / "runs" / "x"


def test_never_resume_does_not_overwrite(config, settings):
    run_dir.claim(config)
    settings["run"]["resume"] = "never"
    with pytest.raises(ConfigError, match="run.resume: never, but .* holds this run already"):
        run_dir.resume_point(parse_config(settings), 1)


def test_a_checkpoint_that_is_not_there(config, settings, tmp_path):
    settings["run"]["resume"] = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere: no checkpoint there"):
        run_dir.resume_point(parse_config(settings), 1)


def test_summary_has_the_agreed_shape(config):
    folder = config.run.output_dir
    folder.mkdir()
    rows = [
        {"step": 0, "knn/a": 0.3, "knn/b": 0.25},
        {"step": 2, "knn/a": 0.9, "knn/b": 0.9},
        {"step": 3, "loss/a": 1.0, "skipped_images": 2},
        {"step": 4, "knn/a": 0.5, "knn/b": 0.45},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run_dir.write_summary(folder, config, steps=4, seconds=3.14159, train_seconds=2.0)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary == {
        "peers": {
            "a": {"backbone": "wrn-10-1", "knn_before": 0.3, "knn_after": 0.5},
            "b": {"backbone": "wrn-10-2", "knn_before": 0.25, "knn_after": 0.45},
        },
        "steps": 4, "seconds": 3.1, "images_per_s": 32.0, "skipped_images": 2,
    }  # fmt: skip
    assert "peer b (wrn-10-2): kNN 25.0% before, 45.0% after" in run_dir.describe_summary(summary)


def test_a_run_from_another_folders_checkpoint_has_no_score_before(config):
    folder = config.run.output_dir
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "knn/a": 0.5, "knn/b": 0.4}) + "\n")
    summary = run_dir.write_summary(folder, config, steps=4, seconds=1.0, train_seconds=1.0)
    assert summary["peers"]["a"]["knn_before"] is None
    assert "peer a (wrn-10-1): kNN not measured before, 50.0% after" in run_dir.describe_summary(summary)


def test_data_without_labels_has_null_scores(config):
    folder = config.run.output_dir
    folder.mkdir()
    summary = run_dir.write_summary(folder, config, steps=4, seconds=1.0, train_seconds=1.0)
    assert summary["peers"]["a"]["knn_before"] is summary["peers"]["a"]["knn_after"] is None
    assert "no kNN (no labels, or eval.knn=null)" in run_dir.describe_summary(summary)
