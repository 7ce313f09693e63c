"""Times a loss, forward and backward with diagnostics, against another revision of this repository, in one run.

    python scripts/bench_loss.py --against HEAD~1                      # five losses, V = 151,936, 64 tokens
    python scripts/bench_loss.py 'loss={type="k3"}' --against main --chunk-tokens 16 --threads 1

Each revision runs in its own process, from its own folder, and they take turns; the first turn of each is not
counted. Seconds are the least of the turns: wall time, and CPU time of all threads, which other work on the machine
disturbs less. Without --against only this revision runs.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import TypeAdapter

ROOT = Path(__file__).parents[1]
LOSSES = (
    'loss={type="reverse_kl"}',
    'loss={type="forward_kl"}',
    'loss={type="jsd"}',
    'loss={type="k1"}',
    'loss={type="reverse_kl", support={type="teacher_top_k"}}',
)


def serve(tokens: int, vocabulary: int, width: int, device: str) -> None:
    """Reads a chunk size and a loss from each line of standard input, runs it, writes wall and CPU seconds."""
    from vlopd.config.input import parse_override
    from vlopd.config.objective import LossConfig
    from vlopd.train import losses

    torch.manual_seed(0)
    columns = torch.randint(0, vocabulary, (tokens,), device=device)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    other = torch.randn(tokens, width, device=device)
    heads = [torch.nn.Linear(width, vocabulary, bias=False, device=device) for _ in range(2)]
    sampled = losses.Sampled(columns, torch.full((tokens,), -10.0, device=device))
    weights = torch.full((tokens,), 1 / tokens, device=device)
    is_bundled = "inputs" in inspect.signature(losses.chunked_divergence).parameters

    for line in sys.stdin:
        chunk, text = line.rstrip("\n").split(" ", 1)
        loss = TypeAdapter(LossConfig).validate_python(
            {**parse_override(text)["loss"], "chunk_tokens": int(chunk)}
        )
        inputs = (hidden, heads[0], other, heads[1], sampled)
        wall, cpu = now(), time.process_time()
        if is_bundled:
            losses.chunked_divergence(loss, losses.TokenInputs(*inputs, weights))
        else:  # a revision whose loss takes them one by one
            losses.chunked_divergence(loss, *inputs, weights=weights)
        print(now() - wall, time.process_time() - cpu, flush=True)
        hidden.grad = heads[0].weight.grad = None


def now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def start(root: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that serves the revision in the folder `root`."""
    numbers = (args.tokens, args.vocabulary, args.width)
    command = [sys.executable, __file__, "--serve", *map(str, numbers), args.device]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def ask(process: subprocess.Popen[str], chunk: int, loss: str) -> tuple[float, float]:
    """Wall and CPU seconds of one forward and backward pass."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{chunk} {loss}\n")
    process.stdin.flush()
    wall, cpu = map(float, process.stdout.readline().split())
    return wall, cpu


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        tokens, vocabulary, width, device = sys.argv[2:]
        serve(int(tokens), int(vocabulary), int(width), device)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("losses", nargs="*", default=LOSSES)
    parser.add_argument("--against", help="another revision, such as HEAD~1")
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, help="OpenMP threads; default: the environment's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"{args.device}, N {args.tokens}, V {args.vocabulary}, H {args.width}; seconds")
    with TemporaryDirectory() as folder:
        processes = {"this": start(ROOT, args)}
        if args.against:
            archive = subprocess.run(
                ["git", "archive", args.against, "vlopd"], cwd=ROOT, check=True, capture_output=True
            ).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            processes = {args.against: start(Path(folder), args), **processes}
        print(*(f"{name:>12} wall  cpu  " for name in processes), "ratio wall  cpu  chunk  loss")
        for loss in args.losses:
            for chunk in args.chunk_tokens:
                turns = [
                    [ask(process, chunk, loss) for process in processes.values()]
                    for _ in range(args.turns + 1)
                ][1:]
                best = [
                    [min(times) for times in zip(*each, strict=True)]
                    for each in zip(*turns, strict=True)
                ]
                seconds = "  ".join(f"{wall:16.3f} {cpu:6.3f}" for wall, cpu in best)
                ratios = [own / theirs for own, theirs in zip(best[-1], best[0], strict=True)]
                print(
                    f"{seconds}  {ratios[0]:8.2f} {ratios[1]:6.2f}  {chunk:5d}  {loss}", flush=True
                )
        for process in processes.values():
            process.communicate()


if __name__ == "__main__":
    main()
