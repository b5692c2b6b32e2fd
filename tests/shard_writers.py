"""Shards for tests, written by others than the code that reads them: tarfile, protobuf and TensorBoard."""

import io
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter


def picture(seed: int, form: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    """An encoded image of noise, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form)
    return buffer.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar archive of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, *, first: int = 0, classes: int | None = 3) -> list[tuple[str, bytes]]:
    """Members of `count` samples, with labels where there are classes."""
    found = []
    for i in range(first, first + count):
        found.append((f"{i:04d}.png", picture(i)))
        if classes is not None:
            found.append((f"{i:04d}.cls", str(i % classes).encode()))
    return found


@cache
def example_class() -> type:
    """`tf.train.Example`, from a description of its fields."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name, *fields):
        added = file.message_type.add(name=name)
        for number, (label, kind) in enumerate(fields, 1):
            field = added.field.add(name=f"f{number}", number=number, label=label)
            if isinstance(kind, str):
                field.type, field.type_name = 11, f".t.{kind}"
            else:
                field.type = kind
        return added

    one, many = 1, 3
    message("BytesList", (many, 12))
    message("FloatList", (many, 2))
    message("Int64List", (many, 3))
    feature = message("Feature", (one, "BytesList"), (one, "FloatList"), (one, "Int64List"))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", (many, "Features.Entry"))
    entry = features.nested_type.add(name="Entry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=9)
    entry.field.add(name="value", number=2, label=one, type=11, type_name=".t.Feature")
    message("Example", (one, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def example(**features) -> bytes:
    """A serialised Example; `__` in a name stands for `/`, and the values' type tells the kind of list."""
    built = example_class()()
    for name, values in features.items():
        values = values if isinstance(values, list) else [values]
        feature = built.f1.f1[name.replace("__", "/")]
        kind = {bytes: feature.f1, float: feature.f2, int: feature.f3}[type(values[0]) if values else int]
        kind.SetInParent()
        kind.f1.extend(values)
    return built.SerializeToString(deterministic=True)


def write_tfrecord(path: Path, *records: bytes) -> Path:
    """A TFRecord file of these records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)
    return path


def records(count: int, *, first: int = 0, classes: int | None = 3) -> list[bytes]:
    """Examples of `count` images under TensorFlow's names, with labels where there are classes."""
    labels = [{} if classes is None else {"image__class__label": i % classes} for i in range(first, first + count)]
    return [example(image__encoded=picture(first + i), **label) for i, label in enumerate(labels)]
