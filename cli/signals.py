"""How the command ends: its exit statuses, the line an error is told in, and what a signal does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from convsim_init.parallel.launch import launched

DONE, FAILED, WRONG_USAGE, MISMATCH, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
GRACE = 0.5  # seconds from a signal to the end, whatever is being computed


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises."""


def fail(message: str, status: int) -> int:
    """Tell an error in one line on stderr, once on each machine, and return the status."""
    if sys.stderr is not None and launched().speaks:
        print("Error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


def interrupted(*, terminated: bool = False) -> int:
    """Tell of a signal, as `fail` does."""
    if sys.stderr is not None and sys.stderr.isatty() and launched().speaks:
        print(file=sys.stderr)  # the terminal stands behind the ^C it has shown
    word, status = ("terminated", TERMINATED) if terminated else ("interrupted", INTERRUPTED)
    return fail(f"{word}; no partial file is left", status)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end the process on the spot, for imports.

    Python's own way, an exception, shows a traceback in the imports before `main` and is lost in that of torch: its C
    code imports numpy and drops what that raises, and the command would go on.
    """
    ours = {
        signal.SIGINT: (signal.default_int_handler,),
        signal.SIGTERM: (signal.SIG_DFL, _terminate),
    }
    before = {number: signal.getsignal(number) for number in ours}
    in_main_thread = threading.current_thread() is threading.main_thread()
    replaced = [number for number, handlers in ours.items() if in_main_thread and before[number] in handlers]
    for number in replaced:
        signal.signal(number, lambda number, _: os._exit(interrupted(terminated=number == signal.SIGTERM)))
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, before[number])


@contextmanager
def ending_in_time() -> Iterator[None]:
    """Let SIGTERM raise as SIGINT does, and end the process a moment after either where nothing heeds it.

    Python runs a signal's handler once the main thread is back from C code: from a decomposition or a slow disk that
    may take long. A thread is told of the signal at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if was_default:
        signal.signal(signal.SIGTERM, _terminate)
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    former = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(told, ended), name="convsim-init-signals", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(former)
        os.close(tell)
        watch.join()
        os.close(told)
        if was_default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _watch(told: int, ended: threading.Event) -> None:
    handled = (signal.SIGINT, signal.SIGTERM)
    while numbers := os.read(told, 1):
        if numbers[0] in handled and not ended.wait(GRACE):
            from convsim_init.files import remove_scratch_folders

            with contextlib.suppress(Exception):
                remove_scratch_folders()
            os._exit(interrupted(terminated=numbers[0] == signal.SIGTERM))
