"""How the command ends: its exit statuses, the line an error is told in, and what a signal does."""

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

TOLD = threading.Event()  # an error that ends the command: a signal on its way out adds no other

Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises."""


def fail(message: str, status: int) -> int:
    """Tell an error in one line on stderr, once on each machine, and return the status."""
    import click

    from convsim_init.report.text import printable

    from .terminal import colour

    TOLD.set()
    if launched().reports_errors:
        error = click.style("Error:", fg="red", bold=True)
        click.echo(f"{error} {printable(' '.join(message.split()))}", err=True, color=colour())
    return status


def interrupted(*, terminated: bool = False) -> int:
    """Tell of a signal, as `fail` does; imports nothing, because an import may be what it ends."""
    word, status = ("terminated", TERMINATED) if terminated else ("interrupted", INTERRUPTED)
    if TOLD.is_set():
        return status
    if sys.stderr is not None and sys.stderr.isatty():
        _tell("")  # the terminal stands behind the ^C it has shown
    _tell(f"Error: {word}; no partial file is left")
    return status


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Let a signal end the process on the spot, for imports.

    Python's own way, an exception, shows a traceback in the imports before `main` and is lost in
    that of torch: its C code imports numpy and drops what that raises, and the command would go on.
    """

    def leave(number: int, _: FrameType | None) -> None:
        _ignore_others()
        os._exit(interrupted(terminated=number == signal.SIGTERM))

    with _handled_by(leave):
        yield


@contextmanager
def grace_period(*, last: bool = False) -> Iterator[None]:
    """Let a signal raise an exception once, and end the process a moment later whatever it does.

    Python runs a signal's handler once the main thread is back from C code, which may take long: a
    decomposition, a slow disk. A thread of its own reads of the signal at once. After the last such context the process
    ends, and a signal ends it without a word.
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
    TOLD.clear()
    with _handled_by(_raise_once, last=last):
        ended = threading.Event()
        reader, writer = os.pipe()
        with suppress(AttributeError):  # of Windows before Python 3.12
            os.set_blocking(writer, False)  # elsewhere Python takes no other descriptor for its signals
        former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, name="convsim-init-signals", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            # In this order: no signal is written to what is closed, and the closed writer ends the
            # watcher.
            ended.set()
            signal.set_wakeup_fd(former)
            os.close(writer)
            watcher.join()
            os.close(reader)


@contextmanager
def signals_of_python() -> Iterator[None]:
    """Let signals do within a `grace_period` what they do in a script that Python runs."""
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
def _handled_by(handler: Handler, *, last: bool = False) -> Iterator[None]:
    """Handle signals like that where they are handled as Python does by default, or by us."""
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
    _ignore_others()  # a second exception would break off the cleaning up after the first
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _ignore_others() -> None:
    for number in HANDLED:  # not by SIG_IGN: Python would report a signal that has come by then
        signal.signal(number, lambda *_: None)


def _tell(line: str) -> None:
    if sys.stderr is not None and launched().reports_errors:
        print(line, file=sys.stderr, flush=True)
