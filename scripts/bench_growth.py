"""Growth of a training step with model size, completion length, batch and density, each at four sizes; as Markdown.

    python scripts/bench_growth.py                          # CPU, fp32, under six minutes on two idle cores
    python scripts/bench_growth.py --axes length batch --device cuda --precision bf16

Llama-like models with random weights and 8,192 tokens distil from their like; all but the axis is as in BASE. Each row
is a process of --steps steps, the first of which is not counted. "exponent" is the slope of log seconds against log
size from the row before: 1 is proportional.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import bench_opd_step
import transformers as hf

SIZES = {"2 M": (128, 4), "8 M": (256, 6), "32 M": (512, 8), "106 M": (768, 12)}
"""Hidden size and layers."""

BASE = {"model": "8 M", "length": 64, "batch": 8, "density": 1.0}
AXES: dict[str, tuple[Any, ...]] = {
    "model": tuple(SIZES),
    "length": (32, 64, 128, 256),
    "batch": (4, 8, 16, 32),
    "density": (0.05, 0.2, 0.5, 1.0),
}
TITLES = {"model": "model", "length": "new tokens", "batch": "completions", "density": "density"}
COLUMNS = ("rollout", "teacher", "student", "update")


def architecture(size: str, folder: Path) -> Path:
    """A folder with the config.json of a model of that size."""
    hidden, layers = SIZES[size]
    config = hf.LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=8190,
        pad_token_id=8191,
    )
    config.save_pretrained(folder / size.replace(" ", ""))
    return folder / size.replace(" ", "")


def measure(args: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """One row: medians of `bench_opd_step.summary`."""
    words = ["--student", f"random:{architecture(values['model'], Path(args.work))}"]
    words += ["--new-tokens", str(values["length"]), "--prompts", str(values["batch"])]
    words += ["--density", str(values["density"]), "--steps", str(args.steps), "--no-trl"]
    words += ["--device", args.device, "--precision", args.precision, "--work", args.work]
    asked = bench_opd_step.parse(words)
    bench_opd_step.prepare(asked)
    run = bench_opd_step.run_child("ours", asked, asked.precision, sys.executable, 300)
    return bench_opd_step.summary([run])


def size_of(axis: str, value: Any) -> float:
    return math.prod(SIZES[value][:1] * 2) * SIZES[value][1] if axis == "model" else float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--work", default="/tmp/bench-growth")
    args = parser.parse_args()
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    base = ", ".join(f"{TITLES[axis]} {value}" for axis, value in BASE.items())
    print(f"{args.device}, {args.precision}; where not varied: {base}")
    for axis in args.axes:
        print(f"\n| {TITLES[axis]} | " + " | ".join(f"{name}, s" for name in COLUMNS), end=" | ")
        print("step, s | CPU s | tokens/s | peak over models, GB | exponent |")
        print("|---" + "|---:" * (len(COLUMNS) + 5) + "|")
        before: tuple[float, float] | None = None
        for value in AXES[axis]:
            values = {**BASE, axis: value}
            key = tuple(values.values())
            found = known[key] = known.get(key) or measure(args, values)
            if "error" in found:
                print(f"| {value} | {found['error']} |")
                continue
            size, seconds = size_of(axis, value), found["seconds"]
            slope = ""
            if before is not None:
                slope = f"{math.log(seconds / before[1]) / math.log(size / before[0]):.2f}"
            before = size, seconds
            cells = [f"{found['phases'][name]:.3f}" for name in COLUMNS]
            cells += [f"{seconds:.3f}", f"{found['cpu_seconds']:.2f}"]
            cells += [f"{found['tokens_per_second']:.0f}"]
            cells += [f"{found['over_models_bytes'] / 1e9:.3f}", slope]
            print(f"| {value} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
