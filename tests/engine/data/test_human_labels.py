"""CIFAR-10N: labels by kind, and files that are about other images; the published labels with their noise rates."""

from pathlib import Path

import numpy as np
import pytest

from engine.data.cifar import cifar10
from engine.data.dataset import DataError
from engine.data.human_labels import KINDS, cifar10n

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT.parent / "shared" / "data" / "cifar10n_labels.npz"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"needs {PUBLISHED.name} in shared/data")

CLEAN = np.array([6, 9, 9, 4, 1, 1, 2], np.int64)
FILE = {"clean_label": CLEAN.astype(np.uint8)} | {
    key: (CLEAN + shift).astype(np.uint8) % 10 for shift, key in enumerate(KINDS.values())
}


@pytest.fixture
def write(tmp_path):
    """Writes the labels with these changes; a value of None leaves a key out."""

    def written(**changes):
        labels = {key: array for key, array in (FILE | changes).items() if array is not None}
        np.savez(tmp_path / "people.npz", **labels)
        return tmp_path / "people.npz"

    return written


def test_each_kind_has_its_labels(write):
    path = write()
    for shift, kind in enumerate(("aggre", "random1", "random2", "random3", "worse")):
        labels = cifar10n(path, kind, CLEAN)
        assert labels.dtype == np.int64 and labels.tolist() == ((CLEAN + shift) % 10).tolist()


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({}, "random", r"has no labels of the kind 'random'; give one of aggre, random1, random2, random3, worse"),
        ({"worse_label": None}, "worse", r"holds .*, not `worse_label`"),
        ({"clean_label": None}, "aggre", r"holds .*, not `clean_label`"),
        ({"clean_label": CLEAN[::-1]}, "aggre", r"`clean_label` differs from the labels of 6 of 7 .* 0: 2, not 6"),
        ({"clean_label": CLEAN[1:]}, "aggre", r"`clean_label` is int64 \[6\] from 1 to 9 for 7 images; give"),
        ({"worse_label": CLEAN[1:]}, "worse", r"`worse_label` is int64 \[6\] from 1 to 9 for 7 images"),
        ({"worse_label": CLEAN + 1}, "worse", r"`worse_label` is int64 \[7\] from 2 to 10 for 7 images"),
        ({"worse_label": CLEAN - 2}, "worse", r"`worse_label` is int64 \[7\] from -1 to 7"),
        ({"worse_label": CLEAN / 1}, "worse", r"`worse_label` is float64 \[7\] for 7 images; give integers from 0"),
    ],
)  # fmt: skip
def test_other_files_are_refused(write, changes, kind, says):
    path = write(**changes)
    with pytest.raises(DataError, match=f"{path}: {says}"):
        cifar10n(path, kind, CLEAN)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"people\.npz: no such file; .* `clean_label`, `aggre_label`"):
        cifar10n(tmp_path / "people.npz", "aggre", CLEAN)


@needs_published
def test_published_noise_rates():
    with np.load(PUBLISHED) as file:
        clean = file["clean_label"].astype(np.int64)
    assert clean[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3] and np.bincount(clean).tolist() == [5_000] * 10
    wrong = {kind: float((cifar10n(PUBLISHED, kind, clean) != clean).mean()) for kind in KINDS}
    assert {kind: round(100 * rate, 1) for kind, rate in wrong.items()} == {
        "aggre": 9.0, "random1": 17.2, "random2": 18.1, "random3": 17.6, "worse": 40.2,
    }  # fmt: skip


@needs_published
@pytest.mark.network
def test_published_labels_are_in_the_order_of_cifar10():
    train = cifar10(ROOT / "data", True)
    assert (cifar10n(PUBLISHED, "aggre", train.labels) == train.labels).mean() > 0.9
