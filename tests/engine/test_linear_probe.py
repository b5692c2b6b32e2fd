"""Linear probes: each of many is what torch's own optimizer would train by itself; what is drawn; what is chosen."""

import numpy as np
import pytest
import torch
from torch import nn

from engine import linear_probe as subject
from engine.evaluation_config import LinearConfig
from engine.linear_probe import held_out_split, linear_probe, official_probe
from engine.settings import ConfigError

N, F, C = 203, 11, 5


@pytest.fixture(scope="module")
def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of classes that overlap, each dimension on a scale and around a place of its own."""
    torch.manual_seed(0)
    labels = torch.arange(N) % C
    features = torch.randn(C, F)[labels] + 1.7 * torch.randn(N, F)
    return features * torch.logspace(-2, 2, F) + 10 * torch.randn(F), labels


def split(labels: torch.Tensor, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return held_out_split(labels.numpy(), 0.15, np.random.default_rng(seed))


def by_torch(x, labels, order, rate: float, cfg: LinearConfig) -> nn.Linear:
    """One classifier in float64 by autograd and torch's SGD."""
    layer = nn.Linear(F, C).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(
        [{"params": [layer.weight], "weight_decay": cfg.weight_decay}, {"params": [layer.bias]}], lr=rate, momentum=0.9
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    for rows in order:
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return layer


def test_each_of_many_probes_is_trained_as_if_alone(clusters):
    features, labels = clusters
    cfg = LinearConfig(rates=(0.03, 0.3), steps=40, batch_size=32, weight_decay=1e-2)
    sets = torch.stack((labels, (labels + 1) % C, labels.flip(0)))
    x = (features - features.mean(dim=0)) / features.std(dim=0)
    weight, bias = subject._fit(x, sets, cfg, classes=C, seed=3)
    order = subject._batches(N, 32, 40, 3)
    for g, own in enumerate(sets):
        for r, rate in enumerate(cfg.rates):
            layer = by_torch(x.double(), own, order, rate, cfg)
            torch.testing.assert_close(weight[g, r].double(), layer.weight.detach().T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bias[g, r].double(), layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_the_held_out_images_choose_the_rate(clusters):
    features, labels = clusters
    sets = torch.stack((labels, torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(1))))
    train, held = split(labels)
    cfg = LinearConfig(rates=(1e-7, 0.1), steps=200, batch_size=32)
    found = linear_probe(features, sets, (train, held), cfg, classes=C, seed=0)
    one_each = [
        linear_probe(features, sets, (train, held), LinearConfig(rates=(rate,), steps=200, batch_size=32),
                     classes=C, seed=0)
        for rate in cfg.rates
    ]  # fmt: skip
    for g in range(2):
        scores = [one.held_out[g] for one in one_each]
        best = int(np.argmax(scores))
        assert (found.rates[g], found.held_out[g]) == (cfg.rates[best], scores[best])
        torch.testing.assert_close(found.weight[g], one_each[best].weight[g])
    held_out = torch.from_numpy(held)
    right = (found.predictions(features[held_out])[:, 0] == labels[held_out]).double().mean()
    assert found.held_out[0] == pytest.approx(right.item())
    assert len(set(found.rates)) == 2, "the noise and the labels choose differently, or the test says little"


def test_scale_and_place_of_a_feature_do_not_matter(clusters):
    features, labels = clusters
    cfg = LinearConfig(steps=100, batch_size=32)
    one = linear_probe(features, labels[None], split(labels), cfg, classes=C, seed=0)
    moved = torch.cat((features * 7 - 3, torch.full((N, 1), 5.0)), dim=1)  # and one that never changes
    other = linear_probe(moved, labels[None], split(labels), cfg, classes=C, seed=0)
    assert one.rates == other.rates
    torch.testing.assert_close(other.weight[0, :F], one.weight[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(one.predictions(features), other.predictions(moved))


def test_a_probe_learns_what_can_be_learned(clusters):
    features, labels = clusters
    found = linear_probe(features, labels[None], split(labels), LinearConfig(steps=500), classes=C, seed=0)
    x = ((features - features.mean(dim=0)) / features.std(dim=0)).double()
    layer = nn.Linear(F, C).double()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(x), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = (layer(x).argmax(dim=1) == labels).double().mean().item()
    assert 0.6 < optimum < 0.95
    assert found.accuracy(features, labels)[0] == pytest.approx(optimum, abs=0.03)


def test_accuracy_among_some_classes_only(clusters, monkeypatch):
    features, labels = clusters
    monkeypatch.setattr(subject, "ROWS", 17)
    found = linear_probe(features, labels[None], split(labels), LinearConfig(steps=100), classes=C, seed=0)
    logits = ((features - found.mean) / found.std) @ found.weight[0] + found.bias[0]
    few = torch.tensor([1, 3])
    expected = few[logits[:, few].argmax(dim=1)]
    assert torch.equal(found.predictions(features, among=few)[:, 0], expected)
    assert found.accuracy(features, labels, among=few) == [(expected == labels).double().mean().item()]


def test_official_probe_is_the_authors_loop(clusters):
    features, labels = clusters
    features = features / features.std(dim=0)  # as they are: no standardisation
    splits = [split(labels, seed) for seed in (0, 1)]
    found = official_probe(features, labels, splits, classes=C, seeds=[5, 8], epochs=7)
    for g, (seed, (train, held)) in enumerate(zip((5, 8), splits, strict=True)):
        torch.manual_seed(seed)
        layer = nn.Linear(F, C)
        x, y = features[train], labels[train]
        optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4, weight_decay=1e-6)
        best = -1.0
        for epoch in range(7):
            for rows in subject._batches(len(train), 64, len(train) // 64, subject.mixed(seed, epoch)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
                optimizer.step()
            score = (layer(features[held]).argmax(dim=1) == labels[held]).double().mean().item()
            if score > best:
                best, kept = score, layer.weight.detach().clone()
        assert found.held_out[g] == pytest.approx(best)
        torch.testing.assert_close(found.weight[g].T, kept, rtol=1e-4, atol=1e-6)


def test_rates_at_which_nothing_stays_finite(clusters):
    features, labels = clusters
    one = linear_probe(features, labels[None], split(labels), LinearConfig(rates=(0.1,), steps=50), classes=C, seed=0)
    wild = LinearConfig(rates=(0.1, 1e38), steps=50)
    assert linear_probe(features, labels[None], split(labels), wild, classes=C, seed=0).rates == one.rates
    with pytest.raises(ConfigError, match=r"linear\.rates: 1e\+38: no probe stays finite"):
        linear_probe(features, labels[None], split(labels), LinearConfig(rates=(1e38,), steps=50), classes=C, seed=0)


def test_held_out_images_say_nothing_of_mean_and_deviation(clusters):
    features, labels = clusters
    train, held = split(labels)
    moved = features.clone()
    moved[held] += 1000
    cfg = LinearConfig(rates=(0.1,), steps=20)
    one, other = (linear_probe(x, labels[None], (train, held), cfg, classes=C, seed=0) for x in (features, moved))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("mean", "std", "weight", "bias"))


@pytest.mark.parametrize(("n", "batch", "steps"), [(10, 3, 7), (8, 8, 3), (100, 33, 2)])
def test_batches_are_whole_passes(n, batch, steps):
    order = subject._batches(n, batch, steps, 0)
    assert order.shape == (steps, batch)
    per_pass = n // batch
    for start in range(0, steps, per_pass):
        rows = order[start : start + per_pass].flatten()
        assert len(rows.unique()) == len(rows)
    assert torch.equal(order, subject._batches(n, batch, steps, 0))
    assert not torch.equal(order, subject._batches(n, batch, steps, 1))


def test_held_out_images_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [40, 7, 2, 1])
    train, held = held_out_split(labels, 0.15, np.random.default_rng(0))
    assert sorted((*train, *held)) == list(range(50))
    assert np.bincount(labels[held], minlength=4).tolist() == [6, 1, 1, 0]
    again = held_out_split(labels, 0.15, np.random.default_rng(0))
    assert np.array_equal(train, again[0]) and np.array_equal(held, again[1])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_probe(clusters):
    features, labels = clusters
    cfg = LinearConfig(steps=200)
    here = linear_probe(features, labels[None], split(labels), cfg, classes=C, seed=0)
    there = linear_probe(features.cuda(), labels[None].cuda(), split(labels), cfg, classes=C, seed=0)
    assert here.rates == there.rates
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=1e-3, atol=1e-4)
    official = official_probe(features, labels, [split(labels)], classes=C, seeds=[0], epochs=3)
    official_there = official_probe(features.cuda(), labels.cuda(), [split(labels)], classes=C, seeds=[0], epochs=3)
    torch.testing.assert_close(official_there.weight.cpu(), official.weight, rtol=1e-3, atol=1e-5)
