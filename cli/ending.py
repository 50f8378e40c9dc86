"""How the command ends: its exit statuses, the line an error is told in, and what an interrupt does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

DONE, FAILED, WRONG_USAGE, MISMATCH, INTERRUPTED = 0, 1, 2, 3, 130


def fail(message: str, status: int) -> int:
    """Tell an error in one line on stderr and return the status."""
    if sys.stderr is not None:
        print("Error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


def interrupted() -> int:
    """Tell of an interrupt, as `fail` does."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(file=sys.stderr)  # the terminal stands behind the ^C it has shown
    return fail("interrupted; no partial file is left", INTERRUPTED)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let an interrupt end the process on the spot, for imports.

    Python's own way, an exception, shows a traceback in the imports before `main` and is lost in that of torch: its C
    code imports numpy and drops what that raises, and the command would go on.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(interrupted()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
