"""`python -m bench loss`: limits against numbers by hand, cases, targets, the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import baselines, limits, loss, loss_report, providers
from bench.loss import Bench, Case
from bench.providers import BACKWARD, FORWARD, GRAPH, OWN, PROVIDERS, TWO_NTXENT, Provider
from bench.rows import ROW_KEYS, Stats, environment, make_row, read_rows

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
H200 = "NVIDIA H200"


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine take a hundred times as long as the sums themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_name(name: str) -> Provider:
    return next(p for p in PROVIDERS if p.name == name)


# -- limits --------------------------------------------------------------------------------------------------------


def test_limits_of_the_forward_pass_by_hand():
    # M^2 = 4.295e9: 2 x 128 FLOP, one exponential (a half a peer), 3 + 2 instructions
    work = limits.stats_work(65536, 128, distill=True, value=False)
    assert limits.limits(work, limits.RATES[H200]) == pytest.approx((1.3918, 1.1127, 0.69498), rel=1e-4)
    # the KL's value here: 3 more on a quarter of M^2
    alone = limits.stats_work(65536, 128, distill=True, value=True)
    assert alone.instructions - work.instructions == pytest.approx(0.75 * 65536**2)


def test_limits_of_the_gradient_pass_by_hand():
    # 8 x 128 FLOP, one exponential a peer, 7 + 5.5 + 0.75 instructions
    work = limits.gradient_work(65536, 128, distill=True)
    assert limits.limits(work, limits.RATES[H200]) == pytest.approx((5.5672, 2.2254, 1.8417), rel=1e-4)


def test_ntxent_needs_fewer_instructions_and_the_same_products():
    both, ntxent = (limits.passes(4096, 64, distill=distill, backward=True) for distill in (True, False))
    assert [w.instructions / 4096**2 for w in ntxent] == [3, 7]
    assert [w.flops for w in both] == [w.flops for w in ntxent] == [2 * 4096**2 * 64, 8 * 4096**2 * 64]
    assert [w.exponentials for w in both] == [w.exponentials for w in ntxent]


def test_floors():
    def floor(M, D, backward):
        return limits.floor_ms(limits.passes(M, D, distill=True, backward=backward), H200)

    assert floor(65536, 128, False) == pytest.approx(1.3918, rel=1e-4)
    assert floor(65536, 128, True) == pytest.approx(6.959, rel=1e-4)
    assert floor(8192, 128, True) == pytest.approx(0.1087, rel=1e-3)
    assert floor(2**20, 128, True) == pytest.approx(1781.5, rel=1e-3)
    assert floor(65536, 64, False) == pytest.approx(1.1127, rel=1e-4)  # exponentials
    assert limits.floor_ms(limits.passes(64, 64, distill=True, backward=True), "another GPU") is None


def test_the_limits_are_written_out():
    line = loss_report.limits_line(BACKWARD, "mutual", 65536, 128, H200)
    assert line is not None and "tensor cores 6.96 ms, exponentials 3.34 ms" in line
    assert loss_report.limits_line(BACKWARD, "mutual", 65536, 128, "another GPU") is None


# -- one case ------------------------------------------------------------------------------------------------------


def run_case(monkeypatch, *taking_part: Provider, case: Case | None = None) -> tuple[Bench, list]:
    monkeypatch.setattr(providers, "PROVIDERS", taking_part)
    bench = Bench(environment(["loss"]), seconds=0.02, compiled=False)
    return bench, bench.run(case or Case("mutual", 32, 16))


def scaled(factor: float, limit: int = 10**9):
    """A provider's build: eager losses times a factor, without memory from `limit` images on."""

    def build(which, device, D):
        def function(*views):
            if len(views[0]) >= limit and len(views[0]) != providers.CHECK_ROWS // 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return tuple(value * factor for value in baselines.eager_mutual(*views))

        return function

    return build


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the rows of a CPU")


@cpu_only
def test_rows_of_a_case(monkeypatch):
    bench, rows = run_case(monkeypatch, by_name("eager"), by_name("torch"))
    assert [(row.case["mode"], row.provider, row.metric) for row in rows] == [
        (mode, name, metric)
        for mode in (FORWARD, BACKWARD)
        for name in ("eager", "torch")
        for metric in ("ms", "bytes")
    ]
    memory = {(row.provider, row.case["mode"]): row for row in rows if row.metric == "bytes"}
    assert memory["eager", BACKWARD].floor == 2 * 32 * 16 * 4 < memory["eager", BACKWARD].p50
    assert all(row.p20 <= row.p50 <= row.p80 for row in rows)
    assert bench.wrong == []


def test_a_wrong_provider_is_reported_and_not_timed(monkeypatch, capsys):
    bench, rows = run_case(monkeypatch, Provider("off", scaled(1.01), "tf32", None), by_name("eager"))
    assert {row.provider for row in rows} == {"eager"}
    assert "off: left out, FAILED its check: loss error 1.0e-02, gradient error 1.0e-02" in capsys.readouterr().out
    assert bench.wrong == []
    bench, rows = run_case(monkeypatch, Provider(OWN[0], scaled(float("nan")), "tf32", None))
    assert rows == []
    assert bench.wrong == [OWN[0]]  # ours: the command fails


def test_what_the_kernels_refuse_is_no_failure(monkeypatch, capsys):
    def refuse(*views):
        raise ValueError("backend: 'triton' does widths up to 2048")

    bench, rows = run_case(monkeypatch, Provider(OWN[0], lambda *_: refuse, "tf32", None))
    assert (rows, bench.wrong) == ([], [])
    assert "triton: left out: ValueError: backend: 'triton' does widths up to 2048" in capsys.readouterr().out


def test_a_provider_without_memory_gives_no_row(monkeypatch, capsys):
    _, rows = run_case(monkeypatch, Provider("full", scaled(1.0, limit=16), "tf32", None), by_name("eager"))
    assert {row.provider for row in rows} == {"eager"}
    out = capsys.readouterr().out
    assert "mutual, M = 32, D = 16: full, forward: out of memory" in out
    assert "mutual, M = 32, D = 16: full, forward+backward: out of memory" in out


@cpu_only
def test_what_a_cpu_leaves_out(monkeypatch, capsys):
    taking_part = (by_name("official"), by_name("compiled"), by_name("eager"))
    monkeypatch.setattr(loss.harness, "available_bytes", lambda: 2**20)
    _, rows = run_case(monkeypatch, *taking_part, case=Case("ntxent", 4096, 128))
    assert rows == []
    out = capsys.readouterr().out
    assert "official: left out: one M x M x D tensor is over 2 GiB" in out
    assert "compiled: left out: compiling takes long on a CPU (--compiled)" in out
    assert "eager: left out: out of memory: about 0.5 GiB are needed" in out


# -- targets -------------------------------------------------------------------------------------------------------


def gpu_row(provider: str, M: int, mode: str, ms: float, metric: str = "ms"):
    row = make_row(environment(["loss"]), "loss", {"loss": "mutual", "M": M, "D": 128, "mode": mode}, provider,
                   metric, Stats(ms, ms, ms, 5), None)  # fmt: skip
    return type(row)(**{**vars(row), "device_name": H200})


def test_targets_compare_rows_of_one_run(capsys):
    rows = [
        gpu_row("triton", 8192, GRAPH, 0.2), gpu_row("eager", 8192, GRAPH, 5.0), gpu_row("compiled", 8192, GRAPH, 1.0),
        gpu_row("triton", 65536, BACKWARD, 11.0), gpu_row(TWO_NTXENT, 65536, BACKWARD, 10.0),
        gpu_row("triton", 2**20, BACKWARD, 2.4e9, "bytes"),
    ]  # fmt: skip
    found = {(t.M, t.what): loss_report.measured(t, "triton", rows) for t in loss_report.H200_TARGETS}
    assert found[65536, f"own/{TWO_NTXENT}"] == pytest.approx(1.1)
    assert found[65536, "ms"] == 11.0
    assert found[2**20, "bytes"] == 2.4e9
    assert found[2**20, "ms"] is None
    loss_report.print_targets(rows, {"triton": 4e-4})
    out = capsys.readouterr().out
    assert [line.split("│")[-2].strip() for line in out.splitlines() if "│" in line] == [
        "met", "met", "not met", "met", "met", "met", "not met",
    ]  # fmt: skip


def test_targets_are_those_of_one_device(capsys):
    rows = [type(row)(**{**vars(row), "device_name": "another GPU"}) for row in [gpu_row("triton", 8192, GRAPH, 0.2)]]
    loss_report.print_targets(rows, {"triton": 1e-4})
    assert capsys.readouterr().out == ""


def test_targets_of_the_native_core_are_ratios(capsys):
    cores = {"device_name": "2 cores (of any make)"}
    made = [
        gpu_row("native", 8192, BACKWARD, 100.0), gpu_row("torch", 8192, BACKWARD, 250.0),
        gpu_row("native", 16384, BACKWARD, 1e8, "bytes"), gpu_row("torch", 16384, BACKWARD, 6e9, "bytes"),
    ]  # fmt: skip
    loss_report.print_targets([type(row)(**{**vars(row), **cores}) for row in made], {})
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [(line[4].strip(), line[6].strip()) for line in lines] == [("2.5", "not met"), ("60", "met")]


# -- the command ---------------------------------------------------------------------------------------------------


def test_providers_can_be_chosen(capsys):
    options = loss.parse(["--sizes", "8", "--providers", "native,torch"], "cpu")
    assert [case.only for case in loss.cases(options, "cpu")] == [("native", "torch")]
    with pytest.raises(SystemExit):
        loss.parse(["--providers", "native,cuda"], "cpu")
    assert "cuda: unknown; allowed: triton, triton, two ntxent, native, torch" in capsys.readouterr().err


def test_default_cases():
    def points(argv, device):
        return [(case.M, case.D) for case in loss.cases(loss.parse(argv, device), device)]

    assert points([], "cpu") == [(256, 128), (1024, 128), (4096, 128), (8192, 128), (16384, 128)]
    assert points([], "cuda") == [
        *((M, 128) for M in (512, 2048, 8192, 32768, 65536, 131072)), (8192, 64), (8192, 256), (8192, 512),
    ]  # fmt: skip
    assert points(["--quick", "--million"], "cuda") == [(2048, 128), (8192, 128), (65536, 128), (2**20, 128)]
    assert points(["--sizes", "32,64", "--widths", "8,16"], "cpu") == [(32, 8), (64, 8), (32, 16), (64, 16)]
    assert loss.cases(loss.parse(["--million"], "cuda"), "cuda")[-1].only == ("triton",)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sizes", "33"], "argument --sizes: '33': rows M = 2N, so even numbers from 4"),
        (["--widths", "8,x"], "argument --widths: '8,x': positive integers with commas between them are expected"),
        (["--loss", "kl"], "argument --loss"),
        (["--million"], "--million: needs a GPU"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        loss.parse(argv, "cpu")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@cpu_only
def test_rows_and_plots_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "RESULTS", tmp_path)
    monkeypatch.setattr(loss, "QUICK_SECONDS", 0.02)
    assert loss.main(["--sizes", "8,32", "--quick"]) == 0
    path = tmp_path / "cpu" / "loss.jsonl"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(tuple(row) == ROW_KEYS for row in written)
    assert {(row["provider"], row["case"]["M"]) for row in written} == {
        (name, M) for name in ("native", "torch", "eager", "official") for M in (8, 32)
    }
    picture = path.with_name("loss_mutual.png")
    assert picture.stat().st_size > 10_000
    picture.unlink()
    assert loss.main(["--plot-only"]) == 0
    assert picture.exists()
    assert len(read_rows(path)) == len(written)


def command(*argv: str) -> subprocess.CompletedProcess:
    program, environ = [sys.executable, "-m", "bench", *argv], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)


def results() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (ROOT / "bench" / "results").rglob("*")}


def test_the_command_measures_and_writes_nothing():
    before = results()
    done = command("loss", "--sizes", "32", "--no-write")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("torch", "eager", "official", "forward+backward", "vs eager"))
    assert results() == before


def test_an_unknown_subject_is_one_line():
    done = command("los")
    assert done.returncode == 2
    allowed = "loss, terms, augment, data, parity, step, optimizer, accuracy, probe, claims, scaling, readme, budgets"
    assert done.stderr == f"bench: subject 'los' is unknown; allowed: {allowed}\n"
    assert done.stdout == ""


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_subjects_are_listed(argv):
    done = command(*argv)
    assert done.returncode == 0
    assert "  loss " in done.stdout
    assert "  budgets " in done.stdout
