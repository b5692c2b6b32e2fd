"""One training step in three parts: views -> losses, gradients, optimizers; launched one by one, or as CUDA graphs.

A captured step replays what the same functions launched when it was captured, so it computes what an uncaptured one
does; what it saves is the host's time for some thousand launches.  Streams of their own, which become branches of the
graphs, let one peer's kernels run where the other's leave the device half empty.

Three graphs instead of one, so that the host can look at the losses while the gradients are computed, and launch no
optimizer on one that is not finite.  DeepSpeed's part of a step at ZeRO 0 on one GPU is plain Python around the same
kernels and is captured with them; its own step counters then stand still, which nothing here reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from engine.config import Config, ConfigError
from engine.distributed import Ranks
from engine.engines import PeerEngine
from engine.objectives import PeerLoss, peer_losses, start_gather
from engine.optimizers import set_learning_rate
from engine.peers import Embedded
from engine.placement import Exchange, Placement
from engine.profile import part
from engine.schedules import Pace
from engine.teacher import Teacher
from kernels import GatheredViews

WARM_UP = 3  # steps before the capture: libraries load, and optimizers make their state

T = TypeVar("T")


class Losses(NamedTuple):
    """What the forward part of a step gives."""

    embedded: list[Embedded]  # of each peer
    losses: dict[int, PeerLoss]  # of each that trains, by its place in the configuration
    finite: Tensor  # 0-D bool, on the device


def viewers(peers: Iterable[int], teachers: Sequence[Teacher]) -> list[int]:
    """The peers that see views of a batch, by their places, in order: those that train here, and teachers that are not
    plain.
    """
    return sorted([*peers, *(teacher.index for teacher in teachers if not teacher.plain)])


class Step:
    """The parts of a step, launched one by one, one peer's behind the other's."""

    def __init__(
        self, cfg: Config, engines: Sequence[PeerEngine], placement: Placement, teachers: Sequence[Teacher] = ()
    ) -> None:
        self.cfg, self.engines, self.teachers, self.group = cfg, engines, teachers, placement.own.group
        self._exchange = None if placement.sizes is None else Exchange(placement, cfg)
        looking = viewers([engine.index for engine in engines], teachers)
        per_peer = cfg.data.views == "per_peer"
        self._first_view = {index: 2 * place if per_peer else 0 for place, index in enumerate(looking)}
        # In memory, where a graph reads it, as learning rates are.
        ramped = cfg.distill is not None and cfg.distill.ramp is not None
        self._share = torch.ones((), device=placement.own.device) if ramped else None

    def set_share(self, share: float) -> None:
        """The share of their weights that distillation terms have in the next `forward` (distill.ramp)."""
        if self._share is not None:
            self._share.fill_(share)

    def forward(self, views: list[Tensor]) -> Losses:
        """The losses of the batch; `views`: [n, 3, S, S] each, two for each of `viewers`, or two for all."""
        with part("forward"):
            made: list[tuple[int, Embedded, GatheredViews | None]] = [
                (teacher.index, teacher.embed(self._views_of(teacher.index, views)), None) for teacher in self.teachers
            ]
            made += self.each(lambda engine: self._embed(engine, views))
        if self._exchange is not None:
            ((own, embedded, _),) = made
            with part("communication"):
                made.append((1 - own, Embedded(self._exchange(*embedded.z)), None))
        made.sort(key=lambda peer: peer[0])
        every, gathered = [embedded for _, embedded, _ in made], [under_way for _, _, under_way in made]
        with part("loss"):
            share = 1.0 if self._share is None else self._share
            losses = peer_losses(self.cfg, every, self.group, gathered, share)
            finite = torch.stack([loss.loss.detach().isfinite() for loss in losses]).all()
        return Losses(every, {i: loss for (i, _), loss in zip(self.cfg.trained, losses, strict=True)}, finite)

    def backward(self, losses: Losses) -> None:
        """The gradients of each peer that this rank trains."""
        with part("backward"):
            self.each(lambda engine: engine.backward(losses.losses[engine.index].loss))

    def optimize(self, paces: Mapping[int, Pace]) -> None:
        """One optimizer step of each of them; `paces`: of all peers that train, by their place."""
        with part("optimizer"):
            self.set_paces(paces)
            self.update()

    def set_paces(self, paces: Mapping[int, Pace]) -> None:
        """Sets learning rates and momenta, those of all peers given."""
        for engine in self.engines:
            set_learning_rate(engine.optimizer, paces[engine.index].rate)
            engine.set_momentum(paces[engine.index].momentum)

    def update(self) -> None:
        """One optimizer step at the paces that are set."""
        self.each(lambda engine: engine.step())

    def each(self, work: Callable[[PeerEngine], T]) -> list[T]:
        """Does something for each peer that this rank trains."""
        return [work(engine) for engine in self.engines]

    def _views_of(self, index: int, views: list[Tensor]) -> list[Tensor]:
        """The two that a peer sees; none where it sees none."""
        first = self._first_view.get(index)
        return [] if first is None else views[first : first + 2]

    def _embed(self, engine: PeerEngine, views: list[Tensor]) -> tuple[int, Embedded, GatheredViews | None]:
        """A peer's place and embeddings, on their way to the other ranks while the next peer's are made."""
        embedded = engine.embed(*self._views_of(engine.index, views))
        return engine.index, embedded, start_gather(self.cfg, embedded, self.group)


class StreamedStep(Step):
    """The same with each peer on a CUDA stream of its own, a branch that leaves the current one and comes back to it.

    Memory is safe without further marks: a branch begins behind all that was launched before on the trunk and on the
    other branches, and ends before the trunk goes on, so what either frees is used again only behind its last use.
    Gradients that cross from one stream to another are autograd's, which marks them.  With several GPUs both peers'
    exchanges, SyncBatchNorm's among them, queue in one communicator in the order of their launch.
    """

    def __init__(
        self, cfg: Config, engines: Sequence[PeerEngine], placement: Placement, teachers: Sequence[Teacher] = ()
    ) -> None:
        super().__init__(cfg, engines, placement, teachers)
        self._branches = [torch.cuda.Stream() for _ in engines]

    def each(self, work: Callable[[PeerEngine], T]) -> list[T]:
        """Each peer on its branch; what it makes, the others may use behind this."""
        trunk, results = torch.cuda.current_stream(), []
        for engine, branch in zip(self.engines, self._branches, strict=True):
            branch.wait_stream(trunk)
            with torch.cuda.stream(branch):
                results.append(work(engine))
        for branch in self._branches:
            trunk.wait_stream(branch)
        return results


class CapturedStep:
    """The parts of a step as CUDA graphs from step WARM_UP on.

    `make_views` launches what fills the tensors that `forward` is given, which are the same in every step; without it
    their content is copied into the graphs' own.
    """

    def __init__(self, step: Step, *, make_views: Callable[[], None] | None = None) -> None:
        self._step, self._make_views = step, make_views
        self._stream = torch.cuda.Stream()
        self._done = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def set_share(self, share: float) -> None:
        """As of `Step`."""
        self._step.set_share(share)

    def forward(self, views: list[Tensor]) -> Losses:
        """The losses of the batch, as `Step.forward` has them."""
        if self._done == WARM_UP:
            self._capture(views)
        self._done += 1
        if not self._graphs:
            with self._aside():
                return self._from_views(views)
        with part("forward"):
            if self._make_views is None:
                torch._foreach_copy_(self._inputs, views)
            self._graphs[0].replay()
        return self._captured

    def backward(self, losses: Losses) -> None:
        """The gradients of each peer."""
        if self._graphs:
            with part("backward"):
                self._graphs[1].replay()
            return
        with self._aside():
            self._step.backward(losses)

    def optimize(self, paces: Mapping[int, Pace]) -> None:
        """One optimizer step of each peer, at its pace."""
        if self._graphs:
            with part("optimizer"):
                self._step.set_paces(paces)
                self._graphs[2].replay()
            return
        with self._aside():
            self._step.optimize(paces)

    def _from_views(self, views: list[Tensor]) -> Losses:
        if self._make_views is not None:
            self._make_views()
        return self._step.forward(views)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of the capture, behind and before what is launched elsewhere."""
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def _capture(self, views: list[Tensor]) -> None:
        """Captures the three parts, in the order in which they are replayed; nothing of it runs.

        Raises ConfigError: something in the networks waits for the device.
        """
        try:
            self._capture_parts(views)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"engine.capture: the step could not be captured ({reason}); use engine.capture=false"
            ) from error

    def _capture_parts(self, views: list[Tensor]) -> None:
        inputs = views if self._make_views is not None else [torch.empty_like(view) for view in views]
        for engine in self._step.engines:
            for group in engine.optimizer.param_groups:
                # In memory, where the graph reads it: a number would be captured as it is now.
                group["lr"] = torch.tensor(float(group["lr"]), device=views[0].device)
        pool = torch.cuda.graph_pool_handle()

        def graph_of(part: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
            graph = torch.cuda.CUDAGraph()
            # thread_local: the loader's thread may wait for events of its own meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                made = part()
            return graph, made

        forward, losses = graph_of(lambda: self._from_views(inputs))
        backward, _ = graph_of(lambda: self._step.backward(losses))
        update, _ = graph_of(self._step.update)
        self._inputs, self._captured, self._graphs = inputs, losses, [forward, backward, update]


def build_step(
    cfg: Config,
    engines: Sequence[PeerEngine],
    placement: Placement,
    teachers: Sequence[Teacher] = (),
    *,
    captured: bool,
    make_views: Callable[[], None] | None = None,
) -> Step | CapturedStep:
    """The step that the configuration asks for; `make_views`: see CapturedStep."""
    wanted = cfg.engine.concurrency
    streams = wanted == "streams" or (wanted == "auto" and captured)
    step = (StreamedStep if streams else Step)(cfg, engines, placement, teachers)
    return CapturedStep(step, make_views=make_views) if captured else step


def captures(cfg: Config, ranks: Ranks) -> bool:
    """Whether the step is captured in this run.

    Raises ConfigError where `engine.capture` is true and it cannot be on this machine, and where
    `engine.concurrency` is streams without a GPU.
    """
    if cfg.engine.concurrency == "streams" and ranks.device.type != "cuda":
        raise ConfigError(f"engine.concurrency: streams takes a GPU, found device {ranks.device.type}; use serial")
    if cfg.engine.capture is False:
        return False
    reason = _obstacle(cfg, ranks)
    if cfg.engine.capture is True and reason:
        raise ConfigError(f"engine.capture: {reason}; use engine.capture=false")
    return not reason and (cfg.engine.capture is True or cfg.data.loader == "resident")


def describe_capture(cfg: Config, ranks: Ranks) -> list[str]:
    """A line on whether the step is captured and why not; none on a CPU, or where it is switched off."""
    if ranks.device.type != "cuda" or cfg.engine.capture is False:
        return []
    if captures(cfg, ranks):
        return ["the training step is captured as CUDA graphs (engine.capture)"]
    reason = _obstacle(cfg, ranks) or f"by itself with data.loader=resident alone, found {cfg.data.loader}"
    return [f"the training step is not captured (engine.capture: {reason})"]


def _obstacle(cfg: Config, ranks: Ranks) -> str:
    """Why no graph can hold a step of this run; empty where one can."""
    if ranks.device.type != "cuda":
        return f"a CUDA graph needs a GPU, found device {ranks.device.type}"
    if ranks.world > 1:
        return f"takes one GPU, found {ranks.world} ranks"
    return cfg.not_capturable()


class Finite:
    """Whether losses are finite, read back while the GPU is busy.

    The flag starts its way to the host before the backward passes are launched, and is waited for after: by then it has
    long arrived, so the device never idles, and the optimizer is not launched on a loss that is not finite.
    """

    def __init__(self, flag: Tensor) -> None:
        self._arrived: Any = None
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._flag = flag

    def wait(self) -> bool:
        """The answer."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
