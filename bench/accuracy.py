"""`python -m bench accuracy PRESET`: does a peer gain over the same network trained alone for as many steps?

Pre-trains every seed with and without distillation and evaluates all peers; in slices of bounded time (`--seconds`):
what is unfinished goes on from the state below `--state` when the same command is given again, there or elsewhere.
Rows are appended when a run has been evaluated, one a score; `python -m bench claims` makes RESULTS.md of them.
Exit status: 0 all is done, 75 runs are unfinished, 1 a loss was not finite and all else is done, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench import accuracy_runs
from bench.accuracy_presets import ARMS, PRESETS, SWEEP, Job
from bench.accuracy_runs import Clock, OutOfTime
from bench.rows import ROOT, Environment, environment
from engine import distributed
from engine.checkpoint import CheckpointError
from engine.config import ConfigError
from engine.data.dataset import DataError
from engine.evaluation_data import check
from engine.trainer import NonFiniteLoss

SEEDS = 3
FAILED, BAD_INPUT, UNFINISHED = 1, 2, 75  # exit statuses; 75 is EX_TEMPFAIL: try again
TOLD = {"--state": "STATE", "--root": "DATA"}  # what rows say in place of folders


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; raises SystemExit."""
    parser = argparse.ArgumentParser(
        "python -m bench accuracy", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--seeds", type=_count, default=SEEDS, help=f"0 ... this - 1 (default {SEEDS})")
    parser.add_argument("--steps", type=_count, help="of each run, in place of the preset's")
    parser.add_argument("--epochs", type=_count, help="the same in epochs")
    parser.add_argument("--sweep", action="store_true", help="other weights and temperatures of the distillation too")
    parser.add_argument(
        "--seconds", type=_slice, help=f"stop in good order after so long (exit status {UNFINISHED}); the same goes on"
    )
    parser.add_argument("--train-only", action="store_true", help="leave evaluation to the same command without this")
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "accuracy", help="folder of runs and weights")
    parser.add_argument("--root", type=Path, help="data.root")
    parser.add_argument("--train", action="append", default=[], metavar="KEY=VALUE", help="changes the configuration")
    parser.add_argument("--no-write", action="store_true", help="no rows; the same command without this appends them")
    parser.epilog = "section.key=value: settings of engine/evaluate.py"
    options, given = parser.parse_known_args(argv)
    options.evaluation = given
    unknown = [one for one in given if one.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.steps is not None and options.epochs is not None:
        parser.error("--steps and --epochs: give one")
    try:
        accuracy_runs.asked(jobs(options)[0], options)  # before any run, all of which would come to the same
    except ConfigError as error:
        parser.error(str(error))
    return options


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def _slice(text: str) -> float:
    seconds, least = float(text), 2 * accuracy_runs.LEAST_S
    if not least <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, allowed: at least {least:g}")
    return seconds


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


class Outcome(NamedTuple):
    """Of a slice, in runs."""

    unfinished: int
    failed: int

    @property
    def status(self) -> int:
        """For whoever started the command: as long as runs are unfinished, that it is worth another try."""
        return UNFINISHED if self.unfinished else FAILED if self.failed else 0


def collect(options: argparse.Namespace, ranks: distributed.Ranks, env: Environment) -> Outcome:
    """Works off what is unfinished."""
    # What failed before comes last: it fails again at the same step, and would take that time from every slice.
    todo = sorted(jobs(options), key=lambda job: accuracy_runs.failed_before(job.folder(options.state)))
    if not options.train_only:
        _check_evaluation(todo, options)
    clock = Clock(options.seconds)
    done = failed = 0
    try:
        for job in todo:
            name = f"{job.preset}, {job.arm.folder}, seed {job.seed}"
            if _trained(job, name, options, ranks, clock, env):
                _finish(job, options, clock, env)
                done += 1
                print(f"{done + failed} of {len(todo)}: {name}", flush=True)
            else:
                failed += 1
    except OutOfTime:
        pass
    return Outcome(len(todo) - done - failed, failed)


def _check_evaluation(todo: list[Job], options: argparse.Namespace) -> None:
    """Raises DataError where an evaluation that is still to come would: training must not be what finds that out."""
    waiting = (job for job in todo if accuracy_runs.evaluated(job.folder(options.state)) is None)
    if (job := next(waiting, None)) is not None:  # of all of them: they differ in what was trained alone
        check(accuracy_runs.asked(job, options))


def _trained(
    job: Job, name: str, options: argparse.Namespace, ranks: distributed.Ranks, clock: Clock, env: Environment
) -> bool:
    """Trains a run; False where its loss is not finite, which ends no other."""
    try:
        accuracy_runs.pretrain(job, options, ranks, clock, env)
        return True
    except NonFiniteLoss as error:
        print(f"error: {name}: {error}", file=sys.stderr, flush=True)
    accuracy_runs.release()  # behind the handler: there the traceback still holds the trainer
    return False


def _finish(job: Job, options: argparse.Namespace, clock: Clock, env: Environment) -> None:
    """Evaluates a trained run and appends its rows, as far as the command asks for it."""
    if options.train_only:
        return
    folder = job.folder(options.state)
    scores, facts = accuracy_runs.assess(job, folder, options, clock, env)
    if not options.no_write:
        accuracy_runs.record(job, folder, scores, facts)


def told(argv: list[str]) -> list[str]:
    """The command's words for rows: what was measured, not where data and state lie on this machine."""

    def words() -> Iterator[str]:
        place = None
        for word in argv:
            option, equals, _ = word.partition("=")
            if place is not None:
                yield place
            elif equals and option in TOLD:
                yield f"{option}={TOLD[option]}"
            else:
                yield accuracy_runs.without_folders(word)
            place = TOLD.get(word) if place is None else None

    return list(words())


def main(argv: list[str]) -> int:
    """Trains, evaluates and appends rows."""
    options = parse(argv)
    env = environment(["accuracy", *told(argv)])
    distributed.configure_logging(verbose=False)
    ranks = distributed.start()
    try:
        outcome = collect(options, ranks, env)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    finally:
        distributed.stop()
    if outcome.failed:
        print(f"{outcome.failed} runs failed, with a loss that is not finite")
    if outcome.unfinished:
        print(f"{outcome.unfinished} runs are unfinished; the same command goes on")
    return outcome.status
