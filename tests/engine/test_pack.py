"""Packed shards hold what the folder holds, always in the same bytes, and are there as a whole or not at all."""

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import pack as module
from engine.data.dataset import DataError
from engine.data.folder import open_folder
from engine.data.webdataset import open_webdataset
from engine.pack import Limit, main, pack
from shard_writers import picture

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "imagewoof320-mini.tar"


@pytest.fixture
def images(tmp_path):
    """Two classes of train/ and val/, 40 and 10 images, some with names that need care, and one that is none."""
    root = tmp_path / "images"
    for i in range(50):
        folder = root / ("train" if i < 40 else "val") / ("猫" if i % 2 else "dog.s")
        folder.mkdir(parents=True, exist_ok=True)
        kind, ending = (("JPEG", "JPEG"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        (folder / f"im.age {i // 2}.{ending}").write_bytes(picture(i, kind, (20 + i, 30)))
    (root / "train" / "dog.s" / "text.jpg").write_text("no image")
    return root


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_class(*datasets):
    """(class, bytes) of every image, however often."""
    return Counter((data.classes[data.labels[i]], data.encoded(i)) for data in datasets for i in range(len(data)))


def test_the_same_images_and_labels(images, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main([str(images), str(out), "--images-per-shard", "12"]) == 0
    said = capsys.readouterr().out
    assert f"wrote 5 shards with 50 images, 0 MB, to {out}" in said and "data.dataset=webdataset" in said
    names = [f"train-{i:06d}.tar" for i in range(4)] + ["val-000000.tar", "dogo-shards.json"]
    assert sorted(content_of(out)) == sorted(names)
    folder, shards = open_folder(images), open_webdataset(out)
    assert shards.train.classes == shards.val.classes == ("dog.s", "猫")
    assert by_class(shards.train) == by_class(folder.train) and by_class(shards.val) == by_class(folder.val)
    assert len(shards.train) == 40 and not shards.train.rejected


def test_any_reader_of_tar_archives_reads_them(images, tmp_path):
    pack(images, tmp_path / "out", split="val")
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as tar:
        members = tar.getmembers()
    endings = [member.name.split(".", 1)[1] for member in members]
    assert set(endings[::2]) == {"jpg", "png", "webp"} and set(endings[1::2]) == {"cls"}
    keys = [member.name.split(".", 1)[0] for member in members]
    assert keys[::2] == keys[1::2] == sorted(set(keys)) and all("-im_age " in key for key in keys)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_packing_twice_gives_the_same_bytes_and_another_seed_another_order(images, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack(images, tmp_path / name, limit=Limit(12, None), seed=seed)
    for path in images.rglob("*.png"):
        os.utime(path, (1, 1))
    pack(images, tmp_path / "d", limit=Limit(12, None))
    a, b, c, d = (content_of(tmp_path / name) for name in "abcd")
    assert a == b == d and a != c
    assert by_class(open_webdataset(tmp_path / "c").train) == by_class(open_webdataset(tmp_path / "a").train)


def test_shards_mix_the_classes(images, tmp_path):
    pack(images, tmp_path / "out", limit=Limit(10, None))
    labels = open_webdataset(tmp_path / "out").train.labels.reshape(4, 10)
    assert all(2 <= row.sum() <= 8 for row in labels)


def test_size_of_shards(images, tmp_path):
    index = pack(images, tmp_path / "out", split="train", limit=Limit(None, 30_000))
    assert len(index.shards) > 2 and sum(entry.images for entry in index.shards) == 40
    assert all(20_000 < entry.bytes <= 40_960 for entry in index.shards[:-1])  # tar fills up to whole 10,240
    one_each = pack(images, tmp_path / "tiny", split="val", limit=Limit(None, 1))
    assert [entry.images for entry in one_each.shards] == [1] * 10


def test_resize_makes_larger_images_smaller_and_leaves_the_others(images, tmp_path):
    pack(images, tmp_path / "out", split="train", resize=25)
    folder, shards = open_folder(images).train, open_webdataset(tmp_path / "out").train
    small = {folder.encoded(i) for i in range(40) if min(folder.facts.sizes[i]) <= 25}
    packed = {shards.encoded(i) for i in range(40)}
    assert small == packed & small and len(small) == 6 and len(packed) == 40
    made = [shards.image(i) for i in range(40) if shards.encoded(i) not in small]
    assert all(min(image.size) == 25 for image in made)
    assert sorted(image.size for image in made)[-1] == (49, 25)  # 59 x 30


def test_resized_images_look_the_same(tmp_path):
    y, x = np.mgrid[:300, :400]
    pixels = np.stack([x * 255 / 399, y * 255 / 299, 0 * x + 128], 2).astype(np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "ramp.png")
    pack(tmp_path / "in", tmp_path / "out", resize=75)
    dataset = open_webdataset(tmp_path / "out").train
    with Image.open(io.BytesIO(dataset.encoded(0))) as image:
        assert image.format == "JPEG" and image.size == (100, 75)
    error = np.asarray(dataset.image(0), float) - pixels[2::4, 2::4]
    assert np.abs(error).mean() < 1.5


def test_images_without_labels(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i))
    index = pack(tmp_path / "in", tmp_path / "out")
    assert index.classes is None and json.loads((tmp_path / "out" / "dogo-shards.json").read_text())["classes"] is None
    dataset = open_webdataset(tmp_path / "out").train
    assert dataset.labels is None and {dataset.encoded(i) for i in range(3)} == {picture(i) for i in range(3)}


def test_bad_input(images, tmp_path, capsys):
    def error_of(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err

    assert "missing: no such folder" in error_of(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert f"{tmp_path}/full: not empty (notes.txt); give a new folder" in error_of(images, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["notes.txt"]
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file: cannot be written to (File exists)" in error_of(images, tmp_path / "file")
    assert "has no val/ or test/ to pack" in error_of(images / "train", tmp_path / "out", "--split", "val")
    for wrong in (["--images-per-shard", "0"], ["--resize", "x"], ["--split", "test"],
                  ["--images-per-shard", "1", "--megabytes-per-shard", "1"]):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main([str(images), str(tmp_path / "out"), *wrong])


def test_a_run_that_is_cut_leaves_nothing(images, tmp_path, monkeypatch):
    taken = []

    def add(self, sample, add=module._ShardWriter.add):
        taken.append(sample)
        if len(taken) == 25:
            assert (tmp_path / "out" / ".partial" / "train-000001.tar").exists()
            raise KeyboardInterrupt
        add(self, sample)

    monkeypatch.setattr(module._ShardWriter, "add", add)
    with pytest.raises(KeyboardInterrupt):
        pack(images, tmp_path / "out", limit=Limit(10, None))
    assert os.listdir(tmp_path / "out") == []


def test_a_run_that_is_cut_while_it_moves_the_shards_does_not_look_whole(images, tmp_path, monkeypatch):
    moved = []

    def move(source, destination):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(os.replace(source, destination))

    monkeypatch.setattr(module, "move_into_place", move)
    with pytest.raises(KeyboardInterrupt):
        pack(images, tmp_path / "out", limit=Limit(10, None))
    assert sorted(os.listdir(tmp_path / "out")) == ["dogo-shards.json", "train-000000.tar", "train-000001.tar"]
    with pytest.raises(DataError, match="lists 5 shards, of which 2 are there; 3 are missing, as train-000002.tar"):
        open_webdataset(tmp_path / "out")


def test_a_full_disk(images, tmp_path):
    """The limit on a file's size stands in for it: a write fails half-way, with the operating system's error."""
    open_folder(images)  # a scan would write its manifest
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(ROOT / "engine" / "pack.py"), str(images), str(out)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {out}: cannot be written (File too large) after 0.1 MB; free space" in done.stderr
    assert done.stderr.count("\n") == 2 and "Exception" not in done.stderr  # the file that is no image, and the error
    assert os.listdir(out) == []


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"needs {PHOTOS.name} in shared/data")
def test_real_photos(tmp_path):
    with tarfile.open(PHOTOS) as tar:
        # Python before 3.11.4 has no filters and needs none here: the archive comes with the tests' data.
        tar.extractall(tmp_path / "in", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    pack(tmp_path / "in", tmp_path / "out", limit=Limit(None, 5_000_000))
    folder, shards = open_folder(tmp_path / "in"), open_webdataset(tmp_path / "out")
    assert len(shards.train.places.shards) > 5 and len(shards.train) == 1200 and len(shards.val) == 400
    assert by_class(shards.train) == by_class(folder.train) and by_class(shards.val) == by_class(folder.val)
    assert all(shards.train.image(i).size == tuple(shards.train.facts.sizes[i]) for i in range(0, 1200, 100))
