"""The kernels of views against the plain form and Pillow: the same bytes, under the interpreter or on a GPU."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.augment import ORDERS, ViewParams, build_policy, draw_views
from engine.data_config import AugmentConfig
from kernels import augment_torch, augment_triton, augment_views
from kernels.augment import new_views, scale_and_shift
from kernels.augment_table import table_of
from pictures import exact, mixed, noise, pillows, plain, smooth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "imagewoof320-mini.tar"
BYTES = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}  # views are the bytes themselves


def batch(n, height, width) -> np.ndarray:
    return np.stack([noise(height, width, seed) for seed in range(n)])


def everything(m, n, height, width, seed=0) -> tuple[np.ndarray, ViewParams]:
    """m views of n images of one size with everything in them; the whole image and one pixel first."""
    source, params = mixed(m, [(height, width)] * n, np.random.default_rng(seed))
    params.box[:2] = [(0, 0, width, height), (width - 1, 0, 1, 1)]
    return source, params


def made(images, source, params, size, *, channels=3) -> np.ndarray:
    """The bytes of the views [m, S, S, 3]; memory that is not written shows."""
    batch = torch.from_numpy(images)
    if channels == 4:
        batch = torch.cat((batch, torch.full((*batch.shape[:3], 1), 77, dtype=torch.uint8)), dim=3)
    out = new_views(len(source), size, torch.float32, DEVICE).fill_(torch.nan)
    batch = batch.to(DEVICE)
    views = augment_views(batch, source=source, **params._asdict(), size=size, out=out, backend="triton", **BYTES)
    assert views is out
    return views.permute(0, 2, 3, 1).cpu().numpy()


def check(images, source, params, size, **options):
    wanted = augment_torch.views(torch.from_numpy(images), table_of(np.asarray(source), *params), size=size)
    np.testing.assert_array_equal(made(images, source, params, size, **options), wanted.numpy())


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (20, 31, 31), (64, 64, 64), (1, 1, 5), (7, 90, 9), (40, 28, 17)]
)
def test_everything_at_once(height, width, size, channels):
    m = 40 if DEVICE.type == "cuda" else 12
    check(batch(3, height, width), *everything(m, 3, height, width), size, channels=channels)


@pytest.mark.parametrize("image", [batch(1, 30, 30), smooth(30, 30)[None]], ids=["noise", "smooth"])
@pytest.mark.parametrize("operation", range(4))
def test_colours(image, operation):
    values = np.linspace(-0.5, 0.5, 21) if operation == 3 else np.array([0, 1e-6, 0.2, 0.77, 1, 1.3, 2, 40, -1, 3e8])
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (len(values), 1))
    factors[:, operation] = values
    params = plain([(0, 0, 30, 30)] * len(values), factors=factors, jitter=np.ones(len(values), bool))
    check(image, np.zeros(len(values), int), params, 30)


@pytest.mark.parametrize("hue", [0.17, -0.5])
def test_hue_of_many_colours(hue):
    """Every 16th of all colours where a GPU makes them, every 1024th under the interpreter."""
    step = 16 if DEVICE.type == "cuda" else 1024
    colours = np.arange(7, 1 << 24, step, dtype=np.uint32)
    side = 128 if DEVICE.type == "cuda" else 64
    colours = np.resize(colours, (-(-len(colours) // side**2), side, side))
    images = np.stack((colours >> 16, colours >> 8 & 255, colours & 255), axis=-1).astype(np.uint8)
    m = len(images)
    params = plain([(0, 0, side, side)] * m, factors=np.tile([1, 1, 1, hue], (m, 1)), jitter=np.ones(m, bool))
    check(images, np.arange(m), params, side, channels=4)


def test_all_orders_of_the_colours():
    factors = np.tile([0.6, 1.7, 0.4, 0.11], (24, 1))
    params = plain([(0, 0, 18, 18)] * 24, factors=factors, jitter=np.ones(24, bool), order=ORDERS)
    check(batch(1, 18, 18), np.zeros(24, int), params, 18)


@pytest.mark.parametrize("size", [1, 2, 17, 40])
def test_blurs(size):
    sigma = np.array([1e-3, 0.1, 0.7, 1.0, 1.42, 2.0, 3.0, 7.7, 100.0])
    m = len(sigma)
    params = plain([(0, 0, size, size)] * m, sigma=sigma, solarize=np.arange(m) % 2 == 1)
    check(batch(1, size, size), np.zeros(m, int), params, size)


def test_either_order_of_passes():
    sides = [(w, h) for w in (8, 16, 17, 40) for h in (15, 16, 17, 18, 24, 25, 48, 60)]
    check(batch(1, 60, 40), np.zeros(len(sides), int), plain([(0, 0, w, h) for w, h in sides]), 16)


def test_views_larger_than_a_program_holds(monkeypatch):
    monkeypatch.setattr(augment_triton, "MOST_WHOLE", 256)
    monkeypatch.setattr(augment_triton, "TILE", 512)
    check(batch(2, 33, 31), *everything(8, 2, 33, 31), 33)
    check(batch(2, 40, 31), *everything(8, 2, 40, 31), 25)


def photos(side: int, every: int) -> np.ndarray:
    with tarfile.open(PHOTOS) as tar:
        names = [name for name in tar.getnames() if name.lower().endswith((".jpeg", ".jpg", ".png"))][::every]
        pictures = [Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGB") for name in names]
    return np.stack([np.asarray(picture.resize((side, side))) for picture in pictures])


ALONE = {  # an operation by itself: strengths and probabilities of the policy
    "crop": {},
    "flip": {"flip": 1.0},
    "brightness": {"jitter": 1.0, "brightness": 0.8},
    "contrast": {"jitter": 1.0, "contrast": 0.8},
    "saturation": {"jitter": 1.0, "saturation": 0.8},
    "hue": {"jitter": 1.0, "hue": 0.2},
    "grayscale": {"grayscale": 1.0},
    "blur": {"blur": 1.0},
    "solarize": {"solarize": 1.0},
}
NOTHING = dict.fromkeys(
    ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize"), 0.0
)


@exact
@pytest.mark.skipif(not PHOTOS.exists(), reason="the photos are not on this machine")
@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("operation", [*ALONE, "all"])
def test_real_photos_are_pillows(operation, size):
    """Crops of 48-px photos, larger than the views and not; torchvision's functions on PIL images."""
    images, views = photos(48, 200), 2
    changes = {**NOTHING, **ALONE[operation]} if operation != "all" else {"blur": 0.5, "solarize": 0.2}
    policy = build_policy(AugmentConfig(**changes), size)
    n = len(images)
    params = draw_views(policy, seed=3, epoch=0, indices=np.arange(n), sizes=np.tile([48, 48], (n, 1)), views=views)
    source = np.tile(np.arange(n), views)
    np.testing.assert_array_equal(made(images, source, params, size, channels=4), pillows(images, source, params, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_in_every_precision(dtype):
    images, (source, params) = batch(2, 24, 24), everything(9, 2, 24, 24)
    statistics = {"mean": (0.49, 0.48, 0.44), "std": (0.25, 0.24, 0.26)}
    call = {"source": source, **params._asdict(), **statistics, "size": 24, "dtype": dtype, "backend": "triton"}
    views = augment_views(torch.from_numpy(images).to(DEVICE), **call)
    assert views.dtype == dtype and views.is_contiguous(memory_format=torch.channels_last)
    pixels = augment_torch.views(torch.from_numpy(images), table_of(source, *params), size=24).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(statistics[name]).double().view(3, 1, 1) for name in ("mean", "std"))
    wanted = (pixels.double() / 255 - mean) / std
    # Half a unit in the last place of the type, and the rounding of the float32 before it; Triton's interpreter cuts
    # bfloat16 off instead of rounding it.
    units = 1.0 if dtype == torch.bfloat16 and DEVICE.type == "cpu" else 0.5
    allowed = wanted.abs() * torch.finfo(dtype).eps * units + 5e-7
    assert ((views.cpu().double() - wanted).abs() <= allowed).all()


@pytest.mark.gpu
def test_launches_can_be_captured_and_wait_for_nothing():
    images = torch.from_numpy(batch(3, 40, 40)).cuda()
    drawn = (everything(16, 3, 40, 40, seed) for seed in (1, 2))
    first, second = (table_of(source, *params).cuda() for source, params in drawn)
    table, statistics = first.clone(), scale_and_shift((0, 0, 0), (1 / 255,) * 3).cuda()
    out = new_views(16, 40, torch.float32, images.device)
    passes = torch.empty((2, 16, 40, 40, 3), dtype=torch.uint8, device="cuda")

    def launch():
        augment_triton.launch(images, table, statistics, out, blur=True, passes=passes)

    launch()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for wanted in (second, first):
        table.copy_(wanted)
        graph.replay()
        plain_views = augment_torch.views(images.cpu(), wanted.cpu(), size=40)
        np.testing.assert_array_equal(out.permute(0, 2, 3, 1).cpu().numpy(), plain_views.numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros((2, 5, 5, 2), dtype=torch.uint8)}, r"images: uint8 \[n, H, W, 3 or 4\] is expected"),
        ({"images": torch.zeros((2, 5, 5, 3))}, r"images: uint8 \[n, H, W, 3 or 4\] is expected, found torch.float32"),
        ({"images": [np.zeros((5, 5, 3), np.uint8)]}, r"images: backend triton takes one tensor .* found list"),
        ({"source": np.array([0, 2])}, r"source\[1\]: one of 2 images is expected, found 2"),
        (
            {"box": np.array([[0, 0, 5, 5], [1, 0, 5, 5]])},
            r"box\[1\]: left 1, top 0, 5 x 5 px is not inside of an image",
        ),
        ({"box": np.array([[0, 0, 5, 5], [2**62, 0, 2**62, 5]])}, r"box\[1\]: left"),
        ({"order": np.zeros((2, 4), int)}, r"order\[0\]: 0, 1, 2 and 3 are expected, found \[0, 0, 0, 0\]"),
        ({"factors": np.full((2, 4), np.nan)}, r"factors\[0\]: finite numbers are expected, found \[nan"),
        ({"factors": np.full((2, 4), 0.6)}, r"factors\[0\]: a hue from -0.5 to 0.5 is expected, found 0.6"),
        ({"sigma": np.array([0, -1.0])}, r"sigma\[1\]: from 0 to 10000 is expected, found -1"),
        ({"dtype": torch.float64}, r"dtype: float32, float16 or bfloat16 is expected, found torch.float64"),
        ({"out": torch.zeros(2, 3, 8, 8)}, r"out: a tensor of .* with channels_last strides on"),
        ({"std": (1, 1, 0)}, r"std: numbers > 0 are expected, found \[1.0, 1.0, 0.0\]"),
        ({"backend": "cuda"}, r"backend: one of auto, triton, native, torch is expected, found 'cuda'"),
        ({"backend": "native", "dtype": torch.float16}, r"dtype: native gives float32, found torch.float16"),
    ],
)
def test_bad_arguments(changes, message):
    call = {
        "images": torch.zeros((2, 5, 5, 3), dtype=torch.uint8), "source": np.zeros(2, int), "size": 8,
        **plain([(0, 0, 5, 5)] * 2)._asdict(), **BYTES, "backend": "triton", **changes,
    }  # fmt: skip
    if isinstance(call["images"], torch.Tensor):
        call["images"] = call["images"].to(DEVICE)
    with pytest.raises(ValueError, match=message):
        augment_views(**call)


def test_views_that_are_too_large():
    one = plain([(0, 0, 5, 5)])
    call = {"source": np.zeros(1, int), **one._asdict(), "size": 2049, **BYTES, "backend": "triton"}
    with pytest.raises(ValueError, match="size: the GPU's kernels make views of up to 2048 px, found 2049"):
        augment_views(torch.zeros((1, 5, 5, 3), dtype=torch.uint8, device=DEVICE), **call)


def test_no_views():
    none = plain(np.zeros((0, 4), int))
    call = {"source": np.zeros(0, int), **none._asdict(), "size": 8, **BYTES, "backend": "triton"}
    assert augment_views(torch.zeros((2, 5, 5, 3), dtype=torch.uint8, device=DEVICE), **call).shape == (0, 3, 8, 8)
