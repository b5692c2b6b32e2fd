"""MoCo's loss and queue: against loops in float64, over ranks, against lightly, in strips, and on bad input."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from embeddings import DEVICE, embeddings, on_device, relative
from kernels import enqueue, moco, moco_loss, new_queue
from ranks import run_ranks


def inputs_of(N: int, D: int, seed: int, noise: float = 0.7) -> list[torch.Tensor]:
    """q_x, q_y, k_x, k_y in float64; keys resemble the queries of the other view."""
    x, y = (z.detach() for z in embeddings(N, D, seed, noise))
    k_x, k_y = (z.detach() for z in embeddings(N, D, seed + 1, noise))
    return [z.requires_grad_() for z in (x, y, y + noise * k_x, x + noise * k_y)]


def queue_of(K: int, D: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(K, D, generator=generator, dtype=torch.float64), dim=1)


@pytest.fixture
def small_strips(monkeypatch):
    """Four keys of the queue a strip, for 2 x 13 queries in float64: no size below divides by it."""
    monkeypatch.setattr(moco, "STRIP_BYTES", 4 * 26 * 8 + 5)


# -- the definition ------------------------------------------------------------------------------------------------


def loss_by_loops(q_x, q_y, k_x, k_y, queue, tau: float) -> float:
    def unit(u):
        length = math.sqrt(sum(a * a for a in u))
        return [a / length for a in u]

    def dot(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True))

    total = 0.0
    for queries, keys in ((q_x, k_y), (q_y, k_x)):
        for raw_query, raw_key in zip(queries.tolist(), keys.tolist(), strict=True):
            q, k = unit(raw_query), unit(raw_key)
            positive = math.exp(dot(q, k) / tau)
            negatives = sum(math.exp(dot(q, c) / tau) for c in queue.tolist())
            total -= math.log(positive / (positive + negatives))
    return total / (2 * len(q_x))


def plain(q_x, q_y, k_x, k_y, queue, tau: float) -> torch.Tensor:
    """The whole matrix and autograd: a cross-entropy whose class 0 is the positive, as in the authors' code."""
    halves = []
    for q, k in ((q_x, k_y), (q_y, k_x)):
        q, k = (z / z.norm(dim=1, keepdim=True) for z in (q, k.detach()))
        logits = torch.cat(((q * k).sum(dim=1, keepdim=True), q @ queue.T), dim=1) / tau
        halves.append(torch.nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long)))
    return (halves[0] + halves[1]) / 2


@pytest.mark.parametrize("tau", [0.02, 0.2, 1.0])
@pytest.mark.parametrize(("N", "D", "K"), [(1, 1, 1), (1, 5, 9), (3, 2, 4), (13, 7, 67)])
def test_values_are_the_definition(small_strips, N, D, K, tau):
    inputs, queue = inputs_of(N, D, 0), queue_of(K, D, 1)
    wanted = loss_by_loops(*inputs, queue, tau)
    assert moco_loss(*inputs, queue, tau=tau).item() == pytest.approx(wanted, rel=1e-11, abs=1e-14)
    single = moco_loss(*(z.float() for z in inputs), queue.float(), tau=tau)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(wanted, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("tau", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("noise", [0.02, 0.7, 5.0])
def test_gradients_are_those_of_autograd(small_strips, tau, noise):
    inputs, queue = inputs_of(13, 7, 2, noise), queue_of(67, 7, 3)
    wanted = torch.autograd.grad(-3.5 * plain(*inputs, queue, tau), inputs[:2])
    found = torch.autograd.grad(-3.5 * moco_loss(*inputs, queue, tau=tau), inputs[:2])
    for gradient, expected in zip(found, wanted, strict=True):
        assert relative(gradient, expected) < 1e-11
    # In float32 at most twice as far off as autograd is.
    single = [z.detach().float().requires_grad_() for z in inputs]
    found = torch.autograd.grad(-3.5 * moco_loss(*single, queue.float(), tau=tau), single[:2])
    by_autograd = torch.autograd.grad(-3.5 * plain(*single, queue.float(), tau), single[:2])
    for gradient, theirs, expected in zip(found, by_autograd, wanted, strict=True):
        assert relative(gradient, expected) < 2 * relative(theirs, expected)


def test_gradients_against_finite_differences(small_strips):
    q_x, q_y, k_x, k_y = inputs_of(4, 3, 4)
    queue = queue_of(11, 3, 5)
    assert torch.autograd.gradcheck(lambda x, y: moco_loss(x, y, k_x, k_y, queue, tau=0.3), [q_x, q_y])


def test_only_queries_have_a_gradient():
    inputs, queue = inputs_of(5, 4, 6), queue_of(9, 4, 7).requires_grad_()
    loss = moco_loss(*inputs, queue)
    gradients = torch.autograd.grad(loss, [*inputs, queue], allow_unused=True)
    assert gradients[2:] == (None, None, None)
    assert not moco_loss(*(z.detach() for z in inputs[:2]), *inputs[2:], queue).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(moco_loss(*inputs, queue), loss.detach(), rtol=0, atol=0)


def test_one_view_may_be_frozen():
    inputs, queue = inputs_of(5, 4, 6), queue_of(9, 4, 7)
    (wanted,) = torch.autograd.grad(moco_loss(*inputs, queue), inputs[1])
    inputs[0].requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(moco_loss(*inputs, queue), inputs[1])[0], wanted)


def test_a_loss_near_zero_keeps_its_digits():
    """Each query is its key and far from the queue: 1 + 1e-9 is 1 in float32, and the loss of autograd 0."""
    z = torch.zeros(3, 2)
    z[:, 0] = 1
    queue = torch.tensor([[0.0, 1.0]])
    q = z.clone().requires_grad_()
    loss = moco_loss(q, q, z, z, queue, tau=0.05)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)
    # dl/dq = e (c - k) / tau, of which normalising leaves the part along c; once as x and once as y of 6 rows
    e = math.exp(-20) / (1 + math.exp(-20))
    (gradient,) = torch.autograd.grad(loss, q)
    assert gradient[:, 1].tolist() == pytest.approx([e / 0.05 / 3] * 3, rel=1e-5)


def test_no_second_derivative_is_made_up():
    inputs, queue = inputs_of(5, 4, 8), queue_of(9, 4, 9)
    (gradient,) = torch.autograd.grad(moco_loss(*inputs, queue), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
    upstream = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(upstream * moco_loss(*inputs, queue), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: moco_loss(x, *inputs[1:], queue))(inputs[0].detach())
    with forward_ad.dual_level(), pytest.raises(RuntimeError):
        moco_loss(forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), *inputs[1:], queue)


def test_against_lightly():
    """lightly's NT-Xent with a memory bank is one direction of ours; a mean over both, with the same bank, is ours."""
    lightly_loss = pytest.importorskip("lightly.loss")
    N, D, K = 8, 16, 64
    inputs, queue = [z.detach().float().requires_grad_() for z in inputs_of(N, D, 10)], queue_of(K, D, 11).float()
    halves = []
    for q, k in ((inputs[0], inputs[3]), (inputs[1], inputs[2])):
        theirs = lightly_loss.NTXentLoss(temperature=0.2, memory_bank_size=(K, D))
        theirs.memory_bank.bank = queue.clone()
        halves.append(theirs(q, k.detach()))
    wanted, found = (halves[0] + halves[1]) / 2, moco_loss(*inputs, queue)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for gradient, expected in zip(
        torch.autograd.grad(found, inputs[:2]), torch.autograd.grad(wanted, inputs[:2]), strict=True
    ):
        assert relative(gradient, expected) < 1e-5
    # The last bank took the keys of the second direction at its start; ours takes both views'.
    position = torch.tensor(0)
    enqueue(queue, position, inputs[2], inputs[3])
    torch.testing.assert_close(theirs.memory_bank.bank[:N], queue[:N])
    assert position == 2 * N


# -- strips --------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, views of inputs aside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.numel = max(self.numel, result.numel())
        return result


def test_the_largest_temporary_is_a_strip(monkeypatch):
    m, D, K = 20, 8, 3000
    q, k, queue = (queue_of(rows, D, seed).float() for seed, rows in enumerate((m, m, K)))
    for strip_bytes in (m * 4 * 100, m * 4 * 37 + 1):
        monkeypatch.setattr(moco, "STRIP_BYTES", strip_bytes)
        with LargestTensor() as largest:
            moco._compute(q, k, queue, 0.2, True)
        assert m * D < largest.numel * 4 <= strip_bytes
    monkeypatch.setattr(moco, "STRIP_BYTES", 1)  # a key at a time is the least
    torch.testing.assert_close(
        moco._compute(q, k, queue[:50], 0.2, True)[0],
        plain(q[:10], q[10:], k[10:], k[:10], queue[:50], 0.2), rtol=1e-6, atol=0,
    )  # fmt: skip


# -- dtypes and ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    inputs, queue = [z.detach().to(dtype).requires_grad_() for z in inputs_of(33, 20, 12)], queue_of(50, 20, 13)
    exact = moco_loss(*(z.detach().double() for z in inputs), queue)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a surrounding autocast must not reach the loss
        ours = moco_loss(*inputs, queue.float())
    assert ours.dtype == torch.float32
    assert relative(ours, exact) < 1e-6
    assert torch.autograd.grad(ours, inputs[0])[0].dtype == dtype


def test_keys_may_be_of_another_dtype():
    q_x, q_y, k_x, k_y = inputs_of(9, 6, 14)
    queue = queue_of(20, 6, 15)
    half = [z.detach().bfloat16() for z in (q_x, q_y)]
    wanted = moco_loss(*(z.double() for z in half), k_x, k_y, queue)
    assert relative(moco_loss(*half, k_x.float(), k_y.float(), queue.float()), wanted) < 1e-6
    assert moco_loss(*half, k_x, k_y, queue.float()).dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_number_gives_a_non_finite_loss(small_strips, bad):
    for place in range(5):
        arguments = [z.detach().clone() for z in (*inputs_of(6, 4, 16), queue_of(30, 4, 17))]
        assert moco_loss(*arguments).isfinite()
        arguments[place][3, 2] = bad
        assert not moco_loss(*arguments).isfinite()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_embeddings_does_not_matter(scale):
    exact, queue = inputs_of(9, 6, 18), queue_of(20, 6, 19)
    scaled = [(z.detach() * scale).float().requires_grad_() for z in exact]
    assert relative(moco_loss(*scaled, queue.float()), moco_loss(*exact, queue)) < 1e-5
    gradient = torch.autograd.grad(moco_loss(*scaled, queue.float()), scaled[0])[0].double() * scale
    assert relative(gradient, torch.autograd.grad(moco_loss(*exact, queue), exact[0])[0]) < 1e-5


def test_a_row_of_zeros_is_that_of_normalize():
    inputs, queue = [z.detach() for z in inputs_of(6, 4, 30)], queue_of(20, 4, 31)
    inputs[0][2] = inputs[3][4] = 0
    q_x = inputs[0].requires_grad_()
    unit = [torch.nn.functional.normalize(z, dim=1) for z in inputs]
    halves = [
        torch.cat(((q * k).sum(dim=1, keepdim=True), q @ queue.T), dim=1) / 0.2
        for q, k in ((unit[0], unit[3]), (unit[1], unit[2]))
    ]
    wanted = sum((logits.logsumexp(dim=1) - logits[:, 0]).mean() for logits in halves) / 2
    loss = moco_loss(*inputs, queue)
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
    (gradient,), (expected,) = torch.autograd.grad(loss, q_x), torch.autograd.grad(wanted, q_x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_compiles_without_graph_breaks():
    inputs, queue = inputs_of(6, 4, 20), queue_of(30, 4, 21)
    eager = moco_loss(*inputs, queue)
    compiled = torch.compile(lambda *z: moco_loss(*z), fullgraph=True, backend="aot_eager")(*inputs, queue)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs[:2]), torch.autograd.grad(eager, inputs[:2]))


# -- the queue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "K"), [(3, 6), (3, 7), (1, 5), (4, 26)])
def test_the_oldest_rows_make_place(N, K):
    queue = queue_of(K, 4, 22).float()
    rows, place = queue.clone().tolist(), queue.data_ptr()
    start, position = K - 1, torch.tensor(K - 1)
    for step in range(5):
        _, _, k_x, k_y = inputs_of(N, 4, 23 + 2 * step)
        enqueue(queue, position, k_x, k_y)
        for i, key in enumerate([*k_x.tolist(), *k_y.tolist()]):
            length = math.sqrt(sum(a * a for a in key))
            rows[(start + i) % K] = [a / length for a in key]
        start = (start + 2 * N) % K
        assert position.item() == start
        torch.testing.assert_close(queue, torch.tensor(rows), rtol=1e-6, atol=1e-7)
    assert queue.data_ptr() == place
    assert not queue.requires_grad


def test_keys_may_be_put_in_before_backward():
    inputs, queue = inputs_of(4, 5, 24), queue_of(12, 5, 25)
    (wanted,) = torch.autograd.grad(moco_loss(*inputs, queue), inputs[0])
    loss = moco_loss(*inputs, queue)
    enqueue(queue, torch.tensor(3), *inputs[2:])
    torch.testing.assert_close(torch.autograd.grad(loss, inputs[0])[0], wanted, rtol=0, atol=0)


def test_a_new_queue_holds_random_unit_rows():
    torch.manual_seed(3)
    queue = new_queue(500, 7)
    torch.manual_seed(3)
    assert torch.equal(queue, new_queue(500, 7, device="cpu"))
    assert queue.shape == (500, 7)
    assert queue.dtype == torch.float32
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(500))
    # of independent directions: the mean of 500 has a length of about 1/sqrt(500)
    assert queue.mean(dim=0).norm() < 3 / math.sqrt(500)
    assert new_queue(3, 2, device="meta").device.type == "meta"


# -- several ranks -------------------------------------------------------------------------------------------------


def loss_of_one_rank(world: int) -> tuple[float, list, list]:
    if world > 1:
        dist.init_process_group("gloo")
    rank, group = (dist.get_rank(), dist.group.WORLD) if world > 1 else (0, None)
    n = 12 // world
    own = [z.detach()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in inputs_of(12, 10, 26)]
    queue, position = queue_of(50, 10, 27), torch.tensor(41)
    loss = moco_loss(*own, queue, group=group)
    gradients = torch.autograd.grad(3 * loss, own[:2])
    enqueue(queue, position, *own[2:], group=group)
    if world > 1:
        dist.destroy_process_group()
    return loss.item(), [g.numpy() for g in gradients], [queue.numpy(), position.numpy()]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_loss_gradient_and_queue_of_one(world):
    expected, expected_gradients, expected_queue = loss_of_one_rank(1)
    every = run_ranks(loss_of_one_rank, world, world)
    for value, _, queue in every:
        assert value == pytest.approx(expected, rel=1e-12)
        assert value == every[0][0], "the loss must be equal on every rank"
        for found, wanted in zip(queue, expected_queue, strict=True):
            assert (found == wanted).all(), "the queue must be that of one rank"
    for i, wanted in enumerate(expected_gradients):
        rows = torch.cat([torch.from_numpy(gradients[i]) for _, gradients, _ in every])
        torch.testing.assert_close(rows / world, torch.from_numpy(wanted), rtol=1e-12, atol=1e-14)


# -- CUDA graphs ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_cuda_graph_repeats_the_step():
    inputs = on_device(inputs_of(100, 64, 28))
    queue, position = queue_of(999, 64, 29).float().to(DEVICE), torch.tensor(900, device=DEVICE)

    def step():
        loss = moco_loss(*inputs, queue)
        gradients = torch.autograd.grad(loss, inputs[:2])
        enqueue(queue, position, *inputs[2:])
        return [loss, *gradients]

    state = queue.clone(), position.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for z in inputs:
            z.copy_(torch.randn_like(z))
    for kept, start in zip((queue, position), state, strict=True):
        kept.copy_(start)
    graph.replay()
    graph.replay()
    replayed = [*(z.clone() for z in captured), queue.clone(), position.clone()]
    for kept, start in zip((queue, position), state, strict=True):
        kept.copy_(start)
    step()
    for found, wanted in zip(replayed, [*step(), queue, position], strict=True):
        assert torch.equal(found, wanted)


# -- bad input -----------------------------------------------------------------------------------------------------

GOOD = torch.randn(4, 3)
QUEUE = torch.nn.functional.normalize(torch.randn(16, 3), dim=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: GOOD[0]}, r"q_x: shape \[N, D\] with N, D >= 1 is expected, found \[3\]"),
        ({1: GOOD[:3]}, r"q_y: shape torch.Size\(\[3, 3\]\) differs from q_x's"),
        ({2: GOOD[:, :2], 3: GOOD[:, :2]}, r"k_x: shape torch.Size\(\[4, 2\]\) differs from q_x's"),
        ({3: None}, r"k_y: a tensor \[N, D\] is expected, found NoneType"),
        ({3: GOOD.double()}, "k_y: dtype torch.float64 differs from k_x's"),
        ({4: None}, r"queue: a tensor \[K, D\] is expected, found NoneType"),
        ({4: QUEUE[:0]}, r"queue: shape \[K, D\] with K, D >= 1 is expected, found \[0, 3\]"),
        ({4: QUEUE[:, :2]}, "queue: width 2 differs from q_x's 3"),
        ({4: QUEUE.half()}, "queue: dtype torch.float16 is not supported; allowed: float32, float64"),
        ({4: QUEUE.to("meta")}, "queue: device meta differs from q_x's cpu"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = [changes.get(place, good) for place, good in enumerate((GOOD, GOOD, GOOD, GOOD, QUEUE))]
    with pytest.raises(ValueError, match=message):
        moco_loss(*arguments)


@pytest.mark.parametrize("tau", [0.0, -0.2, float("nan"), float("inf"), None])
def test_bad_temperatures_are_named(tau):
    with pytest.raises(ValueError, match="tau: must be positive and finite"):
        moco_loss(GOOD, GOOD, GOOD, GOOD, QUEUE, tau=tau)


@pytest.mark.parametrize(
    ("queue", "position", "k_x", "message"),
    [
        (QUEUE[:7], torch.tensor(0), GOOD, "queue: 7 rows do not hold the 8 keys of one batch over all ranks"),
        (QUEUE, 0, GOOD, "position: an int64 tensor of one number is expected, found int"),
        (QUEUE, torch.zeros(1, dtype=torch.int64), GOOD, r"position: .* found torch.int64 \[1\]"),
        (QUEUE, torch.tensor(0.0), GOOD, r"position: .* found torch.float32 \[\]"),
        (QUEUE, torch.tensor(0, device="meta"), GOOD, "position: device meta differs from queue's cpu"),
        (QUEUE[:, :2], torch.tensor(0), GOOD, "queue: width 2 differs from k_x's 3"),
        (QUEUE, torch.tensor(0), GOOD[:3], "k_y: shape .* differs from k_x's"),
    ],
)
def test_bad_queues_are_named(queue, position, k_x, message):
    before = queue.clone()
    with pytest.raises(ValueError, match=message):
        enqueue(queue, position, k_x, GOOD)
    assert torch.equal(queue, before)


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_a_new_queue_is_not_empty(size):
    with pytest.raises(ValueError, match="K, D: at least 1 is expected"):
        new_queue(*size)
