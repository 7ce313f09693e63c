"""Roofline of a training step: FLOPs, bytes and calls of each phase, the seconds they need at the device's measured
peak rates (as `vlopd check` predicts them), and the seconds that a step takes.

    python scripts/roofline.py                                    # SmolLM2, 24 of 30 layers from 30, fp32, CPU
    python scripts/roofline.py --prompts 32 --new-tokens 96

Takes the arguments of bench_opd_step.py, and prints Markdown. Predictions are of completions at their full length.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import bench_opd_step
import torch

PHASES = ("rollout", "teacher", "student", "update")


class Inputs(NamedTuple):
    """What a prediction is made of."""

    recipe: Any
    student: Any
    teachers: list[Any]
    speed: Any
    dtype: torch.dtype


def inputs(args: argparse.Namespace) -> Inputs:
    """The recipe, the models without weights and the device's measured rates."""
    import vlopd
    from vlopd.models.load import DTYPES, load_model_config, load_processor
    from vlopd.models.loaded import LoadedModel
    from vlopd.models.meta import meta_model
    from vlopd.preflight import memory

    dtype = DTYPES["fp32" if args.precision == "fp32" else "bf16"]
    image = {"image": "image"} if args.image else {}
    data = vlopd.load_data(args.data, question="question", **image)
    examples = [data[i] for i in range(min(8, args.prompts))]
    readers = []
    for name in (args.student, args.teacher):
        model = meta_model(load_model_config(name))
        prompts = LoadedModel(name, model, load_processor(name)).prompts_of(examples)
        patches = 0
        if args.image:
            grid = prompts.per_image.get("image_grid_thw")
            patches = None if grid is None else int(grid[0].prod())
        readers.append(memory.Reader(model, prompts.input_ids.shape[1], "sdpa", patches))
    speed = memory.measure_device(torch.device(args.device), dtype)
    return Inputs(bench_opd_step.recipe_of(args), readers[0], readers[1:], speed, dtype)


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """FLOPs, bytes, calls, seconds of each phase and the peak, from the models' configs alone."""
    from vlopd.preflight import memory

    recipe, student, teachers, speed, dtype = inputs(args)
    whole = float("inf")

    def at(speed: memory.DeviceSpeed) -> memory.Estimate:
        return memory.estimate(recipe, student, teachers, speed, dtype, args.density)

    # a device that is infinitely fast but for one rate of 1 takes as many seconds as there is work of that kind
    work = {
        "flops": at(
            speed._replace(matmul_flops=1.0, memory_bytes_per_second=whole, call_seconds=0.0)
        ),
        "bytes": at(
            speed._replace(matmul_flops=whole, memory_bytes_per_second=1.0, call_seconds=0.0)
        ),
        "calls": at(
            speed._replace(matmul_flops=whole, memory_bytes_per_second=whole, call_seconds=1.0)
        ),
    }
    found = at(speed)
    return {
        "speed": speed._asdict(),
        **{kind: each.seconds._asdict() for kind, each in work.items()},
        "seconds": found.seconds._asdict(),
        "peak_bytes": found.peak_bytes,
        "parts": found.memory._asdict(),
    }


def table(expected: dict[str, Any], measured: dict[str, float]) -> str:
    """Markdown: a row a phase."""
    rate = expected["speed"]["matmul_flops"]
    lines = [
        "| phase | GFLOP | GB moved | calls | at peak rates, s | measured, s | of the arithmetic peak |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for phase in PHASES:
        flops, moved, calls = (expected[kind][phase] for kind in ("flops", "bytes", "calls"))
        seconds = measured[phase]
        lines.append(
            f"| {phase} | {flops / 1e9:,.0f} | {moved / 1e9:,.1f} | {calls:,.0f} | {expected['seconds'][phase]:.2f} | "
            f"{seconds:.2f} | {flops / seconds / rate:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
    args = bench_opd_step.parse([*sys.argv[1:], "--no-trl"])
    bench_opd_step.prepare(args)
    args.make_venv = args.json = None
    expected = predict(args)
    runs = [
        bench_opd_step.run_child("ours", args, args.precision, sys.executable, args.limit)
        for _ in range(args.rounds)
    ]
    found = bench_opd_step.summary(runs)
    if "error" in found:
        raise SystemExit(found["error"])
    speed = expected["speed"]
    print(
        f"{args.device}, {torch.get_num_threads()} threads: {speed['matmul_flops'] / 1e9:,.0f} GFLOP/s, "
        f"{speed['memory_bytes_per_second'] / 1e9:,.1f} GB/s, {speed['call_seconds'] * 1e6:.1f} us a call; "
        f"{found['tokens_per_step']:.0f} tokens a step of {args.prompts * args.completions * args.new_tokens} at most\n"
    )
    print(table(expected, found["phases"]))
    print(
        f"\npeak: predicted {expected['peak_bytes'] / 1e9:.2f} GB, measured {found['peak_bytes'] / 1e9:.2f} GB"
        + ("" if args.device == "cuda" else " (resident, with libraries)")
    )


if __name__ == "__main__":
    main()
