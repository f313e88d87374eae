"""Worlds of a few processes on gloo, which stay for all tests: torch is loaded once, in the server that they are forked
from, and a test costs what it does.

A test hands over a function of its module. Every rank calls it, and what each returns comes back in the order of ranks.
A rank that fails, or does not answer in time, is the test's failure; its world ends then, and the next test gets a new
one.
"""

import atexit
import functools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# What the ranks would each load themselves.
LOADED = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "askew_cuda",
)
SECONDS = 600  # for a task; a deadlock is a failure and not a wait


def _serve(rank: int, size: int, where: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            torch.manual_seed(0)
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class World:
    """Processes that wait for tasks."""

    def __init__(self, size: int):
        self.size, self._ranks, self._pipes = size, [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*LOADED, __name__])
        where = os.path.join(tempfile.mkdtemp(), "store")
        self._ranks, self._pipes = [], []
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, where, theirs), daemon=True)
            process.start()
            self._ranks.append(process)
            self._pipes.append(mine)

    def end(self) -> None:
        """Ends the processes."""
        for process in self._ranks:
            process.kill()
            process.join()
        self._ranks = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """What each rank returns."""
        if not self._ranks:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, due = [], time.monotonic() + seconds
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, due - time.monotonic())):
                    raise AssertionError(f"rank {rank} of {self.size} has not answered in {seconds} seconds")
                result, failure = pipe.recv()
                if failure is not None:
                    raise AssertionError(f"rank {rank} of {self.size}: {failure}")
            except BaseException:
                self.end()
                raise
            results.append(result)
        return results


@functools.cache
def world(size: int) -> World:
    """The world of so many ranks."""
    made = World(size)
    atexit.register(made.end)
    return made
