"""The parts of a step, and the step as CUDA graphs: the same run as without."""

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import distributed
from engine.config import ConfigError, parse_config
from engine.distributed import Ranks
from engine.placement import place
from engine.step import WARM_UP, CapturedStep, Finite, StreamedStep, captures, describe_capture
from engine.trainer import NonFiniteLoss, Trainer
from ranks import run_ranks

# -- captured


class Recorded(Trainer):
    """A trainer that keeps the losses of every step."""

    def _scalars(self, losses):
        values = super()._scalars(losses)
        self.history = [*getattr(self, "history", []), {key: float(value) for key, value in values.items()}]
        return values


def trained(plain: dict[str, Any], ranks: Ranks, name: str, **changes: dict[str, Any]) -> Recorded:
    """A finished run of the configuration with changes to its sections."""
    tree = {key: {**section, **changes.get(key, {})} if key != "peers" else section for key, section in plain.items()}
    tree["run"]["output_dir"] += f"-{name}"
    trainer = Recorded(parse_config(tree), ranks)
    trainer.fit()
    return trainer


def is_captured(trainer: Trainer) -> bool:
    return isinstance(trainer.step, CapturedStep) and bool(trainer.step._graphs)


def assert_same(one: Recorded, other: Recorded) -> None:
    assert len(one.history) == len(other.history)
    for step, (a, b) in enumerate(zip(one.history, other.history, strict=True)):
        assert a == b, step
    for engine, its in zip(one.engines, other.engines, strict=True):
        its_weights = its.weights()
        for key, value in engine.weights().items():
            assert torch.equal(value, its_weights[key]), key


OPTIMIZERS = [
    {"name": "adam", "lr": 1e-3, "schedule": "cosine"},
    {"name": "sgd", "lr": 0.05, "schedule": "cosine", "warmup_epochs": 1},
    {"name": "adamw", "lr": 1e-3},
    {"name": "lars", "lr": 0.1, "schedule": "cosine"},
]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
@pytest.mark.parametrize("loader", ["resident", "torchvision"])
def test_a_captured_run_is_the_run_without(settings, gpu, loader, optimizer):
    """20 steps over several epochs, with evaluations and a changing rate; fp32, so that nothing hides."""
    settings["run"].update(steps=20, save_every_steps=7)
    settings["data"].update(loader=loader, batch_size=16)
    settings["eval"]["knn"]["every_steps"] = 6
    for peer in settings["peers"]:
        peer["optimizer"] = optimizer
    settings["engine"] = {"precision": "fp32", "capture": False}
    without = trained(settings, gpu, "without")
    captured = trained(settings, gpu, "captured", engine={"capture": True})
    assert is_captured(captured) and not is_captured(without)
    assert_same(without, captured)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "views", "peers"), [("bf16", "shared", 2), ("fp32", "per_peer", 1)])
def test_other_runs_are_captured_too(settings, gpu, precision, views, peers):
    settings["run"]["steps"] = 12
    settings["data"].update(loader="resident", batch_size=16, views=views)
    settings["peers"] = settings["peers"][:peers]
    settings["engine"] = {"precision": precision, "capture": False}
    without = trained(settings, gpu, "without")
    captured = trained(settings, gpu, "captured", engine={"capture": True})
    assert is_captured(captured)
    assert_same(without, captured)


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["resident", "torchvision"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_peers_on_streams_of_their_own_are_the_serial_run(settings, gpu, stage, loader):
    settings["run"]["steps"] = 20
    settings["data"].update(loader=loader, batch_size=16)
    settings["engine"] = {"precision": "fp32", "capture": False, "zero_stage": stage, "concurrency": "serial"}
    serial = trained(settings, gpu, "serial")
    streams = trained(settings, gpu, "streams", engine={"concurrency": "streams"})
    assert isinstance(streams.step, StreamedStep) and not isinstance(serial.step, StreamedStep)
    assert_same(serial, streams)


@pytest.mark.gpu
def test_graphs_have_branches_unless_told_otherwise(settings, gpu):
    settings["run"]["steps"] = 12
    settings["data"].update(loader="resident", batch_size=16)
    settings["engine"] = {"precision": "fp32", "capture": True}
    branches = trained(settings, gpu, "branches")
    without = trained(settings, gpu, "without", engine={"concurrency": "serial"})
    assert isinstance(branches.step._step, StreamedStep) and not isinstance(without.step._step, StreamedStep)
    assert_same(branches, without)


@pytest.mark.gpu
def test_a_captured_run_goes_on_from_a_checkpoint(settings, gpu):
    settings["run"].update(steps=14, save_every_steps=7)
    settings["data"].update(loader="resident", batch_size=16)
    settings["engine"] = {"precision": "fp32", "capture": True}
    whole = trained(settings, gpu, "whole")
    half = str(whole.folder / "checkpoints" / "step_00000007")
    resumed = trained(settings, gpu, "resumed", run={"resume": half})
    assert is_captured(resumed) and len(resumed.history) == 7
    whole.history = whole.history[7:]
    assert_same(whole, resumed)


@pytest.mark.gpu
def test_a_captured_step_stops_before_the_optimizer(settings, gpu):
    """A weight that becomes infinite behind the capture: the step after it stops, and changes no weight."""
    settings["run"]["steps"] = 60
    settings["data"].update(loader="resident", batch_size=16)
    settings["engine"] = {"precision": "fp32", "capture": True}
    trainer = Trainer(parse_config(settings), gpu)
    train, before = trainer.train, []

    def poisoned(batch):
        if batch.step == WARM_UP + 4:
            with torch.no_grad():
                weight = next(trainer.engines[0].module.parameters())
                weight[(0,) * weight.ndim] = math.inf
            before.extend(value.clone() for e in trainer.engines for value in e.module.parameters())
        return train(batch)

    trainer.train = poisoned
    with pytest.raises(NonFiniteLoss, match=f"the loss of step {WARM_UP + 5} is not finite"):
        trainer.fit()
    after = [value for e in trainer.engines for value in e.module.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "the optimizer saw it"


@pytest.mark.gpu
def test_a_replayed_step_waits_for_nothing_but_its_own_flag(settings, gpu):
    settings["run"].update(steps=WARM_UP + 6, log_every_steps=1000)
    settings["data"].update(loader="resident", batch_size=16)
    settings["engine"] = {"capture": True}
    trainer = Trainer(parse_config(settings), gpu)
    train = trainer.train

    def guarded(batch):
        if WARM_UP + 1 <= batch.step < trainer.steps - 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return train(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.train = guarded
    trainer.fit()


def test_branches_leave_the_trunk_and_come_back(monkeypatch, config):
    """Each part of a step, in the order that makes memory safe; without a GPU."""
    events, trunk = (
        [],
        SimpleNamespace(name="trunk", wait_stream=lambda s: events.append(("trunk", "waits for", s.name))),
    )
    current = [trunk]

    class Stream:
        made = 0

        def __init__(self):
            self.name = "ab"[Stream.made]
            Stream.made += 1

        def wait_stream(self, other):
            events.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    engines = [
        SimpleNamespace(index=p, step=lambda p=p: events.append((current[-1].name, "steps", "ab"[p]))) for p in (0, 1)
    ]
    streams = StreamedStep(config, engines, place(config, GPU, 32))
    streams.update()
    assert events == [
        ("a", "waits for", "trunk"), ("a", "steps", "a"),
        ("b", "waits for", "trunk"), ("b", "steps", "b"),
        ("trunk", "waits for", "a"), ("trunk", "waits for", "b"),
    ]  # fmt: skip


# -- what is refused


def engine_with(config, **changes):
    return config.model_copy(update={"engine": config.engine.model_copy(update=changes)})


GPU = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cuda", 0), group=None)
TWO = Ranks(rank=0, world=2, local_rank=0, device=torch.device("cuda", 0), group=None)


def test_capture_needs_one_gpu(config, alone):
    for off in (False, "auto"):
        assert not captures(engine_with(config, capture=off), alone)
    assert captures(engine_with(config, capture=True), GPU)
    with pytest.raises(ConfigError, match="engine.capture: a CUDA graph needs a GPU, found device cpu"):
        captures(engine_with(config, capture=True), alone)
    with pytest.raises(ConfigError, match="engine.capture: takes one GPU, found 2 ranks"):
        captures(engine_with(config, capture=True), TWO)


def test_streams_need_a_gpu(config, alone):
    with pytest.raises(ConfigError, match="engine.concurrency: streams takes a GPU, found device cpu; use serial"):
        captures(engine_with(config, concurrency="streams"), alone)
    assert not captures(engine_with(config, concurrency="streams"), GPU)


def test_auto_captures_what_is_resident(settings):
    assert not captures(parse_config(settings), GPU)
    settings["data"]["loader"] = "resident"
    assert captures(parse_config(settings), GPU)
    assert not captures(parse_config(settings), TWO)
    settings["engine"] = {"zero_stage": 1}
    assert not captures(parse_config(settings), GPU)
    settings["engine"] = {"capture": False}
    assert not captures(parse_config(settings), GPU)


def test_a_run_says_whether_it_is_captured(settings, alone):
    cfg = parse_config(settings)
    assert describe_capture(cfg, alone) == []
    assert "not captured (engine.capture: by itself with data.loader=resident" in describe_capture(cfg, GPU)[0]
    settings["data"]["loader"] = "resident"
    assert describe_capture(parse_config(settings), GPU) == [
        "the training step is captured as CUDA graphs (engine.capture)"
    ]
    assert "takes one GPU, found 2 ranks" in describe_capture(parse_config(settings), TWO)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 1}, "engine.capture: takes engine.zero_stage=0, found 1; use engine.capture=false"),
        (
            {"deepspeed": {"gradient_clipping": 1.0, "wall_clock_breakdown": True}},
            "engine.capture: takes no engine.deepspeed settings, found gradient_clipping, wall_clock_breakdown; use",
        ),
    ],
)
def test_what_cannot_be_captured(settings, change, message):
    settings["engine"] = {"capture": True, **change}
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


def test_optimizers_that_cannot_be_captured(settings):
    settings["engine"] = {"capture": True}
    settings["peers"][1] = {**settings["peers"][1], "optimizer": {"name": "lamb", "lr": 1e-3}}
    with pytest.raises(ConfigError, match="takes adam, adamw, sgd, lars, found peers.1.optimizer.name=lamb"):
        parse_config(settings)


def refused(plain: dict[str, Any]) -> str:
    ranks = distributed.start()
    try:
        Trainer(parse_config(plain), ranks)
    except ConfigError as error:
        return str(error)
    finally:
        distributed.stop()
    return "nothing"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_run_says_so_before_any_work(settings):
    settings["engine"] = {"capture": True}
    assert "engine.capture: a CUDA graph needs a GPU" in run_ranks(refused, 1, settings)[0]


# -- the flag


@pytest.mark.parametrize(
    ("values", "expected"), [((1.0, 2.0), True), ((1.0, math.nan), False), ((math.inf, 1.0), False)]
)
def test_finite(values, expected):
    flag = torch.tensor(values).isfinite().all()
    assert Finite(flag).wait() is expected


@pytest.mark.gpu
def test_a_step_waits_for_nothing_but_its_own_flag():
    """Forward, losses, flag and meters on the GPU under torch's guard against hidden synchronisation."""
    from engine.metrics import Meters
    from kernels import mutual_loss

    z = [torch.randn(64, 32, device="cuda", requires_grad=True) for _ in range(4)]
    meters = Meters()
    mutual_loss(*z)  # first use may load libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            losses = mutual_loss(*z)
            flag = Finite(torch.stack([losses.loss_a.detach(), losses.loss_b.detach()]).isfinite().all())
            (losses.loss_a + losses.loss_b).backward()
            assert flag.wait()
            meters.add({"loss": losses.loss_a})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(meters.read()["loss"])
