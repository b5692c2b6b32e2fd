"""Views in one call against Pillow's, operation by operation and all together: the same pixels."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.data.augment import UNIFORMS, build_policy, uniforms
from engine.data_config import AugmentConfig
from kernels import augment_views, native
from pictures import exact, mixed, noise, pillows, plain, smooth

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "imagewoof320-mini.tar"
CAPABILITIES = ["default", "avx2", "avx512"]

pytestmark = pytest.mark.skipif(native.core is None, reason=native.missing)


def made(images, source, params, size) -> np.ndarray:
    """The bytes of the views [m, S, S, 3]."""
    views = augment_views(images, source=source, **params._asdict(), size=size, mean=(0, 0, 0), std=(1 / 255,) * 3)
    pixels = views.permute(0, 2, 3, 1).numpy()
    assert pixels.flags.c_contiguous and (pixels == np.rint(pixels)).all()
    return pixels


def check(images, source, params, size):
    np.testing.assert_array_equal(made(images, source, params, size), pillows(images, source, params, size))


# -- against Pillow


@exact
@pytest.mark.parametrize("size", [1, 2, 5, 31, 32, 33, 96, 224])
def test_resizes_of_ragged_images(size):
    sizes = [(1, 1), (1, 9), (9, 1), (3, 400), (400, 3), (5, 2), (64, 64), (63, 65), (224, 224), (301, 257), (257, 301)]
    images = [noise(*hw) for hw in sizes] + [smooth(*hw) for hw in sizes]
    box = [(0, 0, image.shape[1], image.shape[0]) for image in images]
    check(images, range(len(images)), plain(box), size)
    check(images, range(len(images)), plain(box, flip=np.ones(len(box), bool)), size)


@exact
def test_resizes_of_large_images():
    images = [noise(3000, 2000), noise(40, 3000), noise(3000, 40)]
    check(images, range(3), plain([(0, 0, 2000, 3000), (0, 0, 3000, 40), (0, 0, 40, 3000)]), 224)
    white = [np.full((sides[0], sides[1], 3), 255, np.uint8) for sides in ((40_000, 1), (1, 40_000))]
    check(white, range(2), plain([(0, 0, 1, 40_000), (0, 0, 40_000, 1)]), 1)


@exact
def test_either_order_of_passes():
    """Pillow 13 resizes along columns first where those shrink more than twice as much; on either side of that."""
    image = noise(260, 200)
    sides = [(w, h) for w in (8, 31, 32, 33, 40, 64, 100, 146) for h in (31, 32, 33, 34, 35, 48, 49, 96, 97, 168, 260)]
    check([image], [0] * len(sides), plain([(3, 0, w, h) for w, h in sides]), 32)


@exact
def test_crops_at_borders():
    box = [(0, 0, 1, 1), (89, 0, 1, 1), (0, 69, 1, 1), (89, 69, 1, 1), (0, 0, 45, 70), (45, 0, 45, 70), (0, 35, 90, 35),
           (88, 0, 2, 70), (0, 68, 90, 2)]  # fmt: skip
    check([noise(70, 90)], [0] * len(box), plain(box), 40)


@exact
@pytest.mark.parametrize("image", [noise(80, 80), smooth(80, 80)], ids=["noise", "smooth"])
@pytest.mark.parametrize("operation", range(4))
def test_colours(image, operation):
    values = np.linspace(-0.5, 0.5, 101) if operation == 3 else np.array([0, 1e-6, 0.2, 0.77, 1, 1.3, 2, 40, -1, 3e8])
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (len(values), 1))
    factors[:, operation] = values
    box = [(0, 0, 80, 80)] * len(values)
    check([image], [0] * len(values), plain(box, factors=factors, jitter=np.ones(len(values), bool)), 80)


@exact
@pytest.mark.slow
@pytest.mark.parametrize("hue", [0.0, 0.17, -0.5])
def test_hue_of_every_colour(hue):
    every = np.arange(1 << 24, dtype=np.uint32).reshape(16, 1024, 1024)
    for part in every:
        image = np.stack((part >> 16, part >> 8, part), axis=-1).astype(np.uint8)
        params = plain([(0, 0, 1024, 1024)], factors=np.array([[1, 1, 1, hue]]), jitter=np.ones(1, bool))
        check([image], [0], params, 1024)


@exact
def test_grey_and_solarised():
    ones = np.ones(1, bool)
    for changes in ({"grayscale": ones}, {"solarize": ones}, {"grayscale": ones, "solarize": ones}):
        check([noise(50, 50)], [0], plain([(0, 0, 50, 50)], **changes), 50)


@exact
@pytest.mark.parametrize("size", [1, 2, 3, 17, 64])
def test_blurs(size):
    sigma = np.array([1e-3, 0.1, 0.3, 0.7, 1.0, 1.4, 1.42, 1.9, 2.0, 2.45, 3.0, 7.7, 30.0, 1000.0])
    image, box = noise(size, size), [(0, 0, size, size)] * len(sigma)
    check([image], [0] * len(sigma), plain(box, sigma=sigma), size)
    check([image], [0] * len(sigma), plain(box, sigma=sigma, grayscale=np.ones(len(sigma), bool)), size)


@exact
@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1), sigma=st.floats(0.01, 20.0),
)  # fmt: skip
def test_anything(height, width, size, seed, sigma):
    rng = np.random.default_rng(seed)
    source, params = mixed(4, [(height, width)], rng, largest_sigma=sigma + 0.05)
    check([noise(height, width, seed)], source, params, size)


@exact
@pytest.mark.skipif(not PHOTOS.exists(), reason="the photos are not on this machine")
def test_real_photos():
    with tarfile.open(PHOTOS) as tar:
        names = [name for name in tar.getnames() if name.lower().endswith((".jpeg", ".jpg", ".png"))][::40]
        pictures = [Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGB") for name in names]
    policy, views = build_policy(AugmentConfig(), 224), 2
    source = np.repeat(np.arange(len(pictures)), views)
    width, height = np.array([picture.size for picture in pictures], dtype=float)[source].T
    params = policy.draw(
        np.concatenate([uniforms(3, 0, np.array([i]), views)[:, 0] for i in range(len(pictures))]), width, height
    )
    mean, std = policy.statistics
    images = [np.asarray(picture) for picture in pictures]
    found = augment_views(images, source=source, **params._asdict(), size=224, mean=mean, std=std)
    pixels = torch.from_numpy(pillows(images, source, params, 224)).permute(0, 3, 1, 2).double()
    wanted = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert (found - wanted).abs().max() < 1e-6


# -- however it is called


def a_call(**changes):
    sizes = [(60, 80), (33, 20), (100, 100)]
    source, params = mixed(9, sizes, np.random.default_rng(1))
    arguments = {
        "images": [noise(*hw) for hw in sizes], "source": source, **params._asdict(), "size": 40,
        "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4),
    }  # fmt: skip
    arguments.update(changes)
    return arguments


def test_strides_and_no_views():
    views = augment_views(**a_call())
    assert views.shape == (9, 3, 40, 40) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    none = a_call(images=[], **{name: value[:0] for name, value in a_call().items() if isinstance(value, np.ndarray)})
    assert augment_views(**none).shape == (0, 3, 40, 40)


def test_tensors_lists_and_other_widths():
    wanted = augment_views(**a_call())
    call = a_call()
    call["images"] = [torch.from_numpy(image.copy()) for image in call["images"]]
    call = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in call.items()}
    assert torch.equal(augment_views(**call), wanted)
    call = a_call()
    call = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in call.items()}
    assert torch.equal(augment_views(**call), wanted)
    narrow = {name: a_call()[name].astype(np.int32) for name in ("source", "box", "order")}
    assert torch.equal(augment_views(**a_call(**narrow)), wanted)
    every_second = {"box": np.repeat(a_call()["box"], 2, axis=0)[::2]}
    assert torch.equal(augment_views(**a_call(**every_second)), wanted)
    factors = a_call()["factors"].astype(np.float32)
    single = augment_views(**a_call(factors=factors))
    assert torch.equal(single, augment_views(**a_call(factors=torch.from_numpy(factors).double())))


def test_read_only_images_are_not_warned_of(recwarn):
    call = a_call()
    for image in call["images"]:
        image.flags.writeable = False
    augment_views(**call)
    assert not recwarn


def test_views_go_where_they_are_asked_to():
    out = torch.full((9, 3, 40, 40), torch.nan).contiguous(memory_format=torch.channels_last)
    version = out._version
    assert augment_views(**a_call(out=out)) is out
    assert torch.equal(out, augment_views(**a_call())) and out._version > version


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(augment_views(**a_call()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def digest() -> str:
    """Of views of many sizes with everything in them."""
    rng, sizes, sums = np.random.default_rng(5), [(60, 80), (333, 20), (100, 400)], hashlib.sha256()
    for size in (7, 32, 100):
        source, params = mixed(40, sizes, rng)
        views = augment_views(
            [noise(*hw) for hw in sizes], source=source, **params._asdict(), size=size, mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )  # fmt: skip
        sums.update(views.permute(0, 2, 3, 1).numpy().tobytes())
    return sums.hexdigest()


def test_instruction_sets_agree_to_the_bit():
    highest = torch.backends.cpu.get_cpu_capability().lower()
    here = CAPABILITIES[: CAPABILITIES.index(highest) + 1] if highest in CAPABILITIES else ["default"]
    places = [str(folder) for folder in (ROOT, ROOT / "tests", Path(__file__).parent)]
    program = f"import sys; sys.path[:0] = {places}; import test_augment as t; "
    for capability in here:
        done = subprocess.run(
            [sys.executable, "-c", program + "print(t.digest())"], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [digest()], capability


# -- what is refused


def changed(name, i, value):
    array = np.array(a_call()[name])
    array[i] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [noise(5, 5).astype(np.int16)] * 3}, r"images\[0\]: uint8 is expected, found int16"),
        ({"images": [torch.zeros(5, 5, 3)] * 3}, r"images\[0\]: uint8 is expected, found float32"),
        ({"images": [noise(5, 5)[..., 0]] * 3}, r"images\[0\]: \[height, width, 3\] is expected, found \[5, 5\]"),
        ({"images": [np.zeros((5, 5, 4), np.uint8)] * 3}, r"images\[0\]: \[height, width, 3\] is expected, found"),
        ({"images": [np.zeros((0, 5, 3), np.uint8)] * 3}, r"images\[0\]: \[height, width, 3\] is expected, found"),
        ({"images": [noise(5, 9)[:, ::2]] * 3}, r"images\[0\]: contiguous pixels are expected"),
        ({"images": [b"JPEG"]}, r"images\[0\]: a uint8 tensor or array is expected, found bytes"),
        ({"images": [torch.zeros(5, 5, 3, dtype=torch.uint8, device="meta")]}, r"images\[0\]: a dense CPU tensor"),
        ({"images": [torch.zeros(5, 5, 3, dtype=torch.bfloat16)]}, r"images\[0\]: torch.bfloat16 is not supported"),
        (changed("source", 4, 3), r"source\[4\]: one of 3 images is expected, found 3"),
        (changed("source", 4, -1), r"source\[4\]: one of 3 images is expected, found -1"),
        ({"source": np.zeros((9, 1), int)}, r"source: shape \[m\] is expected, found \[9, 1\]"),
        ({"source": np.zeros(9)}, r"source: whole numbers are expected, found float64"),
        ({"source": np.zeros(8, int)}, r"box: shape \[8, 4\] is expected, found \[9, 4\]"),
        (changed("box", (2, 2), 0), r"box\[2\]: left \d+, top \d+, 0 x \d+ px is not inside of an image of"),
        (changed("box", (2, 0), -1), r"box\[2\]: left -1, top"),
        (changed("box", (2, 3), 101), r"box\[2\]: left"),
        (changed("box", (2, 1), 2**63 - 1), r"box\[2\]: left"),
        (changed("box", (2, 2), 2**63 - 1), r"box\[2\]: left"),
        ({"box": np.zeros((9, 4))}, r"box: whole numbers are expected, found float64"),
        ({"flip": np.zeros(9, int)}, r"flip: True or False are expected, found int64"),
        ({"jitter": np.zeros(8, bool)}, r"jitter: shape \[9\] is expected, found \[8\]"),
        ({"grayscale": None}, r"grayscale: True or False are expected, found object"),
        ({"solarize": torch.zeros(9, dtype=torch.bool, device="meta")}, r"solarize: a dense CPU tensor is expected"),
        (changed("factors", (0, 1), np.nan), r"factors\[0\]: finite numbers are expected, found nan"),
        (changed("factors", (0, 0), np.inf), r"factors\[0\]: finite numbers are expected, found inf"),
        (changed("factors", (8, 3), 0.51), r"factors\[8\]: a hue from -0.5 to 0.5 is expected, found 0.51"),
        ({"factors": [["a"] * 4] * 9}, r"factors: numbers are expected, found <U1"),
        ({"factors": [[1.0], [1.0, 2.0]]}, r"factors: numbers are expected, found \[\[1.0\], \[1.0, 2.0\]\]"),
        (changed("order", (3, 0), 7), r"order\[3\]: 0, 1, 2 and 3 are expected, found \[7"),
        ({"order": np.zeros((9, 4), int)}, r"order\[0\]: 0, 1, 2 and 3 are expected, found \[0, 0, 0, 0\]"),
        (changed("sigma", 5, -0.1), r"sigma\[5\]: from 0 to 10000 is expected, found -0.1"),
        (changed("sigma", 5, np.nan), r"sigma\[5\]: from 0 to 10000 is expected, found nan"),
        ({"size": 0}, r"size: a whole number from 1 to 16384 is expected, found 0"),
        ({"size": 32.0}, r"size: a whole number from 1 to 16384 is expected, found 32.0"),
        ({"mean": (0.5,)}, r"mean: shape \[3\] is expected, found \[1\]"),
        ({"mean": (0.5, 0.5, np.nan)}, r"mean: finite numbers are expected, found \[0.5, 0.5, nan\]"),
        ({"std": (0.5, 0.5, 0)}, r"std: numbers > 0 are expected, found \[0.5, 0.5, 0.0\]"),
        ({"out": torch.zeros(9, 3, 40, 40)}, r"out: a float32 CPU tensor of .* with channels_last strides"),
        ({"out": np.zeros((9, 3, 40, 40))}, r"out: a tensor or None is expected, found ndarray"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        augment_views(**a_call(**changes))


@pytest.mark.gpu
def test_a_gpus_images_are_refused():
    with pytest.raises(ValueError, match=r"images\[0\]: a dense CPU tensor is expected, found .* on cuda:0"):
        augment_views(**a_call(images=[torch.zeros(5, 5, 3, dtype=torch.uint8, device="cuda")] * 3))


def test_a_batch_as_one_tensor():
    images = torch.from_numpy(np.stack([noise(30, 26, seed) for seed in range(3)]))
    source, params = mixed(9, [(30, 26)] * 3, np.random.default_rng(2))
    call = {"source": source, **params._asdict(), "size": 20, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    wanted = augment_views(list(images), **call)
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for batch in (images, strided, torch.cat((images, images[..., :1]), dim=3)):
        torch.testing.assert_close(augment_views(batch, **call), wanted, rtol=0, atol=1e-6)
    half = augment_views(images, **call, dtype=torch.float16)
    assert half.dtype == torch.float16 and (half.float() - wanted).abs().max() < 5e-3
    none = {name: value[:0] for name, value in call.items() if isinstance(value, np.ndarray)}
    assert augment_views(images, **{**call, **none, "source": []}).shape == (0, 3, 20, 20)


def test_without_the_core(monkeypatch):
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "missing", "kernels._native is not built (no compiler)")
    with pytest.raises(RuntimeError, match=r"augment_views: kernels._native is not built \(no compiler\)"):
        augment_views(**a_call())


def test_the_policys_parameters_fit():
    policy = build_policy(AugmentConfig(), 32)
    params = policy.draw(np.random.default_rng(0).random((2, UNIFORMS)), np.full(2, 40.0), np.full(2, 30.0))
    mean, std = policy.statistics
    views = augment_views([noise(30, 40)], source=[0, 0], **params._asdict(), size=32, mean=mean, std=std)
    assert views.shape == (2, 3, 32, 32)
