"""Parameter groups, names, schedules, scaling rules, and apex without apex."""

import copy
import io
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler

from engine import engines, optimizers
from engine.config import ConfigError, parse_config
from engine.optimizer_config import OptimizerConfig
from engine.optimizers import (
    base_rate,
    build_optimizer,
    check_optimizer,
    describe_scaling,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from engine.placement import place

NAMES = ["adam", "adamw", "sgd", "lars", "lamb"]
LENGTH = {"steps": 50, "steps_per_epoch": 10, "batch_size": 256}


def network(**kind) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, **kind), nn.BatchNorm2d(4, **kind), nn.Flatten(), nn.Linear(4, 2, **kind)
    )  # fmt: skip


def build(module: nn.Module, **options) -> torch.optim.Optimizer:
    return build_optimizer(module, OptimizerConfig(**options), batch_size=256)


def rates(cfg: OptimizerConfig, **length) -> list[float]:
    length = {**LENGTH, **length}
    return [learning_rate(cfg, step, **length) for step in range(length["steps"])]


# -- names and groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_give_their_optimizers(name):
    import timm.optim

    import kernels

    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "lamb": timm.optim.Lamb}
    own = {"momentum": 0.8} if name in ("sgd", "lars") else {"betas": (0.8, 0.9)}
    optimizer = build(network(), name=name, lr=0.1, weight_decay=0.01, **own)
    assert type(optimizer) is (kernels.Lars if name == "lars" else kinds[name])
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1
        assert {key: group[key] for key in own} == own
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("name", "exclude", "groups"),
    [("adam", None, 1), ("sgd", None, 1), ("apex.fused_sgd", None, 1), ("lars", None, 2), ("lamb", None, 2),
     ("apex.fused_lamb", None, 2), ("adam", True, 2), ("lars", False, 1), ("lamb", False, 1)],
)  # fmt: skip
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


def test_no_group_is_empty():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), OptimizerConfig(name="lars"))) == 1


# -- what a step does --------------------------------------------------------------------------------------------------

RATES = (0.5, 0.2, 0.8)  # a rate that changes tells the two forms of LARS apart


def stepped(**options) -> tuple[list[tuple[torch.Tensor, list[torch.Tensor]]], list[torch.Tensor]]:
    """Each parameter's start in float64 and its gradients, three steps of RATES, and where they took it."""
    module = network()
    optimizer = build(module, lr=1.0, **options)
    generator = torch.Generator().manual_seed(1)
    parameters = list(module.parameters())
    given = [(p.detach().double().clone(), []) for p in parameters]
    for rate in RATES:
        for p, (_, gradients) in zip(parameters, given, strict=True):
            p.grad = 3 * torch.randn(p.shape, generator=generator)
            gradients.append(p.grad.double().clone())
        set_learning_rate(optimizer, rate)
        optimizer.step()
    return given, [p.detach().double() for p in parameters]


@pytest.mark.parametrize("exclude", [None, False])
@pytest.mark.parametrize("decay", [0.1, 0.0])
@pytest.mark.parametrize("lr_in_momentum", [True, False])
def test_lars_is_the_formula_it_names(decay, lr_in_momentum, exclude):
    given, found = stepped(
        name="lars", weight_decay=decay, momentum=0.9, eta=0.02, lr_in_momentum=lr_in_momentum,
        exclude_bias_and_norm=exclude,
    )  # fmt: skip
    for (w, gradients), result in zip(given, found, strict=True):
        excluded = exclude is None and w.ndim == 1
        wd, v = 0.0 if excluded else decay, torch.zeros_like(w)
        for rate, g in zip(RATES, gradients, strict=True):
            plain = excluded or w.norm() == 0  # a BatchNorm's shift starts at zero
            ratio = 1.0 if plain else 0.02 * w.norm() / (g + wd * w).norm()
            v = 0.9 * v + (rate if lr_in_momentum else 1.0) * ratio * (g + wd * w)
            w = w - (1.0 if lr_in_momentum else rate) * v
        torch.testing.assert_close(result, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exclude", [None, False])
@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_lamb_is_the_formula_it_names(decay, exclude):
    given, found = stepped(name="lamb", weight_decay=decay, betas=(0.8, 0.9), exclude_bias_and_norm=exclude)
    for (w, gradients), result in zip(given, found, strict=True):
        excluded = exclude is None and w.ndim == 1
        wd, m, v = 0.0 if excluded else decay, torch.zeros_like(w), torch.zeros_like(w)
        for t, (rate, g) in enumerate(zip(RATES, gradients, strict=True), start=1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            u = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6) + wd * w
            ratio = 1.0 if excluded or w.norm() == 0 else w.norm() / u.norm()
            w = w - rate * ratio * u
        torch.testing.assert_close(result, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_reloaded_optimizer_goes_on_to_the_bit(name):
    def run(module, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            set_learning_rate(optimizer, 0.01 * (step + 1))
            for p in module.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    module = network()
    optimizer = build(module, name=name, weight_decay=0.1)
    run(module, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    fresh = build(other, name=name, weight_decay=0.1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    run(module, optimizer, range(3, 6))
    run(other, fresh, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [("adam", {"lr": 0.02}), ("adamw", {"lr": 0.02}), ("sgd", {"lr": 0.05}), ("lars", {"lr": 0.05, "eta": 0.3}),
     ("lamb", {"lr": 0.02})],
)  # fmt: skip
def test_every_name_fits_a_small_problem(name, options):
    module = network()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(64, 3, 3, 3, generator=generator)
    target = images.mean((2, 3)) @ torch.randn(3, 2, generator=generator)
    optimizer = build(module, name=name, **options)
    losses = []
    for _ in range(60):
        loss = (module(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# -- learning rates ----------------------------------------------------------------------------------------------------


def test_constant_schedule_is_constant():
    assert set(rates(OptimizerConfig(lr=0.1))) == {0.1}


def test_warmup_then_cosine():
    found = rates(OptimizerConfig(lr=2.0, schedule="cosine", warmup_epochs=1.0))
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[10] == 2.0
    assert found[30] == pytest.approx(1.0)
    assert found[49] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))
    assert all(a > b for a, b in zip(found[10:], found[11:], strict=False))


def test_warmup_then_steps():
    cfg = OptimizerConfig(lr=2.0, schedule="step", warmup_epochs=0.5, milestones=(0.5, 2.0, 3.25), gamma=0.5)
    # The first milestone falls on the warm-up's end; 3.25 epochs of 10 steps round to step 32.
    expected = [0.4, 0.8, 1.2, 1.6, 2.0] + [1.0] * 15 + [0.5] * 12 + [0.25] * 18
    assert rates(cfg) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_schedules_are_those_of_torch(schedule, warmup):
    milestones = (2.5, 4) if schedule == "step" else ()
    cfg = OptimizerConfig(lr=0.3, schedule=schedule, warmup_epochs=warmup, milestones=milestones)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    w = 10 * warmup
    after = {
        "constant": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=50 - w),
        "step": lambda: lr_scheduler.MultiStepLR(optimizer, [25 - w, 40 - w], gamma=0.1),
    }[schedule]
    if warmup:
        first = lr_scheduler.LinearLR(optimizer, start_factor=1 / w, total_iters=w - 1)
        scheduler = lr_scheduler.SequentialLR(optimizer, [first, after()], milestones=[w])
    else:
        scheduler = after()
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(cfg) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"schedule": "step", "milestones": (6.0,)}])
def test_such_a_rate_does_not_depend_on_the_length_of_the_run(options):
    cfg = OptimizerConfig(lr=1.0, warmup_epochs=5.0, **options)
    short, long = (rates(cfg, steps=n, steps_per_epoch=2)[:13] for n in (13, 600))
    assert short == long
    assert short[:3] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("rule", "lr", "batch", "expected"),
    [("none", 0.3, 4096, 0.3), ("linear", 0.3, 4096, 4.8), ("linear", 0.3, 256, 0.3), ("linear", 0.3, 64, 0.075),
     ("sqrt", 0.075, 4096, 4.8), ("sqrt", 0.075, 256, 1.2), ("sqrt", 0.075, 32, 0.4242640687)],
)  # fmt: skip
def test_scaling_rules_are_those_of_simclr(rule, lr, batch, expected):
    cfg = OptimizerConfig(name="sgd", lr=lr, lr_scaling=rule, schedule="cosine", warmup_epochs=1)
    assert base_rate(cfg, batch) == pytest.approx(expected, rel=1e-9)
    assert build_optimizer(network(), cfg, batch_size=batch).param_groups[0]["lr"] == base_rate(cfg, batch)
    unscaled = rates(OptimizerConfig(lr=1.0, schedule="cosine", warmup_epochs=1))
    assert rates(cfg, batch_size=batch) == pytest.approx([expected * rate for rate in unscaled], rel=1e-9)
    assert cfg.lr == lr


def test_what_a_rule_resolved_to_is_one_line_a_peer(settings):
    assert describe_scaling(parse_config(settings)) == []
    settings["data"]["batch_size"] = 1024
    settings["peers"][0]["optimizer"] = {"lr": 0.3, "lr_scaling": "linear"}
    settings["peers"][1]["optimizer"] = {"lr": 0.075, "lr_scaling": "sqrt"}
    assert describe_scaling(parse_config(settings)) == [
        "peer a: learning rate 1.2 = 0.3 x 1024 / 256 (peers.0.optimizer.lr_scaling=linear, data.batch_size=1024)",
        "peer b: learning rate 2.4 = 0.075 x sqrt(1024) (peers.1.optimizer.lr_scaling=sqrt, data.batch_size=1024)",
    ]


def test_setting_the_rate_reaches_every_group():
    optimizer = build(network(), name="lamb")
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# -- apex, which no machine of this project has: packages that stand in for it -----------------------------------------

APPLIER = """
class MultiTensorApply:
    available = {available}
    import_err = ImportError("libcudart.so.11: no such file")
multi_tensor_applier = MultiTensorApply()
"""

# The constructors' arguments as NVIDIA/apex has them (apex/optimizers/fused_*.py).
OPTIMIZERS = """
import torch
class Recorded(torch.optim.SGD):
    def record(self, params, lr, **given):
        self.given = given
        super().__init__(params, lr=lr, weight_decay=given["weight_decay"])
class FusedSGD(Recorded):
    def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, wd_after_momentum=False):
        self.record(params, lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
                    wd_after_momentum=wd_after_momentum)
class FusedAdam(Recorded):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0., amsgrad=False, set_grad_none=True, capturable=False):
        self.record(params, lr, bias_correction=bias_correction, betas=betas, eps=eps, adam_w_mode=adam_w_mode,
                    weight_decay=weight_decay)
class FusedLAMB(Recorded):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_nvlamb=False):
        self.record(params, lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay,
                    adam_w_mode=adam_w_mode, grad_averaging=grad_averaging, max_grad_norm=max_grad_norm,
                    use_nvlamb=use_nvlamb)
"""

CUDA = torch.device("cuda")
INSTALL = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package `apex` of some files where Python finds it first."""
    forget = [name for name in sys.modules if name.split(".")[0] == "apex"]
    for name in forget:
        monkeypatch.delitem(sys.modules, name)

    def put(files: dict[str, str]) -> None:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "site" / "apex" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "site")

    yield put
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def nvidia(available: bool = True) -> dict[str, str]:
    return {
        "multi_tensor_apply/__init__.py": APPLIER.format(available=available),
        "optimizers/__init__.py": OPTIMIZERS,
    }


def on_gpu(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network on a GPU that need not be there: its tensors have a device and a type, and no numbers."""
    with FakeTensorMode():
        return network(device="cuda", dtype=dtype)


def refusal(name: str = "apex.fused_sgd", device: torch.device = CUDA) -> str:
    with pytest.raises(ConfigError) as error:
        check_optimizer(OptimizerConfig(name=name), device)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_apex_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    message = refusal()
    assert message.startswith("optimizer.name: apex.fused_sgd needs NVIDIA apex, which is not installed; install it")
    assert INSTALL in message
    assert message.endswith("or use sgd")


def test_the_other_apex_of_pypi_is_not_taken_for_it(install, tmp_path):
    install({"__init__.py": "from pyramid.session import UnencryptedCookieSessionFactoryConfig"})
    message = refusal("apex.fused_adam")
    assert f"found {tmp_path}/site/apex, which has no apex.optimizers: another project" in message
    assert "pip uninstall apex, then install it with: " + INSTALL in message


def test_apex_without_its_extension(install):
    install(nvidia(available=False))
    message = refusal("apex.fused_lamb")
    assert "needs NVIDIA apex with its CUDA extension amp_C, found" in message
    assert "(libcudart.so.11: no such file)" in message
    assert INSTALL in message


def test_apex_that_does_not_import(install):
    install({**nvidia(), "__init__.py": "raise TypeError('built for another\\ntorch')"})
    assert "which does not import (built for another torch)" in refusal()


@pytest.mark.parametrize("name", ["apex.fused_sgd", "apex.fused_adam", "apex.fused_lamb"])
def test_apex_on_a_cpu_is_refused(install, name):
    install(nvidia())
    plain = name.removeprefix("apex.fused_")
    expected = f"optimizer.name: {name} runs on NVIDIA GPUs alone, found device cpu; use {plain}"
    assert refusal(name, torch.device("cpu")) == expected
    with pytest.raises(ConfigError, match="found device cpu"):
        build(network(), name=name)
    check_optimizer(OptimizerConfig(name=name), CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["apex.fused_sgd", "apex.fused_adam", "apex.fused_lamb"])
def test_weights_that_apex_would_not_update_soundly_are_refused(install, name, dtype):
    install(nvidia())
    with pytest.raises(
        ConfigError, match=rf"{name} takes float32 parameters, found {dtype} at 0.weight: FusedSGD skips"
    ):
        build(on_gpu(dtype), name=name)


def test_fused_sgd_is_given_what_sgd_is(install):
    install(nvidia())
    optimizer = build(on_gpu(), name="apex.fused_sgd", lr=0.2, momentum=0.8, weight_decay=0.1)
    assert type(optimizer).__name__ == "FusedSGD"
    assert optimizer.given == {
        "momentum": 0.8, "dampening": 0, "weight_decay": 0.1, "nesterov": False, "wd_after_momentum": False,
    }  # fmt: skip
    assert [group["lr"] for group in optimizer.param_groups] == [0.2]


def test_fused_adam_is_adam_and_not_adamw(install):
    install(nvidia())
    optimizer = build(on_gpu(), name="apex.fused_adam", betas=(0.8, 0.9), weight_decay=0.1)
    assert type(optimizer).__name__ == "FusedAdam"
    reference = torch.optim.Adam(network().parameters())
    assert optimizer.given == {
        "bias_correction": True, "betas": (0.8, 0.9), "eps": reference.defaults["eps"], "adam_w_mode": False,
        "weight_decay": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("decay", "exclude", "nvlamb", "decays"), [(0.1, None, False, [0.1, 0.0]), (0.1, False, True, [0.1]),
                                               (0.0, False, True, [0.0])]
)  # fmt: skip
def test_fused_lamb_adapts_what_lamb_adapts_and_clips_nothing(install, decay, exclude, nvlamb, decays):
    install(nvidia())
    optimizer = build(on_gpu(), name="apex.fused_lamb", weight_decay=decay, exclude_bias_and_norm=exclude)
    assert type(optimizer).__name__ == "FusedLAMB"
    assert optimizer.given == {
        "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": decay, "adam_w_mode": True,
        "grad_averaging": True, "max_grad_norm": math.inf, "use_nvlamb": nvlamb,
    }  # fmt: skip
    # FusedLAMB: a group is adapted where use_nvlamb, or where it has weight decay.
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays


def test_apex_is_imported_only_when_asked_for(install, tmp_path):
    install({**nvidia(), "__init__.py": f"open({str(tmp_path / 'imported')!r}, 'w')"})
    for name in ("adam", "adamw", "sgd", "lamb"):
        check_optimizer(OptimizerConfig(name=name), CUDA)
        build(network(), name=name)
    assert not (tmp_path / "imported").exists()
    check_optimizer(OptimizerConfig(name="apex.fused_sgd"), CUDA)
    assert Path(tmp_path / "imported").exists()


def test_a_run_refuses_before_any_peer_is_built(settings, alone, monkeypatch):
    monkeypatch.setattr(engines, "build_peer", lambda *args, **options: pytest.fail("a peer was built"))
    settings["peers"][1]["optimizer"] = {"name": "apex.fused_sgd"}
    cfg = parse_config(settings)
    with pytest.raises(ConfigError, match="^peers.1.optimizer.name: apex.fused_sgd runs on NVIDIA GPUs alone"):
        engines.build_engines(cfg, place(cfg, alone, 32), 32)
