"""Exported backbones, loaded by timm and torchvision alone, give the peer's features."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import distributed
from engine.config import ConfigError, parse_config
from engine.export import export_backbone, main
from engine.peers import load_backbone
from engine.trainer import Trainer
from ranks import run_ranks

ROOT = Path(__file__).parents[2]


def fit_and_embed(plain: dict) -> list:
    """Trains and returns each peer's features of a fixed batch."""
    ranks = distributed.start()
    trainer = Trainer(parse_config(plain), ranks)
    trainer.fit()
    size = plain["data"]["image_size"]
    features = [engine.features(images(size)).numpy() for engine in trainer.engines]
    distributed.stop()
    return features


def images(size: int) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_folder) -> dict:
    """Two short runs: small images (small stems, a WideResNet) and larger ones (standard stem, MobileNet)."""
    found = {}
    small, large = ("resnet18", "wrn-10-1", "resnet18d"), ("resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224")
    for size, backbones in ((32, small), (112, large)):
        for i in range(0, len(backbones), 2):
            folder = tmp_path_factory.mktemp(f"export{size}_{i}") / "run"
            plain = {
                "run": {"output_dir": str(folder), "steps": 2},
                "data": {"dataset": "folder", "root": str(image_folder), "image_size": size, "batch_size": 8,
                         "workers": 0},
                "peers": [{"name": n, "backbone": b, "projector": {"hidden": 8, "out": 8}}
                          for n, b in zip("ab", backbones[i : i + 2], strict=False)],
                "eval": {"knn": {"k": 3}},
            }  # fmt: skip
            (features,) = run_ranks(fit_and_embed, 1, plain)
            for n, backbone, feature in zip("ab", backbones[i : i + 2], features, strict=False):
                found[size, backbone] = (folder, n, torch.from_numpy(feature))
    return found


def load_by_the_printed_lines(lines: list[str], size: int) -> torch.Tensor:
    """Runs what the command prints in a process that cannot see this project, and returns the model's features."""
    program = [
        *lines, "import torch", "model.eval()",
        f"x = torch.randn(3, 3, {size}, {size}, generator=torch.Generator().manual_seed(0))",
        "import json; print(json.dumps(model(x).tolist()))",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-I", "-c", "\n".join(program)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "backbone", "form"),
    [(32, "resnet18", "timm"), (32, "resnet18", "torchvision"), (32, "resnet18d", "timm"), (112, "resnet18", "timm"),
     (112, "resnet18", "torchvision"), (112, "mobilenetv3_small_050", "timm"), (112, "vit_tiny_patch16_224", "timm")],
)  # fmt: skip
def test_the_library_alone_gives_the_same_features(runs, size, backbone, form):
    run, peer, expected = runs[size, backbone]
    file, lines = export_backbone(run, peer, form)
    assert not any("engine" in line for line in lines)
    torch.testing.assert_close(load_by_the_printed_lines(lines, size), expected, rtol=1e-4, atol=1e-5)
    assert file.name == "model.safetensors"


@pytest.mark.slow
def test_own_backbones_load_by_their_own_function(runs):
    run, peer, expected = runs[32, "wrn-10-1"]
    file, lines = export_backbone(run, peer, "dogo")
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(file)(images(32)), expected, rtol=1e-4, atol=1e-5)
    assert lines[0] == "from engine.peers import load_backbone"
    other, peer, expected = runs[112, "vit_tiny_patch16_224"]
    with torch.no_grad():
        vit = load_backbone(export_backbone(other, peer, "dogo")[0])(images(112))
    torch.testing.assert_close(vit, expected, rtol=1e-4, atol=1e-5)
    assert lines[-1].startswith("# images: RGB in [0, 1], 32 x 32 px, minus the mean [0.4914")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "form", "message"),
    [
        ((32, "wrn-10-1"), "timm", "--format: timm has no wrn-10-1, which is this project's own; use --format dogo"),
        ((32, "resnet18"), "onnx", "--format: 'onnx' is unknown; allowed: timm, torchvision, dogo"),
        ((112, "mobilenetv3_small_050"), "torchvision", "--format: torchvision knows other layers"),
    ],
)
def test_formats_that_do_not_fit(runs, key, form, message):
    run, peer, _ = runs[key]
    with pytest.raises(ConfigError, match=message):
        export_backbone(run, peer, form)


@pytest.mark.slow
def test_the_command(runs, tmp_path, capsys):
    run = runs[32, "resnet18"][0]
    assert (
        main(["--run", str(run), "--peer", "a", "--format", "timm", "--output", str(tmp_path / "x" / "w.safetensors")])
        == 0
    )
    assert "model.maxpool = torch.nn.Identity()" in capsys.readouterr().out
    assert (tmp_path / "x" / "w.safetensors").exists()
    assert main(["--run", str(run), "--peer", "z", "--format", "timm"]) == 2
    assert "--peer: 'z' is not in this run; allowed: a, b" in capsys.readouterr().err
    assert main(["--run", str(tmp_path), "--peer", "a", "--format", "timm"]) == 2
    assert "cannot read" in capsys.readouterr().err
