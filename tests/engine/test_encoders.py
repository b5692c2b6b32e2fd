"""Frozen encoders are the networks that were saved; files and runs that do not fit are refused by name and option."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine import checkpoint
from engine.checkpoint import CheckpointError, Progress
from engine.config import ConfigError, parse_config
from engine.encoders import Encoder, file_encoder, run_encoder
from engine.peers import build_backbone, build_peer

CIFAR = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))  # of runs at 32 px
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.625)
FACTS = {
    "backbone": "wrn-10-1", "stem": "auto", "image_size": "32", "features": "64", "mean": json.dumps(MEAN),
    "std": json.dumps(STD),
}  # fmt: skip


def trained(name: str = "wrn-10-1", **options) -> nn.Module:
    """A backbone whose BatchNorms have seen images, so that it computes something else in training."""
    torch.manual_seed(0)
    module, _ = build_backbone(name, image_size=32, **options)
    with torch.no_grad():
        for _ in range(3):
            module(1.0 + 2.0 * torch.randn(8, 3, 32, 32))
    return module.eval()


def images(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return trained()


@pytest.fixture
def saved(tmp_path, backbone) -> Callable[..., Path]:
    """Writes the backbone with some metadata."""

    def save(facts: dict[str, str] | None = None, module: nn.Module = backbone) -> Path:
        file = tmp_path / "weights.safetensors"
        save_file(module.state_dict(), file, metadata=facts)
        return file

    return save


def check_features(encoder: Encoder, module: nn.Module) -> None:
    """The module's own features, frozen; and in training they would be others."""
    features = encoder.features(images())
    with torch.no_grad():
        expected = module(images())
        assert torch.equal(features, expected)
        assert torch.equal(encoder.features(images()[:2]), module(images()[:2]))
        in_training = copy.deepcopy(module).train()(images())
    assert not torch.allclose(in_training, expected, atol=1e-2), "or the mode says little"
    assert features.dtype == torch.float32 and not features.requires_grad
    assert features.shape == (5, encoder.width) and not encoder.module.training


def test_a_file_with_our_metadata_says_all_by_itself(saved, backbone):
    file = saved(FACTS)
    encoder = file_encoder(file, backbone=None, image_size=None)
    assert encoder[:3] == ("weights", "wrn-10-1", "auto")
    assert (encoder.width, encoder.size, encoder.statistics) == (64, 32, (MEAN, STD))
    check_features(encoder, backbone)
    again = file_encoder(file, backbone="wrn-10-1", image_size=32)  # told what it says: no contradiction
    assert torch.equal(again.features(images()), encoder.features(images()))


def test_a_file_without_metadata_is_told(saved, backbone):
    encoder = file_encoder(saved(), backbone="wrn-10-1", image_size=32)
    assert encoder[:3] == ("weights", "wrn-10-1", "auto")
    assert (encoder.width, encoder.size) == (64, 32)
    assert encoder.statistics == CIFAR, "those that runs have by default"
    check_features(encoder, backbone)


@pytest.mark.parametrize("facts", [{"format": "pt"}, {"mean": FACTS["mean"]}, {"backbone": "wrn-10-2"}])
def test_metadata_of_others_are_none_of_ours(saved, facts):
    encoder = file_encoder(saved(facts), backbone="wrn-10-1", image_size=32)
    assert encoder.backbone == "wrn-10-1"
    assert encoder.statistics == CIFAR


@pytest.mark.parametrize("stem", ["small", "standard"])
def test_the_stem_is_the_files(saved, stem):
    """At 32 px a standard stem is nobody's default."""
    module = trained("resnet18", stem=stem)
    encoder = file_encoder(
        saved({**FACTS, "backbone": "resnet18", "stem": stem}, module), backbone=None, image_size=None
    )
    assert (encoder.stem, encoder.width) == (stem, 512)
    check_features(encoder, module)


def test_weights_in_half_precision_give_features_in_float32(saved, backbone):
    half = trained().half()
    encoder = file_encoder(saved(FACTS, half), backbone=None, image_size=None)
    features = encoder.features(images())
    assert features.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(features, backbone(images()), rtol=2e-2, atol=2e-2)
    in_half = encoder._replace(module=half).features(images().half())
    assert in_half.dtype == torch.float32
    torch.testing.assert_close(in_half, features, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        (None, {}, "--backbone: {file} does not say which backbone it holds; give its name"),
        ({**FACTS, "mean": "[0.1"}, {}, "{file}: its mean is [0.1; three numbers are expected"),
        ({**FACTS, "std": "[0, 1, 1]"}, {}, "{file}: its std is [0, 1, 1]; three numbers are expected, of std above 0"),
        ({**FACTS, "image_size": "x"}, {}, "{file}: has image_size x, stem auto; export it anew"),
        ({**FACTS, "stem": "zzz"}, {}, "{file}: has image_size 32, stem zzz; export it anew"),
        (None, {"image_size": 32}, "--backbone: {file} does not say which backbone it holds; give its name"),
        (None, {"backbone": "wrn-10-1"},
         "--image-size: {file} does not say for which images it is; give their side in pixels"),
        (FACTS, {"backbone": "resnet18"},
         "--backbone: resnet18 is given, and {file} holds wrn-10-1"),
        (FACTS, {"image_size": 64},
         "--image-size: 64 is given, and {file} is for 32 px"),
        (None, {"backbone": "wrn-10-2", "image_size": 32}, "--weights: {file} does not fit --backbone wrn-10-2 at 32"),
        (None, {"backbone": "wrn-16-1", "image_size": 32}, "--weights: {file} does not fit --backbone wrn-16-1 at 32"),
        (None, {"backbone": "resnet18", "image_size": 40}, "--weights: {file} does not fit --backbone resnet18 at 40"),
        (None, {"backbone": "resnet-18", "image_size": 32}, "backbone: 'resnet-18' is unknown; did you mean resnet18"),
        (None, {"backbone": "wrn-11-1", "image_size": 32}, "backbone: 'wrn-11-1': DEPTH must be 6n + 4"),
        ({**FACTS, "backbone": "wrn-10-2"}, {}, "--weights: {file} does not fit --backbone wrn-10-2 at 32 px"),
    ],
)  # fmt: skip
def test_contradictions_and_gaps_are_refused(saved, facts, options, message):
    file = saved(facts)
    with pytest.raises(ConfigError) as error:
        file_encoder(file, **{"backbone": None, "image_size": None, **options})
    assert str(error.value).startswith(message.format(file=file))
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_are_named(tmp_path, backbone):
    """A strict load: a backbone that is half random would be evaluated without a word."""
    weights = backbone.state_dict()
    del weights["bn.running_mean"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"--weights: .*w\.safetensors does not fit .*bn\.running_mean"):
        file_encoder(tmp_path / "w.safetensors", backbone="wrn-10-1", image_size=32)


def damaged(kind: str, whole: Path) -> Path:
    file = whole.with_name(f"{kind}.safetensors")
    if kind == "text":
        file.write_text("accuracy: 0.9\n" * 20)
    elif kind == "pickle":
        torch.save({"a": torch.ones(3)}, file)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        file.write_bytes(whole.read_bytes()[:-100])
    elif kind == "folder":
        file.mkdir()
    return file


@pytest.mark.parametrize("kind", ["missing", "text", "pickle", "empty", "truncated", "folder"])
def test_what_is_no_safetensors_is_named(saved, kind):
    file = damaged(kind, saved(FACTS))
    with pytest.raises(CheckpointError) as error:
        file_encoder(file, backbone="wrn-10-1", image_size=32)
    assert str(error.value).startswith(f"{file}: cannot be read as safetensors (")
    assert "\n" not in str(error.value)


# -- runs --------------------------------------------------------------------------------------------------------------


def checkpointed(run: Path, cfg, step: int, seed: int) -> dict[str, nn.Module]:
    """A checkpoint with fresh weights, as a run leaves it, less what only training needs; returns the encoders."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    found, files = {}, {}
    for peer in cfg.peers:
        module = build_peer(peer, image_size=32)
        with torch.no_grad():
            module(1.0 + 2.0 * torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))
        file = checkpoint.weights_file(folder, peer.name)
        save_file(module.state_dict(), file)
        held = file.read_bytes()
        files[file.name] = {"bytes": len(held), "sha256": hashlib.sha256(held).hexdigest()}
        found[peer.name] = module.encoder.eval()
    progress = Progress(step=step, data="d", loader="l", seconds=1.0, train_seconds=1.0)
    meta = {"format": checkpoint.FORMAT, "progress": asdict(progress), "world": 3, "config": cfg.resolved(),
            "files": files}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return found


def test_a_peer_of_a_run_is_that_of_its_newest_checkpoint(settings, tmp_path):
    settings["data"]["image_size"] = None  # the folder's would be 224
    settings["data"] |= {"dataset": "cifar10", "augment": "simsiam"}
    cfg = parse_config(settings)
    old = checkpointed(tmp_path, cfg, 2, seed=0)
    new = checkpointed(tmp_path, cfg, 10, seed=1)
    for peer in cfg.peers:
        encoder = run_encoder(tmp_path, cfg, peer)
        assert encoder[:3] == (peer.name, peer.backbone, peer.stem)
        assert (encoder.size, encoder.width) == (32, new[peer.name].num_features)
        assert encoder.statistics == CIFAR
        check_features(encoder, new[peer.name])
        assert not torch.equal(encoder.features(images()), old[peer.name](images()))


def test_a_run_without_a_checkpoint(config, tmp_path):
    message = f"{tmp_path / 'checkpoints'}: no complete checkpoint there; train the run first"
    for _ in range(2):
        with pytest.raises(CheckpointError) as error:
            run_encoder(tmp_path, config, config.peer("a"))
        assert str(error.value) == message
        (tmp_path / "checkpoints" / ".step_00000002.partial").mkdir(parents=True, exist_ok=True)  # cut while written


def test_a_checkpoint_that_is_damaged_or_anothers(settings, config, tmp_path):
    checkpointed(tmp_path, config, 2, seed=0)
    run_encoder(tmp_path, config, config.peer("a"))
    settings["peers"][0]["tau"] = 0.7
    with pytest.raises(CheckpointError, match="step_00000002: from another configuration; it differs in peers.0.tau"):
        run_encoder(tmp_path, parse_config(settings), config.peer("a"))
    file = checkpoint.weights_file(tmp_path / "checkpoints" / "step_00000002", "b")
    file.write_bytes(file.read_bytes()[:-8] + b"12345678")
    with pytest.raises(CheckpointError, match=r"peer_b\.safetensors: changed since it was written"):
        run_encoder(tmp_path, config, config.peer("a"))
