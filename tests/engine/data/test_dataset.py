"""Datasets in memory and in files: what decodes, what is refused and why, and what a worker process gets."""

import os
import pickle
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from engine.data.dataset import ArrayDataset, DataError, FileDataset, UnreadableImage, header_problem


def photo(height=40, width=56, seed=0):
    """A smooth image, uint8 [H, W, 3], that survives JPEG."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def files(*paths):
    return FileDataset("some", paths, None, None)


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
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int), "for 2 images"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, -1]), "from 0"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), "integers"),
    ],
)
def test_array_dataset_refuses(images, labels, says):
    with pytest.raises(DataError, match=says):
        ArrayDataset("bad", images, labels)


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


def test_file_dataset_paths_labels_subset_and_pickle(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "größe.png", "c.png")]
    for seed, path in enumerate(paths):
        Image.fromarray(photo(seed=seed)).save(path)
    dataset = pickle.loads(pickle.dumps(FileDataset("named", paths, np.array([1, 0, 1]), ["cat", "dog"])))
    assert [dataset.path(i) for i in range(3)] == [str(path) for path in paths]
    assert dataset.num_classes == 2 and dataset.describe(1) == str(paths[1])
    np.testing.assert_array_equal(dataset.image(1), photo(seed=1))
    part = dataset.subset("part", np.array([2, 1]))
    assert [part.path(0), part.path(1)] == [str(paths[2]), str(paths[1])]
    assert part.labels.tolist() == [1, 0] and part.classes == ("cat", "dog")
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset.image(index)
    with pytest.raises(DataError, match="class name"):
        FileDataset("named", paths, np.array([1, 0, 2]), ["cat", "dog"])


STORED_MODES = {
    "jpg": ("L", "RGB", "CMYK", "YCbCr", "1"),
    "png": ("L", "LA", "P", "RGB", "RGBA", "1"),
    "webp": ("L", "LA", "P", "RGB", "RGBA"),
    "gif": ("L", "LA", "P", "RGB", "RGBA", "1"),
    "tif": ("L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "1"),
}


@pytest.mark.parametrize(("extension", "mode"), [(ext, mode) for ext, modes in STORED_MODES.items() for mode in modes])
def test_every_mode_becomes_rgb(tmp_path, mode, extension):
    path = tmp_path / f"image.{extension}"
    source = Image.fromarray(photo()).convert(mode, palette=Image.Palette.ADAPTIVE)
    source.save(path)
    image = files(path).image(0)
    assert image.mode == "RGB" and image.size == (56, 40)
    if mode != "1":
        expected = np.asarray(source.convert("RGB"), float)
        assert np.abs(np.asarray(image, float) - expected).mean() < 8


def test_extension_need_not_match_the_content(tmp_path):
    path = tmp_path / "png.jpg"
    Image.fromarray(photo()).save(path, format="PNG")
    np.testing.assert_array_equal(files(path).image(0), photo())


def test_palette_with_transparency_and_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(photo(seed=seed)).quantize(16) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "clear.png", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("moving.gif", "clear.png"):
            np.testing.assert_array_equal(files(tmp_path / name).image(0), frames[0].convert("RGB"))


def test_sixteen_bit_grey_keeps_its_gradient(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(files(tmp_path / "deep.png").image(0))[:, :, 1], ramp >> 8)


def damaged(path, kind):
    """Writes one unreadable file."""
    if kind in ("jpg", "png", "webp", "gif"):
        Image.fromarray(photo(200, 300)).save(path, format={"jpg": "JPEG"}.get(kind, kind))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "float":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="TIFF")
    elif kind == "postscript":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"no image", "header": b"\xff\xd8\xff\xe0\x00\x10JFIF"}[kind])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("jpg", "truncated"),
        ("png", None),
        ("webp", None),
        ("gif", None),
        ("empty", "empty"),
        ("text", "not an image"),
        ("header", None),
        ("missing", "No such file"),
        ("float", "mode F"),
        ("postscript", "not an image"),
    ],
)
def test_unreadable_image_names_file_and_reason(tmp_path, kind, says):
    path = tmp_path / "bad.jpg"
    damaged(path, kind)
    with pytest.raises(UnreadableImage, match=says) as caught:
        files(path).image(0)
    assert caught.value.path == str(path) and caught.value.reason
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason, str(copy)) == (str(path), caught.value.reason, str(caught.value))


def test_decompression_bomb_is_an_unreadable_image(tmp_path, monkeypatch):
    Image.fromarray(photo()).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        files(tmp_path / "bomb.png").image(0)
    assert "exceeds limit" in header_problem(str(tmp_path / "bomb.png"))


def test_too_many_open_files_is_not_blamed_on_the_image(tmp_path, monkeypatch):
    Image.fromarray(photo()).save(tmp_path / "good.png")

    def open_fails(*_args, **_kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", open_fails)
    with pytest.raises(OSError, match="Too many open files") as caught:
        files(tmp_path / "good.png").image(0)
    assert not isinstance(caught.value, UnreadableImage)


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_no_file_stays_open(tmp_path):
    damaged(tmp_path / "bad.jpg", "jpg")
    Image.fromarray(photo()).save(tmp_path / "good.png")
    dataset = files(tmp_path / "bad.jpg", tmp_path / "good.png")
    before = len(os.listdir("/proc/self/fd"))
    kept = [dataset.image(1) for _ in range(20)]
    for _ in range(20):
        with pytest.raises(UnreadableImage):
            dataset.image(0)
    assert len(kept) == 20 and len(os.listdir("/proc/self/fd")) == before
