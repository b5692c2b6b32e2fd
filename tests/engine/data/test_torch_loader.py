"""The stream of batches: a function of seed and step, whatever the workers and ranks."""

import dataclasses
import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from engine import distributed
from engine.data import skipped
from engine.data.augment import build_policy
from engine.data.dataset import ArrayDataset, DataError, ImageDataset
from engine.data.folder import open_folder
from engine.data.order import BatchOrder
from engine.data.skipped import SkippedImages
from engine.data.torch_loader import TorchLoader, pil_image, plain_images
from engine.data_config import AugmentConfig
from engine.distributed import Ranks
from ranks import run_ranks

SIZE = 12


def dataset(n=37, side=16) -> ArrayDataset:
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return ArrayDataset("random", images, np.arange(n) % 3)


def loader(
    ranks: Ranks, data: ImageDataset | None = None, *, batch_size=10, seed=1, views=4, workers=0, first_view=0
) -> TorchLoader:
    data = data or dataset()
    order = BatchOrder(data, batch_size=batch_size, seed=seed, ranks=ranks)
    policy = build_policy(AugmentConfig(), SIZE)
    skipped = SkippedImages(ranks)
    return TorchLoader(
        data, policy, order, views=views, workers=workers, ranks=ranks, skipped=skipped, first_view=first_view
    )


def stream(*arguments, start=0, stop=7, **changes) -> list[torch.Tensor]:
    return [torch.stack(batch.views) for batch in loader(*arguments, **changes).batches(start, stop)]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(alone, workers):
    for ours, other in zip(stream(alone), stream(alone, workers=workers), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0)


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_batch_of_one(alone, world):
    parts = [stream(dataclasses.replace(alone, rank=rank, world=world)) for rank in range(world)]
    for step, whole in enumerate(stream(alone)):
        torch.testing.assert_close(torch.cat([part[step] for part in parts], dim=1), whole, rtol=0, atol=0)


def test_starting_later_gives_the_rest_of_the_same_stream(alone):
    for ours, later in zip(stream(alone)[4:], stream(alone, start=4), strict=True):
        torch.testing.assert_close(ours, later, rtol=0, atol=0)


def test_seeds_and_views_differ(alone):
    views = stream(alone, stop=1)[0]
    assert all((views[i] != views[j]).any() for i in range(4) for j in range(i))
    assert (views != stream(alone, stop=1, seed=2)[0]).any()


def test_a_view_is_the_same_whatever_others_are_drawn(alone):
    (whole,) = loader(alone, views=4).batches(2, 3)
    for first in (0, 2):
        (part,) = loader(alone, views=2, first_view=first).batches(2, 3)
        assert all(torch.equal(one, other) for one, other in zip(part.views, whole.views[first:], strict=False))
        assert len(part.views) == 2 and torch.equal(part.indices, whole.indices)


def test_batches_larger_than_a_chunk_keep_their_order(alone):
    data = dataset(150)
    whole = stream(alone, data, batch_size=130, stop=1)[0]
    assert whole.shape == (4, 130, 3, SIZE, SIZE)
    half = dataclasses.replace(alone, rank=1, world=2)
    torch.testing.assert_close(stream(half, data, batch_size=130, stop=1)[0], whole[:, 65:], rtol=0, atol=0)


def test_views_are_normalised_and_channels_last(alone):
    white = ArrayDataset("white", np.full((4, 32, 32, 3), 255, np.uint8), None)
    policy = build_policy(AugmentConfig(jitter=0.0), 32)
    order = BatchOrder(white, batch_size=4, seed=0, ranks=alone)
    options = {"views": 2, "workers": 0, "ranks": alone, "skipped": SkippedImages(alone)}
    view = next(iter(TorchLoader(white, policy, order, **options).batches(0, 1))).views[1]
    expected = (1 - torch.tensor((0.4914, 0.4822, 0.4465))) / torch.tensor((0.247, 0.243, 0.261))
    torch.testing.assert_close(view.mean(dim=(0, 2, 3)), expected, rtol=1e-5, atol=1e-5)
    assert view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_the_global_generators_are_left_alone(alone):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream(alone, workers=1, stop=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def damaged(tmp_path):
    """20 photos, of which numbers 7 and 8 are cut in the middle of their pixels after the scan."""
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i:02d}.jpg")
    found = open_folder(tmp_path).train
    for i in (7, 8):
        path = tmp_path / f"{i:02d}.jpg"
        whole = path.read_bytes()
        (tmp_path / f".{i:02d}.whole").write_bytes(whole)
        path.write_bytes(whole[:-400])
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_skipped_reported_once_and_counted(alone, damaged, caplog, workers):
    stale = loader(alone, damaged, workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = []
        for batch in stale.batches(0, 4):  # two epochs
            batches.append(batch)
            stale.skipped.share()
    read = torch.cat([batch.indices for batch in batches]).tolist()
    assert len(stale.skipped) == 2
    assert 7 not in read
    assert 8 not in read
    assert len(read) == 40, "others take their places"
    for index in (7, 8):
        (own,) = {found for _, found in (pil_image(damaged, index) for _ in range(3))}
        assert read.count(own) > 2, "the same one every time"
    assert sum("07.jpg" in message for message in caplog.messages) == 1
    assert sum("08.jpg" in message for message in caplog.messages) == 1


def share_of_one_rank(root: str) -> tuple[int, list[str]]:
    """Two epochs on this rank with photos that go bad after the scan; how many were skipped, and what was reported."""
    ranks = distributed.start()
    messages: list[str] = []
    skipped.log.warning = lambda text, *arguments: messages.append(text % arguments)
    photos = open_folder(root).train
    distributed.barrier(ranks)
    for name in ("07.jpg", "08.jpg"):
        os.truncate(os.path.join(root, name), 300)
    stale = loader(ranks, photos, views=2)
    for _ in stale.batches(0, 4):
        stale.skipped.share()
    distributed.stop()
    return len(stale.skipped), messages


@pytest.mark.slow
def test_ranks_report_a_truncated_image_once_together(tmp_path):
    for i in range(20):
        Image.new("RGB", (30, 30), (i, 0, 0)).save(tmp_path / f"{i:02d}.jpg")
    every = run_ranks(share_of_one_rank, 2, str(tmp_path))
    assert [count for count, _ in every] == [2, 2]
    assert every[1][1] == []
    assert sorted(message.split(":")[0][-6:] for message in every[0][1]) == ["07.jpg", "08.jpg"]


def test_the_other_images_keep_their_views_beside_a_damaged_one(alone, damaged, tmp_path):
    whole = [torch.stack(b.views) for b in loader(alone, damaged).batches(0, 2)]
    indices = torch.cat([b.indices for b in loader(alone, damaged).batches(0, 2)])
    substitute = pil_image(damaged, 7)[1]
    (tmp_path / "07.jpg").write_bytes((tmp_path / ".07.whole").read_bytes())
    mended = [torch.stack(b.views) for b in loader(alone, damaged).batches(0, 2)]
    differs = (torch.cat(whole, 1) != torch.cat(mended, 1)).flatten(2).any(-1).any(0)
    assert differs.sum() == 1
    assert indices[differs].tolist() == [substitute]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_at_all_is_an_error(alone, damaged, tmp_path, workers):
    for path in tmp_path.glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"^folder: none of its 20 images can be read, as .*jpg$"):
        next(iter(loader(alone, damaged, workers=workers).batches(0, 1)))


def test_half_of_the_data_damaged_in_one_block_is_no_reason_to_stop(alone, damaged, tmp_path):
    for i in range(10):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"\xff\xd8\xff cut")
    batches = list(loader(alone, damaged).batches(0, 2))
    assert torch.cat([batch.indices for batch in batches]).min() >= 10


def test_plain_images_for_evaluation(alone):
    data = dataset(11, side=32)
    policy = build_policy(AugmentConfig(), 32)
    parts = list(plain_images(data, np.array([3, 0, 10, 4, 4]), size=32, statistics=policy.statistics,
                              batch_size=2, workers=0, ranks=alone, skipped=SkippedImages(alone)))  # fmt: skip
    assert [len(images) for images, _ in parts] == [2, 2, 1]
    assert torch.cat([index for _, index in parts]).tolist() == [3, 0, 10, 4, 4]
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in policy.statistics)
    pixels = torch.cat([images for images, _ in parts])[1] * std + mean
    torch.testing.assert_close(
        pixels, torch.from_numpy(data.images[0] / 255).permute(2, 0, 1).float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (8, 9)])
def test_plain_images_of_any_shape_are_cropped_at_the_centre(alone, shape):
    image = np.zeros((1, *shape, 3), np.uint8)
    image[0, shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1] = 255
    data = ArrayDataset("one", image, None)
    ((images, _),) = plain_images(data, np.array([0]), size=20, statistics=((0.0,) * 3, (1.0,) * 3),
                                  batch_size=4, workers=0, ranks=alone, skipped=SkippedImages(alone))  # fmt: skip
    assert images.shape == (1, 3, 20, 20)
    weights = images[0, 0]
    rows = (weights.sum(1) * torch.arange(20)).sum() / weights.sum()
    columns = (weights.sum(0) * torch.arange(20)).sum() / weights.sum()
    assert abs(rows - 9.5) < 1.3  # half a pixel of the source
    assert abs(columns - 9.5) < 1.3


class Mourned:
    """Part of a cycle; writes a line when it is collected, as a pipeline's destructor would wait."""

    def __init__(self, file) -> None:
        self.file, self.own = file, self

    def __del__(self) -> None:
        with open(self.file, "a") as out:
            out.write(f"{os.getpid()}\n")


class Collecting(ArrayDataset):
    """Collects garbage with every image."""

    def image(self, index):
        import gc

        gc.collect()
        return super().image(index)


def test_workers_collect_nothing_that_they_inherit(alone, tmp_path):
    file = tmp_path / "collected"
    file.touch()
    Mourned(file)  # garbage from its first moment
    images = np.zeros((12, 16, 16, 3), np.uint8)
    for _ in loader(alone, Collecting("zeros", images, None), workers=2).batches(0, 1):
        pass
    assert file.read_text().split() in ([], [str(os.getpid())])
