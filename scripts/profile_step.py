"""Profiles the phases of a training step by torch's profiler: the costliest operators, and kinds of work.

    python scripts/profile_step.py                                    # SmolLM2, 24 of 30 layers from 30, fp32, CPU
    python scripts/profile_step.py --new-tokens 96 --set 'loss={type="jsd"}' --top 20

Takes the arguments of bench_opd_step.py. The first step warms up, the second is profiled: each phase of the loop's
clock (rollout, teacher, student with its backward pass, update) by itself. Seconds are an operator's own, without
those that it calls; "outside of operators" is the rest of the phase's wall time: Python and the profiler's cost.
On a GPU the kernels' seconds are shown instead, and the rest is the time in which none ran.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

import bench_opd_step
import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matmul": ("mm", "linear", "baddbmm", "addmv", "mkldnn"),
    "attention": ("attention", "flash"),
    "copies": (
        "copy_",
        "cat",
        "index",
        "gather",
        "scatter",
        "clone",
        "repeat",
        "masked_select",
        "fill",
        "zero",
    ),
    "allocation": ("empty", "resize", "set_"),
    "sort and search": ("sort", "topk", "searchsorted", "cumsum", "isin", "unique"),
    "optimizer": ("adam", "foreach", "_fused"),
}
"""Kinds of operators by parts of their names, the first that fits; all else is elementwise or a reduction."""


def kind_of(name: str) -> str:
    name = name.removeprefix("aten::")
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "elementwise and reductions"


class PhaseProfiler:
    """Operators' seconds, calls and wall time by phase. A phase begins where the loop's clock starts it."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.seconds: dict[str, Counter[str]] = {}
        self.calls: dict[str, Counter[str]] = {}
        self.wall: Counter[str] = Counter()
        self.running: Any = None

    def start(self, phase: str) -> None:
        self.phase = phase
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        self.running = profile(activities=activities, acc_events=True)
        self.running.__enter__()
        self.started = time.perf_counter()

    def stop(self) -> None:
        if self.running is None:
            return
        phase = self.phase
        self.wall[phase] += time.perf_counter() - self.started
        self.running.__exit__(None, None, None)
        seconds = self.seconds.setdefault(phase, Counter())
        calls = self.calls.setdefault(phase, Counter())
        for event in self.running.key_averages():
            own = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            if own and not event.key.startswith(("ProfilerStep", "autograd::engine")):
                seconds[event.key] += own / 1e6
                calls[event.key] += event.count
        self.running = None

    def report(self, top: int) -> None:
        for phase, wall in self.wall.items():
            if wall < 0.005:
                continue
            seconds, calls = self.seconds[phase], self.calls[phase]
            kinds: Counter[str] = Counter()
            for name, own in seconds.items():
                kinds[kind_of(name)] += own
            kinds["outside of operators"] = max(0.0, wall - sum(seconds.values()))
            print(f"\n{phase}: {wall:.3f} s, {sum(calls.values()):,} operator calls")
            for kind, own in kinds.most_common():
                print(f"    {own:8.3f} s {own / wall:6.1%}  {kind}")
            for name, own in seconds.most_common(top):
                print(f"  {own:10.3f} s {own / wall:6.1%} {calls[name]:>9,} x  {name}")


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--top", type=int, default=12)
    mine, rest = own.parse_known_args()
    if {"-h", "--help"} & set(rest):
        print(__doc__)
        return
    args = bench_opd_step.parse([*rest, "--steps", "2", "--no-trl"])
    bench_opd_step.prepare(args)
    bench_opd_step.cap_memory(args.cap_gib)
    import vlopd.loop
    from vlopd.train.log import Stopwatch

    profiler = PhaseProfiler(args.device == "cuda")

    class ProfilingStopwatch(Stopwatch):
        """The loop's clock; from the second step on, each phase is a profile."""

        steps = 0

        def __init__(self, *rest: Any) -> None:
            ProfilingStopwatch.steps += 1
            super().__init__(*rest)

        def start(self, phase: str | None) -> None:
            profiler.stop()
            super().start(phase)
            if phase is not None and ProfilingStopwatch.steps > 1:
                profiler.start(phase)
                self.last = self.now()

    vlopd.loop.Stopwatch = ProfilingStopwatch  # type: ignore[misc]
    found = bench_opd_step.run_ours(args)
    profiler.stop()
    step = found["steps"][-1]
    print(
        f"{torch.get_num_threads()} threads, {step['tokens']} tokens; the step before, not profiled: "
        + ", ".join(f"{k} {v:.2f} s" for k, v in found["steps"][0]["phases"].items())
    )
    profiler.report(mine.top)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
