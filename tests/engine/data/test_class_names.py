"""Classes that published data sets share, by name."""

import itertools

import pytest
import torchvision

from engine.data.catalog import NATIVE_SIZE
from engine.data.class_names import CLASS_NAMES, class_map
from engine.data.dataset import DataError

SAME = [{"automobile", "car"}]


def test_a_class_maps_to_the_one_of_its_name():
    for source, target in itertools.product(("cifar10", "stl10"), repeat=2):
        for label, other in class_map(source, target).items():
            names = {CLASS_NAMES[target][label], CLASS_NAMES[source][other]}
            assert len(names) == 1 or names in SAME


@pytest.mark.parametrize(("source", "target", "alone"), [("cifar10", "stl10", "monkey"), ("stl10", "cifar10", "frog")])
def test_all_classes_but_one_have_a_partner_and_each_its_own(source, target, alone):
    shared = class_map(source, target)
    assert [name for label, name in enumerate(CLASS_NAMES[target]) if label not in shared] == [alone]
    assert len(set(shared.values())) == len(shared) == 9
    assert {other: label for label, other in shared.items()} == class_map(target, source)


def test_car_and_horse_stand_elsewhere():
    assert class_map("cifar10", "stl10") == {0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 5: 5, 6: 7, 8: 8, 9: 9}


@pytest.mark.parametrize("dataset", CLASS_NAMES)
def test_a_data_set_maps_to_itself(dataset):
    assert dataset in NATIVE_SIZE and class_map(dataset, dataset) == {label: label for label in range(10)}


def test_names_of_fashion_mnist_are_those_of_torchvision():
    assert list(CLASS_NAMES["fashion-mnist"]) == torchvision.datasets.FashionMNIST.classes


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (
            "cifar10",
            "cifar100",
            "cifar100: the names of its classes are not known; give one of cifar10, stl10, fashion",
        ),
        ("folder", "cifar10", "folder: the names"),
        (
            "cifar10",
            "fashion-mnist",
            r"cifar10 and fashion-mnist share no class \(airplane, .*; T-shirt/top, .*\); give",
        ),
    ],
)
def test_no_map(source, target, says):
    with pytest.raises(DataError, match=says):
        class_map(source, target)
