"""The DALI loader: images decoded and augmented by NVIDIA DALI, on the GPU where there is one.

Legend
  n  images of this rank      V  views of an image      S  side in pixels

Images, their order and the parameters of their views are those of the torchvision loader: a batch is a function of seed
and step, so that resuming is starting at another step and no state of DALI's is needed.  Threads read files and draw
parameters ahead; DALI decodes and, on a GPU, makes the views (dali_graph.py).  On a CPU the native core makes them
(kernels.augment_views), as DALI's own operators there are no faster than Pillow; where no core is built, DALI does.

DALI is given nothing that Pillow has not decoded in full (encoded.py), as a batch with a broken header in it may crash
the process.  An image that it refuses all the same invalidates its pipeline.  Then the images of the batches under way
are looked at, the culprit is converted, and a new pipeline goes on at the same step.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data import dali_graph
from engine.data.augment import AugmentPolicy, ViewParams, draw_views
from engine.data.dataset import DataError, UnreadableImage
from engine.data.encoded import EncodedDataset
from engine.data.order import Batch, BatchOrder
from engine.data.skipped import SkippedImages, readable
from engine.distributed import Ranks
from kernels import augment_views, native

log = logging.getLogger(__name__)

AHEAD = 3  # batches read ahead of DALI, which itself holds two


class _Fed(NamedTuple):
    """What DALI gets of one step."""

    step: int
    wanted: NDArray[np.int64]  # [n]
    read: NDArray[np.int64]  # [n] differs where an image could not be read
    params: ViewParams  # of V * n views, those of a view together
    inputs: list[Any]  # of the graph


class DaliLoader:
    """Draws V views of every image, from `first_view` on, in the order of a BatchOrder, through DALI."""

    def __init__(
        self,
        dataset: EncodedDataset,
        policy: AugmentPolicy,
        order: BatchOrder,
        *,
        views: int,  # V
        workers: int,
        ranks: Ranks,
        skipped: SkippedImages,
        first_view: int = 0,
        graph_alone: bool = False,  # DALI makes the views on a CPU too
    ) -> None:
        self.dataset, self.policy, self.order = dataset, policy, order
        self.views, self.first_view = views, first_view
        self.workers, self.ranks, self.skipped = max(1, workers), ranks, skipped
        self.gpu = ranks.device.type == "cuda"
        self.native = not self.gpu and native.core is not None and not graph_alone
        self._memory = _Memory((views * order.rows, policy.size, policy.size, 3))
        self._unreadable: set[int] = set()  # went bad behind a file system's back
        self._converted: set[int] = set()  # Pillow decodes them, DALI does not

    def fingerprint(self) -> str:
        """What makes the views, beside the configuration."""
        views = "DALI's on a GPU" if self.gpu else "the native core's" if self.native else "DALI's on a CPU"
        return f"dali {dali_version()}, views {views}"

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start ... stop - 1."""
        step = start
        while step < stop:
            feed = _Feed(self, step, stop)
            try:
                for batch in self._stream(feed, stop - step):
                    yield batch
                    step = batch.step + 1
                continue
            except _PipelineFailed as failure:
                reason = failure.reason
            finally:
                feed.close()
            # Behind the handler: there its traceback still holds the old pipeline's memory.
            self._leave_out(feed.under_way, reason.with_traceback(None))

    def _stream(self, feed: _Feed, count: int) -> Iterator[Batch]:
        """What one pipeline gives.  Raises _PipelineFailed."""
        pipeline = self._pipeline(feed)
        # With its stream, the host does not wait for the batch.
        arguments = (torch.cuda.current_stream(self.ranks.device),) if self.gpu else ()
        for _ in range(count):
            try:
                outputs = pipeline.run(*arguments)
            except (DataError, OSError):  # of our own source
                raise
            except Exception as error:  # DALI has many kinds for a file that it cannot decode
                raise _PipelineFailed(error) from None
            fed = feed.under_way.popleft()
            self.skipped.note(self.dataset, torch.from_numpy(fed.wanted), torch.from_numpy(fed.read))
            yield Batch(fed.step, self._views(outputs, fed), torch.from_numpy(fed.read))

    def make(self, step: int, readers: ThreadPoolExecutor) -> _Fed:
        """Reads the files of one step and draws their views."""
        wanted = self.order.indices(step)
        parts = readers.map(lambda part: [self._read(int(i)) for i in part], np.array_split(wanted, self.workers))
        encoded, read = zip(*(found for part in parts for found in part), strict=True)
        indices = np.array(read, np.int64)
        params = draw_views(
            self.policy, seed=self.order.seed, epoch=self.order.epoch(step), indices=wanted,
            sizes=self.dataset.facts.sizes[indices], views=self.views, first=self.first_view,
        )  # fmt: skip
        return _Fed(step, wanted, indices, params, [list(encoded), *self._graph_inputs(params)])

    def _graph_inputs(self, params: ViewParams) -> list[Any]:
        """The parameters of all views as the graph takes them: none where the native core makes the views."""
        if self.native:
            return []
        n, graph = self.order.rows, dali_graph.graph_params(params)
        used = dali_graph.used_fields(self.policy)
        return [getattr(graph, name)[v * n : (v + 1) * n] for v in range(self.views) for name in used]

    def _read(self, index: int) -> tuple[NDArray[np.uint8], int]:
        data, read = readable(self.dataset, index, self._picture)
        return np.frombuffer(data, np.uint8), read

    def _picture(self, index: int) -> bytes:
        if index in self._unreadable:
            raise UnreadableImage(self.dataset.describe(index), "went bad after the scan")
        return self.dataset.picture(index, convert=index in self._converted)

    def _pipeline(self, source: Any) -> Any:
        views = 0 if self.native else self.views
        return self._built(source, views=views, batch_size=self.order.rows, threads=self.workers)

    def _built(self, source: Any, **options: Any) -> Any:
        device_id = self.ranks.device.index if self.gpu else None
        return dali_graph.build_pipeline(
            self.policy, source, device_id=device_id, sizes=self.dataset.facts.sizes, **options
        )

    def _views(self, outputs: Any, fed: _Fed) -> list[Tensor]:
        """V views [n, 3, S, S] with channels_last strides, of DALI's own memory where DALI made them."""
        if not self.native:
            # On a GPU they belong to the stream that is current now, as any tensor that is made here.
            return [torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]
        n = len(fed.wanted)
        images = [np.asarray(outputs[0].at(i)) for i in range(n)]
        mean, std = self.policy.statistics
        views = augment_views(
            images, source=np.tile(np.arange(n), self.views), size=self.policy.size, mean=mean, std=std,
            out=self._memory.take(), **fed.params._asdict(),
        )  # fmt: skip
        return list(views.split(n))

    def _leave_out(self, under_way: deque[_Fed], reason: Exception) -> None:
        """Finds what DALI failed at; raises the reason where no image is to blame."""
        suspects = {int(index) for fed in under_way for index in fed.read} - self._converted
        bad = {index for index in suspects if not self._pillow_reads(index)}
        self._unreadable |= bad
        if bad:
            return
        refused = self._refused_by_dali(sorted(suspects))
        # All of them: then it is the machine that fails, whose memory is full, say.
        if not refused or len(refused) == len(suspects):
            raise reason
        self._converted |= refused
        for index in refused:
            log.warning("%s: DALI cannot decode it; Pillow does from now on", self.dataset.describe(index))

    def _pillow_reads(self, index: int) -> bool:
        try:
            self.dataset.image(index)
        except UnreadableImage:
            return False
        return True

    def _refused_by_dali(self, indices: list[int]) -> set[int]:
        """Those of the images that DALI fails at, each decoded alone; a pipeline serves until it fails."""
        refused: set[int] = set()
        queue: deque[NDArray[np.uint8]] = deque()
        alone = None
        for index in indices:
            queue.append(np.frombuffer(self._read(index)[0], np.uint8))
            try:
                if alone is None:
                    alone = self._built(lambda i: [[queue.popleft()]], views=0, batch_size=1, threads=1, ahead=1)
                alone.run()
            except Exception:  # whatever its kind: the image is converted
                refused.add(index)
                alone = None
                queue.clear()
        return refused


def dali_version() -> str:
    """The installed DALI's version."""
    from nvidia.dali import __version__

    return str(__version__)


class _Memory:
    """Arrays of one shape, each used again once no tensor of its memory is left: new pages cost as much as views."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape  # [V * n, S, S, 3]
        self._arrays: list[NDArray[np.float32]] = []
        fresh = [np.empty(0, np.float32)]
        self._unused = sys.getrefcount(fresh[0])  # as this interpreter counts an array that a list alone holds

    def take(self) -> Tensor:
        """[V * n, 3, S, S] with channels_last strides and any content."""
        # A tensor's memory holds a reference to its array for as long as any tensor shares it.
        free = (i for i in range(len(self._arrays)) if sys.getrefcount(self._arrays[i]) <= self._unused)
        if (i := next(free, None)) is None:
            i = len(self._arrays)
            self._arrays.append(np.empty(self._shape, np.float32))
        return torch.from_numpy(self._arrays[i]).permute(0, 3, 1, 2)


class _PipelineFailed(Exception):
    """DALI failed in a batch; `reason` is its own error."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Feed:
    """The external source of one pipeline: batches from `start` on, made ahead by threads."""

    def __init__(self, loader: DaliLoader, start: int, stop: int) -> None:
        self.under_way: deque[_Fed] = deque()  # given to DALI, not yet come out
        self._loader = loader
        self._steps = iter(range(start, stop))
        self._maker = ThreadPoolExecutor(1)
        self._readers = ThreadPoolExecutor(loader.workers)
        self._made: deque[Future[_Fed]] = deque()
        for _ in range(AHEAD):
            self._ahead()

    def __call__(self, iteration: int) -> list[Any]:
        if not self._made:
            raise StopIteration
        fed = self._made.popleft().result()
        self._ahead()
        self.under_way.append(fed)
        return fed.inputs

    def _ahead(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._made.append(self._maker.submit(self._loader.make, step, self._readers))

    def close(self) -> None:
        """Stops the threads; what they have begun is finished and forgotten."""
        for executor in (self._maker, self._readers):
            executor.shutdown(wait=False, cancel_futures=True)
