"""`python -m bench readme`: writes the tables of the README from the newest run of each subject in bench/results.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is typed there is overwritten.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from bench import data_stream, optimizer
from bench.providers import BACKWARD
from bench.rows import RESULTS, ROOT, Row, read_rows

README = ROOT / "README.md"
_MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def newest_run(path: Path) -> list[Row]:
    """The rows that the last command appended: ratios are taken within one run."""
    rows = read_rows(path)
    return [row for row in rows if (row.commit, row.date, row.command) == _run(rows[-1])]


def _run(row: Row) -> tuple[str, str, str]:
    return row.commit, row.date, row.command


def _p50(rows: list[Row], provider: str, metric: str, **case: object) -> float | None:
    found = [
        row.p50 for row in rows
        if (row.provider, row.metric) == (provider, metric) and case.items() <= row.case.items()
    ]  # fmt: skip
    return found[-1] if found else None


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table, numbers to the right."""
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def _digits(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _source(rows: list[Row]) -> str:
    row = rows[-1]
    return f"\n{row.device_name}, torch {row.torch}, {row.date}, commit {row.commit}: `{row.command}`\n"


# -- tables ----------------------------------------------------------------------------------------------------------


def loss_cpu() -> str:
    """Forward and backward of both peers at D = 128, native against plain PyTorch."""
    rows = newest_run(RESULTS / "cpu" / "loss.jsonl")
    lines = []
    for M in sorted({row.case["M"] for row in rows}):
        cell = {"M": M, "D": 128, "mode": BACKWARD}
        ours, plain = (_p50(rows, name, "ms", **cell) for name in ("native", "torch"))
        ours_bytes, plain_bytes = (_p50(rows, name, "bytes", **cell) for name in ("native", "torch"))
        if ours and plain and ours_bytes and plain_bytes:
            lines.append([
                f"{M // 2:,}", f"{_digits(ours)} ms", f"{_digits(plain)} ms", f"{plain / ours:.1f}x",
                f"{_digits(ours_bytes / 2**20)} MiB", f"{_digits(plain_bytes / 2**20)} MiB",
                f"{plain_bytes / ours_bytes:.0f}x",
            ])  # fmt: skip
    header = ["images N", "`native`", "`torch`", "faster", "memory, `native`", "`torch`", "less"]
    return markdown(header, lines) + _source(rows)


def optimizer_cpu() -> str:
    """One LARS step against other ways to write it, and against fused optimizers without norms."""
    rows = newest_run(RESULTS / "cpu" / "optimizer.jsonl")
    names = ("native", "torch", "loop", "timm", "sgd", "adamw", optimizer.COPY)
    lines = []
    for model in dict.fromkeys(row.case["model"] for row in rows):
        times = [_p50(rows, name, "ms", model=model) for name in names]
        lines.append([f"`{model}`", *("-" if ms is None else f"{_digits(ms)} ms" for ms in times)])
    header = ["tensors of", "`native`", "`torch` (foreach)", "loop", "timm", "fused SGD", "fused AdamW", "copy"]
    return markdown(header, lines) + _source(rows)


def data_cpu() -> str:
    """Source images a second of the loaders, and their memory."""
    rows = newest_run(RESULTS / "cpu" / "data.jsonl")
    lines = []
    for stage in data_stream.STAGES:
        rates = [_p50(rows, name, "images_per_s", stage=stage) for name in data_stream.PROVIDERS]
        ours, _, theirs = rates
        held = [_p50(rows, name, "bytes", stage=stage) for name in (data_stream.DALI, data_stream.TORCHVISION)]
        lines.append([
            stage, *("-" if rate is None else f"{_digits(rate)}" for rate in rates),
            f"{ours / theirs:.1f}x" if ours and theirs else "-",
            *("-" if size is None else f"{_digits(size / 2**20)} MiB" for size in held),
        ])  # fmt: skip
    header = [
        "source images/s", "`dali`", "DALI's operators alone", "`torchvision`", "faster", "memory, `dali`",
        "`torchvision`",
    ]  # fmt: skip
    return markdown(header, lines) + _source(rows)


TABLES: dict[str, Callable[[], str]] = {"data_cpu": data_cpu, "loss_cpu": loss_cpu, "optimizer_cpu": optimizer_cpu}


# -- the command -----------------------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """The README's text with its tables made anew."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main(argv: list[str]) -> int:
    """Writes README.md."""
    argparse.ArgumentParser("python -m bench readme", description=__doc__.splitlines()[0]).parse_args(argv)
    README.write_text(filled(README.read_text()))
    return 0
