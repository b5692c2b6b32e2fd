"""Scans a data set of encoded images: which can be used, which cannot and why, and how large they are.

    python engine/scan.py ROOT [--dataset folder|webdataset|tfrecord] [--manifest FILE] [--shards N]

Every image is decoded in full, once: what is found is kept in a manifest, by default in ROOT, which training reads.
The exit code is 0 where some images are left out too, and 2 where the data set cannot be used at all.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script: the repository's root in place of this folder, so that `engine` and `kernels` are this project's.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from engine.data.catalog import OWN, open_own
from engine.data.dataset import DataError, UnreadableImage
from engine.data.encoded import SPOILED, EncodedDataset, describe_form
from engine.data.manifest import manifest_path

EXAMPLES = 3  # names a reason
_LOOKED_AT = 1000  # images whose form is named; the manifest tells only whether they need converting


def scan_report(dataset: str, root: Path, *, manifest: Path | None = None, shards: int | None = None) -> Iterator[str]:
    """Scans what is new or changed, and tells in lines what there is.  Raises DataError: nothing that can be used."""
    if shards is not None and dataset == "folder":
        raise DataError(f"--shards: {shards} with --dataset folder, which has no shards; leave it out")
    train, val = open_own(dataset, root, manifest=manifest, shards=shards)
    parts = [part for part in (train, val) if part is not None]
    usable = sum(map(len, parts))
    rejected = [each for part in parts for each in part.rejected]
    yield f"{usable:,} images are usable, {len(rejected):,} are not"
    yield from _by_reason(rejected, root)
    yield from _spoiled(parts, root)
    for part in parts:
        classes = "no labels" if part.num_classes is None else f"{part.num_classes:,} classes"
        yield f"{part.name}: {len(part):,} images, {classes}"
    sizes = np.concatenate([part.facts.sizes for part in parts])
    for column, side in enumerate(("width", "height")):
        least, middle, most = np.percentile(sizes[:, column], (0, 50, 100), method="lower").astype(int)
        yield f"{side}: {least:,} to {most:,} px, median {middle:,} px"
    yield from _to_convert(parts)
    kept = manifest_path(root, manifest)
    yield f"manifest: {kept}" if kept.is_file() else "manifest: none could be written"


def _by_reason(rejected: Sequence[tuple[str, str]], root: Path) -> Iterator[str]:
    """A line a reason, the most frequent first, with some of the images."""
    names: dict[str, list[str]] = {}
    for name, reason in rejected:
        # Numbers, as of the bytes that are missing, would make each a reason of its own.
        general = re.sub(r"\s*\([^)]*\d[^)]*\)", "", reason)
        names.setdefault(general, []).append(os.path.relpath(name, root))
    for reason, found in sorted(names.items(), key=lambda entry: -len(entry[1])):
        more = ", ..." if len(found) > EXAMPLES else ""
        yield f"    {len(found):,} x {reason}: {', '.join(found[:EXAMPLES])}{more}"


def _spoiled(parts: Sequence[EncodedDataset], root: Path) -> Iterator[str]:
    """Images that went bad since they were first scanned; their places in the order stay, for runs to be resumed."""
    names = [part.describe(int(i)) for part in parts for i in np.flatnonzero(part.facts.stamps == SPOILED)]
    if names:
        more = ", ..." if len(names) > EXAMPLES else ""
        shown = ", ".join(os.path.relpath(name, root) for name in names[:EXAMPLES])
        yield f"{len(names):,} of the usable went bad since the first scan, and others take their places: {shown}{more}"


def _to_convert(parts: Sequence[EncodedDataset]) -> Iterator[str]:
    """The images that other decoders than Pillow get converted, by their form."""
    places = [
        (part, int(index))
        for part in parts
        for index in np.flatnonzero(~part.facts.direct & (part.facts.stamps != SPOILED))
    ]
    if not places:
        yield "all are plain JPEG or PNG, which every loader decodes itself"
        return
    forms: Counter[str] = Counter()
    for part, index in places[:_LOOKED_AT]:
        try:
            forms[describe_form(part.encoded(index), part.describe(index))] += 1
        except UnreadableImage:
            continue  # changed a moment ago; the next scan tells
    listed = ", ".join(f"{form} {count:,}" for form, count in forms.most_common())
    of = f" (of the first {_LOOKED_AT:,})" if len(places) > _LOOKED_AT else ""
    yield f"{len(places):,} are no plain JPEG or PNG, so that DALI gets them converted by Pillow: {listed}{of}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Scan a data set of encoded images.")
    parser.add_argument("root", type=Path, metavar="ROOT", help="the folder of the data set")
    parser.add_argument("--dataset", default="folder", choices=OWN, help="folder by default")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="keeps what is found; by default in ROOT")
    parser.add_argument("--shards", type=int, metavar="N", help="how many training shards there must be")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        report = scan_report(
            arguments.dataset, arguments.root.expanduser(), manifest=arguments.manifest, shards=arguments.shards
        )
        for line in report:
            print(line)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
