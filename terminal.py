"""What a person sees and types: lines, bars, flags, Ctrl-C, and how the program ends."""

import argparse
import atexit
import io
import math
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager

import torch.distributed as dist
from tqdm import tqdm

from hub import InputError
from machine import Diverged, ProcessLost, is_main_process, keep_freed_memory, release_folders

BEAT_SECONDS = 2  # between two updates of a bar's clock
LINE_SECONDS = 30  # between two lines where stderr is no terminal

# --- lines and bars ----------------------------------------------------------------------------


def say(*lines) -> None:
    """Prints on the main process alone, at once, between the bars."""
    if is_main_process():
        with tqdm.external_write_mode():
            print(*lines, sep="\n", flush=True)


def visible(text: str) -> str:
    """Text with its control characters written out, but for line breaks and tabs: what a model
    writes cannot move the cursor, or set the title, of a terminal."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 570:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_table(rows: list[list[str]]) -> str:
    """Aligned for a terminal, and Markdown at the same time. The first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *rest in [rows[0], rule, *rows[1:]]:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *cells]) + " |")
    return "\n".join(lines)


def progress(*iterable, **options) -> tqdm:
    """A tqdm bar on the main process alone, lines if stderr is no terminal. The clock keeps ticking
    during long steps. The time left follows from the average rate since the start, which includes
    pauses such as validation."""
    kind = tqdm if sys.stderr.isatty() else Lines
    bar = kind(*iterable, disable=not is_main_process(), leave=False, smoothing=0, **options)
    if not bar.disable:
        threading.Thread(target=keep_moving, args=(bar,), name="bar", daemon=True).start()
    return bar


class Lines(tqdm):
    """Replaces bars in a file or a pipe: one line every LINE_SECONDS, of whichever bar moves."""

    last = time.monotonic()

    def display(self, msg=None, pos=None):
        if msg is None and time.monotonic() - Lines.last >= LINE_SECONDS:
            Lines.last = time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def clear(self, nolock=False):
        """A line stays."""


def keep_moving(bar: tqdm) -> None:
    while not bar.disable and not exiting.wait(BEAT_SECONDS):  # it is disabled once closed
        with bar.get_lock():
            bar.refresh(nolock=True)


exiting = threading.Event()


@atexit.register
def end_bars() -> None:
    """Leaves no thread to wake up while Python ends."""
    exiting.set()
    for thread in threading.enumerate():
        if thread.name == "bar":
            thread.join()


# --- the program and how it ends ---------------------------------------------------------------


def run_program(name: str, run, kept=lambda: "") -> int:
    """Calls run(). Returns its exit code: 0 done, 1 diverged or without one of its processes, 2 bad
    input, 130 stopped by Ctrl-C, 141 when whoever reads the output has left. But for 0 and 141, one
    line on stderr says why and, if the run could have gone on, what kept() says is left of it.
    Characters that the terminal's encoding lacks are shown as question marks."""
    code, message = 0, ""
    speaks = is_main_process()
    mend_streams()
    keep_freed_memory()
    try:
        with interrupts(signal.default_int_handler):
            run()
            sys.stdout.flush()
    except InputError as error:
        code, message = 2, str(error)
    except BrokenPipeError:  # as of `| head`
        code = 141
        drop_broken_streams()
    except OSError as error:
        code, message = 2, f"{error.filename or '--out'}: {error.strerror or error}"
        drop_broken_streams()  # where the full disk is that of stdout
    except Diverged as error:
        code, message = 1, str(error)
    except ProcessLost as error:  # maybe the main one
        code, message, speaks = 1, str(error), True
    except KeyboardInterrupt:
        code, message = 130, "stopped"

    with interrupts(signal.SIG_IGN):  # a second one, too, ends in this line
        if dist.is_initialized():
            dist.destroy_process_group()
        if message and speaks:
            left = last_words(kept) if code != 2 else ""
            try:
                print(visible(f"{name}: {message}{left}"), file=sys.stderr, flush=True)
            except OSError:
                drop_broken_streams()
        release_folders()
    return code


def mend_streams() -> None:
    """Redirects closed streams to /dev/null, and lets none fail for a character it cannot show."""
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop_broken_streams() -> None:
    """Sends what is flushed at exit nowhere: it would fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def last_words(kept) -> str:
    try:
        return kept()
    except InputError as error:  # a file that it reads is damaged
        return f"; {error}"


@contextmanager
def interrupts(handler):
    """Sets what Ctrl-C does meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after this step; a second stops immediately."""

    asked = False

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.previous)

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("\nstopping after this step ...")


# --- flags -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Prints errors as one line, like all others."""

    def error(self, message: str):
        self.exit(2, f"{self.prog.removesuffix('.py')}: {message}\n")


def add_flags(parser: argparse.ArgumentParser, groups: dict[str, dict]) -> None:
    """groups: {title: {name: (kind, default, help)}}. kind is a type, or the values to choose from;
    `list` takes several values, `bool` none (--name, --no-name)."""
    special = {list: {"nargs": "+"}, bool: {"action": argparse.BooleanOptionalAction}}
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, (kind, default, help) in flags.items():
            options = special.get(kind, {"type": kind})
            if isinstance(kind, tuple):
                options = {"choices": kind}
            if default is not None and kind not in special:
                help += " [%(default)s]"
            group.add_argument(f"--{name}", default=default, help=help, **options)


def at_least(least, kind=int, most=math.inf):
    """An argparse type: a number that is `least` or more, and `most` at most."""

    def number(text: str):
        value = kind(text)
        if not least <= value <= most:
            limit = "or more" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {least} {limit}")
        return value

    return number


def token_count(text: str) -> int:
    """200k, 10M or a plain number."""
    scale = {"k": 1e3, "m": 1e6}.get(text[-1:].lower())
    try:
        count = int(float(text[:-1]) * scale) if scale else int(text)
        if count > 0:
            return count
        raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens; write 200k, 10M or 4096"
        ) from None


def utf8(text: str) -> str:
    """An argparse type: text. Of bytes that the locale lacks Python makes lone surrogates."""
    try:
        return os.fsencode(text).decode() if re.search("[\ud800-\udfff]", text) else text
    except UnicodeError:
        raise argparse.ArgumentTypeError("is not UTF-8; write it in UTF-8") from None


MACHINE_FLAGS = {
    "device": (str, None, "cpu or cuda [the GPU where there is one]"),
    "dtype": (("bfloat16", "float32"), None, "of weights [bfloat16 where the processor has it]"),
}
