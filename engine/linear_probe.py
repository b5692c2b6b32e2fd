"""Linear probes of frozen features: many at once, each a matrix product wide.

Legend
  n  training images    F  feature width    C  classes    G  sets of labels    R  learning rates    B  batch

Probes of the same images share every batch: with G sets of labels and R rates the logits are one product
[B, F] x [F, G R C].  The gradient of softmax cross-entropy, p - onehot, is written out, so that a step is the same few
operations whatever G and R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.evaluation_config import LinearConfig
from engine.settings import ConfigError

MOMENTUM = 0.9
ROWS = 8192  # images whose logits are held at once in an evaluation

# The authors' protocol (DoGo's code, linear.py; their branch `dogo`): Adam on features as they are.
OFFICIAL_RATE, OFFICIAL_DECAY, OFFICIAL_EPOCHS, OFFICIAL_BATCH, OFFICIAL_HELD_OUT = 3.0e-4, 1.0e-6, 100, 64, 0.15


@dataclass(frozen=True)
class LinearProbe:
    """One classifier for each set of labels: softmax((x - mean) / std W + b)."""

    mean: Tensor  # [F]
    std: Tensor  # [F]
    weight: Tensor  # [G, F, C]
    bias: Tensor  # [G, C]
    rates: tuple[float, ...]
    """The learning rate that the held-out images chose, a set of labels each."""
    held_out: tuple[float, ...]
    """Accuracy on them."""

    def accuracy(self, features: Tensor, labels: Tensor, *, among: Tensor | None = None) -> list[float]:
        """Of each classifier on features [m, F] with labels [m]; `among` [K]: the only classes to choose from."""
        right = (self.predictions(features, among=among) == labels[:, None]).sum(dim=0)
        return [count / len(labels) for count in right.tolist()]

    def predictions(self, features: Tensor, *, among: Tensor | None = None) -> Tensor:
        """Classes [m, G]."""
        G, _, C = self.weight.shape
        closed = torch.zeros(C, device=features.device)
        if among is not None:
            closed[:] = -torch.inf
            closed[among] = 0
        flat = self.weight.permute(1, 0, 2).reshape(-1, G * C)
        parts = []
        for x in features.split(ROWS):
            logits = torch.addmm(self.bias.flatten(), (x - self.mean) / self.std, flat).view(-1, G, C)
            parts.append((logits + closed).argmax(dim=2))
        return torch.cat(parts)


def held_out_split(labels: NDArray[np.int64], share: float, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Places to train on and places held out, `share` of each class: at least one where a class has two."""
    train, held = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held))


def linear_probe(
    features: Tensor,  # [n, F]
    labels: Tensor,  # [G, n] int64: what to train on; the held-out images are judged by these too
    split: tuple[NDArray, NDArray],  # places in n to train on and to choose the rate by
    cfg: LinearConfig,
    *,
    classes: int,
    seed: int,
) -> LinearProbe:
    """SGD with momentum and a cosine to zero at every rate of `cfg`; of each set of labels that rate is kept which has
    the highest accuracy on held-out images, the smallest of several.

    Features are standardised by the training images' mean and standard deviation, so that the same rates serve any
    backbone.  Batches are a function of `seed`, on any device.
    """
    train, held = (torch.from_numpy(part).to(features.device) for part in split)
    mean, std = features[train].mean(dim=0), features[train].std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # a feature that never changes says nothing
    weight, bias = _fit(((features[train] - mean) / std), labels[:, train], cfg, classes=classes, seed=seed)
    G, R = len(labels), len(cfg.rates)
    every = LinearProbe(mean, std, weight.flatten(0, 1), bias.flatten(0, 1), (), ())
    chosen = every.predictions(features[held]).view(-1, G, R)
    scores = (chosen == labels[:, held].T[:, :, None]).double().mean(dim=0).cpu()  # [G, R]
    scores[~weight.isfinite().all(dim=(2, 3)).cpu()] = -1
    best = scores.argmax(dim=1)  # the first of equals
    if scores.amax(dim=1).min() < 0:
        raise ConfigError(f"linear.rates: {', '.join(map(str, cfg.rates))}: no probe stays finite; give lower ones")
    rows = torch.arange(G)
    return LinearProbe(
        mean, std, weight[rows, best], bias[rows, best],
        tuple(cfg.rates[i] for i in best.tolist()), tuple(scores[rows, best].tolist()),
    )  # fmt: skip


@torch.no_grad()
def _fit(x: Tensor, labels: Tensor, cfg: LinearConfig, *, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """weight [G, R, F, C] and bias [G, R, C] of all classifiers; x [n, F], labels [G, n]."""
    (n, F), G, R, C = x.shape, len(labels), len(cfg.rates), classes
    batch = min(cfg.batch_size, n)
    weight, bias = x.new_zeros(F, G * R * C), x.new_zeros(G * R * C)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = torch.tensor(cfg.rates, device=x.device).view(1, R, 1).expand(G, R, C).reshape(-1)
    minus = x.new_full((), -1.0).expand(batch, G, R, 1)
    order = _batches(n, batch, cfg.steps, seed).to(x.device)
    for step in range(cfg.steps):
        rows = order[step]
        inputs = x[rows]
        p = torch.addmm(bias, inputs, weight).view(batch, G, R, C).softmax(dim=3)
        p.scatter_add_(3, labels[:, rows].T[:, :, None, None].expand(batch, G, R, 1), minus)
        gradient = p.view(batch, -1).div_(batch)
        weight_momentum.mul_(MOMENTUM).addmm_(inputs.T, gradient).add_(weight, alpha=cfg.weight_decay)
        bias_momentum.mul_(MOMENTUM).add_(gradient.sum(dim=0))
        scaled = rates * (0.5 + 0.5 * math.cos(math.pi * step / cfg.steps))
        weight.addcmul_(weight_momentum, scaled, value=-1)
        bias.addcmul_(bias_momentum, scaled, value=-1)
    return weight.view(F, G, R, C).permute(1, 2, 0, 3), bias.view(G, R, C)


def _batches(n: int, batch: int, steps: int, seed: int) -> Tensor:
    """[steps, batch] places in n: whole passes in random order, each without its last part batch."""
    generator = torch.Generator().manual_seed(seed)
    per_pass = n // batch
    passes = [torch.randperm(n, generator=generator)[: per_pass * batch] for _ in range(-(-steps // per_pass))]
    return torch.cat(passes).view(-1, batch)[:steps]


def official_probe(
    features: Tensor,  # [n, F]
    labels: Tensor,  # [n] int64
    splits: list[tuple[NDArray, NDArray]],  # one a seed, of equal sizes
    *,
    classes: int,
    seeds: list[int],  # one a split
    epochs: int = OFFICIAL_EPOCHS,
) -> LinearProbe:
    """The authors' protocol, one classifier for each split, all in the same steps: nn.Linear on features as they are,
    Adam at 3e-4 with decay 1e-6, batches of 64, and after every epoch a look at the 15 % held out, whose best epoch is
    kept.
    """
    G, F = len(splits), features.shape[1]
    layers = [_fresh(F, classes, seed) for seed in seeds]
    weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]).to(features.device))
    bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]).to(features.device))
    optimizer = torch.optim.Adam([weight, bias], lr=OFFICIAL_RATE, weight_decay=OFFICIAL_DECAY, fused=True)
    train, held = (torch.from_numpy(np.stack(part)).to(features.device) for part in zip(*splits, strict=True))
    n, batch = train.shape[1], min(OFFICIAL_BATCH, train.shape[1])
    best = [(-1.0, weight[g].detach().clone(), bias[g].detach().clone()) for g in range(G)]
    plain = torch.zeros(F, device=features.device), torch.ones(F, device=features.device)
    minus = features.new_full((), -1.0).expand(G, batch, 1)
    for epoch in range(epochs):
        orders = [_batches(n, batch, n // batch, mixed(seed, epoch)) for seed in seeds]
        order = torch.stack(orders).to(train.device)  # [G, steps, B]
        images = train.gather(1, order.flatten(1)).view(order.shape)
        for rows in images.unbind(dim=1):
            inputs = features[rows]
            # The gradient of softmax cross-entropy, each classifier's by itself, without autograd.
            p = torch.baddbmm(bias.detach()[:, None], inputs, weight.detach()).softmax(dim=2)
            gradient = p.scatter_add_(2, labels[rows][:, :, None], minus).div_(batch)
            weight.grad, bias.grad = inputs.transpose(1, 2) @ gradient, gradient.sum(dim=1)
            optimizer.step()
        for g in range(G):
            now = LinearProbe(*plain, weight.detach()[g : g + 1], bias.detach()[g : g + 1], (), ())
            (score,) = now.accuracy(features[held[g]], labels[held[g]])
            if score > best[g][0]:
                best[g] = (score, weight[g].detach().clone(), bias[g].detach().clone())
    scores, weights, biases = zip(*best, strict=True)
    return LinearProbe(*plain, torch.stack(weights), torch.stack(biases), (OFFICIAL_RATE,) * G, scores)


def _fresh(width: int, classes: int, seed: int) -> nn.Linear:
    """torch's own initial weights; its global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, classes)


def mixed(seed: int, epoch: int) -> int:
    """A seed for each epoch."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
