"""A newcomer's first hour, as a script: what issue reports called "your model, your text".

    python results/newcomer.py MODEL OUT.txt [--minutes 10]

Clones this repository, sets up an empty environment as README says, and then does, with a text of
300 kB in one .txt file: the first command; --help, a mistyped flag and the import, timed beside
torch's own import; the model healed on the text within --minutes, piped into a file, after a run
that Ctrl-C stops; a prompt; a scan that was made on other text. Every command, its end and its time
go to OUT.txt, the ends of their outputs alone; all of them to outputs.txt in the temporary folder.
"""

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 25  # lines of the end of each output


def estimate(lines: list[str]) -> float:
    """Seconds that the first lines of a run say it will take, 0 where they say nothing."""
    told = re.findall(r"^[123]\. .*about ([\d.]+) (s|min|h)", "\n".join(lines), re.MULTILINE)
    return sum(float(number) * {"s": 1, "min": 60, "h": 3600}[unit] for number, unit in told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a folder in the Hub's layout")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a .txt file of about 300 kB")
    parser.add_argument("--minutes", default="10")
    args = parser.parse_args()

    work = Path(tempfile.mkdtemp())
    subprocess.run(["git", "clone", "-q", str(ROOT), str(work / "clone")], check=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    (work / "model").symlink_to(Path(args.model).resolve())
    (work / "mine.txt").write_bytes(args.text.read_bytes())
    log = args.out.open("w")

    def do(command: str, stop_after: float | None = None) -> None:
        """Runs a command in the clone; its output is piped. Sends Ctrl-C after some seconds."""
        start = time.monotonic()
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=work / "clone",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A script that runs in the background ignores Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            output, _ = process.communicate(timeout=stop_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate()
        seconds = time.monotonic() - start
        with (work / "outputs.txt").open("a") as whole:
            whole.write(f"$ {command}\n{output}\n")
        lines = output.replace(str(work), "..").splitlines()
        told = [line for line in lines[:-SHOWN] if "about" in line or "resumed" in line]
        hidden = [f"... {len(lines) - SHOWN} lines; of these:", *told] if lines[:-SHOWN] else []
        end = "\n".join(hidden + lines[-SHOWN:])
        shown = command.replace(sys.executable, "python")
        log.write(f"$ {shown}\n{end}\n[{seconds:.1f} s, exit {process.returncode}]\n")
        said = estimate(lines)
        if said and process.returncode == 0:
            log.write(f"[said at the start: {said:.0f} s; {seconds / said:.2f} times that]\n")
        log.write("\n")
        log.flush()

    python = ".venv/bin/python"
    do(f"{sys.executable} -m venv .venv")
    do(".venv/bin/pip install -q -r requirements.txt -c constraints.txt 2> pip.log")
    do(f"{python} -c 'import torch'")
    do(f"{python} -c 'import torch'")
    do(f"{python} -c 'import model'")
    do(f"{python} layerboost.py --help")
    do(f"{python} layerboost.py --tokns 8k")
    do(f"{python} layerboost.py")
    do(f"{python} layerboost.py --model ../model --data ../mine.txt --tokens 8M --encoding ascii")
    boost = f"{python} layerboost.py --model ../model --data ../mine.txt"
    do(f"{boost} --minutes {args.minutes} --out out/mine", stop_after=45)
    do(f"{boost} --minutes {args.minutes} --out out/mine")
    do(f'{python} layerboost.py --model out/mine --prompt "The capital of France is"')
    do(f'{python} layerboost.py --model ../model --prompt "What is the capital of France?"')
    do(f"{boost} --scan results/smollm2-windows/scan.json --tokens 8k --out out/scanned")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    log.write(f"peak memory of the largest command: {peak:.1f} GiB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
