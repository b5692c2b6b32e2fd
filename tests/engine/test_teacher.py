"""Frozen teachers: the networks that were saved, on images as they have them; what does not fit is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from engine.config import ConfigError, parse_config
from engine.data.augment import build_policy
from engine.data.catalog import open_split
from engine.data.skipped import SkippedImages
from engine.data_config import AugmentConfig
from engine.features import Reader
from engine.peers import build_backbone
from engine.teacher import Teacher, build_teachers, describe_teachers

FACTS = {"backbone": "wrn-10-1", "stem": "auto", "image_size": "32", "features": "64"}
POLICY = build_policy(AugmentConfig(), 32)


def trained(name: str = "wrn-10-1", size: int = 32) -> nn.Module:
    """A backbone whose BatchNorms have seen images."""
    torch.manual_seed(0)
    module, _ = build_backbone(name, image_size=size)
    with torch.no_grad():
        module(1.0 + 2.0 * torch.randn(8, 3, size, size))
    return module.eval()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(trained().state_dict(), path)
    return path


def teachers(settings, alone, peer: dict, distill: dict | None = None, policy=POLICY) -> list[Teacher]:
    peers = [{"name": "a", "backbone": "wrn-10-1", "projector": {"out": 16}}, {"name": "t", **peer}]
    plain = {**settings, "peers": peers, "distill": distill or {}}
    return build_teachers(parse_config(plain), alone, policy)


def views(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 5, 3, size, size, generator=generator)
    return x, y


def test_it_is_the_network_that_was_saved_frozen(settings, alone, file):
    (teacher,) = teachers(settings, alone, {"backbone": "wrn-10-1", "frozen": str(file)})
    assert (teacher.index, teacher.name, teacher.width, teacher.plain) == (1, "t", 64, False)
    x, y = views()
    found = teacher.embed((x, y))
    with torch.no_grad():
        wanted = trained()(x), trained()(y)
    torch.testing.assert_close(found.z, wanted)
    assert not any(z.requires_grad for z in found.z)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert not teacher.module.training
    assert describe_teachers([teacher]) == ["peer t is frozen: wrn-10-1, 64 features of augmented views"]


def test_views_are_normalised_as_its_own_images_were(settings, alone, tmp_path):
    """The file's statistics are not the run's: the network sees the same pixels as where it was trained."""
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.625)
    path = tmp_path / "weights.safetensors"
    save_file(trained().state_dict(), path, metadata={**FACTS, "mean": json.dumps(mean), "std": json.dumps(std)})
    (teacher,) = teachers(settings, alone, {"backbone": "wrn-10-1", "frozen": str(path)})
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def normalised(statistics):
        center, spread = (torch.tensor(values)[:, None, None] for values in statistics)
        return (pixels - center) / spread

    found = teacher.embed((normalised(POLICY.statistics),) * 2).z[0]
    with torch.no_grad():
        torch.testing.assert_close(found, trained()(normalised((mean, std))), rtol=1e-4, atol=1e-5)
        assert (found - trained()(normalised(POLICY.statistics))).abs().max() > 0.01


def test_plain_features_are_those_of_the_images_as_they_are(settings, alone, file):
    (teacher,) = teachers(settings, alone, {"backbone": "wrn-10-1", "frozen": {"weights": str(file), "views": "plain"}})
    cfg = parse_config(settings)
    dataset = open_split(cfg.data, "train")
    reader = Reader(32, POLICY.statistics, 0, alone, SkippedImages(alone))
    teacher.remember(dataset, reader, rows=3)
    teacher.take(torch.tensor([40, 7, 7]))
    found = teacher.embed(())
    place = found.z[0].data_ptr()
    wanted = reader.every(dataset, teacher.features)
    assert wanted.shape == (48, 64)
    for z in found.z:
        torch.testing.assert_close(z, wanted[[40, 7, 7]])
    teacher.take(torch.tensor([0, 1, 2]))
    assert teacher.embed(()).z[0].data_ptr() == place, "a CUDA graph reads it there"
    torch.testing.assert_close(teacher.embed(()).z[1], wanted[:3])
    assert "64 features of images as they are, computed before the first step" in describe_teachers([teacher])[0]


def test_images_of_its_own_size_where_they_are_plain(settings, alone, tmp_path):
    """Trained at 40 px, in a run at 32: refused on views, whose size is the run's; plain images are read at 40."""
    path = tmp_path / "weights.safetensors"
    save_file(trained(size=40).state_dict(), path, metadata={**FACTS, "image_size": "40"})
    with pytest.raises(
        ConfigError, match="peers.1.frozen.weights: .* is for images of 40 px, and data.image_size is 32"
    ):
        teachers(settings, alone, {"backbone": "wrn-10-1", "frozen": str(path)})
    (teacher,) = teachers(settings, alone, {"backbone": "wrn-10-1", "frozen": {"weights": str(path), "views": "plain"}})
    dataset = open_split(parse_config(settings).data, "train")
    seen = []
    teacher.module.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[-1]))
    teacher.remember(dataset, Reader(32, POLICY.statistics, 0, alone, SkippedImages(alone)), rows=3)
    assert set(seen) == {40}


def test_weights_of_timm(settings, alone, tmp_path, monkeypatch):
    """timm's own loading, of a file in the place of what it would download."""
    source = timm.create_model("test_resnet", num_classes=1000)
    path = tmp_path / "timm.safetensors"
    save_file(source.state_dict(), path)
    create = timm.create_model

    def local(name, **options):
        overlay = {"file": str(path), "hf_hub_id": None, "url": ""} if options.get("pretrained") else None
        return create(name, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", local)
    policy = build_policy(AugmentConfig(), 160)
    settings["data"]["image_size"] = 160
    peer = {"backbone": "test_resnet", "frozen": "timm"}
    (teacher,) = teachers(settings, alone, peer, policy=policy)
    known = timm.get_pretrained_cfg("test_resnet")
    assert teacher.encoder.statistics == (known.mean, known.std)
    x, _ = views(160)
    with torch.no_grad():
        wanted = source.eval().forward_head(source.forward_features(x), pre_logits=True)
    torch.testing.assert_close(teacher.features(x), wanted, rtol=1e-4, atol=1e-5)


def test_weights_of_timm_that_cannot_be_had(settings, alone, monkeypatch):
    def offline(name, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(timm, "create_model", offline)
    message = r"peers.1.frozen.weights: timm could not bring the weights of test_resnet \(OSError: no network\); give a"
    with pytest.raises(ConfigError, match=message):
        teachers(settings, alone, {"backbone": "test_resnet", "frozen": "timm"})


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet_of_nobody"])
def test_timm_has_no_such_weights(settings, alone, name):
    with pytest.raises(ConfigError, match=f"peers.1.frozen.weights: timm has no weights of '{name}'; timm.list_pretr"):
        teachers(settings, alone, {"backbone": name, "frozen": "timm"})


def test_graph_alignment_takes_its_width(settings, alone, file):
    peer = {"backbone": "wrn-10-1", "frozen": str(file)}
    for graph, own in (({}, 16), ({"projection": 8}, 8)):
        message = f"distill.graph.projection: the features of the frozen t are 64 wide, .* {own}; give projection=64"
        with pytest.raises(ConfigError, match=message):
            teachers(settings, alone, peer, {"graph": graph})
    assert teachers(settings, alone, peer, {"graph": {"projection": 64}})


def test_a_whole_network_by_timms_names(settings, alone, tmp_path):
    """With its classifier, as a hub has it; and what does not fit says so with the stem."""
    source = timm.create_model("resnet18").eval()
    path = tmp_path / "whole.safetensors"
    save_file(source.state_dict(), path)
    peer = {"backbone": "resnet18", "frozen": str(path)}
    (teacher,) = teachers(settings, alone, {**peer, "stem": "standard"})
    x, _ = views()
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.features(x), source.forward_head(source.forward_features(x), pre_logits=True)
        )
    message = r"frozen.weights: .* backbone resnet18 at 32 px with stem auto \(that of large images: stem standard\)"
    with pytest.raises(ConfigError, match=message):
        teachers(settings, alone, peer)


def test_a_stem_that_is_not_the_files_is_refused(settings, alone, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(trained().state_dict(), path, metadata=FACTS)
    peer = {"backbone": "wrn-10-1", "frozen": str(path), "stem": "small"}
    with pytest.raises(ConfigError, match="peers.1.stem: small is given, and .* has stem auto; leave it out"):
        teachers(settings, alone, peer)
    with pytest.raises(
        ConfigError, match="peers.1.stem: small is given, and timm's weights of test_resnet are for its own"
    ):
        teachers(settings, alone, {"backbone": "test_resnet", "frozen": "timm", "stem": "small"})


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_an_unreadable_file_is_named_by_its_key(settings, alone, tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="^peers.1.frozen.weights: .*: cannot be read as safetensors"):
        teachers(settings, alone, {"backbone": "wrn-10-1", "frozen": str(path)})


def test_its_knn_is_of_images_as_it_has_them(settings, alone, tmp_path):
    """Read with the backbone's statistics and size: not the run's."""
    path = tmp_path / "weights.safetensors"
    facts = {**FACTS, "image_size": "40", "mean": "[0.1, 0.2, 0.3]", "std": "[0.4, 0.5, 0.6]"}
    save_file(trained(size=40).state_dict(), path, metadata=facts)
    peer = {"backbone": "wrn-10-1", "frozen": {"weights": str(path), "views": "plain"}}
    (teacher,) = teachers(settings, alone, peer)
    reader = teacher.reader(Reader(32, POLICY.statistics, 3, alone, SkippedImages(alone)))
    assert (reader.size, reader.statistics) == (40, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert reader.workers == 3
