"""`python -m bench terms`: both forms compute the same, a wrong one is not timed, rows, table, the command."""

import json

import pytest
import torch

from bench import readme, terms
from bench.providers import BACKWARD, TOLERANCE
from bench.rows import ROW_KEYS, Stats, environment, make_row
from bench.terms import CASES, OURS, PLAIN

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine take a hundred times as long as the sums themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the rows of a CPU")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# -- both forms ----------------------------------------------------------------------------------------------------


@each_case
def test_both_forms_compute_the_same(case, monkeypatch):
    monkeypatch.setattr(terms, "K", 301)
    case = case._replace(D=23)
    for loss in (case.ours, case.plain):
        found = terms.errors(case, loss, CPU, N=37)
        assert found.loss < 1e-6
        assert found.gradient < 5e-6
    exact = [z.detach().double().requires_grad_(z.requires_grad) for z in case.inputs(37, 23, CPU, 1)]
    for ours, plain in zip(terms.outcome(case.ours, exact), terms.outcome(case.plain, exact), strict=True):
        assert (ours - plain).norm() <= 1e-11 * plain.norm()
        assert plain.norm() > 1e-3


@pytest.mark.gpu
@each_case
def test_both_forms_compute_the_same_on_a_gpu(case):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for loss in (case.ours, case.plain):
            assert max(terms.errors(case, loss, torch.device("cuda"))) < TOLERANCE["tf32"]
    finally:
        torch.set_float32_matmul_precision(before)


def test_keys_of_the_queue_are_of_other_images(monkeypatch):
    monkeypatch.setattr(terms, "K", 50)
    q_x, _, k_x, _, queue = terms.CASES[0].inputs(40, 128, CPU, 0)
    unit = torch.nn.functional.normalize
    assert (unit(q_x) * unit(k_x)).sum(1).min() > 0.2
    assert (unit(q_x) @ queue.T).mean().abs() < 0.01
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(50))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_form_is_reported_and_not_timed(factor, monkeypatch, capsys):
    case = next(case for case in CASES if case.name == "graph")

    def off(*views):
        return tuple(factor * loss for loss in case.ours(*views))

    monkeypatch.setattr(terms, "CASES", [case._replace(ours=off)])
    assert terms.main(["--sizes", "16", "--rounds", "1", "--no-write"]) == 1
    out = capsys.readouterr().out
    assert f"graph: ours: left out, FAILED its check: loss error {factor - 1:.1e}" in out
    assert "graph, N = 16, D = 128: plain " in out
    assert "bench: graph, ours failed its check" in out


def test_a_form_that_raises_is_wrong(monkeypatch, capsys):
    def refuse(x, y):
        raise ValueError("x: is not to my taste")

    monkeypatch.setattr(terms, "CASES", [CASES[2]._replace(D=8, ours=refuse)])
    assert terms.main(["--sizes", "16", "--rounds", "1", "--no-write"]) == 1
    assert "vicreg: ours: left out, FAILED its check: ValueError: x: is not to my taste" in capsys.readouterr().out


# -- the command ---------------------------------------------------------------------------------------------------


@cpu_only
def test_the_command_writes_rows(tmp_path, monkeypatch, capsys):
    for module in (terms, readme):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    argv = ["--cases", "kl,graph", "--sizes", "24,48", "--rounds", "3"]
    assert terms.main([*argv, "--no-write"]) == 0
    assert not list(tmp_path.iterdir())
    assert terms.main(argv) == 0
    written = [json.loads(line) for line in (tmp_path / "cpu" / "terms.jsonl").read_text().splitlines()]
    assert all(tuple(row) == ROW_KEYS and row["subject"] == "terms" and row["floor"] is None for row in written)
    assert [(row["case"]["term"], row["case"]["N"], row["provider"], row["metric"]) for row in written] == [
        (name, N, provider, metric)
        for name in ("kl", "graph") for N in (24, 48) for provider in (OURS, PLAIN) for metric in ("ms", "bytes")
    ]  # fmt: skip
    assert {row["n"] for row in written if row["metric"] == "ms"} == {3}
    assert all(row["p50"] >= 4 * 4 * 24 * 128 for row in written if row["metric"] == "bytes"), "the gradients"
    assert written[0]["case"] == {
        "term": "kl", "N": 24, "D": 128, "mode": BACKWARD, "inputs": "float32", "products": "float32",
    }  # fmt: skip
    assert "kl, N = 24, D = 128: ours " in capsys.readouterr().out
    table = [line.split(" | ")[:2] for line in readme.terms("cpu").splitlines()[2:6]]
    assert table == [[f"| `{name}`", f"N = {N}, D = 128"] for name in ("kl", "graph") for N in (24, 48)]


@pytest.mark.parametrize(("argv", "distilled"), [([], (1024, 4096)), (["--quick"], (1024,)), (["--sizes", "8"], (8,))])
def test_sizes(argv, distilled, monkeypatch):
    asked = {}
    monkeypatch.setattr(terms, "checked", lambda case, env, wrong: {})
    monkeypatch.setattr(terms, "measure", lambda case, N, *_: asked.setdefault(case.name, []).append(N) or [])
    assert terms.main([*argv, "--no-write"]) == 0
    own = {"moco": [256], "barlow_twins": [512], "vicreg": [512]} if "--sizes" not in argv else {}
    assert asked == {case.name: own.get(case.name, list(distilled)) for case in CASES}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cases", "kl,lk"], "argument --cases: lk: unknown; allowed: moco, barlow_twins, vicreg, kl, kl-symmetric"),
        (["--sizes", "0"], "argument --sizes: '0': positive integers with commas between them are expected"),
        (["--rounds", "0"], "argument --rounds: at least 1 is needed, found 0"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        terms.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# -- the README's table --------------------------------------------------------------------------------------------


def test_the_table_has_ratios_of_the_newest_run_of_each_case(tmp_path, monkeypatch):
    def row(term, provider, metric, value, commit, **more):
        case = {"term": term, "N": 1024, "D": 128, **more, "mode": BACKWARD, "products": provider}
        made = make_row(environment(["terms"]), "terms", case, provider, metric, Stats(value, value, value, 5), None)
        return {**vars(made), "commit": commit}

    made = [
        row("kl", OURS, "ms", 1.0, "old"), row("kl", PLAIN, "ms", 9.0, "old"),
        row("moco", OURS, "ms", 64.0, "old", K=65536), row("moco", PLAIN, "ms", 160.0, "old", K=65536),
        row("moco", OURS, "bytes", 2**21, "old", K=65536), row("moco", PLAIN, "bytes", 2**28, "old", K=65536),
        row("kl", OURS, "ms", 2.0, "new"), row("kl", OURS, "bytes", 3 * 2**20, "new"),
        row("js", OURS, "ms", 4.0, "new"), row("js", PLAIN, "ms", 3.0, "new"),
    ]  # fmt: skip
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "terms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = readme.terms("h200").splitlines()
    assert lines[0] == "| case | size | ours | plain PyTorch | faster | memory, ours | plain | less |"
    assert lines[2:5] == [
        "| `moco` | N = 1,024, D = 128, K = 65,536 | 64 ms | 160 ms | 2.5x | 2 MiB | 256 MiB | 128.0x |",
        "| `kl` | N = 1,024, D = 128 | 2 ms | - | - | 3 MiB | - | - |",
        "| `js` | N = 1,024, D = 128 | 4 ms | 3 ms | 0.8x | - | - | - |",
    ]
    assert "(commit old)" in lines[-1]
    assert "(commit new)" in lines[-1]
