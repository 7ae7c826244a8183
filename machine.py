"""What the program runs on: the processes under torchrun, the device and dtype, memory and disk.

Under torchrun each process holds the model and takes its share of the work (data parallelism),
which takes three operations: rank and world size (`rank_and_world`), the sum of gradients
(`sum_over_processes`), and the results of all processes (`gather`). Without torchrun there is one
process, and they do nothing.
"""

import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hub import PARTIAL, InputError, hash_files, require

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's numbers of two settings of malloc

held = []  # (folder, its handle, whether it is new) for each folder that this process holds


class Diverged(RuntimeError):
    """The loss, or the damage of a layer, became infinite or not a number."""


class ProcessLost(RuntimeError):
    """Another process of torchrun's has ended."""


# --- exclusive use of a folder -----------------------------------------------------------------


def hold_folder(path: Path) -> None:
    """Makes a folder if there is none, and keeps other processes out of it until run_program ends.
    The lock is the kernel's, on the folder itself: it is released when its process ends, however
    that happens, and leaves no file. Windows and file systems without locks do without it.

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
        raise InputError(f"--out {path}: {busy}") from None
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


# --- processes ---------------------------------------------------------------------------------


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes; torchrun numbers them in RANK."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def other_processes():
    """For operations that need all processes."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].split("] ", 1)[-1].partition(". ")[0]
        lost = f"rank {dist.get_rank()} has lost another process ({reason})"
        raise ProcessLost(f"{lost}; the same command goes on") from None


def rank_and_world() -> tuple[int, int]:
    """Rank of this process, and how many there are: (0, 1) without torchrun."""
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


def keep_freed_memory() -> None:
    """Makes glibc keep the blocks up to 32 MiB that the process frees. Otherwise the memory of a
    layer's activations goes back to the system after it, to be cleared anew for the next."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 2**25)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


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


# --- memory and disk ---------------------------------------------------------------------------


def available_memory(device: str) -> float:
    """Bytes that a program can still get; infinity if the system does not report it."""
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


# --- what figures depend on --------------------------------------------------------------------


def environment(device: str) -> dict[str, str | int]:
    """What a run's figures depend on besides flags, model and text: versions, processor, code."""
    folder = Path(__file__).resolve().parent
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
        "code": hash_files(*sorted([*folder.glob("*.py"), *folder.glob("*.cpp")])),
        "commit": commit,
    }
