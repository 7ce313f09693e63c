"""What only a GPU shows, each claim in a process of its own with a time limit: the work of scripts/gpu-check.

Models have published architectures and random weights, made in the process (scripts/random_models.py). Prints a table
and writes it as JSON with the card's name. "not run" are checks for which the time of --seconds did not suffice, and
"not measured" numbers that need TRL where there is none.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_opd_step

ROOT = Path(__file__).parents[1]
TEXT = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
STUDENT, TEACHER = "Qwen/Qwen2.5-VL-3B-Instruct", "xyliu6/NoisyRollout-Geo3K-7B"
MARK = "CHECK "


@dataclass(frozen=True)
class Setting:
    """Where and how large; passed to each process as JSON."""

    device: str
    tiny: bool
    work: str
    cap_gib: float | None
    trl: str

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def precision(self) -> str:
        return "bf16" if self.cuda else "fp32"

    def model(self, name: str) -> str:
        """An architecture: published or, if `tiny`, with its layers, widths and vocabulary cut."""
        return str(tiny_architecture(name, Path(self.work))) if self.tiny else name

    def steps(self, name: str, teacher: str | None = None, *words: str) -> argparse.Namespace:
        """Arguments of bench_opd_step.py, its data and models' configs written."""
        sides = ["--student", f"random:{self.model(name)}"]
        if teacher:
            sides += ["--teacher", f"random:{self.model(teacher)}"]
        where = ["--device", self.device, "--work", self.work, "--trl", self.trl]
        cap = ["--cap-gib", str(self.cap_gib)] if self.cap_gib else []
        common = ["--precision", self.precision, "--rounds", "1"]
        args = bench_opd_step.parse([*sides, *where, *cap, *common, *words])
        bench_opd_step.prepare(args)
        args.json = args.make_venv = None
        return args

    def size(self, real: int, tiny: int) -> str:
        return str(tiny if self.tiny else real)


def tiny_architecture(name: str, work: Path) -> Path:
    """A folder with the config.json of an architecture of the same kind and 0.1 M parameters or so."""
    import random_models

    config = random_models.read_config(name)
    text = config.get_text_config()
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    for key, value in {**small, "num_attention_heads": 4, "num_key_value_heads": 2}.items():
        setattr(text, key, value)
    text.layer_types = ["full_attention"] * 2
    text.vocab_size = 1024
    for k, field in enumerate(random_models.SPECIAL):
        for each in (config, text):
            if getattr(each, field, None) is not None:
                setattr(each, field, 1000 + k)
    if text is not config:
        vision = config.vision_config
        vision.depth, vision.hidden_size, vision.num_heads = 2, 32, 2
        vision.intermediate_size, vision.out_hidden_size = 64, 64
        vision.fullatt_block_indexes = [1]
        text.rope_parameters["mrope_section"] = [2, 3, 3]
    folder = work / "tiny" / name.replace("/", "--")
    config.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------- checks
# each returns (numbers, problems): problems are sentences, none where the claim holds


Found = tuple[dict[str, Any], list[str]]


def engines(at: Setting) -> Found:
    """Greedy tokens of each engine equal `generate`'s; sampled ones do not depend on the engine; draws are exact."""
    import random_models
    import torch
    from PIL import Image

    from vlopd import seeding
    from vlopd.train import decoding
    from vlopd.train.generation import sample
    from vlopd.types import Example

    numbers: dict[str, Any] = {}
    problems = []
    tokens = 8 if at.tiny else 32
    for kind, name in (("text", TEXT), ("image", STUDENT)):
        loaded = random_models.make(
            at.model(name), torch.float32, at.device, None if at.tiny else 4
        )
        pictures = [Image.effect_noise((112, 112), 60).convert("RGB")] if kind == "image" else []
        questions = ("one", "two and more words", "three, with a longer question than the others")
        prompts = loaded.render([Example.ask(q, q, pictures) for q in questions])
        uniforms = seeding.uniforms(len(questions), tokens, "gpu-check")
        extra = {**prompts.per_token, **prompts.per_image}
        made = loaded.model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            **extra,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=loaded.unsampleable_ids,
        )[:, prompts.input_ids.shape[1] :]
        first = None
        for engine in ("eager", "static", "graphs"):
            if engine == "graphs" and not at.cuda:
                continue
            if why := decoding.chosen_engine(loaded, engine)[1]:
                numbers[f"{kind}, {engine}"] = why
                if kind == "text":
                    problems.append(why)
            start = time.perf_counter()
            greedy = sample(loaded, prompts, tokens, 0.0, engine=engine)
            drawn = sample(loaded, prompts, tokens, 1.0, uniforms, engine=engine)
            numbers[f"{kind}, {engine}: seconds"] = round(time.perf_counter() - start, 2)
            if not torch.equal(greedy.ids, made):
                same = (greedy.ids == made).float().mean()
                problems.append(f"{kind}, {engine}: {same:.1%} of greedy tokens are generate's")
            first = drawn.ids if first is None else first
            # a number on the edge of two tokens' shares falls to one or the other by rounding: 1 of 500 draws
            # (SmolLM2's 49,152 tokens, fp32)
            apart = int((drawn.ids != first).any(1).sum())
            numbers[f"{kind}, {engine}: rows apart"] = apart
            if apart > 1:
                problems.append(
                    f"{kind}, {engine}: {apart} of {len(first)} samples are not eager's"
                )
    # N equally spaced uniforms hit each token's interval N p times, give or take one
    n = 256 if at.tiny else 4096
    one = loaded.render([Example.ask("x", "one", pictures)])
    spaced = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    rows = torch.zeros(n, dtype=torch.long)
    found = sample(loaded, one, 1, 1.0, spaced.float(), rows=rows)
    counts = torch.bincount(found.ids[:, 0].cpu(), minlength=loaded.vocabulary_rows)
    hidden = loaded.completion_hidden(one, found.take([0]))
    logits = loaded.logits(hidden, loaded.vocabulary_rows)[0].double().cpu()
    logits[loaded.unsampleable_ids] = -torch.inf
    off = (counts - n * logits.softmax(-1)).abs().max()
    numbers["draws: most off by"] = round(float(off), 3)
    if off > 1 + n * 1e-6 + 0.1:
        problems.append(
            f"a token was drawn {off:.1f} times more or less than {n} spaced draws allow"
        )
    return numbers, problems


def decode(at: Setting) -> Found:
    """A decode step of 1.78 B at batch 32 takes at most 4 ms with captured graphs."""
    import bench_decode

    words = ["--model", f"random:{at.model(TEXT)}", "--device", at.device]
    words += ["--precision", at.precision, "--batches", at.size(32, 2), "--rounds", "1"]
    words += ["--new-tokens", at.size(128, 6), "--work", at.work]
    names = ["eager", "static", *(["graphs"] if at.cuda else [])]
    found = bench_decode.measure(bench_decode.parse([*words, "--engines", *names]))
    row = found["rows"][0]
    numbers = {
        f"{name}, ms a token": row[name] and round(row[name], 2) for name in (*names, "floor")
    }
    best = row[names[-1]]
    if best is None or (best > 4 and not at.tiny):
        return numbers, [f"{names[-1]}: {best} ms a token; the target is 4"]
    return numbers, []


def step(at: Setting) -> Found:
    """1.78 B from itself, 16 x 2 x 256: at most 0.4 of the time of TRL with fp32 weights and autocast, at most its
    peak; the peak within 10 % of the prediction.
    """
    words = ["--prompts", at.size(16, 2), "--completions", "2", "--new-tokens", at.size(256, 4)]
    words += ["--micro-batch", at.size(8, 2), "--steps", at.size(3, 2)]
    if at.cuda:
        words += ["--set", 'rollout.engine="graphs"']
    trl = has_trl(at.trl)
    args = at.steps(TEXT, None, *words, *([] if trl else ["--no-trl"]))
    found = bench_opd_step.measure(args)
    ours = found["runs"]["ours"]
    if "error" in ours:
        return {}, [f"ours: {ours['error']}"]
    numbers = {
        "ours, s": round(ours["seconds"], 2),
        **{f"ours, {name}, s": round(value, 2) for name, value in ours["phases"].items()},
        "ours, peak GB": round(ours["peak_bytes"] / 1e9, 2),
    }
    problems = predicted(at, args, ours["peak_bytes"], numbers)
    for name, run in found["runs"].items():
        if name == "ours":
            continue
        if "error" in run:
            problems.append(f"{name}: {run['error']}")
            continue
        ratio = found["ratios"][name]
        numbers[f"{name}, s"] = round(run["seconds"], 2)
        numbers[f"{name}, peak GB"] = round(run["peak_bytes"] / 1e9, 2)
        numbers[f"ours / {name}"] = round(ratio["seconds"], 3)
        if name == "TRL bf16" and ratio["seconds"] > 0.4:
            problems.append(f"{ratio['seconds']:.2f} of {name}'s time; the target is 0.4")
        if name == "TRL bf16" and ratio["peak_bytes"] > 1:
            problems.append(f"{ratio['peak_bytes']:.2f} of {name}'s peak; the target is 1")
    if not trl:
        numbers["TRL"] = "not measured: no TRL here"
    return numbers, problems


def image_step(at: Setting, most_gb: float, new_tokens: int, *words: str) -> Found:
    """Two steps of 3.75 B with images from 8.29 B, with the settings that `vlopd check` computes."""
    words = ("--image", "--pixels", at.size(448, 56), "--prompts", at.size(8, 2), *words)
    words += ("--new-tokens", str(new_tokens), "--steps", "2", "--micro-batch", at.size(4, 2))
    words += ("--set", "train.activation_checkpointing=true")
    if at.cuda:
        words += ("--set", 'rollout.engine="graphs"')
    args = at.steps(STUDENT, TEACHER, *words, "--no-trl")
    numbers: dict[str, Any] = {}
    if fitting := settings_that_fit(at, args, most_gb):
        numbers["settings"] = fitting
        args.settings += [f"{key}={json.dumps(value)}" for key, value in fitting.items()]
    run = bench_opd_step.run_child("ours", args, at.precision, sys.executable, 3600)
    if "error" in run:
        return numbers, [run["error"]]
    ours = bench_opd_step.summary([run])
    numbers |= {
        "s": round(ours["seconds"], 2),
        **{f"{name}, s": round(value, 2) for name, value in ours["phases"].items()},
        "peak GB": round(ours["peak_bytes"] / 1e9, 2),
    }
    problems = predicted(at, args, ours["peak_bytes"], numbers)
    if at.cuda and ours["peak_bytes"] > most_gb * 1e9:
        problems.append(f"peak {ours['peak_bytes'] / 1e9:.1f} GB; the target is {most_gb}")
    return numbers, problems


def image_dense(at: Setting) -> Found:
    """Qwen2.5-VL-3B from 7B, dense, 2,048 new tokens, fits 80 GB and trains."""
    return image_step(at, 80.0, 6 if at.tiny else 2048)


def image_masked(at: Setting) -> Found:
    """The same with a mask of 20 %, in at most 48 GB."""
    return image_step(at, 48.0, 6 if at.tiny else 2048, "--density", "0.2")


def predicted(
    at: Setting, args: argparse.Namespace, peak_bytes: int, numbers: dict[str, Any]
) -> list[str]:
    """Adds the predicted peak; a problem where it is off by more than 10 % (on a GPU)."""
    import roofline

    expected = roofline.predict(args)["peak_bytes"]
    numbers["predicted peak GB"] = round(expected / 1e9, 2)
    if at.cuda and not at.tiny and abs(expected / peak_bytes - 1) > 0.1:
        return [f"check predicts {expected / 1e9:.1f} GB, and the peak is {peak_bytes / 1e9:.1f}"]
    return []


def settings_that_fit(at: Setting, args: argparse.Namespace, most_gb: float) -> dict[str, Any]:
    """The settings that `vlopd check` proposes for a device of that size; none where it fits as it is."""
    import roofline

    from vlopd.preflight import fit

    given = roofline.inputs(args)
    speed = given.speed._replace(memory_bytes=int(0.95 * most_gb * 1e9) if at.cuda else 10**12)
    found = fit.settings_that_fit(
        given.recipe, given.student, given.teachers, speed, given.dtype, args.density
    )
    return {} if found is None else found.changes


def six_arms(at: Setting) -> Found:
    """Six trained arms in one process leave nothing behind."""
    import torch

    words = ["--prompts", "2", "--new-tokens", "4", "--steps", "1", "--no-trl"]
    args = at.steps(TEXT, None, *words) if at.tiny else at.steps(f"{TEXT}@2", None, *words)

    def held() -> int:
        gc.collect()
        if at.cuda:
            return torch.cuda.memory_allocated()
        return sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.Tensor))

    after = []
    for _ in range(6):
        bench_opd_step.run_ours(args)
        after.append(held())
    growth = (after[-1] - after[1]) / 4
    numbers = {"MB after each": [round(each / 1e6, 1) for each in after]}
    if growth > max(1e6, 0.01 * after[1]):
        return numbers, [f"each arm leaves {growth / 1e6:.1f} MB"]
    return numbers, []


def offload(at: Setting) -> Found:
    """Three steps with the optimizer in host memory give the weights of three without."""
    import torch

    import vlopd

    words = ["--prompts", "2", "--new-tokens", "8", "--steps", "3", "--no-trl"]
    words += ["--learning-rate", "1e-3"]
    args = at.steps(TEXT, None, *words) if at.tiny else at.steps(f"{TEXT}@2", None, *words)
    weights, numbers = {}, {}
    for name in ("device", "host"):
        args.settings = [f"train.offload_optimizer={str(name == 'host').lower()}"]
        load = bench_opd_step.load_random
        pair = vlopd.load_pair(
            args.student, args.teacher, compute=at.precision, device=at.device, load=load
        )
        if at.cuda:
            torch.cuda.reset_peak_memory_stats()
        data = vlopd.load_data(args.data, question="question")
        trained = vlopd.distill(pair, data, bench_opd_step.recipe_of(args))
        weights[name] = {n: p.detach().cpu() for n, p in pair.student.model.named_parameters()}
        row = trained.metrics.iloc[-1]
        numbers[f"{name}: s"] = round(float(row["seconds"]), 3)
        del pair, trained
        gc.collect()
    both = ((weights["device"][n].float() - p.float()).abs() for n, p in weights["host"].items())
    off = max(float(each.max()) for each in both)
    numbers["largest difference"] = off
    # Adam's step is the rate at most; fused kernels of host and device round differently
    return numbers, [] if off <= 1e-4 else [f"weights differ by {off:.1e}"]


def served_teacher(at: Setting) -> Found:
    """A teacher in another process on the same device trains the weights that one here trains, to the bit."""
    import random_models
    import torch

    import vlopd
    from vlopd.models.save import save

    folders = {}
    for role, layers in (("student", 2), ("teacher", 3)):
        name = at.model(TEXT)
        loaded = random_models.make(name, torch.bfloat16, "cpu", None if at.tiny else layers)
        folders[role] = Path(at.work) / f"served-{role}"
        save(loaded, folders[role], "")
    words = ["--prompts", "4", "--new-tokens", "16", "--steps", "2", "--no-trl"]
    args = at.steps(TEXT, None, *words, "--learning-rate", "1e-3")
    weights, numbers = {}, {}
    for where in ("here", "served"):
        teacher: dict[str, Any] = {"model": str(folders["teacher"])}
        if where == "served":
            teacher["engine"] = {"type": "vlopd", "device": at.device}
        pair = vlopd.load_pair(
            str(folders["student"]), teacher, compute=at.precision, device=at.device
        )
        data = vlopd.load_data(args.data, question="question")
        trained = vlopd.distill(pair, data, bench_opd_step.recipe_of(args))
        weights[where] = {n: p.detach().cpu() for n, p in pair.student.model.named_parameters()}
        row = trained.metrics.iloc[-1]
        numbers[f"{where}: teacher s"] = round(float(row["teacher_seconds"]), 3)
        del pair, trained
        gc.collect()
    apart = [n for n, p in weights["here"].items() if not torch.equal(p, weights["served"][n])]
    return numbers, [f"{len(apart)} weights differ, such as {apart[0]}"] if apart else []


def out_of_memory(at: Setting) -> Found:
    """Training that does not fit ends in one line with the phase and settings that would fit."""
    import resource

    import torch

    from vlopd.errors import OutOfMemory

    words = ["--prompts", at.size(64, 512), "--new-tokens", at.size(256, 32), "--steps", "1"]
    args = at.steps(TEXT, None, *words, "--no-trl")
    if at.cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(24 * 2**30 / total)
    else:
        import vlopd.loop  # noqa: F401 - its libraries do not count

        now = bench_opd_step.resident("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (now + 300 * 2**20, resource.RLIM_INFINITY))
    try:
        bench_opd_step.run_ours(args)
    except OutOfMemory as error:
        line = str(error)
        numbers = {"phase": error.phase, "line": line}
        return numbers, [] if "\n" not in line and error.phase else [
            "the message has several lines"
        ]
    return {}, ["the training fitted; nothing was shown"]


@dataclass(frozen=True)
class Check:
    run: Callable[[Setting], Found]
    limit: float
    """Seconds at most on a GPU."""

    @property
    def claim(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


CHECKS = {
    "engines": Check(engines, 60),
    "decode": Check(decode, 45),
    "step": Check(step, 170),
    "image-dense": Check(image_dense, 150),
    "image-masked": Check(image_masked, 110),
    "six-arms": Check(six_arms, 40),
    "offload": Check(offload, 40),
    "served-teacher": Check(served_teacher, 60),
    "out-of-memory": Check(out_of_memory, 40),
}
"""In the order in which they run: what later ones rely on first."""


# ------------------------------------------------------------------------------------------- parent


def has_trl(python: str) -> bool:
    found = subprocess.run([python, "-c", "import trl"], capture_output=True)
    return found.returncode == 0


def run_check(name: str, at: Setting, limit: float) -> dict[str, Any]:
    """One check in its own process: status, seconds, numbers, problems."""
    asked = json.dumps(vars(at))
    command = [sys.executable, __file__, "--check", name, "--asked", asked]
    start = time.perf_counter()
    # its own group: a check has children too, which must not outlive its limit
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        problems = [f"did not end in {limit:.0f} s"]
        return {"status": "failed", "seconds": limit, "numbers": {}, "problems": problems}
    seconds = round(time.perf_counter() - start, 1)
    for line in out.splitlines():
        if line.startswith(MARK):
            numbers, problems = json.loads(line.removeprefix(MARK))
            status = "failed" if problems else "passed"
            return {"status": status, "seconds": seconds, "numbers": numbers, "problems": problems}
    said = [line for line in err.splitlines() if line.strip()] or ["said nothing"]
    problems = [f"exit code {process.returncode}: {said[-1][:300]}"]
    return {"status": "failed", "seconds": seconds, "numbers": {}, "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--tiny", action="store_true", help="tiny models; targets of time are not checked")
    add("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    add("--seconds", type=float, default=470, help="for all checks together")
    add("--cap-gib", type=float, default=78, help="GPU memory that a process may use")
    add("--trl", default=sys.executable, help="interpreter that has TRL")
    add("--work", default="/tmp/vlopd-gpu-check")
    add("--json", type=Path, help="default: docs/gpu-check.json on a GPU, nothing elsewhere")
    add("--check", choices=list(CHECKS), help=argparse.SUPPRESS)
    add("--asked", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        at = Setting(**json.loads(args.asked))
        bench_opd_step.cap_memory(at.cap_gib)
        print(MARK + json.dumps(CHECKS[args.check].run(at)), flush=True)
        os._exit(0)
    import torch
    import transformers

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu-check: torch finds no GPU here; --device cpu --tiny tests the checks")
    at = Setting(args.device, args.tiny, args.work, args.cap_gib, args.trl)
    card = torch.cuda.get_device_name() if at.cuda else "CPU, not a GPU"
    about = {
        "device": card,
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        if at.cuda
        else None,
        "capped_at_gib": args.cap_gib if at.cuda else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "tiny": args.tiny,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    start, results = time.perf_counter(), {}
    for name in args.only:
        left = args.seconds - (time.perf_counter() - start)
        if left < 15:
            found = {"status": "not run", "seconds": 0.0, "numbers": {}, "problems": []}
        else:
            found = run_check(name, at, min(left, CHECKS[name].limit if at.cuda else 150))
        results[name] = {"claim": CHECKS[name].claim, **found}
        print(f"{found['status']:8} {found['seconds']:6.1f} s  {name}: {CHECKS[name].claim}")
        for key, value in found["numbers"].items():
            print(f"{'':19}{key} {value}")
        for problem in found["problems"]:
            print(f"{'':19}! {problem}", flush=True)
    counts = [
        sum(r["status"] == s for r in results.values()) for s in ("passed", "failed", "not run")
    ]
    print(f"{card}: {counts[0]} passed, {counts[1]} failed, {counts[2]} not run")
    out = args.json or (ROOT / "docs" / "gpu-check.json" if at.cuda and not args.tiny else None)
    if out is not None:
        out.write_text(json.dumps({**about, "checks": results}, indent=1) + "\n")
    raise SystemExit(1 if counts[1] else 0)


def commit() -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
