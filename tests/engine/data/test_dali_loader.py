"""The DALI loader: the torchvision loader's images, order and views, and what happens to files that DALI fails at."""

import dataclasses
import logging
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data import dali_graph, dali_loader
from engine.data.augment import build_policy
from engine.data.dali_loader import DaliLoader
from engine.data.dataset import DataError
from engine.data.folder import open_folder
from engine.data.order import BatchOrder
from engine.data.skipped import SkippedImages
from engine.data.torch_loader import TorchLoader
from engine.data_config import AugmentConfig
from kernels import native

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

ROOT = Path(__file__).parents[3]
SIZE, COUNT = 24, 37
MAKERS = [
    "dali",
    pytest.param("native", marks=pytest.mark.skipif(native.core is None, reason="the native core is not built")),
]


def waves(i: int) -> Image.Image:
    """A smooth picture of its own size."""
    rng = np.random.default_rng(i)
    height, width = rng.integers(30, 90, 2)
    y, x = np.mgrid[:height, :width]
    pixels = 128 + 100 * np.sin(x[..., None] * rng.uniform(0.02, 0.2, 3) + y[..., None] * rng.uniform(0.02, 0.2, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(COUNT):
        waves(i).save(root / f"{i:02d}.jpg", quality=90)
    return root


def loader(
    kind,
    ranks,
    dataset,
    *,
    maker="native",
    seed=1,
    views=4,
    workers=2,
    batch_size=10,
    last_batch="drop",
    hue=0.2,
    first_view=0,
):
    order = BatchOrder(dataset, batch_size=batch_size, seed=seed, ranks=ranks, last_batch=last_batch)
    policy = build_policy(AugmentConfig(blur=0.5, hue=hue), SIZE)
    options = {"views": views, "workers": workers, "ranks": ranks, "skipped": SkippedImages(ranks)}
    options["first_view"] = first_view
    if kind is DaliLoader:
        options["graph_alone"] = maker == "dali"
    return kind(dataset, policy, order, **options)


def stream(alone, dataset, start=0, stop=5, **options) -> list[torch.Tensor]:
    return [torch.stack(batch.views) for batch in loader(DaliLoader, alone, dataset, **options).batches(start, stop)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("last_batch", ["drop", "fill"])
@pytest.mark.parametrize("maker", MAKERS)
def test_images_order_and_views_are_the_torchvision_loaders(alone, folder, maker, last_batch):
    dataset = open_folder(folder).train
    # Hue apart: these pictures have nothing but strong colours (test_dali_graph.py says what it costs on photos).
    options = {"maker": maker, "last_batch": last_batch, "hue": 0.2 if maker == "native" else 0.0}
    ours, theirs = (list(loader(kind, alone, dataset, **options).batches(0, 9)) for kind in (DaliLoader, TorchLoader))
    assert [batch.step for batch in ours] == list(range(9))
    differences = []
    for own, other in zip(ours, theirs, strict=True):
        assert torch.equal(own.indices, other.indices)
        for view, wanted in zip(own.views, other.views, strict=True):
            assert view.shape == (10, 3, SIZE, SIZE) and view.dtype == torch.float32
            assert view.is_contiguous(memory_format=torch.channels_last)
            differences.append((view - wanted).abs().mean().item() * 0.225 * 255)
    assert np.mean(differences) < (0.7 if maker == "native" else 2.5), "levels of 255"


@pytest.mark.parametrize("maker", MAKERS)
def test_a_view_is_the_same_whatever_others_are_drawn(alone, folder, maker):
    dataset = open_folder(folder).train
    whole = [views[2:] for views in stream(alone, dataset, 0, 2, maker=maker)]
    assert equal(stream(alone, dataset, 0, 2, maker=maker, views=2, first_view=2), whole)


@pytest.mark.parametrize("maker", MAKERS)
def test_starting_later_gives_the_rest_of_the_same_stream(alone, folder, maker):
    dataset = open_folder(folder).train
    assert equal(stream(alone, dataset, 0, 7, maker=maker)[4:], stream(alone, dataset, 4, 7, maker=maker))


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_workers_change_nothing(alone, folder, workers):
    dataset = open_folder(folder).train
    for maker in ("dali", "native") if native.core else ("dali",):
        assert equal(stream(alone, dataset, maker=maker), stream(alone, dataset, maker=maker, workers=workers))


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_batch_of_one(alone, folder, world):
    dataset = open_folder(folder).train
    parts = [stream(dataclasses.replace(alone, rank=rank, world=world), dataset) for rank in range(world)]
    for step, whole in enumerate(stream(alone, dataset)):
        torch.testing.assert_close(torch.cat([part[step] for part in parts], dim=1), whole, rtol=0, atol=0)


def test_seeds_and_views_differ(alone, folder):
    dataset = open_folder(folder).train
    views = stream(alone, dataset, stop=1)[0]
    assert all((views[i] != views[j]).any() for i in range(4) for j in range(i))
    assert (views != stream(alone, dataset, stop=1, seed=2)[0]).any()


def test_the_global_generators_are_left_alone(alone, folder):
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    stream(alone, open_folder(folder).train, stop=2)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])


@pytest.mark.parametrize("held_as", [lambda view: view, lambda view: view[3:, 1], lambda view: view.numpy()])
@pytest.mark.parametrize("maker", MAKERS)
def test_views_outlive_the_loader_and_later_batches(alone, folder, maker, held_as):
    """They lie in memory that is used again, but not while anything of it is held."""
    dataset = open_folder(folder).train
    held = [held_as(batch.views[0]) for batch in loader(DaliLoader, alone, dataset, maker=maker).batches(0, 9)]
    again = [held_as(batch.views[0].clone()) for batch in loader(DaliLoader, alone, dataset, maker=maker).batches(0, 9)]
    assert equal(*([torch.as_tensor(part) for part in parts] for parts in (held, again)))
    assert len({torch.as_tensor(part).data_ptr() for part in held}) == len(held)


def test_memory_is_used_again_when_nothing_holds_it():
    memory = dali_loader._Memory((4, 2, 2, 3))
    first, second = memory.take(), memory.take()
    places = first.data_ptr(), second.data_ptr()
    assert places[0] != places[1]
    part = second[1:, 0]
    del first, second
    third, fourth = memory.take(), memory.take()
    assert third.data_ptr() == places[0] and fourth.data_ptr() not in places
    del part
    assert memory.take().data_ptr() == places[1]
    assert third.shape == (4, 3, 2, 2) and third.is_contiguous(memory_format=torch.channels_last)


# -- formats that decoders read in ways of their own -----------------------------------------------------------------


def odd_formats(root) -> dict[str, Image.Image]:
    """Every kind of file that is no plain JPEG or PNG, and plain ones under a wrong name."""
    picture = waves(100)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    alpha = picture.convert("RGBA")
    alpha.putalpha(100)
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 256 + 17
    saved = {
        "cmyk.jpg": (picture.convert("CMYK"), {"format": "JPEG"}),
        "progressive.jpg": (picture, {"format": "JPEG", "progressive": True}),
        "grey.jpg": (picture.convert("L"), {"format": "JPEG"}),
        "turned.jpg": (picture, {"format": "JPEG", "exif": exif}),
        "really_png.jpg": (picture, {"format": "PNG"}),
        "alpha.png": (alpha, {}),
        "palette.png": (picture.quantize(16), {}),
        "deep.png": (Image.fromarray(deep), {}),
        "lossy.webp": (picture, {}),
        "frames.gif": (picture, {}),
        "plain.bmp": (picture, {}),
        "plain.tif": (picture, {}),
    }
    for name, (image, options) in saved.items():
        image.save(root / name, **options)
    return saved


@pytest.mark.parametrize("maker", MAKERS)
def test_every_format_gives_pillows_picture(alone, tmp_path, maker):
    names = odd_formats(tmp_path)
    dataset = open_folder(tmp_path).train
    n = len(names)
    assert len(dataset) == n
    policy = build_policy(
        AugmentConfig(jitter=0.0, grayscale=0.0, flip=0.0, crop_scale=(1.0, 1.0), crop_ratio=(0.3, 3.0)), 64
    )
    views = []
    for kind in (DaliLoader, TorchLoader):
        order = BatchOrder(dataset, batch_size=n, seed=1, ranks=alone)
        options = {"graph_alone": maker == "dali"} if kind is DaliLoader else {}
        made = kind(dataset, policy, order, views=2, workers=1, ranks=alone, skipped=SkippedImages(alone), **options)
        (batch,) = made.batches(0, 1)
        assert len(made.skipped) == 0
        views.append(batch)
    for place, index in enumerate(views[0].indices.tolist()):
        for own, other in zip(views[0].views, views[1].views, strict=True):
            difference = (own[place] - other[place]).abs() * 0.225 * 255
            assert difference.mean() < 0.6 and difference.max() < 6, dataset.describe(index)


# -- files that go bad after the scan --------------------------------------------------------------------------------


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def overwrite(path) -> None:
    """As long as before, and no image."""
    path.write_bytes(b"\x00" * path.stat().st_size)


@pytest.mark.parametrize("damage", [cut, overwrite, lambda path: path.unlink()])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_file_that_goes_bad_is_left_out_as_by_the_torchvision_loader(alone, folder, maker, damage, caplog):
    dataset = open_folder(folder).train
    before = list(loader(DaliLoader, alone, dataset, maker=maker).batches(0, 6))
    for i in (7, 8):
        damage(folder / f"{i:02d}.jpg")
    made = [loader(kind, alone, dataset, maker=maker) for kind in (DaliLoader, TorchLoader)]
    with caplog.at_level(logging.WARNING):
        ours, theirs = (list(one.batches(0, 6)) for one in made)
        for one in made[:1]:
            one.skipped.share()
    assert [batch.step for batch in ours] == list(range(6))
    changed = 0
    for own, other, was in zip(ours, theirs, before, strict=True):
        assert torch.equal(own.indices, other.indices)
        same = own.indices == was.indices
        changed += int((~same).sum())
        for view, earlier in zip(own.views, was.views, strict=True):
            assert torch.equal(view[same], earlier[same]), "the others keep their views"
    assert 2 <= changed <= 4 and not {7, 8} & {int(i) for batch in ours for i in batch.indices}
    assert len(made[0].skipped) == 2
    for name in ("07.jpg", "08.jpg"):
        assert sum(f"skipped {folder / name}" in message for message in caplog.messages) == 1


def test_a_file_that_goes_bad_during_the_run_does_not_end_it(alone, folder):
    dataset = open_folder(folder).train
    running = loader(DaliLoader, alone, dataset)
    steps = []
    for batch in running.batches(0, 12):
        steps.append(batch.step)
        if batch.step == 2:
            for i in range(10):
                overwrite(folder / f"{i:02d}.jpg")
    assert steps == list(range(12))
    running.skipped.share()
    # What was read ahead is whole, and an epoch of three batches leaves out some of the 37.
    assert 6 <= len(running.skipped) <= 10
    assert int(batch.indices.min()) >= 10


class Refuses:
    """A pipeline that fails where it gets certain bytes, as DALI does, but without its habit of crashing then."""

    def __init__(self, build, refused: list[bytes], log: list[int]) -> None:
        self._build, self._refused, self._log = build, refused, log

    def __call__(self, policy, source, **options):
        self._log.append(options["batch_size"])

        def watched(iteration):
            inputs = source(iteration)
            for data in inputs[0]:
                if data.tobytes() in self._refused:
                    raise RuntimeError("Error in CPU operator `nvidia.dali.fn.decoders.image`")
            return inputs

        return self._build(policy, watched, **options)


def test_what_pillow_reads_and_dali_does_not_is_converted(alone, folder, caplog, monkeypatch):
    dataset = open_folder(folder).train
    before = list(loader(DaliLoader, alone, dataset).batches(0, 6))
    refused = [(folder / name).read_bytes() for name in ("03.jpg", "30.jpg")]
    built: list[int] = []
    monkeypatch.setattr(dali_graph, "build_pipeline", Refuses(dali_graph.build_pipeline, refused, built))
    running = loader(DaliLoader, alone, dataset)
    with caplog.at_level(logging.WARNING):
        after = list(running.batches(0, 6))
    running.skipped.share()
    assert len(running.skipped) == 0
    for one, other in zip(after, before, strict=True):
        assert one.step == other.step and torch.equal(one.indices, other.indices)
        assert all((a - b).abs().max() < 0.1 for a, b in zip(one.views, other.views, strict=True)), "PPM of Pillow"
    for name in ("03.jpg", "30.jpg"):
        assert sum(f"{name}: DALI cannot decode it" in message for message in caplog.messages) == 1
    assert built.count(10) == 3 and built.count(1) < 12, "a pipeline for one image serves until it fails"


def test_a_machine_that_fails_is_not_blamed_on_images(alone, folder, caplog, monkeypatch):
    dataset = open_folder(folder).train
    every = [path.read_bytes() for path in folder.glob("*.jpg")]
    monkeypatch.setattr(dali_graph, "build_pipeline", Refuses(dali_graph.build_pipeline, every, []))
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="Error in CPU operator"):
        next(loader(DaliLoader, alone, dataset).batches(0, 2))
    assert not any("cannot decode" in message for message in caplog.messages)


def test_the_old_pipeline_is_gone_before_the_new_one_is_built(alone, folder, monkeypatch):
    dataset = open_folder(folder).train
    refused = [(folder / "03.jpg").read_bytes()]
    refuses = Refuses(dali_graph.build_pipeline, refused, [])
    living: list[weakref.ref] = []
    most = 0

    def build(policy, source, **options):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in living))
        pipeline = refuses(policy, source, **options)
        living.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(dali_graph, "build_pipeline", build)
    list(loader(DaliLoader, alone, dataset).batches(0, 6))
    assert len(living) >= 3 and most == 0


CRASHED = """
import sys
from pathlib import Path
import torch
from engine.data_config import AugmentConfig
from engine.data.augment import build_policy
from engine.data.dali_loader import DaliLoader
from engine.data.folder import open_folder
from engine.data.order import BatchOrder
from engine.data.skipped import SkippedImages
from engine.distributed import Ranks

root, alone = Path(sys.argv[1]), Ranks(0, 1, 0, torch.device("cpu"), None)
dataset = open_folder(root).train
for name, damage in (("3.jpg", lambda data: bytes(len(data))), ("50.jpg", lambda data: data[: len(data) // 2])):
    path = root / name
    path.write_bytes(damage(path.read_bytes()))
(root / "70.jpg").write_bytes((root / "71.jpg").read_bytes())  # of another size
order = BatchOrder(dataset, batch_size=100, seed=0, ranks=alone)
skipped = SkippedImages(alone)
policy = build_policy(AugmentConfig(blur=0.5), 24)
options = {"views": 2, "workers": 2, "ranks": alone, "skipped": skipped, "graph_alone": sys.argv[2] == "dali"}
for batch in DaliLoader(dataset, policy, order, **options).batches(0, 6):
    pass
skipped.share()
print(batch.step, len(skipped))
"""


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_bad_files_in_large_batches_do_not_crash_the_process(tmp_path, maker):
    """DALI 2.4 crashes where a batch of 50 or more holds bytes without a header; so it must never get them."""
    for i in range(120):
        waves(i).save(tmp_path / f"{i}.jpg")
    done = subprocess.run(
        [sys.executable, "-c", CRASHED, str(tmp_path), maker], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "3"]


def test_an_error_that_no_image_is_to_blame_for_is_raised(alone, folder, monkeypatch):
    class OutOfMemory(RuntimeError):
        pass

    class Broken:
        def __init__(self, source):
            self.source = source

        def run(self):
            self.source(0)
            raise OutOfMemory("no memory left")

    running = loader(DaliLoader, alone, open_folder(folder).train)
    monkeypatch.setattr(running, "_pipeline", Broken)
    with pytest.raises(OutOfMemory, match="no memory left"):
        next(running.batches(0, 2))


def test_data_that_cannot_be_read_at_all_is_an_error(alone, folder):
    dataset = open_folder(folder).train
    for path in folder.glob("*.jpg"):
        cut(path)
    with pytest.raises(DataError, match=r"^folder: none of its 37 images can be read, as .*jpg$"):
        next(loader(DaliLoader, alone, dataset).batches(0, 1))


def test_threads_end_with_the_stream(alone, folder):
    import threading

    dataset = open_folder(folder).train
    before = threading.active_count()
    batches = loader(DaliLoader, alone, dataset).batches(0, 100)
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=10)
    assert threading.active_count() <= before


def test_the_fingerprint_tells_versions_and_makers_apart(alone, folder, monkeypatch):
    made = loader(DaliLoader, alone, open_folder(folder).train, maker="dali")
    prints = {made.fingerprint()}
    made.native = True
    prints.add(made.fingerprint())
    monkeypatch.setattr(dali_loader, "dali_version", lambda: "0.1")
    prints.add(made.fingerprint())
    assert len(prints) == 3


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_images_in_half_precision(alone, folder):
    dataset = open_folder(folder).train
    gpu = dataclasses.replace(alone, device=torch.device("cuda", 0))
    on_gpu = loader(DaliLoader, gpu, dataset, maker="dali")
    for own, other in zip(
        on_gpu.batches(0, 6), loader(DaliLoader, alone, dataset, maker="dali").batches(0, 6), strict=True
    ):
        assert torch.equal(own.indices, other.indices)
        for view, wanted in zip(own.views, other.views, strict=True):
            assert view.dtype == torch.float16 and view.is_cuda
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert (view.cpu().float() - wanted).abs().mean() * 0.225 * 255 < 1.5
