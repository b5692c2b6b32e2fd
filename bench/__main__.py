"""`python -m bench SUBJECT [options]`: finds the subject and runs it."""

from __future__ import annotations

import importlib
import sys

# Each module has `main(argv) -> exit status`, and is imported only when asked for.
SUBJECTS = {
    "loss": "time and peak memory of the losses against plain PyTorch and other libraries",
    "terms": "time and peak memory of losses of one network and of distillation terms against plain PyTorch",
    "augment": "all views of a batch against kornia, torchvision and a copy; and the loaders of small images",
    "data": "source images a second of the loaders, on real photos",
    "parity": "the kNN that short runs reach with either loader",
    "step": "source images a second of a whole DoGo step, with its loader and without, against plain PyTorch",
    "optimizer": "one LARS step over a network's tensors against other ways to write it, and fused SGD and AdamW",
    "accuracy": "whether a peer gains over the same network trained alone: pre-trains and evaluates both, in slices",
    "probe": "seconds that probes of frozen features take",
    "claims": "RESULTS.md from the measured rows",
    "scaling": "a prediction for 1 to 1,024 GPUs from a step that was measured on one",
    "readme": "the tables of the README from the measured rows",
    "budgets": "registers, spills, shared memory and instructions of the kernels, without a GPU",
}


def usage() -> str:
    """What `python -m bench` prints."""
    width = max(map(len, SUBJECTS))
    lines = [f"  {name:{width}}  {what}" for name, what in SUBJECTS.items()]
    return "\n".join(["usage: python -m bench SUBJECT [options]", "", *lines, "", "python -m bench SUBJECT --help"])


def main(argv: list[str]) -> int:
    """Runs the subject that the first argument names; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    subject, *rest = argv
    if subject not in SUBJECTS:
        print(f"bench: subject {subject!r} is unknown; allowed: {', '.join(SUBJECTS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"bench.{subject}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
