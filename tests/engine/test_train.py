"""The main command as a user runs it: real launchers, real processes, real mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def file(settings, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def train(file: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    command = [*launcher, "engine/train.py", "--config", str(file), *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def deepspeed(ranks: int) -> tuple[str, ...]:
    return ("deepspeed", "--num_accelerators", str(ranks), "--master_port", str(29600 + os.getpid() % 300))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_under_the_deepspeed_launcher(file, tmp_path, ranks):
    done = train(file, launcher=deepspeed(ranks))
    assert done.returncode == 0, done.stderr
    assert "peer a (wrn-10-1): kNN" in done.stdout
    assert done.stdout.count("run folder:") == 1, "one rank talks"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    states = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "step_00000004").glob("peer_a.optimizer*"))
    assert states == [f"peer_a.optimizer.rank{rank}.pt" for rank in range(ranks)]


@pytest.mark.slow
def test_as_a_plain_command_from_any_folder(file, tmp_path):
    command = [sys.executable, str(ROOT / "engine" / "train.py"), "--config", str(file), "engine.precision=bf16"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing but the result"
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(file, tmp_path):
    straight = train(file, "run.steps=12", f"run.output_dir={tmp_path}/straight")
    assert straight.returncode == 0, straight.stderr
    slow = ["run.steps=12", "run.save_every_steps=3", f"run.output_dir={tmp_path}/killed"]
    process = subprocess.Popen(
        [sys.executable, "engine/train.py", "--config", str(file), *slow], cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoints/step_*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = sorted(p.name for p in (tmp_path / "killed" / "checkpoints").glob("step_*"))
    assert found, "no checkpoint in time"
    assert found[-1] != "step_00000012", "it was to be killed on the way"
    resumed = train(file, *slow)
    assert resumed.returncode == 0, resumed.stderr
    for peer in "ab":
        one, other = (load_file(tmp_path / run / "checkpoints/step_00000012" / f"peer_{peer}.safetensors")
                      for run in ("straight", "killed"))  # fmt: skip
        assert all(one[key].equal(other[key]) for key in one)
    rows = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss/a" in row] == list(range(1, 13)), "each step once"


@pytest.mark.slow
def test_a_run_from_another_folders_checkpoint_and_a_run_that_is_finished(file, tmp_path):
    assert train(file, "run.steps=2").returncode == 0
    source = f"run.resume={tmp_path}/run/checkpoints/step_00000002"
    # overrides may stand on both sides of --config, with dashes or without
    command = [sys.executable, "engine/train.py", "--run.steps=3", "--config", str(file), source,
               f"run.output_dir={tmp_path}/other"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kNN not measured before" in done.stdout
    again = train(file, "run.steps=2")
    assert again.returncode == 0
    assert again.stdout.startswith("this run was finished already: raise run.steps to go on, or remove ")
    assert_one_line(train(file, "run.steps=1"), "has 2 steps behind it, and this run ends at 1")


@pytest.mark.slow
def test_an_error_of_one_rank_alone_is_told(file, tmp_path):
    """Rank 1's data folder is not there, as on a machine where it was not mounted."""
    program = tmp_path / "rank1.py"
    program.write_text(
        "import os, runpy, sys\n"
        "sys.argv[0] = 'engine/train.py'\n"
        "if os.environ['RANK'] == '1': sys.argv.append('data.root=/nowhere')\n"
        "runpy.run_path('engine/train.py', run_name='__main__')\n"
    )
    command = [*deepspeed(2), str(program), "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "/nowhere" in lines[0]
    assert "Traceback" not in done.stderr


def assert_one_line(done: subprocess.CompletedProcess, *texts: str) -> None:
    assert done.returncode == 2, done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in lines[0], lines[0]


@pytest.mark.slow
class TestBadInput:
    """One line on stderr, exit code 2."""

    @pytest.mark.parametrize(
        ("overrides", "texts"),
        [
            (["peers.0.tau=0"], ["peers.0.tau: found 0, allowed: greater than or equal to"]),
            (["peers.1.backbone=resnet81"], ["peers.1.backbone: 'resnet81' is unknown; did you mean resnet"]),
            (["data.root=/nowhere"], ["data.root", "/nowhere"]),
            (["data.batch_size=100"], ["data.batch_size: 100 is more than the 48 readable images"]),
            (["run.resume=/nowhere"], ["/nowhere: no checkpoint there"]),
            (
                ["engine.deepspeed.zero_optimization.stage=2"],
                ["engine.deepspeed.zero_optimization.stage: 2 contradicts"],
            ),
            (["engine.deepspeed.amp.enabled=true"], ["engine.deepspeed: ", "AMP"]),
            (
                ["engine.zero_stage=1", "engine.deepspeed.zero_optimization.no_such=1"],
                ["engine.deepspeed: ", "no_such"],
            ),
            (
                ["engine.zero_stage=2", "engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"],
                ["engine.deepspeed: ", "zero_force_ds_cpu_optimizer"],
            ),
            (
                ["data.image_size=8", "peers.0.backbone=vit_tiny_patch16_224"],
                ["peers.0.backbone: vit_tiny_patch16_224 does not take data.image_size=8"],
            ),
        ],
    )
    def test_configuration(self, file, overrides, texts):
        assert_one_line(train(file, *overrides), *texts)

    def test_batch_that_does_not_divide_by_the_ranks(self, file):
        done = train(file, "data.batch_size=15", launcher=deepspeed(2))
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert lines == ["error: data.batch_size: 15 does not divide by 2 ranks"]

    def test_a_folder_with_two_readable_images(self, file, tmp_path):
        root = tmp_path / "few"
        root.mkdir()
        for i in range(2):
            Image.new("RGB", (40, 40), (i * 90, 10, 10)).save(root / f"{i}.png")
        (root / "broken.jpg").write_bytes(b"not an image")
        done = train(file, f"data.root={root}")
        assert_one_line(done, "data.batch_size: 16 is more than the 2 readable images")
        assert "broken.jpg" in done.stderr

    def test_an_empty_folder_and_a_folder_of_text(self, file, tmp_path):
        (tmp_path / "empty").mkdir()
        assert_one_line(train(file, f"data.root={tmp_path}/empty"), f"{tmp_path}/empty")
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "a.jpg").write_text("no pixels")
        assert_one_line(train(file, f"data.root={tmp_path}/text"), f"{tmp_path}/text")

    def test_the_folder_of_another_run_and_a_changed_configuration(self, file, tmp_path):
        first = train(file, "run.steps=1")
        assert first.returncode == 0, first.stderr
        assert_one_line(
            train(file, "run.steps=1", "distill.tau=0.2"), "holds another run, which differs in distill.tau"
        )
        elsewhere = [f"run.resume={tmp_path}/run/checkpoints/step_00000001", f"run.output_dir={tmp_path}/other"]
        assert_one_line(train(file, "run.seed=5", *elsewhere), "another configuration; it differs in run.seed")
        weights = tmp_path / "run" / "checkpoints" / "step_00000001" / "peer_b.safetensors"
        os.truncate(weights, 1000)
        assert_one_line(train(file, "run.steps=2"), str(weights), "truncated")


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_its_own_exit_code(file):
    done = train(file, "peers.0.optimizer={name: sgd, lr: 1e30}", "run.steps=20")
    assert done.returncode == 3
    assert "is not finite (a: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.network
def test_two_ranks_on_real_cifar10(tmp_path):
    """Every part of the quickstart but its length: a few steps lift kNN on real images above random weights."""
    done = train(
        ROOT / "configs" / "quickstart.yaml", "run.steps=50", f"run.output_dir={tmp_path}/run",
        f"data.root={ROOT}/data",
        "eval.knn.bank=2000", launcher=deepspeed(2),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peers = json.loads((tmp_path / "run" / "summary.json").read_text())["peers"]
    assert all(0.15 < peer["knn_before"] < 0.35 for peer in peers.values())
    gains = [peer["knn_after"] - peer["knn_before"] for peer in peers.values()]
    assert sum(gains) / 2 > 0.01, gains
