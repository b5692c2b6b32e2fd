"""A user's images in an .npz: what is read, and what is said of everything else."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from engine.data.arrays import open_arrays
from engine.data.class_names import CLASS_NAMES
from engine.data.dataset import DataError

OTHER_PHOTOS = Path(__file__).parents[3].parent / "shared" / "data" / "ood_tinyimagenet32.npz"

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
LABELS = np.array([3, 0, 1, 1, 0], np.uint8)


@pytest.fixture
def write(tmp_path):
    """Writes an archive of these arrays; a value of None leaves a key out."""

    def written(save=np.savez, **changes):
        arrays = {"images": IMAGES, "labels": LABELS} | changes
        save(tmp_path / "birds.npz", **{key: array for key, array in arrays.items() if array is not None})
        return tmp_path / "birds.npz"

    return written


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64, ">i4"])
def test_images_and_labels(write, save, dtype):
    dataset = open_arrays(write(save, labels=LABELS.astype(dtype), wnid=np.array(["n01"])))
    np.testing.assert_array_equal(dataset.images, IMAGES)
    assert dataset.labels.tolist() == LABELS.tolist() and dataset.labels.dtype == np.int64
    assert dataset.num_classes == 4 and dataset.describe(2) == "birds[2]"


def test_grey_images_are_given_as_rgb(write):
    dataset = open_arrays(write(images=IMAGES[..., 0]))
    np.testing.assert_array_equal(dataset.image(4), np.stack([IMAGES[4, ..., 0]] * 3, axis=-1))


@pytest.mark.parametrize("order", ["C", "F"])
def test_images_in_either_order_of_memory(write, order):
    np.testing.assert_array_equal(open_arrays(write(images=np.array(IMAGES, order=order))).image(1), IMAGES[1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": None}, r"holds `labels`, not `images`; .* with `images`, `labels`"),
        ({"labels": None, "y": LABELS}, r"holds `images`, `y`, not `labels`; copy"),
        ({"images": None, "labels": None}, r"holds nothing, not `images`, `labels`"),
        ({"images": IMAGES / 255}, r"`images` is float64 \[5, 6, 8, 3\]; give uint8 \[N, H, W, 3\], or"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"`images` is uint8 \[5, 3, 6, 8\]; give"),
        ({"images": IMAGES[0, 0]}, r"`images` is uint8 \[8, 3\]; give"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"`images` is uint8 \[0, 6, 8, 3\]; give .* at least one"),
        ({"labels": LABELS[:4]}, r"`labels` is uint8 \[4\] for 5 images; give integers from 0"),
        ({"labels": LABELS[:, None]}, r"`labels` is uint8 \[5, 1\] for 5 images"),
        ({"labels": LABELS / 1}, r"`labels` is float64 \[5\] for 5 images"),
        ({"labels": LABELS > 0}, r"`labels` is bool \[5\]"),
        ({"labels": LABELS.astype(int) - 1}, r"`labels` go from -1 to 2; give integers from 0"),
        ({"labels": LABELS + np.uint64(2**63)}, r"`labels` go from 9223372036854775808 to 9223372036854775811"),
        ({"labels": LABELS.astype(object)}, r"`labels` cannot be read \(Object arrays cannot be loaded when"),
    ],
)
def test_other_arrays_are_refused(write, changes, says):
    path = write(**changes)
    with pytest.raises(DataError, match=f"{path}: {says}"):
        open_arrays(path)


def test_files_that_are_no_archive(tmp_path):
    path = tmp_path / "birds.npz"
    with pytest.raises(DataError, match=f"{path}: no such file; give an .npz archive with `images`, `labels`"):
        open_arrays(path)
    for content in (b"", b"<html>not found</html>", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}: no whole .npz archive .*; copy the file again"):
            open_arrays(path)
    np.save(file := io.BytesIO(), IMAGES)
    path.write_bytes(file.getvalue())
    with pytest.raises(DataError, match=f"{path}: a single array; make an .npz archive with `images`, `labels`"):
        open_arrays(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_names_the_file(write, save):
    """A file cut short, and one with a byte changed: refused, or read as it was."""
    path = write(save)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
            path.write_bytes(content)
            try:
                dataset = open_arrays(path)
            except DataError as error:
                assert str(error).startswith(f"{path}: ")
            else:
                np.testing.assert_array_equal(dataset.images, IMAGES)
                assert dataset.labels.tolist() == LABELS.tolist()


def test_member_that_is_cut_short(tmp_path):
    path = tmp_path / "birds.npz"
    np.save(file := io.BytesIO(), IMAGES)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("images.npy", file.getvalue()[:-100])
        packed.writestr("labels.npy", b"no array")
    with pytest.raises(
        DataError, match=f"{path}: `images` cannot be read .*; copy the file again .* arrays of numbers"
    ):
        open_arrays(path)


@pytest.mark.skipif(not OTHER_PHOTOS.exists(), reason=f"needs {OTHER_PHOTOS.name} in shared/data")
def test_real_photos():
    dataset = open_arrays(OTHER_PHOTOS)
    assert dataset.images.shape == (13_200, 32, 32, 3) and dataset.name == "ood_tinyimagenet32"
    names = np.array(CLASS_NAMES["cifar10"])[dataset.labels]
    with np.load(OTHER_PHOTOS) as file:
        wnids = file["wnid"]
    # A bullfrog, a tabby, a German shepherd, a convertible, a moving van and a black stork, by their WordNet ids.
    for wnid, name in (
        ("n01641577", "frog"), ("n02123045", "cat"), ("n02106662", "dog"), ("n03100240", "automobile"),
        ("n03796401", "truck"), ("n02002724", "bird"),
    ):  # fmt: skip
        assert set(names[wnids == wnid]) == {name}
