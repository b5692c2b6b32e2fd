"""What the compiler makes of the shipped tiles, without a GPU: registers, spills, shared memory, instructions.

`python -m bench budgets` compiles every fused kernel for sm_80, sm_90 and sm_100 and compares with budgets.json, which
holds one set a Triton version, since code generation differs between them; `--write` accepts what was found.

Kernels are launched through the project's own launchers, on CPU tensors, with a driver that compiles and runs nothing:
what is measured is what a GPU would be given.  `loops` lists the inner loops without masks (with, where there are no
others): instructions and exponentials that a thread does for one tile.  A pair takes one exponential for each peer, two
on pairs of view 1 with view 2 where the temperatures are no small integer apart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

BUDGETS = Path(__file__).with_name("budgets.json")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one program can have
TOLERANCE = 1.02  # of instructions: scheduling differs by a few between patch versions of the assembler
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # products of 16-bit numbers on sm_80, sm_90, sm_100


class Case(NamedTuple):
    """One loss to compile: `D_b` None is NT-Xent of one peer, `gradients` False forward alone."""

    name: str
    n: int
    D_a: int
    D_b: int | None
    tau_contrast: float | None = 0.5
    tau_distill: float = 0.1
    gradients: bool = True


class Views(NamedTuple):
    """Augmented views to compile: of images H x W, C bytes a pixel."""

    name: str
    H: int
    W: int
    S: int
    C: int = 4
    blur: bool = False


MUTUAL, FORWARD = (
    Case("mutual, D 128", 20_000, 128, 128),
    Case("mutual forward, D 128", 20_000, 128, 128, gradients=False),
)
SINGLE = Case("ntxent, D 128", 20_000, 128, None)
SMALL = Views("views, 32 px", 32, 32, 32)
CASES: dict[int, list[Case | Views]] = {
    80: [MUTUAL, FORWARD, SINGLE, SMALL],
    90: [
        MUTUAL,
        FORWARD,
        SINGLE,
        Case("mutual, D 64", 20_000, 64, 64),
        Case("mutual, small batch", 500, 128, 128),
        Case("mutual, two exponentials", 20_000, 128, 128, tau_distill=0.17),
        Case("mutual, safe", 20_000, 128, 128, tau_distill=0.01),
        Case("mutual, strips", 20_000, 512, 256),
        Case("ntxent, D 256", 20_000, 256, None),
        Case("similarity_kl, D 128", 20_000, 128, 128, tau_contrast=None),
        SMALL,
        Views("views, 96 px", 96, 96, 96, blur=True),
        Views("views, 224 px of 256", 256, 256, 224, C=3, blur=True),
    ],
    100: [MUTUAL, FORWARD, SINGLE, SMALL],
}


class _CompileOnly:
    """A Triton driver for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def _compiling(capability: int) -> Iterator[dict[str, Any]]:
    """Launches inside compile for `capability`; yields the compiled kernels by name."""
    import triton
    from triton.runtime.jit import JITFunction

    from kernels import problem

    kernels: dict[str, Any] = {}
    run, found_capability = JITFunction.run, problem.capability_of

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if not any(kernel is known for known in kernels.values()):  # a second one of that name: other constants
            count = sum(name.split(" ")[0] == self.fn.__name__ for name in kernels)
            kernels[self.fn.__name__ + (f" {count + 1}" if count else "")] = kernel
        return kernel

    triton.runtime.driver.set_active(_CompileOnly(capability))
    JITFunction.run, problem.capability_of = compile_only, lambda device: capability
    try:
        yield kernels
    finally:
        JITFunction.run, problem.capability_of = run, found_capability


def compile_case(case: Case | Views, capability: int) -> dict[str, Any]:
    """The kernels that `case` launches, compiled for `capability`."""
    return _compile_views(case, capability) if isinstance(case, Views) else _compile_loss(case, capability)


def _compile_views(case: Views, capability: int) -> dict[str, Any]:
    from kernels import augment_triton
    from kernels.augment import new_views
    from kernels.augment_table import WIDTH

    images = torch.zeros((2, case.H, case.W, case.C), dtype=torch.uint8)
    table, statistics = torch.zeros((4, WIDTH), dtype=torch.int32), torch.zeros(6)
    out = new_views(4, case.S, torch.bfloat16, images.device)
    with _compiling(capability) as kernels:
        augment_triton.launch(images, table, statistics, out, blur=case.blur)
    return kernels


def _compile_loss(case: Case, capability: int) -> dict[str, Any]:
    from kernels import mutual_triton

    def view(D: int) -> torch.Tensor:
        return torch.zeros(case.n, D, requires_grad=case.gradients)

    a = view(case.D_a), view(case.D_a)
    with _compiling(capability) as kernels, torch.set_grad_enabled(case.gradients):
        if case.D_b is None:
            assert case.tau_contrast is not None
            mutual_triton.ntxent(*a, case.tau_contrast, None)
        else:
            b = view(case.D_b), view(case.D_b)
            mutual_triton.mutual([a, b], case.tau_contrast, case.tau_distill, (1.0, 1.0), False, None)
    return kernels


def measure(kernel: Any) -> dict[str, Any]:
    """Registers and spilled bytes a thread, shared bytes a program, and the inner loops of one compiled kernel.

    A kernel of views is one loop: all of it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    whole = kernel.metadata.name in ("_views_kernel", "_blur_kernel")
    loops = [Counter(map(_opcode, _instructions(listing)))] if whole else _inner_loops(listing)
    return {
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "loops": sorted([sum(loop.values()), loop["MUFU"]] for loop in loops),
    }


def _tool(name: str, *arguments: str) -> str:
    """Output of a CUDA tool that Triton's wheel brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _instructions(listing: str) -> list[str]:
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", listing, re.MULTILINE)


def _inner_loops(listing: str) -> list[Counter[str]]:
    """Opcodes of each loop that holds products and exponentials, no other loop, and no masks."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    spans = []
    for end, text in enumerate(instructions):
        target = re.search(r"BRA(?:\.\w+)* .*`\((\.L_x_\d+)\)", text)
        if target and labels.get(target[1], end + 1) <= end:
            opcodes = Counter(_opcode(line) for line in instructions[labels[target[1]] : end + 1])
            if opcodes["MUFU"] >= 8 and sum(opcodes[name] for name in MATRIX) >= 2:
                spans.append((labels[target[1]], end, opcodes))
    inner: list[tuple[int, int, Counter[str]]] = []
    for span in sorted(spans, key=lambda span: span[1] - span[0]):
        if all(span[1] < begin or span[0] > end for begin, end, _ in inner):
            inner.append(span)
    # A mask is a select for every pair.
    unmasked = [opcodes for _, _, opcodes in inner if opcodes["FSEL"] + opcodes["SEL"] < opcodes["MUFU"] / 2]
    return unmasked or [opcodes for _, _, opcodes in inner]


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+ ", "", instruction).split()[0].split(".")[0]


def measure_all(capability: int) -> dict[str, dict[str, dict[str, Any]]]:
    """{sm_90: {case: {kernel: what `measure` says}}}; Triton compiles for one capability a process."""
    cases = {
        case.name: {name: measure(kernel) for name, kernel in compile_case(case, capability).items()}
        for case in CASES[capability]
    }
    return {f"sm_{capability}": cases}


def exceeded(found: dict[str, Any], allowed: dict[str, Any]) -> list[str]:
    """`sm_90, case, kernel: what` for everything above its budget, or without one."""
    wrong = []
    for architecture, cases in found.items():
        limit = SHARED_LIMIT[int(architecture.removeprefix("sm_"))]
        for case, kernels in cases.items():
            for kernel, now in kernels.items():
                where = f"{architecture}, {case}, {kernel}"
                budget = allowed.get(architecture, {}).get(case, {}).get(kernel)
                if budget is None:
                    wrong.append(f"{where}: no budget")
                    continue
                wrong += [
                    f"{where}: {what} {now[what]}, allowed {budget[what]}"
                    for what in ("registers", "stack", "shared")
                    if now[what] > budget[what]
                ]
                wrong += [
                    f"{where}: {what} {now[what]}, the budget is for {budget[what]}"
                    for what in ("warps", "stages")
                    if now[what] != budget[what]
                ]
                if now["shared"] > limit:
                    wrong.append(f"{where}: shared {now['shared']}, the device has {limit}")
                if len(now["loops"]) != len(budget["loops"]) or any(
                    a > b * TOLERANCE or exponentials > allowed_exponentials
                    for (a, exponentials), (b, allowed_exponentials) in zip(now["loops"], budget["loops"], strict=False)
                ):
                    wrong.append(f"{where}: instructions in loops {now['loops']}, allowed {budget['loops']}")
        for case, kernels in allowed.get(architecture, {}).items():
            missing = kernels.keys() - cases.get(case, {}).keys()
            wrong += [f"{architecture}, {case}, {kernel}: has a budget, but was not compiled" for kernel in missing]
    return wrong


def version() -> str:
    """Triton's version as budgets.json has it: major.minor."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def budget_of(all_budgets: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The budget of this Triton version, or of the newest before it."""

    def order(name: str) -> tuple[int, ...]:
        return tuple(map(int, name.split(".")))

    known = [name for name in all_budgets if order(name) <= order(version())] or list(all_budgets)
    chosen = max(known, key=order)
    return chosen, all_budgets[chosen]


def main(argv: list[str]) -> int:
    """Measures, and compares or writes; 1 where something is above its budget."""
    parser = argparse.ArgumentParser(prog="python -m bench budgets", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--arch", type=int, choices=sorted(CASES), help="compute capability; default: one after another"
    )
    parser.add_argument("--write", action="store_true", help="accept what is found")
    options = parser.parse_args(argv)
    if options.arch is None:
        command = [sys.executable, "-m", "bench", "budgets", *argv, "--arch"]
        return max(subprocess.run([*command, str(capability)]).returncode for capability in sorted(CASES))
    os.environ["TRITON_INTERPRET"] = "0"
    if "kernels" in sys.modules:
        raise RuntimeError("kernels were imported before this could switch the interpreter off")
    found = measure_all(options.arch)
    all_budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    for architecture, cases in found.items():
        for case, kernels in cases.items():
            for kernel, values in kernels.items():
                print(f"{architecture}  {case:26s} {kernel:22s}", *(f"{k} {v}" for k, v in values.items()))
    if options.write:
        all_budgets.setdefault(version(), {}).update(found)
        BUDGETS.write_text(json.dumps(all_budgets, indent=1) + "\n")
        return 0
    name, allowed = budget_of(all_budgets)
    wrong = exceeded(found, allowed)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong and name != version():
        print(f"triton {version()} has no budget of its own (compared with {name}): see --write", file=sys.stderr)
    return 1 if wrong else 0
