"""Checkpoints: exact resume, atomic writing, and every kind of damage named."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import checkpoint, distributed, engines
from engine.checkpoint import CheckpointError, changed_keys, newest, prune, verified
from engine.config import parse_config
from engine.trainer import Trainer
from ranks import run_ranks


def run(plain: dict[str, Any], ranks, **changes) -> Path:
    """One run to its end with changes of its `run` section."""
    cfg = parse_config({**plain, "run": {**plain["run"], **changes}})
    Trainer(cfg, ranks).fit()
    return cfg.run.output_dir


def with_dropout(peer: nn.Module) -> nn.Module:
    """So that training draws random numbers, and a random state that was not restored shows."""
    peer.projector = nn.Sequential(*peer.projector, nn.Dropout(0.2))
    return peer


def straight_and_resumed(plain: dict[str, Any], folder: str, stage: int) -> dict[str, bool]:
    """20 steps at once, and 10, then 10 more in fresh objects: which files of the last checkpoint are equal."""
    ranks = distributed.start()
    build_peer = engines.build_peer
    engines.build_peer = lambda *args, **options: with_dropout(build_peer(*args, **options))
    plain = {**plain, "engine": {"zero_stage": stage, "precision": "fp32"}}
    straight = run(plain, ranks, output_dir=f"{folder}/straight", steps=20)
    run(plain, ranks, output_dir=f"{folder}/resumed", steps=10)
    torch.manual_seed(1234)  # a resumed run must not lean on what this process happened to draw
    resumed = run(plain, ranks, output_dir=f"{folder}/resumed", steps=20)
    same = {}
    for peer in "ab":
        one, other = (
            load_file(p / "checkpoints/step_00000020" / f"peer_{peer}.safetensors") for p in (straight, resumed)
        )
        assert one.keys() == other.keys()
        same.update({f"{peer}.{key}": torch.equal(one[key], other[key]) for key in one})
    for name in ("peer_a.optimizer", "peer_b.optimizer", "rng"):
        one, other = (
            torch.load(p / "checkpoints/step_00000020" / f"{name}.rank{ranks.rank}.pt", weights_only=True)
            for p in (straight, resumed)
        )
        same[name] = equal(one, other)
    rows = [[json.loads(line) for line in (p / "metrics.jsonl").open()] for p in (straight, resumed)]
    timeless = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in run_rows] for run_rows in rows]
    # the shorter run evaluated at its end; everything else is the same, step by step
    same["metrics"] = timeless[0] == [row for row in timeless[1] if not (row["step"] == 10 and "knn/a" in row)]
    distributed.stop()
    return same


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (0, 2), (2, 1), (2, 2), (3, 2)])
def test_twenty_steps_equal_ten_resume_ten_to_the_bit(settings, tmp_path, stage, world):
    settings["peers"][1]["backbone"] = "mobilenetv3_small_050"
    for same in run_ranks(straight_and_resumed, world, settings, str(tmp_path), stage):
        assert [name for name, is_same in same.items() if not is_same] == []


def tiny_run(plain: dict[str, Any], changes: dict[str, Any]) -> None:
    ranks = distributed.start()
    run(plain, ranks, **changes)
    distributed.stop()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, image_folder):
    """The run of a checkpoint with two steps behind it: (plain configuration, folder of the checkpoint)."""
    folder = tmp_path_factory.mktemp("saved")
    peer = {"backbone": "wrn-10-1", "projector": {"hidden": 16, "out": 8}}
    plain = {
        "run": {"output_dir": str(folder / "run"), "steps": 2, "save_every_steps": 1, "keep_checkpoints": 2},
        "data": {"dataset": "folder", "root": str(image_folder), "image_size": 32, "batch_size": 16, "workers": 0},
        "peers": [{"name": "a", **peer}, {"name": "b", **peer}],
    }
    run_ranks(tiny_run, 1, plain, {})
    return plain, folder / "run" / "checkpoints" / "step_00000002"


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of that checkpoint to damage."""
    shutil.copytree(saved[1], tmp_path / "step_00000002")
    return tmp_path / "step_00000002"


@pytest.mark.slow
class TestSaved:
    def test_holds_both_peers_and_says_where_it_stands(self, saved):
        plain, folder = saved
        names = {path.name for path in folder.iterdir()}
        of_peers = {f"peer_{p}.{kind}" for p in "ab" for kind in ("safetensors", "optimizer.rank0.pt")}
        assert names == {"meta.json", "rng.rank0.pt"} | of_peers
        progress = verified(folder, parse_config(plain), 1)
        assert progress.step == 2
        assert progress.data.startswith("folder, 48 images, names ")
        assert 0 < progress.train_seconds <= progress.seconds
        weights = load_file(folder / "peer_a.safetensors")
        assert weights["encoder.bn.num_batches_tracked"] == 4, "two views in two steps"
        assert sorted(p.name for p in folder.parent.iterdir()) == ["step_00000001", "step_00000002"]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: os.truncate(f / "peer_a.safetensors", 100), r"peer_a.safetensors: truncated \(100 of \d+ b"),
            (lambda f: (f / "peer_b.optimizer.rank0.pt").unlink(), "peer_b.optimizer.rank0.pt: missing"),
            (lambda f: flip(f / "rng.rank0.pt"), "rng.rank0.pt: changed since it was written"),
            (lambda f: (f / "meta.json").unlink(), "no checkpoint there"),
            (lambda f: (f / "meta.json").write_text("{}"), "meta.json: not a checkpoint of this project"),
            (lambda f: (f / "meta.json").write_text("what"), "meta.json: not a checkpoint of this project"),
            (lambda f: edit(f, world=2), "written by 2 ranks, this run has 1"),
            (lambda f: edit(f, format=99), "not a checkpoint of this project"),
        ],
    )  # fmt: skip
    def test_damage_is_named(self, saved, copy, damage, message):
        damage(copy)
        with pytest.raises(CheckpointError, match=message) as caught:
            verified(copy, parse_config(saved[0]), 1)
        assert str(copy) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_another_configuration_is_named_by_its_keys(self, saved, copy):
        plain = {**saved[0], "data": {**saved[0]["data"], "batch_size": 8}, "distill": {"tau": 0.2}}
        with pytest.raises(
            CheckpointError, match=r"another configuration; it differs in data.batch_size, distill.tau;"
        ):
            verified(copy, parse_config(plain), 1)

    def test_a_pickle_in_disguise_is_not_run(self, saved, copy, tmp_path):
        trap = tmp_path / "trap"
        torch.save({"state": Trap(str(trap))}, copy / "peer_a.optimizer.rank0.pt")
        meta = json.loads((copy / "meta.json").read_text())
        content = (copy / "peer_a.optimizer.rank0.pt").read_bytes()
        meta["files"]["peer_a.optimizer.rank0.pt"] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        (copy / "meta.json").write_text(json.dumps(meta))
        verified(copy, parse_config(saved[0]), 1)  # the attacker forged the digest too
        with pytest.raises(AssertionError, match=r"CheckpointError: .*peer_a.optimizer.rank0.pt: cannot be read"):
            run_ranks(tiny_run, 1, saved[0], {"output_dir": str(tmp_path / "new"), "resume": str(copy), "steps": 3})
        assert not trap.exists()

    def test_data_that_changed_size_is_refused(self, saved, copy, tmp_path, image_folder):
        more = tmp_path / "more"
        shutil.copytree(image_folder, more)
        shutil.copy(more / "class0" / "000.png", more / "class0" / "900.png")
        plain = {**saved[0], "data": {**saved[0]["data"], "root": str(more)}}
        changes = {"output_dir": str(tmp_path / "new"), "resume": str(copy), "steps": 3}
        with pytest.raises(AssertionError, match=r"made of another data set \(folder, 48 images.*folder, 49 images"):
            run_ranks(tiny_run, 1, plain, changes)
        (more / "class0" / "900.png").unlink()
        (more / "class0" / "000.png").rename(more / "class0" / "another.png")
        with pytest.raises(AssertionError, match=r"made of another data set \(folder, 48 images.*folder, 48 images"):
            run_ranks(tiny_run, 1, plain, changes)

    def test_a_run_shorter_than_its_checkpoint_is_refused(self, saved, copy, tmp_path):
        changes = {"output_dir": str(tmp_path / "new"), "resume": str(copy), "steps": 1}
        with pytest.raises(AssertionError, match="has 2 steps behind it, and this run ends at 1; give a run.steps"):
            run_ranks(tiny_run, 1, saved[0], changes)
        assert not (tmp_path / "new").exists()


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_a_key_that_there_was_not_yet_has_its_default(config):
    saved = config.resolved()
    del saved["engine"]["compile"], saved["engine"]["profile"]
    assert checkpoint.changed_keys(saved, config) == []
    saved["engine"]["compile"] = True
    saved["data"]["batch_size"] = 8
    assert checkpoint.changed_keys(saved, config) == ["data.batch_size", "engine.compile"]
    saved["engine"]["unknown"] = 1  # of another version
    assert "engine.unknown" in checkpoint.changed_keys(saved, config)


class Weights:
    """Stands for an engine whose state is a tensor."""

    name = "a"
    module = torch.nn.BatchNorm1d(2)

    def __init__(self, ranks):
        self.ranks = ranks

    def weights(self):
        return {"w": torch.ones(3)}

    def optimizer_state(self):
        return {"step": 1}


@pytest.fixture
def stub(tmp_path, config, alone):
    """A function that saves the checkpoint of a step into tmp_path."""

    def save(step: int) -> Path:
        progress = checkpoint.Progress(step, data="48 images", loader="torchvision", seconds=1.0, train_seconds=0.5)
        return checkpoint.save(tmp_path, progress, [Weights(alone)], config, alone)

    return save


def test_a_save_cut_anywhere_leaves_the_old_checkpoint(tmp_path, config, stub, monkeypatch):
    """Every call that touches the disk fails once; what `newest` finds afterwards is always complete."""
    save = stub
    save(1)
    save(2)
    for place, name in (
        (os, "fsync"),
        (os, "replace"),
        (torch, "save"),
        (checkpoint, "save_file"),
        (checkpoint, "_sha256"),
    ):
        for attempt in range(6):
            with monkeypatch.context() as patch:
                real, calls = getattr(place, name), iter(range(100))

                def cut(*arguments, real=real, calls=calls, attempt=attempt, **options):
                    if next(calls) == attempt:
                        raise OSError(28, "No space left on device")
                    return real(*arguments, **options)

                patch.setattr(place, name, cut)
                try:
                    save(3)
                except OSError:
                    found = newest(tmp_path)
                    assert found is not None
                    assert verified(found, config, 1).step in (2, 3)
            shutil.rmtree(tmp_path / "step_00000003", ignore_errors=True)
    assert save(2) == newest(tmp_path), "writing over an older checkpoint of the same step"
    assert verified(tmp_path / "step_00000002", config, 1).step == 2
    prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_a_save_over_the_same_step_cut_between_its_two_moves_is_recovered(tmp_path, config, alone, stub, monkeypatch):
    stub(5)
    real, calls = os.replace, iter(range(9))

    def cut(source, target):
        if next(calls) == 1:
            raise OSError("power cut")
        real(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(OSError, match="power cut"):
        stub(5)
    monkeypatch.setattr(os, "replace", real)
    assert newest(tmp_path) is None
    checkpoint.recover(tmp_path)
    found = newest(tmp_path)
    assert found is not None
    assert verified(found, config, 1).step == 5


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, stub, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace
    links = "/proc/self/fd"
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"{links}/{fd}")).name), real_sync(fd))[1]
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), real_replace(a, b))[1])
    folder = stub(1)
    before = set(events[: events.index("replace")])
    assert {path.name for path in folder.iterdir()} <= before
    assert ".step_00000001.partial" in before
    assert tmp_path.name in events[events.index("replace") :]


def test_newest_of_nothing(tmp_path):
    assert newest(tmp_path / "none") is None
    (tmp_path / ".step_00000009.partial").mkdir()
    assert newest(tmp_path) is None


def test_what_a_resumed_run_may_change(settings):
    cfg = parse_config(settings)
    saved = cfg.resolved()
    free = {**settings, "run": {**settings["run"], "steps": 9, "log_every_steps": 7}, "eval": {"knn": {"k": 1}}}
    assert changed_keys(saved, parse_config(free)) == []
    assert changed_keys(saved, parse_config({**settings, "engine": {"zero_stage": 1}})) == ["engine.zero_stage"]
    for peer in settings["peers"]:
        peer["optimizer"] = {"schedule": "cosine"}
    longer = {**settings, "run": {**settings["run"], "steps": 9}}
    keys = changed_keys(parse_config(settings).resolved(), parse_config(longer))
    assert keys == ["run.steps"], "a cosine spans the length of the run"
    for peer in settings["peers"]:
        peer["optimizer"] = {"schedule": "step", "milestones": [1.0]}
    longer = {**settings, "run": {**settings["run"], "steps": 9}}
    assert changed_keys(parse_config(settings).resolved(), parse_config(longer)) == [], "epochs do not"


def test_a_momentum_that_ends_with_the_run_binds_its_length(settings):
    """Another length is another run where a momentum rises to 1 at the last step; a constant one does not mind."""
    for schedule, differing in (("cosine", ["run.steps"]), ("constant", [])):
        settings["peers"][0]["objective"] = {"name": "byol", "momentum_schedule": schedule}
        saved = parse_config(settings).resolved()
        longer = parse_config({**settings, "run": {**settings["run"], "steps": 9}})
        assert changed_keys(saved, longer) == differing
