"""Import arrows run one way (the order of the engine's files below), and nothing happens at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file imports only what stands above it.
ORDER = [
    "kernels.collectives", "kernels.reference", "kernels.reference_distill", "kernels.precision", "kernels.checks",
    "kernels.tiles", "kernels.problem", "kernels.forward_gradients", "kernels.strips", "kernels.native",
    "kernels.mutual_native", "kernels.embed_triton", "kernels.pairs_triton", "kernels.finish_triton",
    "kernels.project_triton", "kernels.stats_triton", "kernels.stats_safe_triton", "kernels.gradient_triton",
    "kernels.passes_triton", "kernels.mutual_triton", "kernels.backends", "kernels.mutual",
    "kernels.distill_strip", "kernels.distill_tiled", "kernels.distill", "kernels.graph",
    "kernels.predictive", "kernels.moco", "kernels.redundancy",
    "kernels.lars", "kernels.philox", "kernels.augment_table",
    "kernels.augment_checks", "kernels.augment_torch", "kernels.resample_triton", "kernels.augment_triton",
    "kernels.augment",
    "kernels",
    "engine.optimizer_config", "engine.data_config", "engine.objective_config", "engine.peer_config",
    "engine.distill_config", "engine.engine_config", "engine.settings", "engine.config", "engine.schedules",
    "engine.distributed", "engine.metrics",
    "engine.profile_trace", "engine.profile_page", "engine.profile", "engine.batchnorm",
    "engine.data.dataset", "engine.data.encoded", "engine.data.download", "engine.data.manifest",
    "engine.data.cifar", "engine.data.stl10", "engine.data.fashion_mnist", "engine.data.tiny_imagenet",
    "engine.data.folder", "engine.data.shard_files", "engine.data.shards", "engine.data.crc32c",
    "engine.data.webdataset", "engine.data.tfrecord", "engine.data.catalog", "engine.data.arrays",
    "engine.data.human_labels", "engine.data.class_names", "engine.data.augment",
    "engine.data.order", "engine.data.skipped", "engine.data.torch_loader", "engine.data.resident_loader",
    "engine.data.dali_graph", "engine.data.dali_loader",
    "engine.peers", "engine.placement", "engine.objectives", "engine.optimizers", "engine.engines",
    "engine.checkpoint", "engine.features", "engine.encoders", "engine.teacher", "engine.step",
    "engine.run_dir", "engine.probe", "engine.trainer", "engine.train", "engine.export",
    "engine.corruption_kinds", "engine.corruptions", "engine.evaluation_config",
    "engine.label_sets", "engine.linear_probe", "engine.evaluation_data", "engine.evaluation",
    "engine.evaluation_report", "engine.evaluate",
    "engine.scan", "engine.pack",
]  # fmt: skip


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, known: set[str]) -> set[str]:
    """The project's modules that a source imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module or ""}
    return {name for name in found if name.split(".")[0] in ("kernels", "engine", "tests", "bench")}


def backward_arrows(sources: dict[str, str], order: list[str]) -> list[str]:
    """`module -> imported` for each import of something that does not stand above."""
    known = set(order)
    return [
        f"{module} -> {imported}"
        for module, source in sources.items()
        for imported in imports_of(source, known)
        if imported not in order or order.index(imported) >= order.index(module)
    ]


def sources() -> dict[str, str]:
    files = [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("engine/**/*.py")]
    return {module_of(path): path.read_text() for path in files}


def test_every_file_has_its_place_in_the_order():
    packages = {"engine", "engine.data"}  # docstrings alone
    assert set(sources()) - packages == set(ORDER)


def test_arrows_run_one_way():
    with_code = {module: source for module, source in sources().items() if module in ORDER}
    assert backward_arrows(with_code, ORDER) == []


@pytest.mark.parametrize(
    "source",
    ["import engine.trainer", "from engine import trainer", "def f():\n    from engine.trainer import Trainer"],
)
def test_a_backward_arrow_is_found(source):
    assert backward_arrows({"engine.config": source}, ORDER) == ["engine.config -> engine.trainer"]


def test_kernels_know_nothing_of_the_engine():
    for module, source in sources().items():
        if module.startswith("kernels"):
            assert not any(name.startswith("engine") for name in imports_of(source, set(ORDER)))


def test_nothing_happens_at_import():
    program = (
        # libraries first: what they do at import is theirs
        "import random, sys, torch, timm, torchvision, torch.utils.tensorboard, rich.progress, filelock;"
        "torch.manual_seed(5); state = torch.get_rng_state(); random.seed(5);"
        f"python = random.getstate(); threads = torch.get_num_threads(); import {', '.join(ORDER)};"
        "assert torch.equal(state, torch.get_rng_state()) and python == random.getstate();"
        "assert threads == torch.get_num_threads() and not torch.cuda.is_initialized();"
        "assert 'deepspeed' not in sys.modules, 'DeepSpeed probes the machine when imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
