"""Corruptions: the same bytes whatever the batch, severities in order, and each kind what its name says."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from engine import corruptions
from engine.corruptions import CORRUPTIONS, KINDS, SEVERITIES, corrupt
from kernels import native
from kernels.philox import philox_uniforms
from pictures import noise, photos, smooth

NOISE, BLUR, WEATHER, DIGITAL = (
    [name for name, group in CORRUPTIONS.items() if group == of] for of in ("noise", "blur", "weather", "digital")
)
FIXED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg"}  # without random numbers
DRAWN = [name for name in CORRUPTIONS if name not in FIXED]


def flat(value, height=40, width=33, n=1) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, np.uint8), (n, height, width, 3)).copy()


def errors(found, images) -> np.ndarray:
    """[n] mean squared errors."""
    return ((found.astype(float) - images) ** 2).mean(axis=(1, 2, 3))


def edges(images) -> float:
    """Mean squared difference between neighbours."""
    x = images.astype(float)
    return float((np.diff(x, axis=1) ** 2).mean() + (np.diff(x, axis=2) ** 2).mean())


def level(name, severity) -> float:
    return KINDS[name].levels[severity - 1]


def test_fifteen_kinds_in_four_groups():
    assert [len(group) for group in (NOISE, BLUR, WEATHER, DIGITAL)] == [3, 4, 4, 4]
    assert len(CORRUPTIONS) == 15
    assert all(len(kind.levels) == len(SEVERITIES) for kind in KINDS.values())


# The same bytes.


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_the_same_way_in_any_batch(name, monkeypatch):
    images = np.concatenate((photos(37, 45), photos(37, 45)[:, ::-1]))
    before = images.copy()
    together = corrupt(images, name, 3, seed=5, first=100)
    assert (together.dtype, together.shape) == (np.uint8, images.shape)
    np.testing.assert_array_equal(images, before)
    for size in (1, 3, 7):
        parts = [corrupt(images[i : i + size], name, 3, seed=5, first=100 + i) for i in range(0, 10, size)]
        np.testing.assert_array_equal(np.concatenate(parts), together)
    monkeypatch.setattr(corruptions, "PART", 37 * 45 * 4)  # within a call too
    np.testing.assert_array_equal(corrupt(images, name, 3, seed=5, first=100), together)
    strided = np.asfortranarray(images[::-1])[::-1]
    np.testing.assert_array_equal(corrupt(strided, name, 3, seed=5, first=100), together)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_draws_depend_on_seed_and_index(name):
    image = photos(32, 32)[:1]
    first = corrupt(image, name, 4, seed=0)
    others = [corrupt(image, name, 4, seed=1), corrupt(image, name, 4, seed=0, first=1)]
    others.append(corrupt(np.repeat(image, 2, axis=0), name, 4, seed=0)[1:])
    assert [bool((other != first).any()) for other in others] == [name in DRAWN] * 3


def test_kinds_draw_apart_from_each_other_and_from_views(monkeypatch):
    keys = []

    def uniforms(key, counters, *, stream, count):
        keys.append((*key, stream))
        return philox_uniforms(key, counters, stream=stream, count=count)

    monkeypatch.setattr(corruptions, "philox_uniforms", uniforms)
    for name in DRAWN:
        corrupt(photos(32, 32), name, 1, seed=6)
    assert len(set(keys)) == len(keys) == len(DRAWN)
    assert {(seed, stream) for seed, _, stream in keys} == {(6, corruptions.STREAM)}
    assert corruptions.STREAM not in (0, 1)  # views and orders


@pytest.mark.skipif(native.core is None, reason=native.missing)
@pytest.mark.parametrize("name", DRAWN)
def test_the_same_without_the_native_core(name, monkeypatch):
    images = photos(33, 32)
    found = corrupt(images, name, 2, seed=2**63 - 1, first=2**40)
    monkeypatch.setattr(native, "core", None)
    np.testing.assert_array_equal(corrupt(images, name, 2, seed=2**63 - 1, first=2**40), found)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images(name):
    assert corrupt(np.zeros((0, 32, 40, 3), np.uint8), name, 1, seed=0).shape == (0, 32, 40, 3)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (1, 1), (5, 70)])
def test_extremes_stay_numbers(name, height, width):
    board = 255 * (np.indices((height, width)).sum(axis=0) % 2)[..., None].repeat(3, axis=-1).astype(np.uint8)
    images = np.stack((*flat(0, height, width), *flat(255, height, width), board, noise(height, width)))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for severity in SEVERITIES:
            assert corrupt(images, name, severity, seed=0).shape == images.shape


# Severities and sizes.


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 50)])
def test_each_severity_is_stronger(name, height, width):
    images = photos(height, width)
    found = np.stack([errors(corrupt(images, name, s, seed=1), images) for s in SEVERITIES])  # [5, n]
    assert (found[0] > 1.0).all()
    assert (np.diff(found, axis=0) > 0).all(), found
    # No step is idle: each has at least a seventh more error than the one before.
    assert (np.diff(np.log(found.mean(axis=1))) > math.log(8 / 7)).all(), found.mean(axis=1)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "jpeg"])  # its blocks are 8 px
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_images_are_hurt_alike_at_two_sizes(name, severity):
    # Nothing in them is finer than the small size shows.
    coarse = [Image.fromarray(photo) for photo in photos(12, 15)]
    hurt = []
    for height, width in ((32, 40), (160, 200)):
        images = np.stack([np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in coarse])
        hurt.append(errors(corrupt(images, name, severity, seed=3), images).mean())
    assert 0.6 < hurt[1] / hurt[0] < 1.3, hurt


# What the names say: noise.


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_gaussian_noise_has_the_tables_deviation(severity):
    e = (corrupt(flat(128, 61, 67, n=9), "gaussian_noise", severity, seed=0) - 128.0) / 255
    sigma, count = level("gaussian_noise", severity), e.size
    assert e.std() == pytest.approx(sigma, rel=0.02)
    assert abs(e.mean()) < 4 * sigma / math.sqrt(count)
    assert (e**4).mean() / e.std() ** 4 == pytest.approx(3.0, abs=0.1)
    # Independent between channels, neighbours, images and the two halves that share uniforms.
    pairs = [(e[..., 0], e[..., 1]), (e[:, 1:], e[:, :-1]), (e[1:], e[:-1])]
    half = e.reshape(9, -1)[:, : 3 * 61 * 67 // 2]
    pairs.append((half, e.reshape(9, -1)[:, -half.shape[1] :]))
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)


@pytest.mark.parametrize("value", [0, 1, 64, 200])
@pytest.mark.parametrize("severity", [3, 5])
def test_shot_noise_counts_photons(value, severity):
    photons = level("shot_noise", severity)
    found = corrupt(flat(value, 60, 70, n=5), "shot_noise", severity, seed=0)
    mean, count = photons * value / 255, found.size
    for k in range(int(photons)):
        expected = math.exp(-mean + (k * math.log(mean) if mean else 0.0 if k == 0 else -math.inf) - math.lgamma(k + 1))
        share = (found == round(255 * k / photons)).mean()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count) + 1e-9, k


def test_shot_noise_deviates_by_the_root_of_the_light():
    dark, light = (corrupt(flat(v, 60, 70, n=3), "shot_noise", 1, seed=0).astype(float) for v in (40, 160))
    assert light.std() / dark.std() == pytest.approx(2.0, rel=0.03)
    assert light.mean() == pytest.approx(160, abs=0.5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share_of_the_pixels(severity):
    images = flat((100, 120, 140), 60, 71, n=8)
    found, p = corrupt(images, "impulse_noise", severity, seed=0), level("impulse_noise", severity)
    black, white = ((found == value).all(axis=-1) for value in (0, 255))
    for hit in (black, white):
        assert abs(hit.mean() - p / 2) < 4 * math.sqrt(p / 2 / hit.size)
    np.testing.assert_array_equal(found[~(black | white)], images[~(black | white)])


def test_severities_share_their_draws():
    images = photos(40, 32)
    before = None
    for severity in SEVERITIES:
        found = corrupt(images, "impulse_noise", severity, seed=0)
        if before is not None:
            hit = (before != images).any(axis=-1)
            np.testing.assert_array_equal(found[hit], before[hit])
        before = found


# Blur.


@pytest.mark.parametrize("name", [*BLUR, "elastic", "pixelate", "contrast"])
@pytest.mark.parametrize("severity", [1, 5])
def test_what_is_flat_stays_as_it_is(name, severity):
    colours = np.stack((np.arange(256), np.roll(np.arange(256), 85), np.arange(256)[::-1]), axis=-1)
    if name == "contrast":
        colours = colours[:, :1].repeat(3, axis=1)
    images = np.ones((256, 13, 18, 3), np.uint8) * colours[:, None, None].astype(np.uint8)
    np.testing.assert_array_equal(corrupt(images, name, severity, seed=0), images)


@pytest.mark.parametrize("name", BLUR)
@pytest.mark.parametrize("make", [photos, lambda h, w: noise(h, w)[None]])
def test_blurs_take_what_is_fine(name, make):
    images = make(48, 60)
    left = [edges(images), *(edges(corrupt(images, name, s, seed=0)) for s in SEVERITIES)]
    assert left == sorted(left, reverse=True)
    assert left[1] < 0.85 * left[0]
    assert left[5] < 0.3 * left[0]


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur"])  # glass hides and repeats, a zoom enlarges
def test_blurs_keep_the_light(name):
    images = np.zeros((3, 64, 80, 3), np.uint8)
    images[:, 24:40, 30:50] = 200
    found = corrupt(images, name, 3, seed=0)
    assert found.mean(axis=(1, 2, 3)) == pytest.approx(images.mean(axis=(1, 2, 3)), rel=0.01)


@pytest.mark.parametrize("severity", [1, 4])
def test_defocus_is_the_mean_over_a_disc(severity):
    images = photos(40, 50)
    radius, reach = math.sqrt((level("defocus_blur", severity) * 40) ** 2 - 1 / 3), 5
    at = (np.arange((2 * reach + 1) * 40) + 0.5) / 40 - reach - 0.5
    disc = (at[:, None] ** 2 + at**2 < radius**2).reshape(2 * reach + 1, 40, 2 * reach + 1, 40).mean(axis=(1, 3))
    padded = np.pad(images.astype(float), ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    expected = (
        sum(disc[i, j] * padded[:, i : i + 40, j : j + 50] for i in range(2 * reach + 1) for j in range(2 * reach + 1))
        / disc.sum()
    )
    assert np.abs(corrupt(images, "defocus_blur", severity, seed=0) - expected).max() < 1.5


def orientation(image) -> tuple[float, float]:
    """Ratio of the larger to the smaller eigenvalue of the structure tensor, and the smaller's direction in degrees."""
    y, x = (g.ravel() for g in np.gradient(image[4:-4, 4:-4].astype(float).mean(axis=-1)))
    values, vectors = np.linalg.eigh([[x @ x, x @ y], [x @ y, y @ y]])
    return values[1] / values[0], math.degrees(math.atan2(vectors[1, 0], vectors[0, 0])) % 180


def test_motion_has_a_direction_of_the_images_own():
    images = noise(64, 64)[None].repeat(12, axis=0)
    moved = [orientation(image) for image in corrupt(images, "motion_blur", 4, seed=0)]
    still = [orientation(image) for image in corrupt(images, "defocus_blur", 4, seed=0)]
    assert min(ratio for ratio, _ in moved) > 4 > 1.5 > max(ratio for ratio, _ in still)
    directions = [direction for _, direction in moved]
    assert sum(direction < 90 for direction in directions) in range(2, 11)
    assert np.ptp(directions) > 90


def test_zoom_keeps_rays_and_blurs_rings():
    y, x = np.mgrid[:65, :65] - 32.0
    rays, rings = 6 * np.arctan2(y, x), np.hypot(x, y)
    images = np.stack([128 + 100 * np.sin(phase) for phase in (rays, rings)])[..., None].repeat(3, axis=-1)
    images = images.round().astype(np.uint8)
    found = corrupt(images, "zoom_blur", 3, seed=0)
    outer = np.hypot(x, y) > 12
    error = ((found.astype(float) - images) ** 2)[:, outer].mean(axis=(1, 2))
    assert error[0] < 0.05 * error[1]
    np.testing.assert_array_equal(found[:, 32, 32], images[:, 32, 32])  # the middle stays


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_is_the_mean_over_its_range(severity):
    ramp = np.broadcast_to(4 * np.arange(61, dtype=np.uint8)[:, None], (1, 45, 61, 3))
    excess = level("zoom_blur", severity)
    zooms = np.linspace(1, 1 + excess, 2 + int(excess * 61 / 2))  # the border's pixels move by one at a time
    slope = (1 / zooms).mean()
    assert slope == pytest.approx(math.log(1 + excess) / excess, rel=0.01)
    found = corrupt(ramp, "zoom_blur", severity, seed=0)
    assert np.abs(found - (120 + slope * (ramp.astype(float) - 120))).max() < 0.501


def test_glass_shifts_neighbours_apart():
    images = np.repeat(smooth(64, 64)[None], 2, axis=0)
    by_glass, by_lens = (
        corrupt(images, name, 4, seed=0).astype(float) - images for name in ("glass_blur", "defocus_blur")
    )
    # A blur leaves the inside of a gradient as it is, a shift does not.
    inside = (slice(None), slice(12, -12), slice(12, -12))
    assert by_lens[inside].std() < 0.6 < 1.5 < by_glass[inside].std()
    assert abs(np.corrcoef(by_glass[inside][0].ravel(), by_glass[inside][1].ravel())[0, 1]) < 0.2


# Weather.


@pytest.mark.parametrize("name", ["snow", "frost", "fog", "brightness"])
def test_weather_adds_light(name):
    images = photos(48, 40)
    means = [images.mean(), *(corrupt(images, name, s, seed=0).mean() for s in SEVERITIES)]
    assert (np.diff(means) > 1).all(), means


def test_snow_falls_on_its_share_and_never_darkens():
    images = flat((20, 60, 110), 64, 80, n=4)
    for severity in (1, 3):
        found = corrupt(images, "snow", severity, seed=0)
        assert (found >= images).all()
        touched = (found > images).any(axis=-1).mean()
        share = level("snow", severity)
        assert 1.5 * share < touched < 12 * share  # a flake is drawn out over some cells
        assert (found > 200).all(axis=-1).any()


def test_fog_is_smooth_and_takes_contrast():
    images = photos(64, 64)
    spread = [
        images.std(axis=(1, 2)).mean(),
        *(corrupt(images, "fog", s, seed=0).std(axis=(1, 2)).mean() for s in SEVERITIES),
    ]
    assert (np.diff(spread) < 0).all()
    veil = corrupt(flat(40, 64, 64, n=3), "fog", 3, seed=0)
    assert np.ptp(veil, axis=(1, 2)).min() > 20  # thicker here than there
    assert edges(veil) < 0.05 * 2 * veil.astype(float).var()
    depth = -np.log1p(-(veil[..., 0] - 40.0) / (0.88 * 255 - 40.0)).mean()
    assert depth == pytest.approx(level("fog", 3), rel=0.1)


def test_frost_grows_from_the_borders_and_is_bluish():
    change = (corrupt(flat(60, 60, 80, n=12), "frost", 3, seed=0) - 60.0).mean(axis=0)
    assert change.min() >= 0
    middle, border = change[20:40, 27:53].mean(), np.concatenate((change[:6], change[-6:])).mean()
    assert border > 2 * middle > 0
    red, green, blue = change.mean(axis=(0, 1))
    assert red < green < blue


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_is_exposure(severity):
    images = photos(32, 45)
    expected = np.minimum(255, images * 2.0 ** level("brightness", severity))
    assert np.abs(corrupt(images, "brightness", severity, seed=0) - expected).max() < 0.501


# Digital.


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_the_mean(severity):
    images = photos(50, 40)
    found = corrupt(images, "contrast", severity, seed=0)
    assert found.mean(axis=(1, 2, 3)) == pytest.approx(images.mean(axis=(1, 2, 3)), abs=0.25)
    share = found.std(axis=(1, 2, 3)) / images.std(axis=(1, 2, 3))
    assert share == pytest.approx(np.full(5, level("contrast", severity)), rel=0.01)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_elastic_moves_pixels_smoothly_and_not_too_far(severity):
    y, x = np.mgrid[:60, :84]
    images = np.stack((3 * x, 4 * y, 0 * x), axis=-1)[None].repeat(6, axis=0).astype(np.uint8)  # colours are places
    found = corrupt(images, "elastic", severity, seed=0).astype(float)
    across, down = found[..., 0] / 3 - x, found[..., 1] / 4 - y
    reach = level("elastic", severity) * 60
    inside = slice(math.ceil(reach), -math.ceil(reach))  # the others may show the border
    for shift in (across[:, inside, inside], down[:, inside, inside]):
        assert 0.5 * reach < np.abs(shift).max() < reach + 0.2
        # Between the middles of two cells, 12 px apart, a shift changes by 2 reach at most, by 3 / 24 of that a pixel.
        assert max(np.abs(np.diff(shift, axis=axis)).max() for axis in (1, 2)) < 2 * reach / 8 + 0.4
    assert abs(np.corrcoef(across.ravel(), down.ravel())[0, 1]) < 0.4


def test_elastic_keeps_the_histogram_roughly():
    images = photos(64, 64)
    found = corrupt(images, "elastic", 3, seed=0)
    moved = np.abs(found.astype(float) - images).mean()
    histogram = np.abs(np.sort(found.reshape(5, -1)).astype(float) - np.sort(images.reshape(5, -1))).mean()
    assert histogram < 0.35 * moved


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_gives_the_means_of_blocks(severity):
    images = photos(33, 50)
    found, blocks = corrupt(images, "pixelate", severity, seed=0), int(level("pixelate", severity))
    down, across = (np.arange(side) * count // side for side, count in ((33, blocks), (50, round(blocks * 50 / 33))))
    assert down.max() + 1 == blocks
    for row in range(blocks):
        for column in range(across.max() + 1):
            inside = np.ix_(range(5), down == row, across == column)
            mean = images[inside].astype(float).mean(axis=(1, 2), keepdims=True)
            assert np.abs(found[inside] - mean).max() < 0.501


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_pillows(severity):
    images = photos(30, 41)
    for image, found in zip(images, corrupt(images, "jpeg", severity, seed=0), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(level("jpeg", severity)))
        np.testing.assert_array_equal(found, np.asarray(Image.open(file)))


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "rain"}, r"name: one of gaussian_noise, .*, jpeg is expected, found 'rain'"),
        ({"severity": 0}, r"severity: a whole number from 1 to 5 is expected, found 0"),
        ({"severity": 6}, r"severity: .*found 6"),
        ({"severity": 2.0}, r"severity: .*found 2.0"),
        (
            {"images": np.zeros((2, 8, 8, 3), np.float32)},
            r"images: a uint8 array is expected, found float32 \[2, 8, 8, 3\]",
        ),
        ({"images": [[1]]}, r"images: a uint8 array is expected, found list"),
        ({"images": np.zeros((8, 8, 3), np.uint8)}, r"images: \[n, H, W, 3\] is expected, found uint8 \[8, 8, 3\]"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"images: \[n, H, W, 3\] .*\[2, 3, 8, 8\]"),
        ({"images": np.zeros((2, 0, 8, 3), np.uint8)}, r"images: \[n, H, W, 3\] .*\[2, 0, 8, 3\]"),
        ({"seed": -1}, r"seed: .*found -1"),
        ({"seed": 2**63}, r"seed: .*found 9223372036854775808"),
        ({"first": -1}, r"first: .*found -1"),
        ({"first": 2**63 - 1}, r"first: .*found 9223372036854775807"),
    ],
)
def test_mistakes_are_named(changes, message):
    settings = {"images": np.zeros((2, 8, 8, 3), np.uint8), "name": "snow", "severity": 1, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message):
        corrupt(settings.pop("images"), settings.pop("name"), settings.pop("severity"), **settings)
