"""One DeepSpeed engine a peer: its generated configuration, its weights in full, its optimizer state.

What DeepSpeed does not do for a pair of convnets is done here and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from engine.batchnorm import convert_sync_bn
from engine.config import Config, ConfigError, keyed
from engine.distributed import Ranks, precision_of, rows_per_rank
from engine.optimizers import build_optimizer, check_optimizer
from engine.peers import Embedded, Peer, Views, build_peer
from engine.placement import Placement
from kernels import enqueue


def deepspeed_config(cfg: Config, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed configuration of every peer: what this project needs, with `engine.deepspeed` merged in.

    `ranks`: those that train a peer.

    Raises ConfigError where the user's section contradicts the rest of the configuration, or the batch does not divide.
    """
    generated: dict[str, Any] = {
        "train_batch_size": cfg.data.batch_size,
        "train_micro_batch_size_per_gpu": rows_per_rank(cfg.data.batch_size, ranks),
        # Accumulating would leave each micro-batch its own few negatives: another loss.
        "gradient_accumulation_steps": 1,
        # The losses are scaled for the mean over ranks (kernels/collectives.py).
        "gradient_allreduce_op": "mean",
        "zero_optimization": {"stage": cfg.engine.zero_stage},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": precision_of(cfg, ranks.device) == "bf16", "dtype": "bfloat16"},
    }
    if cfg.engine.concurrency == "streams" and cfg.engine.zero_stage >= 1:
        # Reductions on a stream of DeepSpeed's own, beside streams that it does not know of: gradients have been read
        # too early (deepspeedai/DeepSpeed #8061).
        generated["zero_optimization"]["overlap_comm"] = False
    defaults: dict[str, Any] = {
        # DeepSpeed clips at 1.0 unless told otherwise (0.19.8, runtime/constants.py); the method does not clip.
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,  # SGD; what would be wrong (LARS, LAMB) config.py refuses
        # Its throughput timer waits for the device twice a step (0.19.8, utils/timer.py); metrics.py has its own.
        "timers": {"throughput": {"enabled": False}},
        # An empty list keeps gradients in fp32 on the wire; the default sends those of convolutions as bf16.
        "torch_autocast": {"lower_precision_safe_modules": []},
    }
    for owned in ("optimizer", "scheduler"):
        if owned in cfg.engine.deepspeed:
            raise ConfigError(f"engine.deepspeed.{owned}: contradicts peers.*.optimizer, which sets it")
    _refuse_typos(cfg.engine.deepspeed)
    _refuse_contradictions(cfg.engine.deepspeed, generated, "engine.deepspeed")
    return _merged(_merged(defaults, cfg.engine.deepspeed), generated)


def _refuse_typos(given: Mapping[str, Any]) -> None:
    """DeepSpeed ignores a key it does not know; one that nearly spells a known one is a slip."""
    from deepspeed.runtime import constants

    names = {value for value in vars(constants).values() if isinstance(value, str) and value.isidentifier()}
    known = {*names, "zero_optimization", "zero_allow_untested_optimizer", "flops_profiler", "activation_checkpointing",
             "tensorboard", "csv_monitor", "comms_logger", "aio", "compile", "zero_force_ds_cpu_optimizer"}  # fmt: skip
    for key in given:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if near and key not in known:
            raise ConfigError(f"engine.deepspeed.{key}: DeepSpeed has no such key; did you mean {near[0]}?")


def _refuse_contradictions(given: Mapping[str, Any], generated: Mapping[str, Any], prefix: str) -> None:
    for key, value in given.items():
        if key not in generated:
            continue
        if isinstance(generated[key], Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}.{key}: found {value!r}, a mapping is expected")
            _refuse_contradictions(value, generated[key], f"{prefix}.{key}")
        elif value != generated[key]:
            raise ConfigError(
                f"{prefix}.{key}: {value!r} contradicts the rest of the configuration, which makes it "
                f"{generated[key]!r} ({_SET_BY.get(key, 'fixed by this engine')})"
            )


_SET_BY = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size over the ranks",
    "gradient_allreduce_op": "the losses are scaled for the mean over ranks",
    "gradient_accumulation_steps": "micro-batches would lose their negatives",
    "stage": "engine.zero_stage",
    "overlap_comm": "engine.concurrency=streams",
    "enabled": "engine.precision",
    "dtype": "engine.precision",
}


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


class PeerEngine:
    """A peer under its DeepSpeed engine."""

    def __init__(self, index: int, name: str, engine: Any, ranks: Ranks) -> None:
        self.index = index  # the peer's place in the configuration
        self.name = name
        self.engine = engine
        self.ranks = ranks  # those that train this peer
        self.zero_stage: int = engine.zero_optimization_stage()
        self._keys: Views | None = None  # of the momentum network, of the step under way
        self._towards = torch.zeros((), device=ranks.device)  # 1 - m, in memory, where a graph reads it

    @property
    def module(self) -> Peer:
        """The peer itself; under ZeRO 3 its parameters are in pieces outside of `full_parameters`."""
        return self.engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed steps; its groups carry the learning rate."""
        return self.engine.optimizer

    def embed(self, x: Tensor, y: Tensor) -> Embedded:
        """Embeddings [n, D] of both views, with gradient."""
        if not self.engine.torch_autocast_enabled():
            x, y = x.float(), y.float()  # a loader on a GPU gives float16
        embedded = self.module.embedded(self.engine(x, y))
        self._keys = embedded.k
        return embedded

    def backward(self, loss: Tensor) -> None:
        """Gradients of this peer's own loss, averaged over the ranks."""
        self.engine.backward(loss)

    def set_momentum(self, momentum: float | None) -> None:
        """Sets m of the momentum network, where there is one."""
        if momentum is not None:
            self._towards.fill_(1 - momentum)

    def step(self) -> None:
        """One optimizer step; gradients are cleared.  The momentum network follows, its queue takes what it made."""
        self.engine.step()
        if self.module.target is None:
            return
        with self._full_parameters(write=True, of=self.module.followed()):
            # Under ZeRO 3 the others take over the first rank's.
            self.module.follow(self._towards)
        if self.module.queue is not None:
            assert self._keys is not None
            enqueue(self.module.queue.keys, self.module.queue.position, *self._keys, group=self.ranks.group)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Backbone features [c, width] in float32, in evaluation mode; every rank must call it equally often."""
        module = self.module
        module.eval()
        try:
            with self._autocast():
                return module.encoder(images).float()
        finally:
            module.train()

    def _autocast(self) -> AbstractContextManager:
        if not self.engine.torch_autocast_enabled():
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=self.engine.torch_autocast_dtype())

    # -- state -----------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers, whole, on the CPU; a collective under ZeRO 3."""
        with self._full_parameters(write=False):
            return {key: value.detach().cpu().clone() for key, value in self.module.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes what `weights` gave; optimizer copies of the weights come with `load_optimizer_state`."""
        with self._full_parameters(write=True):
            self.module.load_state_dict(weights, strict=True)

    def optimizer_state(self) -> dict[str, Any]:
        """This rank's optimizer state as plain tensors, numbers, lists and dicts."""
        state = self.optimizer.state_dict()
        return {key: _plain(value) for key, value in state.items() if key not in _LIVE_OBJECTS}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Takes what `optimizer_state` gave on the same rank of a run of the same size."""
        if self.zero_stage == 0:
            self.optimizer.load_state_dict({**state, "param_groups": self._own_kernels(state["param_groups"])})
            return
        live = {key: value for key, value in self.optimizer.state_dict().items() if key in _LIVE_OBJECTS}
        every_rank: list[Any] = [None] * self.ranks.world
        every_rank[self.ranks.rank] = {**state, **live}
        zero: Any = self.optimizer
        zero.load_state_dict(every_rank, load_optimizer_states=True, load_from_fp32_weights=True)

    def _own_kernels(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups with the flags of this device's kernels: a run on a GPU may go on on a CPU."""
        flags = ("fused", "foreach", "capturable")
        own = [{key: group[key] for key in flags if key in group} for group in self.optimizer.param_groups]
        return [{**group, **kept} for group, kept in zip(saved, own, strict=True)]

    def _full_parameters(self, *, write: bool, of: list[Tensor] | None = None) -> AbstractContextManager:
        if self.zero_stage < 3:
            return nullcontext()
        import deepspeed

        parameters = list(self.module.parameters()) if of is None else of
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


# Entries of a ZeRO optimizer's state that are objects or enums of DeepSpeed: the running engine has its own.
_LIVE_OBJECTS = frozenset({"loss_scaler", "zero_stage", "param_slice_mappings"})


def _plain(value: Any) -> Any:
    """Tensors on the CPU, containers of Python's own types."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def build_engines(cfg: Config, placement: Placement, image_size: int) -> list[PeerEngine]:
    """The engines of this rank's peers; every rank must have the same seed, so that all start from the same weights."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    ranks = placement.own
    settings = deepspeed_config(cfg, ranks)
    # DeepSpeed keeps the last one that it was given.
    deepspeed.utils.groups.mpu = split = None if placement.sizes is None else placement
    for i, peer_cfg in cfg.trained:
        with keyed(i):
            check_optimizer(peer_cfg.optimizer, ranks.device)
    engines = []
    graph = None if cfg.distill is None or cfg.distill.graph is None else cfg.distill.graph.projection
    for i, peer_cfg in cfg.trained:
        with keyed(i):
            # Also one that others train: it draws its weights before the next.
            peer = build_peer(peer_cfg, image_size=image_size, graph=graph).to(ranks.device)
        if i not in placement.peers:
            continue
        if cfg.engine.sync_bn:  # before initialize: afterwards DeepSpeed holds the old modules
            convert_sync_bn(peer, ranks, traceable=cfg.engine.compile)
        if cfg.engine.compile:
            peer.compile_embedding()
        with keyed(i):
            # ZeRO >= 1 gives the optimizer flat pieces of its own.
            fused = ranks.device.type == "cuda" and cfg.engine.zero_stage == 0
            optimizer = build_optimizer(peer, peer_cfg.optimizer, batch_size=cfg.data.batch_size, fused=fused)
        try:
            engine, *_ = deepspeed.initialize(
                model=peer, optimizer=optimizer, config=settings, dist_init_required=False, mpu=split
            )
        except (DeepSpeedConfigError, ValidationError, ZeRORuntimeException) as error:
            raise ConfigError(f"engine.deepspeed: {' '.join(str(error).split())}") from None
        if cfg.engine.zero_stage == 0:
            # On two CPU cores too: WRN-10-1, batch 128, two views forward and backward, 91 against 127 ms
            # (bench/results/cpu/step.jsonl).
            # After initialize, whose broadcast refuses such weights (0.19.8).  ZeRO >= 1 keeps weights in flat buffers,
            # which have no such order; views have it, and convolutions hand it on, so that weights alone are reordered
            # in each call: WRN-10-1 as above, ZeRO 1 322, 2 320 against 312 ms a step of two peers, and 416 where views
            # are contiguous (two ResNet-18, 64 px, batch 32: 6.6, 6.6, 6.46 and 7.7 s; two cores, torch 2.14).
            engine.module.to(memory_format=torch.channels_last)
            # Alone there is nothing to average, and DeepSpeed would copy all gradients into one buffer and back.
            engine.enable_backward_allreduce = ranks.world > 1
        engines.append(PeerEngine(i, peer_cfg.name, engine, ranks))
    return engines
