"""Argument checks of the public losses: ValueError that names the argument, what was found, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.collectives import world_size
from kernels.reference import KL_REDUCTIONS

BACKENDS = ("auto", "triton", "native", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUEUE_DTYPES = (torch.float32, torch.float64)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is unknown; allowed: {', '.join(allowed)}")


def check_backend(backend: str) -> None:
    check_choice("backend", backend, BACKENDS)


def check_positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value < float("inf")):  # not math.isfinite: torch.compile
        raise ValueError(f"{name}: must be positive and finite, found {value!r}")


def check_reduction(kl_reduction: str) -> None:
    check_choice("kl_reduction", kl_reduction, KL_REDUCTIONS)


def check_weights(weights: tuple[float, float]) -> None:
    pair = isinstance(weights, tuple | list) and len(weights) == 2
    if not (pair and all(isinstance(w, int | float) and 0 <= w < float("inf") for w in weights)):
        raise ValueError(f"weights: two finite numbers >= 0 (one a peer), found {weights!r}")


def check_weight(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value < float("inf")):
        raise ValueError(f"{name}: must be finite and >= 0, found {value!r}")


def check_views(group: dist.ProcessGroup | None, **views: Tensor) -> None:
    """Both views of one peer, and enough images for a negative."""
    check_pair(**views)
    check_two_images(group, "negatives", **views)


def check_pair(**views: Tensor) -> None:
    """Both views of one network: [n, D], same shape, dtype and device."""
    for name, z in views.items():
        check_rows(name, z, "N")
        if z.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {z.dtype} is not supported; allowed: {_names(DTYPES)}")
    x, y = views.items()
    _check_same(x, y, "shape", "dtype", "device")


def check_targets(**tensors: Tensor) -> None:
    """What rows are compared with: the first tensor's rows with the two views that follow; dtypes may differ."""
    rows, *targets = tensors.items()
    check_pair(**dict(targets))
    _check_same(rows, targets[0], "shape", "device")


def check_two_images(group: dist.ProcessGroup | None, lacks: str, **views: Tensor) -> None:
    name, x = next(iter(views.items()))
    if x.shape[0] * world_size(group) < 2:
        raise ValueError(f"{name}: N = 1 has no {lacks}; at least 2 images over all ranks are needed")


def check_queue(queue: Tensor, **rows: Tensor) -> None:
    """[K, D] keys of earlier batches, as wide as `rows` and on their device."""
    check_rows("queue", queue, "K")
    if queue.dtype not in QUEUE_DTYPES:
        raise ValueError(f"queue: dtype {queue.dtype} is not supported; allowed: {_names(QUEUE_DTYPES)}")
    name, z = next(iter(rows.items()))
    if queue.shape[1] != z.shape[1]:
        raise ValueError(f"queue: width {queue.shape[1]} differs from {name}'s {z.shape[1]}")
    _check_same((name, z), ("queue", queue), "device")


def check_position(position: Tensor, queue: Tensor) -> None:
    if not isinstance(position, Tensor):
        raise ValueError(f"position: an int64 tensor of one number is expected, found {type(position).__name__}")
    if position.ndim or position.dtype != torch.int64:
        found = f"{position.dtype} {list(position.shape)}"
        raise ValueError(f"position: an int64 tensor of one number, shape [], is expected, found {found}")
    _check_same(("queue", queue), ("position", position), "device")


def check_rows(name: str, z: Tensor, count: str) -> None:
    """A matrix of rows, none empty; `count` is the letter of their number."""
    if not isinstance(z, Tensor):
        raise ValueError(f"{name}: a tensor [{count}, D] is expected, found {type(z).__name__}")
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"{name}: shape [{count}, D] with {count}, D >= 1 is expected, found {list(z.shape)}")


def _check_same(first: tuple[str, Tensor], second: tuple[str, Tensor], *properties: str) -> None:
    (name_x, x), (name_y, y) = first, second
    for what in properties:
        if getattr(x, what) != getattr(y, what):
            raise ValueError(f"{name_y}: {what} {getattr(y, what)} differs from {name_x}'s {getattr(x, what)}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_peers(x_a: Tensor, x_b: Tensor) -> None:
    if x_a.shape[0] != x_b.shape[0]:
        raise ValueError(f"x_b: {x_b.shape[0]} images, but x_a holds {x_a.shape[0]}; peers see the same images")
    if x_a.device != x_b.device:
        raise ValueError(f"x_b: device {x_b.device} differs from x_a's {x_a.device}")


def check_networks(group: dist.ProcessGroup | None, **networks: tuple[Tensor, Tensor]) -> None:
    """Views (x, y) of several networks, of the same images; widths may differ."""
    first, (x_first, *_) = next(iter(networks.items()))
    for name, pair in networks.items():
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise ValueError(f"{name}: the two views (x, y) of a network are expected, found {_described(pair)}")
        x, y = pair
        check_views(group, **{f"{name}[0]": x, f"{name}[1]": y})
        if x.shape[0] != x_first.shape[0]:
            raise ValueError(
                f"{name}: {x.shape[0]} images, but {first} holds {x_first.shape[0]}; networks see the same images"
            )
        if x.device != x_first.device:
            raise ValueError(f"{name}: device {x.device} differs from {first}'s {x_first.device}")


def check_several(name: str, found: Sequence, what: str) -> None:
    if not (isinstance(found, tuple | list) and len(found)):
        raise ValueError(f"{name}: a sequence of one or more {what} is expected, found {_described(found)}")


def check_terms(terms: Sequence[tuple[int, Sequence[int]]], networks: int) -> None:
    """Who distils from whom: (student, (teacher, ...)) as places in a list of networks."""
    check_several("terms", terms, "(student, (teacher, ...))")
    for i, term in enumerate(terms):
        if not (isinstance(term, tuple | list) and len(term) == 2 and isinstance(term[1], tuple | list)):
            raise ValueError(f"terms[{i}]: (student, (teacher, ...)) is expected, found {term!r}")
        student, teachers = term
        for place in (student, *teachers):
            if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < networks:
                raise ValueError(f"terms[{i}]: places in views are 0 to {networks - 1}, found {place!r}")
        if not teachers:
            raise ValueError(f"terms[{i}]: student {student} has no teacher; one or more are needed")
        if student in teachers or len(set(teachers)) < len(teachers):
            raise ValueError(
                f"terms[{i}]: teachers must be different networks, none of them the student {student}, "
                f"found {tuple(teachers)}"
            )


def _described(found: object) -> str:
    return f"{type(found).__name__} of {len(found)}" if isinstance(found, tuple | list) else type(found).__name__
