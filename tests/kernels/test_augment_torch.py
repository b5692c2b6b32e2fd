"""Views in plain PyTorch against Pillow's and the native core's: the same bytes, one operation or all together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.augment import ORDERS
from kernels import augment_torch, augment_views, native
from kernels.augment_table import BOX_BITS, WIDTH, Column, table_of
from pictures import exact, mixed, noise, pillows, plain, smooth

built = pytest.mark.skipif(native.core is None, reason=native.missing)

SIGMAS = np.array([1e-3, 0.1, 0.3, 0.7, 1.0, 1.4, 1.42, 1.9, 2.0, 2.45, 3.0, 7.7, 30.0, 1000.0, 1e4])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many small operations wait for each other's threads where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(images) -> torch.Tensor:
    """One tensor [n, H, W, 3] of ragged images, with noise around them that no view may show."""
    H, W = (max(image.shape[side] for image in images) for side in (0, 1))
    batch = np.stack([noise(H, W, seed=99)] * len(images))
    for whole, image in zip(batch, images, strict=True):
        whole[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(batch)


def made(images, source, params, size) -> np.ndarray:
    """The bytes of the views [m, S, S, 3]."""
    batch = images if isinstance(images, torch.Tensor) else batch_of(images)
    table = table_of(np.asarray(source), *params)
    views = augment_torch.views(batch, table.to(batch.device), size=size)
    assert views.shape == (len(source), size, size, 3) and views.dtype == torch.uint8 and views.device == batch.device
    return views.cpu().numpy()


def natives(images, source, params, size) -> np.ndarray:
    views = augment_views(images, source=source, **params._asdict(), size=size, mean=(0, 0, 0), std=(1 / 255,) * 3)
    return views.permute(0, 2, 3, 1).numpy()


def check(images, source, params, size):
    np.testing.assert_array_equal(made(images, source, params, size), pillows(images, source, params, size))


# -- against Pillow


@exact
@pytest.mark.parametrize("size", [1, 2, 5, 31, 32, 33, 96])
def test_resizes_of_ragged_images(size):
    sizes = [(1, 1), (1, 9), (9, 1), (3, 200), (200, 3), (5, 2), (64, 64), (63, 65), (96, 96), (151, 127), (127, 151)]
    images = [noise(*hw) for hw in sizes] + [smooth(*hw) for hw in sizes]
    box = [(0, 0, image.shape[1], image.shape[0]) for image in images]
    check(images, range(len(images)), plain(box), size)
    check(images, range(len(images)), plain(box, flip=np.ones(len(box), bool)), size)


@exact
@pytest.mark.parametrize(("height", "width"), [(900, 700), (40, 3000), (3000, 40)])
def test_resizes_of_large_images(height, width):
    check([noise(height, width)], [0], plain([(0, 0, width, height)]), 224)


@exact
@pytest.mark.parametrize(("height", "width"), [(40_000, 1), (1, 40_000)])
def test_resizes_of_thousands_of_taps(height, width):
    check([np.full((height, width, 3), 255, np.uint8)], [0], plain([(0, 0, width, height)]), 1)


@exact
def test_either_order_of_passes():
    """Pillow 13 resizes along columns first where those shrink more than twice as much; on either side of that."""
    image = noise(260, 200)
    sides = [(w, h) for w in (8, 31, 32, 33, 40, 64, 100, 146) for h in (31, 32, 33, 34, 35, 48, 49, 96, 97, 168, 260)]
    check([image], [0] * len(sides), plain([(3, 0, w, h) for w, h in sides]), 32)


@exact
def test_crops_at_borders():
    box = [(0, 0, 1, 1), (89, 0, 1, 1), (0, 69, 1, 1), (89, 69, 1, 1), (0, 0, 45, 70), (45, 0, 45, 70), (0, 35, 90, 35),
           (88, 0, 2, 70), (0, 68, 90, 2), (0, 0, 90, 1), (0, 0, 1, 70), (89, 0, 1, 70)]  # fmt: skip
    images = [noise(70, 90), noise(70, 90, 1)]
    for size in (40, 20):
        for k in (0, 1):  # with an image behind it, and the last of the memory
            check(images, [k] * len(box), plain(box), size)


@exact
@pytest.mark.parametrize("image", [noise(80, 80), smooth(80, 80)], ids=["noise", "smooth"])
@pytest.mark.parametrize("operation", range(4))
def test_colours(image, operation):
    factors = [0, 1e-6, 0.2, 0.77, 1, 1.3, 2, 40, -1, 1e6, -1e6, 3e8]
    values = np.linspace(-0.5, 0.5, 101) if operation == 3 else np.array(factors)
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (len(values), 1))
    factors[:, operation] = values
    box = [(0, 0, 80, 80)] * len(values)
    check([image], [0] * len(values), plain(box, factors=factors, jitter=np.ones(len(values), bool)), 80)


@exact
@pytest.mark.slow
def test_hue_of_every_colour():
    every = np.arange(1 << 24, dtype=np.uint32).reshape(16, 1024, 1024)
    params = plain([(0, 0, 1024, 1024)], factors=np.array([[1, 1, 1, 0.17]]), jitter=np.ones(1, bool))
    for part in every:
        check([np.stack((part >> 16, part >> 8, part), axis=-1).astype(np.uint8)], [0], params, 1024)


@exact
def test_every_order_of_colours():
    factors = np.tile([1.4, 0.6, 1.7, 0.21], (24, 1))
    params = plain([(0, 0, 30, 30)] * 24, factors=factors, order=ORDERS, jitter=np.ones(24, bool))
    check([noise(30, 30)], [0] * 24, params, 30)


@exact
def test_grey_and_solarised():
    ones = np.ones(1, bool)
    for changes in ({"grayscale": ones}, {"solarize": ones}, {"grayscale": ones, "solarize": ones}):
        check([noise(50, 50)], [0], plain([(0, 0, 50, 50)], **changes), 50)


@exact
@pytest.mark.parametrize("size", [1, 2, 3, 17, 64])
def test_blurs(size):
    box = [(0, 0, size, size)] * len(SIGMAS)
    for image in (noise(size, size), smooth(size, size), np.full((size, size, 3), 255, np.uint8)):
        check([image], [0] * len(SIGMAS), plain(box, sigma=SIGMAS), size)
    grey = plain(box, sigma=SIGMAS, grayscale=np.ones(len(SIGMAS), bool))
    check([noise(size, size)], [0] * len(SIGMAS), grey, size)


@exact
def test_everything_of_ragged_images():
    sizes, rng = [(60, 80), (33, 20), (100, 101), (1, 7)], np.random.default_rng(3)
    images = [noise(*hw, seed) for seed, hw in enumerate(sizes)]
    for size in (1, 24, 47):
        source, params = mixed(60, sizes, rng)
        check(images, source, params, size)


@exact
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1), sigma=st.floats(0.01, 20.0),
)  # fmt: skip
def test_anything(height, width, size, seed, sigma):
    rng = np.random.default_rng(seed)
    source, params = mixed(6, [(height, width)] * 2, rng, largest_sigma=sigma + 0.05)
    check([noise(height, width, seed), smooth(height, width)], source, params, size)


# -- weights, of which bytes show the upper bits alone


def weights_of(length, size):
    """First source pixel and weights of each of `size`, one number after another as csrc/resample.cpp."""
    step = length / size
    reach = max(step, 1.0)
    for i in range(size):
        center = (i + 0.5) * step
        first, end = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), length)
        exact = [max(1.0 - abs((x - center + 0.5) * (1.0 / reach)), 0.0) for x in range(first, end)]
        total = 0.0
        for weight in exact:
            total += weight
        yield first, [int(weight / total * (1 << augment_torch.WEIGHT_BITS) + 0.5) for weight in exact]


@pytest.mark.parametrize("size", [1, 7, 32, 33, 224])
def test_weights_to_the_last_bit(size):
    lengths = [1, 2, 3, 5, 31, 32, 33, 40, 77, 100, 223, 301, 640, 999, 1501]
    first, weights = augment_torch._taps(torch.tensor(lengths, dtype=torch.int32), size)
    for j, length in enumerate(lengths):
        for i, (wanted_first, wanted) in enumerate(weights_of(length, size)):
            assert first[j, i] == wanted_first
            found = weights[:, j, i].tolist()
            assert found[: len(wanted)] == wanted and not any(found[len(wanted) :])


def test_white_stays_white():
    """Of thousands of weights, all may have been rounded upwards."""
    weights = torch.tensor([1 << 21, (1 << 21) + 9000], dtype=torch.int32).view(2, 1, 1)
    rows = torch.full((2, 5), 255, dtype=torch.uint8)
    assert augment_torch._weighed(rows, torch.zeros((1, 1), dtype=torch.int64), weights).tolist() == [[[255] * 5]]


# -- against the native core


@built
@pytest.mark.parametrize("size", [8, 32, 65])
def test_equals_the_native_core(size):
    sizes, rng = [(60, 80), (133, 20), (90, 91)], np.random.default_rng(7)
    images = [noise(*hw, seed) for seed, hw in enumerate(sizes)]
    source, params = mixed(80, sizes, rng, largest_sigma=12.0)
    np.testing.assert_array_equal(made(images, source, params, size), natives(images, source, params, size))


@built
@pytest.mark.parametrize("sigma", [np.linspace(0.01, 4, 300), np.geomspace(4, 1e4, 100)], ids=["usual", "huge"])
def test_boxes_of_the_table_blur_as_those_of_the_native_core(sigma):
    images, params = [noise(24, 24)], plain([(0, 0, 24, 24)] * len(sigma), sigma=sigma)
    source = np.zeros(len(sigma), np.int64)
    np.testing.assert_array_equal(made(images, source, params, 24), natives(images, source, params, 24))


def test_boxes_of_the_table_weigh_one_and_have_the_variance():
    usual = np.linspace(0.05, 60, 20_000)
    sigma = np.concatenate((usual, np.geomspace(1e-3, 0.05, 100), np.geomspace(60, 1e4, 500)))
    table = table_of(np.zeros(len(sigma), np.int64), *plain([(0, 0, 1, 1)] * len(sigma), sigma=sigma)).numpy()
    radius, inside, edge = table[:, Column.RADIUS : Column.EDGE + 1].T.astype(np.int64)
    total = (2 * radius + 1) * inside + 2 * edge
    assert (edge >= 0).all() and (edge <= inside + radius).all()  # what `inside` was rounded down by is in there
    assert set(total) <= {(1 << BOX_BITS) - 1, 1 << BOX_BITS}
    squares = radius * (radius + 1) * (2 * radius + 1) / 3  # of the distances of what weighs `inside`
    variance = (squares * inside + 2 * edge * (radius + 1.0) ** 2) / (1 << BOX_BITS)
    np.testing.assert_allclose(3 * variance[: len(usual)], usual**2, rtol=2e-4)


# -- however it is called


def a_call(m=40, size=20):
    sizes = [(30, 40), (40, 40), (25, 10)]
    source, params = mixed(m, sizes, np.random.default_rng(1))
    return batch_of([noise(*hw, seed) for seed, hw in enumerate(sizes)]), source, params, size


def test_fourth_channel_is_not_read():
    batch, *rest = a_call()
    for fill in (0, 255):
        fourth = torch.full((*batch.shape[:3], 1), fill, dtype=torch.uint8)
        np.testing.assert_array_equal(made(torch.cat((batch, fourth), dim=3), *rest), made(batch, *rest))


def test_strided_images():
    batch, *rest = a_call()
    wanted = made(batch, *rest)
    wide = torch.zeros((3, 80, 43, 4), dtype=torch.uint8)
    wide[:, ::2, 2:42, :3] = batch
    np.testing.assert_array_equal(made(wide[:, ::2, 2:42, :3], *rest), wanted)
    np.testing.assert_array_equal(made(wide[:, ::2, 2:42], *rest), wanted)
    planes = batch.permute(0, 3, 1, 2).contiguous()
    np.testing.assert_array_equal(made(planes.permute(0, 2, 3, 1), *rest), wanted)


def test_no_views():
    for n in (0, 2):
        images, table = torch.zeros((n, 5, 6, 3), dtype=torch.uint8), torch.zeros((0, WIDTH), dtype=torch.int32)
        views = augment_torch.views(images, table, size=7)
        assert views.shape == (0, 7, 7, 3) and views.dtype == torch.uint8


def test_arguments_stay_as_they_are():
    batch, source, params, size = a_call()
    table = table_of(source, *params)
    before = batch.clone(), table.clone()
    augment_torch.views(batch, table, size=size)
    assert torch.equal(batch, before[0]) and torch.equal(table, before[1])


def test_blocks_do_not_matter(monkeypatch):
    wanted = made(*a_call())
    for pixels in (1, 40 * 40 * 7, 1 << 30):
        monkeypatch.setitem(augment_torch.BLOCK_PIXELS, "cpu", pixels)
        np.testing.assert_array_equal(made(*a_call()), wanted)


def test_threads_and_the_default_dtype_do_not_matter():
    wanted = made(*a_call(m=80))
    try:
        torch.set_default_dtype(torch.float64)
        np.testing.assert_array_equal(made(*a_call(m=80)), wanted)
        torch.set_num_threads(2)
        np.testing.assert_array_equal(made(*a_call(m=80)), wanted)
    finally:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [7, 32, 224])
def test_a_gpu_gives_the_same_bytes(size):
    batch, source, params, _ = a_call(m=300)
    values = np.linspace(-0.5, 0.5, 300)
    params = params._replace(factors=np.column_stack((params.factors[:, :3], values)))
    wanted = made(batch, source, params, size)
    np.testing.assert_array_equal(made(batch.cuda(), source, params, size), wanted)
