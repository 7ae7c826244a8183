"""What faults cost a run: it is killed, its checkpoints are damaged, its disk fills up; then the
same command goes on, and must end with the files of a run that nothing happened to.

    python results/faults.py 30 [flags of layerboost.py]    the number of kills at random moments
    python results/faults.py 0 --disk 256M [flags]          a tmpfs of that size instead (as root)

Without flags: the embedded model, scanned, planned, healed on 4k tokens. Each run is a fork of
this process, so that torch is imported once. Prints a line for each fault, and exits 1 where one
did harm.
"""

import argparse
import errno
import io
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill  # noqa: E402
import layerboost  # noqa: E402
import report  # noqa: E402
import terminal  # noqa: E402

SMALL = "--tokens 4k --context 128 --measure kl --sequences 2 --dtype float32 --device cpu".split()


def run(out: Path, flags: list[str], seconds: float | None = None, fault=None) -> tuple[int, str]:
    """Runs layerboost.py into `out`, killed after so many seconds. fault() is called before.
    Returns its exit code, -9 where it was killed, and the last line it wrote."""
    log = out.with_suffix(".log")
    child = os.fork()
    if child == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if fault:
            fault()
        code = 70  # a traceback
        try:
            code = layerboost.main([*flags, "--out", str(out)])
        finally:
            os._exit(code)

    end = time.monotonic() + (seconds or 1e9)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    lines = log.read_text(errors="replace").strip().splitlines()
    return os.waitstatus_to_exitcode(ended[1]), lines[-1] if lines else ""


def differences(ours: Path, theirs: Path) -> list[str]:
    """What is not byte for byte the same."""
    names = ["model.safetensors", "config.json", "scan.json"]
    wrong = [name for name in names if (ours / name).read_bytes() != (theirs / name).read_bytes()]
    curves = [
        json.loads((folder / "report.json").read_text())["healing"] for folder in (ours, theirs)
    ]
    wrong += ["report.json"] * (curves[0] != curves[1])
    return wrong + [path.name for path in ours.glob("*.partial")]


def at_write(count: int, act, after: bool = False):
    """A fault: act(temporary file) at the count-th file that is written, before its rename, or
    after it."""
    left = [count]

    def install():
        replace = os.replace

        def counting(source, target):
            is_written = str(source).endswith(".partial")
            left[0] -= is_written
            now = is_written and left[0] == 0
            if now and not after:
                act(Path(source))
            replace(source, target)
            if now and after:
                act(Path(source))

        os.replace = counting

    return install


def kill(_path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disks(size: str, flags: list[str], folder: Path, whole: Path) -> int:
    """A tmpfs that is full, or has a page left, after the n-th file of a run, for every n; then
    there is room again, and the same command goes on."""
    out, ballast = folder / "disk", folder / "disk/ballast"
    out.mkdir()

    def fill(_path: Path) -> None:
        free = shutil.disk_usage(out).free - n % 2 * mmap.PAGESIZE
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(mmap.PAGESIZE, free))

    for n in itertools.count(1):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out], check=True)
        try:
            code, line = run(out, flags, fault=at_write(n, fill, after=True))
            said = code == 2 and os.strerror(errno.ENOSPC) in line
            wrong = [path.name for path in out.glob("*.partial")] + [line] * (code and not said)
            for checkpoint in out.glob("healing*.safetensors"):
                distill.read_checkpoint(checkpoint)  # raises InputError
            ballast.unlink(missing_ok=True)
            more, last = run(out, flags)
            wrong += differences(out, whole) if more == 0 else [last]
        finally:
            subprocess.run(["umount", "-l", out], check=True)
        said = line.replace(str(out), "") if code else "enough room"
        print(f"full after {n} files, {said}: {wrong or 'the same files'}", flush=True)
        if wrong or code == 0:
            return len(wrong)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def damages(other: Path) -> dict:
    """How a checkpoint is damaged, by name. other: a checkpoint of another run."""
    return {
        "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "of no length": lambda path: path.write_bytes(b""),
        "with one bit flipped": flip,
        "of another run": lambda path: shutil.copy(other, path),
    }


def main(count: int, disk: str, flags: list[str], folder: Path) -> int:
    whole = folder / "whole"
    with redirect_stdout(io.StringIO()):  # in this process, so that all is imported
        assert layerboost.main([*flags, "--out", str(whole)]) == 0
    time.sleep(2 * terminal.BEAT_SECONDS)  # until its bars' threads are gone: a fork has no threads
    if disk:
        return full_disks(disk, flags, folder, whole)

    start = time.monotonic()
    code, line = run(folder / "again", flags)
    seconds = time.monotonic() - start
    wrong = differences(folder / "again", whole) if code == 0 else [line]
    print(f"a run takes {seconds:.1f} s; a second one: {wrong or 'the same files'}", flush=True)
    harmed = 0

    def judge(what: str, out: Path, wrong: list[str]) -> None:
        nonlocal harmed
        harmed += bool(wrong)
        print(f"{what}: {'; '.join(wrong) or 'the same files'}", flush=True)
        shutil.rmtree(out)

    # Killed at random moments, again and again, until it ends.
    draw = random.Random(0)
    kills, chains = 0, 0
    while kills < count:
        out, before = folder / f"killed{chains}", kills
        chains += 1
        while (ended := run(out, flags, draw.uniform(0, 0.6 * seconds)))[0] == -signal.SIGKILL:
            kills += 1
        wrong = differences(out, whole) if ended[0] == 0 else [ended[1]]
        judge(f"killed {kills - before} times at random", out, wrong)

    # Killed, or out of disk, just before the n-th file of what is left gets its name.
    n, out = 0, folder / "each"
    code = 1
    while code:
        n += 1
        code, line = run(out, flags, fault=at_write(n, kill))
        if code == -signal.SIGKILL:
            code, line = run(out, flags, fault=at_write(n, fill_disk))
        said = code == 2 and line.endswith(os.strerror(errno.ENOSPC))
        if code and (not said or list(out.glob("*.partial"))):
            break
    judge(
        f"for n = 1 to {n} killed at the n-th file, then out of disk at the n-th of the rest",
        out,
        [line] if code else differences(out, whole),
    )

    # Checkpoints that are damaged, of a run that wrote one at each step.
    distill.CHECKPOINT_SECONDS = 0
    often, other = folder / "often", folder / "other"
    run(often, flags)
    run(other, [*flags, "--rank", "3"], fault=at_write(100_000, kill))
    for name, damage in damages(other / "healing.safetensors").items():
        out = folder / "damaged"
        shutil.copytree(often, out)
        damage(out / "healing.safetensors")
        code, line = run(out, flags)
        log = out.with_suffix(".log").read_text()
        said = [x for x in log.splitlines() if "healing.safetensors: " in x]
        wrong = differences(out, whole) if code == 0 else [line]
        judge(f"checkpoint {name}", out, wrong if said else ["not named"])
        print(f"    {said and said[0].partition('damaged/')[2]}")
    return int(harmed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--disk")
    given, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    distill.CHECKPOINT_SECONDS = 0.1
    report.decode_times = lambda engines, *_: {name: [1.0] for name in engines}  # takes long
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(given.kills, given.disk, flags or SMALL, Path(folder)))
