"""Optimizers by name, parameter groups, and learning rates as pure functions of the step."""

from __future__ import annotations

import importlib
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config, ConfigError
from engine.optimizer_config import OptimizerConfig
from engine.schedules import Pace, momentum_at

# -- optimizers --------------------------------------------------------------------------------------------------------


def build_optimizer(
    module: nn.Module, cfg: OptimizerConfig, *, batch_size: int, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of one peer by its name, at the rate that `base_rate` gives the global batch.

    With g the gradient, wd the weight decay and m, v Adam's bias-corrected moments:

        adam   w -= lr m / (sqrt(v) + 1e-8), wd w added to g         Kingma & Ba 2014, arXiv 1412.6980
        adamw  w -= lr (m / (sqrt(v) + 1e-8) + wd w)                 Loshchilov & Hutter 2017, arXiv 1711.05101
        sgd    u = momentum u + g + wd w, w -= lr u
        lars   r = eta |w| / |g + wd w|,                             You et al. 2017, arXiv 1708.03888, as SimCLR has it
               u = momentum u + lr r (g + wd w), w -= u              (lr_in_momentum: false: as sgd, r (g + wd w) in u)
        lamb   u = m / (sqrt(v) + 1e-6) + wd w, w -= lr u |w| / |u|  You et al. 2019, arXiv 1904.00962, phi(z) = z

    apex.fused_sgd, apex.fused_adam and apex.fused_lamb compute what sgd, adam and lamb do.  None clips gradients:
    engine.deepspeed.gradient_clipping does.

    `fused`: adam, adamw and sgd of weights on a GPU as one kernel, which a CUDA graph can hold.

    Raises ConfigError for an apex optimizer that cannot run, or that would be silently wrong.
    """
    groups = parameter_groups(module, cfg)
    common: dict[str, Any] = {"lr": base_rate(cfg, batch_size), "weight_decay": cfg.weight_decay}
    one_kernel: dict[str, Any] = {"fused": True, "capturable": True} if fused else {}
    match cfg.name:
        case "adam":
            return torch.optim.Adam(groups, betas=cfg.betas, **common, **one_kernel)
        case "adamw":
            return torch.optim.AdamW(groups, betas=cfg.betas, **common, **one_kernel)
        case "sgd":
            return torch.optim.SGD(groups, momentum=cfg.momentum, fused=fused or None, **common)
        case "lars":
            from kernels import Lars

            return Lars(groups, momentum=cfg.momentum, eta=cfg.eta, lr_in_momentum=cfg.lr_in_momentum, **common)
        case "lamb":
            from timm.optim import Lamb

            # timm clips the whole gradient at 1.0 unless told otherwise; the paper's algorithm 2 does not.
            return Lamb(groups, betas=cfg.betas, max_grad_norm=None, **common)
        case _:
            return _build_apex(module, groups, cfg, common)


def parameter_groups(module: nn.Module, cfg: OptimizerConfig) -> list[dict[str, Any]]:
    """All parameters in one group, or [weights], [biases and norm layers without weight decay and ratio per layer]."""
    adapt: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    if cfg.name == "lars":
        plain = {"adapt": False}
    elif cfg.name == "lamb":
        # timm adapts only what has weight decay: without this a weight_decay of 0 would turn LAMB into Adam.
        adapt, plain = {"always_adapt": True}, {"always_adapt": False}
    trained = [p for p in module.parameters() if p.requires_grad]
    if not cfg.excludes_bias_and_norm:
        return [{"params": trained, **adapt}]
    weights = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    groups = [{"params": weights, **adapt}, {"params": others, "weight_decay": 0.0, **plain}]
    return [group for group in groups if group["params"]]  # apex's FusedAdam fails on an empty group


# -- apex --------------------------------------------------------------------------------------------------------------

_APEX = {"apex.fused_sgd": "FusedSGD", "apex.fused_adam": "FusedAdam", "apex.fused_lamb": "FusedLAMB"}
_INSTALL = (
    "install it with: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation "
    "git+https://github.com/NVIDIA/apex (with the CUDA toolkit of this torch; PyPI's apex is another project), "
    "or use {}"
)


def check_optimizer(cfg: OptimizerConfig, device: torch.device) -> None:
    """Raises ConfigError where the optimizer cannot run on this machine, before anything is built."""
    if cfg.name in _APEX:
        _refuse_device(cfg.name, device)
        _apex_class(cfg.name)


def _build_apex(module: nn.Module, groups: list, cfg: OptimizerConfig, common: dict[str, Any]) -> torch.optim.Optimizer:
    for key, p in module.named_parameters():
        _refuse_device(cfg.name, p.device)
        if p.dtype != torch.float32:
            # FusedLAMB raises in its first step for bf16, and keeps the moments of fp16 weights in fp16.
            raise ConfigError(
                f"optimizer.name: {cfg.name} takes float32 parameters, found {p.dtype} at {key}: FusedSGD skips "
                "bfloat16 without a word, and no apex optimizer would keep a float32 copy; keep the weights float32 "
                f"(engine.precision=bf16 does), or use {_without_apex(cfg.name)}"
            )
    # Its kernels pair elements by their place in memory and take any mixture of layouts; torch gives gradients and
    # moments the strides of their weight, also for channels_last (engines.py).
    kind = _apex_class(cfg.name)
    match cfg.name:
        case "apex.fused_sgd":
            return kind(groups, momentum=cfg.momentum, **common)
        case "apex.fused_adam":
            return kind(groups, betas=cfg.betas, adam_w_mode=False, **common)  # apex's own default is AdamW
        case _:
            # No clipping: the kernel divides by |g| / max where |g| > max, and None is no number.  use_nvlamb adapts
            # every group; without it those with weight decay (optimizer_config.py refuses what neither can do).
            nvlamb = not cfg.excludes_bias_and_norm
            return kind(groups, betas=cfg.betas, max_grad_norm=math.inf, use_nvlamb=nvlamb, **common)


def _without_apex(name: str) -> str:
    return name.removeprefix("apex.fused_")


def _refuse_device(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(
            f"optimizer.name: {name} runs on NVIDIA GPUs alone, found device {device.type}; use {_without_apex(name)}"
        )


def _apex_class(name: str) -> Any:
    """NVIDIA apex's optimizer; importing apex proves nothing, its compiled module does."""
    key, install = f"optimizer.name: {name} needs NVIDIA apex", _INSTALL.format(_without_apex(name))
    spec = find_spec("apex")
    if spec is None:
        raise ConfigError(f"{key}, which is not installed; {install}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = folders[0] if folders else spec.origin
    # Looked for without importing: PyPI's apex may raise where its Pyramid is missing or too new.
    if not any((folder / "optimizers").is_dir() for folder in folders):
        raise ConfigError(
            f"{key}, found {found}, which has no apex.optimizers: another project, such as PyPI's apex (for Pyramid); "
            f"pip uninstall apex, then {install}"
        )
    try:
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        optimizers = importlib.import_module("apex.optimizers")
    except Exception as error:  # whatever a foreign or outdated build raises
        raise ConfigError(f"{key}, found {found}, which does not import ({_one_line(error)}); {install}") from None
    if not applier.available:
        reason = _one_line(getattr(applier, "import_err", None) or "not built")
        raise ConfigError(f"{key} with its CUDA extension amp_C, found {found} without it ({reason}); {install}")
    return getattr(optimizers, _APEX[name])


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


# -- learning rates ----------------------------------------------------------------------------------------------------


def base_rate(cfg: OptimizerConfig, batch_size: int) -> float:
    """The rate that schedules start from, for the global batch B: lr, lr B / 256 or lr sqrt(B).

    The linear and square-root rules of SimCLR: Chen et al. 2020, arXiv 2002.05709, B.1.
    """
    match cfg.lr_scaling:
        case "linear":
            return cfg.lr * batch_size / 256
        case "sqrt":
            return cfg.lr * math.sqrt(batch_size)
        case _:
            return cfg.lr


def describe_scaling(cfg: Config) -> list[str]:
    """One line for each peer whose rate a rule scales: what it resolved to."""
    batch = cfg.data.batch_size
    by = {"linear": f"{batch} / 256", "sqrt": f"sqrt({batch})"}
    return [
        f"peer {peer.name}: learning rate {base_rate(peer.optimizer, batch):.6g} = {peer.optimizer.lr:g} x "
        f"{by[peer.optimizer.lr_scaling]} (peers.{i}.optimizer.lr_scaling={peer.optimizer.lr_scaling}, "
        f"data.batch_size={batch})"
        for i, peer in cfg.trained
        if peer.optimizer.lr_scaling != "none"
    ]


def learning_rate(cfg: OptimizerConfig, step: int, *, steps: int, steps_per_epoch: int, batch_size: int) -> float:
    """The rate of `step` (from 0) of `steps`: linear warm-up from base / warmup, then the schedule.

        constant  base
        cosine    base (1 + cos(pi t)) / 2, t the share of the steps after the warm-up   Loshchilov & Hutter 2016,
                                                                                         arXiv 1608.03983
        step      base gamma^k, k the number of milestones reached

    A pure function of the step, so that a resumed run needs no schedule state.
    """
    base = base_rate(cfg, batch_size)
    warmup = round(cfg.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return base * (step + 1) / warmup
    match cfg.schedule:
        case "cosine":
            return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        case "step":
            return base * cfg.gamma ** sum(step >= round(epoch * steps_per_epoch) for epoch in cfg.milestones)
        case _:
            return base


def paces(cfg: Config, step: int, *, steps: int, steps_per_epoch: int) -> dict[int, Pace]:
    """Learning rate and momentum in `step` of each peer that trains, by its place in the configuration."""
    length = {"steps": steps, "steps_per_epoch": steps_per_epoch, "batch_size": cfg.data.batch_size}
    return {
        i: Pace(learning_rate(peer.optimizer, step, **length), momentum_at(peer.objective, step, steps=steps))
        for i, peer in cfg.trained
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group; one that a CUDA graph reads keeps its memory."""
    for group in optimizer.param_groups:
        held = group["lr"]
        if isinstance(held, Tensor) and held.is_cuda:
            held.fill_(lr)
        else:
            group["lr"] = lr
