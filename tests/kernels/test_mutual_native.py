"""The native backend: against float64, beside plain PyTorch in the same precision, for any threads and processor."""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from embeddings import embeddings, relative
from kernels import mutual_loss, mutual_native, native, ntxent_loss, reference, similarity_kl

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(native.core is None, reason=native.missing)


def single(exact: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [z.detach().to(dtype).requires_grad_() for z in exact]


def formula(views, tau_contrast, tau_distill, weights, reduction):
    """The six values of mutual_loss by reference.py, in the dtype of the views."""
    kl = reference.similarity_kl(*views, tau=tau_distill, kl_reduction=reduction)
    ntxent = [reference.ntxent(*views[2 * p : 2 * p + 2], tau=tau_contrast) for p in range(2)]
    return [*(n + w * k for n, w, k in zip(ntxent, weights, kl, strict=True)), *ntxent, *kl]


def check_against_formula(exact, tau_contrast=0.5, tau_distill=0.1, weights=(0.4, 1.3), reduction="batchmean"):
    """Values and gradients are no further from float64 than twice what plain PyTorch in float32 is."""
    options = tau_contrast, tau_distill, weights, reduction
    wanted, plain = formula(exact, *options), formula(leaves := single(exact), *options)
    inputs = single(exact)
    found = mutual_loss(
        *inputs, tau_contrast=tau_contrast, tau_distill=tau_distill, weights=weights, kl_reduction=reduction,
        backend="native",
    )  # fmt: skip
    # A single plain result may be exact by luck; a few roundings of float32 are granted.
    floor = 3e-7 + 3e-8 / min(tau_contrast, tau_distill)
    for f, p, w in zip(found, plain, wanted, strict=True):
        # 1.2e-7: values are differences of logarithms of order one, whose last digit that is.  With few rows nothing
        # averages it out: up to 8.8e-8 in 2,500 random problems of 2 to 4 images.
        assert abs(f.double() - w) <= 2 * abs(p.double() - w) + floor * abs(w.item()) + 1.2e-7
    upstream = 1.7, -0.6

    def gradients(losses, z):
        total = sum(u * loss for u, loss in zip(upstream, losses, strict=True))
        return torch.autograd.grad(total, z, retain_graph=True)

    alone = similarity_kl(*inputs, tau=tau_distill, kl_reduction=reduction, backend="native")  # not drowned by NT-Xent
    triples = [
        *zip(*(gradients(v[:2], z) for v, z in ((found, inputs), (plain, leaves), (wanted, exact))), strict=True),
        *zip(*(gradients(v[-2:], z) for v, z in ((alone, inputs), (plain, leaves), (wanted, exact))), strict=True),
    ]
    for f, p, w in triples:
        error, plain_error = (f.double() - w).norm(), (p.double() - w).norm()
        # 1e-9: where all embeddings are the same, the gradient is zero
        assert error <= 2 * plain_error + floor * w.norm() + 1e-9, (error, plain_error, w.norm())
    with torch.no_grad():  # forward alone leaves out half of the tiles of sweep 2
        alone = mutual_loss(
            *inputs, tau_contrast=tau_contrast, tau_distill=tau_distill, weights=weights, kl_reduction=reduction,
            backend="native",
        )  # fmt: skip
    for a, f in zip(alone, found, strict=True):
        torch.testing.assert_close(a, f.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("N", "D_a", "D_b"),
    [(2, 1, 1), (2, 20, 3), (3, 16, 17), (37, 20, 70), (64, 128, 64), (65, 300, 40), (129, 40, 128), (513, 33, 20),
     (1100, 24, 7), (70, 2048, 600)],
)  # fmt: skip
def test_shapes(N, D_a, D_b):
    check_against_formula([*embeddings(N, D_a, 0), *embeddings(N, D_b, 1)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.integers(2, 200), D_a=st.integers(1, 70), D_b=st.integers(1, 70), noise=st.sampled_from([0.1, 0.7, 5.0]),
    tau_contrast=st.floats(0.02, 2.0), tau_distill=st.floats(0.02, 2.0),
)  # fmt: skip
def test_any_shape_and_temperature(N, D_a, D_b, noise, tau_contrast, tau_distill):
    check_against_formula([*embeddings(N, D_a, 2, noise), *embeddings(N, D_b, 3, noise)], tau_contrast, tau_distill)


@pytest.mark.parametrize(
    ("tau_contrast", "tau_distill"),
    [(0.02, 0.02), (0.0199, 0.5), (0.5, 0.0199), (0.01, 0.02), (0.003, 0.001), (8.0, 100.0), (1e-4, 1.0)],
)
def test_extreme_temperatures(tau_contrast, tau_distill):
    """Below 0.02 exponents take an offset."""
    check_against_formula([*embeddings(150, 24, 4, 2.0), *embeddings(150, 33, 5, 2.0)], tau_contrast, tau_distill)


@pytest.mark.parametrize(("noise", "tau"), [(0.3, 0.05), (0.7, 0.02), (1.0, 0.02), (0.7, 0.012)])
def test_rows_that_have_learned_their_positive(noise, tau):
    """Losses far below 1e-7 keep their digits, which 1 - P does not: float64 alone is no oracle for the gradient."""
    exact = [*embeddings(100, 64, 62, noise), *embeddings(100, 64, 63, noise)]
    inputs = single(exact)
    found = mutual_loss(*inputs, tau_contrast=tau, tau_distill=tau, backend="native")
    in_double = mutual_loss(*exact, tau_contrast=tau, tau_distill=tau, backend="native")
    # a cosine's rounding, 6e-8, moves a logit by that over tau
    tolerance = 1e-6 + 4e-7 / tau
    for f, w in zip(found, in_double, strict=True):
        assert f.item() == pytest.approx(w.item(), rel=tolerance)
        assert f > 0
    pairs = zip(
        torch.autograd.grad(found.loss_a, inputs[:2]), torch.autograd.grad(in_double.loss_a, exact[:2]), strict=True
    )
    assert all(relative(f, w) < 4 * tolerance for f, w in pairs)
    cosine = reference.cosines(
        *(reference.normalize(z) for z in exact[:2]), *(reference.normalize(z) for z in exact[:2])
    )
    N = len(cosine) // 2
    positive = cosine.detach().roll(N, 1).diagonal()
    others = (cosine.detach() / tau).clone()
    for shift in (0, N):
        others[torch.arange(2 * N), (torch.arange(2 * N) + shift) % (2 * N)] = -math.inf
    ratio = (others - positive[:, None] / tau).exp().sum(dim=1)  # of all others to the positive
    assert in_double.ntxent_a.item() == pytest.approx(ratio.log1p().mean().item(), rel=1e-10)


@pytest.mark.parametrize("weights", [(1e20, 1.0), (1.0, 1e12), (0.0, 1e4)])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_one_peers_weight_leaves_the_other_alone(weights, reduction):
    check_against_formula([*embeddings(40, 24, 64), *embeddings(40, 33, 65)], weights=weights, reduction=reduction)


@pytest.mark.parametrize(
    ("N", "D", "tau"), [(2, 1, 0.5), (37, 70, 0.2), (150, 256, 0.5), (40, 600, 0.02), (33, 8, 0.005)]
)
def test_one_peer(N, D, tau):
    exact, inputs, leaves = (made := embeddings(N, D, 12)), single(made), single(made)
    found, plain = ntxent_loss(*inputs, tau=tau, backend="native"), reference.ntxent(*leaves, tau=tau)
    wanted = reference.ntxent(*exact, tau=tau)
    floor = 3e-7 + 3e-8 / tau
    assert abs(found.double() - wanted) <= 2 * abs(plain.double() - wanted) + floor * max(1e-3, wanted.item())
    grads = (torch.autograd.grad(loss, z) for loss, z in ((found, inputs), (plain, leaves), (wanted, exact)))
    for f, p, w in zip(*grads, strict=True):
        assert (f.double() - w).norm() <= 2 * (p.double() - w).norm() + floor * w.norm() + 1e-9


@pytest.mark.parametrize("N", [2, 33, 300])
def test_identical_embeddings(N):
    inputs = single([torch.full((N, 7), 0.3)] * 4)
    found = mutual_loss(*inputs, backend="native")
    assert found.ntxent_a.item() == pytest.approx(math.log(2 * N - 1), rel=1e-6)
    assert abs(found.kl_a.item()) < 1e-6
    for gradient in torch.autograd.grad(found.loss_a + found.loss_b, inputs):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_separated_embeddings(tau):
    """x = y = unit vectors along the axes: l = exp(1 / tau) + M - 2, and x_i is pulled against every other axis."""
    N = 140
    x = torch.eye(N)
    inputs = single([x, x, x, x])
    found = mutual_loss(*inputs, tau_contrast=tau, tau_distill=2 * tau, backend="native")
    others = (2 * N - 2) * math.exp(-1 / tau)
    assert found.ntxent_a.item() == pytest.approx(math.log1p(others), rel=1e-6)
    weight = 2 * 2 * math.exp(-1 / tau) / (1 + others) / (2 * N * tau)  # two views, rows and columns
    gradient = torch.autograd.grad(found.loss_a, inputs[0])[0]
    torch.testing.assert_close(gradient, weight * (1 - torch.eye(N)), rtol=1e-5 / tau, atol=weight * 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tau", [0.1, 0.004])
def test_a_non_finite_embedding_gives_a_non_finite_loss(bad, tau):
    inputs = [z.detach() for z in single([*embeddings(70, 4, 20), *embeddings(70, 4, 21)])]
    inputs[1][63, 2] = bad
    for wanted in (True, False):
        grads = [z.requires_grad_(wanted) for z in inputs]
        found = mutual_loss(*grads, tau_distill=tau, backend="native")
        assert not found.loss_a.isfinite()
        assert not found.kl_b.isfinite()
        assert found.ntxent_b.isfinite()
        assert not ntxent_loss(*grads[:2], tau=tau, backend="native").isfinite()


def test_peers_of_two_dtypes_are_computed_in_the_wider():
    exact = [*embeddings(20, 6, 30), *embeddings(20, 9, 31)]
    mixed = [*single(exact[:2], torch.float16), *exact[2:]]
    found = mutual_loss(*mixed, backend="native")
    wanted = mutual_loss(*[z.detach().double() for z in mixed], backend="torch")
    torch.testing.assert_close(found.loss_a, wanted.loss_a, rtol=1e-12, atol=0)
    assert torch.autograd.grad(found.loss_a, mixed[0])[0].dtype == torch.float16


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e-310), (torch.float64, 5e-324), (torch.float32, 1e-43)])
def test_rows_of_denormal_numbers(dtype, scale):
    signs = [z.detach().sign() for z in (*embeddings(9, 6, 80), *embeddings(9, 4, 81))]
    inputs = [(z.to(dtype) * scale).requires_grad_() for z in signs]
    found, wanted = mutual_loss(*inputs, backend="native"), mutual_loss(*signs, backend="torch")
    torch.testing.assert_close(found.loss_a.double(), wanted.loss_a, rtol=1e-5, atol=0)
    # the gradient, some 1e300, is more than the dtype holds, where it is not zero
    assert not torch.autograd.grad(found.loss_a, inputs[0])[0].isnan().any()


# -- threads, processors, memory -----------------------------------------------------------------------------------


def results(N: int = 700, D: int = 40, tau: float = 0.1) -> list[torch.Tensor]:
    inputs = single([*embeddings(N, D, 40), *embeddings(N, D + 3, 41)])
    found = mutual_loss(*inputs, tau_distill=tau, backend="native")
    return [*(v.detach() for v in found), *torch.autograd.grad(found.loss_a + found.loss_b, inputs)]


@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_equal_bit_by_bit_for_any_number_of_threads(tau):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(tau=tau)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(results(tau=tau), alone, strict=True)), threads
    finally:
        torch.set_num_threads(before)


def test_one_pool_of_threads():
    """The core runs on the OpenMP that torch runs on: a second one would double the threads of every product."""
    program = (
        "import re, torch; from kernels import native; torch.ones(10**6).sum();"
        "maps = open('/proc/self/maps').read(); print(len(set(re.findall(r'\\S*libgomp\\S*', maps))))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "1"), done.stdout + done.stderr  # 0: a torch with another OpenMP


@pytest.mark.slow
def test_instruction_sets_agree():
    """The machine's own registers against those of any machine; each result is within rounding of the other."""
    program = (
        "import sys, torch; sys.path.insert(0, 'tests'); from test_mutual_native import results;"
        "torch.save(results(), sys.argv[1])"
    )
    here = results()
    found = {}
    for capability in ("default", "avx2"):
        if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            continue
        file = Path(os.environ.get("TMPDIR", "/tmp")) / f"dogo-{os.getpid()}-{capability}.pt"
        # without AVX-512 for oneDNN, products go to BLAS
        limits = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2" if capability == "avx2" else "SSE41"}
        environment = {**os.environ, **limits, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/kernels"}
        subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT, env=environment, check=True)
        found[capability] = torch.load(file)
        file.unlink()
    for there in found.values():
        for a, b in zip(there, here, strict=True):
            assert relative(a, b.double()) < 1e-5


@pytest.mark.slow
def test_memory_grows_with_rows_not_pairs():
    """N = 8192, D = 128: a matrix of similarities would be 1 GiB a peer."""
    program = (
        "import resource, torch; from kernels import mutual_loss;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024;"
        "run = lambda N: sum(mutual_loss(*[torch.randn(N, 128, requires_grad=True) for _ in range(4)],"
        " backend='native')[:2]).backward();"
        "run(64); before = peak(); run(8192); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    views = 4 * 8192 * 128 * 4
    assert int(done.stdout) < 12 * views, "views, unit vectors, two packed forms, two sums, gradients, and tiles"


def test_other_python_threads_run_meanwhile():
    """The GIL is free while the core works."""
    inputs = single(embeddings(6000, 64, 50))
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.0005):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    loss = native.core.Loss(
        [native.core.normalize(inputs[0].detach(), inputs[1].detach())[0]], world=1, rank=0, tau_contrast=0.5,
        tau_distill=None, weights=[0.0], mean=False,
    )  # fmt: skip
    thread.start()
    before = len(ticks)
    loss.sums()
    during = len(ticks) - before
    done.set()
    thread.join()
    assert during >= 2


# -- the operators -------------------------------------------------------------------------------------------------


def test_operators_keep_torchs_rules():
    """Schema and fake kernels; autograd never sees them."""
    views = [z.detach().float() for z in (*embeddings(6, 4, 71), *embeddings(6, 5, 72))]
    for gradients in (True, False):
        torch.library.opcheck(mutual_native.ntxent_op, (*views[:2], 0.5, "", gradients))
        torch.library.opcheck(mutual_native.mutual_op, (*views, 0.5, 0.1, 1.0, 2.0, False, "", gradients))


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    inputs = single([*embeddings(40, 4, 73), *embeddings(40, 5, 74)])
    compiled = torch.compile(lambda *z: mutual_loss(*z, backend="native"), fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*inputs), mutual_loss(*inputs, backend="native")
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    gradients = (torch.autograd.grad(result.loss_a, inputs[:2]) for result in (found, wanted))
    assert all(torch.equal(f, w) for f, w in zip(*gradients, strict=True))


def test_second_derivatives_are_refused():
    inputs = single([*embeddings(5, 4, 50), *embeddings(5, 3, 51)])
    for loss in (ntxent_loss(*inputs[:2], backend="native"), mutual_loss(*inputs, backend="native").loss_a):
        first = torch.autograd.grad(loss.square(), inputs[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.square().sum().backward()


def test_forward_mode_and_transforms_are_for_the_torch_backend():
    """Silently, the tangent would be zero."""
    x, y = (z.detach().float() for z in embeddings(6, 4, 82))
    tangent = torch.ones_like(x)
    wanted = torch.func.jvp(lambda z: ntxent_loss(z, y, backend="torch"), (x,), (tangent,))[1]
    for backend in ("auto", "native"):

        def loss(z, backend=backend):
            return ntxent_loss(z, y, backend=backend)

        def dual(loss=loss):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent

        if backend == "auto":
            torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,))[1], wanted)
            torch.testing.assert_close(dual(), wanted)
            assert torch.func.grad(loss)(x).shape == x.shape
        else:
            with pytest.raises(ValueError, match="torch.func's transforms do not reach into it; use 'torch'"):
                torch.func.grad(loss)(x)
            with pytest.raises(ValueError, match="it has no forward-mode derivative; use 'torch'"):
                dual()


def test_auto_is_native_on_a_cpu(monkeypatch):
    x, y = single(embeddings(6, 4, 76))
    monkeypatch.setattr(reference, "ntxent_from_cosines", None)  # what the torch backend calls
    assert ntxent_loss(x, y).isfinite()
    assert similarity_kl(x, y, x, y).kl_a.isfinite()


def test_without_a_core(monkeypatch):
    x, y = single(embeddings(6, 4, 77))
    wanted = ntxent_loss(x, y)
    monkeypatch.setattr(native, "missing", "kernels._native is not built; so it is said")
    torch.testing.assert_close(ntxent_loss(x, y), wanted)
    with pytest.raises(ValueError, match="backend: 'native' does not fit: kernels._native is not built"):
        ntxent_loss(x, y, backend="native")
    monkeypatch.setattr(native, "broken", True)
    with pytest.warns(RuntimeWarning, match="is not built; so it is said"):
        ntxent_loss(x, y)
    with pytest.raises(ValueError, match="backend: 'native' does not fit: embeddings on meta, a CPU is needed"):
        ntxent_loss(x.to("meta"), y.to("meta"), backend="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": []}, "z: one peer or two are expected, found 0"),
        ({"z": [torch.ones(2, 4, 3, dtype=torch.float16)]}, "z: float32 or float64 is expected"),
        ({"z": [torch.ones(3, 4, 3)]}, r"z: contiguous \[2, N, D\] is expected"),
        ({"z": [torch.ones(4, 3, 2).permute(2, 0, 1)]}, r"z: contiguous \[2, N, D\] is expected"),
        ({"z": [torch.ones(2, 4, 3), torch.ones(2, 5, 3)], "weights": [1.0, 1.0]}, "z: peers of 4"),
        ({"z": [torch.ones(2, 1, 3)]}, "at least 2"),
        ({"world": 3}, "4 images, at least 2 and the same number on each of 3 ranks"),
        ({"rank": 1}, "rank: 1 of 1 ranks"),
        ({"tau_contrast": 0.0}, "tau_contrast: between 1e-20 and 1e[+]?20 is expected, found 0"),
        ({"tau_contrast": 1e30}, "tau_contrast: between 1e-20 and 1e[+]?20 is expected, found 1e[+]?30"),
        ({"weights": [float("nan")]}, "weights: not finite, found nan"),
        ({"tau_contrast": None}, "tau_contrast, tau_distill: at least one"),
        ({"tau_distill": 0.5}, "tau_distill: two peers are needed, found 1"),
        ({"weights": []}, "weights: one a peer"),
    ],
)
def test_the_boundary_checks_its_arguments(change, message):
    good = {
        "z": [torch.ones(2, 4, 3)], "world": 1, "rank": 0, "tau_contrast": 0.5, "tau_distill": None, "weights": [0.0],
        "mean": False,
    }  # fmt: skip
    native.core.Loss(**good)
    with pytest.raises(ValueError, match=message):
        native.core.Loss(**{**good, **change})


def test_steps_out_of_order_are_errors():
    (z, norm), options = native.core.normalize(torch.randn(4, 3), torch.randn(4, 3)), {"world": 1, "rank": 0}
    loss = native.core.Loss([z], **options, tau_contrast=0.5, tau_distill=None, weights=[0.0], mean=False)
    with pytest.raises(ValueError, match="finish: sums comes first"):
        loss.finish([norm])
    cold = native.core.Loss([z], **options, tau_contrast=0.001, tau_distill=None, weights=[0.0], mean=False)
    with pytest.raises(ValueError, match="sums: maxima comes first"):
        cold.sums()
    loss.sums()
    with pytest.raises(ValueError, match="inverse_norms: one a peer"):
        loss.finish([norm, norm])
    with pytest.raises(ValueError, match=r"inverse_norms: float64 \[2, 4\] on the CPU is expected"):
        loss.finish([norm.float()])
    with pytest.raises(ValueError, match="on the CPU is expected"):
        loss.finish([norm.to("meta")])
    with pytest.raises(ValueError, match=r"y: Float\[4, 2\] differs from Float\[4, 3\]"):
        native.core.normalize(torch.randn(4, 3), torch.randn(4, 2))
