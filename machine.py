"""What the program runs on: the terminal, the processes under torchrun, the device, the dtype.

Under torchrun each process holds the model and takes its share of the work (data parallelism),
which needs three operations: who am I (`rank_and_world`), the sum of gradients
(`sum_over_processes`), and the results of all (`gather`). Without torchrun there is one process,
and they do nothing.
"""

import argparse
import io
import math
import os
import re
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hub import InputError

BEAT_SECONDS = 2  # between two moves of a bar's clock
LINE_SECONDS = 30  # between two lines where stderr is no terminal

# --- the terminal ------------------------------------------------------------------------------


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes; torchrun numbers them in RANK."""
    return int(os.environ.get("RANK", 0)) == 0


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
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress(*iterable, **options) -> tqdm:
    """A tqdm bar on the main process alone, lines where stderr is no terminal. Its clock moves
    within a long step, too. The time left is by the average rate since the start, which counts
    pauses in, such as validation."""
    kind = tqdm if sys.stderr.isatty() else Lines
    bar = kind(*iterable, disable=not is_main_process(), leave=False, smoothing=0, **options)
    if not bar.disable:
        threading.Thread(target=keep_moving, args=(bar,), daemon=True).start()
    return bar


class Lines(tqdm):
    """What stands for bars in a file or a pipe: one line every LINE_SECONDS, of whichever moves."""

    last = time.monotonic()

    def display(self, msg=None, pos=None):
        if msg is None and time.monotonic() - Lines.last >= LINE_SECONDS:
            Lines.last = time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def clear(self, nolock=False):
        """A line stays."""


def keep_moving(bar: tqdm) -> None:
    while not bar.disable:  # as it is once closed
        time.sleep(BEAT_SECONDS)
        with bar.get_lock():
            bar.refresh(nolock=True)


class Diverged(RuntimeError):
    """The loss, or the damage of a layer, became infinite or not a number."""


def run_program(name: str, run, kept=lambda: "") -> int:
    """Calls run(). Returns its exit code: 0 done, 1 diverged, 2 bad input, 130 stopped by Ctrl-C,
    141 when whoever reads the output has left. But for 0 and 141, one line on stderr says why, and
    where a run diverged or was stopped, kept() what is left of it. Characters that the terminal's
    encoding lacks are shown as question marks."""
    sys.stdin = sys.stdin or open(os.devnull)  # None where it was closed
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code, message = 0, ""
    try:
        run()
        sys.stdout.flush()
    except InputError as error:
        code, message = 2, str(error)
    except BrokenPipeError:  # as of `| head`
        code = 141
        drop_broken_pipes()
    except OSError as error:
        code, message = 2, f"{error.filename or '--out'}: {error.strerror or error}"
    except Diverged as error:
        code, message = 1, str(error) + kept()
    except KeyboardInterrupt:
        code, message = 130, "stopped" + kept()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message and is_main_process():
        try:
            print(visible(f"{name}: {message}"), file=sys.stderr, flush=True)
        except BrokenPipeError:
            drop_broken_pipes()
    return code


def drop_broken_pipes() -> None:
    """What is flushed at exit goes nowhere, or would fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after this step; a second one stops at once."""

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


def at_least(least, kind=int, most=math.inf):
    """An argparse type: a number that is `least` or more, and `most` or less."""

    def number(text: str):
        if not least <= kind(text) <= most:
            limits = f"{least} or more" if most == math.inf else f"from {least} to {most:,}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return kind(text)

    return number


def token_count(text: str) -> int:
    """200k, 10M or a plain number."""
    scale = {"k": 1e3, "m": 1e6}.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * scale) if scale else int(text)
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


MACHINE_FLAGS = {
    "device": (str, None, "cpu or cuda [the GPU where there is one]"),
    "dtype": (("bfloat16", "float32"), None, "of weights [bfloat16 where the processor has it]"),
}


# --- processes ---------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is: (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes; they travel as one."""
    if dist.is_initialized():
        joined = torch.cat([x.flatten().float() for x in tensors])
        dist.all_reduce(joined)
        totals = joined.split([x.numel() for x in tensors])
        for x, total in zip(tensors, totals, strict=True):
            x.copy_(total.view_as(x))


def gather(item) -> list:
    """The items of all processes, in the order of their ranks."""
    items = [item]
    if dist.is_initialized():
        items = [None] * dist.get_world_size()
        dist.all_gather_object(items, item)
    return items


# --- device and dtype --------------------------------------------------------------------------


def start_process(device: str | None) -> str:
    """The device of this process. Under torchrun it joins the others."""
    device = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def pick_device(name: str | None) -> str:
    """The device that was asked for, or the GPU where there is one. Raises InputError for a device
    that is neither CPU nor GPU, or is not here."""
    try:
        known = torch.empty(0, device=name or "cpu").device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        known = False
    if not known:
        raise InputError(f"--device {name}: there is no such device here; use cpu or cuda")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: str) -> str:
    """bfloat16 where the processor has instructions that multiply it, else float32. No measurement
    decides this: a run that is resumed must go on in the dtype it began with."""
    if device.startswith("cuda"):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # The first two are x86's, the last is Arm's. torch uses all of them through oneDNN.
        names = ("avx512_bf16", "amx_bf16", "bf16")
        has_bf16 = torch.backends.mkldnn.is_available() and any(
            torch.cpu.get_capabilities().get(name) for name in names
        )
    return "bfloat16" if has_bf16 else "float32"
