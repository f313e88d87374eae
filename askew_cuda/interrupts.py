"""Ctrl-C that waits: what must happen as a whole is not left half done."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Holds Ctrl-C (SIGINT) back while the block runs; its handler is called right after. Other exceptions pass as
    ever.

    Python runs signal handlers in the main thread alone: in another one there is nothing to hold back.
    """
    waiting: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append((number, frame))

    handler = None if torch.compiler.is_compiling() else signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])
