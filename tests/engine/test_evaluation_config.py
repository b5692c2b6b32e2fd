"""Settings of an evaluation: what holds without any, and every mistake named by its dotted key before any work."""

import re
from pathlib import Path

import pytest

from engine.config import ConfigError, parse_config
from engine.corruptions import CORRUPTIONS
from engine.evaluate import run_settings
from engine.evaluation_config import EvaluationConfig, LabelledData
from engine.settings import overridden, parse_section


def parsed(*overrides: str) -> EvaluationConfig:
    return parse_section(EvaluationConfig, overridden({}, overrides))


def test_without_settings():
    cfg = parsed()
    assert (cfg.protocols, cfg.seed, cfg.draws, cfg.data) == (("knn", "linear"), 0, 3, LabelledData())
    assert (cfg.knn.k, cfg.knn.tau, cfg.knn.bank) == (200, 0.1, None)
    assert cfg.linear.rates == (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    assert (cfg.linear.steps, cfg.linear.batch_size, cfg.linear.weight_decay) == (5000, 256, 1e-5)
    assert cfg.linear.held_out == 0.15
    assert cfg.few.shares == (0.01, 0.05, 0.1, 0.25, 0.5)
    assert (cfg.noisy.kinds, cfg.noisy.rates) == (("symmetric", "pairflip"), (0.2, 0.4, 0.6, 0.8))
    assert cfg.noisy.human is None
    assert (cfg.ood, cfg.transfer, cfg.corruptions.kinds) == ((), (), tuple(CORRUPTIONS))
    assert cfg.corruptions.images == 2000


def test_overrides_reach_every_kind_of_value():
    cfg = parsed(
        "protocols=[few,noisy,ood,transfer,corruptions]", "few.shares=[1,1e-3]", "noisy.human=n.npz", "noisy.kinds=[]",
        "ood=[{name: mine, file: mine.npz}, {name: s, dataset: stl10, root: x}]",
        "transfer=[{name: mine, dataset: folder, root: photos}]", "linear.rates=[1e-2]", "linear.weight_decay=0",
        "knn.bank=100", "corruptions.kinds=[fog]", "--draws=5", "data.root=there",
    )  # fmt: skip
    assert cfg.protocols == ("few", "noisy", "ood", "transfer", "corruptions")
    assert (cfg.few.shares, cfg.noisy.human, cfg.noisy.kinds) == ((1.0, 0.001), Path("n.npz"), ())
    assert [(o.name, o.dataset, o.root, o.file) for o in (*cfg.ood, *cfg.transfer)] == [
        ("mine", None, Path("data"), Path("mine.npz")), ("s", "stl10", Path("x"), None),
        ("mine", "folder", Path("photos"), None),
    ]  # fmt: skip
    assert (cfg.linear.rates, cfg.linear.weight_decay, cfg.knn.bank, cfg.draws) == ((0.01,), 0.0, 100, 5)
    assert (cfg.corruptions.kinds, cfg.data.root) == (("fog",), Path("there"))


ALL_DATASETS = "'cifar10', 'cifar100', 'stl10', 'fashion-mnist', 'tiny-imagenet', 'folder', 'webdataset' or 'tfrecord'"
ALL_KINDS = ", ".join(CORRUPTIONS)
ONE_SOURCE = "exactly one of dataset and file is needed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocols=[knn,lineer]", "protocols.1: found 'lineer', allowed: 'knn', 'linear', 'official', 'few', "
         "'noisy', 'ood', 'transfer' or 'corruptions'"),
        ("protocols=[lineer]", "protocols.0: found 'lineer', allowed: 'knn', 'linear', 'official', 'few', "
         "'noisy', 'ood', 'transfer' or 'corruptions'"),
        ("protocols=[]", "protocols: found [], allowed: at least 1"),
        ("protocols=knn", "protocols: found 'knn', allowed: a list, [...]"),
        ("protocols=[knn,few,knn]", "protocols: each at most once, found knn, few, knn"),
        ("protocols=[knn,ood]", "ood: the protocol needs data, e.g. ood=[{name: x, dataset: stl10}]"),
        ("protocols=[transfer]", "transfer: the protocol needs data, e.g. transfer=[{name: x, dataset: stl10}]"),
        ("seed=-1", "seed: found -1, allowed: greater than or equal to 0"),
        ("draws=0", "draws: found 0, allowed: greater than 0"),
        ("knn=3", "knn: found 3, allowed: a mapping, {key: value, ...}"),
        ("knn.k=0", "knn.k: found 0, allowed: greater than 0"),
        ("knn.tau=0", "knn.tau: found 0, allowed: greater than 0"),
        ("knn.bank=0", "knn.bank: found 0, allowed: greater than 0"),
        ("linear.rates=[0]", "linear.rates.0: found 0, allowed: greater than 0"),
        ("linear.rates=[0.1,-1]", "linear.rates.1: found -1, allowed: greater than 0"),
        ("linear.rates=[.inf]", "linear.rates.0: found inf, allowed: a finite number"),
        ("linear.rates=[]", "linear.rates: found [], allowed: at least 1"),
        ("linear.rates=0.1", "linear.rates: found 0.1, allowed: a list, [...]"),
        ("linear.held_out=1", "linear.held_out: found 1, allowed: less than 1"),
        ("linear.weight_decay=-1", "linear.weight_decay: found -1, allowed: greater than or equal to 0"),
        ("few.shares=[0]", "few.shares.0: found 0, allowed: greater than 0"),
        ("few.shares=[0.1,1.5]", "few.shares.1: found 1.5, allowed: less than or equal to 1"),
        ("few.shares=[]", "few.shares: found [], allowed: at least 1"),
        ("noisy.rates=[0.2,1]", "noisy.rates.1: found 1, allowed: less than 1"),
        ("noisy.rates=[0]", "noisy.rates.0: found 0, allowed: greater than 0"),
        ("noisy.kinds=[asymmetric]", "noisy.kinds.0: found 'asymmetric', allowed: 'symmetric' or 'pairflip'"),
        ("ood=[{name: x}]", f"ood.0: x: {ONE_SOURCE}, found neither"),
        ("ood=[{name: x, dataset: stl10, file: x.npz}]", f"ood.0: x: {ONE_SOURCE}, found both"),
        ("ood=[{name: y, file: y.npz}, {name: x}]", f"ood.1: x: {ONE_SOURCE}, found neither"),
        ("ood=[{dataset: stl10}]", "ood.0.name: is required"),
        ("ood=[{name: x, dataset: svhn}]", f"ood.0.dataset: found 'svhn', allowed: {ALL_DATASETS}"),
        ("ood=[{name: x, file: a.npz}, {name: x, file: b.npz}]", "ood: names must differ, found x, x"),
        ("ood=[stl10]", "ood.0: found 'stl10', allowed: a mapping, {key: value, ...}"),
        ("transfer=[{name: x}]", f"transfer.0: x: {ONE_SOURCE}, found neither"),
        ("transfer=[{name: x, dataset: svhn}]", f"transfer.0.dataset: found 'svhn', allowed: {ALL_DATASETS}"),
        ("transfer=[{name: x, dataset: stl10}, {name: x, dataset: cifar100}]",
         "transfer: names must differ, found x, x"),
        ("transfer=[{name: mine, file: mine.npz}]", "transfer: mine is one file, and a probe learns from some images "
         "and is tested on others; give a dataset, e.g. folder with train/ and val/"),
        ("corruptions.kinds=[fog,fogg,sleet]", f"corruptions.kinds: found fogg, sleet, allowed: {ALL_KINDS}"),
        ("corruptions.kinds=[]", f"corruptions.kinds: found none, allowed: {ALL_KINDS}"),
        ("corruptions.images=0", "corruptions.images: found 0, allowed: greater than 0"),
        ("data.dataset=mnist", f"data.dataset: found 'mnist', allowed: {ALL_DATASETS}"),
        ("data.image_size=32", "data.image_size: unknown key; allowed: dataset, root, manifest, shards, workers"),
        ("few.shares=[0.1,0.5,0.1]", "few.shares: each at most once, found 0.1, 0.5, 0.1"),
        ("noisy.rates=[0.2,0.2]", "noisy.rates: each at most once, found 0.2, 0.2"),
        ("ood=[{name: a|b, file: a.npz}]", "ood.0.name: found 'a|b', allowed: letters, digits, spaces and _ . + -"),
        ("few.share=[0.1]", "few.share: unknown key; did you mean shares?"),
        ("liner.steps=3", "liner: unknown key; did you mean linear?"),
        ("ood=[{name: x, datset: stl10}]", "ood.0.datset: unknown key; did you mean dataset?"),
        ("knn.zzz=3", "knn.zzz: unknown key; allowed: k, tau, bank"),
        ("draws", "draws: an override is section.key=value"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_key_found_and_allowed(override, message):
    with pytest.raises(ConfigError) as error:
        parsed(override)
    assert str(error.value) == message


def test_every_mistake_is_told():
    with pytest.raises(ConfigError) as error:
        parsed("linear.rates=[0,a,0.1]", "few.shares=[2]", "knn.kk=1")
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["knn.kk", "linear.rates.0", "linear.rates.1", "few.shares.0"]


@pytest.mark.parametrize("nothing", ["noisy.kinds=[]", "noisy.rates=[]"])
def test_noise_needs_something_that_makes_labels(nothing):
    with pytest.raises(ConfigError, match="^noisy: the protocol needs kinds and rates, or human labels$"):
        parsed("protocols=[noisy]", nothing)
    assert parsed("protocols=[noisy]", nothing, "noisy.human=n.npz").noisy.human == Path("n.npz")
    assert parsed(nothing).protocols == ("knn", "linear"), "no matter where no noise is asked for"


def test_the_data_of_a_run_serve_its_evaluation(settings):
    settings["data"] |= {"loader": "resident", "resident_gib": 2, "augment": "simsiam"}
    cfg = parse_config(settings)
    found = run_settings(cfg, ["few.shares=[0.5]"])
    data = cfg.data
    assert found.data == LabelledData(dataset="folder", root=data.root, workers=0) and found.data.root == data.root
    assert found.few.shares == (0.5,)
    assert run_settings(cfg, ["data.root=elsewhere"]).data.root == Path("elsewhere")
    with pytest.raises(ConfigError, match=re.escape("data.rooot: unknown key; did you mean root?")):
        run_settings(cfg, ["data.rooot=x"])
