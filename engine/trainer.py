"""The training loop, order only: next batch -> forward both -> loss -> backward both -> step -> measure."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint, run_dir
from engine.batchnorm import average_buffers
from engine.config import Config
from engine.data.augment import build_policy
from engine.data.catalog import NATIVE_SIZE, open_split
from engine.data.dali_graph import require_dali
from engine.data.dali_loader import DaliLoader
from engine.data.dataset import DataError
from engine.data.order import Batch, BatchOrder
from engine.data.resident_loader import ResidentLoader
from engine.data.skipped import SkippedImages
from engine.data.torch_loader import TorchLoader
from engine.distributed import (
    Ranks,
    barrier,
    everyone_does,
    first_rank_does,
    gather_objects,
    seed_everything,
    workers_of,
)
from engine.engines import build_engines, precision_of
from engine.features import Reader
from engine.metrics import Meters, Recorder, Stopwatch, collapse_indicators, plot_run, progress_bar
from engine.objectives import PeerLoss
from engine.optimizers import paces
from engine.peers import Embedded
from engine.placement import place
from engine.probe import KnnProbe
from engine.profile import OUTSIDE, StepProfiler, part
from engine.schedules import Pace, ramp_share
from engine.step import WARM_UP, CapturedStep, Finite, Step, build_step, captures, viewers
from engine.teacher import Teacher, build_teachers

LOADERS: dict[str, Any] = {"torchvision": TorchLoader, "dali": DaliLoader, "resident": ResidentLoader}


class NonFiniteLoss(RuntimeError):
    """A loss that is not finite; the state that gave it has been saved, with the batch, to repeat the step.

    Weights, optimizer and random states are those before the step; BatchNorm's running statistics, which training does
    not read, have seen its batch.
    """

    on_every_rank = True


class Trainer:
    """A run from its configuration to summary.json; every rank builds one and calls `fit`.

    Raises ConfigError, DataError, CheckpointError before any training.
    """

    def __init__(self, cfg: Config, ranks: Ranks) -> None:
        self.cfg, self.ranks, self.began = cfg, ranks, time.monotonic()
        self.folder: Path = cfg.run.output_dir
        # What needs no data comes first: a slip in the configuration must not cost a download.
        self.captured = captures(cfg, ranks)
        if cfg.data.loader == "dali":
            everyone_does(ranks, require_dali)  # a rank that lacks it must not leave the others waiting
        self.resume_point = first_rank_does(ranks, lambda: run_dir.resume_point(cfg, ranks.world))
        self.size = cfg.data.image_size or NATIVE_SIZE[cfg.data.dataset]
        begun = None if self.resume_point is None else self.resume_point[1].split
        self.placement = everyone_does(ranks, lambda: place(cfg, ranks, self.size, begun))
        seed_everything(cfg.run.seed)
        self.engines = everyone_does(ranks, lambda: build_engines(cfg, self.placement, self.size))
        self.policy = build_policy(cfg.data.augment, self.size)
        self.teachers = everyone_does(ranks, lambda: build_teachers(cfg, ranks, self.policy))
        everyone_does(ranks, self._open_data)
        everyone_does(ranks, self._check_same_data)
        first = self.resume_point[1].step if self.resume_point else 0
        self.profiler = StepProfiler(
            cfg, ranks, first=first, steps=self.steps, captured=first + WARM_UP if self.captured else None
        )
        self.step = self._build_step()
        self.meters = Meters()
        self.taught: dict[str, float | None] = {}  # kNN of the frozen peers

    def _open_data(self) -> None:
        cfg, ranks, own = self.cfg, self.ranks, self.placement.own
        workers = workers_of(cfg.data.workers)
        dataset = open_split(cfg.data, "train")
        assert dataset is not None
        self.skipped = SkippedImages(ranks)
        self.order = BatchOrder(
            dataset, batch_size=cfg.data.batch_size, seed=cfg.run.seed, ranks=own, last_batch=cfg.data.last_batch
        )
        per_peer = cfg.data.views == "per_peer"
        looking = len(viewers(self.placement.peers, self.teachers))
        self.loader = LOADERS[cfg.data.loader](
            dataset, self.policy, self.order, views=2 * looking if per_peer else 2, workers=workers, ranks=own,
            skipped=self.skipped, **self._loader_options(),
            first_view=2 * self.placement.peers[0] if per_peer and self.placement.sizes is not None else 0,
        )  # fmt: skip
        reader = Reader(self.policy.size, self.policy.statistics, workers, own, self.skipped)
        self.dataset, self.reader = dataset, reader
        self.knn = None
        if cfg.eval.knn is not None:
            self.knn = KnnProbe(cfg.data, cfg.eval.knn, reader)
        held = self.knn.queries.rejected if self.knn is not None and self.knn.queries is not None else ()
        self.rejected = len({*dataset.rejected, *held})
        self.steps = cfg.run.steps or (cfg.run.epochs or 0) * self.order.steps_per_epoch
        self.data = dataset.fingerprint()
        if self.resume_point is not None:
            checkpoint.check_fits(
                *self.resume_point, steps=self.steps, data=self.data, loader=self.loader.fingerprint(),
                split=self.placement.sizes, teachers=self._fingerprints(),
            )  # fmt: skip

    def _fingerprints(self) -> dict[str, str]:
        return {teacher.name: teacher.fingerprint for teacher in self.teachers}

    def _loader_options(self) -> dict[str, Any]:
        if self.cfg.data.loader != "resident":
            return {}
        bf16 = precision_of(self.cfg, self.ranks.device) == "bf16"
        # What autocast would make of the views first.
        return {"dtype": torch.bfloat16 if bf16 else torch.float32, "limit_gib": self.cfg.data.resident_gib}

    def _check_same_data(self) -> None:
        """Raises DataError on every rank: one has other images, or other views of them, than the first."""
        found = gather_objects(self.ranks, (self.data, self.loader.fingerprint()))
        for rank, own in enumerate(found):
            if own != found[0]:
                raise DataError(
                    f"data.root: rank {rank} has other data than rank 0: {' by '.join(own)}, and rank 0 has "
                    f"{' by '.join(found[0])}; give all ranks the same files and the same software"
                )

    def _build_step(self) -> Step | CapturedStep:
        # Only views that lie in the same memory in every step can be made inside of the graph.
        inside = self.captured and isinstance(self.loader, ResidentLoader)
        make_views = self.loader.leave_launch() if inside else None
        return build_step(
            self.cfg, self.engines, self.placement, self.teachers, captured=self.captured, make_views=make_views
        )

    # -- the run ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any] | None:
        """Trains to the last step and returns the summary, which rank 0 also writes; None where run.max_seconds passed
        before that, with the state saved.

        Raises NonFiniteLoss on all ranks.
        """
        start = self.begin()
        try:
            if start == 0 and self.knn is not None:
                self._evaluate(0)
            with progress_bar("training", enabled=self.ranks.is_first) as bar:
                task = bar.add_task("", total=self.steps, completed=start, rate="", note="")
                self.start_clock(start)
                batches = self.loader.batches(start, self.steps)
                for batch in self.profiler.over(batches, first=start, clock=self.training):
                    note = self.train(batch)
                    bar.update(task, completed=batch.step + 1, **note)
                    if self._out_of_time(batch.step + 1):
                        self._save(batch.step + 1)
                        return None
        finally:
            self.recorder.close()
        return first_rank_does(self.ranks, self._summarise)

    def _out_of_time(self, done: int) -> bool:
        """Whether run.max_seconds have passed by the first rank's clock; asked where a step waits for the host."""
        limit = self.cfg.run.max_seconds
        if limit is None or done == self.steps or done % self.cfg.run.log_every_steps:
            return False
        return first_rank_does(self.ranks, lambda: time.monotonic() - self.began > limit)

    def begin(self) -> int:
        """Claims the folder, restores state and clocks and opens the records; returns the number of finished steps."""
        start = self._resume()
        for teacher in self.teachers:
            if teacher.plain and start < self.steps:
                teacher.remember(self.dataset, self.reader, self.order.rows)
        self.recorder = Recorder(self.folder, enabled=self.ranks.is_first, from_step=start)
        return start

    def start_clock(self, step: int) -> None:
        """From here on time counts as training."""
        self.logged = (step, self.training.read())
        if step < self.steps:
            self.training.start()

    def _resume(self) -> int:
        self.wall, self.training = Stopwatch(), Stopwatch()
        self.wall.start()
        first_rank_does(self.ranks, lambda: run_dir.claim(self.cfg))
        if self.resume_point is None:
            return 0
        folder, progress = self.resume_point
        checkpoint.load(folder, self.engines, self.ranks)
        self.wall.seconds, self.training.seconds = progress.seconds, progress.train_seconds
        return progress.step

    def train(self, batch: Batch) -> dict[str, Any]:
        """One step and what is due after it; returns what the progress bar shows anew."""
        self.rng = checkpoint.device_rng()
        for teacher in self.teachers:
            teacher.take(batch.indices)
        self.step.set_share(self._share(batch.step))
        forward = self.step.forward(batch.views)
        finite = Finite(forward.finite)
        self.step.backward(forward)
        if not finite.wait():
            self._stop_non_finite(batch, forward.losses)
        self.step.optimize(self._paces(batch.step))
        self.meters.add(self._scalars(forward.losses))
        return self._after(batch.step + 1, forward.embedded)

    def _paces(self, step: int) -> dict[int, Pace]:
        return paces(self.cfg, step, steps=self.steps, steps_per_epoch=self.order.steps_per_epoch)

    def _share(self, step: int) -> float:
        """Of the weights of distillation."""
        ramp = None if self.cfg.distill is None else self.cfg.distill.ramp
        return ramp_share(ramp, step, steps_per_epoch=self.order.steps_per_epoch)

    # -- what is due after some steps ------------------------------------------------------------------------------

    def _after(self, done: int, embedded: list[Embedded]) -> dict[str, Any]:
        last = done == self.steps

        def due(every: int | None) -> bool:
            return last or (every is not None and done % every == 0)

        note = self._log(done, embedded) if due(self.cfg.run.log_every_steps) else {}
        knn = self.cfg.eval.knn
        evaluate, save = knn is not None and due(knn.every_steps), due(self.cfg.run.save_every_steps)
        if evaluate or save:
            self.training.stop()
            with part(OUTSIDE):
                # In this order: a run cut between the two repeats the evaluation instead of missing it.
                if evaluate:
                    self._evaluate(done)
                if save:
                    self._save(done)
            if not last:
                self.training.start()
        return note

    def _scalars(self, losses: dict[int, PeerLoss]) -> dict[str, Tensor]:
        values = {}
        for i, loss in losses.items():
            peer = self.cfg.peers[i]
            values[f"loss/{peer.name}"] = loss.loss.detach()
            values.update({f"{term}/{peer.name}": value for term, value in loss.terms.items()})
        return values

    def _log(self, done: int, embedded: list[Embedded]) -> dict[str, Any]:
        row: dict[str, float] = {"epoch": done / self.order.steps_per_epoch, **self.meters.read()}
        pace = self._paces(done - 1)
        for i, peer in self.cfg.trained:
            row.update({f"{key}/{peer.name}": float(v) for key, v in collapse_indicators(embedded[i].z[0]).items()})
            row[f"lr/{peer.name}"], momentum = pace[i]
            if momentum is not None:
                row[f"momentum/{peer.name}"] = momentum
        if self.cfg.distill is not None and self.cfg.distill.ramp is not None:
            row["distill_share"] = self._share(done - 1)
        row["images_per_s"] = self._rate(done)
        self.skipped.share()
        row["skipped_images"] = self.rejected + len(self.skipped)
        self.recorder.write(done, row)
        losses = "  ".join(f"loss {peer.name} {row[f'loss/{peer.name}']:.3f}" for _, peer in self.cfg.trained)
        return {"rate": f"{row['images_per_s']:,.0f} images/s", "note": losses}

    def _rate(self, done: int) -> float:
        """Source images per second of training since the last call."""
        (before, then), now = self.logged, self.training.read()
        self.logged = (done, now)
        return self.cfg.data.batch_size * (done - before) / max(now - then, 1e-9)

    def _evaluate(self, done: int) -> None:
        assert self.knn is not None
        own = {}
        for engine in self.engines:
            average_buffers(engine.module, engine.ranks.group)
            own[f"knn/{engine.name}"] = self.knn.accuracy(engine.features)
        for teacher in self.teachers:
            own[f"knn/{teacher.name}"] = self._knn_of(teacher)
        # Each rank has those of its peers; the configuration's order.
        found = {key: value for part in gather_objects(self.ranks, own) for key, value in part.items()}
        row = {key: found[key] for key in (f"knn/{peer.name}" for peer in self.cfg.peers)}
        self.skipped.share()
        if None not in row.values():
            self.recorder.write(done, row)

    def _knn_of(self, teacher: Teacher) -> float | None:
        """Once: its features do not change."""
        if teacher.name not in self.taught:
            assert self.knn is not None
            self.taught[teacher.name] = self.knn.accuracy(teacher.features, teacher.reader(self.knn.reader))
        return self.taught[teacher.name]

    def _save(self, done: int, folder: str = "checkpoints") -> Path:
        progress = checkpoint.Progress(
            step=done, data=self.data, loader=self.loader.fingerprint(),
            seconds=self.wall.read(), train_seconds=self.training.read(), split=self.placement.sizes,
            teachers=self._fingerprints(),
        )  # fmt: skip
        path = checkpoint.save(self.folder / folder, progress, self.engines, self.cfg, self.ranks)
        if self.ranks.is_first:
            checkpoint.prune(path.parent, self.cfg.run.keep_checkpoints)
        return path

    def _stop_non_finite(self, batch: Batch, losses: dict[int, PeerLoss]) -> None:
        checkpoint.set_device_rng(self.rng)
        folder = self._save(batch.step, "non_finite")
        replay = {"views": [view.cpu() for view in batch.views], "indices": batch.indices}
        torch.save(replay, folder / f"batch.rank{self.ranks.rank}.pt")
        barrier(self.ranks)
        values = ", ".join(f"{self.cfg.peers[i].name}: {loss.loss.item():g}" for i, loss in losses.items())
        raise NonFiniteLoss(
            f"the loss of step {batch.step + 1} is not finite ({values}); the weights that gave it and their batch are "
            f"in {folder}, where run.resume={folder} repeats it; a lower learning rate may help"
        )

    def _summarise(self) -> dict[str, Any]:
        plot_run(self.folder)
        return run_dir.write_summary(
            self.folder, self.cfg, steps=self.steps, seconds=self.wall.read(), train_seconds=self.training.read()
        )
