"""How a script begins and ends: wrong usage answered before heavy imports, failures said in one sentence, exit codes,
SIGTERM taken as Ctrl-C.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence

import config


def answer_early(settings_class: type[config.Settings], description: str) -> None:
    """Answer --help and wrong usage before the caller's heavy imports; return where the script may go on."""
    sys.excepthook = _without_traceback_when_interrupted
    signal.signal(signal.SIGTERM, _interrupt)
    atexit.register(gc.freeze)  # a last search for garbage among all that torch made takes a second
    code = run_script(settings_class, description, lambda settings: None)
    if code:
        sys.exit(code)


def _without_traceback_when_interrupted(kind, error, trace) -> None:
    """For Ctrl-C, or SIGTERM, during imports; Python itself would end by the signal then, without an exit code."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted: nothing was begun.", file=sys.stderr, flush=True)
        os._exit(130)
    else:
        sys.__excepthook__(kind, error, trace)


def run_script(
    settings_class: type[config.Settings],
    description: str,
    main: Callable[[config.Settings], None],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> int:
    """Parse, run ``main`` and turn every expected failure into one sentence and an exit code.

    Returns:
        0 done, 1 a failure said in one sentence on stderr, 2 wrong usage, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):  # a file name may be no text
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    with (
        contextlib.redirect_stdout(sys.stdout and _WhileRead(sys.stdout)),
        contextlib.redirect_stderr(sys.stderr and _WhileRead(sys.stderr)),
        _terminated_as_interrupted(),
    ):
        return _run(lambda: main(config.parse(settings_class, description, argv, prog)))


class _WhileRead:
    """A text stream whose reader may go away (``| head``): the work goes on, and what it would say goes nowhere."""

    def __init__(self, stream: typing.TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._unless_broken(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._unless_broken(self._stream.flush)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _unless_broken(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except BrokenPipeError:  # nor must the flush at exit fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM (``timeout``, ``docker stop``) end the work as Ctrl-C does, its processes and half-written files
    with it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread alone
        return

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame) -> None:
    signal.signal(number, signal.SIG_IGN)  # ``timeout`` sends two, and the second would break off the cleaning up
    raise KeyboardInterrupt


def _run(work: Callable[[], None]) -> int:
    try:
        work()
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()
        return 0
    except config.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}.", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: there is not enough memory; try a smaller --batch-size or --image-size.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was already written is kept.", file=sys.stderr)
        return 130


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on the CPU or torch on CUDA found no memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
