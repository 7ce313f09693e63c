"""Milliseconds a decode step against batch and engine, beside `generate` and the memory-bandwidth floor.

    python scripts/bench_decode.py Qwen/Qwen2.5-Math-1.5B --device cuda --batches 1 8 32 128
    python scripts/bench_decode.py builtin:smollm2 --batches 1 16 --tokens 32

A model is a published architecture by name (random weights: random_models.py), a folder or a `builtin:` name. A step's
time is the slope between sampling the whole completion and one token, so that the prefill cancels. The floor is the
bytes that a step must read (weights, and the cache at its mean length) over the measured bandwidth of a copy.
Ways alternate within a repetition; the best repetition counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import random_models
import torch

from vlopd.models.load import DTYPES, load
from vlopd.models.loaded import LoadedModel
from vlopd.preflight.memory import measure_device
from vlopd.seeding import uniforms
from vlopd.train.decoding import chosen_engine
from vlopd.train.generation import sample
from vlopd.types import Prompts


def read_model(name: str, dtype: torch.dtype, device: str, layers: int | None) -> LoadedModel:
    """Random weights of a published architecture, or a checkpoint."""
    if name in random_models.architectures():
        return random_models.make(name, dtype, device, layers)
    return load(name, dtype, device)


def make_prompts(loaded: LoadedModel, batch: int, length: int) -> Prompts:
    """[B, P] ordinary tokens; every other row is a fourth shorter, so that there is padding."""
    usable = sorted(
        set(range(loaded.vocabulary_rows)) - set(loaded.unsampleable_ids) - set(loaded.end_ids)
    )
    ids = torch.tensor(usable)[torch.arange(batch * length).view(batch, length) * 7 % len(usable)]
    mask = torch.ones_like(ids)
    mask[1::2, : length // 4] = 0
    return Prompts(ids, mask).to(loaded.device, loaded.model.dtype)


def cache_bytes(loaded: LoadedModel, tokens: float) -> float:
    """Bytes of one row's keys and values at a length, every layer counted as full attention."""
    text = loaded.model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * tokens * loaded.model.dtype.itemsize


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def ways(loaded: LoadedModel, prompts: Prompts, engines: list[str]) -> dict[str, Any]:
    """Name -> function that samples so many tokens of each prompt; no completion ends early."""
    ends = loaded.end_ids

    def ours(engine: Any) -> Callable[[int], object]:
        return lambda tokens: sample(
            loaded,
            prompts,
            tokens,
            1.0,
            uniforms(len(prompts), tokens, "bench"),
            banned_ids=ends,
            engine=engine,
        )

    def generate(tokens: int) -> object:
        inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
        with torch.no_grad():
            return loaded.model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0
            )

    return {**{engine: ours(engine) for engine in engines}, "generate": generate}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="default: bf16 on CUDA, else fp32"
    )
    parser.add_argument("--layers", type=int, help="only the first so many layers (random weights)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=["eager", "static", "graphs"])
    parser.add_argument("--no-generate", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    dtype = DTYPES[asked.dtype or ("bf16" if asked.device == "cuda" else "fp32")]
    loaded = read_model(asked.model, dtype, asked.device, asked.layers)
    speed = measure_device(loaded.device, dtype)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    bandwidth = speed.memory_bytes_per_second
    if not asked.json:
        print(f"{loaded}, {dtype} on {loaded.device}; copies at {bandwidth / 1e9:,.0f} GB/s")
    engines = []
    for engine in asked.engines:
        chosen, why = chosen_engine(loaded, engine)
        engines += [engine] if chosen == engine else []
        if why and not asked.json:
            print(why)
    for batch in asked.batches:
        prompts = make_prompts(loaded, batch, asked.prompt)
        runs = ways(loaded, prompts, engines)
        if asked.no_generate:
            del runs["generate"]
        best: dict[str, dict[int, float]] = {name: {} for name in runs}
        for repetition in range(asked.repetitions + 1):  # the first is a warm-up
            for name, run in runs.items():
                for tokens in (1, asked.tokens):
                    taken = seconds(lambda run=run, tokens=tokens: run(tokens), loaded.device)
                    if repetition:
                        best[name][tokens] = min(best[name].get(tokens, taken), taken)
        cache = batch * cache_bytes(loaded, asked.prompt + asked.tokens / 2)
        row: dict[str, Any] = {
            "batch": batch,
            "floor_ms": 1e3 * (weights + cache) / bandwidth,
            **{
                f"{name}_ms": 1e3 * (its[asked.tokens] - its[1]) / (asked.tokens - 1)
                for name, its in best.items()
            },
        }
        if asked.json:
            print(json.dumps({"model": asked.model, "device": asked.device, **row}), flush=True)
        else:
            print(
                "  ".join(
                    f"{k} {v:,.2f}" if k != "batch" else f"{k} {v:4}" for k, v in row.items()
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
