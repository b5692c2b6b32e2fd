"""What whole steps are measured on."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import step_data
from engine.config import parse_config
from engine.data.dataset import DataError
from engine.trainer import LOADERS, Trainer

BATCH = 8


def test_a_file_of_small_images_is_the_same_for_both(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "small.npy", pixels)
    images = step_data.small_images(tmp_path, tmp_path / "small.npy", 32)
    assert len(images.dataset) == len(images.source) == 5
    np.testing.assert_array_equal(images.dataset.image(3), pixels[3])
    np.testing.assert_array_equal(images.source[3], pixels[3])


def test_photos_are_the_same_files_for_both_and_unusable_ones_are_left_out(image_folder, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(image_folder, root, ignore=shutil.ignore_patterns(".*"))
    (root / "class0" / "bad.jpg").write_bytes(b"no image")
    images = step_data.photos(root)
    assert len(images.source) == len(images.dataset) == 48
    assert [Path(path).suffix for path in images.source] == [".png"] * 48
    assert images.source[7] == images.dataset.describe(7)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="argument --root: none is given; photos need the folder that holds them"):
        step_data.photos(None)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        step_data.photos(tmp_path / "nowhere")


def trainer(settings, alone, images) -> Trainer:
    settings["data"].update(batch_size=BATCH, loader="resident", image_size=32)
    with step_data.trained_on(images, BATCH):
        return Trainer(parse_config(settings), alone)


def test_trainers_take_the_images_given(settings, alone, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.trainer.build_engines", lambda *_: [])
    np.save(tmp_path / "small.npy", np.full((20, 32, 32, 3), 7, np.uint8))
    made = trainer(settings, alone, step_data.small_images(tmp_path, tmp_path / "small.npy", 32))
    assert made.order.images == 20
    assert made.knn.queries is None, "nothing to evaluate with"
    assert isinstance(made.loader, LOADERS["resident"])


def test_trainers_take_views_that_lie_ready(settings, alone, monkeypatch):
    monkeypatch.setattr("engine.trainer.build_engines", lambda *_: [])
    before = dict(LOADERS)
    made = trainer(settings, alone, None)
    assert before == LOADERS, "only while it was built"
    first, second = list(made.loader.batches(3, 5))
    assert (first.step, second.step) == (3, 4)
    assert [tuple(view.shape) for view in first.views] == [(BATCH, 3, 32, 32)] * 4
    assert all(a is b for a, b in zip(first.views, second.views, strict=True)), "no work"
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in first.views)
    assert {view.dtype for view in first.views} == {torch.float32}, "fp32 on a CPU"
    assert not torch.equal(first.views[0], first.views[2])
    assert first.indices.tolist() == list(range(BATCH))
