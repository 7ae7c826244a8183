"""What the program runs on: the terminal, the processes under torchrun, the device, the dtype.

Under torchrun each process holds the model and takes its share of the work (data parallelism),
which needs three operations: who am I (`rank_and_world`), the sum of gradients
(`sum_over_processes`), and the results of all (`gather`). Without torchrun there is one process,
and they do nothing.
"""

import argparse
import hashlib
import io
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hub import PARTIAL, InputError, require

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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


class ProcessLost(RuntimeError):
    """Another process of torchrun's has ended."""


def run_program(name: str, run, kept=lambda: "") -> int:
    """Calls run(). Returns its exit code: 0 done, 1 diverged or without one of its processes, 2 bad
    input, 130 stopped by Ctrl-C, 141 when whoever reads the output has left. But for 0 and 141, one
    line on stderr says why, and of a run that could have gone on, kept() what is left of it.
    Characters that the terminal's encoding lacks are shown as question marks."""
    code, message = 0, ""
    speaks = is_main_process()
    mend_streams()
    try:
        with interrupts(signal.default_int_handler):
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
            except BrokenPipeError:
                drop_broken_pipes()
        release_folders()
    return code


def mend_streams() -> None:
    """Those that were closed lead nowhere, and none fails for a character that it cannot show."""
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop_broken_pipes() -> None:
    """What is flushed at exit goes nowhere, or would fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Parser(argparse.ArgumentParser):
    """Its errors are one line, as all others."""

    def error(self, message: str):
        self.exit(2, f"{self.prog.removesuffix('.py')}: {message}\n")


def last_words(kept) -> str:
    try:
        return kept()
    except InputError as error:  # a file that it reads is damaged
        return f"; {error}"


@contextmanager
def interrupts(handler):
    """What Ctrl-C does meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


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

held = []  # (folder, its handle, whether it is new) of each that this process works in


def hold_folder(path: Path, flag: str = "--out") -> None:
    """Makes a folder where there is none, and keeps other processes out of it until run_program
    ends. The lock is the kernel's, on the folder itself: it goes when its process does, however
    that ends, and leaves no file. Windows, and file systems without locks, do without it.

    Raises InputError where another process has it, OSError where it cannot be made."""
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    if fcntl is None or not is_main_process():
        return
    handle = os.open(path, os.O_RDONLY)
    held.append((path, handle, is_new))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy = "another process works there; wait for its end, or give another folder"
        raise InputError(f"{flag} {path}: {busy}") from None
    except OSError:  # no locks here
        return
    for partial in path.glob(f"*{PARTIAL}"):  # of a process that was killed
        partial.unlink()


def release_folders() -> None:
    while held:
        path, handle, is_new = held.pop()
        os.close(handle)
        if is_new:
            with suppress(OSError):
                path.rmdir()  # where nothing was written


@contextmanager
def other_processes():
    """Around what needs all of them."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].split("] ", 1)[-1].partition(". ")[0]
        lost = f"rank {dist.get_rank()} has lost another process ({reason})"
        raise ProcessLost(f"{lost}; the same command goes on") from None


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is: (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes; they travel as one."""
    if dist.is_initialized():
        joined = torch.cat([x.flatten().float() for x in tensors])
        with other_processes():
            dist.all_reduce(joined)
        totals = joined.split([x.numel() for x in tensors])
        for x, total in zip(tensors, totals, strict=True):
            x.copy_(total.view_as(x))


def gather(item) -> list:
    """The items of all processes, in the order of their ranks."""
    items = [item]
    if dist.is_initialized():
        items = [None] * dist.get_world_size()
        with other_processes():
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


def available_memory(device: str) -> float:
    """Bytes that a program can still get; infinity where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            kibibytes = dict(line.split(":") for line in file)["MemAvailable"].split()[0]
    except OSError:  # no Linux
        return math.inf
    limits = [int(kibibytes) * 1024]
    with suppress(OSError, ValueError):  # of a container; "max" is none
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
        limits.append(limit - used + int(cache[1] if cache else 0))
    return min(limits)


def require_memory(
    needed: float, device: str, what: str, fix: str = "take a smaller model"
) -> None:
    """Raises InputError where `what` needs more bytes than there are."""
    there = available_memory(device)
    require(
        needed <= there,
        f"{what}: needs {needed / 2**30:,.1f} GiB of memory at least, {there / 2**30:,.1f} are "
        f"free; {fix}",
    )


def require_disk(needed: float, folder: Path) -> None:
    """Raises InputError where less is free on the disk of a folder that is to be made."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    require(os.access(there, os.W_OK), f"--out {folder}: {there} cannot be written; give another")
    free = shutil.disk_usage(there).free
    require(
        needed <= free,
        f"--out {folder}: needs {needed / 2**30:,.1f} GiB at least, {free / 2**30:,.1f} are free "
        "on its disk; make room or give another --out",
    )


def environment(device: str) -> dict[str, str | int]:
    """What a run's figures depend on beside flags, model and text: versions, processor, code."""
    folder = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("*.cpp")]):
        digest.update(path.read_bytes())
    commit = ""
    if (folder / ".git").exists():
        with suppress(OSError):
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": gpu or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": rank_and_world()[1],
        "code": digest.hexdigest()[:12],
        "commit": commit,
    }


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
