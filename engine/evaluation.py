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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from engine.data.arrays import open_arrays
from engine.data.catalog import Split, open_dataset, open_split
from engine.data.class_names import class_map, class_names
from engine.data.dataset import DataError, ImageDataset
from engine.data.human_labels import KINDS, cifar10n
from engine.data.torch_loader import normalized, plain_pixels
from engine.encoders import Encoder
from engine.evaluation_config import EvaluationConfig, OtherData
from engine.features import FEATURE_BATCH, Labelled, Reader
from engine.label_sets import class_balanced, pairflip_noise, symmetric_noise
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
        """Every score that the settings ask for, as it is found.  Raises DataError, before any work where it can."""
        self._check()
        protocols: dict[str, Callable[[], Iterator[Score]]] = {
            "knn": self._knn, "linear": self._linear, "official": self._official, "few": self._few,
            "noisy": self._noisy, "ood": self._ood, "transfer": self._transfer, "corruptions": self._corruptions,
        }  # fmt: skip
        for name in self.cfg.protocols:
            yield from protocols[name]()

    def _check(self) -> None:
        """Opens what the protocols need: a missing file must not cost the scores before it."""
        cfg, images = self.cfg, self._split("bank")
        assert images.labels is not None
        for share in cfg.few.shares if "few" in cfg.protocols else ():
            class_balanced(images.labels, share, self._rng(0))
        if "noisy" in cfg.protocols:
            self._human_labels()
        for name, others in (("ood", cfg.ood), ("transfer", cfg.transfer)):
            for other in others if name in cfg.protocols else ():
                _opened(other, "test")

    # -- what they share ---------------------------------------------------------------------------------------------

    @cached_property
    def train(self) -> Labelled:
        """Features of the labelled training images."""
        return self._features(self._split("bank"))

    @cached_property
    def test(self) -> Labelled:
        """Features of the test images."""
        return self._features(self._test_images)

    @cached_property
    def _test_images(self) -> ImageDataset:
        return self._split("test")

    @cached_property
    def classes(self) -> int:
        """C, of training and test images together."""
        return int(torch.cat((self.train.labels, self.test.labels)).max()) + 1

    @cached_property
    def probes(self) -> list[LinearProbe]:
        """The linear probe of the training images, a draw each."""
        return [self._probe(self.train, self.train.labels[None], draw, self.classes) for draw in range(self.cfg.draws)]

    def _split(self, split: Split) -> ImageDataset:
        found = open_split(self.cfg.data, split)
        if found is None:
            raise DataError(f"data.root: {self.cfg.data.root} has no labels, which an evaluation needs")
        return found

    def _features(self, dataset: ImageDataset) -> Labelled:
        return self.reader.labelled(dataset, self.encoder.features)

    def _rng(self, *what: int) -> np.random.Generator:
        """Numbers that depend on the seed and on what they are for."""
        return np.random.default_rng((self.cfg.seed, *what))

    def _probe(self, train: Labelled, labels: Tensor, draw: int, classes: int) -> LinearProbe:
        """Linear probes of sets of labels [G, n]; which images are held out depends on the true ones."""
        split = held_out_split(train.labels.cpu().numpy(), self.cfg.linear.held_out, self._rng(draw))
        return linear_probe(
            train.features, labels, split, self.cfg.linear, classes=classes, seed=self.cfg.seed + draw
        )  # fmt: skip

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
            picked = torch.linspace(0, len(labels) - 1, cfg.bank).round().long().to(labels.device)
            bank, labels = bank[picked], labels[picked]
        accuracy = knn_accuracy(bank, labels, self.test.features, self.test.labels, k=cfg.k, tau=cfg.tau)
        yield self._score("knn", [accuracy], setting=f"k={cfg.k}", train=len(labels))

    def _linear(self) -> Iterator[Score]:
        values = [probe.accuracy(self.test.features, self.test.labels)[0] for probe in self.probes]
        yield self._score("linear", values)

    def _official(self) -> Iterator[Score]:
        labels = self.train.labels
        rng = [self._rng(draw) for draw in range(self.cfg.draws)]
        splits = [_random_split(len(labels), one) for one in rng]
        probe = official_probe(self.train.features, labels, splits, classes=self.classes, seed=self.cfg.seed)
        yield self._score("official", probe.accuracy(self.test.features, self.test.labels))

    def _few(self) -> Iterator[Score]:
        labels = self.train.labels.cpu().numpy()
        for i, share in enumerate(self.cfg.few.shares):
            values = []
            for draw in range(self.cfg.draws):
                places = torch.from_numpy(class_balanced(labels, share, self._rng(draw, i)))
                part = self.train.at(places)
                probe = self._probe(part, part.labels[None], draw, self.classes)
                values += probe.accuracy(self.test.features, self.test.labels)
            yield self._score("few", values, setting=_percent(share), train=len(places))

    def _noisy(self) -> Iterator[Score]:
        clean = self.train.labels.cpu().numpy()
        human = {name: labels[self.train.place.numpy()] for name, labels in self._human_labels().items()}
        values: dict[str, list[float]] = {}
        for draw in range(self.cfg.draws):
            sets = dict(human)
            for i, kind in enumerate(self.cfg.noisy.kinds):
                make = symmetric_noise if kind == "symmetric" else pairflip_noise
                for j, rate in enumerate(self.cfg.noisy.rates):
                    sets[f"{kind} {_percent(rate)}"] = make(clean, rate, self.classes, self._rng(draw, i, j))
            labels = torch.from_numpy(np.stack(list(sets.values()))).to(self.train.labels.device)
            probe = self._probe(self.train, labels, draw, self.classes)
            for name, value in zip(sets, probe.accuracy(self.test.features, self.test.labels), strict=True):
                values.setdefault(name, []).append(value)
        for name, found in values.items():
            yield self._score("noisy", found, setting=name)

    def _human_labels(self) -> dict[str, Any]:
        """Sets of labels by people, one for each training image."""
        file = self.cfg.noisy.human
        if file is None:
            return {}
        if self.cfg.data.dataset != "cifar10":
            raise DataError(f"noisy.human: {file} labels cifar10's images, and data.dataset is {self.cfg.data.dataset}")
        official = self._split("bank").labels
        assert official is not None
        return {f"human {kind}": cifar10n(file, kind, official) for kind in KINDS}

    def _ood(self) -> Iterator[Score]:
        for other in self.cfg.ood:
            found, among = self._mapped(other)
            values = [probe.accuracy(found.features, found.labels, among=among)[0] for probe in self.probes]
            yield self._score("ood", values, setting=other.name, test=len(found.labels))

    def _mapped(self, other: OtherData) -> tuple[Labelled, Tensor]:
        """Features of other images with labels of the training data, and the classes that there are."""
        dataset = _opened(other, "test")
        found = self._features(dataset)
        if other.dataset is not None:
            ours = class_names(self.cfg.data.dataset, self._test_images)
            theirs = class_names(other.dataset, dataset)
            translated = torch.full((len(theirs),), -1, dtype=torch.int64)
            for label, own in class_map(ours, theirs).items():
                translated[label] = own
            labels = translated.to(found.labels.device)[found.labels]
            found = found._replace(labels=labels).at((labels >= 0).cpu())
        among = found.labels.unique()
        if int(among.max()) >= self.classes:
            raise DataError(
                f"ood: {other.name} has label {int(among.max())}, and the training data {self.classes} classes; "
                "labels must be those of the training data"
            )
        return found, among

    def _transfer(self) -> Iterator[Score]:
        for other in self.cfg.transfer:
            train, test = self._features(_opened(other, "bank")), self._features(_opened(other, "test"))
            classes = int(torch.cat((train.labels, test.labels)).max()) + 1
            values = []
            for draw in range(self.cfg.draws):
                probe = self._probe(train, train.labels[None], draw, classes)
                values += probe.accuracy(test.features, test.labels)
            yield self._score("transfer", values, setting=other.name, train=len(train.labels), test=len(test.labels))

    def _corruptions(self) -> Iterator[Score]:
        cfg, dataset = self.cfg.corruptions, self._test_images
        assert dataset.labels is not None
        picked = np.linspace(0, len(dataset) - 1, min(cfg.images, len(dataset))).round().astype(np.int64)
        pixels, read = plain_pixels(dataset, picked, self.encoder.size)
        kept = read == picked
        labels = torch.from_numpy(dataset.labels[picked[kept]]).to(self.reader.ranks.device)
        found: dict[str, list[list[float]]] = {}
        for kind in cfg.kinds:
            for severity in SEVERITIES:
                made = corrupt(pixels[kept], kind, severity, seed=self.cfg.seed)
                features = self._features_of_pixels(made)
                values = [probe.accuracy(features, labels)[0] for probe in self.probes]
                for setting in (kind, f"severity {severity}", f"all {CORRUPTIONS[kind]}", "mean"):
                    found.setdefault(setting, []).append(values)
        for setting, several in found.items():
            mean = [statistics.fmean(draw) for draw in zip(*several, strict=True)]
            yield self._score("corruptions", mean, setting=setting, test=len(labels))

    def _features_of_pixels(self, pixels: np.ndarray) -> Tensor:
        device = self.reader.ranks.device
        mean, std = (torch.tensor(s, device=device).view(1, 3, 1, 1) * 255 for s in self.encoder.statistics)
        parts = torch.from_numpy(pixels).split(FEATURE_BATCH)
        return torch.cat([self.encoder.features(normalized(part.to(device), mean, std)) for part in parts])


def _percent(share: float) -> str:
    """0.125 -> 12.5%: two shares never have one name."""
    return f"{100 * share:.10g}%"


def _random_split(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As the authors: 15 % at random, whatever their classes."""
    order = rng.permutation(n)
    held = max(1, round(OFFICIAL_HELD_OUT * n))
    return order[held:], order[:held]


def _opened(other: OtherData, split: Split) -> ImageDataset:
    if other.file is not None:
        return open_arrays(other.file)
    assert other.dataset is not None
    found = open_dataset(other.dataset, other.root, split)
    if found is None:
        raise DataError(f"{other.name}: {other.root} has no labels, which an evaluation needs")
    return found
