"""Scans: what is found of every image, what is scanned again and what not, and manifests that cannot be trusted."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import manifest
from engine.data.dataset import DataError
from engine.data.encoded import SPOILED
from engine.data.manifest import (
    NAME,
    FileRecord,
    Located,
    Scanned,
    facts_of,
    is_listed,
    manifest_path,
    scan,
    warn_of_rejected,
)

PROJECT = Path(__file__).parents[3]
PHOTOS = PROJECT.parent / "shared" / "data" / "imagewoof320-mini.tar"


def stored(form, size=(40, 30), mode="RGB", seed=0, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).convert(mode).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


JPEG = stored("jpeg", (300, 200))

ZOO = {
    "cmyk.jpg": (stored("jpeg", mode="CMYK"), (40, 30, False)),
    "cut_header.jpg": (JPEG[:50], "*"),
    "cut_late.jpg": (JPEG[:-40], "truncated"),
    "cut_middle.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty.jpg": (b"", "the file is empty"),
    "frames.gif": (stored("gif"), (40, 30, False)),
    "good.jpg": (JPEG, (300, 200, True)),
    "grey.png": (stored("png", mode="L"), (40, 30, True)),
    "long.png": (stored("png", (2, 500)), "a side is shorter than 4 pixels"),
    "page.jpg": (b"<html>not found</html>", "not an image"),
    "progressive.jpg": (stored("jpeg", progressive=True), (40, 30, True)),
    "really_png.jpg": (stored("png"), (40, 30, True)),
    "web.webp": (stored("webp"), (40, 30, False)),
}


@pytest.fixture
def zoo(tmp_path) -> Path:
    (tmp_path / "zoo").mkdir()
    for name, (data, _) in ZOO.items():
        (tmp_path / "zoo" / name).write_bytes(data)
    return tmp_path / "zoo"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The images that scans decode from here on, by name; the order is that of the threads."""
    names: list[str] = []
    inspect = manifest.inspect

    def counted(data, name):
        names.append(os.path.basename(name))
        return inspect(data, name)

    monkeypatch.setattr(manifest, "inspect", counted)
    return names


def scan_zoo(zoo, names=tuple(ZOO), **options):
    return scan(zoo, names, kind="folder", **options)


def test_every_defect_is_found_and_named(zoo):
    for record, (name, (data, expected)) in zip(scan_zoo(zoo), ZOO.items(), strict=True):
        (image,) = record.images
        assert (record.path, record.bytes, image.length, image.offset) == (name, len(data), len(data), 0)
        if isinstance(expected, str):
            assert expected == "*" or expected in image.problem, name
            assert (image.width, image.height, image.direct) == (0, 0, False)
        else:
            assert image[4:] == (*expected, None), name


def test_a_manifest_read_back_is_the_scan(zoo, decoded):
    fresh = scan_zoo(zoo)
    assert sorted(decoded) == sorted(ZOO)
    written = (zoo / NAME).read_bytes()
    again = scan_zoo(zoo)
    assert again == fresh and len(decoded) == len(ZOO)
    assert all(type(image) is Scanned for record in again for image in record.images)
    assert (zoo / NAME).read_bytes() == written
    assert json.loads(written.splitlines()[0])["dogo_manifest"] == manifest.FORMAT


def test_the_order_is_that_of_the_files_whatever_the_threads(tmp_path, monkeypatch):
    names = [f"{i:03d}.png" for i in range(200)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(stored("png", (4 + i, 8)))
    inspect = manifest.inspect

    def slow_first(data, name):
        time.sleep(0.02 if name.endswith("000.png") else 0)
        return inspect(data, name)

    monkeypatch.setattr(manifest, "inspect", slow_first)
    for given in (names, names[::-1]):
        records = scan(tmp_path, given, kind="folder")
        assert [record.path for record in records] == given
        assert [record.images[0].width for record in records] == [4 + int(name[:3]) for name in given]


def test_only_new_and_changed_files_are_scanned_again(zoo, decoded):
    scan_zoo(zoo)
    decoded.clear()
    (zoo / "new.jpg").write_bytes(JPEG)
    (zoo / "empty.jpg").write_bytes(JPEG)
    os.utime(zoo / "good.jpg", ns=(0, 1))
    (zoo / "page.jpg").unlink()
    names = [*(name for name in ZOO if name != "page.jpg"), "new.jpg"]
    records = scan_zoo(zoo, names)
    assert sorted(decoded) == ["empty.jpg", "good.jpg", "new.jpg"]
    by_path = {record.path: record.images[0] for record in records}
    assert by_path["empty.jpg"].problem is None and by_path["new.jpg"].width == 300
    kept = [json.loads(line)[0] for line in (zoo / NAME).read_text().splitlines()[1:]]
    assert kept == names


def test_vanished_files_leave_the_manifest(zoo, decoded):
    scan_zoo(zoo)
    decoded.clear()
    scan_zoo(zoo, ["good.jpg", "page.jpg"])
    assert decoded == [] and len((zoo / NAME).read_text().splitlines()) == 3


def test_what_could_not_be_read_is_tried_again(zoo, decoded, monkeypatch):
    read_file = manifest.read_file

    def denied(path, *arguments):
        if path.endswith("good.jpg"):
            raise PermissionError(13, "Permission denied")
        return read_file(path, *arguments)

    monkeypatch.setattr(manifest, "read_file", denied)
    names = ["gone.jpg", "good.jpg", "grey.png"]
    problems = [record.images[0].problem for record in scan_zoo(zoo, names)]
    assert problems == ["No such file or directory", "Permission denied", None]
    monkeypatch.undo()
    assert [record.images[0].problem for record in scan_zoo(zoo, names)] == ["No such file or directory", None, None]
    (zoo / "gone.jpg").write_bytes(JPEG)
    assert [record.images[0].problem for record in scan_zoo(zoo, names)] == [None] * 3


def test_pipes_and_files_beyond_any_image_are_not_read(zoo, monkeypatch):
    os.mkfifo(zoo / "pipe.jpg")
    with open(zoo / "disk.jpg", "wb") as file:
        file.truncate(manifest.read_file.__globals__["MAX_BYTES"] + 1)
    pipe, disk = scan_zoo(zoo, ["pipe.jpg", "disk.jpg"])
    assert pipe.images[0].problem == "not a regular file"
    assert disk.images[0].problem == "more than 536,870,910 bytes"


def test_names_of_any_bytes(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", b"new\nline.png", "größe 🐕.png".encode(), b'"\\\x85.png')]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(stored("png", seed=i))
    fresh = scan(tmp_path, names, kind="folder")
    assert [record.images[0].problem for record in fresh] == [None] * 4
    assert scan(tmp_path, names, kind="folder") == fresh
    assert (tmp_path / NAME).read_text("ascii").count("\n") == 5


# -- files of several images -----------------------------------------------------------------------------------------


def locate_blocks(path):
    """Images of 1000 bytes, one behind the other; names and labels are their numbers."""
    size = os.stat(path).st_size
    if size % 1000:
        raise DataError(f"{path}: truncated")
    for i in range(size // 1000):
        yield Located(f"image {i}", 1000 * i, 1000, i)


def blocks(*images) -> bytes:
    return b"".join(image.ljust(1000, b"\0") for image in images)


def test_images_within_files(tmp_path, decoded):
    good = [stored("jpeg", (10 + i, 20)) for i in range(5)]
    (tmp_path / "a").write_bytes(blocks(*good[:3], b"text"))
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "c").write_bytes(blocks(*good[3:]))
    options = {"kind": "blocks", "locate": locate_blocks}
    fresh = scan(tmp_path, ["a", "b", "c"], **options)
    assert [len(record.images) for record in fresh] == [4, 0, 2]
    assert [image.width for record in fresh for image in record.images] == [10, 11, 12, 0, 13, 14]
    assert fresh[2].images[1] == Scanned("image 1", 1000, 1000, 1, 14, 20, True, None)
    assert scan(tmp_path, ["a", "b", "c"], **options) == fresh and len(decoded) == 6
    (tmp_path / "c").write_bytes(blocks(*good))
    assert len(scan(tmp_path, ["a", "b", "c"], **options)[2].images) == 5 and len(decoded) == 11
    (tmp_path / "a").write_bytes(blocks(*good)[:-1])
    with pytest.raises(DataError, match=r"/a: truncated$"):
        scan(tmp_path, ["a", "b", "c"], **options)
    with pytest.raises(DataError, match=r"/gone: cannot be read \(No such file or directory\); make it readable"):
        scan(tmp_path, ["gone"], **options)


def test_an_interrupted_scan_keeps_what_it_has(tmp_path, decoded, monkeypatch):
    names = [f"{i:04d}.png" for i in range(400)]
    for name in names:
        (tmp_path / name).write_bytes(stored("png", (8, 8)))
    counted = manifest.inspect

    def interrupted(data, name):
        if name.endswith("0300.png"):
            raise KeyboardInterrupt
        return counted(data, name)

    monkeypatch.setattr(manifest, "inspect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, names, kind="folder")
    monkeypatch.setattr(manifest, "inspect", counted)
    decoded.clear()
    assert len(scan(tmp_path, names, kind="folder")) == 400
    assert 100 <= len(decoded) < 150
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_threads_stop_with_the_one_who_asked():
    done = []
    results = manifest._in_threads(lambda i: (done.append(i), time.sleep(0.001)), range(100_000))
    next(results)
    results.close()
    assert len(done) < 10_000


# -- manifests that cannot be trusted --------------------------------------------------------------------------------


def flip_a_digit(data: bytes) -> bytes:
    return data.replace(b",300,200,", b",301,200,")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_digit,
        lambda data: data[: len(data) // 2],
        lambda data: data[: data.rindex(b"\n", 0, -1) + 1],  # one line less
        lambda data: data + b"\0" * 100,
        lambda data: data.partition(b"\n")[0],
        lambda data: data[:20],
        lambda data: data.replace(b'"dogo_manifest": 1', b'"dogo_manifest": 0'),
        lambda data: data.replace(b'"kind": "folder"', b'"kind": "webdataset"'),
        lambda data: re.sub(rb'"pillow": "[^"]*"', b'"pillow": "1.1.7"', data),
    ],
)
def test_a_damaged_or_other_manifest_is_replaced(zoo, decoded, damage, caplog):
    fresh = scan_zoo(zoo)
    written = (zoo / NAME).read_bytes()
    assert damage(written) != written
    (zoo / NAME).write_bytes(damage(written))
    decoded.clear()
    assert scan_zoo(zoo) == fresh and len(decoded) == len(ZOO)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{NAME}: damaged, or not of a folder data set and Pillow" in caplog.text
    assert (zoo / NAME).read_bytes() == written


@pytest.mark.parametrize("content", [b"name,label\nx.jpg,1\n", b'{"a": 1}\n', b"\x80\x04K\x01.", b"\0" * 50])
def test_a_file_of_the_user_is_never_overwritten(zoo, decoded, content, caplog, tmp_path):
    (tmp_path / "labels.csv").write_bytes(content)
    fresh = scan_zoo(zoo)
    assert scan_zoo(zoo, manifest=tmp_path / "labels.csv") == fresh and len(decoded) == 2 * len(ZOO)
    assert (tmp_path / "labels.csv").read_bytes() == content
    assert "labels.csv: is no manifest, so it is left as it is" in caplog.text


def test_an_empty_file_becomes_the_manifest(zoo, tmp_path):
    (tmp_path / "empty").touch()
    scan_zoo(zoo, manifest=tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes().startswith(manifest._MAGIC)


# -- where it is -----------------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(monkeypatch):
    """(root, cache): a data set that this user may only read, and a folder for the user's caches."""
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "root"), Path(folder, "cache")
        root.mkdir()
        cache.mkdir()
        (root / "good.jpg").write_bytes(JPEG)
        scan(root, ["good.jpg"], kind="folder")
        (root / f"{NAME}.lock").unlink()
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        for path, mode in ((folder, 0o755), (root, 0o555), (cache, 0o777)):
            os.chmod(path, mode)
        superuser = os.geteuid() == 0  # who may write everywhere
        if superuser:
            os.seteuid(65534)
        yield root, cache
        if superuser:
            os.seteuid(0)
        os.chmod(root, 0o755)


def test_a_root_that_cannot_be_written(read_only, decoded, caplog):
    root, cache = read_only
    place = manifest_path(root, None)
    assert place.parent == cache / "dogo-engine" and re.fullmatch(r"[0-9a-f]{16}\.jsonl", place.name)
    scan(root, ["good.jpg"], kind="folder")
    assert decoded == [] and not place.exists(), "the manifest in the root is read"
    for _ in range(2):
        scan(root, ["good.jpg", "gone.jpg"], kind="folder")
    assert place.is_file() and decoded == [] and caplog.records == []


def test_nothing_can_be_written(read_only, decoded, caplog, monkeypatch):
    root, _ = read_only
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    for _ in range(3):
        (record,) = scan(root, ["gone.jpg"], kind="folder")
        assert record.images[0].problem == "No such file or directory"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be written" in caplog.text and "set data.manifest" in caplog.text


def test_a_disk_that_is_full(zoo, caplog, monkeypatch):
    fresh = scan_zoo(zoo)
    (zoo / NAME).unlink()

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "move_into_place", full)
    assert scan_zoo(zoo) == fresh
    assert "cannot be written (No space left on device)" in caplog.text
    assert not (zoo / NAME).exists() and not list(zoo.glob("*.part"))


def test_the_given_file_serves_wherever_it_is(zoo, tmp_path, decoded):
    place = tmp_path / "new" / "folder" / "facts.jsonl"
    scan_zoo(zoo, manifest=place)
    scan_zoo(zoo, manifest=place)
    assert place.is_file() and len(decoded) == len(ZOO) and not (zoo / NAME).exists()
    assert manifest_path(zoo, place) == place and manifest_path(zoo, None) == zoo / NAME
    zoo.rename(tmp_path / "moved")
    scan_zoo(tmp_path / "moved", manifest=place)
    assert len(decoded) == len(ZOO), "a data set may be moved"


SCANNER = """
import sys, time
from engine.data import manifest
inspect, count = manifest.inspect, 0
def counted(data, name):
    global count
    count += 1
    time.sleep(0.02)
    return inspect(data, name)
manifest.inspect = counted
records = manifest.scan(sys.argv[1], sys.argv[2:], kind="folder")
print(count, sum(record.images[0].problem is None for record in records))
"""


def test_of_several_processes_one_scans(zoo):
    command = [sys.executable, "-c", SCANNER, str(zoo), *ZOO]
    running = [subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].split() for process in running]
    usable = sum(not isinstance(expected, str) for _, expected in ZOO.values())
    assert sorted(outputs) == [["0", str(usable)], ["0", str(usable)], [str(len(ZOO)), str(usable)]]


# -- what it shows, and helpers --------------------------------------------------------------------------------------


def test_the_bar_appears_on_a_terminal_in_long_scans_alone(zoo, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(manifest.Progress, "start", lambda bar: shown.append(bar.disable))
    monkeypatch.setattr(manifest.Progress, "stop", lambda bar: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    scan_zoo(zoo)
    assert shown == []
    monkeypatch.setattr(manifest, "_PATIENCE", 0.0)
    (zoo / NAME).unlink()
    scan_zoo(zoo)
    assert shown and not any(shown)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    (zoo / NAME).unlink()
    scan_zoo(zoo)
    assert shown[-1] is True
    assert capsys.readouterr() == ("", "")


def test_an_image_that_goes_bad_keeps_its_place(tmp_path):
    whole = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 0, 0)).save(whole, "JPEG")
    path = tmp_path / "it.jpg"

    def now() -> Scanned:
        return scan(tmp_path, ["it.jpg"], kind="folder")[0].images[0]

    path.write_bytes(b"never an image")
    assert not is_listed(now())
    path.write_bytes(whole.getvalue())
    good = now()
    assert good.problem is None and is_listed(good)
    for damaged in (whole.getvalue()[:-100], b"", b"text"):
        path.write_bytes(damaged)
        bad = now()
        assert bad.problem is not None and is_listed(bad) and not bad.direct
        assert bad[:6] == good[:6], "name, place, length, label and size"
    path.write_bytes(whole.getvalue())
    assert now() == good


def test_facts_and_the_warning(caplog):
    images = [Scanned("", 0, 7, None, 3, 4, True, None), Scanned("", 0, 9, None, 5, 6, False, "cut")]
    facts = facts_of([(FileRecord("it", 9, 77, ()), image) for image in images])
    assert facts.stamps.tolist() == [77, SPOILED]
    assert facts.lengths.tolist() == [7, 9] and facts.sizes.tolist() == [[3, 4], [5, 6]]
    assert facts.direct.tolist() == [True, False]
    assert facts_of([]).sizes.shape == (0, 2)
    caplog.set_level(logging.WARNING)
    warn_of_rejected("/top", [], 5)
    assert caplog.records == []
    warn_of_rejected("/top", [(f"/top/{i}.jpg", "why") for i in range(4)], 5)
    assert caplog.messages == ["/top: left out 4 of 5 files that cannot be used (0.jpg: why; 1.jpg: why; 2.jpg: why)"]


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"needs {PHOTOS.name} in shared/data")
def test_real_photos(tmp_path, decoded):
    with tarfile.open(PHOTOS) as tar:
        names = [member.name for member in tar if member.isfile()][::20]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(tar.extractfile(name).read())
    (tmp_path / names[3]).write_bytes((tmp_path / names[3]).read_bytes()[:-1])
    records = scan(tmp_path, names, kind="folder")
    assert [i for i, record in enumerate(records) if record.images[0].problem] == [3]
    for record in records[:3]:
        with Image.open(tmp_path / record.path) as image:
            assert image.size == (record.images[0].width, record.images[0].height)
    assert scan(tmp_path, names, kind="folder") == records and len(decoded) == len(names)
