"""Profiled runs: what they write, that it is so, and that they compute the same."""

import gzip
import json
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.config import Config, ConfigError, parse_config
from engine.distributed import Ranks
from engine.profile import OUTSIDE, PARTS, StepProfiler, breakdown, part
from engine.profile_page import as_text, draw, shortened
from engine.profile_trace import IDLE, OTHER, Bar, Breakdown, Busiest
from engine.step import WARM_UP
from engine.trainer import Trainer
from ranks import run_ranks
from runs import command, fit, losses


def profiled(settings: dict[str, Any], start: int, count: int, /, **run: Any) -> Config:
    """With so many steps profiled, and changes of the run section."""
    settings["engine"] = {**settings.get("engine", {}), "profile": {"start": start, "steps": count}}
    settings["run"].update(run)
    return parse_config(settings)


def trace_of(folder: Path, rank: int = 0) -> dict[str, Any]:
    with gzip.open(folder / "profile" / f"trace.rank{rank}.json.gz", "rt") as file:
        return json.load(file)


def shares_in(page: str) -> dict[str, float]:
    """The shares of the parts on a page, which are rounded to a thousandth."""
    return {name: float(share) / 100 for name, share in re.findall(r"^(\w+) +([\d.]+)% +[\d.]+$", page, re.MULTILINE)}


# -- which steps


def test_a_profile_outside_of_the_run_is_an_error_before_any_work(settings, alone):
    for start, steps in ((0, 5), (4, 1), (2, 3)):
        with pytest.raises(
            ConfigError, match=rf"^engine.profile: start={start} and steps={steps} end outside .* 4 ste"
        ):
            profiled(settings, start, steps, steps=4)
    cfg = profiled(settings, 2, 2, steps=4)
    assert StepProfiler(cfg, alone, first=0, steps=4)._window == range(2, 4)
    # How many steps an epoch has, the data say.
    cfg = profiled(settings, 2, 5, steps=None, epochs=2)
    with pytest.raises(ConfigError, match="^engine.profile: .* the run, which has 6 steps"):
        StepProfiler(cfg, alone, first=0, steps=6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": -1, "steps": 1}, "engine.profile.start: found -1"),
        ({"start": 0, "steps": 0}, "engine.profile.steps: found 0"),
        ({"start": 0}, "engine.profile.steps: is required"),
        ({"start": 0, "step": 1}, "engine.profile.step: unknown key; did you mean steps"),
    ],
)
def test_a_slip_in_the_section_is_named(settings, given, message):
    settings["engine"] = {"profile": given}
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


def test_a_run_that_goes_on_behind_the_start_is_not_profiled(settings, alone):
    cfg = profiled(settings, 5, 3, steps=20)
    for first in (0, 4, 5):
        profiler = StepProfiler(cfg, alone, first=first, steps=20)
        assert (profiler._window, profiler.notes) == (range(5, 8), [])
    profiler = StepProfiler(cfg, alone, first=6, steps=20)
    assert not profiler._window and profiler.summary is None
    assert profiler.notes == ["nothing is profiled: the run goes on at step 6, behind engine.profile.start=5"]


def test_a_captured_run_is_profiled_behind_its_capture(settings, alone):
    def of(start: int, steps: int, first: int) -> StepProfiler:
        return StepProfiler(
            profiled(settings, start, steps, steps=20), alone, first=first, steps=20, captured=first + 3
        )

    assert (of(5, 4, 0)._window, of(5, 4, 0).notes) == (range(5, 9), [])
    shifted = of(0, 4, 0)
    assert (shifted._window, shifted._begin) == (range(5, 9), 4), "the capture is in step 3"
    (note,) = shifted.notes
    assert note.startswith("steps 5 to 8 are profiled (engine.profile: the step is captured as CUDA graphs in step 3")
    with pytest.raises(
        ConfigError, match=r"engine.profile: .* steps 5 to 20 would lie outside .* last is 19; use fewer"
    ):
        of(0, 16, 0)
    late = of(15, 4, 14)
    assert not late._window
    assert "from 19 on, and the run ends before" in late.notes[0]


# -- the profiler around any loop


class Clock:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


def work(seconds: float = 0.02) -> None:
    """Keeps this thread busy in operators of torch."""
    x, end = torch.ones(200, 200), time.perf_counter() + seconds
    while time.perf_counter() < end:
        x @ x


def numbers(count: int, done: list[str]) -> Iterator[int]:
    yield from range(count)
    done.append("ended")


def test_steps_are_marked_and_what_lies_outside_of_them_is_not_counted(settings, alone, tmp_path):
    profiler = StepProfiler(profiled(settings, 2, 3, steps=7), alone, first=0, steps=7)
    clock, ended, seen = Clock(), [], []
    for batch in profiler.over(numbers(7, ended), first=0, clock=clock):
        seen.append((batch, torch.autograd._profiler_enabled()))
        with part("forward"):
            work()
            if batch == 3:
                with part(OUTSIDE):
                    work(0.2)
    # One more before the three is recorded.
    assert seen == [(batch, batch in (1, 2, 3, 4)) for batch in range(7)]
    assert ended == ["ended"]
    assert clock.calls == ["stop", "start"] * 2, "it stands while the profiler starts and writes"
    found = breakdown(trace_of(tmp_path / "run"))
    assert found.steps == 3
    assert found.shares["forward"] > 0.5
    assert sum(found.shares.values()) == pytest.approx(1)
    outside = next(e for e in trace_of(tmp_path / "run")["traceEvents"] if e["name"] == f"step/{OUTSIDE}")
    whole = [e["dur"] for e in trace_of(tmp_path / "run")["traceEvents"] if e["name"] == "step/whole"]
    assert found.ms_per_step == pytest.approx((sum(whole) - outside["dur"]) / 3e3, rel=1e-3)
    assert profiler.summary == tmp_path / "run" / "profile" / "summary.txt"


def test_the_clock_stays_stopped_behind_the_last_step(settings, alone):
    profiler, clock = StepProfiler(profiled(settings, 0, 2, steps=2), alone, first=0, steps=2), Clock()
    for _ in profiler.over(numbers(2, []), first=0, clock=clock):
        work()
    assert clock.calls == ["stop", "start", "stop"]


def test_a_page_that_cannot_be_written_ends_no_run(settings, alone, tmp_path, caplog):
    profiler = StepProfiler(profiled(settings, 1, 2, steps=5), alone, first=0, steps=5)
    (tmp_path / "run").write_text("a file where the folder should be")
    assert len(list(profiler.over(numbers(5, []), first=0, clock=Clock()))) == 5
    (record,) = caplog.records
    assert "run/profile: not written (NotADirectoryError: " in record.message
    assert profiler.summary is None and not torch.autograd._profiler_enabled()


def test_a_step_that_fails_leaves_no_profiler_behind(settings, alone, tmp_path):
    profiler = StepProfiler(profiled(settings, 1, 3, steps=7), alone, first=0, steps=7)
    with pytest.raises(RuntimeError, match="on purpose"):
        for batch in profiler.over(numbers(7, []), first=0, clock=Clock()):
            if batch == 2:
                raise RuntimeError("on purpose")
    assert not torch.autograd._profiler_enabled()
    assert not (tmp_path / "run").exists()


def test_marks_are_nothing_without_a_profiler():
    assert isinstance(part("forward"), nullcontext)


# -- whole runs


@pytest.mark.slow
def test_a_profiled_run_is_the_run_without_and_says_where_its_steps_went(settings, tmp_path):
    settings["data"]["batch_size"] = 48
    settings["run"].update(steps=6, save_every_steps=3)
    settings["eval"]["knn"]["every_steps"] = 3
    run_ranks(fit, 1, settings)
    settings["run"]["output_dir"] = str(tmp_path / "profiled")
    profiled(settings, 2, 3)
    run_ranks(fit, 1, settings)
    folder = tmp_path / "profiled"
    without = losses({"run": {"output_dir": str(tmp_path / "run")}})
    assert losses(settings) == without and len(without) == 6
    assert {path.name for path in (folder / "profile").iterdir()} == {
        "trace.rank0.json.gz", "summary.txt", "summary.png"
    }  # fmt: skip
    found = breakdown(trace_of(folder))
    assert (found.steps, found.on_device) == (3, False)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares[IDLE] == found.shares["communication"] == 0
    # Two passes over the network backward, one forward; the evaluation behind step 3 is in none of them.
    assert 0.3 < found.shares["backward"] < 0.8
    assert 0.1 < found.shares["forward"] < found.shares["backward"]
    assert found.shares["data"] > 0 and found.shares["loss"] > 0 and found.shares["optimizer"] > 0
    assert found.shares[OTHER] < 0.15
    assert ("aten::convolution_backward", "backward") in {(row.name, row.part) for row in found.busiest[:3]}
    page = (folder / "profile/summary.txt").read_text()
    assert "wrn-10-1 + wrn-10-2, batch 48: steps 2 to 4\n" in page
    assert shares_in(page) == pytest.approx({p: found.shares[p] for p in (*PARTS, OTHER)}, abs=6e-4)
    assert f"{found.ms_per_step:.2f} ms a step over 3" in page
    assert (folder / "profile/summary.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_communicate(settings, tmp_path, stage):
    settings["engine"] = {"zero_stage": stage}
    profiled(settings, 1, 2)
    run_ranks(fit, 2, settings)
    assert {path.name for path in (tmp_path / "run/profile").iterdir()} == {
        "trace.rank0.json.gz", "trace.rank1.json.gz", "summary.txt", "summary.png"
    }  # fmt: skip
    for rank in range(2):
        found = breakdown(trace_of(tmp_path / "run", rank), top=1000)
        assert found.shares["communication"] > 0.01
        assert sum(found.shares.values()) == pytest.approx(1)
        ours = {row.name: row.calls for row in found.busiest if row.part == "communication"}
        # BatchNorm gathers moments in every forward pass, and its gradients and the engines' are summed.
        assert ours["c10d::allgather_"] >= 32 and ours["c10d::allreduce_"] >= 34
        if stage:
            assert ours["c10d::_allgather_base_"] == 2, "DeepSpeed gathers the weights of both peers"
    assert "steps 1 to 2, rank 0 of 2" in (tmp_path / "run/profile/summary.txt").read_text()


@pytest.mark.slow
def test_a_resumed_run_may_be_profiled_from_then_on(settings, tmp_path):
    file, folder = tmp_path / "run.yaml", tmp_path / "run/profile"
    settings["run"]["steps"] = 3
    run_ranks(fit, 1, settings)
    assert not folder.exists()
    profiled(settings, 4, 2, steps=6)
    file.write_text(yaml.safe_dump(settings))
    (printed,) = run_ranks(command, 1, file)
    assert printed.endswith(f"profile: {folder / 'summary.txt'}\n")
    assert breakdown(trace_of(tmp_path / "run")).steps == 2
    written = (folder / "summary.txt").stat().st_mtime_ns
    profiled(settings, 4, 2, steps=8)
    file.write_text(yaml.safe_dump(settings))
    (printed,) = run_ranks(command, 1, file)
    assert printed.startswith("nothing is profiled: the run goes on at step 6, behind engine.profile.start=4\n")
    assert "profile:" not in printed
    assert (folder / "summary.txt").stat().st_mtime_ns == written


# -- on a GPU


def trained(cfg: Config, ranks: Ranks) -> Trainer:
    trainer = Trainer(cfg, ranks)
    trainer.fit()
    return trainer


@pytest.mark.gpu
@pytest.mark.parametrize(("capture", "start", "begins"), [(True, 0, WARM_UP + 2), (True, 6, 6), (False, 4, 4)])
def test_a_run_on_a_gpu_is_profiled_on_the_device(settings, gpu, tmp_path, capture, start, begins):
    """Captured, from the start, which is put off behind the capture: the graphs replay under the profiler and after."""
    settings["data"].update(loader="resident", batch_size=48)
    settings["engine"] = {"precision": "fp32", "capture": capture}
    settings["run"]["steps"] = WARM_UP + 8
    trained(parse_config(settings), gpu)
    without = losses(settings)
    settings["run"]["output_dir"] = str(tmp_path / "profiled")
    trainer = trained(profiled(settings, start, 3), gpu)
    assert losses(settings) == without
    assert trainer.profiler._window.start == begins
    found = breakdown(trace_of(tmp_path / "profiled"), top=1000)
    assert (found.steps, found.on_device, found.graphs) == (3, True, capture)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert sum(found.idle_host.values()) == pytest.approx(found.shares[IDLE])
    assert found.shares["forward"] > 0 and found.shares["optimizer"] > 0
    assert found.shares["backward"] > 0.5 * found.shares["forward"]
    if not capture:
        assert found.shares["loss"] > 0 and found.shares["data"] > 0
    assert found.shares[OTHER] < 0.2
    assert sum(row.ms for row in found.busiest if row.part == "backward") > 0
    assert any(bar.row.startswith("stream ") for bar in found.timeline)
    assert "the device's time" in (tmp_path / "profiled/profile/summary.txt").read_text()


# -- the page


def on_gpu(streams: int) -> Breakdown:
    shares = {
        "data": 0.004, "forward": 0.3, "loss": 0.05, "backward": 0.41, "optimizer": 0.02, "communication": 0.1,
        OTHER: 0.006, IDLE: 0.11,
    }  # fmt: skip
    name = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >"
    )
    return Breakdown(
        steps=10,
        ms_per_step=8.4,
        on_device=True,
        graphs=True,
        shares=shares,
        idle_host={**dict.fromkeys((*PARTS, OTHER), 0.0), "backward": 0.08, "data": 0.03},
        busiest=[Busiest(f"{name}(int, float)", "backward", 2.5 / (i + 1), 12.0, 0.3 / (i + 1)) for i in range(15)],
        timeline=[
            Bar(row, p, 0.2 * s + 0.8 * i, 0.7) for s in range(streams)
            for row in ("host" if s == 0 else f"stream {s + 6}",) for i, p in enumerate(("data", "forward", "backward"))
        ],
    )  # fmt: skip


FACTS = {"title": "a + b, batch 256: steps 20 to 29", "device": "NVIDIA H200", "rate": "30,000 source images/s"}


def test_the_text_is_one_page(settings):
    page = as_text(on_gpu(3), FACTS)
    lines = page.splitlines()
    assert lines[0] == FACTS["title"]
    assert len(lines) <= 50 and max(map(len, lines)) <= 110
    assert shares_in(page)[IDLE] == 0.11
    assert "While the device idled, the host was in: backward 8.0%, data 3.0%." in page
    assert "A CUDA graph counts as the part that launches it" in page


@pytest.mark.parametrize("streams", [1, 3, 40])
def test_the_picture_is_one_page(tmp_path, streams):
    path = tmp_path / "page.png"
    draw(on_gpu(streams), FACTS, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    assert width == 1320 and 900 < height < 1500


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("aten::convolution_backward", "aten::convolution_backward"),
        ("autograd::engine::evaluate_function: MulBackward0", "evaluate_function: MulBackward0"),
        ("void at::native::reduce<512, float>(int, float*)", "reduce<512, float>"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
            "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)",
            "vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>",
        ),
        ("void (anonymous namespace)::softmax<c10::Half>(float (*)(int))", "softmax<c10::Half>"),
        ("ncclKernel_AllReduce_RING(ncclDevComm*, unsigned long)", "ncclKernel_AllReduce_RING"),
        ("Memcpy HtoD (Pageable -> Device)", "Memcpy HtoD (Pageable -> Device)"),
        ("sm90_xmma_fprop_implicit_gemm", "sm90_xmma_fprop_implicit_gemm"),
    ],
)
def test_names_are_shortened(name, short):
    assert shortened(name) == short
    long = shortened("kernel_" + "x" * 100 + "_end", 40)
    assert len(long) <= 40 and long.startswith("kernel_") and long.endswith("_end")
