"""One run of `bench accuracy`: trained in slices, evaluated once, its rows appended once.

Its folder says how far it is: trained.json from the first slice on, finished.json and a backbone a peer when it is
trained, evaluation/ when it is evaluated, and evaluation/rows.json when its rows are written.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from bench import harness
from bench.accuracy_presets import PRESETS, Job
from bench.rows import RESULTS, Environment, Row, Stats, append_rows, make_row
from engine import distributed, evaluation_report
from engine.config import Config, ConfigError, differing_keys
from engine.encoders import file_encoder
from engine.evaluate import evaluate, run_settings
from engine.evaluation import Score
from engine.evaluation_config import EvaluationConfig
from engine.export import export_backbone
from engine.settings import parse_section
from engine.trainer import NonFiniteLoss, Trainer

LEAST_S = 15.0  # of a slice: less time trains nothing but the set-up
MOST = 0.8  # of a slice is waited for: an evaluation that takes longer must begin in some slice, too
HISTORY = "trained.json"  # where a run was trained, and for how long
FINISHED = "finished.json"  # its summary, once its backbones lie beside it
EVALUATION = "evaluation"
ROWS = "rows.json"  # in there: its rows have been appended
PLACES = (".root", ".file", ".manifest", ".workers")  # settings that say where data are and how they are read


class OutOfTime(Exception):
    """The slice ends here."""


class Clock:
    """The rest of a slice."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._began = seconds, time.monotonic()

    def left(self, least: float | None = None) -> float | None:
        """Seconds left, None where there is no limit; raises OutOfTime where they are too few.

        Too few: less than `least` or than MOST of the slice, whichever is less; LEAST_S where `least` is left out.
        """
        if self._seconds is None:
            return None
        left = self._seconds - (time.monotonic() - self._began)
        if left < (LEAST_S if least is None else min(least, MOST * self._seconds)):
            raise OutOfTime
        return left


# -- training ----------------------------------------------------------------------------------------------------------


def pretrain(job: Job, options: argparse.Namespace, ranks: distributed.Ranks, clock: Clock, env: Environment) -> Path:
    """Trains what is missing of a run and returns its folder.

    Raises OutOfTime with its state saved, NonFiniteLoss with the step's.
    """
    folder = job.folder(options.state)
    if (folder / FINISHED).exists():
        return folder
    cfg = job.config(options.state, root=options.root, max_seconds=clock.left())
    began = time.perf_counter()
    try:
        summary = Trainer(cfg, ranks).fit()
    except NonFiniteLoss:
        _note(folder, env, time.perf_counter() - began)
        raise
    release()
    _note(folder, env, time.perf_counter() - began)
    if summary is None:
        raise OutOfTime
    _keep_encoders(folder, cfg)
    return folder


def release() -> None:
    """Frees a trainer's graphs and weights, before the next takes their place."""
    gc.collect()
    harness.release_memory()


def failed_before(folder: Path) -> bool:
    """Whether a loss of this run was not finite, here or elsewhere."""
    return (folder / "non_finite").exists()


def _keep_encoders(folder: Path, cfg: Config) -> None:
    """Of a finished run the backbones stay, which is all that an evaluation needs: small enough to be moved."""
    for _, peer in cfg.trained:
        export_backbone(folder, peer.name, "dogo", encoder_file(folder, peer.name))
    (folder / "summary.json").rename(folder / FINISHED)
    for left in ("checkpoints", "non_finite"):
        shutil.rmtree(folder / left, ignore_errors=True)


def encoder_file(folder: Path, peer: str) -> Path:
    """The backbone of a peer of a finished run."""
    return folder / f"{peer}.safetensors"


def _note(folder: Path, env: Environment, seconds: float) -> None:
    """Adds a slice to the run's history."""
    file = folder / HISTORY
    history = json.loads(file.read_text()) if file.exists() else []
    slice_ = {
        "device": env.device_name, "results": env.folder, "torch": env.torch, "triton": env.triton,
        "driver": env.driver, "commit": env.commit, "date": env.date, "seconds": round(seconds, 1),
    }  # fmt: skip
    new = file.with_suffix(".new")
    new.write_text(json.dumps([*history, slice_], indent=1) + "\n")
    new.replace(file)


# -- evaluation --------------------------------------------------------------------------------------------------------


def settings(preset: str, cfg: Config, given: list[str]) -> EvaluationConfig:
    """The preset's evaluation with the command's changes; data given for a protocol asks for it."""

    def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={json.dumps(value)}"

    found = run_settings(cfg, [*flat(PRESETS[preset].evaluation), *given])
    asked = [p for p in ("ood", "transfer") if getattr(found, p) and p not in found.protocols]
    return found.model_copy(update={"protocols": (*found.protocols, *asked)})


def asked(job: Job, options: argparse.Namespace) -> EvaluationConfig:
    """The evaluation of a run, its data where they lie on this machine."""
    return settings(job.preset, job.config(options.state, root=options.root, max_seconds=None), options.evaluation)


def evaluated(folder: Path) -> tuple[list[Score], dict[str, Any]] | None:
    """Scores and facts of a run's evaluation; None where there was none, or its file is cut short."""
    try:
        return evaluation_report.read(folder / EVALUATION / "scores.json")
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def assess(
    job: Job, folder: Path, options: argparse.Namespace, clock: Clock, env: Environment
) -> tuple[list[Score], dict[str, Any]]:
    """Scores and facts of a finished run's peers, evaluated where that was not done before."""
    wanted, done = asked(job, options), evaluated(folder)
    if done is not None:
        scores, facts = done
        _check_same(folder / EVALUATION, facts["settings"], wanted)
        return scores, {"command": env.command, **facts}
    clock.left(_usual_seconds(folder))
    began = time.perf_counter()
    cfg = job.config(options.state, root=None, max_seconds=None)
    files = [encoder_file(folder, peer.name) for _, peer in cfg.trained]
    scores = evaluate([file_encoder(file, backbone=None, image_size=None) for file in files], wanted, env.device)
    facts = {
        "settings": wanted.model_dump(mode="json"), "device": env.device_name, "torch": env.torch, "commit": env.commit,
        "date": env.date, "command": env.command, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    new = folder / f"{EVALUATION}.new"
    shutil.rmtree(new, ignore_errors=True)
    evaluation_report.write(new, scores, facts)
    shutil.rmtree(folder / EVALUATION, ignore_errors=True)
    new.rename(folder / EVALUATION)
    return scores, facts


def _check_same(out: Path, done: dict[str, Any], wanted: EvaluationConfig) -> None:
    """Raises ConfigError: a run was evaluated before with other settings, files and folders apart."""
    with suppress(ConfigError):
        done = parse_section(EvaluationConfig, done).model_dump(mode="json")  # a setting that is new has its default
    trees = done, wanted.model_dump(mode="json")
    for tree in trees:
        tree["noisy"]["human"] = tree["noisy"]["human"] is not None
    keys = [key for key in differing_keys(*trees) if not key.endswith(PLACES)]
    if keys:
        raise ConfigError(f"{out}: evaluated before with other {', '.join(keys)}; remove that folder, or give the same")


def _usual_seconds(folder: Path) -> float:
    """The longest evaluation among runs that differ in distillation and seed alone."""
    files = folder.parents[1].glob(f"*/*/{EVALUATION}/scores.json")
    found = [done[1].get("seconds", 0) for file in files if (done := evaluated(file.parents[1]))]
    return max([*found, LEAST_S])


# -- rows --------------------------------------------------------------------------------------------------------------


def record(job: Job, folder: Path, scores: list[Score], facts: dict[str, Any]) -> None:
    """Appends the rows of an evaluated run, unless they have been."""
    marker = folder / EVALUATION / ROWS
    if marker.exists():
        return
    results = json.loads((folder / HISTORY).read_text())[-1]["results"]
    path = RESULTS / results / "accuracy.jsonl"
    rows = rows_of(job, folder, scores, facts)
    # A call that was cut between the two has left them there: the same lines, since the folder alone makes them.
    there = set(path.read_text().splitlines()) if path.exists() else set()
    append_rows([row for row in rows if json.dumps(asdict(row)) not in there], path)
    marker.write_text(json.dumps({"results": results, "rows": len(rows)}) + "\n")


def rows_of(job: Job, folder: Path, scores: list[Score], facts: dict[str, Any]) -> list[Row]:
    """A row a score, and one of the seconds that training took; of the machine that trained the run last."""
    history, summary = json.loads((folder / HISTORY).read_text()), json.loads((folder / FINISHED).read_text())
    last = history[-1]
    trained = Environment(
        torch.device("cpu"), last["results"], last["device"], last["torch"], last["triton"], last["driver"],
        last["commit"], last["date"], facts["command"],
    )  # fmt: skip
    run = {
        "preset": job.preset, "steps": summary["steps"], "changes": [without_folders(c) for c in job.changes],
        "weight": job.arm.weight, "tau_distill": job.arm.tau, "seed": job.seed,
    }  # fmt: skip
    rows = [
        make_row(
            trained, "accuracy",
            {**run, "peer": s.peer, "backbone": s.backbone, "protocol": s.protocol, "setting": s.setting,
             "values": [round(value, 5) for value in s.values], "train": s.train, "test": s.test,
             "evaluated_on": facts["device"]},
            job.arm.provider, "accuracy", harness.percentiles(list(s.values)), None,
        )
        for s in scores
    ]  # fmt: skip
    spent: dict[str, float] = {}
    for part in history:
        spent[part["device"]] = spent.get(part["device"], 0) + part["seconds"]
    commits = dict.fromkeys([*(part["commit"] for part in history), facts.get("commit", last["commit"])])
    total = Stats(*(sum(spent.values()),) * 3, 1)
    case = {**run, "devices": spent, "commits": list(commits)}
    return [*rows, make_row(trained, "accuracy", case, job.arm.provider, "seconds", total, None)]


def without_folders(word: str) -> str:
    """A word of the command in which absolute paths have lost their folders: those are this machine's affair."""
    key, equals, value = word.partition("=")
    if equals and value.startswith(("/", "~")):
        return f"{key}={PurePosixPath(value).name}"
    return re.sub(r"""(?<![^\s=,:\[{("'])[/~][^,\]})"']*""", lambda found: PurePosixPath(found[0]).name, word)
