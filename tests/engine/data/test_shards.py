"""Sets of shards: which files are which split, every wrong number of them, labels, and the images one by one."""

import gzip
import json
import logging
import pickle
import threading

import numpy as np
import pytest

from engine.data.dataset import DataError, UnreadableImage
from engine.data.shard_files import IndexEntry, ShardIndex, write_index
from engine.data.tfrecord import open_tfrecord
from engine.data.webdataset import open_webdataset
from shard_writers import picture, records, samples, write_tar, write_tfrecord


def make(root, *names, count=2, **options):
    """One shard a name, each with images of its own."""
    for i, name in enumerate(names):
        if ".tar" in name:
            write_tar(root / name, *samples(count, first=count * i, **options))
        else:
            write_tfrecord(root / name, *records(count, first=count * i, **options))


def images_of(dataset):
    return [dataset.encoded(i) for i in range(len(dataset))]


def used(dataset, root):
    """The shards of a dataset, relative to its root."""
    return [path.removeprefix(f"{root}/") for path in dataset.places.shards]


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train/0.tar", "train/1.tar", "val/0.tar"], ["train/0.tar", "train/1.tar"], ["val/0.tar"]),
        (["train/0.tar", "validation/0.tar", "test/0.tar"], ["train/0.tar"], ["validation/0.tar"]),
        (["train/a.tar", "test/a.tar", "more.tar"], ["train/a.tar"], ["test/a.tar"]),
        (["train-1.tar", "train-0.tar", "val-0.tar", "x.tar"], ["train-0.tar", "train-1.tar"], ["val-0.tar"]),
        (["in1k-train-0.tar", "in1k-validation-0.tar"], ["in1k-train-0.tar"], ["in1k-validation-0.tar"]),
        (["TRAIN_0.tar", "Test.tar"], ["TRAIN_0.tar"], ["Test.tar"]),
        (["000.tar", "001.tar"], ["000.tar", "001.tar"], None),
        (["valley.tar", "training-day.tar", "latest.tar"], ["training-day.tar"], None),
        (["valley.tar", "latest.tar"], ["latest.tar", "valley.tar"], None),
        (["images.tar", ".hidden.tar", "notes.txt.tar.part"], ["images.tar"], None),
        (["coco2017.tar"], ["coco2017.tar"], None),
        (["1.tar", "2.tar", "3.tar"], ["1.tar", "2.tar", "3.tar"], None),
        (["a-0.tar", "a-1.tar", "b-0.tar"], ["a-0.tar", "a-1.tar", "b-0.tar"], None),
    ],
)
def test_layouts_of_webdatasets(tmp_path, names, train, val):
    make(tmp_path, *names)
    found = open_webdataset(tmp_path)
    assert used(found.train, tmp_path) == train
    assert (found.val and used(found.val, tmp_path)) == val


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "README.md"],
         ["train-00000-of-00002", "train-00001-of-00002"], ["validation-00000-of-00001"]),
        (["a-train.tfrecord-00000-of-00001", "a-test.tfrecord-00000-of-00001"],
         ["a-train.tfrecord-00000-of-00001"], ["a-test.tfrecord-00000-of-00001"]),
        (["train/x.tfrecord", "train/y.tfrecords", "val/z-00000-of-00001.tfrecord"],
         ["train/x.tfrecord", "train/y.tfrecords"], ["val/z-00000-of-00001.tfrecord"]),
        (["s-1-of-2", "s-2-of-2"], ["s-1-of-2", "s-2-of-2"], None),
    ],
)  # fmt: skip
def test_layouts_of_tfrecords(tmp_path, names, train, val):
    make(tmp_path, *names)
    found = open_tfrecord(tmp_path)
    assert used(found.train, tmp_path) == train
    assert (found.val and used(found.val, tmp_path)) == val


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-000.tar", "train-002.tar", "train-003.tar"], "1 of 4 shards are missing, the first is train-001.tar;"),
        (["train-002.tar", "train-003.tar"], "of 3 shards are missing, the first is train-001.tar;"),
        (["train-005.tar"], "4 of 5 shards are missing, the first is train-001.tar;"),
        (["20230101.tar", "20230103.tar"], "the first is 00000001.tar;"),
        (["train-0.tar", "val-0.tar", "val-2.tar"], "1 of 3 shards are missing, the first is val-1.tar;"),
        (["train-00000-of-00003", "train-00001-of-00003"], "1 of 3 shards are missing, the first is "
         "train-00002-of-00003;"),
        (["train-00001-of-00003", "train-00002-of-00003"], "the first is train-00000-of-00003;"),
        (["train-00003-of-00003"], "2 of 3 shards are missing, the first is train-00001-of-00003;"),
        (["t-00000-of-00001", "t-00001-of-00001"], "2 shards are there, 1 by their names; remove the others"),
        (["t-00000-of-00001", "t-00000-of-00002", "t-00001-of-00002"], "shards of a set of 00001 and of a set of"),
    ],
)  # fmt: skip
def test_missing_shards(tmp_path, names, words):
    make(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        (open_webdataset if ".tar" in names[0] else open_tfrecord)(tmp_path)
    assert str(tmp_path) in str(caught.value) and words in str(caught.value)


def test_the_number_of_shards_may_be_stated(tmp_path):
    make(tmp_path, "train-000.tar", "train-002.tar", "val-000.tar")
    for count in (1, 3):
        with pytest.raises(DataError, match=rf"{tmp_path}: 2 training shards, and data\.shards is {count}; copy"):
            open_webdataset(tmp_path, shards=count)
    assert len(open_webdataset(tmp_path, shards=2).train) == 4


def test_errors_name_the_folder_and_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"missing: no such folder; set data\.root"):
        open_webdataset(tmp_path / "missing")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty: no webdataset shards there or in train/; set data\.root"):
        open_webdataset(tmp_path / "empty")
    make(tmp_path, "half/val-0.tar")
    with pytest.raises(DataError, match=r"half/val-0\.tar: validation shards without any for training; put those"):
        open_webdataset(tmp_path / "half")
    make(tmp_path, "odd/val/0.tar", "odd/train/text-00000-of-00001")
    with pytest.raises(DataError, match=r"odd/val/0\.tar: validation shards without"):
        open_webdataset(tmp_path / "odd")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "s-0.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match=r"packed: no webdataset shards .*; s-0\.tar\.gz is compressed.* decompress it"):
        open_webdataset(tmp_path / "packed")


def test_a_shard_without_an_image_is_an_error(tmp_path):
    make(tmp_path, "train-0.tar")
    for members in ([], [("a.txt", b"text"), ("b.cls", b"1")]):
        write_tar(tmp_path / "train-1.tar", *members)
        with pytest.raises(DataError, match=r"train-1\.tar: a webdataset shard without any image; remove it"):
            open_webdataset(tmp_path)
    (tmp_path / "train-00000-of-00001").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000-of-00001: a tfrecord shard without any image"):
        open_tfrecord(tmp_path)


def test_a_damaged_shard_is_an_error_with_its_name(tmp_path):
    make(tmp_path, "train-0.tar", "train-1.tar")
    content = (tmp_path / "train-1.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(content[:700])
    with pytest.raises(DataError, match=r"train-1\.tar: truncated: it ends at byte 700"):
        open_webdataset(tmp_path)
    (tmp_path / "train-1.tar").write_bytes(content)
    assert len(open_webdataset(tmp_path).train) == 4  # an error is not kept


def test_unreadable_images_are_left_out_and_reported_once(tmp_path, caplog):
    broken = picture(1, "JPEG", (64, 64))
    members = [("a.png", picture(0)), ("a.cls", b"0"), ("b.jpg", broken[: len(broken) // 2]), ("b.cls", b"1"),
               ("c.png", b""), ("c.cls", b"1"), ("d.png", picture(3)), ("d.cls", b"2")]  # fmt: skip
    write_tar(tmp_path / "train-0.tar", *members)
    with caplog.at_level(logging.WARNING):
        train, _ = open_webdataset(tmp_path)
        open_webdataset(tmp_path)
    assert images_of(train) == [picture(0), picture(3)] and train.labels.tolist() == [0, 2]
    assert [name for name, _ in train.rejected] == [f"{tmp_path}/train-0.tar:b", f"{tmp_path}/train-0.tar:c"]
    assert len(caplog.records) == 1
    assert "left out 2 of 4 images" in caplog.text and "train-0.tar:b: " in caplog.text
    write_tar(tmp_path / "train-0.tar", ("z.png", b"no image"))
    with pytest.raises(DataError, match=r"no readable image among 1 \(first: .*train-0\.tar:z: not an image"):
        open_webdataset(tmp_path, shards=1)


def test_labels_are_used_where_every_image_has_one(tmp_path, caplog):
    write_tar(tmp_path / "train-0.tar", *samples(2), *samples(1, first=2, classes=None))
    make(tmp_path, "val-0.tar")
    train, val = open_webdataset(tmp_path)
    assert train.labels is None and train.num_classes is None and "1 of 3 images have no label" in caplog.text
    assert val.labels.tolist() == [0, 1]
    make(tmp_path / "b", "train-0.tar")
    make(tmp_path / "b", "val-0.tar", classes=None)
    assert open_webdataset(tmp_path / "b").val is None and "not every validation image has a label" in caplog.text


def test_classes_are_numbered_over_both_splits(tmp_path):
    write_tar(tmp_path / "train-0.tar", ("a.png", picture(0)), ("a.cls", b"1"))
    write_tar(tmp_path / "val-0.tar", ("a.png", picture(0)), ("a.cls", b"3"))
    train, val = open_webdataset(tmp_path)
    assert train.classes == val.classes == ("0", "1", "2", "3") and train.num_classes == 4
    write_tar(tmp_path / "val-0.tar", ("a.png", picture(0)), ("a.cls", b"123456789012"))
    with pytest.raises(DataError, match="label 123456789012 is no class number"):
        open_webdataset(tmp_path, shards=1)


@pytest.fixture
def dataset(tmp_path):
    make(tmp_path, "train-0.tar", "train-1.tar", "train-2.tar", count=5)
    return open_webdataset(tmp_path).train


def test_one_image_at_a_time(dataset, tmp_path):
    assert images_of(dataset) == [picture(i) for i in range(15)]
    assert dataset.labels.tolist() == [i % 3 for i in range(15)]
    assert dataset.describe(7) == f"{tmp_path}/train-1.tar:0007"
    for index in (-1, 15):
        with pytest.raises(IndexError):
            dataset.encoded(index)


def test_subset(dataset):
    some = dataset.subset("some", np.array([14, 0, 7]))
    assert images_of(some) == [picture(14), picture(0), picture(7)] and some.labels.tolist() == [2, 0, 1]
    assert some.describe(0) == dataset.describe(14) and some.name == "some" and some.classes == dataset.classes
    assert images_of(some.subset("one", np.array([2]))) == [picture(7)]


def test_pickling_keeps_it_small(dataset):
    data = pickle.dumps(dataset)
    assert len(data) < 4000
    assert images_of(pickle.loads(data)) == images_of(dataset)


def test_many_threads_read_the_same(dataset):
    expected, wrong = images_of(dataset), []

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, 15, 300):
            if dataset.encoded(int(i)) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_shard_that_changes_while_it_is_in_use(dataset, tmp_path):
    (tmp_path / "train-1.tar").write_bytes((tmp_path / "train-1.tar").read_bytes()[:600])
    with pytest.raises(UnreadableImage, match=r"train-1\.tar:0005.*truncated"):
        dataset.encoded(5)
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"train-1\.tar:0006.*No such file"):
        dataset.encoded(6)
    assert dataset.encoded(0) == picture(0)


def test_fingerprints(dataset, tmp_path):
    make(tmp_path / "moved", "train-0.tar", "train-1.tar", "train-2.tar", count=5)
    assert open_webdataset(tmp_path / "moved").train.fingerprint() == dataset.fingerprint()
    assert dataset.subset("webdataset", np.arange(15)).fingerprint() == dataset.fingerprint()
    others = [dataset.subset("webdataset", np.array(some)) for some in ([0, 1], [1, 0], [0, 2], range(14))]
    make(tmp_path / "renamed", "train-a.tar", "train-b.tar", "train-c.tar", count=5)
    others.append(open_webdataset(tmp_path / "renamed").train)
    assert len({data.fingerprint() for data in (dataset, *others)}) == 6


# -- the index of packed shards --------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path):
    make(tmp_path, "train-000000.tar", "train-000001.tar", "val-000000.tar", count=3)
    entries = [IndexEntry(path.name, 3, path.stat().st_size) for path in sorted(tmp_path.glob("*.tar"))]
    write_index(tmp_path, ShardIndex(("ant", "bee", "cat"), tuple(entries)))
    return tmp_path


def test_the_index_names_the_classes(packed):
    assert open_webdataset(packed).train.classes == open_webdataset(packed).val.classes == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train-000001.tar", "lists 3 shards, of which 2 are there; 1 are missing, as train-000001.tar"),
        ("val-000000.tar", "1 are missing, as val-000000.tar"),
    ],
)
def test_a_shard_of_the_index_is_missing(packed, name, words):
    (packed / name).unlink()  # no gap in the numbers
    with pytest.raises(DataError) as caught:
        open_webdataset(packed)
    assert f"{packed}/dogo-shards.json: " in str(caught.value) and words in str(caught.value)


def test_a_shard_that_the_index_does_not_have(packed):
    make(packed, "train-000002.tar")
    with pytest.raises(DataError, match=r"dogo-shards\.json: lists 3 shards.*1 are not in it, as train-000002\.tar"):
        open_webdataset(packed)


def test_a_shard_of_another_size_or_with_other_images(packed):
    write_tar(packed / "train-000001.tar", *samples(1), ("big.txt", bytes(20_000)))
    with pytest.raises(DataError, match=r"train-000001\.tar: \d+ bytes, \d+ when it was packed; copy it again"):
        open_webdataset(packed)
    make(packed, "train-000001.tar", count=1)  # of the same size, as archives are filled up to 10,240 bytes
    with pytest.raises(DataError, match=r"train-000001\.tar: 1 images, 3 by dogo-shards\.json beside it"):
        open_webdataset(packed)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"shards": []}', '{"shards": [{"name": "a"}], "classes": null}', "[" * 9999]
)
def test_a_damaged_index(packed, text):
    (packed / "dogo-shards.json").write_text(text)
    with pytest.raises(DataError, match=r"dogo-shards\.json: damaged \(.*copy it again"):
        open_webdataset(packed)


def test_an_index_with_too_few_classes(packed):
    plain = json.loads((packed / "dogo-shards.json").read_text())
    (packed / "dogo-shards.json").write_text(json.dumps({**plain, "classes": ["ant"]}))
    with pytest.raises(DataError, match=r"label 2, and dogo-shards\.json names 1 classes"):
        open_webdataset(packed)
