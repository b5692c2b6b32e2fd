"""Every mistake in a configuration is found before any work, with the dotted key."""

from pathlib import Path

import pytest

from engine.config import ConfigError, differing_keys, load_config, parse_config, save_config

ROOT = Path(__file__).parents[2]

MINIMAL = """
run: {output_dir: runs/test, steps: 10}
data: {batch_size: 64}
peers:
  - {name: a, backbone: wrn-10-1}
  - {name: b, backbone: wrn-10-1}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_reach_every_kind_of_value(file):
    cfg = load_config(
        file,
        ["peers.0.optimizer.lr=1e-3", "run.steps=7", "data.augment=simsiam", "distill.weight=[100, 1]",
         "engine.deepspeed.zero_optimization.overlap_comm=false", "peers.1.projector={hidden: 64, out: 32}",
         "data.workers=0", "--eval.knn.k=3"],
    )  # fmt: skip
    assert cfg.peers[0].optimizer.lr == 1e-3
    assert cfg.run.steps == 7
    assert cfg.data.augment.preset == "simsiam"
    assert cfg.weights == (100.0, 1.0)
    assert cfg.engine.deepspeed == {"zero_optimization": {"overlap_comm": False}}
    assert (cfg.peers[1].projector.hidden, cfg.peers[1].projector.out) == (64, 32)
    assert (cfg.data.workers, cfg.eval.knn.k) == (0, 3)


def test_numbers_of_the_deepspeed_section_stay_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "engine: {deepspeed: {gradient_clipping: 1e-1}}\n")
    assert load_config(path).engine.deepspeed["gradient_clipping"] == 0.1
    assert load_config(path, ["engine.deepspeed.gradient_clipping=5e-1"]).engine.deepspeed["gradient_clipping"] == 0.5


def test_two_peers_distil_by_default_and_one_cannot(file):
    assert load_config(file).distill is not None
    one = "peers=[{name: a, backbone: wrn-10-1}]"
    assert load_config(file, [one]).distill is None
    with pytest.raises(ConfigError, match="distill: needs two peers or more, found one"):
        load_config(file, [one, "distill.tau=0.1"])


def test_a_saved_configuration_reads_back_equal(file, tmp_path):
    cfg = load_config(file, ["data.augment={preset: simsiam, blur: 0.3}", "distill.weight=[2, 1]"])
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg
    assert differing_keys(cfg.resolved(), load_config(file, ["distill.weight=[2, 3]"]).resolved()) == [
        "data.augment.preset", "data.augment.blur", "distill.weight.1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("peers.0.tau=0", "peers.0.tau: found 0, allowed: greater than or equal to"),
        ("distill.tau=-1", "distill.tau: found -1, allowed: greater than or equal to"),
        ("distill.tau=.nan", "distill.tau: found nan"),
        ("peers.0.optimizer.lrr=1", "peers.0.optimizer.lrr: unknown key; did you mean lr?"),
        ("dat.x=1", "dat: unknown key; did you mean data?"),
        ("run.zzzzz=1", "run.zzzzz: unknown key; allowed: output_dir, seed, epochs"),
        ("data.batch_size=many", "data.batch_size: found 'many', allowed: a valid integer"),
        ("data.batch_size=1", "data.batch_size: found 1, allowed: greater than or equal to 2"),
        ("data.workers=foo", "data.workers: found 'foo', allowed: a valid integer"),
        ("data.dataset=mnist", "data.dataset: found 'mnist', allowed: 'cifar10', 'cifar100'"),
        ("data.loader=ffcv", "data.loader: found 'ffcv', allowed: 'torchvision', 'dali' or 'resident'"),
        ("peers.5.tau=1", "peers.5.tau: cannot be set here"),
        ("peers.0.optimizer.name=foo", "peers.0.optimizer.name: found 'foo', allowed: 'adam'"),
        ("peers.0.objective=byl", "peers.0.objective: found 'byl', allowed: 'simclr', 'simsiam', 'byol', 'mocov2'"),
        ("peers.0.objective=3", "peers.0.objective: found 3, allowed: a name, or a mapping"),
        ("peers.0.objective={momentum: 1}", "peers.0.objective: found .*, allowed: a name, or a mapping"),
        ("peers.0.objective={name: byol, momentm: 1}", "peers.0.objective.momentm: unknown key; did you mean momentum"),
        ("peers.0.objective={name: byol, momentum: 1.5}", "peers.0.objective.momentum: found 1.5, allowed: less than"),
        (
            "peers.0.objective={name: vicreg, queue: 9}",
            "peers.0.objective.queue: unknown key; allowed: name, invariance, variance, covariance$",
        ),
        (
            "peers.0.backbone.depth=9",
            "peers.0.backbone.depth: cannot be set here, peers.0.backbone is 'wrn",
        ),
        ("distill.tau=1e-7", "distill.tau: found 1e-07, allowed: greater than or equal to"),
        ("run.epochs=3", "exactly one of run.epochs and run.steps is needed .*, found epochs=3 and steps=10"),
        ("run.steps=null", "exactly one of run.epochs and run.steps is needed .*, found neither"),
        ("engine.zero_stage=4", "engine.zero_stage: found 4, allowed: 0, 1, 2 or 3"),
        ("engine.precision=fp16", "engine.precision: found 'fp16'"),
        ("peers.0.name=b", "peers: names must differ, found b, b"),
        ("peers.0.name=A/b", "peers.0.name: found 'A/b'"),
        ("data.batch_size", "data.batch_size: an override is section.key=value"),
        ("distill.weight=-1", "distill.weight: found -1, allowed: greater than or equal to 0"),
        ("data.augment.crop_scale=[0.5, 0.1]", r"data.augment.crop_scale: must be \(low, high\)"),
        ("data.augment.crop_scale=[0.5, 1.5]", "data.augment.crop_scale: must not exceed the whole image"),
        ("data.augment=foo", "data.augment.preset: found 'foo', allowed: 'simclr' or 'simsiam'"),
        ("peers=[]", r"peers: found \[\], allowed: at least 1$"),
        ("run.seed=[1", "run.seed: .* is not a YAML value"),
        ("run.output_dir=null", "run.output_dir: found None"),
    ],
)
def test_mistakes_name_the_key_what_was_given_and_what_is_allowed(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


@pytest.mark.parametrize("name", ["lars", "lamb", "apex.fused_lamb"])
def test_a_ratio_per_layer_under_zero_is_refused_with_the_reason(file, name):
    chosen = [f"peers.1.optimizer.name={name}"]
    assert load_config(file, chosen).peers[1].optimizer.name == name
    with pytest.raises(ConfigError, match=rf"peers.1.optimizer.name: {name} under engine.zero_stage=2 .* flattens"):
        load_config(file, [*chosen, "engine.zero_stage=2"])


@pytest.mark.parametrize("name", ["sgd", "adamw", "apex.fused_sgd", "apex.fused_adam"])
def test_what_works_on_each_number_alone_runs_under_zero(file, name):
    assert load_config(file, [f"peers.1.optimizer.name={name}", "engine.zero_stage=2"]).engine.zero_stage == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{name: sgd, eta: 0.01}", "optimizer.eta: found 0.01, but sgd has no such option, allowed with: lars"),
        ("{name: lamb, lr_in_momentum: false}", "optimizer.lr_in_momentum: found False, but lamb has no such option"),
        ("{name: sgd, betas: [0.8, 0.9]}", r"optimizer.betas: found \(0.8, 0.9\), but sgd .* with: adam, adamw, lamb"),
        ("{momentum: 0.8}", "optimizer.momentum: found 0.8, but adam .* allowed with: sgd, lars, apex.fused_sgd"),
        ("{betas: [0.9, 1.0]}", "optimizer.betas.1: found 1.0, allowed: less than 1"),
        ("{eta: 0}", "optimizer.eta: found 0, allowed: greater than 0"),
        ("{milestones: [3]}", r"optimizer.milestones: found \[3.0\], but schedule=constant has none, .*schedule=step"),
        ("{schedule: cosine, gamma: 0.5}", "optimizer.gamma: found 0.5, but schedule=cosine has none"),
        ("{schedule: step}", "optimizer.milestones: found none, but schedule=step needs at least one"),
        ("{schedule: step, milestones: [3, 2]}", r"optimizer.milestones: found \[3.0, 2.0\], allowed: each later"),
        ("{schedule: step, milestones: [2, 2]}", r"optimizer.milestones: found \[2.0, 2.0\], allowed: each later"),
        ("{schedule: step, milestones: [0, 2]}", "optimizer.milestones.0: found 0, allowed: greater than 0"),
        ("{schedule: step, milestones: [2], warmup_epochs: 3}", "optimizer.milestones: .* warmup_epochs=3"),
        ("{schedule: step, milestones: [2], gamma: 10}", "optimizer.gamma: found 10, allowed: less than 1"),
        ("{schedule: steps}", "optimizer.schedule: found 'steps', allowed: 'constant', 'cosine' or 'step'"),
        ("{lr_scaling: log}", "optimizer.lr_scaling: found 'log', allowed: 'none', 'linear' or 'sqrt'"),
        ("{name: fused_sgd}", "optimizer.name: found 'fused_sgd', allowed: .*'apex.fused_sgd'"),
        (
            "{name: apex.fused_lamb, weight_decay: 0}",
            "optimizer.exclude_bias_and_norm: found its default, true, with apex.fused_lamb and weight_decay=0",
        ),
    ],
)
def test_optimizer_options_that_do_nothing_or_contradict_are_refused(file, section, message):
    with pytest.raises(ConfigError, match=f"^peers.0.{message}") as error:
        load_config(file, [f"peers.0.optimizer={section}"])
    assert "\n" not in str(error.value), "one mistake, one line"


@pytest.mark.parametrize(
    "section",
    [
        "{name: lars, lr: 0.075, lr_scaling: sqrt, eta: 0.02, lr_in_momentum: false, momentum: 0.95}",
        "{name: apex.fused_lamb, weight_decay: 0, exclude_bias_and_norm: false, betas: [0.8, 0.9]}",
        "{name: sgd, schedule: step, milestones: [1.5, 3], gamma: 0.2, warmup_epochs: 1.5, lr_scaling: linear}",
        "{name: adamw, momentum: 0.9, eta: 0.001, milestones: []}",  # defaults, as a saved configuration holds them
    ],
)
def test_an_optimizer_section_reads_back_equal(file, tmp_path, section):
    cfg = load_config(file, [f"peers.0.optimizer={section}"])
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*nothing.yaml"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match="broken.yaml is not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="run: is required"):
        parse_config({"peers": [{"name": "a", "backbone": "resnet18"}]})


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_says_how_to_run_it(path):
    cfg = load_config(path)
    assert cfg.run.output_dir == Path("runs") / path.stem
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert f"deepspeed engine/train.py --config configs/{path.name}" in text
    for word in ("Hardware:", "Time:", "Score:"):
        assert word in text, f"{path.name}: the head comment must say {word}"


def test_official_holds_every_number_of_the_official_code():
    cfg = load_config(ROOT / "configs" / "cifar10_official.yaml")
    assert cfg.data.views == "per_peer"
    assert (cfg.data.batch_size, cfg.data.augment.preset) == (256, "simclr")
    assert cfg.distill is not None
    assert (cfg.distill.tau, cfg.distill.reduction, cfg.weights) == (0.1, "mean", (100.0, 1.0))
    assert cfg.run.epochs == 1000
    for peer in cfg.peers:
        assert (peer.tau, peer.bn) == (0.5, "per_view")
        assert (peer.projector.hidden, peer.projector.out, peer.projector.layers) == (512, 128, 2)
        optimizer = peer.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adam", 3e-4, 1e-6)
        assert (optimizer.schedule, optimizer.warmup_epochs) == ("constant", 0.0)
        assert optimizer.exclude_bias_and_norm is None  # Adam: decay on everything, as torch does


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"loader": "dali"},
            r"data\.loader: dali decodes files, and cifar10 is one array; use data\.loader=torchvision",
        ),
        ({"loader": "dali", "dataset": "stl10"}, r"data\.loader: dali decodes files, and stl10 is one array"),
        ({"shards": 3}, r"data\.shards: 3 with data\.dataset=cifar10, which has no shards; unset it"),
        ({"shards": 0, "dataset": "tfrecord"}, r"data\.shards: found 0"),
        ({"last_batch": "pad"}, r"data\.last_batch: found 'pad', allowed: 'drop' or 'fill'"),
    ],
)
def test_data_sections_without_meaning_are_refused(settings, data, message):
    settings["data"] = data
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


@pytest.mark.parametrize("dataset", ["folder", "webdataset", "tfrecord", "tiny-imagenet"])
def test_dali_takes_encoded_images(settings, dataset):
    settings["data"] = {"loader": "dali", "dataset": dataset, "root": "~/images", "manifest": "~/m.jsonl"}
    data = parse_config(settings).data
    assert data.loader == "dali"
    assert not str(data.root).startswith("~") and not str(data.manifest).startswith("~")
