"""What the temperatures mean to the kernels, and tiles that cover any size."""

import math

import pytest

from kernels import tiles
from kernels.stats_triton import task_count


@pytest.mark.parametrize(
    ("tau_contrast", "tau_distill", "power"),
    [
        (0.5, 0.1, 5),
        (0.3, 0.1, 3),
        (0.1, 0.1, 1),
        (0.1, 0.2, -2),
        (0.1, 0.7, -7),
        (0.5, 0.17, 0),
        (0.9, 0.1, 0),
        (0.1, 1.0, 0),
    ],
)
def test_logits_of_either_temperature(tau_contrast, tau_distill, power):
    plan = tiles.temperatures(tau_contrast, tau_distill)
    assert plan.power == power
    assert not plan.safe
    for cosine in (-1.0, 0.3, 1.0):
        s = plan.scale**2 * cosine
        assert s * plan.contrast == pytest.approx(math.log2(math.exp(cosine / tau_contrast)), rel=1e-12)
        assert s * plan.distill == pytest.approx(math.log2(math.exp(cosine / tau_distill)), rel=1e-12)
        if power:
            base = 2 ** (s * (plan.contrast if power > 0 else plan.distill))
            other = 2 ** (s * (plan.distill if power > 0 else plan.contrast))
            assert base ** abs(power) == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize(
    ("tau_contrast", "tau_distill", "safe"),
    [(0.02, 0.5, False), (0.0145, None, False), (0.0144, 1.0, True), (0.5, 0.01, True), (1e-6, 1e-6, True)],
)
def test_where_sums_need_a_maximum(tau_contrast, tau_distill, safe):
    plan = tiles.temperatures(tau_contrast, tau_distill)
    assert plan.safe == safe
    if not safe:  # 2^26 rows of the largest and of the smallest exponential stay within float32
        for logit in (plan.scale**2 * plan.contrast, plan.scale**2 * plan.distill):
            assert 2.0**logit * 2**26 < 3.4e38
            assert 2.0**-logit > 1.2e-38
    else:
        assert plan.scale == 1.0


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("world", [1, 2, 8, 100])
@pytest.mark.parametrize("n", [1, 2, 37, 128, 1000, 4096, 33_000, 524_288])
def test_plans_fit_any_size(n, world, capability):
    plan = tiles.plan(n, world, 128, 64, capability=capability)
    N = n * world
    assert plan.pitch >= N > plan.pitch - tiles.BLOCK
    for tile in plan.tiles[:3]:
        assert tiles.BLOCK % tile.rows == 0
        assert tiles.BLOCK % tile.cols == 0
    assert plan.row_chunk % plan.col_chunk == 0
    assert plan.col_chunk % tiles.BLOCK == 0, "tiles do not reach over chunks"
    row_chunks = -(-N // plan.row_chunk)
    assert row_chunks <= 64, "what stats_triton.locate can tell apart"
    assert plan.split >= 1
    Q = plan.row_chunk // plan.col_chunk
    tasks = -(-task_count(row_chunks, Q, contrast=True) // world)
    cross_tasks = -(-task_count(row_chunks, Q, contrast=False) // world)
    room = tasks * (plan.row_chunk + plan.col_chunk) + cross_tasks * plan.row_chunk
    if N >= 32 * tiles.BLOCK:  # whole chunks; what passes_triton.py promises, rounded up to whole chunks and programs
        assert room <= 1.5 * 56 * 2 * plan.pitch / math.sqrt(world) + 2 * plan.row_chunk
    assert room * 4 < 0.1 * 4 * (2 * n) * (2 * N) or room * 4 < 2**26, "less than the matrix it avoids"


@pytest.mark.parametrize(
    ("D_a", "D_b", "widths", "fused"),
    [(1, 16, (16, 16), True), (20, 128, (32, 128), True), (128, 129, (128, 256), False), (256, None, (256, 256), True),
     (257, None, (320, 320), False), (2048, 5, (2048, 16), False)],
)  # fmt: skip
def test_widths(D_a, D_b, widths, fused):
    plan = tiles.plan(100, 1, D_a, D_b)
    assert (plan.width_a, plan.width_b) == widths
    assert plan.fused == fused
    assert plan.depths() == (widths if fused else tuple(min(width, 64) for width in widths))


def test_an_old_gpu_is_refused():
    with pytest.raises(ValueError, match=r"'triton' needs compute capability 8.0, found 7.5"):
        tiles.plan(8, 1, 8, capability=75)
