"""Momentum networks and queues under real DeepSpeed engines: every ZeRO stage, one rank and two."""

import numpy as np
import pytest
import torch

from engine import distributed
from engine.config import parse_config
from engine.engines import build_engines
from engine.objectives import peer_losses
from engine.placement import place
from ranks import run_ranks

SIZE, BATCH, STEPS = 24, 8, 4
QUEUE = 40  # of 16 a step: it wraps

# Smooth, so that roundings stay roundings (test_engines.py).
PEER = {
    "backbone": "test_efficientnet",
    "projector": {"hidden": 16, "out": 8},
    "optimizer": {"name": "sgd", "lr": 0.02},
}
PEERS = [
    {"name": "a", **PEER, "objective": {"name": "byol", "predictor": {"hidden": 16}}},
    {"name": "b", **PEER, "objective": {"name": "mocov2", "queue": QUEUE}},
]


def config(stage: int):
    return parse_config({
        "run": {"output_dir": "x", "steps": 1}, "data": {"batch_size": BATCH, "image_size": SIZE}, "peers": PEERS,
        "engine": {"zero_stage": stage, "precision": "fp32"},
    })  # fmt: skip


def trained(stage: int) -> dict[str, np.ndarray]:
    """Losses, and the weights of both peers before and after."""
    ranks = distributed.start()
    try:
        distributed.seed_everything(0)
        cfg = config(stage)
        engines = build_engines(cfg, place(cfg, ranks, SIZE), SIZE)
        n = BATCH // ranks.world
        generator = torch.Generator().manual_seed(0)
        found = {f"{engine.name}.before.{key}": v for engine in engines for key, v in engine.weights().items()}
        history, keys = [], []
        for _ in range(STEPS):
            every = torch.randn(4, BATCH, 3, SIZE, SIZE, generator=generator)
            views = every[:, ranks.rank * n : (ranks.rank + 1) * n]
            embedded = [engines[0].embed(*views[:2]), engines[1].embed(*views[2:])]
            losses = peer_losses(cfg, embedded, ranks.group)
            for engine, loss in zip(engines, losses, strict=True):
                engine.backward(loss.loss)
            for engine in engines:
                engine.set_momentum(0.7)
                engine.step()
            history.append([loss.loss.item() for loss in losses])
            keys.append(torch.stack([torch.nn.functional.normalize(k, dim=1) for k in embedded[1].k]))
        found |= {f"{engine.name}.after.{key}": v for engine in engines for key, v in engine.weights().items()}
        made = {key: value.numpy() for key, value in found.items()}
        return {**made, "losses": np.array(history), "keys": torch.stack(keys).numpy()}  # keys: [STEPS, 2, n, D]
    finally:
        distributed.stop()


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    return run_ranks(trained, 1, 0)[0]


@pytest.mark.slow
def test_the_queue_holds_the_newest_keys(plain):
    written = plain["keys"].reshape(STEPS * 2 * BATCH, -1)
    assert plain["b.after.queue.position"] == len(written) % QUEUE
    held = plain["b.before.queue.keys"].copy()
    for i, key in enumerate(written):
        held[i % QUEUE] = key
    np.testing.assert_allclose(plain["b.after.queue.keys"], held, atol=1e-6)


@pytest.mark.slow
def test_no_optimizer_touches_the_momentum_network(plain):
    """It lags behind the peer, which the optimizer moves: after four steps it is no copy, and not where it was."""
    for peer in "ab":
        target = {key: value for key, value in plain.items() if key.startswith(f"{peer}.after.target.0.")}
        weights = [key for key in target if key.endswith("conv_stem.weight")]
        assert weights
        for key in weights:
            online = plain[key.replace("target.0.", "encoder.")]
            began = plain[key.replace("after", "before")]
            assert 0 < np.abs(target[key] - began).max() < np.abs(online - began).max()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 2), (3, 2)])
def test_every_stage_and_number_of_ranks_does_the_same(plain, stage, world):
    for found in run_ranks(trained, world, stage):
        np.testing.assert_allclose(found["losses"], plain["losses"], rtol=2e-5)
        for key in plain:
            if ".after." in key:
                np.testing.assert_allclose(found[key], plain[key], rtol=1e-3, atol=2e-4, err_msg=key)
