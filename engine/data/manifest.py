"""The scan of a data set: every image decoded in full, and what was found kept in a manifest that all loaders read.

The manifest has one line a file, with the size and the time of change that the file had, so that a later scan looks
only at files that are new or changed.  It is never trusted for more than it says: a digest covers its lines.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.data.dataset import DataError, UnreadableImage
from engine.data.download import locked, move_into_place
from engine.data.encoded import SPOILED, Facts, inspect, read_file, unreadable_where_it_fails

NAME = ".dogo-manifest.jsonl"
FORMAT = 1  # also to be raised with any change of what encoded.inspect accepts or tells

# Pillow decodes without the interpreter's lock.  1,600 JPEGs of 320 px on 2 cores, images/s: 1,700 with 1 thread, 2,600
# with 2, 2,600 with 4, 2,450 with 8, 2,000 with 16; the two above the cores are for the time that storage takes.
THREADS = len(os.sched_getaffinity(0)) + 2

_CHUNK = 16  # images a thread takes at once, at most
_PATIENCE = 1.0  # seconds before the progress bar appears
_NAMED = 3  # images in the warning
_UNREAD = -1  # in place of a file's size: it could not be read, which may be mended without touching the file

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Located(NamedTuple):
    """An encoded image: a range of bytes of a file."""

    name: str  # within the file; empty where the file is the image
    offset: int
    length: int
    label: int | None  # where the file tells


class Scanned(NamedTuple):
    """An encoded image, and what the scan found of it."""

    name: str
    offset: int
    length: int
    label: int | None
    width: int  # 0 where it was never usable
    height: int
    direct: bool  # as in encoded.Facts
    problem: str | None  # why it is unusable


class FileRecord(NamedTuple):
    """A line of the manifest."""

    path: str  # relative to the root
    bytes: int
    mtime_ns: int
    images: tuple[Scanned, ...]


Locate = Callable[[str], Iterable[Located]]
_State = tuple[int, int]  # a file's size and time of change


def whole_file(path: str) -> Iterable[Located]:
    """The one image of a file that is an image; a file that is not there is found out by reading it."""
    return [Located("", 0, _state(path)[0], None)]


def scan(
    root: str | Path, files: Sequence[str], *, kind: str, locate: Locate = whole_file, manifest: Path | None = None
) -> list[FileRecord]:
    """What is in these files, from the manifest where they have not changed since, which is brought up to date.

    Of several processes one scans, and the others wait and read.  An interrupted scan keeps what it has.

    Args:
        root: the folder of the data set.
        files: paths relative to `root`.
        kind: of data set; a manifest of another kind is not used.
        locate: from the path of a file to its images; called by several threads.
        manifest: the file; by default as `manifest_path` tells.

    Returns:
        One record a file, in the order of `files`.

    Raises:
        DataError: whatever `locate` raises.
    """
    root = os.path.abspath(root)
    place = manifest_path(root, manifest)
    states = list(_in_threads(_state, [os.path.join(root, file) for file in files]))
    known, _ = _read(place, kind)
    if not known and manifest is None:
        known, _ = _read(Path(root, NAME), kind)  # of someone who may write there
    records = _unchanged(files, states, known)
    if None not in records and len(known) == len(files):
        return [record for record in records if record is not None]
    with ExitStack() as stack:
        kept = _lock(stack, place)
        theirs, problem = _read(place, kind)  # anew: another process may have been here before
        if problem is not None:
            _log.warning("%s: %s", place, problem)
            kept = kept and problem != _FOREIGN
        known = theirs or known
        records = _unchanged(files, states, known)
        try:
            _fill(records, root, files, states, locate, known)
        finally:
            found = [record for record in records if record is not None]
            if kept and found != list(known.values()):
                _write(place, kind, found)
    return found


def manifest_path(root: str | Path, given: Path | None) -> Path:
    """`given`, or a file in `root`, or one in the user's cache where `root` cannot be written to."""
    if given is not None:
        return given.expanduser()
    if _writable(root):
        return Path(root, NAME)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    return Path(cache, "dogo-engine", f"{digest}.jsonl")


def _writable(folder: str | Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):  # what os.access says of the superuser and of NFS need not be so
            return True
    except OSError:
        return False


Found = tuple[FileRecord, Scanned]  # an image, and the file that it is in


def is_listed(image: Scanned) -> bool:
    """Whether the image has its place in the data set: it is usable, or it was when it was first scanned.

    So a file that goes bad leaves the number of images and their order as they are, and a run can be resumed.
    """
    return image.width > 0


def facts_of(images: Sequence[Found]) -> Facts:
    """What the datasets hold of listed images."""
    stamps = [record.mtime_ns if image.problem is None else SPOILED for record, image in images]
    return Facts(
        lengths=np.array([image.length for _, image in images], np.int64),
        sizes=np.array([(image.width, image.height) for _, image in images], np.int32).reshape(-1, 2),
        direct=np.array([image.direct for _, image in images], bool),
        stamps=np.array(stamps, np.int64),
    )


def warn_of_rejected(where: str, rejected: Sequence[tuple[str, str]], total: int, *, what: str = "files") -> None:
    """One warning of the images that are left out, (name, reason) each, naming the first; none where there are none."""
    if rejected:
        some = "; ".join(f"{os.path.relpath(name, where)}: {reason}" for name, reason in rejected[:_NAMED])
        _log.warning("%s: left out %d of %d %s that cannot be used (%s)", where, len(rejected), total, what, some)


# -- scanning --------------------------------------------------------------------------------------------------------


def _state(path: str) -> _State:
    try:
        status = os.stat(path)
    except OSError:
        return _UNREAD, 0
    return status.st_size, status.st_mtime_ns


def _unchanged(files: Sequence[str], states: Sequence[_State], known: dict[str, FileRecord]) -> list[FileRecord | None]:
    """The records that still hold; None for the other files."""
    records = [known.get(file) for file in files]
    return [
        record if record is not None and state == (record.bytes, record.mtime_ns) else None
        for record, state in zip(records, states, strict=True)
    ]


def _fill(
    records: list[FileRecord | None],
    root: str,
    files: Sequence[str],
    states: Sequence[_State],
    locate: Locate,
    known: dict[str, FileRecord],
) -> None:
    """Scans the files that have no record, and sets each record as soon as it is whole."""
    todo = [i for i, record in enumerate(records) if record is None]
    paths = [os.path.join(root, files[i]) for i in todo]
    with progress("listing files", len(paths)) as advance:
        located = list(_in_threads(functools.partial(_located, locate), paths, advance))
    tasks = [(path, image) for path, images in zip(paths, located, strict=True) for image in images]
    with progress("scanning images", len(tasks)) as advance, closing(_in_threads(_look, tasks, advance)) as looks:
        for i, images in zip(todo, located, strict=True):
            found = list(islice(looks, len(images)))
            size, mtime_ns = states[i]
            if not all(read for _, read in found):
                size = _UNREAD
            scanned = _with_earlier_sizes([image for image, _ in found], known.get(files[i]))
            records[i] = FileRecord(files[i], size, mtime_ns, tuple(scanned))


def _with_earlier_sizes(images: list[Scanned], before: FileRecord | None) -> list[Scanned]:
    """Images that went bad keep the size that they had, and so stay listed."""
    listed = {image.name: image for image in (before.images if before else ()) if is_listed(image)}
    return [
        image._replace(length=was.length, width=was.width, height=was.height)
        if image.problem is not None and (was := listed.get(image.name)) is not None
        else image
        for image in images
    ]


def _located(locate: Locate, path: str) -> list[Located]:
    try:
        return list(locate(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable or remove it") from error


def _look(task: tuple[str, Located]) -> tuple[Scanned, bool]:
    """Decodes one image; also tells whether it could be read, whatever it is."""
    path, image = task
    try:
        with unreadable_where_it_fails(path):
            data = read_file(path, image.offset, image.length).data
            if len(data) < image.length:
                raise OSError("the file became shorter during the scan")
    except UnreadableImage as error:
        return _unusable(image, error.reason), not isinstance(error.__cause__, OSError)
    try:
        return Scanned(*image, *inspect(data, path), None), True
    except UnreadableImage as error:
        return _unusable(image, error.reason), True


def _unusable(image: Located, problem: str) -> Scanned:
    return Scanned(*image, 0, 0, False, problem)


def _in_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], advance: Callable[[int], None] = lambda count: None
) -> Generator[_Result]:
    """The results in order.  Threads take chunks, as a million futures would take gigabytes."""
    size = max(1, min(_CHUNK, len(items) // (4 * THREADS)))
    threads = ThreadPoolExecutor(THREADS)
    try:
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        for results in threads.map(lambda chunk: [function(item) for item in chunk], chunks):
            advance(len(results))
            yield from results
    finally:
        threads.shutdown(cancel_futures=True)  # an error or an interruption does not wait for what is left


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Advances a bar on the terminal, where there is one and the work takes its time."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    hidden = not sys.stderr.isatty()
    bar = Progress(*columns, TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(),
                   console=Console(stderr=True), disable=hidden)  # fmt: skip
    task = bar.add_task("", total=total, rate="")
    start, done = time.perf_counter(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        seconds = time.perf_counter() - start
        bar.update(task, completed=done, rate=f"{done / max(seconds, 1e-9):,.0f}/s")
        if seconds > _PATIENCE and not bar.live.is_started:
            stack.enter_context(bar)

    with ExitStack() as stack:
        yield advance


# -- the file --------------------------------------------------------------------------------------------------------

_MAGIC = b'{"dogo_manifest"'
_FOREIGN = "is no manifest, so it is left as it is and this scan is not kept; move it away or set another manifest"


def _header(kind: str, body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return json.dumps({"dogo_manifest": FORMAT, "kind": kind, "pillow": PIL.__version__, "sha256": digest}).encode()


def _read(place: Path, kind: str) -> tuple[dict[str, FileRecord], str | None]:
    """The records by path, in their order; none, and why, where there is a file that cannot be trusted."""
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, f"cannot be read ({error.strerror}); scanning all images"
    head, _, body = data.partition(b"\n")
    if data and not data.startswith(_MAGIC):
        return {}, _FOREIGN
    if head != _header(kind, body):
        return {}, f"damaged, or not of a {kind} data set and Pillow {PIL.__version__}; scanning all images anew"
    records = {}
    for line in body.splitlines():
        path, size, mtime, images = json.loads(line)
        records[path] = FileRecord(path, size, mtime, tuple(Scanned(*image) for image in images))
    return records, None


def _write(place: Path, kind: str, records: Sequence[FileRecord]) -> None:
    """Puts the manifest in place whole; where that fails, the next scan is a full one again."""
    lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]  # escapes all but ASCII
    body = "".join(lines).encode()
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        part.write_bytes(_header(kind, body) + b"\n" + body)
        move_into_place(part, place)
    except OSError as error:
        part.unlink(missing_ok=True)
        _warn_not_kept(place, error.strerror or str(error))


def _lock(stack: ExitStack, place: Path) -> bool:
    """Whether this process is the one that may write the manifest, after waiting for its turn."""
    try:
        stack.enter_context(locked(place))
    except (DataError, NotImplementedError) as error:
        _warn_not_kept(place, str(error.__cause__ or error))
        return False
    return True


@functools.cache  # once a process
def _warn_not_kept(place: Path, reason: str) -> None:
    _log.warning("%s: cannot be written (%s), so every run scans all images anew; set data.manifest", place, reason)
