"""Downloads against a real server on this machine: cut, resumed, wrong, concurrent, killed."""

import hashlib
import io
import multiprocessing
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from engine.data import download
from engine.data.dataset import DataError
from engine.data.download import archive, extract, fetch, members, npm_pack

CONTENT = np.random.default_rng(0).bytes(3_000_001)
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PROCESSES = multiprocessing.get_context("spawn")


class Server:
    """Serves CONTENT at every address.

    cuts: byte offsets at which the next responses end early, one a response; delay: seconds before an answer;
    pause: seconds after each 100 kB; ranges: whether Range is understood; status: answers only this where not None.
    """

    def __init__(self):
        self.cuts, self.delay, self.pause, self.ranges, self.status = [], 0.0, 0.0, True, None
        self.requests = []  # the Range header of each, or None
        methods = {"do_GET": lambda request: self.answer(request), "log_message": lambda *_: None}
        handler = type("Handler", (BaseHTTPRequestHandler,), methods)
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/file.bin"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        time.sleep(self.delay)
        if self.status is not None:
            return request.send_error(self.status)
        if start >= len(CONTENT):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return request.end_headers()
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        request.end_headers()
        end = self.cuts.pop(0) if self.cuts else len(CONTENT)
        try:
            for at in range(start, end, 100_000):
                request.wfile.write(CONTENT[at : min(at + 100_000, end)])
                time.sleep(self.pause)
        except OSError:
            pass  # the client was killed


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.01)
    server = Server()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


def part_of(path):
    return path.with_name(path.name + ".part")


def test_whole_file_and_nothing_the_second_time(server, tmp_path):
    path = tmp_path / "new" / "file.bin"
    assert fetch([server.url], path, md5=MD5, sha256=SHA256, size=len(CONTENT)) == path
    assert fetch([server.url], path, md5=MD5) == path
    assert path.read_bytes() == CONTENT and server.requests == [None] and not part_of(path).exists()


def test_cut_connection_is_resumed_where_it_stopped(server, tmp_path):
    cuts = list(range(400_000, 3_000_000, 400_000))
    assert len(cuts) > download.ATTEMPTS, "an attempt that brings something counts anew"
    server.cuts = list(cuts)
    fetch([server.url], tmp_path / "file.bin", md5=MD5)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [None, *(f"bytes={cut}-" for cut in cuts)]


def test_server_that_ignores_range_starts_over(server, tmp_path):
    server.cuts, server.ranges = [1_000_000], False
    fetch([server.url], tmp_path / "file.bin", md5=MD5)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000000-"]


def test_attempts_that_bring_nothing_new_end(server, tmp_path):
    server.cuts, server.ranges = [1_000_000] * 50, False
    with pytest.raises(DataError, match="cut"):
        fetch([server.url], tmp_path / "file.bin", md5=MD5)
    assert len(server.requests) == 1 + download.ATTEMPTS and not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize(("more", "requests"), [(b"", ["bytes=3000001-"]), (b"of another", ["bytes=3000011-", None])])
def test_whole_part_of_an_earlier_run_is_answered_416(server, tmp_path, more, requests):
    part_of(tmp_path / "file.bin").write_bytes(CONTENT + more)
    fetch([server.url], tmp_path / "file.bin", md5=MD5)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and server.requests == requests


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_wrong_checksum_deletes_the_part_and_names_both(server, tmp_path, kind):
    wrong = hashlib.new(kind, b"other").hexdigest()
    path = tmp_path / "file.bin"
    with pytest.raises(DataError) as caught:
        fetch([server.url], path, **{kind: wrong})
    for text in (str(path), wrong, {"md5": MD5, "sha256": SHA256}[kind], "run again"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value) and not path.exists() and not part_of(path).exists()


def test_wrong_size_is_refused_before_the_download(server, tmp_path):
    with pytest.raises(DataError, match="has 3000001 bytes, expected 5"):
        fetch([server.url], tmp_path / "file.bin", md5=MD5, size=5)


def test_another_file_in_its_place_is_left_alone(server, tmp_path):
    (tmp_path / "file.bin").write_text("mine")
    with pytest.raises(DataError, match=r"file\.bin: md5 is .*, expected .*; delete"):
        fetch([server.url], tmp_path / "file.bin", md5=MD5)
    assert (tmp_path / "file.bin").read_text() == "mine"


def test_next_address_is_tried_and_all_reasons_are_listed(server, tmp_path):
    gone = "http://127.0.0.1:9/file.bin"
    started = time.monotonic()
    fetch([gone, server.url], tmp_path / "file.bin", md5=MD5)
    assert time.monotonic() - started < 5, "a refused connection is not retried"
    server.status = 503
    with pytest.raises(DataError) as caught:
        fetch([gone, server.url], tmp_path / "other.bin", md5=MD5)
    assert "refused" in str(caught.value) and "HTTP 503" in str(caught.value) and gone in str(caught.value)


def test_silent_server_times_out(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.delay = 0.5
    with pytest.raises(DataError, match="timed out"):
        fetch([server.url], tmp_path / "file.bin", md5=MD5)


def test_two_processes_at_once_download_once(server, tmp_path):
    server.pause = 0.02
    path = tmp_path / "file.bin"
    ranks = [PROCESSES.Process(target=fetch, args=([server.url], path), kwargs={"md5": MD5}) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert path.read_bytes() == CONTENT and server.requests == [None]


def test_killed_download_leaves_no_file_and_is_resumed(server, tmp_path):
    server.pause = 0.1
    path = tmp_path / "file.bin"
    process = PROCESSES.Process(target=fetch, args=([server.url], path), kwargs={"md5": MD5})
    process.start()
    deadline = time.monotonic() + 20
    while not (part_of(path).exists() and part_of(path).stat().st_size > 300_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join(10)
    assert not path.exists()
    have = part_of(path).stat().st_size
    assert 300_000 < have < len(CONTENT)
    server.pause = 0.0
    fetch([server.url], path, md5=MD5)
    assert path.read_bytes() == CONTENT and server.requests == [None, f"bytes={have}-"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match=r"data/sub: cannot be written to \(Not a directory\)"):
        fetch([], tmp_path / "data" / "sub" / "file.bin", md5=MD5)


def test_archive_of_the_user_is_kept_and_a_download_is_not(server, tmp_path):
    with archive(tmp_path, server.url, md5=MD5) as path:
        assert path.read_bytes() == CONTENT
    assert not path.exists() and len(server.requests) == 1
    with pytest.raises(RuntimeError), archive(tmp_path, server.url, md5=MD5) as path:
        raise RuntimeError("no space to unpack")
    assert path.exists()
    (tmp_path / "file.bin").write_bytes(CONTENT)
    with archive(tmp_path, server.url, md5=MD5) as path:
        pass
    assert path == tmp_path / "file.bin" and path.exists()


def make_tar(path, entries):
    """entries: (name, bytes), or (name, link target)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in entries:
            packed.writestr(name, content)


both_kinds = pytest.mark.parametrize(("make", "name"), [(make_tar, "a.tar.gz"), (make_zip, "a.zip")])


@both_kinds
def test_extract_reads_the_wanted_members_only(tmp_path, make, name):
    make(tmp_path / name, [("top/a/1.txt", b"one"), ("top/2.txt", b"two"), ("top/3.bin", b"three"), ("4.txt", b"four")])
    top = extract(tmp_path / name, tmp_path, "top", {"top/a/1.txt", "top/2.txt"}.__contains__)
    assert sorted(path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()) == ["2.txt", "a/1.txt"]
    assert (top / "a/1.txt").read_bytes() == b"one"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "top"]


@pytest.mark.parametrize("bad", ["../out.txt", "top/../../out.txt", "/out.txt", "other/out.txt"])
@both_kinds
def test_extract_never_writes_outside(tmp_path, make, name, bad):
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    make(tmp_path / name, [("top/good.txt", b"good"), (bad, b"bad")])
    with pytest.raises(DataError, match="outside of top"):
        extract(tmp_path / name, root, "top", lambda member: True)
    assert list(root.iterdir()) == [] and not list(tmp_path.rglob("out.txt"))


def test_links_in_an_archive_are_left_out(tmp_path):
    make_tar(tmp_path / "a.tar.gz", [("top/link", "/etc"), ("top/link/passwd", b"bad"), ("top/good", b"good")])
    with members(tmp_path / "a.tar.gz") as entries:
        assert [name for name, _ in entries] == ["top/link/passwd", "top/good"]
    top = extract(tmp_path / "a.tar.gz", tmp_path, "top", lambda member: True)
    assert not (top / "link").is_symlink()


@both_kinds
def test_damaged_archive_and_archive_of_something_else(tmp_path, make, name):
    make(tmp_path / name, [("top/a", np.random.default_rng(0).bytes(50_000)), ("top/b", b"b")])
    with pytest.raises(DataError, match="holds none"):
        extract(tmp_path / name, tmp_path, "top", lambda member: False)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20_000])
    with pytest.raises(DataError, match=f"{name}: damaged archive"):
        extract(tmp_path / name, tmp_path, "top", lambda member: True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def fake_npm(folder, script):
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return str(folder)


def test_npm_pack_returns_the_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", 'echo "$@" > thing-1.0.tgz'))
    path = npm_pack("thing@1.0", tmp_path / "out")
    assert path == tmp_path / "out" / "thing-1.0.tgz"
    assert path.read_text().split()[0] == "pack" and path.read_text().split()[-1] == "thing@1.0"
    assert list((tmp_path / "out").iterdir()) == [path]


def test_npm_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"thing@1\.0: the command npm is not on PATH; install Node\.js"):
        npm_pack("thing@1.0", tmp_path)


@pytest.mark.parametrize(
    ("script", "says"),
    [("echo npm warn old >&2; echo npm error E404 >&2; exit 1", r"\(npm error E404\)"), ("exit 0", "0 archives")],
)
def test_npm_failure_says_what_npm_said(tmp_path, monkeypatch, script, says):
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script))
    with pytest.raises(DataError, match=says):
        npm_pack("thing@1.0", tmp_path)
