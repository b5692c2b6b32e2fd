"""Runs a function on several gloo ranks, each a process of its own, and returns what each gave."""

import os
import random
import socket
import traceback
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 300
LIBRARIES = ["torch", "torchvision", "timm", "deepspeed", "engine.trainer"]


def run_ranks(function: Any, world: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` of a module's top level on every rank; the results in rank order, through a queue."""
    # Forked from a process that has imported the libraries and done nothing else, which is most of a short run's time;
    # afresh where there is a GPU, since what has looked at CUDA must not fork.
    context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn when it is imported
        context.set_forkserver_preload(LIBRARIES)
    results = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_one_rank, args=(function, rank, world, port, arguments, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        gathered = dict(results.get(timeout=TIMEOUT_S) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    failed = [text for kind, text in gathered.values() if kind == "error"]
    assert not failed, "\n".join(failed)
    return [gathered[rank][1] for rank in range(world)]


def _one_rank(function: Any, rank: int, world: int, port: int, arguments: tuple, results: Queue) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}.items():
        os.environ[name] = str(value)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if world == 1:  # as without a launcher
        del os.environ["MASTER_PORT"]
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        outcome = ("result", function(*arguments))
    except BaseException:
        outcome = ("error", f"rank {rank}: {traceback.format_exc()}")
    results.put((rank, outcome))


def _free_port() -> int:
    """Below the range that the system hands out for connections, and each test process in a part of its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    for _ in range(100):
        port = 12_000 + 1_000 * worker + random.randrange(1_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")
