"""Tiny-ImageNet from a synthetic archive of the official layout; lists that do not match are named."""

import hashlib
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from engine.data.catalog import open_dataset
from engine.data.dataset import DataError
from engine.data.manifest import NAME
from engine.data.tiny_imagenet import tiny_imagenet

WNIDS = ("n03", "n01", "n02")  # the official list is not sorted either
URL = "http://127.0.0.1:9/tiny-imagenet-200.zip"


def jpeg(colour):
    Image.new("RGB", (64, 64), (colour, 100, 200)).save(file := io.BytesIO(), format="JPEG")
    return file.getvalue()


@pytest.fixture
def md5(tmp_path):
    """Of the archive, which lies where a user may have it."""
    top = "tiny-imagenet-200"
    files = {
        f"{top}/wnids.txt": "\n".join(WNIDS),
        f"{top}/words.txt": "n01\tcat",
        f"{top}/test/images/test_0.JPEG": b"no",
    }
    for rank, wnid in enumerate(sorted(WNIDS)):
        files[f"{top}/train/{wnid}/{wnid}_boxes.txt"] = "0\t0\t1\t1"
        for i in range(4):
            files[f"{top}/train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(rank * 80 + i)
    lines = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t9\t9" for i in range(6)]
    files[f"{top}/val/val_annotations.txt"] = "\n".join(lines) + "\n"
    files |= {f"{top}/val/images/val_{i}.JPEG": jpeg(i) for i in range(6)}
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return hashlib.md5((tmp_path / "tiny-imagenet-200.zip").read_bytes()).hexdigest()


def test_train_and_val(tmp_path, md5):
    train = tiny_imagenet(tmp_path, True, url=URL, md5=md5)
    assert train.classes == ("n01", "n02", "n03") and train.num_classes == 3
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert train.describe(5).endswith("train/n02/images/n02_1.JPEG")
    assert train.image(5).size == (64, 64) and abs(np.asarray(train.image(5))[0, 0, 0] - 81.0) < 5
    val = tiny_imagenet(tmp_path, False)
    assert [val.path(i).rsplit("/", 1)[1] for i in range(6)] == [f"val_{i}.JPEG" for i in range(6)]
    assert [val.classes[label] for label in val.labels] == [WNIDS[i % 3] for i in range(6)]
    assert open_dataset("tiny-imagenet", tmp_path, "bank").labels.tolist() == train.labels.tolist()
    assert len(open_dataset("tiny-imagenet", tmp_path, "test")) == 6


def test_damaged_images_are_left_out_with_their_labels(tmp_path, md5, caplog):
    fresh = tiny_imagenet(tmp_path, True, url=URL, md5=md5)
    assert fresh.rejected == [] and fresh.facts.direct.all() and (fresh.facts.sizes == 64).all()
    folder = tmp_path / "tiny-imagenet-200"
    (folder / NAME).unlink()  # what it knows to be images would keep their places
    (folder / "train/n02/images/n02_1.JPEG").write_bytes(b"")
    (folder / "val/images/val_0.JPEG").write_bytes(jpeg(0)[:-9])
    train, val = tiny_imagenet(tmp_path, True), tiny_imagenet(tmp_path, False)
    assert train.rejected == [(str(folder / "train/n02/images/n02_1.JPEG"), "the file is empty")]
    assert train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4 and train.path(5).endswith("n02_2.JPEG")
    assert len(val) == 5 and val.path(0).endswith("val_1.JPEG") and "truncated" in val.rejected[0][1]
    assert "left out 1 of 12 files that cannot be used (train/n02/images/n02_1.JPEG: the file is empty)" in caplog.text


def test_both_parts_share_a_manifest(tmp_path, md5, monkeypatch):
    tiny_imagenet(tmp_path, True, url=URL, md5=md5)
    monkeypatch.setattr("engine.data.manifest.inspect", None)  # not one image is decoded
    assert len(tiny_imagenet(tmp_path, False)) == 6 and len(tiny_imagenet(tmp_path, True)) == 12


def test_no_image_at_all(tmp_path, md5):
    tiny_imagenet(tmp_path, True, url=URL, md5=md5)
    (tmp_path / "tiny-imagenet-200" / NAME).unlink()
    for path in (tmp_path / "tiny-imagenet-200" / "val").rglob("*.JPEG"):
        path.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"val_0\.JPEG: none of the images can be read \(the file is empty\); delete the"
    ):
        tiny_imagenet(tmp_path, False)


def test_only_what_is_read_is_unpacked(tmp_path, md5):
    folder = tmp_path / "tiny-imagenet-200"
    tiny_imagenet(tmp_path, True, url=URL, md5=md5)
    assert not (folder / "test").exists() and not list(folder.rglob("*boxes.txt"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: [*lines, "val_9.JPEG\tn01\t0"], r"val_annotations\.txt: line 7 names 'val_9\.JPEG'"),
        (lambda lines: [*lines, lines[0]], r"val_annotations\.txt: line 7 names 'val_0\.JPEG'"),
        (lambda lines: lines[:-2], r"val_annotations\.txt: 2 images have no line \(first val_4\.JPEG\)"),
        (lambda lines: [lines[0].replace("n03", "n99"), *lines[1:]], r"line 1 has the class 'n99'"),
        (lambda lines: ["val_0.JPEG", *lines[1:]], r"line 1 has the class ''"),
        (lambda lines: [], r"6 images have no line"),
    ],
)
def test_annotations_that_do_not_match(tmp_path, md5, change, says):
    tiny_imagenet(tmp_path, True, url=URL, md5=md5)
    path = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(DataError, match=says) as caught:
        tiny_imagenet(tmp_path, False)
    assert f"delete the folder {tmp_path / 'tiny-imagenet-200'} so" in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "train", "says"),
    [
        ("val/val_annotations.txt", False, r"val_annotations\.txt: no such file; delete the folder"),
        ("wnids.txt", True, r"wnids\.txt: no such file"),
        ("val/images", False, r"val/images: no such folder"),
        ("train/n02", True, r"wnids\.txt: lists 3 classes, train/ has 2 \(difference: n02\)"),
        ("train/n02/images", True, r"train/n02/images: no such folder"),
    ],
)
def test_missing_parts_are_named(tmp_path, md5, gone, train, says):
    tiny_imagenet(tmp_path, True, url=URL, md5=md5)
    path = tmp_path / "tiny-imagenet-200" / gone
    path.rename(tmp_path / "gone")
    with pytest.raises(DataError, match=says):
        tiny_imagenet(tmp_path, train)
