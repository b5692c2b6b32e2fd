"""The command that scans a data set, in this process and as a script."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from engine.data import folder
from engine.data.manifest import NAME
from engine.scan import main

PROJECT = Path(__file__).parents[2]
PHOTOS = PROJECT.parent / "shared" / "data" / "imagewoof320-mini.tar"


@pytest.fixture
def root(tmp_path) -> Path:
    """Four usable images and five others."""
    top = tmp_path / "my images"
    for name, mode, size in (
        ("train/a/1.jpg", "RGB", (30, 20)),
        ("train/b/2.png", "RGBA", (50, 10)),
        ("train/b/3.webp", "RGB", (40, 40)),
        ("val/b/4.jpg", "CMYK", (90, 45)),
    ):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(top / name)
    for i in range(4):
        path = top / f"train/a/cut{i}.jpg"
        Image.effect_noise((64, 64), 90).save(path)
        path.write_bytes(path.read_bytes()[: -50 * (i + 1)])
    (top / "val/b/5.jpg").write_bytes(b"")
    return top


EXPECTED = """\
4 images are usable, 5 are not
    4 x image file is truncated: train/a/cut0.jpg, train/a/cut1.jpg, train/a/cut2.jpg, ...
    1 x the file is empty: val/b/5.jpg
folder: 3 images, 2 classes
folder-val: 1 images, 2 classes
width: 30 to 90 px, median 40 px
height: 10 to 45 px, median 20 px
3 are no plain JPEG or PNG, so that DALI gets them converted by Pillow: PNG RGBA 1, WEBP RGB 1, JPEG CMYK 1
manifest: {manifest}
"""


def test_the_report(root, capsys, monkeypatch):
    assert main([str(root)]) == 0
    assert capsys.readouterr().out == EXPECTED.format(manifest=root / NAME)
    folder._list.cache_clear()
    monkeypatch.setattr("engine.data.manifest.inspect", None)  # the second time nothing is decoded
    assert main([str(root)]) == 0
    assert capsys.readouterr().out == EXPECTED.format(manifest=root / NAME)


def test_as_a_script_from_elsewhere(root, tmp_path):
    command = [sys.executable, str(PROJECT / "engine" / "scan.py"), root.name, "--manifest", "facts.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout == EXPECTED.format(manifest="facts.jsonl")
    warnings = done.stderr.splitlines()
    assert len(warnings) == 2 and all(line.startswith("WARNING: ") for line in warnings)
    assert (tmp_path / "facts.jsonl").is_file() and not (root / NAME).exists()


def test_what_cannot_be_used_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'}: no such folder; ")
    assert main([str(tmp_path)]) == 2
    assert "no readable image among 0 files" in capsys.readouterr().err
    assert main([str(tmp_path), "--shards", "3"]) == 2
    assert capsys.readouterr().err == "error: --shards: 3 with --dataset folder, which has no shards; leave it out\n"
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--dataset", "cifar10"])


def test_a_shard(root, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "train-0.tar", "w") as tar:
        for name in ("train/a/1.jpg", "train/b/2.png", "train/a/cut0.jpg"):
            tar.add(root / name, arcname=Path(name).name)
    assert main([str(shards), "--dataset", "webdataset", "--shards", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 images are usable, 1 are not"
    assert lines[1] == "    1 x image file is truncated: train-0.tar:cut0"
    assert "webdataset: 2 images, no labels" in lines and f"manifest: {shards / NAME}" in lines
    assert main([str(shards), "--dataset", "webdataset", "--shards", "2"]) == 2


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"needs {PHOTOS.name} in shared/data")
def test_real_photos(tmp_path, capsys):
    with tarfile.open(PHOTOS) as tar:
        for member in [member for member in tar if member.isfile()][::10]:
            (tmp_path / member.name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / member.name).write_bytes(tar.extractfile(member).read())
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("160 images are usable, 0 are not\nfolder: 120 images, 10 classes\n")
    assert "all are plain JPEG or PNG" in out


def test_images_that_went_bad_since_the_first_scan_are_named(root, capsys):
    assert main([str(root)]) == 0
    (root / "train/a/1.jpg").write_bytes(b"no longer")
    folder._list.cache_clear()
    capsys.readouterr()
    assert main([str(root)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 images are usable, 5 are not\n"), "its place stays"
    assert "\n1 of the usable went bad since the first scan, and others take their places: train/a/1.jpg\n" in printed
    assert "\n3 are no plain JPEG or PNG" in printed
