"""Fashion-MNIST from synthetic IDX files, by every way in; and the real one with its documented facts."""

import dataclasses
import gzip
import hashlib
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from engine.data.catalog import open_dataset
from engine.data.dataset import DataError
from engine.data.fashion_mnist import Digests, Source, fashion_mnist

DATA = Path(__file__).parents[3] / "data"
COUNTS = {"train": 6, "t10k": 4}
IMAGES = {
    part: np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for part, count in COUNTS.items()
}
LABELS = {"train": np.array([9, 0, 0, 3, 1, 2], np.uint8), "t10k": np.array([9, 2, 1, 1], np.uint8)}


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


class Kit:
    """Small files under `root` as a user may have them, and the source that they are right for."""

    def __init__(self, tmp_path):
        self.root = tmp_path / "data"
        self.folder = self.root / "fashion-mnist"
        self.folder.mkdir(parents=True)
        self.source = Source("http://127.0.0.1:9/", tmp_path / "installed", COUNTS, {})
        for part in COUNTS:
            self.put(f"{part}-images-idx3-ubyte.gz", idx(IMAGES[part]))
            self.put(f"{part}-labels-idx1-ubyte.gz", idx(LABELS[part]))

    def put(self, name, content):
        """Writes a file and makes its digests those that are expected."""
        packed = gzip.compress(content)
        (self.folder / name).write_bytes(packed)
        digests = Digests(hashlib.md5(packed).hexdigest(), hashlib.sha256(content).hexdigest())
        self.source = dataclasses.replace(self.source, digests={**self.source.digests, name: digests})

    def assert_right(self):
        for part in COUNTS:
            dataset = fashion_mnist(self.root, part == "train", source=self.source)
            np.testing.assert_array_equal(dataset.images, np.stack([IMAGES[part]] * 3, axis=-1))
            assert dataset.labels.tolist() == LABELS[part].tolist() and dataset.num_classes == 10
            assert dataset.image(2).shape == (28, 28, 3) and dataset.labels.dtype == np.int64


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)


def test_users_files(kit):
    kit.assert_right()
    assert fashion_mnist(kit.root, False, source=kit.source).describe(1) == "fashion-mnist-test[1]"


def test_channels_share_their_memory(kit):
    images = fashion_mnist(kit.root, True, source=kit.source).images
    assert np.shares_memory(images[..., 0], images[..., 2])


def test_the_systems_files_serve_where_the_user_has_none_and_may_be_compressed_otherwise(kit):
    kit.folder.rename(kit.source.installed)
    for path in kit.source.installed.iterdir():
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=1))
    kit.assert_right()
    assert not kit.root.joinpath("fashion-mnist").exists()


def test_download_of_what_is_nowhere(kit, tmp_path):
    kit.folder.rename(tmp_path / "served")
    kit.source = dataclasses.replace(kit.source, url=f"{(tmp_path / 'served').as_uri()}/")
    kit.assert_right()
    shutil.rmtree(tmp_path / "served")
    kit.assert_right()
    assert len(list(kit.folder.glob("*.gz"))) == 4 and not list(kit.folder.glob("*.part"))


def test_no_way_in_names_the_file_and_the_reason(kit):
    path = kit.folder / "train-labels-idx1-ubyte.gz"
    path.unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz: could not be downloaded .*refused"):
        fashion_mnist(kit.root, True, source=kit.source)


def flipped(packed, at):
    return packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda packed: packed[:-300], r"no whole gzip file \(Compressed file ended before"),
        (lambda packed: packed[:-4], r"no whole gzip file \(Compressed file ended before"),
        (lambda packed: flipped(packed, len(packed) - 6), r"no whole gzip file \(CRC check failed"),
        (lambda packed: b"<html>", r"no whole gzip file \(Not a gzipped file \(b'<h'\)\)"),
        (lambda packed: b"", r"begins with nothing, expected 00000803 00000006 0000001c 0000001c"),
        (lambda packed: gzip.compress(b"\x00\x00\x08"), r"begins with 000008, expected 00000803"),
        (lambda packed: gzip.compress(idx(LABELS["train"])), r"begins with 00000801 00000006 .*, expected 00000803"),
        (
            lambda packed: gzip.compress(idx(IMAGES["t10k"])),
            r"begins with 00000803 00000004 0000001c 0000001c, expected .*, the IDX header of uint8 \[6, 28, 28\]",
        ),
        (lambda packed: gzip.compress(gzip.decompress(packed)[:-1]), r"4719 bytes of content, expected 4720"),
        (lambda packed: gzip.compress(gzip.decompress(packed) + b"\0"), r"more bytes of content, expected 4720"),
        (lambda packed: gzip.compress(flipped(gzip.decompress(packed), 99)), r"sha256 of the content is \w+, expected"),
    ],
)  # fmt: skip
def test_damage_names_the_file_and_what_to_do(kit, damage, says):
    path = kit.folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte\.gz: {says}.*; delete the file so that"):
        fashion_mnist(kit.root, True, source=kit.source)
    assert len(fashion_mnist(kit.root, False, source=kit.source)) == COUNTS["t10k"]


def test_labels_out_of_range(kit):
    kit.put("t10k-labels-idx1-ubyte.gz", idx(np.array([1, 10, 0, 0], np.uint8)))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz: labels up to 10, expected 0 to 9; delete"):
        fashion_mnist(kit.root, False, source=kit.source)


def test_damage_of_the_systems_file_is_not_the_users_to_delete(kit):
    kit.folder.rename(kit.source.installed)
    (kit.source.installed / "train-images-idx3-ubyte.gz").write_bytes(b"half")
    with pytest.raises(DataError, match=rf"installed.*; install .* again, or put the official file into {kit.folder}"):
        fashion_mnist(kit.root, True, source=kit.source)


def test_the_catalog_opens_official_files_only(kit):
    with pytest.raises(DataError, match="expected 00000803 0000ea60"):
        open_dataset("fashion-mnist", kit.root, "bank")


@pytest.mark.skipif(
    not any(
        (folder / "train-images-idx3-ubyte.gz").exists() for folder in (DATA / "fashion-mnist", Source().installed)
    ),
    reason="needs Fashion-MNIST in data/fashion-mnist, or Debian's package dataset-fashion-mnist",
)
def test_real_fashion_mnist():
    """Counts and first labels as published; mean and deviation as in everybody's transforms."""
    train, bank, test = (open_dataset("fashion-mnist", DATA, split) for split in ("train", "bank", "test"))
    assert train.images.shape == (60_000, 28, 28, 3) and test.images.shape == (10_000, 28, 28, 3)
    assert bank.labels.tolist() == train.labels.tolist()
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert np.bincount(train.labels).tolist() == [6_000] * 10 and np.bincount(test.labels).tolist() == [1_000] * 10
    counts = np.bincount(train.images[..., 0].ravel(), minlength=256) / (60_000 * 28 * 28)
    mean = counts @ np.arange(256)
    std = np.sqrt(counts @ np.arange(256) ** 2 - mean**2)
    np.testing.assert_allclose((mean / 255, std / 255), (0.2860, 0.3530), atol=5e-5)
