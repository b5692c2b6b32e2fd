"""The policy: the same distributions as torchvision's transforms, and the same pixels given the same parameters."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageFilter, ImageOps

from engine.data.augment import ORDERS, UNIFORMS, ViewParams, build_policy, permutation, uniforms
from engine.data_config import AugmentConfig

DRAWS = 20_000


def draws(policy, n=DRAWS, width=32.0, height=32.0, seed=0):
    u = np.random.default_rng(seed).random((n, UNIFORMS))
    return policy.draw(u, np.full(n, width), np.full(n, height))


def distance(one, other) -> float:
    """Kolmogorov-Smirnov: the largest difference of two empirical distributions."""
    one, other = np.sort(one), np.sort(other)
    every = np.concatenate((one, other))
    shares = [np.searchsorted(sample, every, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize(("width", "height"), [(32, 32), (500, 375), (90, 256)])
def test_crops_are_distributed_as_torchvisions(width, height):
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    box = draws(build_policy(AugmentConfig(), 32), width=width, height=height).box
    torch.manual_seed(0)
    crop = T.RandomResizedCrop(32, scale=scale, ratio=ratio)
    image = torch.empty(3, height, width)
    theirs = [crop.make_params([image]) for _ in range(DRAWS // 2)]
    for column, key in enumerate(("left", "top", "width", "height")):
        found = distance(box[:, column], np.array([p[key] for p in theirs]))
        assert found < 0.025, f"{key}: {found}"  # two samples of 20,000 and 10,000 differ by 0.02 in 1 of 100 cases
    assert (box[:, 0] + box[:, 2] <= width).all()
    assert (box[:, 1] + box[:, 3] <= height).all()
    assert box.min() >= 0


@pytest.mark.parametrize(("width", "height"), [(2000, 20), (20, 2000)])
def test_images_no_crop_fits_get_the_central_one(width, height):
    policy = build_policy(AugmentConfig(crop_scale=(0.9, 1.0)), 32)
    box = draws(policy, 50, width, height).box
    crop = T.RandomResizedCrop(32, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3))
    theirs = crop.make_params([torch.empty(3, height, width)])
    assert (box == box[0]).all()
    assert box[0].tolist() == [theirs["left"], theirs["top"], theirs["width"], theirs["height"]]


def test_colour_parameters_follow_the_preset():
    p = draws(build_policy(AugmentConfig(), 32))
    for share, expected in ((p.flip, 0.5), (p.jitter, 0.8), (p.grayscale, 0.2), (p.solarize, 0.0), (p.sigma > 0, 0.0)):
        assert abs(share.mean() - expected) < 0.012
    assert p.factors[:, :3].min() == pytest.approx(0.2, abs=1e-3)
    assert p.factors[:, :3].max() == pytest.approx(1.8, abs=1e-3)
    assert np.abs(p.factors[:, 3]).max() == pytest.approx(0.2, abs=1e-3)
    assert p.factors.mean(axis=0) == pytest.approx([1, 1, 1, 0], abs=0.01)
    counts = np.array([(p.order == order).all(axis=1).sum() for order in ORDERS])
    assert counts.sum() == DRAWS
    assert (np.abs(counts - DRAWS / 24) < 5 * (DRAWS / 24) ** 0.5).all()
    # every parameter has its own uniform number: no two of them move together
    columns = np.column_stack([p.flip, p.jitter, p.grayscale, p.factors, p.box[:, 0] / (33 - p.box[:, 2])])
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 0.03


def test_presets_by_name_and_size():
    simclr, simsiam = build_policy(AugmentConfig(), 32), build_policy(AugmentConfig(preset="simsiam"), 32)
    assert (simclr.brightness, simclr.hue) == (0.8, 0.2)
    assert (simsiam.brightness, simsiam.hue, simsiam.crop_scale) == (0.4, 0.1, (0.2, 1.0))
    assert [build_policy(AugmentConfig(), size).blur for size in (32, 64, 96, 224)] == [0, 0, 0, 0.5]
    assert simclr.statistics[0] == (0.4914, 0.4822, 0.4465)
    assert build_policy(AugmentConfig(), 96).statistics == ((0.5,) * 3, (0.5,) * 3)
    assert build_policy(AugmentConfig(), 224).statistics[1] == (0.229, 0.224, 0.225)
    assert build_policy(AugmentConfig(preset="simsiam", blur=0.7), 32).blur == 0.7


def photo(width=50, height=40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack((x * 255 / width, y * 255 / height, 128 + 100 * np.sin(x / 5)), axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def params(**changes) -> ViewParams:
    plain = {
        "box": np.array([[0, 0, 50, 40]]), "flip": np.array([False]), "jitter": np.array([False]),
        "factors": np.array([[1.0, 1.0, 1.0, 0.0]]), "order": ORDERS[:1], "grayscale": np.array([False]),
        "sigma": np.array([0.0]), "solarize": np.array([False]),
    }  # fmt: skip
    return ViewParams(**{**plain, **changes})


yes = np.array([True])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda v: v),
        ({"flip": yes}, F.horizontal_flip),
        ({"jitter": yes, "factors": np.array([[0.4, 1, 1, 0]])}, lambda v: F.adjust_brightness(v, 0.4)),
        ({"jitter": yes, "factors": np.array([[1, 1.6, 1, 0]])}, lambda v: F.adjust_contrast(v, 1.6)),
        ({"jitter": yes, "factors": np.array([[1, 1, 0.3, 0]])}, lambda v: F.adjust_saturation(v, 0.3)),
        ({"jitter": yes, "factors": np.array([[1, 1, 1, -0.15]])}, lambda v: F.adjust_hue(v, -0.15)),
        ({"grayscale": yes}, lambda v: F.rgb_to_grayscale(v, num_output_channels=3)),
        ({"sigma": np.array([1.3])}, lambda v: v.filter(ImageFilter.GaussianBlur(1.3))),
        ({"solarize": yes}, lambda v: ImageOps.solarize(v, 128)),
    ],
)  # fmt: skip
def test_each_operation_alone_is_torchvisions(changes, expected):
    policy = build_policy(AugmentConfig(), 24)
    box = [5, 3, 30, 20]
    view = policy.apply(photo(), params(box=np.array([box]), **changes), 0)
    crop = F.resized_crop(photo(), 3, 5, 20, 30, [24, 24], antialias=True)
    difference = np.abs(view.astype(int) - np.asarray(expected(crop)).astype(int))
    # the other three of the jitter are neutral, but hue goes through Pillow's 8-bit HSV and back, which rounds
    assert difference.max() <= (8 if "jitter" in changes else 0)
    assert difference.mean() < 1.5
    assert view.shape == (24, 24, 3)
    assert view.dtype == np.uint8


def test_jitter_goes_in_the_order_drawn():
    policy = build_policy(AugmentConfig(), 24)
    factors = np.array([[0.5, 1.7, 1.0, 0.0]])
    crop = F.resized_crop(photo(), 0, 0, 40, 50, [24, 24], antialias=True)
    for order in ([0, 1, 2, 3], [1, 0, 2, 3]):
        expected = crop
        for operation in order[:2]:
            expected = (F.adjust_brightness, F.adjust_contrast)[operation](expected, factors[0, operation])
        view = policy.apply(photo(), params(jitter=yes, factors=factors, order=np.array([order])), 0)
        assert np.abs(view.astype(int) - np.asarray(expected).astype(int)).max() <= 8


def test_views_are_distributed_as_torchvisions_transforms():
    torch.manual_seed(0)
    policy = build_policy(AugmentConfig(), 32)
    theirs = T.Compose([
        T.RandomResizedCrop(32, antialias=True), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), T.RandomGrayscale(0.2),
    ])  # fmt: skip
    image, n = photo(), 3000
    p = draws(policy, n, *image.size)
    ours = np.stack([policy.apply(image, p, i) for i in range(n)]).astype(float)
    other = np.stack([np.asarray(theirs(image)) for _ in range(n)]).astype(float)
    for statistic in (lambda v: v.mean(axis=(1, 2, 3)), lambda v: v.std(axis=(1, 2, 3)), lambda v: v[:, 5, 5, 0]):
        assert distance(statistic(ours), statistic(other)) < 0.045  # 1 of 1,000 for two samples of 3,000


def test_numbers_depend_on_seed_epoch_and_image_alone():
    base = uniforms(3, 1, np.array([42]), 4)[:, 0]
    assert base.shape == (4, UNIFORMS)
    np.testing.assert_array_equal(base, uniforms(3, 1, np.array([42]), 4)[:, 0])
    np.testing.assert_array_equal(base[:2], uniforms(3, 1, np.array([42]), 2)[:, 0])
    others = [
        uniforms(4, 1, np.array([42]), 4)[:, 0],
        uniforms(3, 2, np.array([42]), 4)[:, 0],
        uniforms(3, 1, np.array([43]), 4)[:, 0],
        base[::-1],
    ]
    assert all((base != other).all() for other in others)


def test_epochs_have_their_own_order():
    orders = [permutation(seed, epoch, 100).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert permutation(0, 1, 100).tolist() == orders[1]
