"""Benchmarks peak memory of a chunked loss against the unchunked one, at a large model's vocabulary size.

    python scripts/bench_loss_memory.py                                # reverse KL, chunks of 64 tokens
    python scripts/bench_loss_memory.py 'loss={type="jsd"}' 'loss={type="k1"}' --chunk-tokens 32

Each measurement is one forward and backward of `chunked_divergence` in its own process: on a CPU, the
growth of the peak resident size over that before the loss; on a GPU, of the peak allocation.
Both include hidden states, heads and the head's gradient (39 MB here); the heads are created before.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
from pydantic import TypeAdapter
from resident import resident

from vlopd.config.input import parse_override
from vlopd.config.objective import LossConfig
from vlopd.train.losses import Sampled, TokenInputs, chunked_divergence


def peak_bytes(loss: LossConfig, tokens: int, vocabulary: int, width: int, device: str) -> int:
    """Peak bytes that one forward and backward pass adds."""
    torch.manual_seed(0)
    columns = torch.randint(0, vocabulary, (tokens,), device=device)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    teacher_hidden = torch.randn(tokens, width, device=device)
    heads = [torch.nn.Linear(width, vocabulary, bias=False, device=device) for _ in range(2)]
    sampled = Sampled(columns, torch.full((tokens,), -10.0, device=device))

    def step(n: int) -> None:
        part = Sampled(*(column[:n] for column in sampled))
        weights = torch.ones(n, device=device)
        inputs = TokenInputs(hidden[:n], heads[0], teacher_hidden[:n], heads[1], part, weights)
        chunked_divergence(loss, inputs)
        for leaf in (hidden, heads[0].weight):
            leaf.grad = None

    step(1)  # loads kernels and libraries
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(tokens)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    step(tokens)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("losses", nargs="*", default=['loss={type="reverse_kl"}'])
    parser.add_argument("--chunk-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, N {args.tokens}, V {args.vocabulary}, H {args.width}")
    print("at once MB  chunked MB  ratio  loss")
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as fresh:
        for line in args.losses:
            table = parse_override(line)["loss"]
            whole, chunked = (
                fresh.submit(
                    peak_bytes,
                    TypeAdapter(LossConfig).validate_python({**table, "chunk_tokens": chunk}),
                    args.tokens,
                    args.vocabulary,
                    args.width,
                    device,
                ).result()
                for chunk in (args.tokens, args.chunk_tokens)
            )
            print(f"{whole / 1e6:10.0f}  {chunked / 1e6:10.0f}  {chunked / whole:5.3f}  {line}")


if __name__ == "__main__":
    main()
