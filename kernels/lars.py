"""LARS over all tensors of a model at once.

Backends:

  native   CPUs and NVIDIA GPUs, where `kernels._native` was built for them: on a GPU three launches a step whatever the
           number of tensors, on a CPU two passes over all of them.  Sums do not depend on threads: equal to the bit.
  torch    any device: torch's foreach functions, with a copy of the gradients.

`auto` is native where it is built for a parameter's device, and torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kernels import native

BACKENDS = ("auto", "native", "torch")


class Lars(torch.optim.Optimizer):
    """LARS, a rate of its own for each tensor (You et al. 2017, arXiv 1708.03888; as SimCLR's code has it).

    With w a parameter, g its gradient, v its momentum buffer, wd the weight decay and |.| the norm of the whole tensor:

        u = g + wd w        r = eta |w| / |u|, or 1 where either norm is zero and in groups with adapt=False

        lr_in_momentum=True     v = momentum v + lr r u,    w -= v          You et al., SimCLR's code
        lr_in_momentum=False    v = momentum v + r u,       w -= lr v       PyTorch's SGD, timm

    The two differ only while lr changes.  (You et al. divide by |g| + wd |w|, which |u| never exceeds; SimCLR by |u|.)
    Parameter groups take all options but `backend`, and `adapt`, for biases and norm layers, is theirs alone.

    Parameters are float32, gradients float32 or bfloat16; one whose gradient is None is left alone.  A NaN in a
    gradient makes the whole parameter NaN.  `momentum_buffer` is the state, as of torch's SGD.  Norms are summed in
    float64 on a CPU; on a GPU, and by the torch backend, in float32, so for entries from about 1e-18 to 1e18.

    `lr` may be a 0-d float32 tensor; on the parameters' GPU it is read there, so that a captured CUDA graph follows it.
    Graphs hold the other numbers as they were, need the optimizer to stay alive, and are captured behind a first step.

    Raises ValueError, naming the argument: numbers out of range, parameters that are not dense float32, an unknown
    backend, one that does not run on a parameter's device, a parameter twice; in `step`, gradients of another kind, and
    in a capture a float lr or a first step with momentum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        lr_in_momentum: bool = True,
        backend: str = "auto",
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
        self._backend = backend
        self._cores: dict[torch.device, Any] = {}
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True,
            "lr_in_momentum": lr_in_momentum,
        }  # fmt: skip
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own; what they leave out is as it was given to the optimizer."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)
        group = {**param_group, "params": params}  # a set is for torch to refuse
        _check_options({**self.defaults, **group})
        given = [p[1] if isinstance(p, tuple) else p for p in params]  # with their names
        if len({id(p) for p in given}) < len(given):  # torch warns alone; here two threads would update one memory
            raise ValueError("params: a parameter stands twice in a group, each is expected once")
        for i, p in enumerate(given):
            if isinstance(p, Tensor):
                _check_parameter(i, p)
                self._chosen(p.device)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, where given, computes loss and gradients again, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for device, batch in self._batches().items():
            settings = [_settings(self.param_groups[number], device) for number in batch.numbers]
            if self._chosen(device) == "torch":
                _check_gradients(batch)
                for i, each in enumerate(settings):
                    _torch_step(batch.of_group(i), each)
            else:
                core: Any = native.core
                groups = [core.LarsGroup(**each._asdict()) for each in settings]
                self._core_of(device).step(batch.params, batch.grads, batch.momenta, batch.group_of, groups)
        return loss

    # -- state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:  # also part of load_state_dict
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", "auto")
        self.__dict__.setdefault("_cores", {})  # a captured graph reads those of the optimizer that made it
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; what its groups do not say, such as `adapt` in torch's SGD, stays as it is here."""
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            own = [{name: group[name] for name in self.defaults} for group in self.param_groups]
            saved = [{**kept, **group} for kept, group in zip(own, saved, strict=True)]
            for group in saved:
                _check_options(group)
        super().load_state_dict({**state_dict, "param_groups": saved})

    def _batches(self) -> dict[torch.device, _Batch]:
        """The parameters that have a gradient, by device."""
        # A GPU may wait for this loop: for each tensor no call but those that it needs.
        batches: dict[torch.device, _Batch] = {}
        for number, group in enumerate(self.param_groups):
            state = self.state if group["momentum"] != 0 else None
            last, place, v = None, 0, None
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                device = p.device
                if device != last:
                    last, batch = device, batches.setdefault(device, _Batch([], [], [], [], []))
                    if number not in batch.numbers:
                        batch.numbers.append(number)
                    place = len(batch.numbers) - 1
                if state is not None:
                    v = state[p].get("momentum_buffer")
                    if v is None:
                        v = state[p]["momentum_buffer"] = _new_momentum_buffer(p)
                batch.params.append(p)
                batch.grads.append(g)
                batch.momenta.append(v)
                batch.group_of.append(place)
        return batches

    # -- backends

    def _chosen(self, device: torch.device) -> str:
        """`native` or `torch`; raises ValueError where the one asked for does not run."""
        if self._backend == "torch":
            return "torch"
        unfit = _unfit_for_native(device)
        if self._backend == "native" and unfit:
            raise ValueError(f"backend: 'native' does not fit: {unfit}; use 'torch' or 'auto'")
        return "torch" if unfit else "native"

    def _core_of(self, device: torch.device) -> Any:
        if device not in self._cores:
            core: Any = native.core
            self._cores[device] = core.Lars(str(device))
        return self._cores[device]


def _unfit_for_native(device: torch.device) -> str:
    """Why the native backend cannot run on a device; empty where it can."""
    if native.core is None:
        return native.missing
    if device.type == "cuda":
        return "" if native.core.has_cuda else f"kernels._native is without CUDA: {native.core.left_out}"
    return "" if device.type == "cpu" else f"parameters on {device}, a CPU or an NVIDIA GPU is needed"


# -- checks --------------------------------------------------------------------------------------------------------


def _check_options(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.ndim != 0 or lr.dtype != torch.float32:
            raise ValueError(f"lr: a number >= 0 or a 0-d float32 tensor, found {lr.dtype} of shape {list(lr.shape)}")
    else:
        _check_number("lr", lr, float("inf"))
    _check_number("momentum", group["momentum"], 1.0)
    _check_number("weight_decay", group["weight_decay"], float("inf"))
    _check_number("eta", group["eta"], float("inf"))
    for name in ("adapt", "lr_in_momentum"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name}: True or False, found {group[name]!r}")


def _check_number(name: str, value: Any, most: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value <= most and value < float("inf")):
        allowed = "a finite number >= 0" if most == float("inf") else f"a number from 0 to {most:g}"
        raise ValueError(f"{name}: {allowed}, found {value!r}")


def _check_parameter(i: int, p: Tensor) -> None:
    if p.dtype != torch.float32 or p.layout != torch.strided:
        raise ValueError(f"params[{i}]: a dense float32 tensor is expected, found {p.dtype}, {p.layout}")


def _check_gradients(batch: _Batch) -> None:
    # As bindings.cpp has it for the native backend.
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        _check_parameter(i, p)
        if g.layout != torch.strided:
            raise ValueError(f"grads[{i}]: a dense tensor is expected, found {g.layout}")
        if g.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"grads[{i}]: float32 or bfloat16 is expected, found {g.dtype}")


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _new_momentum_buffer(p: Tensor) -> Tensor:
    if _capturing(p.device):  # its zeros would be part of the graph
        raise ValueError("momentum: no buffer yet; take a step before a CUDA graph is captured")
    return torch.zeros_like(p, memory_format=torch.preserve_format)


# -- one step ------------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """What one device has to do."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor | None]
    group_of: list[int]  # place in `numbers`
    numbers: list[int]  # of the parameter groups that take part

    def of_group(self, i: int) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        own = [k for k, group in enumerate(self.group_of) if group == i]
        return [self.params[k] for k in own], [self.grads[k] for k in own], [self.momenta[k] for k in own]


class _Settings(NamedTuple):
    """A parameter group's numbers on one device."""

    lr: float
    lr_tensor: Tensor | None  # in place of lr
    momentum: float
    weight_decay: float
    eta: float
    adapt: bool
    lr_in_momentum: bool


def _settings(group: dict[str, Any], device: torch.device) -> _Settings:
    lr = group["lr"]
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    if on_device and lr.device != device:
        raise ValueError(f"lr: a tensor on {lr.device}, parameters are on {device}; put it there, or on the CPU")
    if not on_device and _capturing(device):
        raise ValueError(
            f"lr: {lr!r} would be frozen in the CUDA graph; a 0-d float32 tensor on {device} is read in every replay"
        )
    rate, tensor = (0.0, lr) if on_device else (float(lr), None)
    return _Settings(
        rate, tensor, group["momentum"], group["weight_decay"], group["eta"], group["adapt"], group["lr_in_momentum"]
    )


def _torch_step(tensors: tuple[list[Tensor], list[Tensor], list[Tensor | None]], settings: _Settings) -> None:
    params, grads, momenta = tensors
    lr = settings.lr if settings.lr_tensor is None else settings.lr_tensor
    if grads[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads):
        u = list(torch._foreach_add(grads, params, alpha=settings.weight_decay))
    else:
        u = list(torch._foreach_mul(params, settings.weight_decay))
        torch._foreach_add_(u, grads)
    inside = lr if settings.lr_in_momentum else 1.0
    if settings.adapt:
        w_norm, u_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(u))
        ratio = torch.where((w_norm == 0) | (u_norm == 0), 1.0, settings.eta * w_norm / u_norm)
        torch._foreach_mul_(u, (inside * ratio).unbind())
    elif settings.lr_in_momentum:
        torch._foreach_mul_(u, inside)
    step: tuple[Tensor, ...] | list[Tensor] = u
    if settings.momentum != 0:
        v = cast(list[Tensor], momenta)
        torch._foreach_mul_(v, settings.momentum)
        torch._foreach_add_(v, u)
        step = v
    if settings.lr_in_momentum:
        torch._foreach_sub_(params, step)
    else:
        torch._foreach_sub_(params, torch._foreach_mul(step, lr))
