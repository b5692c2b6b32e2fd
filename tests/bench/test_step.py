"""`python -m bench step`: rows, options, the command on real trainers."""

import contextlib
import io
import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import step, step_providers, step_report, step_turns
from bench.flops import peak_flops
from bench.reference import Reference
from bench.rows import ROW_KEYS, Stats, environment, make_row
from bench.step_providers import (
    BOTH,
    CAPTURED,
    COMPILED,
    ENGINE,
    PLAIN,
    SPLIT,
    STREAMS,
    TORCHVISION,
    TUNED,
    Case,
)
from ranks import run_ranks

PAIR = "wrn-10-1+wrn-10-1"
ROUNDS = 2  # of the commands here


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """64 images as a file."""
    path = tmp_path_factory.mktemp("noise") / "noise.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8))
    return path


# -- rows


def test_the_table_compares_with_the_reference_and_tells_the_time_of_a_run():
    env = environment(["step"])
    case = {"pair": PAIR, "batch": 256, "size": 32, "views": 4, "precision": "bf16", "data": "real", "ranks": 1}
    held = 3 * 2**20

    def rate(name: str, value: float) -> Any:
        return make_row(env, "step", case, name, "images_per_s", Stats(0.9 * value, value, 1.1 * value, 5), None)

    rows = [rate(CAPTURED, 20_000), rate(PLAIN, 5_000)]
    rows.append(make_row(env, "step", case, CAPTURED, "bytes", Stats(held, held, held, 5), None))
    rows.append(make_row(env, "step", case, CAPTURED, "mfu", Stats(0.2, 0.25, 0.3, 5), None))
    ready = replace(rows[0], case={**case, "data": "synthetic"}, p50=40_000)
    assert step_report.cells([*rows, ready]) == [
        [PAIR, "256", "real", CAPTURED, "20,000", "18,000 - 22,000", "80,000", "4.00x", "25.0%", "3", "8.3"],
        [PAIR, "256", "real", PLAIN, "5,000", "4,500 - 5,500", "20,000", "1.00x", "-", "-", "-"],
        [PAIR, "256", "synthetic", CAPTURED, "40,000", "18,000 - 22,000", "160,000", "-", "-", "-", "-"],
    ], "compared with plain on the same data"
    photos = [replace(row, case={**case, "size": 224}) for row in rows]
    photos.append(replace(photos[1], provider=TUNED, p50=9.876))
    assert step_report.cells(photos)[2][4] == "9.88" and step_report.cells(photos)[2][6] == "39.5"
    assert [line[-1] for line in step_report.cells(photos[:-1])] == ["-", "-"], "CIFAR-10 alone has epochs of 50,000"


def test_rows_of_a_case():
    env = replace(environment(["step"]), device_name="NVIDIA H200")
    turns = SimpleNamespace(rates=[80.0, 100.0, 120.0], memory=SimpleNamespace(peak=7), parts=None)
    case = Case("photos", "resnet18+resnet18", 256, "synthetic")

    def rows(**more: Any) -> dict[str, Any]:
        options = {"precision": "bf16", "flops": 10**12, "ranks": 2, **more}
        made = step.rows_of(case, {ENGINE: turns}, env, **options)
        assert all(row.case == made[0].case and row.provider == ENGINE and row.n == 3 for row in made)
        return {row.metric: row for row in made}

    found = rows()
    assert found["images_per_s"].case == {
        "pair": case.pair, "batch": 256, "size": 224, "views": 4, "precision": "bf16", "data": "synthetic", "ranks": 2,
    }  # fmt: skip
    assert found["images_per_s"].p50 == 100 and found["bytes"].p50 == 7
    share = 100 * 1e12 / (2 * 989e12)  # of the peak of two
    assert found["mfu"].p50 == pytest.approx(share, rel=1e-3) and found["mfu"].p20 < share < found["mfu"].p80
    assert "mfu" not in rows(precision="fp32"), "no peak is known"
    turns.memory.peak = 0
    assert "bytes" not in rows()


def test_rows_of_the_parts_of_a_step():
    parts = SimpleNamespace(shares={"forward": 0.25, "backward": 0.75}, ms_per_step=8.0, steps=4)
    turns = SimpleNamespace(rates=[80.0], memory=SimpleNamespace(peak=0), parts=parts)
    found = step.rows_of(
        Case("quickstart", PAIR, 16), {ENGINE: turns}, environment(["step"]), precision="fp32", flops=1, ranks=1
    )
    assert [(row.metric, row.case.get("part"), row.p50, row.n) for row in found[1:]] == [
        ("ms", "forward", 2.0, 4), ("ms", "backward", 6.0, 4),
    ]  # fmt: skip
    (line,) = step_report.part_cells(found)
    cells = dict(zip(step_report.PART_COLUMNS, line, strict=True))
    assert (cells["ms"], cells["forward"], cells["backward"], cells["loss"]) == ("8", "25.0%", "75.0%", "-")


def test_the_fastest_way_to_run_both_peers():
    env = environment(["step"])

    def row(name: str, rate: float, data: str = "real") -> Any:
        case = {"pair": "a+b", "batch": 8, "data": data}
        return make_row(env, "step", case, name, "images_per_s", Stats(rate, rate, rate, 3), None)

    rows = [row(ENGINE, 100), row(SPLIT, 120), row(COMPILED, 200), row(PLAIN, 50), row(ENGINE, 90, "synthetic")]
    assert step_report.fastest(rows) == ["a+b, batch 8, real: fastest of engine, split: split, 1.20x of engine"], (
        "of the same work alone, and where there is a choice"
    )


def test_a_picture_of_the_parts(tmp_path):
    env = environment(["step"])
    case = {"pair": PAIR, "batch": 8, "data": "real"}
    rows = [
        make_row(env, "step", {**case, "part": part}, name, "ms", Stats(1, ms, 1, 3), None)
        for name in (ENGINE, PLAIN)
        for part, ms in (("forward", 2.0), ("backward", 5.0), ("other", 1.0))
    ]  # fmt: skip
    step_report.draw(rows, "Where a step goes", tmp_path / "step.png")
    with Image.open(tmp_path / "step.png") as picture:
        assert picture.size[0] == 1100 and len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 8


@pytest.mark.parametrize("name", step_providers.PRESETS)
def test_configurations_are_those_of_the_presets(name, tmp_path):
    preset = step_providers.PRESETS[name]
    for pair in preset.pairs:
        for provider in step_providers.PROVIDERS:
            cfg = step_providers.configuration(Case(name, pair, 256), provider, tmp_path)
            assert "+".join(peer.backbone for peer in cfg.peers) == pair
            assert cfg.data.batch_size == 256 and cfg.run.steps == step_providers.MOST_STEPS
            assert cfg.run.save_every_steps is cfg.eval.knn.every_steps is None
            assert cfg.engine.capture == (provider in (CAPTURED, BOTH))
            assert cfg.engine.compile == (provider in (COMPILED, BOTH))
            streams = {STREAMS: "streams", SPLIT: "split", CAPTURED: "auto", BOTH: "auto"}
            assert cfg.engine.concurrency == streams.get(provider, "serial")
            assert cfg.data.image_size == preset.size
            assert cfg.data.loader == ("torchvision" if provider == TORCHVISION else preset.loader)
            ready = step_providers.configuration(Case(name, pair, 256, "synthetic"), provider, tmp_path)
            assert ready.data.loader == "resident", "whose place the ready views take"
            if provider == PLAIN:
                Reference(cfg.resolved(), torch.device("meta"), size=preset.size)  # refuses what it does not train


def test_cases_and_who_takes_part(noise):
    options = step.parse(["--images", str(noise), "--batches", "8,16"], "cpu")
    kinds = [(batch, data) for batch in (8, 16) for data in ("real", "synthetic")]
    assert [(case.batch, case.data) for case in step.cases(options)] == kinds
    assert not step_providers.takes_part(TORCHVISION, "synthetic"), "its loader is all that it has of its own"
    assert step_providers.takes_part(TORCHVISION, "real") and step_providers.takes_part(PLAIN, "synthetic")


def test_what_was_compiled_is_forgotten_with_its_network(alone, monkeypatch, tmp_path):
    """torch compiles a function for eight networks at most, and runs those of later cases eagerly without an error."""
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    for name in (PLAIN, TUNED):
        case = Case("quickstart", PAIR, 16, "synthetic")
        training = step_providers.training(case, name, None, alone, tmp_path)
        views = next(training.batches)
        assert next(training.batches) is views and (training.ahead, training.together) == (0, 1)
        training.close()
        assert len(forgotten) == (name == TUNED)


# -- options


def test_defaults(noise):
    def chosen(argv, device):
        options = step.parse([*argv, "--images", str(noise)], device)
        return options.preset, list(options.pairs), list(options.batches), options.providers

    both = ["real", "synthetic"]
    assert step.parse(["--images", str(noise)], "cpu").data == both
    assert step.parse(["--images", str(noise), "--quick"], "cpu").data == both[:1]
    assert step.parse(["--quick", "--data", "synthetic"], "cpu").images is None, "no images are looked for"
    of_gpus = [ENGINE, STREAMS, SPLIT, COMPILED, TORCHVISION, PLAIN, TUNED]
    assert step.parse(["--images", str(noise)], "cuda", 2).providers == of_gpus
    assert step.parse(["--images", str(noise)], "cpu", 2).providers == [name for name in of_gpus if name != STREAMS]
    of_one = [name for name in step_providers.PROVIDERS if name != SPLIT]
    cifar = ["wrn-16-2+wrn-16-2", "wrn-16-2+resnet50", "resnet18+resnet18"]
    assert chosen([], "cuda") == ("cifar", cifar, [256, 1024], of_one)
    assert chosen(["--quick"], "cuda") == ("cifar", cifar[:1], [256], of_one)
    assert chosen([], "cpu") == ("quickstart", [PAIR], [128], [ENGINE, COMPILED, TORCHVISION, PLAIN, TUNED])
    assert chosen(["--quick", "--batches", "8,32", "--providers", "plain"], "cpu")[2:] == ([8, 32], [PLAIN])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "imagenet"], "invalid choice: 'imagenet' (choose from "),
        (["--pairs", "wrn-10-1"], f"argument --pairs: 'wrn-10-1' is unknown; allowed: {PAIR}"),
        (["--preset", "cifar", "--pairs", PAIR], "allowed: wrn-16-2+wrn-16-2, wrn-16-2+resnet50, resnet18+resnet18"),
        (
            ["--providers", "engine,dali"],
            "--providers: 'dali' is unknown; allowed: captured, captured+compiled, engine, streams, split, compiled, "
            "torchvision-loader, plain, tuned",
        ),
        (["--batches", "16,x"], "--batches: '16,x': integers from 2 with commas between them are expected"),
        (["--data", "fake"], "argument --data: 'fake' is unknown; allowed: real, synthetic"),
        (["--preset", "photos-cpu"], "argument --root: none is given; photos need the folder that holds them"),
        (["--preset", "photos-cpu", "--root", "/nowhere"], "/nowhere: no such folder"),
        (["--preset", "photos", "--images", "x.npy"], "--images: x.npy with --preset photos; give --root FOLDER"),
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
    step.RESULTS, step.QUICK_ROUNDS, step_turns.PROFILED = results, ROUNDS, 1
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
    assert f"{PAIR}, batch 16, real: 0.30 GFLOP a source image" in printed
    for name in (ENGINE, COMPILED, TORCHVISION, PLAIN, TUNED):
        found = printed.count(f"│ {PAIR} │ 16    │ real │ {name:18} │")
        assert found == 2, "once with its rate, once with its parts"
    assert "1.00x" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU captures nothing")
def test_the_command_writes_rows_of_those_that_ran(noise, tmp_path):
    argv = ["--images", str(noise), "--batches", "16,65", "--seconds", "0.3", "--quick"]
    argv += ["--providers", "captured,engine,plain"]
    status, printed, left = run_ranks(command, 1, argv, tmp_path)[0]
    assert (status, left) == (1, 0)
    assert (
        f"{PAIR}, batch 16, real: captured: left out: ConfigError: engine.capture: a CUDA graph needs a GPU" in printed
    )
    assert (
        f"{PAIR}, batch 65, real: engine: left out: DataError: data.batch_size: 65 is more than the 64 read" in printed
    )
    assert f"{PAIR}, batch 65, real: plain: left out: ValueError: 64 images are fewer than a batch of 65" in printed
    assert f"bench: {PAIR}, batch 16, real: captured gave no number" in printed
    rows = [json.loads(line) for line in (tmp_path / "cpu" / "step.jsonl").read_text().splitlines()]
    assert all(tuple(row) == ROW_KEYS for row in rows)
    assert [(row["subject"], row["provider"], row["n"]) for row in rows if row["metric"] == "images_per_s"] == [
        ("step", ENGINE, ROUNDS), ("step", PLAIN, ROUNDS),
    ]  # fmt: skip
    for name in (ENGINE, PLAIN):
        ms = {row["case"]["part"]: row["p50"] for row in rows if (row["provider"], row["metric"]) == (name, "ms")}
        assert ms["backward"] > ms["optimizer"] > 0 and ms["forward"] > 0 < ms["data"]
    assert rows[0]["case"] == {
        "pair": PAIR, "batch": 16, "size": 32, "views": 4, "precision": "fp32", "data": "real", "ranks": 1,
    }  # fmt: skip
    assert rows[0]["floor"] is None and 0 < rows[0]["p20"] <= rows[0]["p50"] <= rows[0]["p80"]
    assert str(noise) not in json.dumps(rows) and "--images FILE.npy" in rows[0]["command"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo; on GPUs it wants two")
def test_two_ranks_measure_together(noise, tmp_path):
    argv = ["--images", str(noise), "--batches", "16", "--seconds", "0.3", "--quick", "--data", "synthetic"]
    argv += ["--providers", "engine,split,plain"]
    (status, printed, left), (other, silence, left_there) = run_ranks(command, 2, argv, tmp_path)
    assert (status, left, other, left_there, silence) == (0, 0, 0, 0, "")
    assert "2 ranks" in printed
    rows = [json.loads(line) for line in (tmp_path / "cpu" / "step.jsonl").read_text().splitlines()]
    rates = [row for row in rows if row["metric"] == "images_per_s"]
    assert [(row["case"]["data"], row["provider"], row["case"]["ranks"]) for row in rates] == [
        ("synthetic", name, 2) for name in (ENGINE, SPLIT, PLAIN)
    ]  # fmt: skip
    travelled = {row["provider"]: row["p50"] for row in rows if row["case"].get("part") == "communication"}
    assert all(travelled[name] > 0 for name in (ENGINE, SPLIT, PLAIN))
    assert f"{PAIR}, batch 16, synthetic: fastest of engine, split: " in printed
    assert rows[0]["command"].startswith("torchrun --nproc_per_node 2 -m bench step --images FILE.npy ")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the preset of a CPU")
def test_the_command_measures_photos(image_folder, tmp_path):
    pytest.importorskip("nvidia.dali")
    root = shutil.copytree(image_folder, tmp_path / "photos")
    argv = ["--preset", "photos-cpu", "--root", str(root), "--batches", "2", "--seconds", "0.1", "--quick"]
    argv += ["--providers", "engine,plain"]
    status, printed, left = run_ranks(command, 1, argv, tmp_path)[0]
    assert (status, left) == (0, 0), printed
    rows = [json.loads(line) for line in (tmp_path / "cpu" / "step.jsonl").read_text().splitlines()]
    rates = [row for row in rows if row["metric"] == "images_per_s"]
    assert [(row["provider"], row["case"]["size"]) for row in rates] == [(ENGINE, 224), (PLAIN, 224)]
    assert str(root) not in json.dumps(rows) and "--root PHOTOS" in rows[0]["command"]


@pytest.mark.gpu
def test_the_command_on_a_gpu(noise, tmp_path):
    argv = ["--preset", "quickstart", "--images", str(noise), "--batches", "16", "--seconds", "0.3", "--quick"]
    # `make gpu` runs the compiled ones, each of which compiles for most of a minute.
    providers = [name for name in step_providers.available("cuda", 1) if name not in (BOTH, COMPILED, TUNED)]
    status, printed, left = run_ranks(command, 1, [*argv, "--providers", ",".join(providers)], tmp_path)[0]
    assert (status, left) == (0, 0), printed
    (file,) = tmp_path.glob("*/step.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    known = peak_flops(torch.cuda.get_device_name(), "bf16") is not None
    metrics = ["images_per_s", "bytes", "ms", *(["mfu"] if known else [])]
    assert {(row["provider"], row["metric"]) for row in rows} == {
        (name, metric) for name in providers for metric in metrics
    }
    assert all(row["p50"] > 0 for row in rows if row["metric"] != "ms")
    assert {row["case"]["precision"] for row in rows} == {"bf16"}
