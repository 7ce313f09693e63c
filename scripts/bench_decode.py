"""Benchmarks a decode step: milliseconds a token against batch, by engine, beside the memory bandwidth's floor.

    python scripts/bench_decode.py                                                   # SmolLM2, CPU, fp32
    python scripts/bench_decode.py --model random:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --device cuda \
        --precision bf16 --batches 1 8 32 128 --engines eager static graphs transformers

A token's time is that of --new-tokens less that of one, over the tokens between: prefill and set-up drop out. End
tokens do not stop here. The floor is one reading of the weights and of the cache at its middle length, at the bandwidth
that a large copy reaches. "transformers" is its `generate` with a dynamic cache.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import bench_opd_step
import torch

ENGINES = ("eager", "static", "graphs", "transformers")
QUESTION = "Tell me a long story about a harbour, a lantern and a winter garden."


def load_model(name: str, device: str, precision: str, work: Path) -> Any:
    """A model that never stops: by name or folder, or random:NAME."""
    from vlopd.models.load import DTYPES, load

    if name.startswith("random:"):
        import random_models

        asked, _, layers = name.removeprefix("random:").partition("@")
        loaded = random_models.make(
            asked, DTYPES[precision], device, int(layers) if layers else None
        )
    else:
        loaded = load(name, DTYPES[precision], device)
    vars(loaded)["end_ids"] = [-1]
    return loaded


def floor_seconds(loaded: Any, batch: int, length: float, bandwidth: float) -> float:
    """Reading the language model's weights and the cache once."""
    from vlopd.models import cache_size, families, parameter_names

    model = loaded.model
    embedding = families.backbone(model).get_input_embeddings().weight
    read = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if parameter_names.classify(name).component not in ("vision", "projector")
        and (p is not embedding or p is model.get_output_embeddings().weight)
    )
    return (read + batch * length * cache_size.cache_bytes(model.config, model.dtype)) / bandwidth


def seconds_of(loaded: Any, prompts: Any, engine: str, tokens: int) -> float:
    from vlopd import seeding
    from vlopd.train.generation import sample

    synchronize = torch.cuda.synchronize if loaded.device.type == "cuda" else lambda: None
    uniforms = seeding.uniforms(len(prompts), tokens, "bench")
    synchronize()
    start = time.perf_counter()
    if engine == "transformers":
        loaded.model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=0,
        )
    else:
        found = sample(loaded, prompts, tokens, 1.0, uniforms, engine=engine)
        assert found.ids.shape[1] == tokens
    synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from vlopd.models.load import DTYPES
    from vlopd.preflight.memory import measure_device
    from vlopd.types import Example

    loaded = load_model(args.model, args.device, args.precision, Path(args.work))
    speed = measure_device(args.device, DTYPES[args.precision])
    cuda = args.device == "cuda"
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        prompts = loaded.render([Example.ask(str(i), QUESTION) for i in range(batch)])
        length = prompts.input_ids.shape[1] + args.new_tokens / 2
        row: dict[str, Any] = {"batch": batch}
        for engine in args.engines:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                for tokens in (1, args.new_tokens):  # captures and compiles
                    seconds_of(loaded, prompts, engine, tokens)
                laps = [
                    seconds_of(loaded, prompts, engine, args.new_tokens)
                    - seconds_of(loaded, prompts, engine, 1)
                    for _ in range(args.rounds)
                ]
                row[engine] = 1e3 * min(laps) / (args.new_tokens - 1)
            except Exception as error:
                row[engine] = None
                print(f"{engine}, batch {batch}: {type(error).__name__}: {str(error)[:200]}")
            if cuda:
                row[f"{engine}_peak_bytes"] = torch.cuda.max_memory_allocated()
        bandwidth = speed.memory_bytes_per_second
        row["floor"] = 1e3 * floor_seconds(loaded, batch, length, bandwidth)
        rows.append(row)
    return {
        "what": f"{loaded}, {args.precision}, {args.new_tokens} tokens",
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "gigabytes_per_second": speed.memory_bytes_per_second / 1e9,
        "rows": rows,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="builtin:smollm2-24l")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    add("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    add("--engines", nargs="+", choices=ENGINES, default=["eager", "static", "transformers"])
    add("--new-tokens", type=int, default=32)
    add("--rounds", type=int, default=2, help="measurements; the least counts")
    add("--work", default="/tmp/bench-opd-step")
    add("--cap-gib", type=float, help="GPU memory that the process may use")
    add("--json", type=Path, help="file for the result")
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    bench_opd_step.cap_memory(args.cap_gib)
    found = measure(args)
    print(
        f"{found['device']}, {found['gigabytes_per_second']:.0f} GB/s: {found['what']}; ms a token"
    )
    print("| batch | " + " | ".join(args.engines) + " | floor |")
    print("|---:" * (len(args.engines) + 2) + "|")
    for row in found["rows"]:
        cells = ("-" if row[e] is None else f"{row[e]:.2f}" for e in (*args.engines, "floor"))
        print(f"| {row['batch']} | " + " | ".join(cells) + " |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
