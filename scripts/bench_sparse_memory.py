"""Benchmarks peak memory and step time of training a fifth of a Llama's coordinates, against dense training and PEFT.

    python scripts/bench_sparse_memory.py                    # memory in fp32 and in bf16, time in fp32
    python scripts/bench_sparse_memory.py --compute bf16     # bf16 alone; steps are slow on a CPU without it

Each child process trains the same Llama (98 M parameters, random weights) with AdamW on the same tokens:

    dense    all coordinates, by our `Trainable`
    sparse   a random fifth of every tensor
    shira    PEFT's SHiRA, with the rank nearest to that many coordinates (linear layers only)
    linear   by `Trainable`, as many coordinates in each linear layer as SHiRA, and none elsewhere

Prints for each: trained coordinates; bytes of gradients and optimizer state after a step, summed over the
tensors; the process's peak (VmHWM) minus its resident size with the model loaded (values, indices, gradients, state,
activations and temporaries); minus that with the libraries loaded (which adds the model); the whole process's peak.
Then the ratios to dense. A fifth process times the four, interleaved.
On a GPU the peaks are the allocator's, without libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from resident import resident

DENSITY = 0.2
MODES = ("dense", "sparse", "shira", "linear")
COLUMNS = (
    ("trained", "trained", 1),
    ("grad+state MB", "state_bytes", 1e6),
    ("over model MB", "over_model_bytes", 1e6),
    ("over imports MB", "over_imports_bytes", 1e6),
    ("peak MB", "peak_bytes", 1e6),
)
SIZES = dict(
    vocab_size=8192,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compute", choices=["fp32", "bf16"], action="append")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each of two sequences")
    parser.add_argument("--timed-tokens", type=int, default=256, help="the same, for timed steps")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timed steps; 0 for none")
    parser.add_argument("--child", choices=[*MODES, "time"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.compute = args.compute or ["fp32", "bf16"]
    if args.child:
        seconds = args.child == "time"
        found = time_steps(args) if seconds else measure_memory(args.child, args)
        print(json.dumps(found))
        return
    # for memory, freed tensors are returned to the system at once, since an allocator that keeps pages counts them as
    # used; for time, the default allocator, since remapping pages would cost more than the step
    returning = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    returning["MALLOC_MMAP_THRESHOLD_"] = "65536"

    def child(mode: str, compute: str):
        environment = dict(os.environ) if mode == "time" else returning
        sizes = [
            "--tokens",
            args.tokens,
            "--timed-tokens",
            args.timed_tokens,
            "--rounds",
            args.rounds,
        ]
        words = [*map(str, sizes), "--compute", compute, "--child", mode]
        command = [sys.executable, __file__, *words]
        out = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return json.loads(out.stdout.splitlines()[-1])

    for compute in args.compute:
        print_memory(compute, {mode: child(mode, compute) for mode in MODES})
    if args.rounds:
        print_time(args.compute[0], child("time", args.compute[0]))


def print_memory(compute: str, found: dict[str, dict[str, Any]]) -> None:
    first = found["dense"]
    print(f"{first['device']}, {compute}, {first['total']:,} parameters, AdamW")
    print(f"{'':8}" + "".join(f"{title:>16}" for title, *_ in COLUMNS))
    for mode, row in found.items():
        print(f"{mode:8}" + "".join(f"{row[key] / unit:>16,.0f}" for _, key, unit in COLUMNS))
    print("ratio to dense")
    for mode in MODES[1:]:
        ratios = (f"{found[mode][key] / first[key]:>16.3f}" for _, key, _ in COLUMNS)
        print(f"{mode:8}" + "".join(ratios))


def print_time(compute: str, rounds: dict[str, list[float]]) -> None:
    count = len(rounds["dense"])
    print(
        f"{compute}: seconds of a step, median of {count} rounds; ratio to dense in the same round: median "
        "(range)"
    )
    for mode in MODES:
        ratios = sorted(of / dense for of, dense in zip(rounds[mode], rounds["dense"], strict=True))
        middle, seconds = (sorted(x)[len(x) // 2] for x in (ratios, rounds[mode]))
        print(f"{mode:8}{seconds:>9.3f}{middle:>9.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})")


def measure_memory(mode: str, args: argparse.Namespace) -> dict[str, float | int | str]:
    """Runs one mode in this process for three steps."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401 - so that the library's size does not count as the model's

    import vlopd.masks
    import vlopd.train.optimizers  # noqa: F401

    if mode == "shira":
        import peft  # noqa: F401
    cuda = torch.cuda.is_available()
    imported = 0 if cuda else resident("VmRSS")
    model, ids = llama(args)
    loaded = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    values, step = trainer(mode, model, ids)
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    trained = sum(value.numel() for value in values)
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "total": sum(p.numel() for p in model.parameters()) - (trained if mode == "shira" else 0),
        "trained": trained,
        "state_bytes": sum(v.grad.nbytes for v in values) + 8 * trained,  # AdamW's moments are fp32
        "over_model_bytes": peak - loaded,
        "over_imports_bytes": peak - imported,
        "peak_bytes": peak,
    }


def time_steps(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of the modes, interleaved so that load on the machine affects all of them."""
    import torch

    args.tokens = args.timed_tokens
    steps = {mode: trainer(mode, *llama(args))[1] for mode in MODES}
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for k in range(args.rounds + 1):
        for mode, step in steps.items():
            started = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if k:  # the first warms up
                found[mode].append(time.perf_counter() - started)
    return found


def llama(args: argparse.Namespace):
    """(model, token ids [2, tokens])"""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, dtype=torch.float32 if args.compute == ["fp32"] else torch.bfloat16
    )
    model = LlamaForCausalLM._from_config(config).to(device)
    model.train()
    return model, torch.randint(0, SIZES["vocab_size"], (2, args.tokens), device=device)


def trainer(mode: str, model, ids):
    """(trained values, a function that runs one step)."""
    import torch

    from vlopd.config.training import AdamW
    from vlopd.train.optimizers import build_optimizer
    from vlopd.train.sparse import Trainable

    rank = rank_of_shira(model.num_parameters())
    if mode == "shira":
        values, update, clear = shira(model, rank)
    else:
        trainable = Trainable(model, mask_of(mode, model, rank))
        optimizer = build_optimizer(AdamW(), trainable)
        values, clear = list(trainable.parameters()), trainable.zero_grad

        def update() -> None:
            optimizer.step(1e-6)
            trainable.write_back()

    def step() -> None:
        clear()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        update()

    return values, step


def linears(model):
    """The weights that SHiRA trains: all linear layers except the head."""
    import torch

    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def rank_of_shira(total: int) -> int:
    """SHiRA's rank r, with r (m + n) coordinates per linear layer, nearest to the density."""
    wide, narrow = SIZES["intermediate_size"], SIZES["hidden_size"]
    a_rank = SIZES["num_hidden_layers"] * (4 * 2 * narrow + 3 * (wide + narrow))
    return round(DENSITY * total / a_rank)


def mask_of(mode: str, model, rank: int):
    """The mask of a mode: None, a random fifth of every tensor, or SHiRA's count in each linear layer."""
    import torch

    from vlopd.masks.select import largest

    if mode == "dense":
        return None
    if mode == "sparse":
        return {
            n: torch.rand(p.shape, device=p.device) < DENSITY for n, p in model.named_parameters()
        }
    return {n: largest(torch.rand(w.shape), rank * sum(w.shape)) for n, w in linears(model).items()}


def shira(model, rank: int):
    """(trained values, step, zero_grad) of SHiRA with torch's AdamW and our settings."""
    import torch
    from peft import ShiraConfig, get_peft_model

    names = sorted({name.split(".")[-2] for name in linears(model)})
    adapted = get_peft_model(model, ShiraConfig(r=rank, target_modules=names, random_seed=0))
    values = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-6, weight_decay=0.0, fused=True)
    return values, optimizer.step, lambda: optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
