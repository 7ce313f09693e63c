"""Benchmarks a training step of `vlopd.distill` against TRL's `DistillationTrainer`: same models, prompts, loss.

    python scripts/bench_opd_step.py --make-venv /tmp/trl                      # TRL beside this environment's packages
    python scripts/bench_opd_step.py --trl /tmp/trl/bin/python                 # SmolLM2, 24 of 30 layers from 30, fp32
    python scripts/bench_opd_step.py --trl /tmp/trl/bin/python --image         # the built-in vision-language pair
    python scripts/bench_opd_step.py --device cuda --precision bf16 --completions 2 --new-tokens 256 \
        --student random:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --micro-batch 8 --set 'rollout.engine="graphs"'

Without --trl this interpreter has to have TRL. Models are names or folders that `load_pair` takes, or random:NAME or
random:NAME@LAYERS: an architecture (a name of scripts/random_models.py, or a folder with a config.json) with random
weights, made in the process that trains it, and a byte tokenizer; it never stops early. The loss is the reverse KL
(beta = 1.0 of TRL), the optimizer AdamW, completions are the student's at temperature 1.

--precision, ours and TRL's: fp32; bf16 (TRL: fp32 weights and autocast; ours: bf16 weights beside fp32 values);
bf16-weights (TRL: no fp32 values, so its updates below bf16's resolution are lost; ours as with bf16).

Every measurement is a child process; ours and TRL's alternate, --rounds times. The first step of each is not counted.
Seconds are of whole steps; CPU seconds are the process's over all threads, which a loaded machine distorts least.
Memory is, on a GPU, the allocator's peak; on a CPU, the peak resident size of the process, and its growth over the
resident size with both models loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resident import resident

TRL = "trl==1.16.0"
MARK = "RESULT "
ROOT = Path(__file__).parents[1]
WORDS = ("harbour", "lantern", "winter", "garden", "market", "bridge", "letter", "clock")


# ------------------------------------------------------------------------------------------- data


def write_data(folder: Path, rows: int, pixels: int | None) -> Path:
    """Prompts that ask for long answers, with a noise picture each if `pixels`: a .jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lines = []
    for i in range(rows):
        words = ", ".join(rng.sample(WORDS, 4))
        row = {"id": str(i), "question": f"Tell me a long story with many details about: {words}."}
        if pixels:
            from PIL import Image

            row["image"] = str(folder / f"{i % 8}.png")
            if i < 8:
                Image.effect_noise((pixels, pixels), 60).convert("RGB").save(row["image"])
        lines.append(json.dumps(row) + "\n")
    path = folder / "train.jsonl"
    path.write_text("".join(lines))
    return path


# ------------------------------------------------------------------------------------------- children


def cap_memory(gib: float | None) -> None:
    """Limits this process's share of a larger GPU."""
    import torch

    if gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


class Memory:
    """Bytes of this process, from `loaded` on: with both models in memory and nothing else.

    On a GPU the allocator's peaks are read before each reset, since the training loop resets them at every phase.
    """

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.most: dict[str, int] = {}

    def loaded(self) -> None:
        if not self.cuda:
            self.start = resident("VmRSS")
            return
        import torch

        self.start = torch.cuda.memory_allocated()
        self.reset = torch.cuda.reset_peak_memory_stats
        self.reset()
        torch.cuda.reset_peak_memory_stats = self.note

    def note(self, *device: Any) -> None:
        """Takes the place of torch.cuda.reset_peak_memory_stats."""
        import torch

        for key, peak in (
            ("peak_bytes", torch.cuda.max_memory_allocated()),
            ("reserved_bytes", torch.cuda.max_memory_reserved()),
        ):
            self.most[key] = max(peak, self.most.get(key, 0))
        self.reset(*device)

    def peaks(self) -> dict[str, int]:
        if self.cuda:
            self.note()
        else:
            self.most["peak_bytes"] = resident("VmHWM")
        return {**self.most, "over_models_bytes": self.most["peak_bytes"] - self.start}


def is_random(folder: str) -> bool:
    """Whether the folder is one of `make_folder`, without weights."""
    return Path(folder).is_dir() and not list(Path(folder).glob("*.safetensors*"))


def make_folder(architecture: str, folder: Path) -> Path:
    """Config and processor of a random model, NAME or NAME@LAYERS; its weights are made where it trains."""
    import random_models
    from transformers import GenerationConfig

    name, _, layers = architecture.partition("@")
    config = random_models.read_config(name, int(layers) if layers else None)
    processor = random_models.make_processor(config)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    GenerationConfig(**ends).save_pretrained(folder)
    return folder


def load_random(config: Any, dtype: Any, device: Any = "cpu", folder: Any = None) -> Any:
    """In place of `load_configured`: a model with random weights. Student and teacher differ."""
    import random_models

    name = str(folder or config.model)
    return random_models.make(name, dtype, device, seed=int(name.endswith("teacher")))


def recipe_of(args: argparse.Namespace) -> Any:
    """Our recipe, with the settings of --set."""
    from vlopd.config.input import parse_override
    from vlopd.config.recipe import Recipe

    tables: dict[str, Any] = {
        "rollout": {
            "max_new_tokens": args.new_tokens,
            "completions_per_prompt": args.completions,
        },
        "loss": {"type": "reverse_kl"},
        "optim": {"type": "adamw", "learning_rate": args.learning_rate},
        "train": {
            "steps": args.steps,
            "prompts_per_step": args.prompts,
            "micro_batch": args.micro_batch,
            "sample_every": 1000,
        },
    }
    for each in args.settings:
        for section, values in parse_override(each).items():
            tables.setdefault(section, {}).update(values)
    return Recipe(**tables)


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of `distill` in this process."""
    import vlopd
    import vlopd.loop
    from vlopd.train.log import Stopwatch

    class CpuStopwatch(Stopwatch):
        """Seconds, and the process's CPU seconds."""

        def __init__(self, *rest: Any) -> None:
            super().__init__(*rest)
            self.cpu = time.process_time()

        def seconds(self, tokens: int) -> dict[str, float]:
            return {**super().seconds(tokens), "cpu_seconds": time.process_time() - self.cpu}

    if vlopd.loop.Stopwatch is Stopwatch:  # a profiler has its own
        vlopd.loop.Stopwatch = CpuStopwatch  # type: ignore[misc]
    cuda = args.device == "cuda"
    compute = "fp32" if args.precision == "fp32" else "bf16"
    image = {"image": "image"} if args.image else {}
    memory = Memory(cuda)
    load = {"load": load_random} if is_random(args.student) else {}
    pair = vlopd.load_pair(
        args.student, args.teacher, compute=compute, device=args.device, images=args.image, **load
    )
    mask = random_mask(pair.student.model, args.density)
    memory.loaded()
    data = vlopd.load_data(args.data, question="question", **image)
    trained = vlopd.distill(pair, data, recipe_of(args), seed=1, mask=mask)
    with open(trained.out / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return {
        "steps": [
            {
                "seconds": row["seconds"],
                "cpu_seconds": row.get("cpu_seconds", 0.0),
                "tokens": row["completion_tokens"],
                "loss": row["loss"],
                "phases": {
                    name.removesuffix("_seconds"): value
                    for name, value in row.items()
                    if name.endswith("_seconds") and name != "cpu_seconds"
                },
            }
            for row in rows
        ],
        **memory.peaks(),
    }


def random_mask(model: Any, density: float) -> dict[str, Any] | None:
    """A random mask of that density in each tensor; None trains all."""
    if density >= 1:
        return None
    import torch

    torch.manual_seed(0)
    return {
        name: (torch.rand(p.shape, device=p.device) < density).cpu()
        for name, p in model.named_parameters()
    }


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of TRL's trainer in this process."""
    import random_models
    import torch
    import transformers as hf
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from trl import DistillationConfig, DistillationTrainer

    cuda = args.device == "cuda"
    per_step = args.prompts * args.completions
    micro = args.trl_micro_batch or args.micro_batch or per_step
    with open(args.data) as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows for _ in range(args.completions)][: per_step * args.steps]
    content = [{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows]
    if args.image:
        content = [{**each, "image": row["image"]} for each, row in zip(content, rows, strict=True)]
    data = Dataset.from_list(content)
    if args.image:
        data = data.cast_column("image", ImageColumn())
    cls = hf.AutoModelForImageTextToText if args.image else hf.AutoModelForCausalLM
    processor = (hf.AutoProcessor if args.image else hf.AutoTokenizer).from_pretrained(args.student)
    (processor.tokenizer if args.image else processor).padding_side = "left"
    low = torch.float32 if args.precision == "fp32" else torch.bfloat16
    own = torch.bfloat16 if args.precision == "bf16-weights" else torch.float32
    memory = Memory(cuda)
    student, teacher = (
        random_models.make(name, dtype, args.device, seed=seed).model
        if is_random(name)
        else cls.from_pretrained(name, dtype=dtype).to(args.device)
        for seed, (name, dtype) in enumerate(((args.student, own), (args.teacher, low)))
    )
    memory.loaded()
    steps: list[dict[str, Any]] = []

    def synchronize() -> None:
        if cuda:
            torch.cuda.synchronize()

    class Clock(hf.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.wall, self.cpu = time.perf_counter(), time.process_time()
            self.sampling, self.tokens = 0.0, 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            seconds = time.perf_counter() - self.wall
            phases = {"rollout": self.sampling, "rest": seconds - self.sampling}
            cpu = time.process_time() - self.cpu
            steps.append(
                {"seconds": seconds, "cpu_seconds": cpu, "tokens": self.tokens, "phases": phases}
            )

    clock = Clock()

    class Timed(DistillationTrainer):
        def _generate_single_turn(self, *args: Any, **named: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            out = super()._generate_single_turn(*args, **named)
            synchronize()
            clock.sampling += time.perf_counter() - start
            clock.tokens += sum(map(len, out))
            return out

    config = DistillationConfig(
        output_dir=str(Path(args.work) / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_step // micro,
        max_steps=args.steps,
        max_completion_length=args.new_tokens,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        beta=1.0,
        temperature=1.0,
        bf16=args.precision == "bf16",
        gradient_checkpointing=args.trl_checkpointing,
        use_cpu=not cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Timed(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=processor,
        train_dataset=data,
        callbacks=[clock],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    for step, loss in zip(steps, losses, strict=False):
        step["loss"] = loss
    return {"steps": steps, **memory.peaks()}


CHILDREN = {"ours": run_ours, "trl": run_trl}


# ------------------------------------------------------------------------------------------- parent


def make_venv(folder: Path) -> Path:
    """An environment with TRL that reads all other packages from this one; returns its interpreter."""
    import sysconfig

    venv.create(folder, with_pip=False)
    found = next((folder / "lib").glob("python*/site-packages"))
    (found / "host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(found)]
    subprocess.run([*install, TRL], check=True)
    return folder / "bin" / "python"


def run_child(
    name: str, args: argparse.Namespace, precision: str, python: str, limit: float
) -> dict[str, Any]:
    """One measurement in its own process. A failure is {"error": last line of its output}."""
    asked = json.dumps({**vars(args), "precision": precision})
    command = [python, __file__, "--child", name, "--asked", asked]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        out = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not end in {limit:.0f} s"}
    for line in out.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    said = [line for line in out.stderr.splitlines() if line.strip()] or ["said nothing"]
    if args.verbose:
        print(out.stderr, file=sys.stderr)
    return {"error": f"exit code {out.returncode}: {said[-1][:300]}"}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians and minima over the counted steps of several processes, and the largest peak."""
    good = [run for run in runs if "error" not in run]
    if not good:
        return {"error": runs[-1]["error"] if runs else "not run"}
    steps = [step for run in good for step in run["steps"][1:]]
    names = steps[0]["phases"]
    tokens = sum(step["tokens"] for step in steps)
    return {
        "steps": len(steps),
        "seconds": statistics.median(step["seconds"] for step in steps),
        "seconds_min": min(step["seconds"] for step in steps),
        "cpu_seconds": statistics.median(step["cpu_seconds"] for step in steps),
        "phases": {n: statistics.median(step["phases"][n] for step in steps) for n in names},
        "tokens_per_step": tokens / len(steps),
        "tokens_per_second": tokens / sum(step["seconds"] for step in steps),
        "loss": statistics.fmean(step["loss"] for step in steps),
        "first_step_seconds": statistics.median(run["steps"][0]["seconds"] for run in good),
        **{
            key: max(run[key] for run in good)
            for key in ("peak_bytes", "over_models_bytes", "reserved_bytes")
            if key in good[0]
        },
    }


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs; seconds also a sampled token, since lengths differ where models stop."""
    if "error" in ours or "error" in theirs:
        return {}
    keys = ("seconds", "seconds_min", "cpu_seconds", "peak_bytes", "over_models_bytes")
    each = {key: ours[key] / theirs[key] for key in keys}
    a_token = theirs["tokens_per_second"] / ours["tokens_per_second"]
    return {**each, "seconds_per_token": a_token}


def print_table(found: dict[str, Any]) -> None:
    titles = {"seconds": 1, "seconds_min": 1, "cpu_seconds": 1, "first_step_seconds": 1}
    titles |= {"tokens_per_step": 1, "tokens_per_second": 1, "loss": 1}
    titles |= {"peak_bytes": 1e9, "over_models_bytes": 1e9, "reserved_bytes": 1e9}
    print(found["what"])
    names = list(found["runs"])
    print(f"{'':28}" + "".join(f"{name:>20}" for name in names))
    for key, unit in titles.items():
        values = [found["runs"][name].get(key) for name in names]
        if any(value is not None for value in values):
            title = key.replace("bytes", "GB") if unit != 1 else key
            cells = ("-" if value is None else f"{value / unit:.3f}" for value in values)
            print(f"{title:28}" + "".join(f"{cell:>20}" for cell in cells))
    for name in names:
        run = found["runs"][name]
        if "error" in run:
            print(f"{name}: FAILED, {run['error']}")
        else:
            print(f"{name}: " + ", ".join(f"{k} {v:.2f} s" for k, v in run["phases"].items()))
    for name, values in found["ratios"].items():
        print(f"ours / {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))


def prepare(args: argparse.Namespace) -> None:
    """Writes the data and makes random models; `args` then have their folders."""
    from vlopd.models.load import resolve

    work = Path(args.work)
    args.data = str(
        write_data(work / "data", args.prompts * args.steps, args.pixels if args.image else None)
    )
    for side in ("student", "teacher"):
        spec = getattr(args, side)
        if spec.startswith("random:"):
            name = spec.removeprefix("random:")
            spec = str(make_folder(name, work / f"{name.replace('/', '--').strip('-')}-{side}"))
        setattr(args, side, resolve(spec))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All children in turn; the result as it is printed and written."""
    import torch

    prepare(args)
    sides = {"ours": ("ours", "bf16" if args.precision != "fp32" else "fp32", sys.executable)}
    modes = ["fp32"] if args.precision == "fp32" else ["bf16", "bf16-weights"]
    if args.precision == "bf16-weights":
        modes = ["bf16-weights"]
    for mode in modes if not args.no_trl else ():
        sides[f"TRL {mode}"] = ("trl", mode, args.trl)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (child, precision, python) in sides.items():
            run = run_child(child, args, precision, python, args.limit)
            runs[name].append(run)
            own = run.get("error") or [round(step["seconds"], 2) for step in run["steps"]]
            print(f"{name}: {own}", file=sys.stderr, flush=True)
    summaries = {name: summary(each) for name, each in runs.items()}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    what = (
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}: {Path(args.student).name} from "
        f"{Path(args.teacher).name}, {args.prompts} prompts x {args.completions} x {args.new_tokens} tokens, "
        f"micro-batch {args.micro_batch or 'all'}, {args.precision}, density {args.density}"
        + (f", {args.settings}" if args.settings else "")
    )
    others = [name for name in sides if name != "ours"]
    return {
        "what": what,
        "device": device,
        "arguments": vars(args),
        "runs": summaries,
        "ratios": {name: ratios(summaries["ours"], summaries[name]) for name in others},
        "raw": runs,
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--student",
        help="model; default: builtin:smollm2-24l, or with --image builtin:shapes-student",
    )
    add(
        "--teacher",
        help="model; default: builtin:smollm2 or builtin:shapes-teacher, else the student",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=["fp32", "bf16", "bf16-weights"], default="fp32")
    add("--image", action="store_true", help="a picture a prompt")
    add("--pixels", type=int, default=448, help="width and height of the pictures")
    add("--prompts", type=int, default=16, help="prompts a step")
    add("--completions", type=int, default=1, help="completions a prompt")
    add("--new-tokens", type=int, default=48, help="tokens of a completion at most")
    add("--micro-batch", type=int, help="completions of a forward and backward pass; default: all")
    add("--trl-micro-batch", type=int, help="the same of TRL; default: as --micro-batch")
    add("--trl-checkpointing", action="store_true", help="TRL recomputes activations")
    add("--density", type=float, default=1.0, help="of a random mask of ours; TRL trains all")
    add("--learning-rate", type=float, default=1e-6)
    add("--steps", type=int, default=3, help="steps of each process; the first is not counted")
    add("--rounds", type=int, default=2, help="processes of each side")
    add("--limit", type=float, default=600, help="seconds of a child process at most")
    add("--cap-gib", type=float, help="GPU memory that a process may use")
    add("--set", dest="settings", action="append", default=[], help="a setting of ours, KEY=VALUE")
    add("--trl", default=sys.executable, help="interpreter that has TRL")
    add("--no-trl", action="store_true", help="ours alone")
    add("--make-venv", type=Path, help="make an environment with TRL there, and stop")
    add("--work", default="/tmp/bench-opd-step", help="folder for data and random models")
    add("--json", type=Path, help="file for the result")
    add("--verbose", action="store_true", help="print what failed children said")
    add("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    add("--asked", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.asked:
        return argparse.Namespace(**{**json.loads(args.asked), "child": args.child})
    if args.student is None:
        args.student = "builtin:shapes-student" if args.image else "builtin:smollm2-24l"
        default = "builtin:shapes-teacher" if args.image else "builtin:smollm2"
        args.teacher = args.teacher or default
    args.teacher = args.teacher or args.student
    return args


def main() -> None:
    args = parse()
    if args.child:
        cap_memory(args.cap_gib)
        print(MARK + json.dumps(CHILDREN[args.child](args)), flush=True)
        os._exit(0)  # no time for the interpreter's end
    if args.make_venv:
        print(make_venv(args.make_venv))
        return
    args.json = str(args.json) if args.json else None
    args.make_venv = None
    found = measure(args)
    print_table(found)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
