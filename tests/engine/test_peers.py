"""Backbones, stems, projectors, what objectives add, and how views go through BatchNorm."""

import pytest
import torch
from torch import nn

from engine.config import ConfigError, PeerConfig
from engine.peers import build_backbone, build_peer


@pytest.mark.parametrize(
    ("name", "parameters"),
    # without classifier: 691,674 and 1,467,610 with ten classes are the paper's 0.7 M and 1.5 M (WRN-16-2, WRN-28-2)
    [("wrn-16-2", 691_674 - 1290), ("wrn-28-2", 1_467_610 - 1290), ("wrn-10-1", None), ("wrn-40-4", None)],
)
def test_wide_resnets_have_the_papers_size(name, parameters):
    backbone, width = build_backbone(name, image_size=32)
    assert width == 64 * int(name.split("-")[2])
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == int(name.split("-")[1]) - 3, (
        "depth counts 3x3 convolutions, three shortcuts and the head"
    )
    if parameters:
        assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, width)


def test_wide_resnet_shrinks_the_image_four_times_and_uses_every_parameter():
    backbone, _ = build_backbone("wrn-16-2", image_size=32)
    shapes = []
    backbone.blocks.register_forward_hook(lambda module, inputs, out: shapes.append(out.shape))
    backbone(torch.randn(2, 3, 32, 32)).sum().backward()
    assert shapes == [(2, 128, 8, 8)]
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_get_the_small_stem_below_100_px(name):
    small, width = build_backbone(name, image_size=32)
    assert (small.conv1.kernel_size, small.conv1.stride, small.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert small.conv1.bias is None
    assert isinstance(small.maxpool, nn.Identity)
    assert width == {"resnet18": 512, "resnet50": 2048}[name]
    large, _ = build_backbone(name, image_size=128)
    assert large.conv1.kernel_size == (7, 7)
    assert isinstance(large.maxpool, nn.MaxPool2d)
    forced, _ = build_backbone(name, image_size=128, stem="small")
    assert forced.conv1.kernel_size == (3, 3)
    kept, _ = build_backbone(name, image_size=64, stem="standard")
    assert kept.conv1.kernel_size == (7, 7)


def test_deep_stem_loses_its_stride_only():
    backbone, _ = build_backbone("resnet18d", image_size=32)
    assert isinstance(backbone.conv1, nn.Sequential)
    assert backbone.conv1[0].stride == (1, 1)
    assert isinstance(backbone.maxpool, nn.Identity)


@pytest.mark.parametrize(
    ("name", "size"), [("mobilenetv3_small_100", 64), ("vit_tiny_patch16_224", 96), ("convnext_atto", 64)]
)
def test_any_timm_backbone_gives_its_pooled_features(name, size):
    backbone, width = build_backbone(name, image_size=size)
    assert backbone.eval()(torch.randn(2, 3, size, size)).shape == (2, width)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, "backbone: 'resnet81' is unknown; did you mean resnet"),
        ("wrn-16", {}, "backbone: 'wrn-16' is unknown; did you mean wrn-16-2"),
        ("qqqqqqqq", {}, "is unknown; timm.list_models"),
        ("wrn-17-2", {}, "DEPTH must be 6n"),
        ("wrn-16-0", {}, "WIDTH at least 1"),
        ("wrn-16-2", {"stem": "standard"}, "stem: wrn-16-2 has only the small-image stem"),
        ("mobilenetv3_small_100", {"stem": "small"}, "stem: small is for ResNets"),
        ("vit_tiny_patch16_224", {"image_size": 8}, "backbone: vit_tiny_patch16_224 does not take data.image_size=8"),
    ],
)
def test_bad_backbones_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, **{"image_size": 32, **options})


def peer(**options) -> nn.Module:
    torch.manual_seed(0)
    return build_peer(PeerConfig(name="a", backbone="wrn-10-1", **options), image_size=32)


def test_official_projector():
    layers = [*peer().projector]
    assert [type(layer) for layer in layers] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert (layers[0].in_features, layers[0].out_features, layers[0].bias) == (64, 512, None)
    assert (layers[3].in_features, layers[3].out_features) == (512, 128)
    assert layers[3].bias is not None
    assert len(peer(projector={"layers": 1}).projector) == 1
    assert len(peer(projector={"layers": 3}).projector) == 7


def test_batchnorm_statistics_per_view_or_joint():
    # views of different brightness: joint statistics mix them, per-view ones do not
    x, y = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32) * 3 + 2
    per_view, joint = peer(bn="per_view"), peer(bn="joint")
    z_x, z_y = per_view(x, y)
    torch.testing.assert_close(z_x, per_view.projector(per_view.encoder(x)))
    torch.testing.assert_close(z_y, per_view.projector(per_view.encoder(y)))
    both = joint.projector(joint.encoder(torch.cat((x, y))))
    torch.testing.assert_close(torch.cat(joint(x, y)), both)
    assert (joint(x, y)[0] - z_x).abs().max() > 0.1
    assert per_view.encoder.bn.num_batches_tracked == 4
    assert joint.encoder.bn.num_batches_tracked == 3


# -- what objectives add -------------------------------------------------------------------------------------------


def kinds(module) -> list[str]:
    return [type(layer).__name__ for layer in module]


@pytest.mark.parametrize(
    ("objective", "layers", "out"),
    [
        ("simclr", ["Linear", "BatchNorm1d", "ReLU", "Linear"], 128),
        ("simsiam", ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"], 2048),
        ("byol", ["Linear", "BatchNorm1d", "ReLU", "Linear"], 256),
        ("mocov2", ["Linear", "ReLU", "Linear"], 128),
        ("barlow_twins", ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"], 2048),
        ("vicreg", ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"], 2048),
    ],
)
def test_projectors_of_the_papers(objective, layers, out):
    module = peer(objective=objective).projector
    assert kinds(module) == layers
    linear = [layer for layer in module if isinstance(layer, nn.Linear)]
    assert linear[-1].out_features == out
    assert {layer.out_features for layer in linear[:-1]} == {peer(objective=objective).projector[0].out_features}
    followed = [isinstance(after, nn.BatchNorm1d) for after in [*module, None][1:]]
    assert all((layer.bias is None) == norm for layer, norm in zip(module, followed, strict=True) if layer in linear)


def test_what_a_configuration_says_of_the_projector_wins():
    module = peer(objective="simsiam", projector={"out": 64, "layers": 2}).projector
    assert [layer.out_features for layer in module if isinstance(layer, nn.Linear)] == [2048, 64]
    assert isinstance(module[-1], nn.BatchNorm1d)


@pytest.mark.parametrize(("objective", "hidden"), [("simsiam", 512), ("byol", 4096)])
def test_predictors_of_the_papers(objective, hidden):
    small = {"hidden": 16, "out": 24}
    made = peer(objective=objective, projector=small).predictor
    assert kinds(made) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert (made[0].in_features, made[0].out_features, made[0].bias) == (24, hidden, None)
    assert (made[3].in_features, made[3].out_features) == (hidden, 24)
    assert made[3].bias is not None


SMALL = {"hidden": 16, "out": 8, "layers": 2}


@pytest.mark.parametrize("bn", ["per_view", "joint"])
@pytest.mark.parametrize("graph", [None, 3])
@pytest.mark.parametrize("objective", ["simclr", "simsiam", "byol", "mocov2"])
def test_outputs_by_name(objective, graph, bn):
    torch.manual_seed(0)
    setting = {"name": "mocov2", "queue": 12} if objective == "mocov2" else objective
    cfg = PeerConfig(name="a", backbone="wrn-10-1", objective=setting, projector=SMALL, bn=bn)
    made = build_peer(cfg, image_size=32, graph=graph)
    x, y = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32) * 2 + 1
    found = made.embedded(made(x, y))
    if bn == "joint":
        z = made.projector(made.encoder(torch.cat((x, y)))).chunk(2)
    else:
        z = tuple(made.projector(made.encoder(view)) for view in (x, y))
    torch.testing.assert_close(found.z, z)
    if objective in ("simsiam", "byol"):
        p = made.predictor(torch.cat(z)).chunk(2) if bn == "joint" else tuple(map(made.predictor, z))
        torch.testing.assert_close(found.p, p)
        assert found.student is found.p
    else:
        assert (found.p, found.graph_p) == (None, None)
        assert found.student is found.z
    if graph is None:
        assert (found.graph_z, found.graph_p) == (None, None)
    else:
        torch.testing.assert_close(found.graph_z, tuple(map(made.graph, found.z)))
        if found.p is not None:
            torch.testing.assert_close(found.graph_p, tuple(map(made.graph, found.p)))
    if objective in ("byol", "mocov2"):
        torch.testing.assert_close(found.k, tuple(view.detach() for view in found.z))  # a copy, at first
        assert not any(view.requires_grad for view in found.k)
    else:
        assert found.k is None
    assert (None if found.queue is None else found.queue.shape) == ((12, 8) if objective == "mocov2" else None)


def test_the_momentum_network_follows():
    """target <- m target + (1 - m) peer, weights alone: its BatchNorm statistics are those of its own passes."""
    made = peer(objective="byol", projector=SMALL)
    before = {key: value.clone() for key, value in made.target.state_dict().items()}
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += torch.randn_like(p)
    made(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
    made.follow(torch.tensor(0.1))
    online = {**{f"0.{k}": v for k, v in made.encoder.named_parameters()},
              **{f"1.{k}": v for k, v in made.projector.named_parameters()}}  # fmt: skip
    moved = dict(made.target.named_parameters())
    assert online.keys() == moved.keys()
    for key, value in moved.items():
        torch.testing.assert_close(value, 0.9 * before[key] + 0.1 * online[key])
        assert not value.requires_grad
    assert made.target[0].bn.num_batches_tracked == 2
    assert (made.target[0].bn.running_mean != made.encoder.bn.running_mean).any()


def test_a_queue_starts_with_unit_rows():
    made = peer(objective={"name": "mocov2", "queue": 50}, projector=SMALL).queue
    torch.testing.assert_close(made.keys.norm(dim=1), torch.ones(50))
    assert made.keys.std(dim=0).min() > 0.2, "they differ"
    assert made.position == 0
