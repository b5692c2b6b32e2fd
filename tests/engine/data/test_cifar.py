"""CIFAR from synthetic copies of both layouts, by every way in; and the real CIFAR-10 with its documented facts."""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from engine.data.cifar import CIFAR10, CIFAR100, Npm, Official, cifar10, cifar100
from engine.data.dataset import DataError

NAMES = ("train_images", "train_labels", "test_images", "test_labels")
NOWHERE = "http://127.0.0.1:9/"


class PythonTwo(pickle._Pickler):
    """Writes as Python 2 did, whose only text was bytes: the form of the official files."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_text(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text

    @classmethod
    def dumps(cls, batch):
        cls(file := io.BytesIO(), protocol=2).dump(batch)
        return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def small_arrays(classes=10):
    random = np.random.default_rng(classes)
    images = random.integers(0, 256, (25, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, classes, 25)
    return {
        "train_images": images[:20],
        "train_labels": labels[:20],
        "test_images": images[20:],
        "test_labels": labels[20:],
    }


def pickles_of(arrays, variant, dumps):
    """The official files, by name: equal slices of the training images, then the test images."""
    files = {}
    for part, names in (("train", variant.train), ("test", variant.test)):
        pieces = (np.split(arrays[f"{part}_{kind}"], len(names)) for kind in ("images", "labels"))
        for name, images, labels in zip(names, *pieces, strict=True):
            planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(-1, 3072)
            files[name] = dumps({"batch_label": name, variant.label_key: labels.tolist(), "data": planes})
    return files


def pack(path, files, folder):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pngs_of(arrays):
    def png(images):
        Image.fromarray(images.reshape(len(images), 1024, 3)).save(file := io.BytesIO(), format="PNG")
        return file.getvalue()

    files = {f"data_batch_{i + 1}.png": png(part) for i, part in enumerate(np.split(arrays["train_images"], 5))}
    files["test_batch.png"] = png(arrays["test_images"])
    files |= {
        f"{part}_lables.json": json.dumps(arrays[f"{part}_labels"].tolist()).encode() for part in ("train", "test")
    }
    return files | {"index.js": b"no data"}


def variant_of(base, arrays, files):
    """`base` with the digests of these arrays and pickles."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return dataclasses.replace(
        base,
        train={name: md5[name] for name in base.train},
        test={name: md5[name] for name in base.test},
        sha256={name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in base.sha256},
    )


class Kit:
    """Small CIFAR-10 under `root`: its arrays, its variant, and a source for each way in."""

    def __init__(self, root, monkeypatch, dumps=PythonTwo.dumps):
        self.root = root
        self.arrays = small_arrays()
        self.files = pickles_of(self.arrays, CIFAR10, dumps)
        self.variant = variant_of(CIFAR10, self.arrays, self.files)
        tgz = pack(root.parent / "served" / "thing.tgz", pngs_of(self.arrays), "package")
        self.npm = Npm("thing@1.0", hashlib.sha256(tgz.read_bytes()).hexdigest())
        npm = root.parent / "bin" / "npm"
        npm.parent.mkdir()
        npm.write_text(f'#!/bin/sh\necho run >> "{root.parent}/npm_runs"\nsleep 0.2\ncp "{tgz}" .\n')
        npm.chmod(0o755)
        monkeypatch.setenv("PATH", str(npm.parent), prepend=os.pathsep)

    def official(self):
        """Puts the official archive where a user may have it."""
        path = pack(self.root / "cifar-10-python.tar.gz", self.files, CIFAR10.folder)
        return Official(NOWHERE + path.name, hashlib.md5(path.read_bytes()).hexdigest())

    def open(self, train, *sources):
        return cifar10(self.root, train, sources=sources, variant=self.variant)

    def assert_right(self, *sources):
        for part in ("train", "test"):
            dataset = self.open(part == "train", *sources)
            np.testing.assert_array_equal(dataset.images, self.arrays[f"{part}_images"])
            np.testing.assert_array_equal(dataset.labels, self.arrays[f"{part}_labels"])
            assert isinstance(dataset.images, np.memmap) and dataset.labels.dtype == np.int64
            assert dataset.num_classes == 10


@pytest.fixture
def kit(tmp_path, monkeypatch):
    return Kit(tmp_path / "data", monkeypatch)


@pytest.mark.parametrize("protocol", ["python2", 2, 3, 4])
def test_official_archive_and_npm_package_become_the_same_files(tmp_path, monkeypatch, protocol):
    dumps = PythonTwo.dumps if protocol == "python2" else lambda batch: pickle.dumps(batch, protocol)
    kit = Kit(tmp_path / "data", monkeypatch, dumps)
    kit.assert_right(kit.official())
    kit.root.rename(tmp_path / "first")
    kit.assert_right(kit.npm)
    for name in NAMES:
        path = Path("cifar10", f"{name}.npy")
        assert (kit.root / path).read_bytes() == (tmp_path / "first" / path).read_bytes()
    ready = json.loads((kit.root / "cifar10" / "READY").read_text())
    assert {name: entry["sha256"] for name, entry in ready["files"].items()} == kit.variant.sha256


def test_unreachable_site_falls_back_to_npm_and_leaves_no_archive(kit):
    kit.assert_right(Official(NOWHERE + "cifar-10-python.tar.gz", "0" * 32), kit.npm)
    assert not list(kit.root.rglob("*.tgz")) and not list(kit.root.rglob("*.part"))


def test_users_folder_is_read_without_any_source(kit):
    (kit.root / CIFAR10.folder / "sub").mkdir(parents=True)
    for name, content in kit.files.items():
        (kit.root / CIFAR10.folder / name).write_bytes(content)
    kit.assert_right()


def test_users_damaged_folder_is_passed_over_with_a_warning(kit, caplog):
    (kit.root / CIFAR10.folder).mkdir(parents=True)
    (kit.root / CIFAR10.folder / "data_batch_1").write_bytes(b"half")
    kit.assert_right(kit.npm)
    assert "data_batch_1 has md5" in caplog.text


def test_prepared_once_and_opened_without_a_source(kit):
    kit.assert_right(kit.npm)
    kit.assert_right()
    assert (kit.root.parent / "npm_runs").read_text() == "run\n"


def test_two_processes_at_once_prepare_once(kit):
    context = multiprocessing.get_context("spawn")
    arguments = {"sources": (kit.npm,), "variant": kit.variant}
    ranks = [context.Process(target=cifar10, args=(kit.root, True), kwargs=arguments) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert (kit.root.parent / "npm_runs").read_text() == "run\n"
    kit.assert_right()


def test_unfinished_folder_is_prepared_again(kit):
    kit.assert_right(kit.npm)
    (kit.root / "cifar10" / "READY").unlink()
    (kit.root / "cifar10" / "train_images.npy").write_bytes(b"half")
    kit.assert_right(kit.npm)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_that_runs_code_is_refused(kit, tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    kit.files["data_batch_3"] = pickle.dumps({"data": Malicious(), "labels": [0]}, protocol)
    kit.variant = variant_of(CIFAR10, kit.arrays, kit.files)
    with pytest.raises(
        DataError, match=r"data_batch_3: not a CIFAR batch \(it asks for posix\.mkdir, which is refused\)"
    ):
        kit.open(True, kit.official())
    assert not (tmp_path / "owned").exists() and not (kit.root / "cifar10").exists()


@pytest.mark.parametrize("batch", [{"labels": [1]}, [1, 2], {"data": np.zeros((1, 7), np.uint8), "labels": [1]}])
def test_pickle_of_something_else(kit, batch):
    kit.files["test_batch"] = pickle.dumps(batch, 4)
    kit.variant = variant_of(CIFAR10, kit.arrays, kit.files)
    with pytest.raises(DataError, match="test_batch: not a CIFAR batch"):
        kit.open(True, kit.official())


def test_archive_without_a_batch_or_with_other_images(kit):
    del kit.files["data_batch_2"]
    with pytest.raises(DataError, match="lacks data_batch_2"):
        kit.open(True, kit.official())
    kit.variant = dataclasses.replace(kit.variant, sha256={"test_images": "0" * 64})
    with pytest.raises(DataError, match=r"test_images has sha256 .*, expected 000"):
        kit.open(True, kit.npm)


def test_labels_out_of_range(kit):
    kit.variant = dataclasses.replace(kit.variant, classes=3, sha256={})
    with pytest.raises(DataError, match="labels up to 9"):
        kit.open(True, kit.npm)


def test_no_source_is_left_lists_why(kit):
    wrong = dataclasses.replace(kit.npm, sha256="0" * 64)
    with pytest.raises(DataError) as caught:
        kit.open(True, Official(NOWHERE + "cifar-10-python.tar.gz", "0" * 32), wrong)
    assert "refused" in str(caught.value) and "sha256 is" in str(caught.value) and "\n" not in str(caught.value)


def damage(folder, kind):
    images = folder / "train_images.npy"
    ready = folder / "READY"
    if kind == "truncated":
        images.write_bytes(images.read_bytes()[:-100])
    elif kind == "missing":
        images.unlink()
    elif kind == "ready":
        ready.write_text("{}")
    else:
        ready.write_text(ready.read_text().replace('"sha256": "', '"sha256": "0'))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", r"train_images\.npy: \d+ bytes, expected \d+; delete the folder .*cifar10 so"),
        ("missing", r"train_images\.npy: None bytes, expected"),
        ("ready", r"READY: not readable .*; delete the folder"),
        ("foreign", r"READY: train_images has sha256 0.*, expected .*; delete the folder"),
    ],
)
def test_damage_after_preparing_names_the_file(kit, kind, says):
    kit.assert_right(kit.npm)
    damage(kit.root / "cifar10", kind)
    with pytest.raises(DataError, match=says):
        kit.open(True)


def test_cifar100_reads_fine_labels(tmp_path):
    arrays = small_arrays(classes=100)
    files = pickles_of(arrays, CIFAR100, PythonTwo.dumps)
    path = pack(tmp_path / "cifar-100-python.tar.gz", files, CIFAR100.folder)
    source = Official(NOWHERE + path.name, hashlib.md5(path.read_bytes()).hexdigest())
    variant = variant_of(CIFAR100, arrays, files)
    for part in ("train", "test"):
        dataset = cifar100(tmp_path, part == "train", sources=[source], variant=variant)
        np.testing.assert_array_equal(dataset.images, arrays[f"{part}_images"])
        np.testing.assert_array_equal(dataset.labels, arrays[f"{part}_labels"])
        assert dataset.num_classes == 100


@pytest.mark.network
def test_real_cifar10():
    root = Path(__file__).parents[3] / "data"
    train, test = cifar10(root, True), cifar10(root, False)
    assert train.images.shape == (50_000, 32, 32, 3) and test.images.shape == (10_000, 32, 32, 3)
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert np.bincount(train.labels).tolist() == [5_000] * 10 and np.bincount(test.labels).tolist() == [1_000] * 10
    counts = np.stack([np.bincount(train.images[..., c].ravel(), minlength=256) for c in range(3)]) / (50_000 * 32 * 32)
    mean = counts @ np.arange(256)
    std = np.sqrt(counts @ np.arange(256) ** 2 - mean**2)
    np.testing.assert_allclose(mean / 255, (0.49139968, 0.48215841, 0.44653091), atol=1e-7)
    np.testing.assert_allclose(std / 255, (0.24703223, 0.24348513, 0.26158784), atol=1e-7)
    assert train.image(17).shape == (32, 32, 3) and train.describe(17) == "cifar10[17]"
