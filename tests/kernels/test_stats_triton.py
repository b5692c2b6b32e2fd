"""Pass 1: which tiles it visits, and the sums of every row."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import embed_triton, passes_triton, reference, tiles
from kernels.passes_triton import Embedded
from kernels.problem import pose
from kernels.stats_triton import edge_row, inner_row, locate, task_count, walk
from kernels.tiles import Tile, Tiles, Variant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def count_visits(visits, N, R, Q, col_chunk, tiles_a_side, V: tl.constexpr):
    """visits[block, row tile, column tile] += 1 in the order of pass 1; blocks: view 1 x view 2, 1 x 1, 2 x 2."""
    same, view, row_chunk, chunk = locate(tl.program_id(0), R, Q)
    row_lo = row_chunk * col_chunk * Q
    block = tl.where(same, 1 + view, 0)
    for col in range(chunk * col_chunk, tl.minimum(chunk * col_chunk + col_chunk, N), V.cols):
        if same:
            first, diagonal, edges, tail, lo, count = walk(col, row_lo, row_lo + col_chunk * Q, N, V, True)
        else:
            first, diagonal, edges, tail, lo, count = walk(col, row_lo, row_lo + col_chunk * Q, N, V, False)
        for k in range(edges):
            row = edge_row(k, first, diagonal, tail, V)
            at = (block * tiles_a_side + row // V.rows) * tiles_a_side + col // V.cols
            tl.atomic_add(visits + at, 1)
        for k in range(count):
            # fmt: off
            if same: row = inner_row(k, first, diagonal, lo, V, True)  # noqa: E701, SIM108
            else: row = inner_row(k, first, diagonal, lo, V, False)  # noqa: E701
            # fmt: on
            at = (block * tiles_a_side + row // V.rows) * tiles_a_side + col // V.cols
            tl.atomic_add(visits + at, 1000)  # without masks


def variant(rows: int, cols: int) -> Variant:
    return Variant(16, 16, 16, 16, rows, cols, 1, True, False, 1, False)


@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (64, 64), (128, 64), (32, 128)])
@pytest.mark.parametrize("N", [2, 127, 128, 129, 640, 1000])
@pytest.mark.parametrize(("row_chunk", "col_chunk"), [(128, 128), (384, 128), (512, 256)])
def test_every_tile_that_is_due_is_visited_once(N, rows, cols, row_chunk, col_chunk):
    R, Q = -(-N // row_chunk), row_chunk // col_chunk
    side = -(-N // min(rows, cols))
    visits = torch.zeros(3, side, side, dtype=torch.int32, device=DEVICE)
    grid = (task_count(R, Q, contrast=True),)
    count_visits[grid](visits, N, R, Q, col_chunk, side, V=variant(rows, cols))
    longer = max(rows, cols)
    due = torch.zeros_like(visits)
    for row in range(-(-N // rows)):
        for col in range(-(-N // cols)):
            square_row, square_col = row * rows // longer, col * cols // longer
            inside = (row + 1) * rows <= N and (col + 1) * cols <= N
            kind = (
                1000 if inside and square_row != square_col else 1
            )  # with masks: diagonal squares and what reaches over
            due[0, row, col] = kind
            due[1:, row, col] = kind if square_row >= square_col else 0
    assert torch.equal(visits, due)
    if N == 1000:  # half of the pairs, and the diagonal
        pairs = (visits > 0).sum().item() * rows * cols
        assert pairs < 1.25 * (2 * N) ** 2 / 2 + 2 * N * longer


def embedded(N: int, D: int, seed: int, scale: float) -> tuple[Embedded, torch.Tensor]:
    """Pass 0 in float32 storage, and the matrix of s in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(N, D, generator=generator) for _ in range(2))
    z = embed_triton.embed(
        x.to(DEVICE), y.to(DEVICE), scale=scale, width=tiles.padded_width(D), pitch=tiles.pitch(N), dtype=torch.float32
    )
    unit = torch.cat([reference.normalize(v.double()) for v in (x, y)])
    return Embedded(*z), unit @ unit.T * scale**2


@pytest.mark.skipif(DEVICE.type == "cuda", reason="products of float32 are for the interpreter")
@pytest.mark.parametrize("tile", [(64, 128), (128, 64), (32, 32)])
@pytest.mark.parametrize(("N", "world"), [(3, 1), (150, 1), (150, 3), (400, 2)])
def test_sums_of_every_row(N, world, tile):
    """A pair too many or too few would change a sum by a hundred times the tolerance; positives are left out."""
    temps = tiles.temperatures(0.5, 0.1)
    peers = [embedded(N, D, seed, temps.scale) for seed, D in enumerate((12, 40))]
    shape = Tile(*tile, 4, 2)
    chosen = Tiles(shape, shape, shape, 32, 16)
    for valued in (False, True):
        total = None
        for rank in range(world):
            plan = tiles.plan(N, 1, 12, 40)._replace(tiles=chosen, row_chunk=256, col_chunk=128)
            problem = pose(N, (12, 40), None, 0.5, 0.1, (1.0, 1.0), False, DEVICE)
            # Every rank here holds the images of all, as it does behind the gather.
            problem = problem._replace(plan=plan, n=N // world, rank=rank, world=world)
            own = slice(rank * (N // world), (rank + 1) * (N // world))
            inputs = [peer._replace(positive=peer.positive[own].contiguous()) for peer, _ in peers]
            sums = passes_triton._stats(problem, inputs, valued).double().cpu()
            total = sums if total is None else total + sums
        s_a, s_b = (s for _, s in peers)
        for peer, (s, other) in enumerate(((s_a, s_b), (s_b, s_a))):
            others = 1 - torch.eye(N, dtype=torch.float64).repeat(2, 2)
            e = 2**s * others
            x = (2 ** (s * temps.distill) * others)[:N, N:]
            l_1, l_2, t, positive, *u = total[peer, :, :N]
            torch.testing.assert_close(torch.cat((l_1, l_2)), e.sum(1), rtol=1e-5, atol=0)
            torch.testing.assert_close(t, x.sum(1), rtol=1e-5, atol=0)
            torch.testing.assert_close(positive, s.diagonal(N), rtol=1e-5, atol=1e-6)
            if valued:
                difference = (s - other)[:N, N:]
                scale = (x * difference.abs()).sum(1)
                assert ((u[0] - (x * difference).sum(1)).abs() <= 1e-5 * scale).all()
