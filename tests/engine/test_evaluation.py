"""Every protocol of an evaluation, on small data whose classes can be told apart, each against its definition."""

import zlib

import numpy as np
import pytest
import torch
from torch import nn

from engine import evaluation as subject
from engine import evaluation_data
from engine.corruptions import CORRUPTIONS, corrupt
from engine.data.dataset import ArrayDataset, DataError
from engine.data.skipped import SkippedImages
from engine.encoders import Encoder
from engine.evaluation import Evaluation
from engine.features import Reader
from engine.linear_probe import held_out_split, linear_probe, official_probe
from engine.probe import knn_accuracy
from engine.settings import parse_section

C, SIDE = 4, 16
STATISTICS = ((0.5,) * 3, (0.25,) * 3)


def images(n: int, seed: int, shift: int = 0) -> ArrayDataset:
    """A bright corner for each class, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % C)
    pixels = rng.integers(0, 200, (n, SIDE, SIDE, 3))
    for i, label in enumerate(labels):
        row, column = divmod((int(label) + shift) % C, 2)
        pixels[i, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 7
    return ArrayDataset(f"set{seed}", pixels.clip(0, 255).astype(np.uint8), labels)


TRAIN, TEST = images(301, 0), images(122, 1)


def pooled() -> Encoder:
    """Means of 4 x 4 patches: [n, 3 * 16]."""
    return Encoder("a", "patches", "auto", nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), 48, SIDE, STATISTICS)


@pytest.fixture
def evaluation(alone, monkeypatch):
    """An evaluation with some settings, of TRAIN and TEST."""
    monkeypatch.setattr(evaluation_data, "open_dataset", lambda *a, **k: TEST if a[2] == "test" else TRAIN)

    def build(**settings) -> Evaluation:
        plain = {"draws": 2, "linear": {"steps": 150, "batch_size": 32}, "knn": {"k": 9}, **settings}
        reader = Reader(SIDE, STATISTICS, 0, alone, SkippedImages(alone))
        return Evaluation(pooled(), parse_section(subject.EvaluationConfig, plain), reader)

    return build


def features(dataset: ArrayDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """By another way than the subject's: patch means of (x / 255 - mean) / std."""
    x = (torch.from_numpy(dataset.images).double() / 255 - 0.5) / 0.25
    patches = x.view(len(x), 4, 4, 4, 4, 3).mean(dim=(2, 4)).permute(0, 3, 1, 2).flatten(1)
    return patches.float(), torch.from_numpy(dataset.labels)


def splits(labels: torch.Tensor, draws: int = 2) -> list:
    return [held_out_split(labels.numpy(), 0.15, rng(draw, "held out")) for draw in range(draws)]


def rng(draw: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng((0, draw, zlib.crc32(purpose.encode())))


def seed_of_batches(draw: int) -> int:
    return int(rng(draw, "batches").integers(2**31))


def test_features_are_the_encoders(evaluation):
    found = evaluation().train
    torch.testing.assert_close(found.features, features(TRAIN)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, features(TRAIN)[1]) and found.place.tolist() == list(range(301))


def test_knn_linear_and_official(evaluation):
    run = evaluation(protocols=("knn", "linear", "official"))
    knn, linear, official = run.scores()
    (x, y), (u, v) = features(TRAIN), features(TEST)
    assert knn.values == pytest.approx([knn_accuracy(x, y, u, v, k=9, tau=0.1)])
    assert (knn.setting, knn.train, knn.test, knn.peer, knn.backbone) == ("k=9", 301, 122, "a", "patches")
    probes = [
        linear_probe(x, y[None], split, run.cfg.linear, classes=C, seed=seed_of_batches(draw))
        for draw, split in enumerate(splits(y))
    ]
    assert linear.values == pytest.approx([probe.accuracy(u, v)[0] for probe in probes], abs=2 / 122)
    assert all(0.5 < value < 1 for value in linear.values) and len(official.values) == 2
    rngs = [rng(draw, "official") for draw in range(2)]
    drawn = [one.permutation(301) for one in rngs]
    seeds = [int(one.integers(2**31)) for one in rngs]
    by_hand = official_probe(x, y, [(o[45:], o[:45]) for o in drawn], classes=C, seeds=seeds)
    assert official.values == pytest.approx(by_hand.accuracy(u, v), abs=2 / 122)


def test_a_bank_of_some_of_the_images(evaluation):
    (score,) = evaluation(protocols=("knn",), knn={"k": 3, "bank": 40}).scores()
    picked = torch.linspace(0, 300, 40).round().long()
    (x, y), (u, v) = features(TRAIN), features(TEST)
    assert score.values == (knn_accuracy(x[picked], y[picked], u, v, k=3, tau=0.1),) and score.train == 40


def test_few_labels(evaluation):
    scores = list(evaluation(protocols=("few",), few={"shares": (0.125, 0.5, 1)}).scores())
    assert [s.setting for s in scores] == ["12.5%", "50%", "100%"]
    counts = np.bincount(TRAIN.labels)
    for score, share in zip(scores, (0.125, 0.5, 1), strict=True):
        assert score.train == sum(round(share * count) for count in counts)
    assert scores[0].mean < scores[2].mean, "an eighth of the labels serves less than all"


def test_wrong_labels(evaluation):
    run = evaluation(protocols=("noisy",), noisy={"kinds": ("symmetric", "pairflip"), "rates": (0.2, 0.7)}, draws=3)
    scores = {score.setting: score for score in run.scores()}
    assert list(scores) == ["symmetric 20%", "symmetric 70%", "pairflip 20%", "pairflip 70%"]
    assert scores["symmetric 20%"].mean > scores["symmetric 70%"].mean + 0.1
    assert scores["pairflip 70%"].mean < 1 / C, "most labels name the next class"
    clean = evaluation(protocols=("linear",), draws=3).scores()
    assert scores["pairflip 20%"].mean < next(clean).mean + 0.05


def test_labels_of_people(evaluation, tmp_path, monkeypatch):
    """The wrong label of every image is the next class's, so that the probe learns that."""
    monkeypatch.setattr(evaluation_data, "cifar10n", lambda file, kind, clean: (clean + 1) % C)
    run = evaluation(protocols=("noisy",), noisy={"rates": (), "kinds": (), "human": str(tmp_path / "x.npz")})
    found = list(run.scores())
    assert [score.setting for score in found] == [f"human {kind}" for kind in evaluation_data.KINDS]
    assert all(score.mean < 0.2 for score in found)
    other = evaluation(protocols=("noisy",), noisy={"human": str(tmp_path / "x.npz")}, data={"dataset": "cifar100"})
    with pytest.raises(DataError, match="labels cifar10's images, and data.dataset is cifar100"):
        list(other.scores())


def test_other_data_of_the_same_classes(evaluation, tmp_path):
    """Only two of the classes are there, so that a probe has two to choose from."""
    kept = TEST.labels >= 2
    np.savez(tmp_path / "other.npz", images=TEST.images[kept], labels=TEST.labels[kept])
    run = evaluation(protocols=("ood", "linear"), ood=[{"name": "corners", "file": str(tmp_path / "other.npz")}])
    ood, _ = run.scores()
    u, v = (part[torch.from_numpy(kept)] for part in features(TEST))
    expected = []
    for probe in run.probes:
        logits = ((u - probe.mean) / probe.std) @ probe.weight[0] + probe.bias[0]
        expected.append(((logits[:, 2:].argmax(dim=1) + 2) == v).double().mean().item())
    assert ood.values == pytest.approx(expected, abs=1e-9)
    assert (ood.setting, ood.test) == ("corners, 2 of 4 classes", int(kept.sum()))
    np.savez(tmp_path / "more.npz", images=TEST.images, labels=TEST.labels + 1)
    run = evaluation(protocols=("ood",), ood=[{"name": "more", "file": str(tmp_path / "more.npz")}])
    with pytest.raises(DataError, match=r"more\.npz: has label 4, and cifar10 has classes 0 to 3"):
        list(run.scores())


def test_classes_are_mapped_by_their_names(evaluation, monkeypatch):
    """Three of STL-10's classes, which stand elsewhere in CIFAR-10; its monkeys are left out."""
    theirs = np.array([7, 2, 1, 3])  # of 1 automobile, 2 bird, 3 cat; our 0 stands for what has no partner
    labels = theirs[TEST.labels]
    run = evaluation(protocols=("ood",), ood=[{"name": "stl", "dataset": "stl10"}])
    own, other = evaluation_data.open_dataset, ArrayDataset("stl10-test", TEST.images, labels)
    monkeypatch.setattr(evaluation_data, "open_dataset", lambda *a, **k: other if a[0] == "stl10" else own(*a))
    (score,) = run.scores()
    kept = TEST.labels > 0
    assert score.test == int(kept.sum())
    u, v = features(TEST)
    among = torch.tensor([1, 2, 3])
    expected = [probe.accuracy(u[kept], v[kept], among=among)[0] for probe in run.probes]
    assert score.values == pytest.approx(expected) and score.mean > 0.5


def test_probes_of_other_data(evaluation, monkeypatch):
    other = {"bank": images(95, 5, shift=1), "test": images(61, 6, shift=1)}
    run = evaluation(protocols=("transfer",), transfer=[{"name": "turned", "dataset": "fashion-mnist"}])
    own = evaluation_data.open_dataset
    monkeypatch.setattr(
        evaluation_data, "open_dataset", lambda *a, **k: other[a[2]] if a[0] == "fashion-mnist" else own(*a)
    )
    (score,) = run.scores()
    (x, y), (u, v) = features(other["bank"]), features(other["test"])
    expected = [
        linear_probe(x, y[None], split, run.cfg.linear, classes=C, seed=seed_of_batches(draw)).accuracy(u, v)[0]
        for draw, split in enumerate(splits(y))
    ]
    assert score.values == pytest.approx(expected, abs=2 / 61)
    assert (score.setting, score.train, score.test) == ("turned", 95, 61)


def test_corruptions(evaluation):
    kinds = ("gaussian_noise", "contrast")
    run = evaluation(protocols=("corruptions",), corruptions={"kinds": kinds, "images": 61})
    scores = {score.setting: score for score in run.scores()}
    groups = [f"all {CORRUPTIONS[kind]}" for kind in kinds]
    assert set(scores) == {*kinds, *groups, *(f"severity {s}" for s in range(1, 6)), "mean", "clean"}
    picked = np.linspace(0, 121, 61).round().astype(int)
    labels = torch.from_numpy(TEST.labels[picked])

    def accuracies(kind: str, severity: int) -> list[float]:
        made = ArrayDataset("made", corrupt(TEST.images[picked], kind, severity, seed=0), TEST.labels[picked])
        return [probe.accuracy(features(made)[0], labels)[0] for probe in run.probes]

    expected = np.array([[accuracies(kind, severity) for severity in range(1, 6)] for kind in kinds])
    assert scores["mean"].values == pytest.approx(expected.mean(axis=(0, 1)), abs=1e-2)
    assert scores["contrast"].values == pytest.approx(expected[1].mean(axis=0), abs=2e-2)
    assert scores["severity 5"].values == pytest.approx(expected[:, 4].mean(axis=0), abs=2e-2)
    assert scores["mean"].test == 61


def test_the_same_seed_gives_the_same_scores(evaluation):
    settings = {"protocols": ("linear", "few", "noisy"), "noisy": {"rates": (0.4,)}, "few": {"shares": (0.1,)}}
    first, again, other = (list(evaluation(**settings, seed=seed).scores()) for seed in (3, 3, 4))
    assert first == again
    assert [score.values for score in first] != [score.values for score in other]


def test_draws_do_not_depend_on_what_else_is_asked(evaluation):
    def named(**settings) -> dict:
        return {(s.protocol, s.setting): s.values for s in evaluation(protocols=("few", "noisy"), **settings).scores()}

    one = named(few={"shares": (0.1, 0.5)}, noisy={"rates": (0.4, 0.8)})
    other = named(few={"shares": (0.5, 0.25, 0.1)}, noisy={"kinds": ("pairflip", "symmetric"), "rates": (0.8, 0.4)})
    assert one.keys() < other.keys() and all(other[key] == values for key, values in one.items())
    more = named(few={"shares": (0.1,)}, noisy={"rates": (0.4,)}, draws=4)
    assert all(values[:2] == one[key] and len(set(values)) > 1 for key, values in more.items()), "each draw another"


def test_labels_stay_with_their_images_where_some_cannot_be_read(evaluation, monkeypatch):
    """Place 3 and 200 are missing: sets of labels by people lose the same places."""
    run = evaluation(protocols=("noisy",), noisy={"rates": (), "kinds": (), "human": "x.npz"})
    kept = torch.tensor([i not in (3, 200) for i in range(301)])
    whole = run.train
    run.train = whole.at(kept)
    rng_labels = np.random.default_rng(7).integers(0, C, 301)
    monkeypatch.setattr(evaluation_data, "cifar10n", lambda file, kind, clean: rng_labels)
    seen = []

    def watched(x, labels, *a, **k):
        seen.append(labels)
        return linear_probe(x, labels, *a, **k)

    monkeypatch.setattr(subject, "linear_probe", watched)
    list(run.scores())
    assert all(torch.equal(own, torch.from_numpy(rng_labels)[kept]) for own in seen[0])


def test_features_that_are_not_finite_are_refused(evaluation):
    run = evaluation(protocols=("knn",))
    module = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    run.encoder = run.encoder._replace(module=nn.Sequential(module, Broken()))
    with pytest.raises(DataError, match=r"a \(patches\): features of 1 of 301 images are not finite"):
        list(run.scores())


class Broken(nn.Module):
    """One value of the first image of the first batch."""

    def forward(self, x):
        first = torch.zeros(len(x), dtype=torch.bool)
        first[0] = True
        return torch.where(first[:, None] & (torch.arange(x.shape[1]) == 5), torch.nan, x)


def test_one_class_is_no_choice(evaluation, tmp_path):
    kept = TEST.labels == 2
    np.savez(tmp_path / "one.npz", images=TEST.images[kept], labels=TEST.labels[kept])
    run = evaluation(protocols=("ood",), ood=[{"name": "one", "file": str(tmp_path / "one.npz")}])
    with pytest.raises(DataError, match="ood: one has images of 1 of the training data's classes; two are the least"):
        list(run.scores())


def test_data_without_labels(evaluation, monkeypatch):
    monkeypatch.setattr(evaluation_data, "open_dataset", lambda *a, **k: None)
    with pytest.raises(DataError, match="has no labels, which an evaluation needs"):
        list(evaluation(protocols=("knn",)).scores())
