"""Datasets in memory: what they give, what they refuse, and what a worker process gets."""

import pickle

import numpy as np
import pytest

from engine.data.dataset import ArrayDataset, DataError


def test_array_dataset_gives_images_and_labels():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    dataset = ArrayDataset("tiny", images, np.array([0, 1, 2, 1, 0], np.uint8))
    assert len(dataset) == 5 and dataset.num_classes == 3 and dataset.labels.dtype == np.int64
    assert dataset.describe(3) == "tiny[3]"
    given = dataset.image(3)
    np.testing.assert_array_equal(given, images[3])
    given[:] = 0
    assert images[3].any(), "an image shares memory with the dataset"
    with pytest.raises(IndexError):
        dataset.image(5)


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), None, "uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), None, "N, H, W, 3"),
        (np.zeros((2, 4), np.uint8), None, r"uint8 \[2, 4\]; give .* \[N, H, W\] of grey ones"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int), "for 2 images"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, -1]), "from 0"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), "integers"),
    ],
)
def test_array_dataset_refuses(images, labels, says):
    with pytest.raises(DataError, match=says):
        ArrayDataset("bad", images, labels)


def test_grey_images_are_given_as_rgb_and_take_their_own_memory(tmp_path):
    grey = np.random.default_rng(2).integers(0, 256, (60, 8, 6), dtype=np.uint8)
    np.save(tmp_path / "grey.npy", grey)
    for given, most in ((grey, grey.nbytes + 1500), (np.load(tmp_path / "grey.npy", mmap_mode="r"), 1500)):
        dataset = ArrayDataset("grey", given, None)
        assert np.shares_memory(dataset.images, given) and len(pickle.dumps(dataset)) < most
        for each in (dataset, pickle.loads(pickle.dumps(dataset))):
            image = each.image(7)
            assert each.images.shape == (60, 8, 6, 3) and image.flags.c_contiguous and image.flags.writeable
            np.testing.assert_array_equal(each.images, np.stack([grey] * 3, axis=-1))
            np.testing.assert_array_equal(image, np.stack([grey[7]] * 3, axis=-1))


def test_memory_map_is_pickled_as_its_place_in_the_file(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (50, 8, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.ascontiguousarray(images.transpose(0, 3, 2, 1)).tofile(tmp_path / "planes.bin")
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    planes = np.memmap(tmp_path / "planes.bin", np.uint8, mode="r", shape=(50, 3, 6, 8)).transpose(0, 3, 2, 1)
    for view, expected in (
        (mapped, images),
        (mapped[7:30:2], images[7:30:2]),
        (planes, images),
        (planes[3:], images[3:]),
    ):
        sent = pickle.dumps(ArrayDataset("mapped", view, None))
        assert len(sent) < 1500 < images.nbytes
        received = pickle.loads(sent)
        np.testing.assert_array_equal(received.images, expected)
        assert not received.images.flags.writeable
        again = pickle.loads(pickle.dumps(received))
        np.testing.assert_array_equal(again.image(4), expected[4])


def test_plain_arrays_are_pickled_by_value():
    dataset = ArrayDataset("plain", np.full((2, 4, 4, 3), 7, np.uint8), np.array([0, 1]))
    received = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(received.images, dataset.images)
    np.testing.assert_array_equal(received.labels, dataset.labels)
