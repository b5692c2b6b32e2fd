"""Packs a folder of images into WebDataset shards, which storage reads faster than a file an image.

    python engine/pack.py ROOT OUT [--split train|val|all] [--images-per-shard N | --megabytes-per-shard N]
                          [--resize SHORTER_SIDE] [--seed N] [--manifest FILE]

Images that cannot be used are left out, the others shuffled and packed as they are, or with --resize made smaller.
Packing twice gives the same bytes.  Train on the shards with data.dataset=webdataset data.root=OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script: the repository's root in place of this folder, so that `engine` and `kernels` are this project's.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import Progress

from engine.data.dataset import DataError
from engine.data.download import move_into_place
from engine.data.encoded import FileDataset
from engine.data.folder import open_folder
from engine.data.manifest import THREADS
from engine.data.shard_files import IndexEntry, ShardIndex, write_index
from engine.metrics import progress_bar

SPLITS = ("train", "val", "all")
MEGABYTES = 256  # of a shard
QUALITY = 95  # of JPEGs made smaller

_AROUND = 2048  # bytes of an archive for the headers and the label of one image
_AHEAD = 16 * THREADS  # images read at once; a shard is written from memory


class Limit(NamedTuple):
    """Where a shard ends; one of the two, the other None."""

    images: int | None
    bytes: int | None


class Sample(NamedTuple):
    """The members of one image."""

    key: str
    ending: str
    data: bytes
    label: int | None


def pack(
    root: Path,
    out: Path,
    *,
    split: str = "all",
    limit: Limit = Limit(None, MEGABYTES * 1_000_000),  # noqa: B008  # immutable
    resize: int | None = None,
    seed: int = 0,
    manifest: Path | None = None,
) -> ShardIndex:
    """Writes the shards of `root` and their index into the empty folder `out`, all of them or none.

    Args:
        root: a folder of images, as data.dataset=folder takes it.
        out: a new or empty folder.
        split: one of SPLITS.
        limit: how much goes into a shard.
        resize: the shorter side that larger images are brought to.
        seed: of the order.
        manifest: of `root`, see engine/data/manifest.py.

    Raises:
        DataError: no images, an `out` that holds something or cannot be written to.
    """
    datasets = _chosen(root, split, manifest)
    work = _claim(out)
    try:
        entries: list[IndexEntry] = []
        with progress_bar("packing", enabled=True) as bar:
            for name, dataset in datasets.items():
                order = np.random.default_rng(seed).permutation(len(dataset))
                with _ShardWriter(work, name, limit) as writer:
                    for sample in _with_progress(bar, _samples(dataset, order, resize), len(dataset)):
                        writer.add(sample)
                entries += writer.entries
        classes = next(iter(datasets.values())).classes
        index = ShardIndex(classes, tuple(entries))
        written = write_index(work, index)
        # The index first: were the rest cut off here, it would tell that shards are missing.
        for path in (written, *(work / entry.name for entry in entries)):
            move_into_place(path, out / path.name)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror}) after {_size(work)}; free space, or give another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return index


def _chosen(root: Path, split: str, manifest: Path | None) -> dict[str, FileDataset]:
    folder = open_folder(root, manifest=manifest)
    if split == "val" and folder.val is None:
        raise DataError(f"{root}: has no val/ or test/ to pack; give --split train")
    found = {"train": folder.train, "val": folder.val}
    return {name: data for name, data in found.items() if data is not None and split in (name, "all")}


def _claim(out: Path) -> Path:
    """A folder to work in, below `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if there := sorted(os.listdir(out)):
            raise DataError(f"{out}: not empty ({there[0]}); give a new folder, or empty this one")
        work = out / ".partial"
        work.mkdir()
    except OSError as error:
        raise DataError(f"{out}: cannot be written to ({error.strerror}); give another folder") from error
    return work


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:,.1f} MB"


# -- samples ---------------------------------------------------------------------------------------------------------


def _samples(dataset: FileDataset, order: np.ndarray, resize: int | None) -> Iterator[Sample]:
    """The images in this order, read and made smaller by several threads."""

    def sample(position: int) -> Sample:
        index = int(order[position])
        stem, ending = os.path.splitext(os.path.basename(dataset.path(index)))
        ending, data = _content(dataset, index, ending[1:].lower(), resize)
        label = None if dataset.labels is None else int(dataset.labels[index])
        # A key ends at the first dot; the number keeps files of one name in two folders apart.
        return Sample(f"{position:07d}-{stem.replace('.', '_')}", ending, data, label)

    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(order), _AHEAD):
            yield from threads.map(sample, range(start, min(start + _AHEAD, len(order))))


def _content(dataset: FileDataset, index: int, ending: str, resize: int | None) -> tuple[str, bytes]:
    width, height = map(int, dataset.facts.sizes[index])
    shorter = min(width, height)
    if resize is None or shorter <= resize:
        return "jpg" if ending == "jpeg" else ending, dataset.encoded(index)
    size = round(width * resize / shorter), round(height * resize / shorter)
    buffer = io.BytesIO()
    dataset.image(index).resize(size, Image.Resampling.LANCZOS).save(buffer, format="JPEG", quality=QUALITY)
    return "jpg", buffer.getvalue()


def _with_progress(bar: Progress, samples: Iterator[Sample], total: int) -> Iterator[Sample]:
    task = bar.add_task("", total=total, rate="", note="")
    for sample in samples:
        yield sample
        bar.advance(task)
        speed = bar.tasks[task].speed
        bar.update(task, rate=f"{speed:,.0f} images/s" if speed else "")


# -- shards ----------------------------------------------------------------------------------------------------------


class _ShardWriter:
    """Writes samples into one shard after another, always the same bytes for the same samples."""

    def __init__(self, folder: Path, split: str, limit: Limit) -> None:
        self.entries: list[IndexEntry] = []  # whole shards
        self._folder, self._split, self._limit = folder, split, limit
        self._tar: tarfile.TarFile | None = None
        self._images = 0

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()

    def add(self, sample: Sample) -> None:
        """Writes one sample, in a new shard where the last one is full."""
        if self._tar is None or self._full(self._tar, len(sample.data)):
            self._finish()
            # GNU: names of any length, and bytes that every reader of tar archives knows.
            path = self._folder / self._name()
            self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8")  # noqa: SIM115
        members = [(sample.ending, sample.data)]
        if sample.label is not None:
            members.append(("cls", str(sample.label).encode()))
        for ending, data in members:
            info = tarfile.TarInfo(f"{sample.key}.{ending}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._tar.members = []  # type: ignore[attr-defined]  # it would keep all, a kilobyte each
        self._images += 1

    def _full(self, tar: tarfile.TarFile, more: int) -> bool:
        if self._limit.images is not None:
            return self._images >= self._limit.images
        return self._limit.bytes is not None and tar.offset + more + _AROUND > self._limit.bytes

    def _name(self) -> str:
        return f"{self._split}-{len(self.entries):06d}.tar"

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        name = self._name()
        self.entries.append(IndexEntry(name, self._images, (self._folder / name).stat().st_size))
        self._tar, self._images = None, 0


# -- command ---------------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 1")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pack a folder of images into WebDataset shards.")
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of images, or of train/ and val/")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the shards")
    parser.add_argument("--split", choices=SPLITS, default="all", help="which images (default: all)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--images-per-shard", type=_positive, metavar="N")
    size.add_argument("--megabytes-per-shard", type=_positive, metavar="N", help=f"default: {MEGABYTES}")
    parser.add_argument("--resize", type=_positive, metavar="SIDE", help="bring larger images to this shorter side")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order (default: 0)")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="what earlier scans of ROOT found")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _arguments(argv)
    megabytes = arguments.megabytes_per_shard or MEGABYTES
    limit = Limit(arguments.images_per_shard, None if arguments.images_per_shard else megabytes * 1_000_000)
    try:
        index = pack(
            arguments.root.expanduser(),
            arguments.out.expanduser(),
            split=arguments.split,
            limit=limit,
            resize=arguments.resize,
            seed=arguments.seed,
            manifest=arguments.manifest,
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    images, size = sum(entry.images for entry in index.shards), sum(entry.bytes for entry in index.shards)
    print(f"wrote {len(index.shards)} shards with {images:,} images, {size / 1e6:,.0f} MB, to {arguments.out}")
    print(f"train on them with data.dataset=webdataset data.root={arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
