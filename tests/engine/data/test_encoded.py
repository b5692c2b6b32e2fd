"""Encoded images: what decodes, what is refused and why, and that readers hold images to what the scan found."""

import io
import os
import pickle
import struct
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import encoded
from engine.data.dataset import DataError, UnreadableImage
from engine.data.encoded import Facts, FileDataset, Look, Names, decode, describe_form, inspect, read_file

PHOTOS = Path(__file__).parents[3].parent / "shared" / "data" / "imagewoof320-mini.tar"


def photo(height=40, width=56, seed=0):
    """A smooth image, uint8 [H, W, 3], that survives JPEG."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def stored(image, form, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def png(width, height, depth=8, colour=2, pixels=b"") -> bytes:
    """A PNG of this header; colour 2 is RGB, 6 is RGBA."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def scanned(*paths, labels=None, classes=None) -> FileDataset:
    """A dataset of good files, as a scan would give it."""
    looks = [inspect(path.read_bytes(), str(path)) for path in paths]
    facts = Facts(
        np.array([path.stat().st_size for path in paths], np.int64),
        np.array([(look.width, look.height) for look in looks], np.int32),
        np.array([look.direct for look in looks]),
        np.array([path.stat().st_mtime_ns for path in paths], np.int64),
    )
    return FileDataset("some", [str(path) for path in paths], facts, labels, classes)


# -- what decodes ----------------------------------------------------------------------------------------------------

STORED_MODES = {
    "jpeg": ("L", "RGB", "CMYK", "YCbCr", "1"),
    "png": ("L", "LA", "P", "RGB", "RGBA", "1"),
    "webp": ("L", "LA", "P", "RGB", "RGBA"),
    "gif": ("L", "LA", "P", "RGB", "RGBA", "1"),
    "tiff": ("L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "1"),
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in STORED_MODES.items() for mode in modes])
def test_every_mode_becomes_rgb(mode, form):
    source = Image.fromarray(photo()).convert(mode, palette=Image.Palette.ADAPTIVE)
    data = stored(source, form)
    image = decode(data, "it")
    assert image.mode == "RGB" and image.size == (56, 40)
    assert inspect(data, "it")[:2] == image.size
    if mode != "1":
        expected = np.asarray(source.convert("RGB"), float)
        assert np.abs(np.asarray(image, float) - expected).mean() < 8


def test_palette_with_transparency_and_first_frame_of_an_animation():
    frames = [Image.fromarray(photo(seed=seed)).quantize(16) for seed in range(3)]
    moving = stored(frames[0], "gif", save_all=True, append_images=frames[1:])
    clear = stored(frames[0], "png", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (moving, clear):
            np.testing.assert_array_equal(decode(data, "it"), frames[0].convert("RGB"))


def test_sixteen_bit_grey_keeps_its_gradient():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    np.testing.assert_array_equal(np.asarray(decode(stored(ramp, "png"), "it"))[:, :, 1], ramp >> 8)


# -- what every decoder makes the same of ----------------------------------------------------------------------------

FRAMES = [Image.fromarray(photo(seed=seed)) for seed in range(2)]
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: a viewer would turn it by 90 degrees


@pytest.mark.parametrize(
    ("data", "form", "direct"),
    [
        (stored(photo(), "jpeg"), "JPEG RGB", True),
        (stored(photo(), "jpeg", progressive=True), "JPEG RGB", True),
        (stored(photo()[:, :, 0], "jpeg"), "JPEG L", True),
        (stored(photo(), "jpeg", exif=TURNED), "JPEG RGB", True),
        (stored(photo(), "jpeg", keep_rgb=True), "JPEG RGB", False),
        (stored(Image.fromarray(photo()).convert("CMYK"), "jpeg"), "JPEG CMYK", False),
        (stored(FRAMES[0], "mpo", save_all=True, append_images=FRAMES[1:]), "MPO RGB", False),
        (stored(photo(), "png"), "PNG RGB", True),
        (stored(photo()[:, :, 0], "png"), "PNG L", True),
        (stored(photo(), "png", transparency=(0, 0, 0)), "PNG RGB", False),
        (stored(Image.fromarray(photo()).convert("RGBA"), "png"), "PNG RGBA", False),
        (stored(Image.fromarray(photo()).convert("P"), "png"), "PNG P", False),
        (stored(Image.fromarray(photo()).convert("1"), "png"), "PNG 1", False),
        (stored(photo()[:, :, 0].astype(np.uint16) << 8, "png"), "PNG I of 16 bits", False),
        (png(56, 40, depth=16, pixels=bytes(40 * (1 + 56 * 6))), "PNG RGB of 16 bits", False),
        (stored(FRAMES[0], "png", save_all=True, append_images=FRAMES[1:]), "PNG RGB", False),
        (stored(photo(), "webp"), "WEBP RGB", False),
        (stored(photo(), "bmp"), "BMP RGB", False),
        (stored(photo(), "ppm"), "PPM RGB", False),
    ],
)
def test_direct_are_plain_jpeg_and_png_alone(data, form, direct):
    assert inspect(data, "it") == Look(56, 40, direct)
    assert describe_form(data, "it") == form


def test_a_tiff_is_as_large_as_it_is_shown():
    data = stored(photo(), "tiff", exif=TURNED)  # Pillow turns these, and these alone
    assert inspect(data, "it")[:2] == decode(data, "it").size == (40, 56)


@pytest.mark.parametrize(
    "data",
    [
        stored(photo(), "jpeg"),
        stored(photo(), "png"),
        stored(Image.fromarray(photo()).convert("CMYK"), "jpeg"),
        stored(photo(), "webp"),
    ],
)
def test_the_picture_for_other_decoders_is_the_image(tmp_path, data):
    (tmp_path / "it").write_bytes(data)
    dataset = scanned(tmp_path / "it")
    picture = dataset.picture(0)
    assert (picture == data) == bool(dataset.facts.direct[0])
    np.testing.assert_array_equal(Image.open(io.BytesIO(picture)), dataset.image(0))


# -- what is refused -------------------------------------------------------------------------------------------------

WHOLE = {form: stored(photo(200, 300), form) for form in ("jpeg", "png", "webp", "gif", "bmp", "tiff")}
WHOLE["progressive"] = stored(photo(200, 300), "jpeg", progressive=True)


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated_images_are_refused_wherever_they_end(form, share):
    whole = WHOLE[form]
    inspect(whole, "it")
    if form in ("gif", "tiff") and share > 0.9:
        pytest.skip("all pixels are there")
    for look in (inspect, decode):
        with pytest.raises(UnreadableImage):
            look(whole[: int(len(whole) * share)], "it")


def test_a_jpeg_without_its_last_byte_is_refused():
    for form in ("jpeg", "progressive"):
        with pytest.raises(UnreadableImage, match="truncated"):
            inspect(WHOLE[form][:-1], "it")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"no image", "not an image of a known format: JPEG, PNG"),
        (b"<html>" * 1000, "not an image"),
        (b"\0" * 4096, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", "not an image"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", None),
        (stored(np.zeros((4, 4), np.float32), "tiff"), "mode F"),
        (stored(np.zeros((3, 400, 3), np.uint8), "png"), "a side is shorter than 4 pixels"),
        (stored(np.zeros((400, 3, 3), np.uint8), "jpeg"), "a side is shorter than 4 pixels"),
        (png(9459, 9460), r"more than 89,478,485 pixels"),
        (png(40_000, 40_000), r"more than 89,478,485 pixels"),  # where Pillow refuses instead of warning
        (png(2**31 - 1, 2**31 - 1), r"more than 89,478,485 pixels"),
        (png(5000, 5000, pixels=b"\0" * 100), None),
    ],
)
def test_unreadable_image_names_image_and_reason(data, says):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for look in (inspect, decode):
            with pytest.raises(UnreadableImage, match=says) as caught:
                look(data, "folder/it.jpg")
            assert caught.value.path == "folder/it.jpg" and caught.value.reason
            assert "folder/it.jpg" in str(caught.value) and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason, str(copy)) == ("folder/it.jpg", caught.value.reason, str(caught.value))


def test_the_smallest_and_the_largest_image():
    assert inspect(stored(np.zeros((4, 4, 3), np.uint8), "png"), "it") == Look(4, 4, True)
    rows = encoded.MAX_PIXELS // 65535
    data = stored(Image.new("L", (65535, rows)), "png")  # this one is decoded
    assert inspect(data, "it") == Look(65535, rows, True)


def test_warnings_of_pillow_do_not_reach_the_user(capfd):
    data = bytearray(stored(photo(), "jpeg", exif=TURNED))
    data[data.index(b"MM\0*") + 7] = 200  # the directory lies behind the end
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(bytes(data), "it")
        decode(stored(Image.fromarray(photo()).convert("P"), "png", transparency=b"\0\1"), "it")
    assert caught == [] and capfd.readouterr() == ("", "")


def test_too_many_open_files_is_not_blamed_on_the_image(tmp_path, monkeypatch):
    Image.fromarray(photo()).save(tmp_path / "good.png")
    dataset = scanned(tmp_path / "good.png")

    def open_fails(*_args, **_kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", open_fails)
    with pytest.raises(OSError, match="Too many open files") as caught:
        dataset.image(0)
    assert not isinstance(caught.value, UnreadableImage)


# -- files -----------------------------------------------------------------------------------------------------------


def test_names_are_a_sequence_of_strings():
    given = ["", "größe", "new\nline", os.fsdecode(b"not utf-8 \xff\xfe"), "x" * 5000]
    names = pickle.loads(pickle.dumps(Names(given)))
    assert list(names) == given and len(names) == 5 and names[3] == given[3]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            names[index]


def test_file_dataset_paths_labels_subset_and_pickle(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "größe.png", "c.png")]
    for seed, path in enumerate(paths):
        Image.fromarray(photo(seed=seed)).save(path)
    dataset = scanned(*paths, labels=np.array([1, 0, 1]), classes=["cat", "dog"])
    dataset = pickle.loads(pickle.dumps(dataset))
    assert [dataset.path(i) for i in range(3)] == [str(path) for path in paths]
    assert dataset.num_classes == 2 and dataset.describe(1) == str(paths[1])
    np.testing.assert_array_equal(dataset.image(1), photo(seed=1))
    part = dataset.subset("part", np.array([2, 1]))
    assert [part.path(0), part.path(1)] == [str(paths[2]), str(paths[1])]
    assert part.labels.tolist() == [1, 0] and part.classes == ("cat", "dog")
    assert part.facts.lengths.tolist() == [paths[2].stat().st_size, paths[1].stat().st_size]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset.image(index)
    with pytest.raises(DataError, match="class name"):
        scanned(*paths, labels=np.array([1, 0, 2]), classes=["cat", "dog"])


def test_fingerprints_tell_names_not_places(tmp_path):
    for folder in ("one/x", "two/y"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.fromarray(photo()).save(tmp_path / folder / name)
    one, two = (scanned(*(tmp_path / f / n for n in ("a.png", "b.png"))) for f in ("one/x", "two/y"))
    assert one.fingerprint() == two.fingerprint() != scanned(tmp_path / "one/x/a.png").fingerprint()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-300]), "truncated"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "not an image"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (
            lambda path: path.write_bytes(stored(photo(40, 60), "jpeg").ljust(path.stat().st_size, b"\0")),
            "60 x 40 px, 300 x 200 when it was scanned",
        ),
        (
            lambda path: Image.open(path).convert("CMYK").save(path, "JPEG"),
            "of another form than when it was scanned",
        ),
    ],
)
def test_an_image_that_changed_since_the_scan_is_unreadable(tmp_path, change, says):
    """To every reader: none gets bytes that were not looked at."""
    path = tmp_path / "it.jpg"
    path.write_bytes(WHOLE["jpeg"])
    dataset = scanned(path)
    dataset.image(0)
    change(path)
    for read in (dataset.image, dataset.encoded, dataset.picture):
        with pytest.raises(UnreadableImage, match=says) as caught:
            read(0)
        assert caught.value.path == str(path)


def test_a_file_that_was_touched_or_written_again_is_the_same_image(tmp_path, monkeypatch):
    path = tmp_path / "it.jpg"
    path.write_bytes(WHOLE["jpeg"])
    dataset = scanned(path)
    looks = []
    monkeypatch.setattr(encoded, "inspect", lambda data, name: looks.append(name) or inspect(data, name))
    assert dataset.encoded(0) == WHOLE["jpeg"] and looks == []
    os.utime(path, ns=(0, 0))
    assert dataset.encoded(0) == WHOLE["jpeg"] and len(looks) == 1
    path.write_bytes(WHOLE["jpeg"] + b"\0")
    assert dataset.encoded(0) == WHOLE["jpeg"] + b"\0" and len(looks) == 2


def test_parts_of_files_and_files_too_large_for_an_image(tmp_path):
    (tmp_path / "it").write_bytes(bytes(range(100)))
    assert read_file(str(tmp_path / "it"), 10, 5).data == bytes(range(10, 15))
    assert read_file(str(tmp_path / "it"), 95, 50).data == bytes(range(95, 100))
    with open(tmp_path / "it", "wb") as file:
        file.truncate(encoded.MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match="more than 536,870,910 bytes"):
        read_file(str(tmp_path / "it"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_no_file_stays_open(tmp_path):
    Image.fromarray(photo(200, 300)).save(tmp_path / "bad.jpg")
    Image.fromarray(photo()).save(tmp_path / "good.png")
    dataset = scanned(tmp_path / "bad.jpg", tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "bad.jpg").read_bytes()[:-300])
    before = len(os.listdir("/proc/self/fd"))
    kept = [dataset.image(1) for _ in range(20)]
    for _ in range(20):
        with pytest.raises(UnreadableImage):
            dataset.image(0)
    assert len(kept) == 20 and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"needs {PHOTOS.name} in shared/data")
def test_real_photos_cut_anywhere():
    rng = np.random.default_rng(0)
    with tarfile.open(PHOTOS) as tar:
        for member in [member for member in tar if member.isfile()][::40]:
            data = tar.extractfile(member).read()
            look = inspect(data, member.name)
            assert look.direct and min(look.width, look.height) == 320
            for end in rng.integers(0, len(data), 3):
                with pytest.raises(UnreadableImage):
                    inspect(data[:end], member.name)
