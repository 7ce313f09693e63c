"""Benchmarks time and peak memory of the paper's metric set, naive and ours, on SmolLM2-135M and a noised copy.

    python scripts/bench_geometry.py                   # all four, each in its own process
    python scripts/bench_geometry.py --layers 6        # the embedding and the first layers only

The baseline computes the metrics of arXiv 2606.13657's public analysis naively: deltas in bf16, and per
matrix the singular values of the delta and full fp32 SVDs of the base, of the trained matrix, and of
the base again for its masks, which are sorted by topk. Ours computes more (float64, exact counts, both sides'
rotations, four masks) and writes its tables; also with 3 draws of the Gaussian null. The
last variant stops after the factorisations and the measures from them, a lower bound on the rest.
Both may use `--threads` cores: the baseline by torch's threading, ours as that many workers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from resident import resident
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlopd.config.analysis import GeometryConfig
from vlopd.models.parameter_names import classify
from vlopd.update_geometry.checkpoint import measure_checkpoint, pool
from vlopd.update_geometry.projection import base_factors, matrix_measures
from vlopd.weights.delta import difference, stream

RATIOS = (0.01, 0.05, 0.1, 0.2)
ATOLS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
WAYS = ("baseline", "ours", "ours, 3 null seeds", "ours, spectral rows only")


def make_pair(root: Path, layers: int) -> tuple[Path, Path]:
    """SmolLM2-135M, and itself plus Gaussian noise of 7e-4 of each tensor's r.m.s., rounded back to bf16."""
    from vlopd.models.gguf.smollm2 import (
        folder as builtin,  # loads transformers' models, which no variant needs
    )

    base, trained = root / "base", root / "trained"
    tensors: dict[str, Tensor] = {}
    for path in builtin("smollm2").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                parts = name.split(".")
                if "layers" not in parts or int(parts[parts.index("layers") + 1]) < layers:
                    tensors[name] = file.get_tensor(name)
    torch.manual_seed(0)
    noised = {}
    for name, w in tensors.items():
        wide = w.float()
        noise = 7e-4 * wide.square().mean().sqrt() * torch.randn_like(wide)
        noised[name] = (wide + noise).to(w.dtype)
    for target, content in ((base, tensors), (trained, noised)):
        target.mkdir()
        save_file(content, target / "model.safetensors", {"format": "pt"})
    return base, trained


# ---------------------------------------------------------------------------------------- the baseline


def baseline(base: Path, trained: Path) -> list[dict[str, float]]:
    """The published metric set, one dict per tensor."""
    found = []
    with (
        safe_open(base / "model.safetensors", framework="pt") as before,
        safe_open(trained / "model.safetensors", framework="pt") as after,
    ):
        for name in before.keys():  # noqa: SIM118 - not a dict
            w, w2 = before.get_tensor(name).bfloat16(), after.get_tensor(name).bfloat16()
            delta = (w2 - w).float()
            w, w2 = w.float(), w2.float()
            found.append(coordinates(w, delta) | (matrix(w, w2, delta) if w.ndim == 2 else {}))
    return found


def coordinates(w: Tensor, delta: Tensor) -> dict[str, float]:
    size = delta.abs()
    rms = w.square().mean().sqrt()
    energy = delta.square().sum()
    found = {
        "relative": float(delta.norm() / (w.norm() + 1e-12)),
        "linf": float(size.max()),
        "mean": float(size.mean()),
        "zero": float((delta == 0).float().mean()),
    }
    for atol in ATOLS:
        found[f"lt {atol}"] = float((size < atol).float().mean())
        close = torch.isclose(delta, torch.zeros_like(delta), atol=atol)
        found[f"close {atol}"] = float(close.float().mean())
    for tau in (1e-4, 1e-3, 1e-2):
        found[f"rms {tau}"] = float((size < tau * rms).float().mean())
    for share in (0.001, 0.01, 0.05):
        top = size.flatten().topk(math.ceil(share * size.numel())).values
        found[f"top {share}"] = float(top.square().sum() / energy)
    return found


def matrix(w: Tensor, w2: Tensor, delta: Tensor) -> dict[str, float]:
    energy = delta.square().sum()
    s = torch.linalg.svdvals(delta)
    p = s / s.sum()
    found = {
        "stable rank": float(energy / (s[0] ** 2 + 1e-12)),
        "effective rank": float((-(p * (p + 1e-12).log()).sum()).exp()),
        **{f"rank {tol}": float((s > tol * s[0]).sum()) for tol in (1e-6, 1e-5, 1e-4)},
        **{f"top {k}": float(s[:k].square().sum() / energy) for k in (1, 2, 4, 8, 16, 32, 64)},
    }
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    u2, sigma2, _ = torch.linalg.svd(w2, full_matrices=False)
    found["drift"] = float((sigma2 - sigma).norm() / sigma.norm())
    found["drift to delta"] = float((sigma2 - sigma).norm() / delta.norm())
    for ratio in RATIOS:
        k = max(1, int(ratio * min(w.shape)))
        left, right = u[:, :k], vt[:k]
        found[f"joint {ratio}"] = float((left.T @ delta @ right.T).square().sum() / energy)
        found[f"left {ratio}"] = float((left.T @ delta).square().sum() / energy)
        found[f"right {ratio}"] = float((delta @ right.T).square().sum() / energy)
        cosines = torch.linalg.svdvals(left.T @ u2[:, :k])
        found[f"rotation {ratio}"] = float((1 - cosines.square()).clamp(min=0).sqrt().mean())
    return found | masks(w, delta)


def masks(w: Tensor, delta: Tensor) -> dict[str, float]:
    found = {}
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    for ratio in RATIOS:
        k, count = max(1, int(ratio * min(w.shape))), math.ceil(ratio * w.numel())
        rebuilt = (u[:, :k] * sigma[:k]) @ vt[:k]
        principal = torch.zeros(w.numel(), dtype=torch.bool)
        principal[rebuilt.abs().flatten().topk(count).indices] = True
        low = torch.zeros(w.numel(), dtype=torch.bool)
        low[w.abs().flatten().topk(count, largest=False).indices] = True
        named = {"principal": principal, "low": low, "both": principal & ~low}
        named["safe"] = ~principal | low
        for atol in (0.0, 1e-5):
            moved = delta.abs().flatten() > atol
            for name, mask in named.items():
                both = float((mask & moved).sum())
                overlap = both / max(float(moved.sum()), 1)
                found[f"{name} {ratio} {atol}"] = overlap
                found[f"{name} {ratio} {atol} covered"] = both / max(float(mask.sum()), 1)
                found[f"{name} {ratio} {atol} enriched"] = overlap / float(mask.float().mean())
    return found


# --------------------------------------------------------------------------------------------- a bound


def spectral_rows(base: Path, trained: Path, config: GeometryConfig, threads: int) -> None:
    """Our factorisations and spectral measures, without coordinates, masks and tables: a lower bound."""
    deltas = stream(base, trained, classify)

    def work(name: str) -> None:
        pair = read(name)
        if pair.base.ndim == 2:
            change = difference(pair.base, pair.trained)
            matrix_measures(pair.base, base_factors(pair.base, config), change, config)

    with deltas.reader() as read, pool(threads) as run:
        sizes = deltas.sizes()
        for _ in run(work, sorted(sizes, key=lambda name: -sizes[name])):
            pass


# -------------------------------------------------------------------------------------------- measuring


def one(way: str, base: Path, trained: Path, threads: int) -> None:
    """Runs one variant in this process and prints seconds and peak bytes as JSON."""
    torch.set_num_threads(threads)
    torch.linalg.svd(torch.randn(64, 64).double() @ torch.randn(64, 64).double())  # loads libraries
    start = time.perf_counter()
    before = resident("VmRSS")
    config = GeometryConfig(ratios=RATIOS, null_draws=3 if "null" in way else 0)
    if way == "baseline":
        baseline(base, trained)
    elif "only" in way:
        spectral_rows(base, trained, config, threads)
    else:
        measure_checkpoint(base, trained, base.parent / "out", config, {}, False, threads)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    print(json.dumps({"seconds": seconds, "peak": peak, "added": peak - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=1, help="rounds for the medians")
    parser.add_argument("--only", choices=WAYS, help="one of the four")
    parser.add_argument("--in-process", nargs=3, metavar=("WAY", "BASE", "TRAINED"))
    args = parser.parse_args()
    if args.in_process:
        way, base, trained = args.in_process
        one(way, Path(base), Path(trained), args.threads)
        return
    root = Path(tempfile.mkdtemp())
    try:
        base, trained = make_pair(root, args.layers)
        with safe_open(base / "model.safetensors", framework="pt") as file:
            sizes = [math.prod(file.get_slice(n).get_shape()) for n in file.keys()]  # noqa: SIM118
        largest = 2 * max(sizes)
        print(
            f"{sum(sizes) / 1e6:.1f} M parameters in {len(sizes)} tensors, {args.threads} threads; largest "
            f"tensor {largest / 1e6:.0f} MB as stored; 4 x that + 1 GB = {4 * largest / 1e6 + 1000:.0f} MB"
        )
        ways = [args.only] if args.only else WAYS
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for turn in range(
            args.rounds
        ):  # interleaved, so that load on the machine affects all variants
            for way in ways:
                command = [sys.executable, __file__, "--threads", str(args.threads)]
                command += ["--in-process", way, str(base), str(trained)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[way].append(json.loads(done.stdout))
                print(f"round {turn + 1}: {way} {found[way][-1]['seconds']:.1f} s", flush=True)
        print("seconds  times faster (range)    peak MB  (added MB)  way")
        for way in ways:
            seconds = [run["seconds"] for run in found[way]]
            faster = [
                first["seconds"] / run["seconds"]
                for first, run in zip(found[ways[0]], found[way], strict=True)
            ]
            peak, added = (max(run[key] for run in found[way]) / 1e6 for key in ("peak", "added"))
            print(
                f"{median(seconds):7.1f}  {median(faster):12.2f} ({min(faster):.2f}-{max(faster):.2f})"
                f"  {peak:9.0f}  {added:10.0f}  {way}"
            )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
