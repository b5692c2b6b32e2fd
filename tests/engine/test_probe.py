"""kNN: against a computation by loops, over ranks, with and without labels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from engine import distributed, probe
from engine.config import KnnConfig
from engine.data.augment import build_policy
from engine.data.dataset import ArrayDataset
from engine.data.skipped import SkippedImages
from engine.data_config import AugmentConfig, DataConfig
from engine.features import Reader
from engine.probe import KnnProbe, knn_accuracy
from ranks import run_ranks


def by_loops(bank, bank_labels, queries, query_labels, k, tau) -> float:
    right = 0
    for q, label in zip(queries, query_labels, strict=True):
        similar = sorted(
            ((float(q @ b / (q.norm() * b.norm())), int(c)) for b, c in zip(bank, bank_labels, strict=True)),
            reverse=True,
        )
        votes: dict[int, float] = {}
        for cosine, c in similar[:k]:
            votes[c] = votes.get(c, 0.0) + math.exp(cosine / tau)
        right += max(votes, key=lambda c: votes[c]) == int(label)
    return right / len(queries)


@pytest.mark.parametrize(("k", "tau"), [(1, 0.1), (7, 0.1), (20, 0.5), (500, 0.07)])
def test_accuracy_is_the_definition(k, tau, monkeypatch):
    monkeypatch.setattr(probe, "QUERY_CHUNK", 13)
    torch.manual_seed(0)
    bank_labels, query_labels = torch.randint(0, 5, (60,)), torch.randint(0, 5, (41,))
    centres = torch.randn(5, 8)
    bank = centres[bank_labels] + 1.5 * torch.randn(60, 8)
    queries = centres[query_labels] + 1.5 * torch.randn(41, 8)
    found = knn_accuracy(bank, bank_labels, queries, query_labels, k=k, tau=tau)
    assert found == by_loops(bank, bank_labels, queries, query_labels, min(k, 60), tau)
    assert 0.2 < found < 1.0


def test_votes_survive_the_smallest_temperature():
    z = torch.eye(3)
    assert knn_accuracy(z, torch.arange(3), z, torch.arange(3), k=2, tau=1e-3) == 1.0


def data(n: int, seed: int) -> ArrayDataset:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    images = rng.integers(0, 140, (n, 32, 32, 3))
    images[np.arange(n), :, :, labels] += 2
    return ArrayDataset(f"set{seed}", images.astype(np.uint8), labels)


def accuracy_of_one_rank(bank: int | None) -> tuple[float | None, int]:
    ranks = distributed.start()
    probe.open_split = lambda cfg, split: data(70 if split == "bank" else 31, 0 if split == "bank" else 1)
    policy = build_policy(AugmentConfig(), 32)
    reader = Reader(32, policy.statistics, 0, ranks, SkippedImages(ranks))
    measured = KnnProbe(DataConfig(), KnnConfig(k=5, bank=bank), reader)
    calls = []

    def features(images):
        calls.append(len(images))
        return torch.nn.functional.avg_pool2d(images, 16).flatten(1)

    found = measured.accuracy(features)
    distributed.stop()
    return found, len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("bank", [None, 20])
def test_ranks_agree_with_one(bank):
    ((alone, _),) = run_ranks(accuracy_of_one_rank, 1, bank)
    every = run_ranks(accuracy_of_one_rank, 3, bank)
    assert [found for found, _ in every] == [alone] * 3
    assert len({calls for _, calls in every}) == 1, "ZeRO 3 needs as many forward passes on every rank"
    assert 0.5 < alone < 1.0


def folder_at(root) -> DataConfig:
    return DataConfig(dataset="folder", root=root)


def test_unreadable_images_stay_out_of_the_score(alone, tmp_path, caplog):
    """Three of eight queries are damaged: the score is that of the other five, each counted once."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 8)):
        for i in range(count):
            path = tmp_path / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 60, (32, 32, 3)).astype(np.uint8) + 150 * (i % 2)).save(path)
    policy = build_policy(AugmentConfig(), 32)
    skipped = SkippedImages(alone)
    measured = KnnProbe(folder_at(tmp_path), KnnConfig(k=1), Reader(32, policy.statistics, 0, alone, skipped))
    for i in (0, 2, 4):  # after the scan, which would have left them out
        path = tmp_path / "val" / "a" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:-300])

    def all_queries_look_like_b(images):
        bright = (images.mean(dim=(1, 2, 3)) > 0).long()
        return torch.eye(2)[bright if len(images) == 10 else torch.ones(len(images), dtype=torch.long)]

    assert measured.accuracy(all_queries_look_like_b) == pytest.approx(4 / 5)
    skipped.share()
    assert len(skipped) == 3


def test_data_without_labels_has_no_accuracy(alone, image_folder, tmp_path):
    for i, path in enumerate(sorted(image_folder.glob("class0/*.png"))[:4]):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes())
    policy = build_policy(AugmentConfig(), 32)
    reader = Reader(32, policy.statistics, 0, alone, SkippedImages(alone))
    measured = KnnProbe(folder_at(tmp_path), KnnConfig(), reader)
    assert measured.accuracy(lambda images: images.flatten(1)) is None
