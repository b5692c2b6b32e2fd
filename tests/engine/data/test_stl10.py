"""STL-10 from a synthetic archive of the official layout: axes, splits, sizes, labels."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest

from engine.data.catalog import open_dataset
from engine.data.dataset import DataError
from engine.data.stl10 import Source, stl10

COUNTS = {"unlabeled": 6, "train": 4, "test": 3}
IMAGES = {
    part: np.random.default_rng(count).integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
    for part, count in COUNTS.items()
}
LABELS = {"train": np.array([10, 1, 5, 10], np.uint8), "test": np.array([2, 2, 9], np.uint8)}


@pytest.fixture
def source(tmp_path):
    """The archive where a user may have it, each plane stored column by column as the format's description says."""
    files = {f"{part}_X.bin": images.transpose(0, 3, 2, 1).tobytes() for part, images in IMAGES.items()}
    files |= {f"{part}_y.bin": labels.tobytes() for part, labels in LABELS.items()}
    files["class_names.txt"] = b"airplane"
    path = tmp_path / "stl10_binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"stl10_binary/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Source("http://127.0.0.1:9/stl10_binary.tar.gz", hashlib.md5(path.read_bytes()).hexdigest(), COUNTS)


def test_splits(tmp_path, source):
    for split, part in (("train", "unlabeled"), ("bank", "train"), ("test", "test")):
        dataset = stl10(tmp_path, split, source=source)
        assert len(dataset) == COUNTS[part]
        np.testing.assert_array_equal(dataset.images, IMAGES[part])
        image = pickle.loads(pickle.dumps(dataset)).image(2)
        np.testing.assert_array_equal(image, IMAGES[part][2])
        assert image.flags.c_contiguous and image.shape == (96, 96, 3)
        if part == "unlabeled":
            assert dataset.labels is None and dataset.num_classes is None
        else:
            assert dataset.labels.tolist() == (LABELS[part].astype(int) - 1).tolist() and dataset.num_classes == 10


def test_images_stay_on_disk(tmp_path, source):
    assert len(pickle.dumps(stl10(tmp_path, "train", source=source))) < 1500


def test_only_the_five_files_are_unpacked_and_once(tmp_path, source):
    stl10(tmp_path, "train", source=source)
    (tmp_path / "stl10_binary.tar.gz").unlink()
    stl10(tmp_path, "test", source=source)
    names = sorted(path.name for path in (tmp_path / "stl10_binary").iterdir())
    assert names == ["test_X.bin", "test_y.bin", "train_X.bin", "train_y.bin", "unlabeled_X.bin"]


@pytest.mark.parametrize(
    ("split", "name", "content", "says"),
    [
        ("train", "unlabeled_X.bin", b"half", r"unlabeled_X\.bin: 4 bytes, expected 165888; delete the folder"),
        ("bank", "train_y.bin", b"\x01\x02", r"train_y\.bin: 2 bytes, expected 4"),
        ("bank", "train_y.bin", b"\x01\x00\x02\x03", r"train_y\.bin: labels from 0 to 3, expected 1 to 10"),
        ("test", "test_y.bin", None, r"test_y\.bin: None bytes"),
    ],
)
def test_damage_names_the_file(tmp_path, source, split, name, content, says):
    stl10(tmp_path, "train", source=source)
    path = tmp_path / "stl10_binary" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        stl10(tmp_path, split, source=source)


def test_the_catalog_opens_official_sizes_only(tmp_path, source):
    stl10(tmp_path, "train", source=source)
    with pytest.raises(DataError, match="expected 2764800000"):
        open_dataset("stl10", tmp_path, "train")
