"""Parameter groups, optimizers by name and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from timm.optim import Lars
from torch import nn

from engine.config import OptimizerConfig


def build_optimizer(module: nn.Module, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of one peer; biases and norm layers form a group of their own where the configuration says so."""
    groups = parameter_groups(module, cfg)
    if cfg.name == "adam":
        return torch.optim.Adam(groups, betas=cfg.betas, lr=cfg.lr, weight_decay=cfg.weight_decay)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, betas=cfg.betas, lr=cfg.lr, weight_decay=cfg.weight_decay)
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, momentum=cfg.momentum, lr=cfg.lr, weight_decay=cfg.weight_decay)
    # You et al. 2017, arXiv 1708.03888
    return Lars(groups, momentum=cfg.momentum, lr=cfg.lr, weight_decay=cfg.weight_decay)


def parameter_groups(module: nn.Module, cfg: OptimizerConfig) -> list[dict]:
    """All parameters in one group, or [weights], [biases and norm layers without weight decay]."""
    exclude = cfg.name == "lars" if cfg.exclude_bias_and_norm is None else cfg.exclude_bias_and_norm
    # timm's LARS adapts only what has weight decay: without this a weight_decay of 0 would turn it into SGD
    adapt, plain = ({"always_adapt": True}, {"always_adapt": False}) if cfg.name == "lars" else ({}, {})
    if not exclude:
        return [{"params": list(module.parameters()), **adapt}]
    weights = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": weights, **adapt}, {"params": others, "weight_decay": 0.0, **plain}]


def learning_rate(cfg: OptimizerConfig, step: int, *, steps: int, steps_per_epoch: int) -> float:
    """The rate of `step` (from 0) of `steps`: linear warm-up from lr / warmup, then constant or half a cosine to zero.

    A pure function of the step, so that a resumed run needs no schedule state.
    """
    warmup = round(cfg.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.lr
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
