"""Ctrl-C that waits: what must happen as a whole is not left half done."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class deferred:  # a word in lower case, as in: with deferred()
    """Holds Ctrl-C (SIGINT) back while the block runs; its handler is called right after. Other exceptions pass as
    ever.

    Python runs signal handlers in the main thread alone: in another one there is nothing to hold back.
    """

    def __enter__(self) -> None:
        self._waiting: tuple[int, FrameType | None] | None = None
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._wait)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._waiting = self._waiting or (number, frame)

    def __exit__(self, *exception: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._waiting is not None:
                self._handler(*self._waiting)
