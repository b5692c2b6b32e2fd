"""The DALI graph and the native core against torchvision's operations: the same parameters give the same views.

The policy hands every loader the same parameters, so views are compared pixel by pixel, and then by their statistics.
"""

import colorsys
import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import ConfigError
from engine.data import dali_graph
from engine.data.augment import AugmentPolicy, ViewParams, build_policy, draw_views
from engine.data_config import AugmentConfig
from kernels import augment_views, native

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

PHOTOS = Path(__file__).parents[3].parent / "shared" / "data" / "imagewoof320-mini.tar"
SIDE, COUNT, VIEWS = 96, 48, 2

MAKERS = [
    "dali",
    pytest.param("native", marks=pytest.mark.skipif(native.core is None, reason="the native core is not built")),
    pytest.param("dali-gpu", marks=pytest.mark.gpu),
]


class Photos(NamedTuple):
    encoded: list[np.ndarray]
    images: list[Image.Image]
    sizes: np.ndarray  # [n, 2]


@pytest.fixture(scope="module")
def photos() -> Photos:
    """Real photos where they are at hand, else drawings of every size."""
    if PHOTOS.exists():
        with tarfile.open(PHOTOS) as tar:
            names = sorted(name for name in tar.getnames() if name.endswith((".JPEG", ".jpg", ".jpeg")))
            encoded = [tar.extractfile(name).read() for name in names[:: len(names) // COUNT][:COUNT]]
    else:
        encoded = [drawing(i) for i in range(COUNT)]
    return load(encoded)


def drawing(i: int) -> bytes:
    rng = np.random.default_rng(i)
    h, w = rng.integers(60, 400, 2)
    y, x = np.mgrid[:h, :w]
    pixels = 128 + 100 * np.sin(x[..., None] * rng.uniform(0.01, 0.1, 3) + y[..., None] * rng.uniform(0.01, 0.1, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def load(encoded: list[bytes]) -> Photos:
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
    return Photos([np.frombuffer(data, np.uint8) for data in encoded], images, np.array([i.size for i in images]))


def policy_of(**changes) -> AugmentPolicy:
    """The crop alone, and what is changed."""
    plain = {"flip": 0, "jitter": 0, "grayscale": 0, "blur": 0, "solarize": 0}
    return build_policy(AugmentConfig(**{**plain, **changes}), SIDE)


def made(maker: str, policy: AugmentPolicy, photos: Photos, params: ViewParams) -> np.ndarray:
    """Views [V * n, S, S, 3] in 0 ... 255 of DALI or the native core."""
    n = len(photos.encoded)
    native_core, gpu = maker == "native", maker == "dali-gpu"
    fields = [] if native_core else dali_graph.used_fields(policy)
    graph = dali_graph.graph_params(params)

    def source(iteration: int) -> list:
        if iteration:
            raise StopIteration
        rows = [getattr(graph, name)[v * n : (v + 1) * n] for v in range(VIEWS) for name in fields]
        return [photos.encoded, *rows]

    pipeline = dali_graph.build_pipeline(
        policy, source, views=0 if native_core else VIEWS, batch_size=n, threads=2, device_id=0 if gpu else None,
        sizes=photos.sizes,
    )  # fmt: skip
    outputs = pipeline.run()
    mean, std = policy.statistics
    if native_core:
        images = [np.asarray(outputs[0].at(i)) for i in range(n)]
        options = {**params._asdict(), "size": SIDE, "mean": mean, "std": std}
        views = augment_views(images, source=np.tile(np.arange(n), VIEWS), **options).permute(0, 2, 3, 1).numpy()
    else:
        parts = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        assert {part.dtype for part in parts} == {torch.float16 if gpu else torch.float32}
        views = torch.cat(parts).cpu().float().numpy()
    return 255 * (views * np.array(std) + np.array(mean))


def by_pillow(policy: AugmentPolicy, photos: Photos, params: ViewParams) -> np.ndarray:
    n = len(photos.images)
    return np.stack([policy.apply(photos.images[i % n], params, i) for i in range(VIEWS * n)]).astype(float)


def histogram_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Earth mover's distance of the distributions of values, in levels of 255."""
    shares = [np.histogram(values, bins=256, range=(-0.5, 255.5))[0] / values.size for values in (one, other)]
    return float(np.abs(np.cumsum(shares[0] - shares[1])).sum())


class Tolerance(NamedTuple):
    """Largest differences from torchvision, in levels of 255."""

    pixel: float  # mean absolute
    mean: float
    std: float
    histogram: float


CASES = {
    "crop": {},
    "flip": {"flip": 1},
    "brightness": {"jitter": 1, "contrast": 0, "saturation": 0, "hue": 0},
    "contrast": {"jitter": 1, "brightness": 0, "saturation": 0, "hue": 0},
    "saturation": {"jitter": 1, "brightness": 0, "contrast": 0, "hue": 0},
    "hue": {"jitter": 1, "brightness": 0, "contrast": 0, "saturation": 0},
    "jitter": {"jitter": 1},
    "grayscale": {"grayscale": 1},
    "blur": {"blur": 1},
    "solarize": {"solarize": 1},
    "simclr": {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5},
    "simsiam": {"preset": "simsiam", "flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2},
}

# DALI rounds once where Pillow truncates after every operation, so that its colours are half a level darker each.
EXACT, ROUNDED = Tolerance(0.5, 0.1, 0.1, 0.3), Tolerance(1.2, 0.9, 0.3, 1.0)
DALI = {
    "crop": EXACT, "flip": EXACT, "grayscale": EXACT, "solarize": Tolerance(1.0, 0.1, 0.1, 0.3),
    "blur": Tolerance(0.7, 0.1, 0.1, 0.3),
    "brightness": ROUNDED, "contrast": ROUNDED, "saturation": ROUNDED,
    # A rotation of RGB in place of a shift in HSV.
    "hue": Tolerance(4.5, 0.6, 0.8, 1.5),
    "jitter": Tolerance(4.0, 1.8, 0.6, 2.2), "simclr": Tolerance(3.0, 1.5, 0.5, 1.8),
    "simsiam": Tolerance(3.0, 1.5, 0.5, 1.8),
}  # fmt: skip
NATIVE = dict.fromkeys(CASES, EXACT)
# nvJPEG decodes with other roundings than libjpeg-turbo.
GPU_MORE = 1.0


def tolerance(maker: str, case: str) -> Tolerance:
    if maker == "native":
        return NATIVE[case]
    return Tolerance(*(value + (GPU_MORE if maker == "dali-gpu" else 0) for value in DALI[case]))


OF_PHOTOS = ("hue", "jitter", "blur", "simclr", "simsiam")  # strong colours and edges, of which drawings have more


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("maker", MAKERS)
def test_views_are_torchvisions(maker, case, photos):
    if maker != "native" and case in OF_PHOTOS and not PHOTOS.exists():
        pytest.skip("the tolerance is that of photos, which are not on this machine; drawings are harder")
    policy = policy_of(**CASES[case])
    params = draw_views(policy, seed=0, epoch=0, indices=np.arange(COUNT), sizes=photos.sizes, views=VIEWS)
    ours, theirs = made(maker, policy, photos, params), by_pillow(policy, photos, params)
    found = Tolerance(
        np.abs(ours - theirs).mean(), abs(ours.mean() - theirs.mean()), abs(ours.std() - theirs.std()),
        histogram_distance(ours, theirs),
    )  # fmt: skip
    allowed = tolerance(maker, case)
    assert all(f <= a for f, a in zip(found, allowed, strict=True)), f"found {found}, allowed {allowed}"


@pytest.mark.parametrize("maker", MAKERS)
def test_crops_have_torchvisions_areas_and_ratios(maker):
    """The picture's colours are its coordinates, so that a view tells where it was cut."""
    policy = policy_of()
    height, width = 200, 300
    y, x = np.mgrid[:height, :width]
    # Two channels each 0 ... 250, blue zero; PNG, so that nothing is lost.
    pixels = np.stack((x * 250 / (width - 1), y * 250 / (height - 1), 0 * x), axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    ramp = load([buffer.getvalue()] * 200)
    params = draw_views(policy, seed=3, epoch=0, indices=np.arange(200), sizes=ramp.sizes, views=VIEWS)
    views = made(maker, policy, ramp, params)

    def side(channel: int, axis: int, pixels: int) -> np.ndarray:
        values = views[..., channel].mean(axis=2 if axis == 1 else 1)
        quarter = SIDE // 4  # away from the borders, where the filter is cut
        slope = (values[:, -quarter] - values[:, quarter - 1]) / (SIDE - 2 * quarter + 1) * SIDE
        return slope * (pixels - 1) / 250

    box = params.box
    np.testing.assert_allclose(side(0, 2, width), box[:, 2], atol=4)
    np.testing.assert_allclose(side(1, 1, height), box[:, 3], atol=4)
    area = side(0, 2, width) * side(1, 1, height) / (width * height)
    ratio = side(0, 2, width) / side(1, 1, height)
    # RandomResizedCrop: areas uniform in 0.08 ... 1 and ratios log-uniform in 3/4 ... 4/3, where the crop fits.
    assert area.min() > 0.06 and area.max() < 1.03 and abs(area.mean() - (box[:, 2] * box[:, 3]).mean() / 6e4) < 0.01
    assert ratio.min() > 0.68 and ratio.max() < 1.45
    assert abs(np.log(ratio).mean() - np.log(box[:, 2] / box[:, 3]).mean()) < 0.01


@pytest.mark.parametrize("shift", [-0.2, -0.1, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("maker", MAKERS)
def test_hue_turns_as_far_as_torchvisions(maker, shift, photos):
    """Circular mean of the hue's change over coloured pixels."""
    policy = policy_of(jitter=1)
    params = draw_views(policy, seed=0, epoch=0, indices=np.arange(COUNT), sizes=photos.sizes, views=VIEWS)
    plain, turned = (
        made(maker, policy, photos, params._replace(factors=np.tile([1.0, 1.0, 1.0, h], (len(params.flip), 1))))
        for h in (0.0, shift)
    )
    pixels = np.stack((plain.reshape(-1, 3), turned.reshape(-1, 3)), axis=1)[::97] / 255
    hsv = np.array([[colorsys.rgb_to_hsv(*p) for p in pair.clip(0, 1)] for pair in pixels])
    coloured = (hsv[:, 0, 1] > 0.25) & (hsv[:, 0, 2] > 0.2) & (hsv[:, 1, 1] > 0.1)
    change = hsv[coloured, 1, 0] - hsv[coloured, 0, 0]
    found = np.angle(np.exp(2j * np.pi * change).mean()) / (2 * np.pi)
    assert coloured.sum() > 300
    assert found == pytest.approx(shift, abs=0.015)


# -- the matrices ----------------------------------------------------------------------------------------------------


def one_by_one(x: np.ndarray, params: ViewParams, i: int) -> np.ndarray:
    """The operations of view i in turn, by their definitions, clipped after each; hue as a rotation."""
    luma = np.array([0.299, 0.587, 0.114])
    for operation in params.order[i] if params.jitter[i] else ():
        f = params.factors[i, operation]
        if operation == 0:
            x = f * x
        elif operation == 1:
            x = f * x + (1 - f) * (x @ luma).mean()
        elif operation == 2:
            x = f * x + (1 - f) * (x @ luma)[:, None]
        else:
            axis, angle = np.ones(3) / np.sqrt(3), 2 * np.pi * f
            x = (
                x * np.cos(angle)
                + np.cross(axis, x) * np.sin(angle)
                + np.outer(x @ axis, axis) * (1 - np.cos(angle))
            )  # fmt: skip
        x = x.clip(0, 255)
    return np.repeat((x @ luma)[:, None], 3, axis=1) if params.grayscale[i] else x


def test_five_affine_maps_are_the_operations_in_their_order():
    policy = build_policy(AugmentConfig(grayscale=0.3), SIDE)
    params = draw_views(policy, seed=1, epoch=0, indices=np.arange(200), sizes=np.full((200, 2), 50), views=1)
    A, b = (array.astype(float) for array in dali_graph.color_maps(params))
    rng = np.random.default_rng(0)
    for i in range(200):
        x = y = rng.uniform(0, 255, (37, 3))
        for k in range(5):
            y = (y @ A[i, k].T + b[i, k] @ y.mean(axis=0)).clip(0, 255)
        np.testing.assert_allclose(y, one_by_one(x, params, i), atol=2e-3)


def test_a_third_of_the_circle_moves_red_to_green_to_blue():
    factors = np.array([[1.0, 1.0, 1.0, 1 / 3]])
    yes, no = np.array([True]), np.array([False])
    params = ViewParams(
        box=np.array([[0, 0, 1, 1]]), flip=no, jitter=yes, factors=factors, order=np.array([[0, 1, 2, 3]]),
        grayscale=no, sigma=np.array([0.0]), solarize=no,
    )  # fmt: skip
    A, b = dali_graph.color_maps(params)
    np.testing.assert_allclose(A[0, 3], np.roll(np.eye(3), 1, axis=0), atol=1e-6)
    np.testing.assert_allclose(A[0, [0, 1, 2, 4]], np.tile(np.eye(3), (4, 1, 1)), atol=1e-6)
    np.testing.assert_allclose(b, 0, atol=1e-6)


def test_a_graph_takes_only_what_its_policy_needs():
    assert dali_graph.used_fields(policy_of()) == ["low", "high", "mirror"]
    assert dali_graph.used_fields(policy_of(blur=0.5, jitter=0.8)) == [
        "low", "high", "matrices", "weights", "window", "sigma", "mirror",
    ]  # fmt: skip
    assert dali_graph.used_fields(policy_of(solarize=0.1, grayscale=1)) == [
        "low", "high", "matrices", "weights", "mirror", "solarize",
    ]  # fmt: skip


def test_the_graph_of_a_gpu_can_be_defined_on_any_machine():
    """Names and devices of its operators are checked when they are called; only building needs a GPU."""
    from nvidia.dali import Pipeline

    policy = build_policy(AugmentConfig(solarize=0.2), 224)
    with Pipeline(batch_size=4, num_threads=1, device_id=0, exec_dynamic=True):
        views = dali_graph.outputs_of(
            policy, lambda i: [], views=2, device_id=0, sizes=np.array([[500, 20_000], [30, 40]])
        )
        (images,) = dali_graph.outputs_of(policy, lambda i: [], views=0, device_id=0, sizes=np.array([[500, 500]]))
    assert [view.device for view in (*views, images)] == ["gpu"] * 3


def test_without_dali_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(dali_graph.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"data\.loader: dali is not installed; pip install nvidia-dali-cuda130"):
        dali_graph.require_dali()
