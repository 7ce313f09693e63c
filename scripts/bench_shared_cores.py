"""Benchmarks the quickstart's training step on shared cores: idle, and beside busy processes.

    python scripts/bench_shared_cores.py                    # 4 busy processes, all settings
    python scripts/bench_shared_cores.py --busy 2 --steps 8 --only vlopd default

Each setting of OpenMP is a process that trains the quickstart's student; its first step is not counted. Prints the
median seconds of a step, their range and the ratio to the idle time of torch's defaults. "vlopd" is what the command
line sets where the user has not (vlopd/cli/main.py: THREADS), as does scripts/env.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(1_000_000))"
"""A busy process, which ends with its parent."""

THREADED = ("OMP_", "GOMP_", "KMP_", "MKL_")
"""Prefixes of the variables that a setting replaces."""


def settings() -> dict[str, dict[str, str]]:
    """Environment variables by name of the setting."""
    from vlopd.cli.main import THREADS

    return {
        "default": {},
        "vlopd": THREADS,
        "passive": {"OMP_WAIT_POLICY": "passive"},
        "spin 1000": {"GOMP_SPINCOUNT": "1000"},
        "one thread": {"OMP_NUM_THREADS": "1"},
    }


def train(steps: int, prompts: int) -> list[float]:
    """Seconds of the steps after the first."""
    import vlopd

    config = vlopd.load_config(
        QUICKSTART, [f"train.steps={steps}", f"train.prompts_per_step={prompts}"]
    )
    pair = vlopd.load_pair(config.student, config.teacher, compute="fp32", device="cpu")
    data = vlopd.load_data("shapes", size=steps * prompts)
    recipe = config.recipe_of(config.arms["full"])
    return vlopd.distill(pair, data, recipe).metrics["seconds"].tolist()[1:]


def measure(variables: dict[str, str], steps: int, prompts: int) -> list[float]:
    """The same in a process of its own, with these variables and no others of OpenMP."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(THREADED)}
    command = [
        sys.executable,
        __file__,
        "--child",
        "--steps",
        str(steps),
        "--prompts",
        str(prompts),
    ]
    out = subprocess.run(
        command, env={**kept, **variables}, check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=4, help="busy processes beside the training")
    parser.add_argument("--steps", type=int, default=6, help="steps of each measurement")
    parser.add_argument("--prompts", type=int, default=128, help="prompts of a step")
    parser.add_argument("--only", nargs="+", help="settings to measure; default: all")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(train(args.steps, args.prompts)))
        return
    chosen = {k: v for k, v in settings().items() if not args.only or k in args.only}

    def measure_all(where: str) -> dict[str, list[float]]:
        found = {}
        for name, variables in chosen.items():
            found[name] = measure(variables, args.steps, args.prompts)
            seconds = [round(each, 2) for each in found[name]]
            print(f"{where}, {name}: {seconds}", file=sys.stderr, flush=True)
        return found

    idle = measure_all("idle")
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(args.busy)]
    try:
        shared = measure_all("beside busy")
    finally:
        for process in busy:
            process.kill()
    first = statistics.median(idle[next(iter(chosen))])
    print(f"{os.cpu_count()} cores, {args.busy} busy processes; seconds of a step, median (range)")
    print(f"{'':12}{'idle':>24}{'beside busy':>24}{'ratio':>8}   variables")
    for name, variables in chosen.items():
        cells = (
            f"{statistics.median(x):.2f} ({min(x):.2f}-{max(x):.2f})"
            for x in (idle[name], shared[name])
        )
        ratio = statistics.median(shared[name]) / first
        words = " ".join(f"{k}={v}" for k, v in variables.items())
        print(f"{name:12}" + "".join(f"{cell:>24}" for cell in cells) + f"{ratio:8.1f}   {words}")


if __name__ == "__main__":
    main()
