"""Peers under real DeepSpeed engines: configuration, ZeRO stages, ranks, precision, state."""

import copy

import numpy as np
import pytest
import torch

from engine import distributed
from engine.batchnorm import convert_sync_bn
from engine.config import ConfigError, parse_config
from engine.engines import build_engines, deepspeed_config
from engine.objectives import peer_losses
from engine.optimizers import set_learning_rate
from engine.peers import build_peer
from engine.placement import place
from kernels.collectives import mean_over_ranks
from ranks import run_ranks

SIZE = 24


# Smooth everywhere (SiLU, no ReLU in the projector): where a network has kinks, rounding moves single activations
# across them and gradients jump by 1e-4 whatever the engine does.
SMOOTH = ("test_efficientnet", {"layers": 1, "out": 8})


def config(smooth=False, **changes):
    peer = {"backbone": "wrn-10-1", "projector": {"hidden": 16, "out": 8}}
    if smooth:
        peer = {"backbone": SMOOTH[0], "projector": SMOOTH[1]}
    optimizer = changes.pop("optimizer", {"name": "adam", "lr": 1e-3})
    bn = changes.pop("bn", "per_view")
    return parse_config({
        "run": {"output_dir": "x", "steps": 1},
        "data": {"batch_size": 16, "image_size": SIZE},
        "peers": [
            {"name": "a", **peer, "optimizer": optimizer, "bn": bn},
            {"name": "b", **peer, "optimizer": optimizer, "bn": bn},
        ],
        "distill": {"weight": [1.0, 0.5]},
        **changes,
    })  # fmt: skip


def batches(count: int, ranks) -> list[list[torch.Tensor]]:
    """The global batches' four views, this rank's rows, in the order of bytes that the loader gives them."""
    generator = torch.Generator().manual_seed(0)
    n = 16 // ranks.world
    every = torch.randn(count, 4, 16, 3, SIZE, SIZE, generator=generator) * 2 + 1
    own = every[:, :, ranks.rank * n : (ranks.rank + 1) * n]
    return [[view.contiguous(memory_format=torch.channels_last) for view in step] for step in own]


def train(cfg, ranks, steps: int, engines=None) -> tuple[list, list[list[float]]]:
    distributed.seed_everything(0)
    engines = engines or build_engines(cfg, place(cfg, ranks, SIZE), SIZE)
    history = []
    for views in batches(steps, ranks):
        embeddings = [engines[0].embed(*views[:2]), engines[1].embed(*views[2:])]
        losses = peer_losses(cfg, embeddings, ranks.group)
        for engine, loss in zip(engines, losses, strict=True):
            engine.backward(loss.loss)
        for engine in engines:
            set_learning_rate(engine.optimizer, engine.optimizer.param_groups[0]["lr"] * 0.9)
            engine.step()
        history.append([loss.loss.item() for loss in losses])
    return engines, history


# -- the generated DeepSpeed configuration -------------------------------------------------------------------------


def test_generated_configuration_is_what_the_method_needs(alone):
    settings = deepspeed_config(config(engine={"zero_stage": 2, "precision": "bf16"}), alone)
    assert settings["train_batch_size"] == settings["train_micro_batch_size_per_gpu"] == 16
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["torch_autocast"]["enabled"] is True
    assert settings["bf16"]["enabled"] is settings["fp16"]["enabled"] is False
    assert settings["gradient_clipping"] == 0.0, "DeepSpeed's own default clips at 1"
    assert settings["torch_autocast"]["lower_precision_safe_modules"] == [], "gradients travel in fp32"
    assert settings["gradient_allreduce_op"] == "mean"


def test_the_users_section_is_merged(alone):
    cfg = config(engine={"zero_stage": 1, "deepspeed": {
        "gradient_clipping": 2.5, "wall_clock_breakdown": True,
        "zero_optimization": {"overlap_comm": False, "stage": 1},
    }})  # fmt: skip
    settings = deepspeed_config(cfg, alone)
    assert settings["gradient_clipping"] == 2.5
    assert settings["wall_clock_breakdown"] is True
    assert settings["zero_optimization"] == {"overlap_comm": False, "stage": 1}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            r"engine.deepspeed.zero_optimization.stage: 3 contradicts .* 0 \(engine.zero_stage\)",
        ),
        ({"train_batch_size": 32}, r"engine.deepspeed.train_batch_size: 32 contradicts .* 16 \(data.batch_size\)"),
        ({"train_micro_batch_size_per_gpu": 4}, "engine.deepspeed.train_micro_batch_size_per_gpu: 4 contradicts"),
        ({"gradient_accumulation_steps": 2}, "engine.deepspeed.gradient_accumulation_steps: 2 contradicts .*negatives"),
        ({"bf16": {"enabled": True}}, r"engine.deepspeed.bf16.enabled: True contradicts .* False \(engine.precision\)"),
        ({"fp16": {"enabled": True}}, "engine.deepspeed.fp16.enabled: True contradicts"),
        ({"torch_autocast": {"dtype": "float16"}}, "engine.deepspeed.torch_autocast.dtype: 'float16' contradicts"),
        ({"optimizer": {"type": "Adam"}}, r"engine.deepspeed.optimizer: contradicts peers.\*.optimizer"),
        ({"scheduler": {}}, "engine.deepspeed.scheduler: contradicts"),
        (
            {"gradient_allreduce_op": "sum"},
            "engine.deepspeed.gradient_allreduce_op: 'sum' contradicts .* mean over ranks",
        ),
        ({"gradient_cliping": 1.0}, "engine.deepspeed.gradient_cliping: .* did you mean gradient_clipping?"),
        ({"zero_optimization": 2}, "engine.deepspeed.zero_optimization: found 2, a mapping is expected"),
    ],
)
def test_contradictions_are_errors(alone, section, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config(engine={"deepspeed": section}), alone)


# -- real engines --------------------------------------------------------------------------------------------------


def all_stages() -> dict:
    ranks = distributed.start()
    result = {}
    for stage in (0, 1, 2, 3):
        for name in ("adam", "sgd"):
            engine = {"zero_stage": stage, "precision": "fp32"}
            cfg = config(smooth=True, engine=engine, optimizer={"name": name, "lr": 1e-2 if name == "sgd" else 1e-3})
            result[name, stage] = train(cfg, ranks, 5)[1]
    distributed.stop()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_zero_stages_give_the_same_losses(world):
    every = run_ranks(all_stages, world)
    for (name, stage), history in every[0].items():
        assert np.isfinite(history).all()
        assert history[0] != history[-1]
        np.testing.assert_allclose(history, every[0][name, 0], rtol=1e-5, err_msg=f"{name}, ZeRO {stage}")
        for other in every:
            assert other[name, stage] == history, "losses are those of the global batch"


def formats(stage: int) -> list[bool]:
    """Whether the output of each convolution is channels_last."""
    ranks = distributed.start()
    cfg = config(engine={"zero_stage": stage, "precision": "fp32"})
    engine = build_engines(cfg, place(cfg, ranks, SIZE), SIZE)[0]
    found = []
    for module in engine.module.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _, given, out: found.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    engine.embed(*batches(1, ranks)[0][:2])
    distributed.stop()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_activations_are_channels_last_at_every_zero_stage(stage):
    (found,) = run_ranks(formats, 1, stage)
    assert len(found) == 2 * 9 and all(found)


def one_backward(bn: str) -> tuple[list, dict]:
    """Losses of a step and the parameter gradients that the engines averaged over the ranks."""
    ranks = distributed.start()
    distributed.seed_everything(0)
    cfg = config(smooth=True, engine={"precision": "fp32"}, bn=bn)
    engines = build_engines(cfg, place(cfg, ranks, SIZE), SIZE)
    (views,) = batches(1, ranks)
    losses = peer_losses(cfg, [engines[0].embed(*views[:2]), engines[1].embed(*views[2:])], ranks.group)
    for engine, loss in zip(engines, losses, strict=True):
        engine.backward(loss.loss)
    gradients = {f"{e.name}.{key}": p.grad.numpy() for e in engines for key, p in e.module.named_parameters()}
    distributed.stop()
    return [loss.loss.item() for loss in losses], gradients


@pytest.mark.slow
@pytest.mark.parametrize(("world", "bn"), [(2, "per_view"), (4, "per_view"), (2, "joint")])
def test_ranks_give_the_losses_and_parameter_gradients_of_one(world, bn):
    ((history, expected),) = run_ranks(one_backward, 1, bn)
    for other_history, gradients in run_ranks(one_backward, world, bn):
        np.testing.assert_allclose(other_history, history, rtol=1e-5)
        for peer in "ab":
            wanted, found = (
                np.concatenate([g[key].ravel() for key in sorted(expected) if key.startswith(peer)])
                for g in (expected, gradients)
            )
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert error < 3e-5, f"{peer}: {error}"  # 1.0e-5 found: float32, and in float64 below 1e-8 (next test)
            assert np.linalg.norm(wanted) > 0.1


def exact_backward() -> list:
    """Parameter gradients, averaged over ranks, of ReLU peers in float64, without DeepSpeed (which has no float64)."""
    ranks = distributed.start()
    distributed.seed_everything(0)
    cfg = config()
    peers = [convert_sync_bn(build_peer(p, image_size=SIZE).double(), ranks) for p in cfg.peers]
    views = [view.double() for view in batches(1, ranks)[0]]
    losses = peer_losses(
        cfg, [peer.embedded(peer(*views[i : i + 2])) for peer, i in zip(peers, (0, 2), strict=True)], ranks.group
    )
    for loss in losses:
        loss.loss.backward()
    gradients = [mean_over_ranks(p.grad, ranks.group).numpy() for peer in peers for p in peer.parameters()]
    distributed.stop()
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_are_exact_in_float64(world):
    (expected,) = run_ranks(exact_backward, 1)
    for gradients in run_ranks(exact_backward, world):
        for found, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-11)


def no_clipping() -> float:
    ranks = distributed.start()
    cfg = config(
        engine={"precision": "fp32"}, optimizer={"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    )
    distributed.seed_everything(0)
    engine = build_engines(cfg, place(cfg, ranks, SIZE), SIZE)[0]
    before = engine.weights()
    (views,) = batches(1, ranks)
    x, y = engine.embed(*views[:2]).z
    engine.backward((x.sum() + y.sum()) * 100)
    engine.step()
    after = engine.weights()
    distributed.stop()
    return float(sum((after[key] - before[key]).norm() ** 2 for key in dict(engine.module.named_parameters())) ** 0.5)


@pytest.mark.slow
def test_gradients_are_not_clipped_behind_the_users_back():
    assert run_ranks(no_clipping, 1)[0] > 10


def reduced_precision() -> dict:
    ranks = distributed.start()
    cfg = config(engine={"precision": "bf16", "zero_stage": 2})
    engines, history = train(cfg, ranks, 3)
    exact = train(config(engine={"precision": "fp32", "zero_stage": 2}), ranks, 3)[1]
    embedding = engines[0].embed(*batches(1, ranks)[0][:2]).z[0]
    features = engines[0].features(batches(1, ranks)[0][0])
    result = {
        "history": history, "exact": exact, "embedding": str(embedding.dtype), "features": str(features.dtype),
        "weights": {str(value.dtype) for value in engines[0].weights().values()},
        "training": engines[0].module.training,
    }  # fmt: skip
    distributed.stop()
    return result


@pytest.mark.slow
def test_bf16_is_autocast_over_fp32_weights():
    result = run_ranks(reduced_precision, 2)[0]
    assert (result["embedding"], result["features"]) == ("torch.bfloat16", "torch.float32")
    assert result["weights"] == {"torch.float32", "torch.int64"}
    np.testing.assert_allclose(result["history"], result["exact"], rtol=0.03)
    assert result["history"] != result["exact"]
    assert result["training"], "features leave the module in training mode"


def state_of_a_gpu(name: str) -> tuple[list, list, list]:
    """Losses after the state of step 3, as it is and as a run on a GPU with captured steps would have saved it."""
    ranks = distributed.start()
    cfg = config(engine={"precision": "fp32"}, optimizer={"name": name, "lr": 1e-3})
    engines, _ = train(cfg, ranks, 3)
    state = [(engine.weights(), engine.optimizer_state()) for engine in engines]
    results = []
    for saved_on in ("cpu", "gpu"):
        fresh = build_engines(cfg, place(cfg, ranks, SIZE), SIZE)
        for engine, (weights, optimizer) in zip(fresh, copy.deepcopy(state), strict=True):
            groups = optimizer["param_groups"]
            if saved_on == "gpu":
                flags = {flag: True for flag in ("fused", "capturable") if flag in groups[0]}
                groups = [{**group, **flags, "lr": torch.tensor(group["lr"], dtype=torch.float64)} for group in groups]
            engine.load_weights(weights)
            engine.load_optimizer_state({**optimizer, "param_groups": groups})
            set_learning_rate(engine.optimizer, float(groups[0]["lr"]))  # as every step of a run does
        results.append(train(cfg, ranks, 3, fresh)[1])
    flags = [(group.get("fused"), group.get("capturable")) for e in fresh for group in e.optimizer.param_groups]
    distributed.stop()
    return results[0], results[1], flags


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_run_of_a_gpu_goes_on_on_a_cpu(name):
    ((as_it_is, from_a_gpu, flags),) = run_ranks(state_of_a_gpu, 1, name)
    assert as_it_is == from_a_gpu
    assert not any(flag for both in flags for flag in both)


def round_trip(stage: int) -> tuple[list, list, list]:
    """Losses of steps 4 to 6 straight on, and from the state after step 3 put into fresh engines."""
    ranks = distributed.start()
    cfg = config(engine={"zero_stage": stage, "precision": "fp32"}, optimizer={"name": "sgd", "lr": 0.05})
    engines, _ = train(cfg, ranks, 3)
    state = [(engine.weights(), engine.optimizer_state()) for engine in engines]
    _, straight = train(cfg, ranks, 3, engines)
    fresh = build_engines(cfg, place(cfg, ranks, SIZE), SIZE)
    for engine, (weights, optimizer) in zip(fresh, state, strict=True):
        engine.load_weights(weights)
        engine.load_optimizer_state(optimizer)
    again = [sorted(key for key, value in engine.weights().items() if not torch.equal(value, weights[key]))
             for engine, (weights, _) in zip(fresh, state, strict=True)]  # fmt: skip
    _, resumed = train(cfg, ranks, 3, fresh)
    distributed.stop()
    return straight, resumed, again


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_goes_round_to_the_bit(stage):
    for straight, resumed, changed in run_ranks(round_trip, 2, stage):
        assert changed == [[], []]
        assert straight == resumed
