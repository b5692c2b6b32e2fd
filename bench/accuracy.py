"""`python -m bench accuracy PRESET`: does a peer gain over the same network trained alone for as many steps?

Pre-trains every seed with and without distillation and evaluates all peers; in slices of bounded time (`--seconds`):
what is unfinished goes on from the state below `--state` when the same command is given again, there or elsewhere.
Rows are appended when a run has been evaluated, one a score; `python -m bench claims` makes RESULTS.md of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import harness
from bench.accuracy_presets import ARMS, PRESETS, SWEEP, Job
from bench.rows import RESULTS, ROOT, Environment, Row, Stats, append_rows, environment, make_row
from engine import distributed, evaluation_report
from engine.config import Config, ConfigError, differing_keys
from engine.data.dataset import DataError
from engine.encoders import file_encoder
from engine.evaluate import evaluate, run_settings
from engine.evaluation import Score
from engine.evaluation_config import EvaluationConfig
from engine.export import export_backbone
from engine.trainer import Trainer

SEEDS = 3
LEAST_S = 15.0  # of a slice: less time trains nothing but the set-up
HISTORY = "trained.json"  # of a run: where it was trained, and for how long
FINISHED = "finished.json"  # its summary, once its backbones lie beside it


class OutOfTime(Exception):
    """The slice ends here."""


class Clock:
    """The rest of a slice."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self, least: float = LEAST_S) -> float | None:
        """Seconds left, None where there is no limit; raises OutOfTime where they are less than `least`."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left < least:
            raise OutOfTime
        return left


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; raises SystemExit."""
    parser = argparse.ArgumentParser("python -m bench accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--seeds", type=_count, default=SEEDS, help=f"0 ... this - 1 (default {SEEDS})")
    parser.add_argument("--steps", type=_count, help="of each run, in place of the preset's")
    parser.add_argument("--epochs", type=_count, help="the same in epochs")
    parser.add_argument("--sweep", action="store_true", help="other weights and temperatures of the distillation too")
    parser.add_argument("--seconds", type=float, help="stop in good order after so long; the same command goes on")
    parser.add_argument("--train-only", action="store_true", help="leave evaluation to the same command without this")
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "accuracy", help="folder of runs and weights")
    parser.add_argument("--root", type=Path, help="data.root")
    parser.add_argument("--train", action="append", default=[], metavar="KEY=VALUE", help="changes the configuration")
    parser.add_argument("--no-write", action="store_true", help="no rows")
    parser.epilog = "section.key=value: settings of engine/evaluate.py"
    options, given = parser.parse_known_args(argv)
    options.evaluation = given
    unknown = [one for one in given if one.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.steps is not None and options.epochs is not None:
        parser.error("--steps and --epochs: give one")
    try:  # before any run, all of which would come to the same
        settings(options.preset, jobs(options)[0].config(options.state, root=options.root, max_seconds=None), given)
    except ConfigError as error:
        parser.error(str(error))
    return options


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def jobs(options: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that what is finished first can be compared."""
    ((unit, count),) = PRESETS[options.preset].budget.items()
    for other in ("steps", "epochs"):
        if getattr(options, other) is not None:
            unit, count = other, getattr(options, other)
    arms = SWEEP if options.sweep else ARMS
    return [
        Job(options.preset, arm, seed, (unit, count), tuple(options.train))
        for seed in range(options.seeds)
        for arm in arms
    ]


# -- one run -----------------------------------------------------------------------------------------------------------


def pretrain(job: Job, options: argparse.Namespace, ranks: distributed.Ranks, clock: Clock, env: Environment) -> Path:
    """Trains what is missing of a run and returns its folder; raises OutOfTime with its state saved."""
    folder = job.folder(options.state)
    if (folder / FINISHED).exists():
        return folder
    left = clock.left()
    began = time.perf_counter()
    cfg = job.config(options.state, root=options.root, max_seconds=left)
    trainer = Trainer(cfg, ranks)
    summary = trainer.fit()
    del trainer  # its graphs and weights, before the next takes their place
    gc.collect()
    harness.release_memory()
    _note(folder, env, time.perf_counter() - began)
    if summary is None:
        raise OutOfTime
    _keep_encoders(folder, cfg)
    return folder


def _keep_encoders(folder: Path, cfg: Config) -> None:
    """Of a finished run the backbones stay, which is all that an evaluation needs: small enough to be moved."""
    for peer in cfg.peers:
        export_backbone(folder, peer.name, "dogo", encoder_file(folder, peer.name))
    (folder / "summary.json").rename(folder / FINISHED)
    shutil.rmtree(folder / "checkpoints")


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
    file.write_text(json.dumps([*history, slice_], indent=1) + "\n")


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


def assess(job: Job, folder: Path, options: argparse.Namespace, clock: Clock, env: Environment) -> list[Row]:
    """Evaluates the peers of a finished run; its rows, none where that was done before."""
    out = folder / "evaluation"
    cfg = job.config(options.state, root=options.root, max_seconds=None)  # data lie elsewhere on another machine
    asked = settings(job.preset, cfg, options.evaluation)
    if (out / "scores.json").exists():
        _check_same(out, asked)
        return []
    clock.left(_longest_evaluation(options.state))
    began = time.perf_counter()
    encoders = [file_encoder(encoder_file(folder, peer.name), backbone=None, image_size=None) for peer in cfg.peers]
    scores = evaluate(encoders, asked, env.device)
    seconds = round(time.perf_counter() - began, 1)
    plain = asked.model_dump(mode="json")
    evaluation_report.write(out, scores, {"settings": plain, "device": env.device_name, "seconds": seconds})
    return rows_of(job, folder, scores, env)


def _check_same(out: Path, asked: EvaluationConfig) -> None:
    """Raises ConfigError: a run was evaluated before with other settings, files and folders apart."""
    done = json.loads((out / "scores.json").read_text())["settings"]
    places = ("data", "noisy.human", "ood", "transfer")
    keys = [key for key in differing_keys(done, asked.model_dump(mode="json")) if not key.startswith(places)]
    if keys:
        raise ConfigError(f"{out}: evaluated before with other {', '.join(keys)}; remove that folder, or give the same")


def _longest_evaluation(state: Path) -> float:
    """Seconds, of those there have been."""
    found = [json.loads(file.read_text()).get("seconds", 0) for file in state.rglob("evaluation/scores.json")]
    return max([*found, LEAST_S])


def rows_of(job: Job, folder: Path, scores: list[Score], env: Environment) -> list[Row]:
    """A row a score, and one of the seconds that training took; of the machine that trained the run last."""
    history, summary = json.loads((folder / HISTORY).read_text()), json.loads((folder / FINISHED).read_text())
    last = history[-1]
    trained = replace(
        env, folder=last["results"], device_name=last["device"], torch=last["torch"], triton=last["triton"],
        driver=last["driver"], commit=last["commit"], date=last["date"],
    )  # fmt: skip
    run = {
        "preset": job.preset, "steps": summary["steps"], "changes": list(job.changes), "weight": job.arm.weight,
        "tau_distill": job.arm.tau, "seed": job.seed,
    }  # fmt: skip
    rows = [
        make_row(
            trained, "accuracy",
            {**run, "peer": s.peer, "backbone": s.backbone, "protocol": s.protocol, "setting": s.setting,
             "values": [round(value, 5) for value in s.values], "train": s.train, "test": s.test,
             "evaluated_on": env.device_name},
            job.arm.provider, "accuracy", harness.percentiles(list(s.values)), None,
        )
        for s in scores
    ]  # fmt: skip
    spent: dict[str, float] = {}
    for part in history:
        spent[part["device"]] = spent.get(part["device"], 0) + part["seconds"]
    total = sum(spent.values())
    case = {**run, "devices": spent}
    return [
        *rows,
        make_row(trained, "accuracy", case, job.arm.provider, "seconds", Stats(*(total,) * 3, 1), None),
    ]


# -- the command -------------------------------------------------------------------------------------------------------


def collect(options: argparse.Namespace, ranks: distributed.Ranks, env: Environment) -> int:
    """Works off what is unfinished; returns how many runs still are."""
    clock, todo = Clock(options.seconds), jobs(options)
    done = 0
    try:
        for job in todo:
            folder = pretrain(job, options, ranks, clock, env)
            rows = [] if options.train_only else assess(job, folder, options, clock, env)
            done += 1
            print(f"{done} of {len(todo)}: {job.preset}, {job.arm.folder}, seed {job.seed}", flush=True)
            if rows and not options.no_write:
                device = json.loads((folder / HISTORY).read_text())[-1]["results"]
                append_rows(rows, RESULTS / device / "accuracy.jsonl")
    except OutOfTime:
        pass
    return len(todo) - done


def main(argv: list[str]) -> int:
    """Trains, evaluates and appends rows."""
    options = parse(argv)
    # Rows say what was measured; where data and state lie is this machine's affair.
    places = {str(options.root): "DATA", str(options.state): "STATE"}
    env = environment(["accuracy", *(places.get(argument, argument) for argument in argv)])
    distributed.configure_logging(verbose=False)
    ranks = distributed.start()
    try:
        missing = collect(options, ranks, env)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()
    if missing:
        print(f"{missing} runs are unfinished; the same command goes on")
    return 0
