"""TFRecord files: images and labels as protobuf, TensorBoard and DALI have them; every damage is found."""

import gzip
import struct
import zlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example as explicit
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from engine.data.dataset import DataError
from engine.data.tfrecord import locate_tfrecord, open_tfrecord
from shard_writers import example, example_class, picture, records, write_tfrecord


def located(path):
    """(number, bytes, label) of each image, the bytes read where it is said to be."""
    content = path.read_bytes()
    return [(i.name, content[i.offset : i.offset + i.length], i.label) for i in locate_tfrecord(str(path))]


def refused(path, *words):
    """The error's message, which names the file and has these words."""
    with pytest.raises(DataError) as caught:
        list(locate_tfrecord(str(path)))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def one(tmp_path, **features):
    return located(write_tfrecord(tmp_path / "one.tfrecord", example(**features)))


def test_tensorflows_imagenet(tmp_path):
    made = [
        example(
            image__encoded=picture(i, "JPEG"), image__class__label=i + 1, image__filename=b"n01_%d.JPEG" % i,
            image__object__bbox__xmin=[0.1, 0.25], image__object__bbox__label=[1, 2], image__height=7,
            image__colorspace=b"RGB", image__class__text="猫".encode(), image__object__number=[],
        )
        for i in range(3)
    ]  # fmt: skip
    path = write_tfrecord(tmp_path / "train-00000-of-00001", *made)
    assert located(path) == [(str(i), picture(i, "JPEG"), i + 1) for i in range(3)]


@pytest.mark.parametrize("image", ["image/encoded", "image", "jpg", "jpeg", "png", "webp"])
@pytest.mark.parametrize("label", ["image/class/label", "label", "cls"])
def test_names_of_features(tmp_path, image, label):
    assert one(tmp_path, **{image: b"bytes", label: 3, "id": b"x"}) == [("0", b"bytes", 3)]


@pytest.mark.parametrize(
    ("label", "expected"), [(0, 0), (127, 127), (128, 128), (2**40, 2**40), (2**63 - 1, 2**63 - 1), (-1, None)]
)
def test_labels(tmp_path, label, expected):
    assert one(tmp_path, image=b"bytes", label=label)[0][2] == expected


def test_no_label(tmp_path):
    assert one(tmp_path, image=b"bytes")[0][2] is None
    assert one(tmp_path, image=b"bytes", label=[])[0][2] is None


def varint(value):
    found = b""
    while value >= 128:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def delimited(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def test_unpacked_labels_unknown_fields_and_repeated_names(tmp_path):
    """What protobuf reads, though its own writer never writes it so."""
    unpacked = delimited(1, delimited(1, b"label") + delimited(2, delimited(3, varint(1 << 3) + varint(300))))
    first = delimited(1, delimited(1, b"image") + delimited(2, delimited(1, delimited(1, b"first"))))
    second = delimited(1, delimited(1, b"image") + delimited(2, delimited(1, delimited(1, b"second"))))
    strange = varint(7 << 3) + varint(5) + varint(8 << 3 | 1) + bytes(8) + varint(9 << 3 | 5) + bytes(4)
    record = strange + delimited(1, first + unpacked) + delimited(12, b"?") + delimited(1, second + strange)
    parsed = example_class().FromString(record).f1.f1
    assert parsed["image"].f1.f1 == [b"second"] and parsed["label"].f3.f1 == [300]
    assert located(write_tfrecord(tmp_path / "s.tfrecord", record)) == [("0", b"second", 300)]


@given(
    st.dictionaries(
        st.text(max_size=8) | st.sampled_from(["image", "label"]),
        st.lists(st.binary(max_size=200), max_size=3)
        | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)
        | st.lists(st.floats(width=32, allow_nan=False), max_size=3),
        max_size=6,
    ),
    st.binary(min_size=1, max_size=300),
    st.integers(0, 2**63 - 1),
)
@settings(max_examples=200, deadline=None)
def test_every_example_that_protobuf_writes(tmp_path_factory, others, image, label):
    features = {**others, "image/encoded": image, "image/class/label": label}
    path = write_tfrecord(tmp_path_factory.mktemp("any") / "s.tfrecord", example(**features))
    assert located(path) == [("0", image, label)]


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({}, ["no encoded image", "it has: none"]),
        ({"text": b"x", "label": 1}, ["record 0, at byte 0,", "no encoded image", "it has: label, text"]),
        ({"image": [1, 2, 3]}, ["no encoded image", "it has: image"]),
        ({"image": [b"1", b"2"]}, ["2 images in 'image'"]),
        ({"image": b"1", "label": [1, 2]}, ["labels [1, 2] in 'label'"]),
        ({"image": b"1", "label": -5}, ["not one integer from 0"]),
        ({"image": b"1", "label": b"cat"}, ["label in 'label' that is no int64"]),
        ({"image": b"1", "label": 1.0}, ["label in 'label' that is no int64"]),
    ],
)
def test_examples_that_are_refused(tmp_path, features, words):
    refused(write_tfrecord(tmp_path / "s.tfrecord", example(**features)), *words)


@given(st.binary(min_size=1, max_size=60))
@settings(max_examples=300, deadline=None)
def test_records_of_something_else_raise_nothing_else(tmp_path_factory, data):
    path = write_tfrecord(tmp_path_factory.mktemp("raw") / "s.tfrecord", *records(1), data)
    with pytest.raises(DataError, match="record 1, at byte"):
        list(locate_tfrecord(str(path)))


def test_files_that_are_no_tfrecord(tmp_path):
    path, content = tmp_path / "s.tfrecord", write_tfrecord(tmp_path / "plain.tfrecord", *records(2)).read_bytes()
    path.write_bytes(b"text\n" * 100)
    refused(path, "no TFRecord file")
    path.write_bytes(gzip.compress(content))
    refused(path, "compressed with gzip", "random access")
    path.write_bytes(zlib.compress(content))
    refused(path, "compressed with zlib")
    path.write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    refused(path, "no TFRecord file")


def test_what_is_said_of_a_damaged_record(tmp_path):
    path = write_tfrecord(tmp_path / "s.tfrecord", *records(3))
    content, second = path.read_bytes(), len(write_tfrecord(tmp_path / "first", *records(1)).read_bytes())
    path.write_bytes(content[: second + 100])
    refused(
        path, f"record 1, at byte {second}, is truncated", f"the file at byte {second + 100}", "copy the file again"
    )
    path.write_bytes(content[: second + 5])
    refused(path, f"record 1, at byte {second}, is truncated")
    path.write_bytes(content[:second] + b"\xff" + content[second + 1 :])
    refused(path, f"record 1, at byte {second}, is damaged: its length")
    path.write_bytes(content[: second + 90] + b"?" + content[second + 91 :])
    refused(path, f"record 1, at byte {second}, is damaged: its", "checksum")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of four records."""
    return write_tfrecord(tmp_path_factory.mktemp("whole") / "s.tfrecord", *records(4))


def ends(content):
    """Where each record ends."""
    found = [0]
    while found[-1] < len(content):
        found.append(found[-1] + struct.unpack_from("<Q", content, found[-1])[0] + 16)
    return found


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_truncation_within_a_record_and_no_flipped_bit_go_unseen(whole, data):
    content = whole.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    broken = whole.with_name("broken.tfrecord")
    broken.write_bytes(content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :])
    refused(broken)
    broken.write_bytes(content[:at])
    if at in ends(content):  # the format cannot tell
        assert located(broken) == located(whole)[: ends(content).index(at)]
    else:
        refused(broken, "is truncated", f"at byte {at}; copy the file again")


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
@explicit(at=330, value=13)  # a label of fixed width, which protobuf takes for an unknown field
@settings(max_examples=500, deadline=None)
def test_changed_records_with_right_checksums_are_read_as_protobuf_reads_them(whole, at, value):
    record = bytearray(example(image=b"bytes", label=[1, 300], other=[0.5]))
    record[at % len(record)] = value
    path = write_tfrecord(whole.with_name("changed.tfrecord"), bytes(record))
    try:
        parsed = example_class().FromString(bytes(record)).f1.f1
        expected = list(parsed["image"].f1.f1), list(parsed["label"].f3.f1)
    except DecodeError:
        expected = [], []
    try:
        ((_, image, label),) = located(path)
    except DataError:
        return
    if expected[0]:
        assert ([image], [] if label is None else [label]) == expected


def test_lengths_that_reach_beyond_the_message_around_them(tmp_path):
    path, behind = tmp_path / "s.tfrecord", b"\x38\x05" * 8  # fields of their own, where nothing reaches into them
    entry = delimited(1, b"image") + delimited(2, delimited(1, varint(1 << 3 | 2) + varint(9) + b"bytes"))
    refused(write_tfrecord(path, delimited(1, delimited(1, entry)) + behind), "is no tf.train.Example")
    image = delimited(1, delimited(1, b"image") + delimited(2, delimited(1, delimited(1, b"bytes"))))
    label = delimited(1, delimited(1, b"label") + delimited(2, delimited(3, delimited(1, b"\x81"))))
    refused(write_tfrecord(path, delimited(1, image + label) + behind), "is no tf.train.Example")


def test_tensorboard_reads_the_same(whole):
    reader = PyRecordReader_New(str(whole))
    theirs = []
    for _ in range(4):
        reader.GetNext()
        parsed = example_class().FromString(reader.record()).f1.f1
        theirs.append((parsed["image/encoded"].f1.f1[0], parsed["image/class/label"].f3.f1[0]))
    assert theirs == [(data, label) for _, data, label in located(whole)]


def test_dali_reads_the_same(whole, tmp_path):
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def
    from nvidia.dali import tfrecord as dali

    places = ends(whole.read_bytes())
    (tmp_path / "index").write_text("".join(f"{a} {b - a}\n" for a, b in zip(places, places[1:], strict=False)))
    features = {
        "image/encoded": dali.FixedLenFeature((), dali.string, ""),
        "image/class/label": dali.FixedLenFeature([1], dali.int64, -1),
    }

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        read = fn.readers.tfrecord(path=str(whole), index_path=str(tmp_path / "index"), features=features)
        return read["image/encoded"], read["image/class/label"]

    built = pipeline()
    built.build()
    images, labels = built.run()
    theirs = [(bytes(images.at(i)), int(labels.at(i)[0])) for i in range(4)]
    assert theirs == [(data, label) for _, data, label in located(whole)]


def test_opened(tmp_path):
    write_tfrecord(tmp_path / "train-00000-of-00002", *records(3))
    write_tfrecord(tmp_path / "train-00001-of-00002", *records(2, first=3))
    write_tfrecord(tmp_path / "validation-00000-of-00001", *records(2, first=5))
    train, val = open_tfrecord(tmp_path)
    assert [train.encoded(i) for i in range(5)] == [picture(i) for i in range(5)]
    assert train.labels.tolist() == [0, 1, 2, 0, 1] and val.labels.tolist() == [2, 0]
    assert train.describe(4) == f"{tmp_path}/train-00001-of-00002:1"
