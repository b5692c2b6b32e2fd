"""The resident loader: the same batches as the torchvision loader's, from memory, on a CPU and on a GPU."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from engine.config import ConfigError, parse_config
from engine.data.augment import build_policy
from engine.data.dataset import ArrayDataset, DataError, ImageDataset
from engine.data.folder import open_folder
from engine.data.order import BatchOrder
from engine.data.resident_loader import ResidentLoader, all_images
from engine.data.skipped import SkippedImages
from engine.data.torch_loader import TorchLoader
from engine.data_config import AugmentConfig
from engine.distributed import Ranks
from kernels import native

BATCH, SIZE = 12, 24
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def ranks_on(device: str, rank: int = 0, world: int = 1) -> Ranks:
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return Ranks(rank=rank, world=world, local_rank=0, device=where, group=None)


def noise(n=40, side=SIZE) -> ArrayDataset:
    return ArrayDataset("noise", np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8), None)


def loader(kind, dataset, device="cpu", *, ranks=None, seed=0, blur=0.0, size=SIZE, views=4, **options):
    ranks = ranks or ranks_on(device)
    order = BatchOrder(dataset, batch_size=BATCH, seed=seed, ranks=ranks)
    policy = build_policy(AugmentConfig(blur=blur), size)
    return kind(
        dataset, policy, order, views=views, workers=0, ranks=ranks, skipped=SkippedImages(ranks), **options
    )  # fmt: skip


def assert_same(found, wanted):
    assert [batch.step for batch in found] == [batch.step for batch in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.indices, other.indices)
        for view, its in zip(one.views, other.views, strict=True):
            assert view.shape == its.shape == (len(one.indices), 3, view.shape[2], view.shape[2])
            assert view.permute(0, 2, 3, 1).is_contiguous()
            # The same bytes; normalised with one rounding less.
            assert (view.cpu().float() - its).abs().max() < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("blur", [0.0, 0.5])
@pytest.mark.parametrize("size", [SIZE, 19])
def test_batches_are_those_of_the_torchvision_loader(device, blur, size):
    dataset = noise()
    wanted = list(loader(TorchLoader, dataset, blur=blur, size=size).batches(1, 6))  # over the end of an epoch
    assert_same(list(loader(ResidentLoader, dataset, device, blur=blur, size=size).batches(1, 6)), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_some_of_the_views(device):
    dataset = noise()
    wanted = list(loader(TorchLoader, dataset).batches(1, 3))
    last_two = [batch._replace(views=batch.views[2:]) for batch in wanted]
    assert_same(list(loader(ResidentLoader, dataset, device, views=2, first_view=2).batches(1, 3)), last_two)


@pytest.mark.parametrize("device", DEVICES)
def test_a_stream_may_start_anywhere(device):
    whole = list(loader(ResidentLoader, noise(), device).batches(0, 9))
    found = loader(ResidentLoader, noise(), device)
    for start, stop in ((0, 4), (4, 9), (7, 7)):
        assert_same(
            list(found.batches(start, stop)),
            [b._replace(views=[v.cpu().float() for v in b.views]) for b in whole[start:stop]],
        )


def test_ranks_share_a_batch():
    whole = list(loader(ResidentLoader, noise()).batches(0, 4))
    parts = [list(loader(ResidentLoader, noise(), ranks=ranks_on("cpu", r, 3)).batches(0, 4)) for r in range(3)]
    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(batch.indices, torch.cat([share.indices for share in shares]))
        for v, view in enumerate(batch.views):
            assert torch.equal(view, torch.cat([share.views[v] for share in shares]))


def test_without_the_native_core(monkeypatch):
    wanted = list(loader(TorchLoader, noise()).batches(0, 2))
    monkeypatch.setattr(native, "core", None)
    assert_same(list(loader(ResidentLoader, noise()).batches(0, 2)), wanted)


def test_the_seed_matters():
    one, other = (next(iter(loader(ResidentLoader, noise(), seed=s).batches(0, 1))) for s in (0, 1))
    assert not torch.equal(one.indices, other.indices)


def test_a_reader_that_stops_early_leaves_no_thread():
    import threading

    before = threading.active_count()
    stream = loader(ResidentLoader, noise()).batches(0, 1000)
    next(stream)
    stream.close()
    assert threading.active_count() == before


# -- encoded images


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(1)
    for i in range(20):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (30, 26, 3), dtype=np.uint8))
        image.save(tmp_path / f"class{i % 2}" / f"{i:02d}.png")
    return tmp_path


def test_files_of_one_size_are_decoded_once(folder):
    dataset, _ = open_folder(folder)
    found = list(loader(ResidentLoader, dataset, blur=0.5).batches(0, 3))
    assert_same(found, list(loader(TorchLoader, dataset, blur=0.5).batches(0, 3)))


def test_files_of_several_sizes_are_refused(folder):
    Image.new("RGB", (27, 30)).save(folder / "class1" / "odd.png")
    dataset, _ = open_folder(folder)
    with pytest.raises(
        DataError,
        match=r"odd.png is 27 x 30 px, one of 2 sizes in .*; data.loader: resident takes images of one size; use",
    ):
        loader(ResidentLoader, dataset)


def test_an_unreadable_file_is_replaced_and_named(folder):
    dataset, _ = open_folder(folder)
    (folder / "class0" / "04.png").write_bytes(b"gone bad since the scan")
    resident, plain = loader(ResidentLoader, dataset), loader(TorchLoader, dataset)
    index = next(i for i in range(len(dataset)) if dataset.describe(i).endswith("04.png"))
    _, read = all_images(dataset, 2)
    assert read[index] != index and (np.delete(read, index) == np.delete(np.arange(len(dataset)), index)).all()
    assert_same(list(resident.batches(0, 3)), list(plain.batches(0, 3)))
    resident.skipped.share()
    assert len(resident.skipped) == 1


class Odd(ImageDataset):
    """Neither an array nor files: images whose sizes show when they are read."""

    name, labels, num_classes = "odd", None, None

    def __init__(self, side: int) -> None:
        self.side = side

    def __len__(self) -> int:
        return 12

    def image(self, index: int) -> np.ndarray:
        return np.full((24, self.side if index == 7 else 24, 3), index, np.uint8)

    def describe(self, index: int) -> str:
        return f"odd[{index}]"

    def fingerprint(self) -> str:
        return "odd"


def test_sizes_that_show_late():
    pixels, read = all_images(Odd(24), 2)
    assert (pixels == np.arange(12)[:, None, None, None]).all() and (read == np.arange(12)).all()
    with pytest.raises(DataError, match=r"odd\[7\] is 1 x 24 px, unlike the first; data.loader: resident takes"):
        all_images(Odd(1), 2)


def test_more_than_there_is_memory_for(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * 24 * 24 * 3 - 1))
    with pytest.raises(DataError, match=r"data.loader: resident would decode odd to 0.0 GiB, and 0.0 GiB of memory"):
        all_images(Odd(24), 1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_memory_map_of_other_axes(tmp_path, device):
    """STL-10's file has columns before rows and channels first."""
    file = tmp_path / "images.bin"
    file.write_bytes(np.random.default_rng(0).integers(0, 256, 40 * 3 * SIZE * SIZE, dtype=np.uint8).tobytes())
    images = np.memmap(file, np.uint8, mode="r").reshape(40, 3, SIZE, SIZE).transpose(0, 3, 2, 1)
    dataset = ArrayDataset("transposed", images, None)
    wanted = list(loader(TorchLoader, dataset).batches(0, 4))
    for limit_gib in (None, 1e-9):
        assert_same(list(loader(ResidentLoader, dataset, device, limit_gib=limit_gib).batches(0, 4)), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_grey_images(device):
    """Three channels that are one in memory."""
    dataset = ArrayDataset("grey", np.random.default_rng(0).integers(0, 256, (40, SIZE, SIZE), dtype=np.uint8), None)
    wanted = list(loader(TorchLoader, dataset).batches(0, 4))
    for limit_gib in (None, 1e-9):
        assert_same(list(loader(ResidentLoader, dataset, device, limit_gib=limit_gib).batches(0, 4)), wanted)


# -- on a GPU


@pytest.mark.gpu
def test_the_hosts_images_are_let_go():
    images = np.random.default_rng(0).integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8)
    resident = loader(ResidentLoader, ArrayDataset("noise", images, None), "cuda")
    assert resident.images.base is None and resident.images.nbytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    wanted = list(loader(ResidentLoader, noise()).batches(0, 2))
    for one, other in zip(loader(ResidentLoader, noise(), "cuda", dtype=dtype).batches(0, 2), wanted, strict=True):
        for view, its in zip(one.views, other.views, strict=True):
            assert view.dtype == dtype
            torch.testing.assert_close(view.cpu(), its.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_images_that_stay_with_the_host(blur):
    dataset = noise()
    beside = loader(ResidentLoader, dataset, "cuda", blur=blur, limit_gib=1e-9)
    assert not beside._gpu.resident and loader(ResidentLoader, dataset, "cuda")._gpu.resident
    assert_same(list(beside.batches(0, 7)), list(loader(TorchLoader, dataset, blur=blur).batches(0, 7)))


@pytest.mark.gpu
@pytest.mark.parametrize("limit_gib", [None, 1e-9])
def test_views_launched_by_someone_else(limit_gib):
    dataset = noise()
    wanted = list(loader(TorchLoader, dataset, blur=0.5).batches(0, 5))
    resident = loader(ResidentLoader, dataset, "cuda", blur=0.5, limit_gib=limit_gib)
    launch, held = resident.leave_launch(), None
    for batch, its in zip(resident.batches(0, 5), wanted, strict=True):
        launch()
        assert_same([batch], [its])
        addresses = [view.data_ptr() for view in batch.views]
        assert held in (None, addresses)
        held = addresses


# -- configuration


def test_a_limit_needs_the_loader(settings):
    settings["data"].update(resident_gib=2)
    with pytest.raises(ConfigError, match="data.resident_gib: 2.0 with data.loader=torchvision, which keeps no images"):
        parse_config(settings)
    settings["data"].update(loader="resident")
    assert parse_config(settings).data.resident_gib == 2
