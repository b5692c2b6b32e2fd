"""Classes that published data sets share, by name."""

import itertools

import numpy as np
import pytest
import torchvision

from engine.data.catalog import NATIVE_SIZE
from engine.data.class_names import CLASS_NAMES, class_map, class_names
from engine.data.dataset import ArrayDataset, DataError
from engine.data.folder import open_folder


def published(source: str, target: str) -> dict[int, int]:
    return class_map(CLASS_NAMES[source], CLASS_NAMES[target])


SAME = [{"automobile", "car"}]


def test_a_class_maps_to_the_one_of_its_name():
    for source, target in itertools.product(("cifar10", "stl10"), repeat=2):
        for label, other in published(source, target).items():
            names = {CLASS_NAMES[target][label], CLASS_NAMES[source][other]}
            assert len(names) == 1 or names in SAME


@pytest.mark.parametrize(("source", "target", "alone"), [("cifar10", "stl10", "monkey"), ("stl10", "cifar10", "frog")])
def test_all_classes_but_one_have_a_partner_and_each_its_own(source, target, alone):
    shared = published(source, target)
    assert [name for label, name in enumerate(CLASS_NAMES[target]) if label not in shared] == [alone]
    assert len(set(shared.values())) == len(shared) == 9
    assert {other: label for label, other in shared.items()} == published(target, source)


def test_car_and_horse_stand_elsewhere():
    assert published("cifar10", "stl10") == {0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 5: 5, 6: 7, 8: 8, 9: 9}


@pytest.mark.parametrize("dataset", CLASS_NAMES)
def test_a_data_set_maps_to_itself(dataset):
    assert dataset in NATIVE_SIZE and published(dataset, dataset) == {label: label for label in range(10)}


def test_names_of_fashion_mnist_are_those_of_torchvision():
    assert list(CLASS_NAMES["fashion-mnist"]) == torchvision.datasets.FashionMNIST.classes


def test_names_are_the_data_sets_own_where_it_has_some(image_folder):
    train, _ = open_folder(image_folder)
    assert class_names("folder", train) == ("class0", "class1")
    array = ArrayDataset("stl10-test", np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, int))
    assert class_names("stl10", array) == CLASS_NAMES["stl10"]
    with pytest.raises(
        DataError, match="cifar100: the names of its classes are not known; known are cifar10, stl10, fas"
    ):
        class_names("cifar100", array)


def test_folders_map_by_their_names():
    assert class_map(("ant", "bee", "cat"), ("bee", "dog", "ant")) == {0: 1, 2: 0}


def test_nothing_shared():
    with pytest.raises(DataError, match=r"no class is shared \(airplane, .*; T-shirt/top, .*\); give"):
        published("cifar10", "fashion-mnist")
