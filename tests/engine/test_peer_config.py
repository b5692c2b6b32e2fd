"""Objectives, frozen teachers and distillation in a configuration: one line each, and what has no meaning refused."""

import pytest
import yaml

from engine.config import ConfigError, load_config, parse_config, save_config


def peers(*changes) -> list[dict]:
    return [{"name": name, "backbone": "wrn-10-1", **own} for name, own in zip("abcdefghi", changes, strict=False)]


def parsed(own, **sections):
    return parse_config({"run": {"output_dir": "x", "steps": 1}, "peers": own, **sections})


@pytest.mark.parametrize("objective", ["simclr", "simsiam", "byol", "mocov2", "barlow_twins", "vicreg"])
def test_an_objective_is_one_word_and_brings_its_own_defaults(objective, tmp_path):
    cfg = parsed(peers({"objective": objective}, {"objective": {"name": objective}}))
    assert cfg.peers[0].objective == cfg.peers[1].objective
    assert cfg.peers[0].projector == cfg.peers[1].projector
    assert cfg.peers[0].tau == {"simclr": 0.5, "mocov2": 0.2}.get(objective)
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg


def test_what_is_said_of_a_projector_keeps_the_rest_of_the_objectives():
    cfg = parsed(peers({"objective": "simsiam", "projector": {"out": 64}}))
    assert cfg.peers[0].projector.model_dump() == {
        "hidden": 2048, "out": 64, "layers": 3, "norm": True, "out_norm": True,
    }  # fmt: skip


TEACHER = {"frozen": "weights.safetensors"}


def test_a_frozen_peer_is_a_teacher(tmp_path):
    cfg = parsed(peers({}, TEACHER, {"frozen": {"weights": "timm", "views": "plain"}}), distill={"weight": [2.0]})
    assert [i for i, _ in cfg.trained] == [0]
    assert [i for i, _ in cfg.teachers] == [1, 2]
    assert [peer.frozen.of_timm for _, peer in cfg.teachers] == [False, True]
    assert [peer.frozen.views for _, peer in cfg.teachers] == ["augmented", "plain"]
    assert cfg.weights == (2.0,)
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg
    with pytest.raises(ConfigError, match="--peer: b is frozen: its weights are those of weights.*; allowed: a$"):
        cfg.peer("b")


@pytest.mark.parametrize(
    ("own", "sections", "message"),
    [
        (
            peers({"objective": {"name": "simsiam", "predictor": None}}), {},
            "peers.0.objective.predictor: found null, but without a predictor .* collapses",
        ),
        (peers({}, {"objective": {"name": "byol", "predictor": None}}), {}, "peers.1.objective.predictor: found null"),
        (
            peers({"objective": {"name": "vicreg", "variance": 0}}), {},
            "peers.0.objective.variance: found 0, allowed: greater than 0",
        ),
        (
            peers({"objective": "barlow_twins", "tau": 0.5}), {},
            "peers.0.tau: found 0.5, but barlow_twins has no temperature, allowed with: simclr, mocov2",
        ),
        (
            peers({"objective": {"name": "mocov2", "queue": 100}}), {"data": {"batch_size": 64}},
            "peers.0.objective.queue: found 100, allowed: at least 128, the two views of data.batch_size=64",
        ),
        (
            peers({}, {**TEACHER, "optimizer": {"lr": 0.1}}), {},
            "peers.1.optimizer: found {'lr': 0.1}, but a frozen teacher does not train and has no optimizer",
        ),
        (peers({}, {**TEACHER, "objective": "byol"}), {}, "peers.1.objective: found 'byol', but a frozen teacher"),
        (peers({}, {"frozen": {"views": "plain"}}), {}, "peers.1.frozen.weights: is required"),
        (peers({}, {"frozen": {"weights": "x", "view": 1}}), {}, "peers.1.frozen.view: unknown key; did you mean"),
        (peers({}, {"frozen": 3}), {}, "peers.1.frozen: found 3, allowed: a file of weights, the word timm"),
        (peers({"frozn": "timm"}), {}, "peers.0.frozn: unknown key; did you mean frozen"),
        (peers({}, {}), {"distill": {"graph": {"node": 0, "edge": 0}}}, "distill.graph: found node=0 and edge=0"),
        (
            peers(*[{"projector": {"out": 1}}] * 2), {"distill": {"graph": {}}},
            "distill.graph.projection: embeddings of width 1 .* have no correlations",
        ),
        (peers({"objective": {"name": "mocov2", "queue": 10**14}}), {}, "peers.0.objective.queue: found 1"),
        (peers(TEACHER, TEACHER), {}, "peers: every one is frozen, so that nothing would train"),
        (peers(*[{}] * 9), {}, "peers: found .*, allowed: .*at most 8"),
        (peers({}, {}, {}), {"distill": {"weight": [1, 2]}}, r"distill.weight: found \[1.0, 2.0\], allowed"),
        (
            peers({}, {"objective": "byol"}), {"distill": {"graph": {}}},
            r"distill.graph.projection: embeddings of widths 128 \(a\), 256 \(b\) have no corr",
        ),
        (
            peers({}, {}), {"distill": {"rows": "all", "symmetric": True}},
            "distill.symmetric: found true with rows=all, whose matrix is symmetric already; allowed: false",
        ),
        (peers({}, {}), {"distill": {"divergence": "tv"}}, "distill.divergence: found 'tv', allowed: 'kl', 'rev"),
        (peers({}, {}), {"distill": {"ramp": {}}}, "distill.ramp: one of epochs and steps .* neither"),
        (
            peers({}, {}), {"distill": {"ramp": {"epochs": 1.5, "steps": 3}}},
            "distill.ramp: one of epochs and steps is needed, .*, found epochs=1.5 and steps=3",
        ),
        (peers({}, {}), {"distill": {"ramp": {"steps": 3, "start": 2}}}, "distill.ramp.start: found 2, allowed"),
        (peers({}, {}, {}), {"engine": {"concurrency": "split"}}, "engine.concurrency: split takes two peers, found 3"),
        (
            peers({}, {"objective": "byol"}), {"engine": {"concurrency": "split"}},
            "engine.concurrency: split takes simclr alone, found peers.1.objective.name=byol; use serial",
        ),
        (
            peers({}, {}), {"engine": {"concurrency": "split"}, "distill": {"graph": {}}},
            "engine.concurrency: split takes no distill.graph; use serial",
        ),
        (peers({}, TEACHER), {"engine": {"concurrency": "split"}}, "split takes two peers that train, found one"),
    ],
)  # fmt: skip
def test_combinations_without_meaning_are_refused_with_the_reason(own, sections, message):
    with pytest.raises(ConfigError, match=message):
        parsed(own, **sections)


def test_graph_alignment_of_unequal_widths_takes_a_projection():
    own = peers({}, {"objective": "byol"})
    assert parsed(own, distill={"graph": {"projection": 64}}).distill.graph.projection == 64


def test_null_leaves_frozen_out():
    assert parsed(peers({"frozen": None})).teachers == ()


def test_a_key_below_a_word_says_what_to_give(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"run": {"output_dir": "x", "steps": 1}, "peers": peers({"objective": "byol"})}))
    message = "peers.0.objective.momentum: cannot be set here, peers.0.objective is 'byol' and no mapping; give peers.0"
    with pytest.raises(ConfigError, match=message):
        load_config(file, ["peers.0.objective.momentum=0.9"])
