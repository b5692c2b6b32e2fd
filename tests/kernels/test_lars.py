"""LARS against its float64 definition, torch's SGD and timm, in every backend; state, layouts and bad input."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import Lars as TimmLars
from torch import Tensor, nn

from kernels import Lars, lars, native, reference

BACKENDS = ["native", "torch"]
RATES = (0.5, 0.2, 0.8)  # a rate that changes tells the two variants apart
# Scalars, nothing, one element, no multiple of a vector, several chunks of 16,384 (CPU) and 4,096 (GPU) with a rest
SHAPES = [(), (0,), (1,), (3,), (7, 5), (16384,), (16385,), (3, 0, 2), (8, 3, 7, 7), (300, 211)]
OPTIONS = {"momentum": 0.9, "weight_decay": 0.01, "eta": 0.02}

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]


def parameters(shapes, device="cpu", seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def gradients(params, seed: int, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(p.shape, generator=generator)).to(p.device, dtype) for p in params]


def give(p: nn.Parameter, g: Tensor | None) -> None:
    p.grad_dtype = None  # any: torch ties a gradient's to its parameter's otherwise
    p.grad = g


def run(optimizer: torch.optim.Optimizer, params, rates=RATES, dtype=torch.float32, first_seed=1) -> None:
    for seed, rate in enumerate(rates, first_seed):
        for p, g in zip(params, gradients(params, seed, dtype), strict=True):
            give(p, g)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def expected(start: list[Tensor], dtype=torch.float32, **options) -> list[Tensor]:
    """What `run` makes of `start` in float64."""
    w = [p.detach().double().cpu() for p in start]
    v = [torch.zeros_like(x) for x in w]
    for seed, rate in enumerate(RATES, 1):
        for i, g in enumerate(gradients(w, seed, dtype)):
            w[i], v[i] = reference.lars_step(w[i], g, v[i], lr=rate, **options)
    return w


def assert_near(found, wanted, tolerance=2e-6) -> None:
    """Relative to the largest entry: a step's error is one of rounding weights."""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(
            a.detach().cpu().double(), b.detach().cpu().double(), rtol=0, atol=tolerance * max(scale, 1e-30),
            msg=lambda text, i=i, shape=tuple(b.shape): f"tensor {i} {shape}: {text}",
        )  # fmt: skip


# -- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr_in_momentum", [True, False])
@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 0.01), (0.9, 0.0), (0.0, 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_match_float64(device, backend, lr_in_momentum, adapt, momentum, weight_decay, dtype):
    params = parameters(SHAPES, device)
    options = {"momentum": momentum, "weight_decay": weight_decay, "eta": 0.02, "lr_in_momentum": lr_in_momentum}
    start = [p.detach().clone() for p in params]
    run(Lars([{"params": params, "adapt": adapt}], 0.1, backend=backend, **options), params, dtype=dtype)
    assert_near(params, expected(start, dtype, adapt=adapt, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_settings_of_their_own(device, backend):
    params = parameters([(30, 20), (40,), (50, 9)], device)
    start = [p.detach().clone() for p in params]
    optimizer = Lars([{"params": params[:1]}, {"params": params[1:2], "adapt": False, "weight_decay": 0.0}], 0.1,
                     backend=backend, **OPTIONS)  # fmt: skip
    optimizer.add_param_group({"params": params[2], "eta": 0.5, "lr_in_momentum": False})
    run(optimizer, params)
    wanted = [expected(start, **OPTIONS)[0], expected(start, **{**OPTIONS, "weight_decay": 0.0}, adapt=False)[1],
              expected(start, **{**OPTIONS, "eta": 0.5}, lr_in_momentum=False)[2]]  # fmt: skip
    assert_near(params, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_a_thousand_tensors(backend):
    params = parameters([(1 + i % 37, 1 + i % 5) for i in range(1500)])
    start = [p.detach().clone() for p in params]
    run(Lars(params, 0.1, backend=backend, **OPTIONS), params)
    assert_near(params, expected(start, **OPTIONS))


# Scalars of autograd's leaves, empty ones, and whatever lies between chunks
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=6), st.booleans(), st.booleans()
)
def test_any_shapes(shapes, lr_in_momentum, bfloat16):
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    params = parameters(shapes)
    start = [p.detach().clone() for p in params]
    run(Lars(params, 0.1, lr_in_momentum=lr_in_momentum, backend="native", **OPTIONS), params, dtype=dtype)
    assert_near(params, expected(start, dtype, lr_in_momentum=lr_in_momentum, **OPTIONS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_adaptation_it_is_torchs_sgd(backend):
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    settings = {"momentum": 0.9, "weight_decay": 0.01}
    run(Lars([{"params": ours, "adapt": False}], 0.1, lr_in_momentum=False, backend=backend, **settings), ours)
    run(torch.optim.SGD(theirs, 0.1, **settings), theirs)
    assert_near(ours, theirs, 5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weight_decay_it_is_timms(backend):
    # With it timm divides by |g| + wd |w|, not by |g + wd w|.
    shapes = [shape for shape in SHAPES if 0 not in shape]
    ours, theirs = parameters(shapes), parameters(shapes)
    run(Lars(ours, 0.1, momentum=0.9, eta=0.02, lr_in_momentum=False, backend=backend), ours)
    run(TimmLars(theirs, 0.1, momentum=0.9, trust_coeff=0.02, eps=0, always_adapt=True), theirs)
    assert_near(ours, theirs)


# -- values at the edge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_zero_means_a_ratio_of_one(backend, device):
    zeros, ones = nn.Parameter(torch.zeros(5, device=device)), nn.Parameter(torch.ones(5, device=device))
    give(zeros, torch.ones(5, device=device))
    give(ones, torch.zeros(5, device=device))
    Lars([zeros, ones], 0.5, backend=backend).step()
    assert zeros.tolist() == [-0.5] * 5
    assert ones.tolist() == [1.0] * 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_stay_visible(backend, device, value):
    bad, good = parameters([(20000,), (30,)], device)
    for p, g in zip((bad, good), gradients((bad, good), 1), strict=True):
        give(p, g)
    bad.grad[17000] = value
    Lars([bad, good], 0.5, backend=backend).step()
    assert not bad[17000].isfinite()
    assert value == value or bad.isnan().all()
    assert good.isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_norms_far_from_one_on_a_cpu(scale):
    params = parameters([(5000,)])
    with torch.no_grad():
        params[0] *= scale
    start = [p.detach().clone() for p in params]
    run(Lars(params, 0.1, momentum=0.9, eta=0.02, backend="native"), params)
    assert_near(params, expected(start, momentum=0.9, weight_decay=0.0, eta=0.02))


# -- learning rates, closures, gradients that are missing ----------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr_in_momentum", [True, False])
def test_a_tensor_as_learning_rate(backend, lr_in_momentum):
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    rate = torch.tensor(0.0)
    optimizer = Lars(ours, rate, lr_in_momentum=lr_in_momentum, backend=backend, **OPTIONS)
    for seed, value in enumerate(RATES, 1):
        rate.fill_(value)
        for p, g in zip(ours, gradients(ours, seed), strict=True):
            give(p, g)
        optimizer.step()
    other = Lars(theirs, 0.1, lr_in_momentum=lr_in_momentum, backend=backend, **OPTIONS)
    run(other, theirs)
    assert_near(ours, theirs, 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedulers_and_closures_work(backend):
    (p,) = parameters([(4, 3)])
    optimizer = Lars([p], 1.0, eta=0.1, momentum=0.0, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().norm().item()
    first = optimizer.step(closure)
    assert first.item() == pytest.approx(before**2)
    assert p.detach().norm().item() == pytest.approx(0.9 * before)  # lr eta |w| along w
    scheduler.step()
    optimizer.step(closure)
    assert p.detach().norm().item() == pytest.approx(0.95 * 0.9 * before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_without_gradient_is_left_alone(backend):
    a, b = parameters([(3,), (4,)])
    give(b, torch.ones(4))
    optimizer = Lars([a, b], 0.1, backend=backend)
    before = a.detach().clone()
    optimizer.step()
    assert torch.equal(a, before) and a not in optimizer.state
    Lars([a], 0.1, backend=backend).step()  # nothing to do at all


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_the_change(backend):
    (p,) = parameters([(3,)])
    give(p, torch.ones(3))
    loss = p.square().sum()
    Lars([p], 0.1, backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["channels_last", "gradient contiguous", "gradient expanded", "gaps", "offset"])
def test_orders_of_elements(device, backend, case):
    def place(t: Tensor, parameter: bool) -> Tensor:
        if case == "channels_last" or (case == "gradient contiguous" and parameter):
            return t.to(memory_format=torch.channels_last)
        if case == "gaps":
            room = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], device=device)
            return room[..., ::2].copy_(t)
        if case == "offset":  # 4 bytes off what vectors of four need
            return torch.zeros(t.numel() + 1, device=device)[1:].view(t.shape).copy_(t)
        return t[:1].expand(t.shape) if case == "gradient expanded" and not parameter else t

    base = parameters([(6, 5, 3, 4), (64, 70, 3, 3), (9, 4, 1, 1)], device)
    params = [nn.Parameter(place(p.detach().clone(), True)) for p in base]
    wanted = [p.detach().double().cpu() for p in params]
    v = [torch.zeros_like(w) for w in wanted]
    optimizer = Lars(params, 0.5, backend=backend, **OPTIONS)
    for seed in (1, 2):
        for i, g in enumerate(gradients(params, seed)):
            give(params[i], place(g, False))
            wanted[i], v[i] = reference.lars_step(wanted[i], place(g, False).cpu(), v[i], lr=0.5, **OPTIONS)
        optimizer.step()
    assert_near(params, wanted)
    # Two steps' roundings; sums of norms on one thread or on several differ.
    assert_near([optimizer.state[p]["momentum_buffer"] for p in params], v, tolerance=4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_may_change_their_order_between_steps(backend):
    ours, theirs = parameters([(6, 5, 3, 4)]), parameters([(6, 5, 3, 4)])
    one, other = Lars(ours, 0.1, backend=backend, **OPTIONS), Lars(theirs, 0.1, backend=backend, **OPTIONS)
    run(one, ours)
    run(other, theirs)
    ours[0].data = ours[0].data.to(memory_format=torch.channels_last)
    run(one, ours, first_seed=9)
    run(other, theirs, first_seed=9)
    assert_near(ours, theirs, 1e-7)


def test_threads_do_not_change_a_bit():
    def found(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        params = parameters([*SHAPES, (700, 800), (1000, 1001)])
        run(Lars(params, 0.1, backend="native", **OPTIONS), params)
        return [p.detach() for p in params]

    before = torch.get_num_threads()
    try:
        one, two = found(1), found(2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# -- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("saved", "loaded"), [("native", "native"), ("torch", "torch"), ("native", "torch")])
def test_a_reloaded_state_goes_on(saved, loaded, dtype):
    ours = parameters(SHAPES)
    optimizer = Lars(ours, 0.1, backend=saved, **OPTIONS)
    run(optimizer, ours, dtype=dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    fresh = Lars(theirs, 7.0, backend=loaded)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, ours, dtype=dtype, first_seed=5)
    run(fresh, theirs, dtype=dtype, first_seed=5)
    assert_near(ours, theirs, 0.0 if saved == loaded else 2e-6)
    assert fresh.param_groups[0]["eta"] == 0.02
    assert {key for state in fresh.state.values() for key in state} == {"momentum_buffer"}


def test_copies_and_pickles():
    params = parameters([(4, 5)])
    optimizer = Lars(params, 0.1, backend="torch", **OPTIONS)
    run(optimizer, params)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twins = other.param_groups[0]["params"]
        assert twins[0] is not params[0] and other._backend == "torch"
        run(other, twins, first_seed=5)
    run(optimizer, params, first_seed=5)
    assert torch.equal(twins[0], params[0])
    state = copy.deepcopy(optimizer.state_dict())
    assert pickle.loads(pickle.dumps(state))["param_groups"] == state["param_groups"]


def test_without_momentum_there_is_no_state():
    params = parameters([(4,)])
    optimizer = Lars(params, 0.1, momentum=0.0)
    run(optimizer, params)
    assert not optimizer.state


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: a finite number >= 0, found -1.0"),
        ({"lr": float("nan")}, "lr: a finite number >= 0, found nan"),
        ({"lr": torch.ones(2)}, r"lr: .* 0-d float32 tensor, found torch.float32 of shape \[2\]"),
        ({"lr": torch.tensor(1.0).double()}, "lr: .* 0-d float32 tensor, found torch.float64"),
        ({"momentum": 1.5}, "momentum: a number from 0 to 1, found 1.5"),
        ({"weight_decay": "1"}, "weight_decay: a finite number >= 0, found '1'"),
        ({"eta": float("inf")}, "eta: a finite number >= 0, found inf"),
        ({"lr_in_momentum": 1}, "lr_in_momentum: True or False, found 1"),
        ({"backend": "triton"}, "backend: 'triton' is unknown; allowed: auto, native, torch"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Lars(parameters([(3,)]), **{"lr": 0.1, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_parameters_are_float32(dtype):
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(ValueError, match=rf"params\[1\]: a dense float32 tensor is expected, found {dtype}"):
        Lars([good, bad], 0.1)
    with pytest.raises(ValueError, match="params.1.: .*sparse"):
        Lars([good, torch.ones(3).to_sparse()], 0.1)


def test_options_of_a_group_are_checked_and_leave_the_optimizer_as_it_was():
    optimizer = Lars(parameters([(3,)]), 0.1)
    with pytest.raises(ValueError, match="adapt: True or False, found 'no'"):
        optimizer.add_param_group({"params": parameters([(3,)]), "adapt": "no"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_another_kind_are_refused(backend):
    a, b = parameters([(3,), (4,)])
    give(a, torch.ones(3))
    before = a.detach().clone()
    optimizer = Lars([a, b], 0.1, backend=backend)
    for g, message in (
        (torch.ones(4).half(), r"grads\[1\]: float32 or bfloat16 is expected, found"),
        (torch.ones(4).to_sparse(), r"grads\[1\]: a dense tensor is expected, found"),
    ):
        give(b, g)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert torch.equal(a, before)


def test_native_says_why_it_cannot_run(monkeypatch):
    params = parameters([(3,)])
    with pytest.raises(ValueError, match="backend: 'native' does not fit: parameters on meta.* use 'torch' or 'auto'"):
        Lars([nn.Parameter(torch.ones(3, device="meta"))], 0.1, backend="native")
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "missing", "kernels._native is not built")
    with pytest.raises(ValueError, match="does not fit: kernels._native is not built; use 'torch' or 'auto'"):
        Lars(params, 0.1, backend="native")
    start = [p.detach().clone() for p in params]
    run(Lars(params, 0.1, **OPTIONS), params)  # auto falls back
    assert_near(params, expected(start, **OPTIONS))


def test_a_core_without_cuda_says_so(monkeypatch):
    class WithoutCuda:
        has_cuda = False
        left_out = "no nvcc found"

    monkeypatch.setattr(native, "core", WithoutCuda)
    assert lars._unfit_for_native(torch.device("cuda")) == "kernels._native is without CUDA: no nvcc found"
    assert lars._unfit_for_native(torch.device("cpu")) == ""


# -- on a GPU ------------------------------------------------------------------------------------------------------


def on_gpu(shapes=tuple(SHAPES), lr=0.1, **options) -> tuple[list[nn.Parameter], Lars]:
    params = parameters(shapes, "cuda")
    return params, Lars(params, lr, backend="native", **OPTIONS, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_never_waits_for_the_gpu(set_to_none):
    params, optimizer = on_gpu()
    fresh = [gradients(params, seed) for seed in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rate, grads in zip(RATES, fresh, strict=True):
            for p, g in zip(params, grads, strict=True):
                give(p, g)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("lr_in_momentum", [True, False])
def test_a_captured_step_follows_its_learning_rate(lr_in_momentum):
    rate = torch.tensor(0.0, device="cuda")
    params, optimizer = on_gpu(lr=rate, lr_in_momentum=lr_in_momentum)
    for p in params:
        give(p, torch.zeros_like(p))
    start = [p.detach().clone() for p in params]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()  # at a rate of 0 it makes the momentum buffers
    torch.cuda.current_stream().wait_stream(stream)
    for p, w in zip(params, start, strict=True):
        p.data.copy_(w)
        optimizer.state[p]["momentum_buffer"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed, value in enumerate(RATES, 1):
        rate.fill_(value)
        for p, g in zip(params, gradients(params, seed), strict=True):
            p.grad.copy_(g)
        graph.replay()
        # a step outside must leave the graph's table alone
        other, eager = on_gpu(((5000,),))
        run(eager, other)
    assert_near(params, expected(start, lr_in_momentum=lr_in_momentum, **OPTIONS))


@pytest.mark.gpu
def test_a_capture_refuses_what_it_would_freeze():
    params, optimizer = on_gpu()
    run(optimizer, params)
    with pytest.raises(ValueError, match="lr: 0.8 would be frozen"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    params, optimizer = on_gpu(lr=torch.tensor(0.1, device="cuda"))
    for p, g in zip(params, gradients(params, 1), strict=True):
        give(p, g)
    with pytest.raises(ValueError, match="momentum: no buffer yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("tensors", [1, 1500])
def test_at_most_four_launches(tensors):
    params, optimizer = on_gpu(tuple((1 + i % 300, 7) for i in range(tensors)))
    run(optimizer, params)
    for p, g in zip(params, gradients(params, 9), strict=True):
        give(p, g)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if "memcpy" not in name.lower()]
    assert 1 <= len(kernels) <= 4, kernels
    assert len(on_device) - len(kernels) <= 1, on_device  # the table


@pytest.mark.gpu
def test_steps_on_a_gpu_are_equal_to_the_bit():
    def found() -> list[Tensor]:
        params, optimizer = on_gpu((*SHAPES, (2048, 1000)))
        run(optimizer, params)
        return [p.detach() for p in params]

    first = found()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, found(), strict=True))


@pytest.mark.gpu
def test_streams_may_change_between_steps():
    params, optimizer = on_gpu()
    start = [p.detach().clone() for p in params]
    for seed, rate in enumerate(RATES, 1):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(optimizer, params, (rate,), first_seed=seed)
        torch.cuda.current_stream().wait_stream(stream)
    assert_near(params, expected(start, **OPTIONS))


def test_more_than_fits_a_cache_at_once():
    """Several of the batches that the core takes on a CPU, against the definition."""
    shapes = [(300_000,), (5,), (700, 430), (2**19 + 3,), (17,), (250_000,), (1,)]
    for adapt in (True, False):
        params = parameters(shapes)
        wanted = expected(params, **OPTIONS, adapt=adapt)
        run(Lars([{"params": params, "adapt": adapt}], 1.0, **OPTIONS, backend="native"), params)
        for p, w in zip(params, wanted, strict=True):
            assert_near([p], [w])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_of_another_optimizer_changes_no_option_that_it_lacks(backend):
    params = parameters([(5, 3), (4,)])
    sgd = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], 0.5, momentum=0.9)
    run(sgd, params, rates=(0.5,))
    ours = Lars([{"params": params[:1]}, {"params": params[1:], "adapt": False}], 0.1, eta=0.02, backend=backend)
    ours.load_state_dict(sgd.state_dict())
    assert [group["adapt"] for group in ours.param_groups] == [True, False]
    assert [group["lr"] for group in ours.param_groups] == [0.5, 0.5]
    assert all(torch.equal(ours.state[p]["momentum_buffer"], sgd.state[p]["momentum_buffer"]) for p in params)
    broken = sgd.state_dict()
    broken["param_groups"][1]["momentum"] = float("nan")
    with pytest.raises(ValueError, match="momentum: a number from 0 to 1, found nan"):
        ours.load_state_dict(broken)


def test_a_parameter_twice_is_refused():
    (p,) = parameters([(3,)])
    with pytest.raises(ValueError, match="params: a parameter stands twice in a group"):
        Lars([p, p], 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_views_of_their_negative(backend):
    (p,) = parameters([(3,)])
    start = p.detach().clone()
    p.grad = torch.tensor([0 - 1j, 0 - 2j, 0 + 3j]).conj().imag
    assert p.grad.is_neg()
    Lars([{"params": [p], "adapt": False}], 0.5, momentum=0.0, backend=backend).step()
    torch.testing.assert_close(p.detach(), start - 0.5 * torch.tensor([1.0, 2.0, -3.0]))
