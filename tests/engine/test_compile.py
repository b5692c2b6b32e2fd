"""Peers through torch.compile: no graph breaks, the same numbers, BatchNorm over ranks included."""

import copy

import pytest
import torch

from engine import distributed
from engine.config import ConfigError, parse_config
from engine.engines import build_engines
from engine.peer_config import PeerConfig
from engine.peers import build_peer
from engine.placement import place
from kernels import mutual_loss, ntxent_loss, similarity_kl
from ranks import run_ranks

SIZE, BATCH = 24, 8


def config(backbone="wrn-10-1", bn="per_view", **engine):
    peer = {"backbone": backbone, "projector": {"hidden": 16, "out": 8}, "bn": bn}
    peer["optimizer"] = {"name": "sgd", "lr": 0.01}  # Adam would divide the smallest gradients by themselves
    return parse_config({
        "run": {"output_dir": "x", "steps": 1}, "data": {"batch_size": BATCH, "image_size": SIZE},
        "peers": [{"name": "a", **peer}, {"name": "b", **peer}], "engine": {"precision": "fp32", **engine},
    })  # fmt: skip


def breaks(function, *inputs: torch.Tensor) -> tuple[int, int]:
    """Graph breaks and graphs of a call."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(function)(*inputs)
    return found.graph_break_count, found.graph_count


@pytest.mark.parametrize("backbone", ["wrn-16-2", "resnet18", "mobilenetv3_small_100", "test_vit", "test_efficientnet"])
def test_a_peer_is_one_graph(backbone):
    size = 160 if backbone == "test_vit" else 32
    peer = build_peer(config(backbone).peers[0], image_size=size)
    assert breaks(peer.embedding, torch.randn(4, 3, size, size)) == (0, 1)


@pytest.mark.parametrize("objective", ["byol", "simsiam"])
def test_what_objectives_add_is_in_the_graph(objective):
    peer = build_peer(PeerConfig(name="a", backbone="wrn-10-1", objective=objective), image_size=SIZE, graph=8)
    images = torch.randn(4, 3, SIZE, SIZE)
    assert breaks(peer.embedding, images) == (0, 1)
    if peer.target is not None:
        with torch.no_grad():
            assert breaks(peer.target_embedding, images) == (0, 1)
    x, y = images, images.flip(0)
    expected = copy.deepcopy(peer)(x, y)
    peer.compile_embedding()
    for found, wanted in zip(peer(x, y), expected, strict=True):
        # Of four images BatchNorm divides by small spreads; single entries differ by up to 1e-3 of the largest.
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("loss", [mutual_loss, similarity_kl, lambda x, y, *_: ntxent_loss(x, y)])
def test_a_loss_is_one_graph(loss):
    z = [torch.randn(6, 5, requires_grad=True) for _ in range(4)]
    assert breaks(loss, *z) == (0, 1)


def test_a_break_is_counted_and_refused():
    """What the tests above would find."""
    peer = build_peer(config().peers[0], image_size=SIZE)

    class Breaking(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x.mean(dim=(2, 3)).repeat(1, 22)[:, :64]

    peer.encoder = Breaking()
    assert breaks(peer.embedding, torch.randn(4, 3, SIZE, SIZE)) == (1, 2)
    peer.compile_embedding()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        peer(torch.randn(4, 3, SIZE, SIZE), torch.randn(4, 3, SIZE, SIZE))


def trained(cfg, ranks) -> dict:
    """Losses of four steps and what they left, of engines with or without torch.compile."""
    distributed.seed_everything(0)
    engine = build_engines(cfg, place(cfg, ranks, SIZE), SIZE)[0]
    n = BATCH // ranks.world
    generator = torch.Generator().manual_seed(1)
    history, features = [], None
    for _ in range(4):
        every = torch.randn(2, BATCH, 3, SIZE, SIZE, generator=generator)
        x, y = every[:, ranks.rank * n : (ranks.rank + 1) * n]
        loss = ntxent_loss(*engine.embed(x, y).z, group=ranks.group)
        engine.backward(loss)
        engine.step()
        history.append(loss.item())
        features = engine.features(x)
    return {"losses": history, "features": features.numpy(), "weights": list(engine.weights())}


def both(bn: str, stage: int) -> tuple[dict, dict, int]:
    ranks = distributed.start()
    try:
        plain, compiled = (
            trained(config("test_efficientnet", bn, compile=on, zero_stage=stage), ranks) for on in (False, True)
        )
        return plain, compiled, torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        distributed.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "bn", "stage"), [(2, "per_view", 2)])
def test_compiled_peers_train_as_others_do(world, bn, stage):
    for plain, compiled, graphs in run_ranks(both, world, bn, stage):
        assert graphs == 1, "one graph serves both views"
        assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-4)
        assert compiled["losses"][0] != compiled["losses"][-1]
        assert abs(compiled["features"] - plain["features"]).max() < 1e-3 * abs(plain["features"]).max()
        assert compiled["weights"] == plain["weights"], "the same names in checkpoints"


def breaks_of_global_batchnorm() -> tuple[int, int]:
    ranks = distributed.start()
    try:
        cfg = config("resnet18", compile=True)
        engine = build_engines(cfg, place(cfg, ranks, SIZE), SIZE)[0]
        return breaks(engine.module.embedding, torch.randn(4, 3, SIZE, SIZE))
    finally:
        distributed.stop()


@pytest.mark.slow
def test_batchnorm_over_ranks_is_in_the_graph():
    assert run_ranks(breaks_of_global_batchnorm, 2) == [(0, 1)] * 2


def test_zero_3_is_refused():
    with pytest.raises(ConfigError, match="engine.compile: takes engine.zero_stage 0 to 2, found 3"):
        config(compile=True, zero_stage=3)
