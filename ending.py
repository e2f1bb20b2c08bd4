"""How a run ends: in one line and an exit status, whatever ends it: a mistake, a stop signal, a terminal that closes.

    with tidy(ValueError) as stop:              # these errors end in one line, a stop signal at once
        ...
        wait_for_steps(stop)                    # from here on a stop signal is only written down
        for batch in loader:
            ...                                 # one optimizer step
            leave_if_asked(stop)                # raises Stopped, where a state can be saved from which to go on

This file needs the standard library alone and can be copied into any project.
"""

import atexit
import contextlib
import errno
import gc
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

atexit.register(gc.freeze)  # else Python looks through the million objects of torch, for about a second, before it ends


class Stopped(KeyboardInterrupt):
    """A signal asks the run to stop; `.args[0]` is its number. Like Ctrl-C's own exception, `except Exception` does not
    swallow it.
    """


# Ctrl-C; kill, Slurm and containers; a terminal that closes (there is no such signal on Windows).
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def stop_signals():
    """Catch the stop signals within the block and yield `stop`. A signal raises Stopped at once; after
    `wait_for_steps(stop)` the first one is noted for `leave_if_asked`, and a second Ctrl-C ends the process there and
    then. Other second signals change nothing: a closing terminal sends SIGHUP twice, torchrun SIGTERM after a Ctrl-C.
    A signal that was ignored before, as under nohup, stays so. Processes started within the block end with it.
    """
    # The last three are for one of several processes; `distributed.joined` replaces them.
    stop = SimpleNamespace(signal=None, since=0.0, waiting=False, go_on=str,
                           agree=lambda number: number, about=lambda error: (error, True), announces=True)
    me, others = os.getpid(), multiprocessing.active_children()

    def ask(number, frame):
        if os.getpid() != me:  # in a forked worker that has not yet set handlers of its own
            return
        if not stop.waiting:
            for other in before:  # one is enough
                signal.signal(other, signal.SIG_IGN)
            raise Stopped(number)
        if stop.signal is None:
            stop.signal, stop.since = number, time.monotonic()
            if hasattr(signal, "SIGCHLD"):  # that a DataLoader's worker ends is no error from now on
                before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, _ignore))
            if stop.announces:
                with contextlib.suppress(OSError):  # os.write: print may not be called from within print
                    os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once, with what was saved before\n")
        elif number == signal.SIGINT and time.monotonic() - stop.since > 0.5:  # wrappers pass one Ctrl-C on twice
            os._exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
        before = {s: signal.getsignal(s) for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
        for number in before:
            signal.signal(number, ask)
    try:
        yield stop
    finally:
        _end_processes(others)
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_steps(stop, go_on=str):
    """From now on a stop signal waits for `leave_if_asked`. go_on: gives the command that goes on with the run."""
    stop.waiting, stop.go_on = True, go_on


def leave_if_asked(stop):
    """Raise Stopped if a signal has come since `wait_for_steps`; of several processes, to any of them: `stop.agree` then
    waits for the others, and a signal that comes meanwhile is noted for the next time.
    """
    if (number := stop.agree(stop.signal)) is not None:
        raise Stopped(number)


def _ignore(number, frame):
    """Not SIG_DFL: Python would complain about a signal that is on its way."""


def _end_processes(others):
    """Kill the processes that multiprocessing has started, but for `others`. (A DataLoader waits for its workers.)"""
    ours = [process for process in multiprocessing.active_children() if process not in others]
    main_thread = threading.current_thread() is threading.main_thread()
    if not (ours and main_thread and hasattr(signal, "SIGCHLD")):
        return
    handler = signal.signal(signal.SIGCHLD, _ignore)  # DataLoader's own takes a killed worker for an error
    for process in ours:
        process.kill()
    for process in ours:
        process.join(1)
    signal.signal(signal.SIGCHLD, handler)


# ---- a terminal or pipe that closes


class _Forgiving:
    """A text stream whose text is dropped from the first time on that it cannot be written."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self):
        """Lead the file descriptor to nowhere, so that what is still in the buffer can be written at exit."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def forgiving_output():
    """Within the block, print and progress bars go on in silence when the terminal, pipe or full disk behind stdout or
    stderr takes no more: hours of training are not lost for a line of text. Characters that it cannot show are escaped.
    """
    for _ in (0, 1, 2):  # where one is closed, the next file that is opened would take its place
        with contextlib.suppress(OSError):
            if (nowhere := os.open(os.devnull, os.O_RDWR)) > 2:
                os.close(nowhere)
    streams = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # closed already
                stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Forgiving(stream or io.StringIO()))  # None: closed from the start
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams


# ---- the last line

# Too many open files, no space (for the workers' shared memory), read-only.
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EROFS)
# What PyTorch, cuBLAS and cuDNN say when memory has run out.
NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def tidy(*errors):
    """End the script in one line on stderr and the exit status of `last_words` when one of `errors`, a stop signal or a
    lack of memory ends the block. With `forgiving_output`; yields the `stop` of `stop_signals`.
    """
    with forgiving_output(), stop_signals() as stop:
        try:
            yield stop
        except (*errors, RuntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
            if stop.signal is not None and "DataLoader worker" in str(error):  # ended by the same signal
                error = Stopped(stop.signal)
            error, speaks = stop.about(error)  # of several processes one speaks
            words, status = last_words(error, stop.go_on())
            if speaks:
                bar = "\r\x1b[K" if sys.stderr.isatty() else ""  # clears a progress bar
                print(f"{bar}{words}", file=sys.stderr)
            sys.exit(status)


def last_words(error, command=""):
    """The last line of a run that `error` ends, and its exit status: 128 + the signal's number for Stopped, else 2.

    command: what goes on with the run, if anything does; it is named unless the error itself names one. A RuntimeError
    is put into words if memory has run out, a worker process has died, or a network cannot be compiled or
    computed deterministically; any other is raised again.
    """
    text, status = " ".join(str(error).splitlines()), 2
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        text, status = f"stopped by {number.name}", 128 + number
    elif isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    ):
        first = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        text = (f"error: {first or 'out of memory'}: take a smaller --batch-size (in training with a "
                "larger --accumulate, so that their product stays), or fewer --workers")
        if not command:  # a run that goes on keeps these
            text += "; or --amp bf16, or in training with a frozen backbone --cache-features 1"
    elif isinstance(error, RuntimeError) and "DataLoader worker" in text:
        text = (f"error: {text.partition('. ')[0].rstrip('. ')}: perhaps memory has run out; take fewer --workers, or "
                "0 (in a container, more shared memory: --shm-size)")
    elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        text = f"error: {text}: give a shorter path"
    elif isinstance(error, OSError) and error.errno in FULL:
        text = f"error: {text}: perhaps fewer --workers (in a container, more shared memory: --shm-size)"
    elif isinstance(error, RuntimeError) and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        text = f"error: torch.compile has failed ({text[:300]}): leave out --compile, or say --no-compile"
    elif isinstance(error, RuntimeError) and "deterministic" in text:
        text = (f"error: {text.partition(' does not have')[0]} has no deterministic form here: leave out "
                "--deterministic, or say --no-deterministic")
    elif isinstance(error, (RuntimeError, OSError)):
        raise error
    else:
        text = f"error: {text}"
    return text + (f"; go on with: {command}" if command and "--resume" not in text else ""), status
