"""One loader, or one training step without a loader, measured in a process of its own; prints one JSON object.

A process each, so that memory is its own and no loader that waits for its turn prepares batches meanwhile.
`bench/data.py` runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.augment import AugmentPolicy, build_policy
from engine.data.catalog import open_dataset
from engine.data.dali_loader import DaliLoader
from engine.data.encoded import EncodedDataset
from engine.data.order import BatchOrder
from engine.data.skipped import SkippedImages
from engine.data.torch_loader import TorchLoader
from engine.data_config import AugmentConfig
from engine.distributed import Ranks
from engine.peer_config import PeerConfig
from engine.peers import build_peer
from kernels import mutual_loss

DECODE, CROP, VIEWS = STAGES = ("decode", "decode and crop", "all views")
DALI, DALI_GRAPH, TORCHVISION = PROVIDERS = ("dali", "dali graph", "torchvision")
STEP = "step"

CHUNK = 16  # images that a worker of the decode-only baseline takes at once
MOST_STEPS = 10**5  # more than any measurement takes
SAMPLE_S = 0.5  # between two looks at the memory


class DaliDecodes(DaliLoader):
    """The DALI loader without views, as where the native core makes them of what DALI decodes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.native = True

    def _views(self, outputs: Any, fed: Any) -> list[Tensor]:
        return []


class _Decoded(Dataset):
    """Decodes images in full and returns how many."""

    def __init__(self, dataset: EncodedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> int:
        return len([self.dataset.image(int(i)) for i in indices])


class TorchDecodes:
    """Worker processes that decode with Pillow, as the torchvision loader's do."""

    def __init__(self, dataset: EncodedDataset, order: BatchOrder, workers: int) -> None:
        self.dataset, self.order, self.workers = dataset, order, workers

    def batches(self, start: int, stop: int) -> Iterator[None]:
        """A None each batch."""
        keys = (
            part
            for step in range(start, stop)
            for part in np.split(self.order.indices(step), range(CHUNK, self.order.rows, CHUNK))
        )
        done = 0
        for count in DataLoader(_Decoded(self.dataset), batch_size=None, sampler=keys, num_workers=self.workers):
            done += count
            if done >= self.order.rows:
                done -= self.order.rows
                yield None


def build_loader(provider: str, stage: str, options: argparse.Namespace, device: torch.device) -> Any:
    """The loader that a provider is, for one stage."""
    ranks = Ranks(0, 1, 0, device, None)
    dataset = open_dataset("folder", options.root, "train")
    assert isinstance(dataset, EncodedDataset)
    order = BatchOrder(dataset, batch_size=options.batch, seed=0, ranks=ranks)
    policy = build_policy(AugmentConfig(), options.size)
    policy = _crop_alone(policy) if stage == CROP else policy
    if provider == TORCHVISION and stage == DECODE:
        return TorchDecodes(dataset, order, options.workers)
    kind: Any = TorchLoader if provider == TORCHVISION else DaliDecodes if stage == DECODE else DaliLoader
    more = {"graph_alone": True} if provider == DALI_GRAPH else {}
    return kind(
        dataset, policy, order, views=options.views, workers=options.workers, ranks=ranks,
        skipped=SkippedImages(ranks), **more,
    )  # fmt: skip


def _crop_alone(policy: AugmentPolicy) -> AugmentPolicy:
    return dataclasses.replace(policy, flip=0, jitter=0, grayscale=0, blur=0, solarize=0)


# -- measuring -------------------------------------------------------------------------------------------------------


class Memory:
    """The most that this process and its children hold beyond what they held at first, shared pages by shares."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._before, self._gpu_before = self._held(), self._gpu_held()
        self.peak = self.gpu_peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _held(self) -> int:
        total = 0
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
        return total

    def _gpu_held(self) -> int:
        if self._gpu is None:
            return 0
        free, total = torch.cuda.mem_get_info(self._gpu)
        return total - free

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak = max(self.peak, self._held() - self._before)
            self.gpu_peak = max(self.gpu_peak, self._gpu_held() - self._gpu_before)

    def close(self) -> None:
        """Stops watching."""
        self._stop.set()
        self._thread.join()


def stream(provider: str, stage: str, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Source images a second over `options.seconds`, after a warm-up, and memory."""
    loader = build_loader(provider, stage, options, device)
    memory = Memory(device)
    batches = loader.batches(0, MOST_STEPS)
    warm_until = time.perf_counter() + options.seconds / 3
    while time.perf_counter() < warm_until:
        next(batches)
    _synchronize(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < options.seconds:
        next(batches)
        count += 1
    _synchronize(device)
    elapsed = time.perf_counter() - started
    memory.close()
    return {"images_per_s": count * options.batch / elapsed, "bytes": memory.peak, "gpu_bytes": memory.gpu_peak}


def step(backbones: list[str], options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Source images a second of forward, losses and backward of two peers on views that lie ready."""
    torch.manual_seed(0)
    peers = [
        build_peer(PeerConfig(name="ab"[i], backbone=backbone), image_size=options.size).to(device)
        for i, backbone in enumerate(backbones)
    ]
    for peer in peers:
        peer.to(memory_format=torch.channels_last)
    shape = (options.step_batch, 3, options.size, options.size)
    views = [torch.randn(shape, device=device).to(memory_format=torch.channels_last) for _ in range(4)]

    def once() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            embeddings = [peer(*views[2 * i : 2 * i + 2]) for i, peer in enumerate(peers)]
        losses = mutual_loss(*(z.float() for pair in embeddings for z in pair))
        losses.loss_a.backward()
        losses.loss_b.backward()

    for _ in range(2):
        once()
    _synchronize(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < options.seconds:
        once()
        _synchronize(device)
        count += 1
    return {"images_per_s": count * options.step_batch / (time.perf_counter() - started)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parser() -> argparse.ArgumentParser:
    """The options that both processes share."""
    options = argparse.ArgumentParser("python -m bench data", description="Loaders on real photos.")
    options.add_argument("--root", required=True, help="a folder of photos, as data.root of data.dataset=folder")
    options.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    options.add_argument("--views", type=int, default=4, help="views of an image")
    options.add_argument("--batch", type=int, default=64, help="source images of a batch")
    options.add_argument("--workers", type=int, default=None, help="processes or threads; all cores by default")
    options.add_argument(
        "--seconds", type=float, default=6.0, help="of a measurement, after a third as many to warm up"
    )
    options.add_argument("--step-batch", type=int, default=None, help="source images of the training step")
    return options


def main(argv: list[str]) -> int:
    """Measures one thing and prints it."""
    arguments = parser()
    arguments.add_argument("what", choices=(*PROVIDERS, STEP))
    arguments.add_argument("stage", help="a stage of a loader, or the step's backbones")
    options = arguments.parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if options.what == STEP:
        found = step(options.stage.split(","), options, device)
    else:
        found = stream(options.what, options.stage, options, device)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
