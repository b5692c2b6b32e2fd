"""A user's own images: layouts, labels, what is left out, what is an error, and the split for kNN."""

import os
import tarfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from engine.data import folder
from engine.data.catalog import NATIVE_SIZE, open_dataset
from engine.data.dataset import DataError
from engine.data.folder import open_folder
from engine.data.manifest import NAME
from engine.data_config import DataConfig

PHOTOS = Path(__file__).parents[3].parent / "shared" / "data" / "imagewoof320-mini.tar"


def make(root, *names):
    """Writes one small image a name, of another colour each."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (i % 256, 0, 0)).save(root / name)


def names_of(dataset, root):
    return [os.path.relpath(dataset.path(i), root) for i in range(len(dataset))]


def test_class_folders_in_train_and_val(tmp_path):
    make(tmp_path, "train/cat/2.png", "train/cat/1.JPG", "train/ant/deep/er/3.webp", "train/dog/4.gif", "val/dog/5.tif")
    make(tmp_path, "extra/not.png")
    train, val = open_folder(tmp_path)
    assert names_of(train, tmp_path / "train") == ["ant/deep/er/3.webp", "cat/1.JPG", "cat/2.png", "dog/4.gif"]
    assert train.classes == ("ant", "cat", "dog") and train.labels.tolist() == [0, 1, 1, 2]
    assert val.labels.tolist() == [2] and val.num_classes == 3
    assert open_dataset("folder", tmp_path, "bank") is train and open_dataset("folder", tmp_path, "test") is val
    assert train.rejected == [] and train.image(0).size == (8, 6)


def test_test_folder_serves_where_there_is_no_val(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/2.png")
    assert names_of(open_dataset("folder", tmp_path, "test"), tmp_path) == ["test/b/2.png"]


@pytest.mark.parametrize(
    "names", [("1.png", "2.png"), ("1.png", "a/2.png", "b/3.png"), ("only/1.png", "only/in/2.png")]
)
@pytest.mark.parametrize("top", ["", "train/"])
def test_no_labels(tmp_path, names, top):
    make(tmp_path, *(top + name for name in names))
    dataset = open_dataset("folder", tmp_path, "train")
    assert len(dataset) == len(names) and dataset.labels is None and dataset.num_classes is None
    assert open_dataset("folder", tmp_path, "bank") is None and open_dataset("folder", tmp_path, "test") is None


def test_hidden_and_other_files_are_skipped(tmp_path):
    make(tmp_path, "a/1.png", "a/.2.png", ".trash/3.png", "b/4.PnG", "b/.cache/5.png")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "labels.csv").write_text("x")
    dataset = open_dataset("folder", tmp_path, "train")
    assert names_of(dataset, tmp_path) == ["a/1.png", "b/4.PnG"] and dataset.rejected == []


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    make(tmp_path, "store/1.png", "images/a/1.png", "images/b/1.png")
    (tmp_path / "images" / "c").symlink_to(tmp_path / "store")
    (tmp_path / "images" / "d").symlink_to(tmp_path / "store")
    (tmp_path / "images" / "a" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    dataset = open_dataset("folder", tmp_path / "images", "train")
    assert names_of(dataset, tmp_path / "images") == ["a/1.png", "b/1.png", "c/1.png", "d/1.png"]
    assert [(os.path.basename(path), reason) for path, reason in dataset.rejected] == [
        ("gone.png", "No such file or directory")
    ]


def test_unreadable_files_are_left_out_and_reported_once(tmp_path, caplog):
    make(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(3)))
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "a" / "text.jpg").write_text("no image")
    for i in range(4):
        (tmp_path / "b" / f"page{i}.jpeg").write_text("<html>")
    Image.new("CMYK", (5, 5)).save(tmp_path / "b" / "print.jpg")
    cut = tmp_path / "b" / "cut.jpg"
    Image.effect_noise((90, 90), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    for split in ("train", "bank", "test"):
        open_dataset("folder", tmp_path, split)
    dataset = open_dataset("folder", tmp_path, "train")
    assert len(dataset) == 7 and len(dataset.rejected) == 7
    assert dataset.rejected[0] == (str(tmp_path / "a" / "empty.jpg"), "the file is empty")
    assert len(caplog.records) == 1
    assert "left out 7 of 14 files" in caplog.text and "a/empty.jpg: the file is empty" in caplog.text
    assert "page1.jpeg" not in caplog.text and "\n" not in caplog.records[0].getMessage()


def test_the_listing_is_read_from_one_manifest(tmp_path, monkeypatch):
    make(tmp_path, "train/a/1.png", "train/a/2.jpg", "train/b/1.webp", "test/a/1.png", "test/b/2.png", "extra/3.png")
    (tmp_path / "test" / "b" / "1.png").write_bytes(b"")
    fresh = open_folder(tmp_path)
    lines = (tmp_path / NAME).read_text().splitlines()[1:]
    assert [line.split('"')[1] for line in lines] == [
        "train/a/1.png", "train/a/2.jpg", "train/b/1.webp", "test/a/1.png", "test/b/1.png", "test/b/2.png",
    ]  # fmt: skip
    folder._list.cache_clear()
    monkeypatch.setattr("engine.data.manifest.inspect", None)  # not one image is decoded
    for one, other in zip(fresh, open_folder(tmp_path), strict=True):
        assert one is not other and one.fingerprint() == other.fingerprint() and one.rejected == other.rejected
        np.testing.assert_array_equal(one.labels, other.labels)
        for ours, theirs in zip(one.facts, other.facts, strict=True):
            np.testing.assert_array_equal(ours, theirs, strict=True)
    assert fresh.train.facts.direct.tolist() == [True, True, False]
    assert fresh.val.rejected == [(str(tmp_path / "test" / "b" / "1.png"), "the file is empty")]


def test_the_manifest_may_lie_elsewhere(tmp_path):
    make(tmp_path, "images/1.png", "images/2.png")
    open_dataset("folder", tmp_path / "images", "train", manifest=tmp_path / "facts")
    assert (tmp_path / "facts").is_file() and not (tmp_path / "images" / NAME).exists()


def test_errors_name_the_folder_and_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"missing: no such folder; set data\.root"):
        open_folder(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no readable image among 0 files .*; set data\.root"):
        open_folder(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"among 3 files .*first: .*0\.jpg: not an image"):
        open_folder(tmp_path / "text")
    make(tmp_path, "half/val/a/1.png")
    with pytest.raises(DataError, match=r"half: has val/ but no train/; move"):
        open_folder(tmp_path / "half")
    make(tmp_path, "odd/train/a/1.png", "odd/train/b/1.png", "odd/val/a/1.png", "odd/val/wolf/1.png")
    with pytest.raises(DataError, match=r"odd/val/wolf: a class that train/ lacks \(1 such\)"):
        open_folder(tmp_path / "odd")
    make(tmp_path, "bare/train/a/1.png")
    (tmp_path / "bare" / "val").mkdir()
    with pytest.raises(DataError, match=r"bare/val: no readable image among 0 files"):
        open_folder(tmp_path / "bare")


def test_flat_val_beside_class_folders_is_not_used(tmp_path, caplog):
    make(tmp_path, "train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png", "val/1.png")
    assert names_of(open_dataset("folder", tmp_path, "test"), tmp_path) == ["train/a/2.png", "train/b/2.png"]
    assert "val has no class folders" in caplog.text


def test_every_tenth_image_of_each_class_is_held_out(tmp_path):
    counts = {"a": 25, "b": 10, "c": 3, "d": 1}
    make(tmp_path, *(f"{name}/{i:02}.png" for name, count in counts.items() for i in range(count)))
    train, bank, test = (open_dataset("folder", tmp_path, split) for split in ("train", "bank", "test"))
    assert names_of(test, tmp_path) == ["a/09.png", "a/19.png", "b/09.png", "c/02.png"]
    assert test.labels.tolist() == [0, 0, 1, 2] and test.num_classes == bank.num_classes == 4
    assert len(train) == 39
    assert sorted(names_of(bank, tmp_path) + names_of(test, tmp_path)) == names_of(train, tmp_path)
    np.testing.assert_array_equal(bank.labels, [0] * 23 + [1] * 9 + [2] * 2 + [3])


def test_nothing_to_hold_out(tmp_path):
    make(tmp_path, "a/1.png", "b/1.png")
    assert open_dataset("folder", tmp_path, "bank") is None and open_dataset("folder", tmp_path, "test") is None


@pytest.mark.parametrize(("name", "split"), [("imagenet", "train"), ("folder", "val")])
def test_unknown_name(tmp_path, name, split):
    with pytest.raises(
        DataError, match=r"give one of cifar10, cifar100, stl10, fashion-mnist, .*, tfrecord; train, bank or test"
    ):
        open_dataset(name, tmp_path, split)
    named = get_args(DataConfig.model_fields["dataset"].annotation)
    assert tuple(NATIVE_SIZE) == named, "the catalog and the configuration name the same data sets"


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"needs {PHOTOS.name} in shared/data")
def test_real_photos(tmp_path):
    with tarfile.open(PHOTOS) as tar:
        # Python before 3.11.4 has no filters and needs none here: the archive comes with the tests' data.
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    train, bank, test = (open_dataset("folder", tmp_path, split) for split in ("train", "bank", "test"))
    assert len(train) == len(bank) == 1200 and len(test) == 400 and train.num_classes == 10 and not train.rejected
    assert np.bincount(train.labels).tolist() == [120] * 10 and np.bincount(test.labels).tolist() == [40] * 10
    assert all(os.path.basename(os.path.dirname(test.path(i))) == test.classes[test.labels[i]] for i in range(400))
    sizes = [train.image(i).size for i in range(0, 1200, 25)]
    assert all(min(size) == 320 for size in sizes) and len(set(sizes)) > 10
