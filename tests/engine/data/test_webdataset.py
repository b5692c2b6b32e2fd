"""Tar shards: where the images are and what their labels are, as tarfile and DALI have it; and every damage."""

import gzip
import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.dataset import DataError
from engine.data.webdataset import locate_webdataset, open_webdataset
from shard_writers import picture, samples, write_tar


def located(path):
    """(key, bytes, label) of each image, the bytes read where it is said to be."""
    content = path.read_bytes()
    return [(i.name, content[i.offset : i.offset + i.length], i.label) for i in locate_webdataset(str(path))]


def refused(path, *words):
    """The error's message, which names the file and has these words."""
    with pytest.raises(DataError) as caught:
        list(locate_webdataset(str(path)))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_labels_of_a_shard(tmp_path, form):
    a, b, c, d = (picture(i, kind) for i, kind in enumerate(("PNG", "JPEG", "WEBP", "JPEG")))
    shard = write_tar(
        tmp_path / "s.tar",
        ("a.cls", b"12\n"), ("a.png", a), ("a.txt", b"a caption"),
        ("b.JPG", b), ("b.CLS", b"0"),
        ("text.txt", b"no image here"),
        ("c.webp", c), ("c.json", json.dumps({"caption": "x", "label": 7}).encode()),
        ("d.jpeg", d), ("d.json", json.dumps({"cls": 3}).encode()),
        form=form,
    )  # fmt: skip
    assert located(shard) == [("a", a, 12), ("b", b, 0), ("c", c, 7), ("d", d, 3)]


@pytest.mark.parametrize(
    ("fields", "label"),
    [({"label": None}, None), ({"label": 2, "cls": 5}, 2), ({"caption": "x"}, None), ([1, 2], None), (7, None)],
)
def test_labels_in_json(tmp_path, fields, label):
    shard = write_tar(tmp_path / "s.tar", ("a.png", picture(0)), ("a.json", json.dumps(fields).encode()))
    assert located(shard) == [("a", picture(0), label)]


def test_cls_goes_before_json(tmp_path):
    shard = write_tar(tmp_path / "s.tar", ("a.cls", b"1"), ("a.json", b"not even JSON"), ("a.png", picture(0)))
    assert located(shard)[0][2] == 1


def test_keys_end_at_the_first_dot_of_the_base_name(tmp_path):
    long = "x" * 300
    names = ["./v1.0/train.d/a", "v1.0/train.d/a", "Ünïcödé/猫", long, "v2.1/with space"]
    shard = write_tar(tmp_path / "s.tar", *((f"{name}.png", picture(i)) for i, name in enumerate(names)))
    assert [key for key, _, _ in located(shard)] == names
    gnu = write_tar(tmp_path / "gnu.tar", *((f"{name}.png", picture(0)) for name in names), form=tarfile.GNU_FORMAT)
    assert [key for key, _, _ in located(gnu)] == names


def test_an_ending_of_an_image_goes_before_one_that_ends_so(tmp_path):
    shard = write_tar(
        tmp_path / "s.tar", ("a.seg.png", picture(1)), ("a.jpg", picture(2, "JPEG")), ("b.left.png", picture(3))
    )
    assert located(shard) == [("a", picture(2, "JPEG"), None), ("b", picture(3), None)]


def test_what_takes_no_part(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("dir.jpg", tarfile.DIRTYPE), ("pipe.txt", tarfile.FIFOTYPE), ("link.cls", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        for name in (".hidden.png", "d/._a.png", "README", "d/noending", "a.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(0))
            tar.addfile(info, io.BytesIO(picture(0)))
    assert located(tmp_path / "s.tar") == [("a", picture(0), None)]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_an_image_that_is_a_link_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = kind, "a.png"
        tar.addfile(info)
    refused(tmp_path / "s.tar", "'b.png' is a link or a device", "--hard-dereference")


def test_sparse_members_are_refused(tmp_path):
    shard = write_tar(tmp_path / "s.tar", ("a.png", picture(0)), form=tarfile.GNU_FORMAT)
    content = bytearray(shard.read_bytes())
    content[156:157] = tarfile.GNUTYPE_SPARSE
    content[386:398], content[398:410], content[483:495] = b"%011o " % 0, b"%011o " % 10, b"%011o " % 10
    content[148:156] = b"        "
    content[148:156] = b"%06o\0 " % sum(content[:512])
    shard.write_bytes(content)
    refused(shard, "'a.png' is sparse", "--sparse")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.png", b"1"), ("a.jpg", b"2")], ["a.png and a.jpg", "first dot"]),
        ([("photo.1.jpg", b"1"), ("photo.2.jpg", b"2")], ["photo.1.jpg and photo.2.jpg"]),
        ([("a.png", b"1"), ("b.png", b"2"), ("a.cls", b"0")], ["'a' is there twice", "--sort=name"]),
        ([("a.png", b"1"), ("b.png", b"2"), ("a.png", b"1")], ["'a' is there twice"]),
        ([("a.png", b"1"), ("a.png", b"1")], ["two images"]),
        ([("a.png", b"1"), ("a.cls", b"cat")], ["a.cls holds 'cat'", "integer from 0"]),
        ([("a.png", b"1"), ("a.cls", b"")], ["a.cls holds ''"]),
        ([("a.png", b"1"), ("a.cls", b"-1")], ["a.cls holds '-1'"]),
        ([("a.png", b"1"), ("a.cls", b"1.0")], ["a.cls holds '1.0'"]),
        ([("a.png", b"1"), ("a.cls", "٣".encode())], ["a.cls holds"]),
        ([("a.png", b"1"), ("a.cls", b"9" * 30)], ["a.cls holds"]),
        ([("a.png", b"1"), ("a.json", b'{"label": "cat"}')], ["a.json holds", "cat"]),
        ([("a.png", b"1"), ("a.json", b'{"label": true}')], ["a.json holds"]),
        ([("a.png", b"1"), ("a.json", b'{"label": -3}')], ["a.json holds"]),
        ([("a.png", b"1"), ("a.json", b'{"label": %d}' % 2**63)], ["a.json holds"]),
        ([("a.png", b"1"), ("a.json", b'{"label": ')], ["a.json is no JSON"]),
        ([("a.png", b"1"), ("a.json", b"[" * 100_000)], ["a.json is no JSON"]),
    ],
)
def test_samples_that_are_refused(tmp_path, members, words):
    refused(write_tar(tmp_path / "s.tar", *members), *words)


def test_files_that_are_no_tar_archive(tmp_path):
    path = tmp_path / "s.tar"
    for content in (b"text\n" * 1000, b"x" * 512):
        path.write_bytes(content)
        refused(path, "no tar archive", "copy the shard again")
    for content in (b"", b"x" * 100):
        path.write_bytes(content)
        refused(path, "truncated", f"byte {len(content)}")
    path.write_bytes(gzip.compress(write_tar(tmp_path / "plain.tar", *samples(2)).read_bytes()))
    refused(path, "compressed with gzip", "random access", "decompress")


def test_a_negative_length_ends(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {"size": "-2048"}
        tar.addfile(info)
    refused(tmp_path / "s.tar", "within 'a.png', of which -2048 bytes")


def test_a_concatenation_is_refused(tmp_path):
    one, two = (write_tar(tmp_path / f"{i}.tar", *samples(2, first=2 * i)) for i in range(2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    refused(one, "more data after the archive's end at byte", "one shard each")


def test_where_a_truncated_shard_ends(tmp_path):
    shard = write_tar(tmp_path / "s.tar", *samples(3))
    content, images = shard.read_bytes(), list(locate_webdataset(str(shard)))
    shard.write_bytes(content[: images[1].offset + 10])
    refused(shard, f"ends at byte {images[1].offset + 10}, within '0001.png'", "copy the shard again")
    shard.write_bytes(content[: images[1].offset - 512])
    refused(shard, "without the mark that ends an archive")
    shard.write_bytes(content[: images[1].offset - 200])
    refused(shard, "truncated")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A shard."""
    return write_tar(tmp_path_factory.mktemp("whole") / "s.tar", *samples(4))


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_truncation_goes_unseen(whole, data):
    content = whole.read_bytes()
    end = (len(content.rstrip(b"\0")) // 512 + 1) * 512  # of the last member
    cut = data.draw(st.integers(0, len(content) - 1))
    broken = whole.with_name("cut.tar")
    broken.write_bytes(content[:cut])
    if cut < end + 512:
        refused(broken, "truncated", f"byte {cut}")
    else:
        assert located(broken) == located(whole)  # only some of the zeros behind the archive are gone


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_damaged_header_goes_unseen(whole, data):
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        headers = [member.offset for member in tar]
    at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
    broken = whole.with_name("flipped.tar")
    broken.write_bytes(content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :])
    try:
        assert located(broken) == located(whole)  # the checksum's own filling
    except DataError as error:
        assert str(broken) in str(error)


@given(st.binary(max_size=2000))
@settings(max_examples=200, deadline=None)
def test_arbitrary_extended_headers_raise_nothing_else(tmp_path_factory, content):
    """The bytes of extended headers have no checksum."""
    path = tmp_path_factory.mktemp("pax") / "s.tar"
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("header")
            info.type, info.size = kind, len(content)
            tar.addfile(info, io.BytesIO(content))
            info = tarfile.TarInfo("a.png")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        try:
            list(locate_webdataset(str(path)))
        except DataError as error:
            assert str(path) in str(error)


def test_dali_reads_the_same(tmp_path):
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    shards = [write_tar(tmp_path / f"{i}.tar", *samples(5, first=5 * i)) for i in range(2)]
    ours = [image for shard in shards for image in located(shard)]

    @pipeline_def(batch_size=len(ours), num_threads=1, device_id=None)
    def pipeline():
        return tuple(fn.readers.webdataset(paths=[str(shard) for shard in shards], ext=["png", "cls"]))

    built = pipeline()
    built.build()
    images, labels = built.run()
    theirs = [(bytes(images.at(i)), int(bytes(labels.at(i)))) for i in range(len(ours))]
    assert theirs == [(data, label) for _, data, label in ours]


def test_opened(tmp_path):
    write_tar(tmp_path / "train-0.tar", *samples(3))
    write_tar(tmp_path / "val-0.tar", *samples(2, first=3))
    train, val = open_webdataset(tmp_path)
    assert [train.encoded(i) for i in range(3)] == [picture(i) for i in range(3)]
    assert train.image(1).size == (9, 7) and train.describe(2) == f"{tmp_path}/train-0.tar:0002"
    assert train.labels.tolist() == [0, 1, 2] and val.labels.tolist() == [0, 1] and val.classes == ("0", "1", "2")
