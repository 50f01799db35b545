"""Ctrl-C that waits for a good moment."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that it strikes between steps and not inside one.

    Yields the function that tells whether it came. The second Ctrl-C strikes at once.
    """
    flag = threading.Event()

    def raise_flag(signal_number: int, frame: object) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set  # signals strike the main thread alone
        return
    before = signal.signal(signal.SIGINT, raise_flag)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)
