"""Rows of results: one measurement each, with the machine, the software and the command that it comes from."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


class Stats(NamedTuple):
    """Percentiles of `n` samples."""

    p20: float
    p50: float
    p80: float
    n: int


@dataclass(frozen=True)
class Environment:
    """The machine, the software and the command of one run."""

    device: torch.device
    folder: str  # of results/
    device_name: str
    torch: str
    triton: str | None
    driver: str | None
    commit: str
    date: str
    command: str


@dataclass(frozen=True)
class Row:
    """One measurement, one line of bench/results/<device>/<subject>.jsonl."""

    subject: str
    case: dict[str, Any]
    provider: str
    metric: str
    p20: float
    p50: float
    p80: float
    n: int
    floor: float | None  # the limit in the metric's unit
    device_name: str
    torch: str
    triton: str | None
    driver: str | None
    commit: str
    date: str
    command: str


ROW_KEYS = tuple(field.name for field in fields(Row))


def make_row(
    env: Environment, subject: str, case: dict[str, Any], provider: str, metric: str, stats: Stats, floor: float | None
) -> Row:
    """A row with numbers rounded to four digits; bytes stay whole."""
    p20, p50, p80 = (round(value) if metric == "bytes" else rounded(value) for value in stats[:3])
    return Row(
        subject, case, provider, metric, p20, p50, p80, stats.n, None if floor is None else rounded(floor),
        env.device_name, env.torch, env.triton, env.driver, env.commit, env.date, env.command,
    )  # fmt: skip


def rounded(value: float) -> float:
    """Four significant digits: more than a timing holds."""
    return float(f"{value:.4g}")


def append_rows(rows: Iterable[Row], path: Path) -> None:
    """Appends to a JSONL file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file, oldest first."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]


# -- the machine ---------------------------------------------------------------------------------------------------


def environment(argv: list[str]) -> Environment:
    """What the rows of `python -m bench *argv` say about where they come from."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    return Environment(
        device=device,
        folder=slug(name) if device.type == "cuda" else "cpu",
        device_name=name,
        torch=torch.__version__.partition("+")[0],
        triton=installed_version("triton"),
        driver=first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "bench", *argv]),
    )


def commit() -> str:
    """The commit that is checked out, `-dirty` where files differ from it, those of results apart."""
    named = first_line("git", "describe", "--always", "--exclude=*")
    if named is None:
        return "unknown"
    return f"{named}-dirty" if first_line("git", "status", "--porcelain", "--", ".", ":!bench/results") else named


def slug(gpu: str) -> str:
    """`NVIDIA H200` -> `h200`: a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def cpu_name() -> str:
    """Cores that this process may use, and their make."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{cores} cores ({model[1].strip()})" if model else f"{cores} cores"


def installed_version(package: str) -> str | None:
    """Version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def first_line(*command: str) -> str | None:
    """First line that a command prints, None where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except OSError:
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
