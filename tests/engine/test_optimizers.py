"""Parameter groups, names and schedules."""

import math

import pytest
import torch
from timm.optim import Lars
from torch import nn

from engine.config import OptimizerConfig
from engine.optimizers import build_optimizer, learning_rate, parameter_groups, set_learning_rate


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_names_give_their_optimizers():
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "lars": Lars}
    for name, kind in kinds.items():
        optimizer = build_optimizer(network(), OptimizerConfig(name=name, lr=0.1, weight_decay=0.01, momentum=0.8))
        assert type(optimizer) is kind
        assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
        if name in ("sgd", "lars"):
            assert optimizer.param_groups[0]["momentum"] == 0.8
    assert build_optimizer(network(), OptimizerConfig(betas=(0.8, 0.9))).param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "exclude", "groups"), [("adam", None, 1), ("lars", None, 2), ("adam", True, 2), ("lars", False, 1)]
)
def test_biases_and_norms_are_excluded_where_asked(name, exclude, groups):
    module = network()
    found = parameter_groups(module, OptimizerConfig(name=name, weight_decay=0.1, exclude_bias_and_norm=exclude))
    assert len(found) == groups
    everything = [id(p) for group in found for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in module.parameters())
    if groups == 2:
        assert found[1]["weight_decay"] == 0.0
        assert {id(p) for p in found[1]["params"]} == {
            id(module[0].bias),
            *map(id, module[1].parameters()),
            id(module[3].bias),
        }


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_lars_adapts_weights_and_leaves_biases_alone(decay):
    module = network()
    before = {key: value.clone() for key, value in module.named_parameters()}
    cfg = OptimizerConfig(name="lars", lr=0.5, weight_decay=decay, momentum=0.0)
    optimizer = build_optimizer(module, cfg)
    torch.manual_seed(1)
    gradients = {key: torch.randn_like(p) for key, p in module.named_parameters()}
    for key, p in module.named_parameters():
        p.grad = gradients[key].clone()
    optimizer.step()
    for key, p in module.named_parameters():
        w, g = before[key], gradients[key]
        if p.ndim > 1:  # trust ratio 0.001 |w| / (|g| + decay |w|), You et al. 2017
            ratio = 0.001 * w.norm() / (g.norm() + decay * w.norm())
            expected = w - 0.5 * ratio * (g + decay * w)
        else:
            expected = w - 0.5 * g
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


def test_constant_schedule_is_constant():
    cfg = OptimizerConfig(lr=0.1)
    assert {learning_rate(cfg, step, steps=50, steps_per_epoch=10) for step in range(50)} == {0.1}


def test_warmup_then_cosine():
    cfg = OptimizerConfig(lr=2.0, schedule="cosine", warmup_epochs=1.0)
    rates = [learning_rate(cfg, step, steps=50, steps_per_epoch=10) for step in range(50)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[30] == pytest.approx(1.0)
    assert rates[49] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_a_constant_rate_with_warmup_does_not_depend_on_the_length_of_the_run():
    cfg = OptimizerConfig(lr=1.0, warmup_epochs=5.0)
    short, long = ([learning_rate(cfg, step, steps=n, steps_per_epoch=2) for step in range(3)] for n in (3, 600))
    assert short == long == pytest.approx([0.1, 0.2, 0.3])


def test_setting_the_rate_reaches_every_group():
    optimizer = build_optimizer(network(), OptimizerConfig(name="lars"))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
