"""What frozen features are worth: every protocol of an evaluation, for one encoder.

Legend
  n  labelled training images    m  test images    F  feature width    C  classes    G  sets of labels

Features are made once a data set.  What is random (held-out images, labels, batches) is drawn from the seed alone, so
that all encoders get the same draws; a score is the mean over draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from engine.data.dataset import DataError, ImageDataset
from engine.data.torch_loader import normalized, pixel_statistics, plain_pixels
from engine.encoders import Encoder
from engine.evaluation_config import EvaluationConfig
from engine.evaluation_data import (
    LEFT_OUT,
    human_labels,
    labels_of,
    noisy_labels,
    numbers,
    opened,
    percent,
    translation,
)
from engine.features import FEATURE_BATCH, Labelled, Reader, evenly_spaced
from engine.label_sets import class_balanced
from engine.linear_probe import OFFICIAL_HELD_OUT, LinearProbe, held_out_split, linear_probe, official_probe
from engine.probe import knn_accuracy


@dataclass(frozen=True)
class Score:
    """One accuracy, of as many draws as there were."""

    peer: str
    backbone: str
    protocol: str
    setting: str
    """What within the protocol: a share, a kind of noise, a data set; empty where there is one score."""
    values: tuple[float, ...]
    """A draw each."""
    train: int
    """Labelled images that the classifier learned from, held-out ones included."""
    test: int

    @property
    def mean(self) -> float:
        """Over the draws."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Standard deviation over the draws; None where there is one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


class Evaluation:
    """All protocols over one encoder, its features made when they are first asked for."""

    def __init__(self, encoder: Encoder, cfg: EvaluationConfig, reader: Reader) -> None:
        self.encoder, self.cfg, self.reader = encoder, cfg, reader

    def scores(self) -> Iterator[Score]:
        """Every score that the settings ask for, as it is found.

        Raises DataError; `evaluation_data.check` does before any work where it can.
        """
        protocols: dict[str, Callable[[], Iterator[Score]]] = {
            "knn": self._knn, "linear": self._linear, "official": self._official, "few": self._few,
            "noisy": self._noisy, "ood": self._ood, "transfer": self._transfer, "corruptions": self._corruptions,
        }  # fmt: skip
        for name in self.cfg.protocols:
            yield from protocols[name]()

    # -- what they share ---------------------------------------------------------------------------------------------

    @cached_property
    def train(self) -> Labelled:
        """Features of the labelled training images."""
        return self._features(opened(self.cfg.data, "bank"))

    @cached_property
    def test(self) -> Labelled:
        """Features of the test images."""
        return self._features(self._test_images)

    @cached_property
    def _test_images(self) -> ImageDataset:
        return opened(self.cfg.data, "test")

    @cached_property
    def classes(self) -> int:
        """C, of training and test images together."""
        return int(torch.cat((self.train.labels, self.test.labels)).max()) + 1

    @cached_property
    def probes(self) -> list[LinearProbe]:
        """The linear probe of the training images, a draw each."""
        return [self._probe(self.train, self.train.labels[None], draw, self.classes) for draw in range(self.cfg.draws)]

    def _features(self, dataset: ImageDataset) -> Labelled:
        found = self.reader.labelled(dataset, self.encoder.features)
        self.reader.skipped.share()  # what could not be read is told
        return found._replace(features=self._finite(found.features))

    def _finite(self, features: Tensor) -> Tensor:
        """Raises DataError: with one value that is not finite, every probe would be at chance and say nothing."""
        if bad := int((~features.isfinite().all(dim=1)).sum()):
            name = f"{self.encoder.name} ({self.encoder.backbone})"
            raise DataError(f"{name}: features of {bad} of {len(features)} images are not finite; weights are broken")
        return features

    def _rng(self, draw: int, purpose: str) -> np.random.Generator:
        return numbers(self.cfg.seed, draw, purpose)

    def _probe(self, train: Labelled, labels: Tensor, draw: int, classes: int) -> LinearProbe:
        """Linear probes of sets of labels [G, n]; which images are held out depends on the true ones."""
        split = held_out_split(train.labels.cpu().numpy(), self.cfg.linear.held_out, self._rng(draw, "held out"))
        seed = int(self._rng(draw, "batches").integers(2**31))
        return linear_probe(train.features, labels, split, self.cfg.linear, classes=classes, seed=seed)

    def _score(self, protocol: str, values: list[float], *, setting: str = "", train: int = 0, test: int = 0) -> Score:
        return Score(
            self.encoder.name, self.encoder.backbone, protocol, setting, tuple(values),
            train or len(self.train.labels), test or len(self.test.labels),
        )  # fmt: skip

    # -- the protocols -----------------------------------------------------------------------------------------------

    def _knn(self) -> Iterator[Score]:
        cfg, train = self.cfg.knn, self.train
        bank, labels = train.features, train.labels
        if cfg.bank is not None and cfg.bank < len(labels):
            picked = torch.from_numpy(evenly_spaced(len(labels), cfg.bank)).to(labels.device)
            bank, labels = bank[picked], labels[picked]
        accuracy = knn_accuracy(bank, labels, self.test.features, self.test.labels, k=cfg.k, tau=cfg.tau)
        yield self._score("knn", [accuracy], setting=f"k={cfg.k}", train=len(labels))

    def _linear(self) -> Iterator[Score]:
        values = [probe.accuracy(self.test.features, self.test.labels)[0] for probe in self.probes]
        yield self._score("linear", values)

    def _official(self) -> Iterator[Score]:
        labels, rngs = self.train.labels, [self._rng(draw, "official") for draw in range(self.cfg.draws)]
        splits = [_random_split(len(labels), rng) for rng in rngs]
        seeds = [int(rng.integers(2**31)) for rng in rngs]
        probe = official_probe(self.train.features, labels, splits, classes=self.classes, seeds=seeds)
        yield self._score("official", probe.accuracy(self.test.features, self.test.labels))

    def _few(self) -> Iterator[Score]:
        labels = self.train.labels.cpu().numpy()
        for share in self.cfg.few.shares:
            values, count = [], 0
            for draw in range(self.cfg.draws):
                part = self.train.at(
                    torch.from_numpy(class_balanced(labels, share, self._rng(draw, f"few {percent(share)}")))
                )
                probe, count = self._probe(part, part.labels[None], draw, self.classes), len(part.labels)
                values += probe.accuracy(self.test.features, self.test.labels)
            yield self._score("few", values, setting=percent(share), train=count)

    def _noisy(self) -> Iterator[Score]:
        clean = self.train.labels.cpu().numpy()
        official = labels_of(opened(self.cfg.data, "bank"))
        human = {name: own[self.train.place.numpy()] for name, own in human_labels(self.cfg, official).items()}
        values: dict[str, list[float]] = {}
        for draw in range(self.cfg.draws):
            sets = human | noisy_labels(self.cfg, clean, self.classes, draw)
            labels = torch.from_numpy(np.stack(list(sets.values()))).to(self.train.labels.device)
            probe = self._probe(self.train, labels, draw, self.classes)
            for name, value in zip(sets, probe.accuracy(self.test.features, self.test.labels), strict=True):
                values.setdefault(name, []).append(value)
        for name, found in values.items():
            yield self._score("noisy", found, setting=name)

    def _ood(self) -> Iterator[Score]:
        for other in self.cfg.ood:
            dataset, label_of = translation(self.cfg, other, self._test_images)
            found = self._features(dataset)
            labels = label_of.to(found.labels.device)[found.labels]
            found = found._replace(labels=labels).at((labels != LEFT_OUT).cpu())
            among = found.labels.unique()
            values = [probe.accuracy(found.features, found.labels, among=among)[0] for probe in self.probes]
            setting = f"{other.name}, {len(among)} of {self.classes} classes"
            yield self._score("ood", values, setting=setting, test=len(found.labels))

    def _transfer(self) -> Iterator[Score]:
        for other in self.cfg.transfer:
            train, test = self._features(opened(other, "bank")), self._features(opened(other, "test"))
            classes = int(torch.cat((train.labels, test.labels)).max()) + 1
            values = []
            for draw in range(self.cfg.draws):
                probe = self._probe(train, train.labels[None], draw, classes)
                values += probe.accuracy(test.features, test.labels)
            yield self._score("transfer", values, setting=other.name, train=len(train.labels), test=len(test.labels))

    def _corruptions(self) -> Iterator[Score]:
        cfg, dataset = self.cfg.corruptions, self._test_images
        picked = evenly_spaced(len(dataset), cfg.images)
        pixels, read = plain_pixels(dataset, picked, self.encoder.size)
        kept = read == picked
        labels = torch.from_numpy(labels_of(dataset)[picked[kept]]).to(self.reader.ranks.device)
        clean = self._features_of_pixels(pixels[kept])
        found = {"clean": [[probe.accuracy(clean, labels)[0] for probe in self.probes]]}
        for kind in cfg.kinds:
            for severity in SEVERITIES:
                features = self._features_of_pixels(corrupt(pixels[kept], kind, severity, seed=self.cfg.seed))
                values = [probe.accuracy(features, labels)[0] for probe in self.probes]
                for setting in (kind, f"severity {severity}", f"all {CORRUPTIONS[kind]}", "mean"):
                    found.setdefault(setting, []).append(values)
        for setting, several in found.items():
            mean = [statistics.fmean(draw) for draw in zip(*several, strict=True)]
            yield self._score("corruptions", mean, setting=setting, test=len(labels))

    def _features_of_pixels(self, pixels: np.ndarray) -> Tensor:
        device = self.reader.ranks.device
        mean, std = pixel_statistics(self.encoder.statistics, device)
        parts = torch.from_numpy(pixels).split(FEATURE_BATCH)
        features = [self.encoder.features(normalized(part.to(device), mean, std)) for part in parts]
        return self._finite(torch.cat(features))


def _random_split(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As the authors: 15 % at random, whatever their classes."""
    order = rng.permutation(n)
    held = max(1, round(OFFICIAL_HELD_OUT * n))
    return order[held:], order[:held]
