"""`python -m bench readme`: the README's tables and pictures from the newest run of each subject in bench/results.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is typed there is overwritten.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import augment, data_stream, optimizer, step_report
from bench.providers import BACKWARD
from bench.rows import RESULTS, ROOT, Row, read_rows
from bench.step_providers import PLAIN, PROVIDERS, REFERENCES
from bench.terms import size_of

README = ROOT / "README.md"
_MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def newest_run(path: Path) -> list[Row]:
    """The rows that the last command appended: ratios are taken within one run."""
    rows = read_rows(path)
    return [row for row in rows if (row.commit, row.date, row.command) == _run(rows[-1])]


def newest(rows: list[Row]) -> list[Row]:
    """Those of the last run that measured their case: a ratio is taken within one run."""
    last = {_case(row): _run(row) for row in rows}
    return [row for row in rows if _run(row) == last[_case(row)]]


def _case(row: Row) -> str:
    """What a row has in common with those that it is compared with."""
    return json.dumps({**row.case, "products": None}, sort_keys=True)


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


def _sources(rows: list[Row]) -> str:
    """Where the rows of several runs come from."""
    last = rows[-1]
    runs = dict.fromkeys((row.commit, row.command) for row in rows)
    told = ", ".join(f"`{command}` (commit {commit})" for commit, command in runs)
    return f"\n{last.device_name}, torch {last.torch}, {last.date}: {told}\n"


def _times(ours: float | None, theirs: float | None, *, digits: int = 1) -> str:
    return f"{ours / theirs:.{digits}f}x" if ours and theirs else "-"


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


def step(device: str, *, size: int = 32, ranks: int = 1) -> str:
    """Source images a second of whole steps, against plain PyTorch."""
    rows = newest(step_rows(device, "images_per_s", size=size, ranks=ranks))
    providers = [name for name in PROVIDERS if any(row.provider == name for row in rows)]
    others = [name for name in providers if name in REFERENCES]
    lines = []
    for pair, batch, data in dict.fromkeys((row.case["pair"], row.case["batch"], row.case["data"]) for row in rows):
        rates = {name: _p50(rows, name, "images_per_s", pair=pair, batch=batch, data=data) for name in providers}
        lines.append([
            f"`{pair}`", f"{batch:,}", data, *("-" if rate is None else _digits(rate) for rate in rates.values()),
            *(_times(rates[providers[0]], rates[other], digits=2) for other in others),
        ])  # fmt: skip
    over = [f"`{providers[0]}` over `{other}`" for other in others]
    return markdown(["pair", "batch", "data", *(f"`{name}`" for name in providers), *over], lines) + _sources(rows)


def newest_parts(device: str) -> list[Row]:
    """Milliseconds of the parts of a step of small images on one rank."""
    return newest(step_rows(device, "ms", size=32, ranks=1))


def step_rows(device: str, metric: str, **where: object) -> list[Row]:
    """Rows of whole steps in today's terms: those from before synthetic data and ranks say neither."""
    rows = [
        replace(
            row,
            case={"data": "real", "ranks": 1, **row.case},
            provider=PLAIN if row.provider == "reference" else row.provider,
        )
        for row in read_rows(RESULTS / device / "step.jsonl")
        if "pair" in row.case and row.metric == metric
    ]
    return [row for row in rows if where.items() <= row.case.items()]


def augment_h200() -> str:
    """All views of a batch on a GPU: a launch in a graph, the copy that is its limit, and others' calls."""
    rows = newest(read_rows(RESULTS / "h200" / "augment.jsonl"))
    lines = []
    for size, batch in dict.fromkeys((row.case["size"], row.case["batch"]) for row in rows):
        case = {"size": size, "batch": batch}
        ours, copy = (_p50(rows, name, "ms", mode=augment.GRAPH, **case) for name in ("triton", augment.COPY))
        others = [_p50(rows, name, "ms", mode=augment.CALL, **case) for name in ("kornia", "torchvision v2")]
        assert ours is not None
        assert copy is not None
        lines.append([
            f"{size} px, {batch:,}", f"{_digits(1e3 * ours)} us", f"{_digits(1e3 * copy)} us", f"{copy / ours:.0%}",
            *("-" if ms is None else f"{_digits(ms)} ms" for ms in others),
        ])  # fmt: skip
    header = ["images, batch", "`triton`", "copy", "of the copy's rate", "kornia", "torchvision v2 (one draw a batch)"]
    return markdown(header, lines) + _sources(rows)


def augment_loaders(device: str) -> str:
    """Source images a second of the two loaders of small images."""
    rows = [row for row in newest_run(RESULTS / device / "augment.jsonl") if row.metric == "images_per_s"]
    lines = []
    for size, batch in dict.fromkeys((row.case["size"], row.case["batch"]) for row in rows):
        ours, theirs = (
            _p50(rows, name, "images_per_s", size=size, batch=batch) for name in ("resident", "torchvision")
        )
        if ours and theirs:
            lines.append([f"{size} px, {batch:,}", _digits(ours), _digits(theirs), f"{ours / theirs:.0f}x"])
    return markdown(["source images/s", "`resident`", "`torchvision`", "faster"], lines) + _source(rows)


def loss_h200() -> str:
    """Forward and backward of both peers at D = 128 on a GPU, as a CUDA graph where both were captured."""
    rows = newest(read_rows(RESULTS / "h200" / "loss.jsonl"))
    lines = []
    for M in sorted({row.case["M"] for row in rows}):
        cell = {"M": M, "D": 128}
        for mode in (f"{BACKWARD} in a CUDA graph", BACKWARD):
            ours, plain = (_p50(rows, name, "ms", mode=mode, **cell) for name in ("triton", "eager"))
            if ours and plain:
                break
        held, plain_held = (_p50(rows, name, "bytes", mode=BACKWARD, **cell) for name in ("triton", "eager"))
        if ours and plain and held and plain_held:
            lines.append([
                f"{M // 2:,}", "graph" if mode != BACKWARD else "calls", f"{_digits(ours)} ms", f"{_digits(plain)} ms",
                f"{plain / ours:.1f}x", f"{_digits(held / 2**20)} MiB", f"{_digits(plain_held / 2**20)} MiB",
                f"{plain_held / held:.0f}x",
            ])  # fmt: skip
    header = ["images N", "as", "`triton`", "eager PyTorch (TF32)", "faster", "memory, `triton`", "eager", "less"]
    return markdown(header, lines) + _sources(rows)


def terms(device: str) -> str:
    """Forward and backward of losses of one network and of distillation terms, against plain PyTorch."""
    rows = newest(read_rows(RESULTS / device / "terms.jsonl"))
    lines = []
    for name, size in dict.fromkeys((row.case["term"], size_of(row.case)) for row in rows):
        of_case = [row for row in rows if (row.case["term"], size_of(row.case)) == (name, size)]
        ours, plain = (_p50(of_case, provider, "ms") for provider in ("ours", "plain"))
        held, plain_held = (_p50(of_case, provider, "bytes") for provider in ("ours", "plain"))
        lines.append([
            f"`{name}`", size, *("-" if ms is None else f"{_digits(ms)} ms" for ms in (ours, plain)),
            _times(plain, ours), *("-" if b is None else f"{_digits(b / 2**20)} MiB" for b in (held, plain_held)),
            _times(plain_held, held),
        ])  # fmt: skip
    header = ["case", "size", "ours", "plain PyTorch", "faster", "memory, ours", "plain", "less"]
    return markdown(header, lines) + _sources(rows)


def optimizer_h200() -> str:
    """One LARS step on a GPU, in a CUDA graph and called from Python."""
    rows = newest(read_rows(RESULTS / "h200" / "optimizer.jsonl"))
    names = ("native", "torch", "sgd", "adamw", optimizer.COPY)
    lines = []
    for model, mode in dict.fromkeys((row.case["model"], row.case["mode"]) for row in rows):
        times = [_p50(rows, name, "ms", model=model, mode=mode) for name in names]
        lines.append([f"`{model}`, {mode}", *("-" if ms is None else f"{_digits(ms)} ms" for ms in times)])
    header = ["tensors of", "`native`", "`torch` (foreach)", "fused SGD", "fused AdamW", "copy"]
    return markdown(header, lines) + _sources(rows)


def probes() -> str:
    """Seconds of probes of 50,000 features, by device."""
    held = {device: newest(read_rows(RESULTS / device / "probe.jsonl")) for device in ("h200", "cpu")}
    protocols = dict.fromkeys(row.case["protocol"] for rows in held.values() for row in rows)
    lines = []
    for protocol in protocols:
        times = [_p50(rows, "engine", "seconds", protocol=protocol) for rows in held.values()]
        lines.append([protocol, *("-" if seconds is None else f"{_digits(seconds)} s" for seconds in times)])
    header = ["50,000 images, 512 features, 10 classes", *(rows[-1].device_name for rows in held.values())]
    return markdown(header, lines) + "".join(_sources(rows) for rows in held.values())


TABLES: dict[str, Callable[[], str]] = {
    "data_cpu": data_cpu,
    "loss_cpu": loss_cpu,
    "loss_h200": loss_h200,
    "terms_cpu": partial(terms, "cpu"),
    "optimizer_cpu": optimizer_cpu,
    "optimizer_h200": optimizer_h200,
    "augment_h200": augment_h200,
    "loaders_cpu": partial(augment_loaders, "cpu"),
    "loaders_h200": partial(augment_loaders, "h200"),
    "probes": probes,
    "step_cpu": partial(step, "cpu"),
    "step_h200": partial(step, "h200"),
    "photos_h200": partial(step, "h200", size=224),
    "photos_cpu": partial(step, "cpu", size=224),
    "ranks_cpu": partial(step, "cpu", ranks=2),
}
PICTURES = ("cpu",)  # devices whose steps have parts on record


# -- the command -----------------------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """The README's text with its tables made anew."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main(argv: list[str]) -> int:
    """Writes README.md and the pictures of where steps go."""
    argparse.ArgumentParser("python -m bench readme", description=__doc__.splitlines()[0]).parse_args(argv)
    README.write_text(filled(README.read_text()))
    for device in PICTURES:
        rows = newest_parts(device)
        title = f"Where a step goes, {rows[-1].device_name}, under the profiler"
        step_report.draw(rows, title, RESULTS / device / "step.png")
    return 0
