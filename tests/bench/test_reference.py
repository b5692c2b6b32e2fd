"""The plain-PyTorch reference trains as the engine does, and knows nothing of it."""

import ast
import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import reference, reference_data, reference_networks
from bench.reference import Reference, embedded
from engine import distributed
from engine.config import Config, PeerConfig, parse_config
from engine.data.augment import build_policy
from engine.engines import build_engines
from engine.peers import build_peer
from engine.placement import place
from engine.schedules import Pace
from engine.step import Step
from kernels import reference as oracle
from ranks import run_ranks

SIZE, BATCH, STEPS = 24, 16, 20
DIFFERENT = 5  # batches, which come again and again
CPU = torch.device("cpu")


def config(**changes) -> Config:
    peer = {
        "backbone": "wrn-10-1", "tau": 0.5, "projector": {"hidden": 16, "out": 8}, "optimizer": {"lr": 2e-5},
    }  # fmt: skip
    return parse_config({
        "run": {"output_dir": "x", "steps": 1},
        "data": {"batch_size": BATCH, "image_size": SIZE},
        "peers": [{"name": "a", **peer}, {"name": "b", **peer, "tau": 0.2}],
        "distill": {"weight": [1.0, 0.5]},
        "engine": {"sync_bn": False},
        **changes,
    })  # fmt: skip


def plain(**changes) -> Reference:
    return Reference(config(**changes).resolved(), CPU, size=SIZE)


# -- the same algorithm


def side_by_side(seed: int, settings: list[bool]) -> list[list[list[float]]]:
    """This rank's losses of every step, [engine, reference tuned or not, ...], from the same weights and views."""
    ranks = distributed.start()
    try:
        distributed.seed_everything(seed)
        cfg = config()
        placement = place(cfg, ranks, SIZE)
        engines = build_engines(cfg, placement, SIZE)
        step = Step(cfg, engines, placement)
        references = [
            Reference(cfg.resolved(), ranks.device, size=SIZE, tuned=tuned, group=ranks.group) for tuned in settings
        ]
        for of in references:
            for peer, engine in zip(of.peers, engines, strict=True):
                peer.load_state_dict(engine.weights())
        generator = torch.Generator().manual_seed(seed)
        made = torch.randn(DIFFERENT, 4, BATCH, 3, SIZE, SIZE, generator=generator) * 2 + 1
        n = BATCH // ranks.world
        made = made[:, :, ranks.rank * n : (ranks.rank + 1) * n]
        history = []
        for i in range(STEPS):
            views = [view.contiguous(memory_format=torch.channels_last) for view in made[i % DIFFERENT]]
            forward = step.forward(views)
            step.backward(forward)
            step.optimize({i: Pace(peer.optimizer.lr, None) for i, peer in cfg.trained})
            own = [loss.loss.item() for loss in forward.losses.values()]
            history.append([own, *([loss.item() for loss in of.step(views)] for of in references)])
        return history
    finally:
        distributed.stop()


def check_same(found: list[list[list[list[float]]]]) -> None:
    """Sums in another order differ by 1e-7, activations then fall on the other side of a kink, and Adam divides the
    smallest gradients by themselves: a difference grows with every step, at this rate to at most 3e-5 in 20 steps with
    torch.compile (two seeds), at five times the rate to 2e-3.
    """
    history = np.mean(found, axis=0)  # over ranks: [STEPS, engine and references, peers]
    engine = history[:, :1]
    np.testing.assert_allclose(history[0], np.broadcast_to(engine[0], history[0].shape), rtol=1e-6)
    np.testing.assert_allclose(history, np.broadcast_to(engine, history.shape), rtol=1e-4)
    assert (engine[-DIFFERENT:].mean(axis=0) < engine[:DIFFERENT].mean(axis=0) - 0.1).all(), "all trained"


def test_it_trains_as_the_engine_does():
    check_same(run_ranks(side_by_side, 1, 1, [False]))


@pytest.mark.slow
def test_it_trains_as_the_engine_does_when_tuned():
    check_same(run_ranks(side_by_side, 1, 1, [True]))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="two ranks want two GPUs")
def test_two_ranks_train_as_the_engine_does():
    found = run_ranks(side_by_side, 2, 1, [False, True])
    check_same(found)
    losses = np.array(found)[:, :, 1]
    assert not np.allclose(losses[0], losses[1], rtol=1e-3), "each rank has the loss of its own rows"


def test_losses_are_those_of_the_oracle():
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    unit = [torch.nn.functional.normalize(t) for t in z]
    a, b = (reference.Embedded(x, y, x, y, 0) for x, y in (unit[:2], unit[2:]))
    assert reference.ntxent(a, 0.5).item() == pytest.approx(oracle.ntxent(*z[:2], tau=0.5).item(), rel=1e-12)
    for reduction in ("batchmean", "mean"):
        expected = oracle.similarity_kl(*z, tau=0.1, kl_reduction=reduction)
        found = [reference.similarity_kl(*pair, 0.1, reduction) for pair in ((a, b), (b, a))]
        assert [t.item() for t in found] == pytest.approx([t.item() for t in expected], rel=1e-12)
        found[0].backward(retain_graph=True)
        assert z[2].grad is None and z[0].grad is not None, "the other peer is the target alone"
        z[0].grad = None


def test_losses_of_some_rows_make_that_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    x_a, y_a, x_b, y_b = torch.randn(4, 12, 5, generator=generator)
    a, b = embedded(x_a, y_a), embedded(x_b, y_b)
    parts = [
        [reference.Embedded(z.x[i : i + 4], z.y[i : i + 4], z.x, z.y, i) for i in range(0, 12, 4)] for z in (a, b)
    ]  # fmt: skip
    whole = reference.ntxent(a, 0.5)
    assert torch.stack([reference.ntxent(part, 0.5) for part in parts[0]]).mean().item() == pytest.approx(whole.item())
    for reduction in ("batchmean", "mean"):
        whole = reference.similarity_kl(a, b, 0.1, reduction)
        of_rows = [reference.similarity_kl(*pair, 0.1, reduction) for pair in zip(*parts, strict=True)]
        assert torch.stack(of_rows).mean().item() == pytest.approx(whole.item())


# -- networks


@pytest.mark.parametrize(
    ("backbone", "size", "more"),
    [
        ("wrn-10-1", 32, {}),
        ("wrn-16-2", 32, {"bn": "joint", "projector": {"layers": 3, "hidden": 24, "out": 8}}),
        ("resnet18", 32, {}),
        ("resnet18", 224, {"bn": "joint"}),
        ("resnet18", 64, {"stem": "standard", "projector": {"layers": 1}}),
        ("resnet50", 32, {"stem": "small"}),
    ],
)
def test_networks_are_those_of_the_engine(backbone, size, more):
    cfg = PeerConfig(name="a", backbone=backbone, **more)
    torch.manual_seed(0)
    theirs = build_peer(cfg, image_size=size)
    ours = reference_networks.build_peer(cfg.model_dump(mode="json"), size=size)
    weights = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    spread = {name: (p.std(), theirs.get_parameter(name).std()) for name, p in ours.named_parameters() if p.ndim > 1}
    assert all(torch.isclose(a, b, rtol=0.35) for a, b in spread.values()), "fresh weights of the same spread"
    ours.load_state_dict(weights)
    views = torch.randn(2, 3, 3, size, size)
    for expected, found in zip(theirs(*views), ours(*views), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    buffers = dict(theirs.named_buffers())
    for name, found in ours.named_buffers():
        torch.testing.assert_close(found, buffers[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18d", "mobilenetv3_small_100", "resnetv2_50", "nothing"])
def test_other_backbones_are_refused(name):
    with pytest.raises(ValueError, match=f"backbone: found {name}; the reference has wrn-DEPTH-WIDTH and"):
        reference_networks.build_peer({"backbone": name, "stem": "auto"}, size=32)


# -- images


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Smooth JPEG files of several sizes, one grey."""
    folder, paths = tmp_path_factory.mktemp("photos"), []
    for i in range(20):
        small = Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8))
        photo = small.resize((150 + i, 130), Image.Resampling.BICUBIC)
        paths.append(folder / f"{i:02}.jpg")
        (photo.convert("L") if i == 3 else photo).save(paths[-1])
    return paths


def stream(source: Any, size: int, **more: Any) -> Any:
    options = {"rows": BATCH, "workers": 0, "device": CPU, "on_device": False, "group": None, **more}
    return reference_data.batches(source, size=size, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_its_loader_ends_with_its_stream(array, workers):
    batches = plain().batches(array, workers=workers)
    for _ in range(5):  # an epoch has two
        views = next(batches)
        assert [tuple(view.shape) for view in views] == [(BATCH, 3, SIZE, SIZE)] * 4
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    assert not torch.equal(views[0], views[1])
    assert len(multiprocessing.active_children()) == workers
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("kind", "size"), [("array", 32), ("photos", 112)])
def test_views_of_arrays_and_photos(kind, size, on_device, request):
    views = next(stream(request.getfixturevalue(kind), size, on_device=on_device))
    assert [tuple(view.shape) for view in views] == [(BATCH, 3, size, size)] * 4
    assert all(view.dtype == torch.float32 for view in views)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    assert all((views[0][i] - views[v][i]).abs().mean() > 0.01 for i in range(BATCH) for v in (1, 2, 3)), "they differ"
    mean, std = (
        torch.tensor(t).view(3, 1, 1) for t in (reference_data.CIFAR if size == 32 else reference_data.IMAGENET)
    )
    pixels = torch.stack(views) * std + mean
    assert pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3 and pixels.std() > 0.05, "normalised, not something else"


def test_an_epoch_has_every_image_once(monkeypatch, array):
    def number(size, *, batched):
        return lambda image: torch.as_tensor(np.array(image)).permute(2, 0, 1).float()

    monkeypatch.setattr(reference_data, "view_of", number)
    whole = array[:32]
    batches = stream(whole, 32)
    seen = [tuple(image.flatten()[:4].int().tolist()) for _ in range(2) for image in next(batches)[0]]
    assert sorted(seen) == sorted(tuple(image.transpose(2, 0, 1).flatten()[:4].tolist()) for image in whole)


def test_views_on_the_device_have_one_crop_a_batch(array):
    """torchvision draws once a call: of equal images it makes equal views, where workers make different ones."""
    same = np.broadcast_to(array[:1], array.shape)
    for on_device in (True, False):
        view = next(stream(same, 32, on_device=on_device))[0]
        assert torch.equal(view[0], view[1]) == on_device


def test_what_is_drawn_is_what_the_engine_draws():
    """Of the engine's policy, the ranges and probabilities; the order of the operations is in both files."""
    for size in (32, 224):
        policy = build_policy(config().data.augment, size)
        for batched in (False, True):
            crop, flip, jitter, grey, *rest = reference_data.view_of(size, batched=batched).transforms
            assert (crop.scale, crop.ratio) == (policy.crop_scale, policy.crop_ratio)
            assert (flip.p, jitter.p, grey.p) == (policy.flip, policy.jitter, policy.grayscale)
            (color,) = jitter.transforms
            for name in ("brightness", "contrast", "saturation"):
                strength = getattr(policy, name)
                assert getattr(color, name) == (max(0, 1 - strength), 1 + strength)
            assert color.hue == (-policy.hue, policy.hue)
            blurs = [t.p for t in rest if isinstance(t, type(jitter))]
            assert blurs == ([policy.blur] if policy.blur else [])
            assert (tuple(rest[-1].mean), tuple(rest[-1].std)) == policy.statistics


def test_ready_views_are_the_same_in_every_batch():
    batches = plain().same_views()
    first, second = next(batches), next(batches)
    assert [tuple(view.shape) for view in first] == [(BATCH, 3, SIZE, SIZE)] * 4
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1]) and 0.5 < first[0].std() < 2


def rows_of_ranks(images: np.ndarray) -> list[list[int]]:
    """The first pixels of the images that this rank's first epoch has."""
    ranks = distributed.start()
    try:
        of = Reference(config().resolved(), ranks.device, size=32, group=ranks.group)
        # This process ends with the test: nothing need be put back.
        reference_data.view_of = lambda size, *, batched: lambda image: torch.as_tensor(np.array(image)[:1, :1]).T
        batches = of.batches(images, workers=0)
        return [next(batches)[0].flatten(1)[:, 0].tolist() for _ in range(2)]
    finally:
        distributed.stop()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="two ranks want two GPUs")
def test_ranks_share_an_epoch():
    images = np.arange(32, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    first, second = run_ranks(rows_of_ranks, 2, images)
    assert [len(batch) for batch in first] == [BATCH // 2] * 2
    assert sorted(itertools.chain(*first, *second)) == list(range(32))


# -- what it is not


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": [{"name": "a", "backbone": "wrn-10-1"}], "distill": None}, "trains two peers"),
        ({"data": {"views": "shared"}}, "each on its own two views"),
        ({"data": {"augment": {"blur": 0.1}}}, "data.augment: the reference has simclr without changes, found .*0.1"),
        ({"data": {"augment": "simsiam"}}, "data.augment: the reference has simclr without changes, found .*simsiam"),
        (
            {"peers": [{"name": n, "backbone": "wrn-10-1", "optimizer": {"name": "sgd"}} for n in "ab"]},
            "adam of all parameters at a constant rate, found .*'sgd'",
        ),
        (
            {"peers": [{"name": n, "backbone": "wrn-10-1", "optimizer": {"schedule": "cosine"}} for n in "ab"]},
            "adam of all parameters at a constant rate, found .*'cosine'",
        ),
    ],
)
def test_another_method_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plain(**changes)


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="3 images are fewer than a batch of 16"):
        next(plain().batches(np.zeros((3, 32, 32, 3), np.uint8), workers=0))


def test_it_knows_nothing_of_the_project():
    """Its files import each other and libraries, wherever in the file the import stands."""
    files = {Path(module.__file__) for module in (reference, reference_data, reference_networks)}
    assert set(Path(reference.__file__).parent.glob("reference*.py")) == files
    for file in files:
        tree = ast.parse(file.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert all(node.level == 0 for node in imports)
        modules = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        own = {name for name in modules if name.split(".")[0] in ("engine", "kernels", "bench", "tests")}
        assert all(name.startswith("bench.reference_") for name in own), own
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"importlib", "__import__", "exec", "eval"}
