"""The classes of published data sets by name, so that a classifier of one can be asked about another's images."""

from collections.abc import Sequence

from engine.data.dataset import DataError, ImageDataset
from engine.data.encoded import EncodedDataset

# In the official order of the labels: a class stands at its label (of STL-10, whose files count from 1, one less).
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "stl10": ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip

_SAME = {"automobile": "car"}  # two names of one class


def class_names(kind: str, dataset: ImageDataset) -> tuple[str, ...]:
    """Names of the classes of a data set, by label: its own (folders, shards), or those published for its `kind`.

    Raises DataError: none are known.
    """
    if isinstance(dataset, EncodedDataset) and dataset.classes is not None:
        return dataset.classes
    if kind not in CLASS_NAMES:
        raise DataError(
            f"{kind}: the names of its classes are not known; known are {', '.join(CLASS_NAMES)} and folders'"
        )
    return CLASS_NAMES[kind]


def class_map(source: Sequence[str], target: Sequence[str]) -> dict[int, int]:
    """Label of `target` -> label of `source`, for the classes that both have, by the names of all their classes.

    Raises DataError: they share none.
    """
    ours, theirs = ([_SAME.get(name, name) for name in names] for names in (source, target))
    for names in (ours, theirs):
        if twice := sorted(name for name in set(names) if names.count(name) > 1):
            raise DataError(f"two classes are called {', '.join(twice)} (automobile and car are one); rename one")
    label_of = {name: label for label, name in enumerate(ours)}
    shared = {label: label_of[name] for label, name in enumerate(theirs) if name in label_of}
    if not shared:
        raise DataError(f"no class is shared ({_few(source)}; {_few(target)}); give data sets that have some in common")
    return shared


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
