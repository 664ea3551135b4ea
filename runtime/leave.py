"""How a process ends early: at once, from whatever it does, with a line that says why, and nothing left half-made.

Before its first step a run tokenizes, trains a tokenizer, waits for other processes, compiles: minutes in which the
main thread does not come back to Python. So a thread of its own answers signals, and ends the process from there.
No JAX here: signals are answered before anything slow is imported.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn, TextIO

from runtime.exit_codes import FAULT, INTERRUPTED, PREEMPTED

SECONDS = 1.5  # that an end may take: what has not been cleaned up by then stays
SIGNALS = {
    signal.SIGINT: (INTERRUPTED, "interrupted; what was saved before is intact"),
    signal.SIGTERM: (PREEMPTED, "stopped by SIGTERM; what was saved before is intact, and the same command goes on"),
}
PRECEDENCE_SECONDS = 1.0  # that a process with an unexpected error waits for the word of another
MISTAKES = (ValueError, OSError, OverflowError, MemoryError)  # the user's, before the first step
BACKGROUND = "compile ahead"  # the name of threads whose work an end does not wait for
SHOW_CURSOR = "\x1b[?25h"  # a progress bar has hidden it

_leaving = threading.Lock()  # taken once, and never let go
_leaver = 0  # the thread that took it
_cleanups: list[Callable[[], None]] = []
_tell: Callable[[int, str, float], None] | None = None


def exit_now(code: int) -> NoReturn:
    """Ends the process at once. For when its peers are gone: a normal exit waits for them at a barrier for 100 s."""
    with contextlib.suppress(OSError, ValueError):
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    os._exit(code)


def _flush(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        if stream.isatty():
            stream.write(SHOW_CURSOR)
        stream.flush()


def leave(code: int, line: str, *, said: bool = False) -> NoReturn:
    """Ends this process, and with it all the others of the run, within two seconds; to be called in any thread.

    Says the line, unless it is said already, tells the other processes, runs the clean-ups that are due. The first
    call counts.
    """
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # for the end, which another thread is about to bring
    global _leaver
    _leaver = threading.get_ident()
    limit = threading.Timer(SECONDS, os._exit, (code,))
    limit.daemon = True
    limit.start()
    _last_words("" if said else f"{line}\n")
    telling = threading.Thread(target=_tell, args=(code, line, SECONDS / 2), daemon=True) if _tell else None
    if telling:
        telling.start()  # meanwhile, so that an unreachable process costs the clean-ups no time
    for cleanup in reversed(_cleanups):
        with contextlib.suppress(Exception):
            cleanup()
    if telling:
        telling.join()
    exit_now(code)


def _last_words(words: str) -> None:
    """Writes to stderr what nothing shall follow: threads still at work, whose files go, are not heard from here on."""
    _flush(sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        stderr = sys.stderr.fileno()
        with os.fdopen(os.dup(stderr), "w", encoding="utf-8", errors="backslashreplace") as heard:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stderr)
            heard.write(words)


def finish(code: int) -> NoReturn:
    """The last line of a program: its normal exit, which does not wait for what still compiles in the background.

    A compiler that runs on in C++ would crash while the interpreter is taken apart around it.
    """
    if any(thread.name == BACKGROUND for thread in threading.enumerate()):
        atexit._run_exitfuncs()
        exit_now(code)
    sys.exit(code)


def tell_with(tell: Callable[[int, str, float], None]) -> None:
    """How `leave` tells other processes: called as (code, line, seconds that it may take)."""
    global _tell
    _tell = tell


def ended(code: int, line: str) -> int:
    """Says why a program ends, and returns the exit code to end with. One process among several leaves at once."""
    if _tell is not None or _leaving.locked():
        leave(code, line)
    print(line, file=sys.stderr)
    return code


def leave_by(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
    """The sys.excepthook of a run: an exception that nobody caught ends all its processes, with a traceback in one."""
    if issubclass(kind, KeyboardInterrupt):
        leave(*SIGNALS[signal.SIGINT])
    hear_others()
    leave_for(error, told=False)


def leave_for(error: BaseException, *, told: bool) -> NoReturn:
    """Ends all processes because of a fault in this one; told: whether its traceback is printed already."""
    if not told:
        sys.__excepthook__(type(error), error, error.__traceback__)
    leave(FAULT, one_line(error))


def hear_others() -> None:
    """Before an error is told: when another process has ended, its peers fail too, and its reason is the true one."""
    if _tell is not None:
        time.sleep(PRECEDENCE_SECONDS)


def one_line(error: BaseException) -> str:
    """What went wrong, as the user is told it."""
    named = isinstance(error, OSError) and error.filename and error.strerror
    text = f"{error.filename}: {error.strerror}" if named else " ".join(str(error).split())
    if isinstance(error, MISTAKES):
        return f"error: {text or type(error).__name__}"
    return f"error: {type(error).__name__}: {text[:500]}"


@contextlib.contextmanager
def unless_within(seconds: float, code: int, line: str) -> Iterator[None]:
    """Leaves where what is inside takes longer."""
    timer = threading.Timer(seconds, leave, (code, line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def on_leaving(cleanup: Callable[[], None]) -> Iterator[None]:
    """Inside, a process that leaves runs `cleanup` first, perhaps in another thread than this.

    A process that leaves already goes no further: what it has waited for may have come because another one left, too.
    """
    _cleanups.append(cleanup)
    if _leaving.locked() and threading.get_ident() != _leaver:
        with contextlib.suppress(Exception):
            cleanup()
        threading.Event().wait()  # for the end
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


def answer_signals() -> None:
    """From here on Ctrl-C and SIGTERM end this process at once; while `runtime.stop` has its handlers, a second Ctrl-C.

    To be called in the main thread. Python runs a handler only when the main thread comes back to it; but the signal's
    number is written to a pipe at once, and the thread that reads it needs no more than a moment of the interpreter.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _answered_elsewhere)
    sys.excepthook = leave_by
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def is_answered(number: int) -> bool:
    """Whether this signal ends the process at once."""
    return signal.getsignal(number) is _answered_elsewhere


def _answered_elsewhere(number, frame) -> None:
    """The handler in force while the thread of `answer_signals` answers."""


def _watch(reader: int) -> None:
    interrupts = 0
    while True:
        (number,) = os.read(reader, 1)
        interrupts += number == signal.SIGINT
        if is_answered(number) or interrupts == 2:
            leave(*SIGNALS[signal.Signals(number)])
