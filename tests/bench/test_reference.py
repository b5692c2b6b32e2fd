"""The plain-PyTorch reference trains as the engine does."""

import ast
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import reference
from bench.reference import Reference
from engine import distributed
from engine.config import Config, parse_config
from engine.engines import build_engines
from engine.placement import place
from engine.step import Step
from kernels import reference as oracle
from ranks import run_ranks

SIZE, BATCH, STEPS = 24, 16, 20
DIFFERENT = 5  # batches, which come again and again
CPU = torch.device("cpu")


def config(**changes) -> Config:
    peer = {
        "backbone": "wrn-10-1", "tau": 0.5, "projector": {"hidden": 16, "out": 8}, "optimizer": {"lr": 1e-4},
    }  # fmt: skip
    return parse_config({
        "run": {"output_dir": "x", "steps": 1},
        "data": {"batch_size": BATCH, "image_size": SIZE},
        "peers": [{"name": "a", **peer}, {"name": "b", **peer}],
        "distill": {"weight": [1.0, 0.5]},
        **changes,
    })  # fmt: skip


def side_by_side(seed: int) -> list[list[list[float]]]:
    """The losses of every step, [reference, engine], from the same weights and the same views."""
    ranks = distributed.start()
    try:
        distributed.seed_everything(seed)
        cfg = config()
        placement = place(cfg, ranks, SIZE)
        engines = build_engines(cfg, placement, SIZE)
        step, plain = Step(cfg, engines, placement), Reference(cfg, ranks.device, size=SIZE)
        for peer, engine in zip(plain.peers, engines, strict=True):
            peer.load_state_dict(engine.weights())
        generator = torch.Generator().manual_seed(seed)
        made = torch.randn(DIFFERENT, 4, BATCH, 3, SIZE, SIZE, generator=generator) * 2 + 1
        history = []
        for i in range(STEPS):
            views = [view.contiguous(memory_format=torch.channels_last) for view in made[i % DIFFERENT]]
            forward = step.forward(views)
            step.backward(forward)
            step.optimize([peer.optimizer.lr for peer in cfg.peers])
            own = [loss.loss.item() for loss in forward.losses]
            history.append([[loss.item() for loss in plain.step(views)], own])
        return history
    finally:
        distributed.stop()


@pytest.mark.slow
def test_the_reference_gives_the_losses_of_the_engine():
    """The first losses to rounding; later ones to what it becomes.

    Activations near ReLU's kink change sides, and Adam divides the smallest gradients by themselves, so that a
    difference grows about tenfold in eight steps: at this rate to at most 3e-5 in step 20 (three seeds, batches of 16
    and 64), at ten times the rate to 1e-3.
    """
    history = np.array(run_ranks(side_by_side, 1, 1)[0])  # [STEPS, 2, peers]
    plain, engine = history[:, 0], history[:, 1]
    np.testing.assert_allclose(plain[0], engine[0], rtol=1e-6)
    np.testing.assert_allclose(plain, engine, rtol=1e-4)
    assert (plain[-DIFFERENT:].mean(axis=0) < plain[:DIFFERENT].mean(axis=0) - 0.1).all(), "both trained"


def test_losses_are_those_of_the_oracle():
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    a, b = (tuple(torch.nn.functional.normalize(t) for t in z[2 * p : 2 * p + 2]) for p in range(2))
    assert reference.ntxent(*a, 0.5).item() == pytest.approx(oracle.ntxent(*z[:2], tau=0.5).item(), rel=1e-12)
    for reduction in ("batchmean", "mean"):
        expected = oracle.similarity_kl(*z, tau=0.1, kl_reduction=reduction)
        found = [reference.similarity_kl(*pair, 0.1, reduction) for pair in ((a, b), (b, a))]
        assert [t.item() for t in found] == pytest.approx([t.item() for t in expected], rel=1e-12)
        found[0].backward(retain_graph=True)
        assert z[2].grad is None and z[0].grad is not None, "the other peer is the target alone"
        z[0].grad = None


@pytest.mark.parametrize("workers", [0, 2])
def test_its_loader_ends_with_its_stream(workers):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    batches = Reference(config(), CPU, size=SIZE).batches(images, workers=workers)
    for _ in range(5):  # an epoch has two
        views = next(batches)
        assert [tuple(view.shape) for view in views] == [(BATCH, 3, SIZE, SIZE)] * 4
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    assert not torch.equal(views[0], views[1])
    assert len(multiprocessing.active_children()) == workers
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": [{"name": "a", "backbone": "wrn-10-1"}], "distill": None}, "trains two peers"),
        ({"data": {"views": "shared"}}, "each on its own two views"),
        (
            {"peers": [{"name": n, "backbone": "wrn-10-1", "optimizer": {"name": "sgd"}} for n in "ab"]},
            "adam at a constant rate, found sgd",
        ),
    ],
)
def test_another_method_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Reference(config(**changes), CPU)


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="3 images are fewer than a batch of 16"):
        next(Reference(config(), CPU).batches(np.zeros((3, 32, 32, 3), np.uint8), workers=0))


def test_it_knows_of_the_project_only_configuration_and_networks():
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    own = {name for name in modules if name.split(".")[0] in ("engine", "kernels", "bench")}
    assert own == {"engine.config", "engine.peers"}
