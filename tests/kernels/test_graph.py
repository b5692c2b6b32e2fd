"""Embedding graph alignment: against loops over pairs of rows in float64, over ranks, and on bad input."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from embeddings import DEVICE, embeddings
from kernels import graph, graph_alignment, strips
from ranks import run_ranks


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    monkeypatch.setattr(strips, "CPU_ROWS", 5)


@pytest.fixture(params=["auto", "torch"])
def alignment(request):
    return functools.partial(graph_alignment, backend=request.param)


def by_pairs(student, teachers, node=0.8, edge=0.24):
    """The definition, one Pearson correlation at a time."""

    def correlation(u, v):
        if u.min() == u.max() or v.min() == v.max():
            return torch.zeros((), dtype=torch.float64)
        u, v = u - u.mean(), v - v.mean()
        return (u * v).sum() / ((u * u).sum() * (v * v).sum()).sqrt()

    total, N = 0.0, len(student[0])
    for teacher in teachers:
        for s, t in zip(student, teacher, strict=True):
            nodes = edges = 0.0
            for i in range(N):
                for j in range(N):
                    nodes = nodes + (correlation(s[i], t[j].detach()) - int(i == j)) ** 2
                    edges = edges + (correlation(t[i], t[j]).detach() - correlation(s[i], s[j])) ** 2
            total = total + node * nodes.sqrt() + edge * edges.sqrt()
    return total / (2 * len(teachers))


def assert_gradients(found, wanted, tolerance):
    for gradient, expected in zip(found, wanted, strict=True):
        assert (gradient - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("weights", [{}, {"node": 0.0}, {"edge": 0}, {"node": 2, "edge": 3.0}], ids=str)
@pytest.mark.parametrize(("N", "D", "count"), [(2, 3, 1), (7, 12, 2), (13, 5, 1)])
def test_the_definition(N, D, count, weights, alignment):
    student, *teachers = (embeddings(N, D, seed) for seed in range(1 + count))
    if count == 2:  # one teacher starts almost where the student does
        teachers[1] = [z.detach() + 1e-3 * w.detach() for z, w in zip(student, teachers[1], strict=True)]
    found, wanted = alignment(student, teachers, **weights), by_pairs(student, teachers, **weights)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-11)
    assert_gradients(torch.autograd.grad(3 * found, student), torch.autograd.grad(3 * wanted, student), 1e-10)


def test_gradients_against_finite_differences():
    student, teacher = embeddings(5, 4, 3), [z.detach() for z in embeddings(5, 4, 4)]
    assert torch.autograd.gradcheck(lambda x, y: graph_alignment((x, y), [teacher]), student)
    assert torch.autograd.gradgradcheck(lambda x, y: graph_alignment((x, y), [teacher], backend="torch"), student)


def test_gradient_goes_to_the_student_only(alignment):
    student, teacher = embeddings(6, 4, 5), embeddings(6, 4, 6)
    loss = alignment(student, [teacher])
    assert torch.autograd.grad(loss, teacher, allow_unused=True, retain_graph=True) == (None, None)
    x = torch.autograd.grad(loss, student[0])[0]
    # neither a row's mean nor its length matters
    assert x.sum(dim=1).abs().max() < 1e-14
    assert (x * student[0]).sum(dim=1).abs().max() < 1e-14


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    student, teacher = embeddings(6, 4, 7), embeddings(6, 4, 8)
    wanted = graph_alignment(student, [teacher]).detach()
    monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert torch.equal(graph_alignment(student, [teacher]), wanted)


def test_aligned_graphs_have_no_distance_and_no_gradient(alignment):
    student = embeddings(11, 6, 9)
    teacher = [4 * z.detach() + 2 for z in student]
    loss = alignment(student, [[z.detach() for z in student]], node=0)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, student))
    assert abs(alignment(student, [teacher], node=0).item()) < 1e-14
    # rows that are orthogonal to each other, which is the identity
    rows = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1], [1, 1, -1, -1]], dtype=torch.float64)
    pair = (rows.clone().requires_grad_(), rows.clone().requires_grad_())
    loss = alignment(pair, [pair])
    assert loss.item() < 1e-15
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, pair))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e20, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_row_is_correlated_with_none(value, dtype, alignment):
    # 49 times its float32 reciprocal is not 1
    exact = [[z.detach() for z in embeddings(7, 49, seed)] for seed in (10, 11)]
    exact[0][0][3] = exact[1][0][4] = value
    student, teacher = ([z.to(DEVICE, dtype).requires_grad_() for z in pair] for pair in exact)
    leaves = [z.clone().requires_grad_() for z in exact[0]]
    found, wanted = alignment(student, [teacher]), by_pairs(leaves, [exact[1]])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert found.item() == pytest.approx(wanted.item(), rel=tolerance)
    made = [gradient.cpu().double() for gradient in torch.autograd.grad(found, student)]
    assert not made[0][3].any()
    assert_gradients(made, torch.autograd.grad(wanted, leaves), tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weights", [{}, {"node": 0}, {"edge": 0}], ids=str)
def test_a_non_finite_embedding_gives_a_non_finite_loss(bad, weights, alignment):
    for network, whole in ((0, False), (1, False), (1, True)):
        pairs = [[z.detach().clone() for z in embeddings(6, 4, seed)] for seed in (12, 13)]
        pairs[network][1][2, slice(None) if whole else 3] = bad  # a whole row is constant, too
        assert not alignment(pairs[0], [pairs[1]], **weights).isfinite()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_embeddings_does_not_matter(scale, alignment):
    student, teacher = embeddings(9, 6, 14), embeddings(9, 6, 15)
    scaled = [[(z.detach() * scale).float().requires_grad_() for z in pair] for pair in (student, teacher)]
    wanted, found = graph_alignment(student, [teacher]), alignment(scaled[0], [scaled[1]])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    made = [gradient.double() * scale for gradient in torch.autograd.grad(found, scaled[0])]
    assert_gradients(made, torch.autograd.grad(wanted, student), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype, alignment):
    student, teacher = ([z.detach().to(dtype).requires_grad_() for z in embeddings(33, 20, seed)] for seed in (16, 17))
    exact = graph_alignment(*([z.detach().double() for z in student], [[z.detach().double() for z in teacher]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a surrounding autocast must not reach the loss
        found = alignment(student, [teacher])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    assert torch.autograd.grad(found, student)[0].dtype == dtype
    mixed = alignment(student, [[z.double() for z in teacher]])
    torch.testing.assert_close(mixed, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", [0.001, 1.0])
def test_float32_is_as_good_as_the_plain_formula(noise):
    student = embeddings(151, 24, 18)
    teacher = [z.detach() + noise * w.detach() for z, w in zip(student, embeddings(151, 24, 19), strict=True)]
    single = [[z.detach().float().requires_grad_() for z in student] for _ in range(2)]
    targets = [z.float() for z in teacher]
    for weights in ({"node": 0}, {"edge": 0}):
        wanted = graph_alignment(student, [teacher], backend="torch", **weights)
        plain = graph_alignment(single[0], [targets], backend="torch", **weights)
        found = graph_alignment(single[1], [targets], **weights)
        assert abs(found.double() - wanted) <= 2 * abs(plain.double() - wanted) + 3e-7 * wanted
        every = (torch.autograd.grad(*each) for each in ((found, single[1]), (plain, single[0]), (wanted, student)))
        for f, p, w in zip(*every, strict=True):
            assert (f.double() - w).norm() <= 2 * (p.double() - w).norm() + 3e-7 * w.norm()


def test_transforms_take_the_definition():
    (x, y), teacher = ([z.detach() for z in embeddings(6, 4, seed)] for seed in (20, 21))
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(graph_alignment((leaf, y), [teacher]), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda z: graph_alignment((z, y), [teacher]))(x), wanted)


def test_nothing_waits_for_the_device():
    """Tensors without data: whatever asked for a value would fail, and so would a tensor on another device."""
    with FakeTensorMode():
        views = [torch.empty(37, 6, device="cuda") for _ in range(6)]
        loss, gradient = graph._compute(views, 0.8, 0.24, None, True)
        assert loss.device.type == gradient.device.type == "cuda"


def test_strips_hold_few_rows(monkeypatch):
    """The bound counts three matrices, and every product of rows and columns is of one strip."""
    monkeypatch.setattr(strips, "FEWEST_ROWS", 1)
    monkeypatch.setattr(strips, "STRIP_BYTES", 3 * 4 * 100 * 8)
    monkeypatch.setattr(strips, "CPU_ROWS", 100)
    seen, original = [], torch.linalg.vector_norm
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda A, **options: seen.append(A.shape) or original(A, **options)
    )
    student, teacher = embeddings(100, 3, 22), embeddings(100, 3, 23)
    graph_alignment(student, [teacher]).backward()
    assert {shape for shape in seen if len(shape) == 2} == {(4, 100)}


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    views = [*embeddings(6, 4, 24), *embeddings(6, 4, 25)]
    compiled = torch.compile(lambda *z: graph_alignment(z[:2], [z[2:]]), fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*views), graph_alignment(views[:2], [views[2:]])
    torch.testing.assert_close(found, wanted)
    assert_gradients(torch.autograd.grad(found, views[:2]), torch.autograd.grad(wanted, views[:2]), 1e-12)


# -- several ranks -------------------------------------------------------------------------------------------------


def loss_of_one_rank(world: int, backend: str) -> tuple[float, list]:
    """The value on this rank and the gradients of its rows."""
    if world > 1:
        dist.init_process_group("gloo")
    rank, group = (dist.get_rank(), dist.group.WORLD) if world > 1 else (0, None)
    strips.CPU_ROWS = 3
    n = 12 // world
    student, *teachers = (
        [z.detach()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in embeddings(12, 5, seed)]
        for seed in (26, 27, 28)
    )
    loss = graph_alignment(student, teachers, group=group, backend=backend)
    made = torch.autograd.grad(loss, student)
    if world > 1:
        dist.destroy_process_group()
    return loss.item(), [gradient.numpy() for gradient in made]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "backend"), [(2, "auto"), (3, "auto"), (2, "torch")])
def test_ranks_give_the_loss_and_gradient_of_one(world, backend):
    expected, expected_gradients = loss_of_one_rank(1, "torch")
    every = run_ranks(loss_of_one_rank, world, world, backend)
    for value, _ in every:
        assert value == pytest.approx(expected, rel=1e-12)
        assert value == every[0][0], "the loss must be equal on every rank"
    rows = [torch.cat([torch.from_numpy(made[view]) for _, made in every]) / world for view in range(2)]
    assert_gradients(rows, [torch.from_numpy(wanted) for wanted in expected_gradients], 1e-11)


# -- bad input -----------------------------------------------------------------------------------------------------

GOOD = (torch.ones(4, 3), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("student", "teachers", "options", "message"),
    [
        (GOOD, [(torch.ones(4, 5),) * 2], {}, r"teachers\[0\]: width 5 differs from the student's 3; a projection"),
        ((torch.ones(4, 1),) * 2, [(torch.ones(4, 1),) * 2], {}, "student: width 1 leaves nothing of a row"),
        (GOOD, [], {}, r"teachers: a sequence of one or more pairs \(x, y\) is expected, found list of 0"),
        (GOOD, [GOOD, GOOD[0]], {}, r"teachers\[1\]: the two views \(x, y\) of a network are expected, found Tensor"),
        (GOOD[0], [GOOD], {}, "student: the two views .* found Tensor"),
        (GOOD, [(torch.ones(3, 3),) * 2], {}, r"teachers\[0\]: 3 images, but student holds 4"),
        ((GOOD[0].int(),) * 2, [GOOD], {}, r"student\[0\]: dtype torch.int32 is not supported"),
        (GOOD, [GOOD], {"node": -1}, "node: must be finite and >= 0, found -1"),
        (GOOD, [GOOD], {"edge": float("nan")}, "edge: must be finite and >= 0, found nan"),
        (GOOD, [GOOD], {"node": 0, "edge": 0}, "edge: node and edge are both 0"),
        (GOOD, [GOOD], {"backend": "native"}, "backend: 'native' is unknown; allowed: auto, torch"),
    ],
)
def test_bad_arguments_are_named(student, teachers, options, message):
    with pytest.raises(ValueError, match=message):
        graph_alignment(student, teachers, **options)
