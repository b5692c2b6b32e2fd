"""The classes of published data sets by name, so that a classifier of one can be asked about another's images."""

from engine.data.dataset import DataError

# In the official order of the labels: a class stands at its label (of STL-10, whose files count from 1, one less).
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "stl10": ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip

_SAME = {"automobile": "car"}  # two names of one class


def class_map(source: str, target: str) -> dict[int, int]:
    """Label of `target` -> label of `source`, for the classes that both have.

    Args:
        source, target: keys of CLASS_NAMES.

    Raises:
        DataError: a data set whose classes have no names here, or two that share none.
    """
    for dataset in (source, target):
        if dataset not in CLASS_NAMES:
            raise DataError(f"{dataset}: the names of its classes are not known; give one of {', '.join(CLASS_NAMES)}")
    label_of = {_SAME.get(name, name): label for label, name in enumerate(CLASS_NAMES[source])}
    shared = {
        label: label_of[name]
        for label, name in enumerate(_SAME.get(name, name) for name in CLASS_NAMES[target])
        if name in label_of
    }
    if not shared:
        theirs, wanted = ", ".join(CLASS_NAMES[source]), ", ".join(CLASS_NAMES[target])
        raise DataError(f"{source} and {target} share no class ({theirs}; {wanted}); give two that do")
    return shared
