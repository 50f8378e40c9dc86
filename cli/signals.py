"""How the command ends: its exit statuses, its error lines, and its handling of signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from convsim_init.parallel.launch import launched

DONE, FAILED, WRONG_USAGE, MISMATCH, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
GRACE = 0.5  # seconds from a signal to the end, whatever is being computed
HANDLED = (signal.SIGINT, signal.SIGTERM)

REPORTED = threading.Event()  # set once an error line was printed: a signal after it adds no other


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises."""


def fail(message: str, status: int) -> int:
    """Print an error in one line on stderr, once on each machine, and return the status."""
    import click

    from convsim_init.report.text import printable

    from .terminal import colour

    REPORTED.set()
    if launched().reports_errors:
        error = click.style("Error:", fg="red", bold=True)
        click.echo(f"{error} {printable(' '.join(message.split()))}", err=True, color=colour())
    return status


def interrupted(*, terminated: bool = False) -> int:
    """Print the error line of a signal and return its status; imports nothing, because it may have ended an import."""
    word, status = ("terminated", TERMINATED) if terminated else ("interrupted", INTERRUPTED)
    if REPORTED.is_set():
        return status
    if sys.stderr is not None and sys.stderr.isatty():
        _tell("")  # ends the line in which the terminal shows ^C
    _tell(f"Error: {word}; no partial file is left")
    return status


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Let a signal end the process on the spot, for imports.

    An exception, which is Python's own way, would show a traceback in the imports before `main`. In the import of
    torch it would be lost, for C code there imports numpy and drops what that raises, and the command would go on.
    """

    def leave(number: int, _: FrameType | None) -> None:
        _ignore_others()
        os._exit(interrupted(terminated=number == signal.SIGTERM))

    with _handled_by(leave):
        yield


@contextmanager
def grace_period(*, last: bool = False) -> Iterator[None]:
    """Let a signal raise an exception once, and end the process a moment later whatever it does.

    Python runs a signal's handler only when the main thread is back from C code, which may take long, as in a
    decomposition or on a slow disk; a thread of its own learns of the signal at once. After the `last` such context
    of a process, signals end it without a word.
    """

    def watch() -> None:
        while numbers := os.read(reader, 1):
            if numbers[0] in HANDLED and not ended.wait(GRACE):
                from convsim_init.files.writing import remove_scratch_folders

                with suppress(Exception):
                    remove_scratch_folders()
                os._exit(interrupted(terminated=numbers[0] == signal.SIGTERM))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    REPORTED.clear()
    with _handled_by(_raise_once, last=last):
        ended = threading.Event()
        reader, writer = os.pipe()
        with suppress(AttributeError):  # on Windows before Python 3.12, where blocking ones will do
            os.set_blocking(writer, False)
        former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, name="convsim-init-signals", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            # The order matters: no signal may be written to a closed pipe, and closing the writer ends the watcher.
            ended.set()
            signal.set_wakeup_fd(former)
            os.close(writer)
            watcher.join()
            os.close(reader)


@contextmanager
def signals_of_python() -> Iterator[None]:
    """Within a `grace_period`, let signals do what they do in a script that Python runs."""
    ours = [number for number in HANDLED if signal.getsignal(number) is _raise_once]
    for number in ours:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    descriptor = signal.set_wakeup_fd(-1) if ours else -1
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _raise_once)
        if ours:
            signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None], *, last: bool = False) -> Iterator[None]:
    """Install a handler for all signals but those that other code handles."""
    numbers = HANDLED if threading.current_thread() is threading.main_thread() else ()
    known = (signal.default_int_handler, signal.SIG_DFL, _raise_once)
    before = {number: former for number in numbers if (former := signal.getsignal(number)) in known}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if last else former)


def _raise_once(number: int, _: FrameType | None) -> None:
    _ignore_others()  # a second exception would interrupt the cleaning up after the first
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _ignore_others() -> None:
    for number in HANDLED:  # not with SIG_IGN: Python would report a signal that has arrived already
        signal.signal(number, lambda *_: None)


def _tell(line: str) -> None:
    if sys.stderr is not None and launched().reports_errors:
        print(line, file=sys.stderr, flush=True)
