"""Peak memory and step time of training a fifth of a Llama's coordinates, against all of them and against PEFT.

    python scripts/bench_sparse_memory.py                    # fp32
    python scripts/bench_sparse_memory.py --compute bf16     # slow on a CPU without bf16 instructions

Four child processes train the same Llama (98 M parameters, random weights) with AdamW on the same tokens:

    dense    all coordinates, by our own `Trainable`
    sparse   a random fifth of every tensor
    shira    PEFT's SHiRA, whose rank is the one that comes nearest to as many coordinates (linear layers only)
    linear   by `Trainable`, as many coordinates in each linear layer as SHiRA has, and none elsewhere

Printed for each: trained coordinates; bytes of gradients and optimizer state after a step, summed over the
tensors; what the process's peak (VmHWM) adds to its resident size with the model loaded, which is values,
indices, gradients, state, activations and what passes; what it adds to that with the libraries loaded, which
is the model too; the whole process's peak; CPU seconds of a step, median (all threads together, so that
other work on the machine counts little). Then the ratios to dense. On a GPU the peaks are those of the
allocator, without libraries, and seconds are wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

DENSITY = 0.2
MODES = ("dense", "sparse", "shira", "linear")
COLUMNS = (
    ("trained", "trained", 1, 0),
    ("grad+state MB", "state_bytes", 1e6, 0),
    ("over model MB", "over_model_bytes", 1e6, 0),
    ("over imports MB", "over_imports_bytes", 1e6, 0),
    ("peak MB", "peak_bytes", 1e6, 0),
    ("step s", "seconds", 1, 3),
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
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--tokens", type=int, default=128, help="of each of two sequences")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.compute, args.tokens, args.steps)))
        return
    # freed tensors go back to the system at once: an allocator that keeps its pages shows them as used
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = {}
    for mode in MODES:
        words = [sys.executable, __file__, *sys.argv[1:], "--child", mode]
        out = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        found[mode] = json.loads(out.stdout.splitlines()[-1])
    first = found["dense"]
    print(f"{first['device']}, {args.compute}, {first['total']:,} parameters, AdamW")
    print(f"{'':8}" + "".join(f"{title:>16}" for title, *_ in COLUMNS))
    for mode, row in found.items():
        cells = (f"{row[key] / unit:>16,.{digits}f}" for _, key, unit, digits in COLUMNS)
        print(f"{mode:8}" + "".join(cells))
    print("ratio to dense")
    for mode in MODES[1:]:
        ratios = (f"{found[mode][key] / first[key]:>16.3f}" for _, key, *_ in COLUMNS)
        print(f"{mode:8}" + "".join(ratios))


def measure(mode: str, compute: str, tokens: int, steps: int) -> dict[str, float | int | str]:
    """One mode in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlopd.config import AdamW
    from vlopd.optimizers import build_optimizer
    from vlopd.trainable import Trainable

    if mode == "shira":
        import peft  # noqa: F401 - so that its size is not the model's
    imported = 0 if torch.cuda.is_available() else resident("VmRSS")
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, dtype=torch.float32 if compute == "fp32" else torch.bfloat16)
    model = LlamaForCausalLM._from_config(config).to(device)
    model.train()
    ids = torch.randint(0, SIZES["vocab_size"], (2, tokens), device=device)
    total = model.num_parameters()
    loaded = torch.cuda.memory_allocated() if cuda else resident("VmRSS")

    if mode == "shira":
        values, step, clear = shira(model, rank_of_shira(total))
    else:
        trainable = Trainable(model, mask_of(mode, model, rank_of_shira(total)))
        optimizer = build_optimizer(AdamW(), trainable)
        values = list(trainable.parameters())

        def step() -> None:
            optimizer.step(1e-6)
            trainable.write_back()

        clear = trainable.zero_grad

    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter() if cuda else time.process_time()
        clear()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() if cuda else time.process_time()) - started)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    trained = sum(value.numel() for value in values)
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "total": total,
        "trained": trained,
        "state_bytes": sum(v.grad.nbytes for v in values) + 8 * trained,  # AdamW's moments are fp32
        "over_model_bytes": peak - loaded,
        "over_imports_bytes": peak - imported,
        "peak_bytes": peak,
        "seconds": sorted(seconds[1:])[steps // 2],
    }


def linears(model):
    """The weights that SHiRA trains: all linear layers but the head."""
    import torch

    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def rank_of_shira(total: int) -> int:
    """SHiRA's r, with r (m + n) coordinates in every linear layer, that comes nearest to the density."""
    wide, narrow = SIZES["intermediate_size"], SIZES["hidden_size"]
    a_rank = SIZES["num_hidden_layers"] * (4 * 2 * narrow + 3 * (wide + narrow))
    return round(DENSITY * total / a_rank)


def mask_of(mode: str, model, rank: int):
    """None, a random fifth of every tensor, or as many as SHiRA has in linear layers."""
    import torch

    from vlopd.masks import largest

    if mode == "dense":
        return None
    if mode == "sparse":
        return {
            n: torch.rand(p.shape, device=p.device) < DENSITY for n, p in model.named_parameters()
        }
    return {n: largest(torch.rand(w.shape), rank * sum(w.shape)) for n, w in linears(model).items()}


def shira(model, rank: int):
    """(trained values, step, zero_grad) of SHiRA with torch's AdamW, set as ours is."""
    import torch
    from peft import ShiraConfig, get_peft_model

    names = sorted({name.split(".")[-2] for name in linears(model)})
    adapted = get_peft_model(model, ShiraConfig(r=rank, target_modules=names, random_seed=0))
    values = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-6, weight_decay=0.0, fused=True)
    return values, optimizer.step, lambda: optimizer.zero_grad(set_to_none=True)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
