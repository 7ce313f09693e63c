"""`vlopd mask`: makes, combines, shows and compares masks of a run, of any checkpoints, or mask files.

Heavy imports are inside the commands, so that `--help` returns at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from vlopd import pipeline
from vlopd.cli.common import (
    AllowOtherBase,
    Trust,
    console,
    print_artifact,
    print_plugin,
    refuse,
    say,
)
from vlopd.config.input import parse_override, value_of
from vlopd.config.masks import FunctionMask, MaskConfig
from vlopd.errors import ConfigError, RunError
from vlopd.files import write_json
from vlopd.run.folder import RunFolder

app = typer.Typer(no_args_is_help=True, help="Makes, combines, shows and compares masks.")
MaskFile = Annotated[Path, typer.Argument(help="mask file (*.safetensors)")]
Out = Annotated[Path, typer.Option(help="the mask file to write")]
Format = Literal["booleans", "indices", "shira"]
"""As vlopd.masks.foreign.Format, which needs torch."""


@app.command()
def make(
    base: Annotated[Path, typer.Argument(help="run folder, or the base checkpoint")],
    trained: Annotated[Path | None, typer.Argument(help="trained checkpoint")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--mask", help="only this mask of the run; repeatable")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="for checkpoints, as in a config: \"{type='visible', atol=1e-5}\"; `like` names a mask file"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="mask file to write, for checkpoints")] = None,
    allow_other_base: AllowOtherBase = False,
    trust: Trust = False,
) -> None:
    """Makes a run's masks from their rules, or one mask from any checkpoints."""
    from vlopd.run.arms import ArmOptions
    from vlopd.run.make import make_mask

    parsed = None
    if rule is not None:
        parsed = value_of(MaskConfig, parse_override(f"rule={rule}")["rule"], "--rule")
    is_run = (base / "run.json").is_file()
    if is_run:
        refuse(
            {"TRAINED": trained, "--rule": rule, "--out": out},
            f"{base} is a run, whose masks follow the rules of its config into {base}/masks; leave it out, or give "
            f"{base}/arms/NAME as checkpoints",
        )
    if is_run or (trained is None and rule is None and out is None):
        folder, config = RunFolder.open(base, trust=trust)
        for unknown in set(name or ()) - set(config.masks):
            raise ConfigError(
                f"--mask {unknown}: not in the config, which has {', '.join(config.masks)}"
            )
        for each in name or config.masks:
            for use in config.plugins_of_mask(each):
                print_plugin(use)
            made = make_mask(
                folder,
                config,
                each,
                ArmOptions(allow_other_base, choose=pipeline.choice_of(config)),
            )
            print_artifact(f"mask {each}", folder.mask(each), made)
        return
    if parsed is None or out is None:
        raise ConfigError('a mask of checkpoints needs --rule "{type=...}" and --out FILE')
    refuse(
        {"--mask": name, "--allow-other-base": allow_other_base},
        "is for the masks of a run; leave it out",
    )
    from vlopd.api import masks

    if isinstance(parsed, FunctionMask):
        print_plugin(parsed.use("--rule"))
    mask = masks.make_mask(parsed, base, trained)
    print_artifact("mask", mask.save(out), True)
    if mask.left_out:
        say("left out", mask.left_out, "yellow")


@app.command()
def combine(
    operation: Annotated[
        Literal["union", "intersection", "difference", "complement"],
        typer.Argument(help="difference: the first minus all others"),
    ],
    files: Annotated[list[Path], typer.Argument(help="mask files; one for complement")],
    out: Out,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Combines mask files by a set operation."""
    from vlopd.api.masks import make_mask

    is_complement = operation == "complement"
    if is_complement != (len(files) == 1):
        raise ConfigError(
            f"{operation} takes {'one file' if is_complement else 'two or more files'}"
        )
    names = [str(path) for path in files]
    rule = {"type": operation, **({"mask": names[0]} if is_complement else {"masks": names})}
    mask = make_mask(rule, allow_other_base=allow_other_base)
    print_artifact("mask", mask.save(out), True)


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="safetensors file of booleans or index lists, or the folder of a SHiRA adapter"
        ),
    ],
    base: Annotated[
        str, typer.Option(help="base checkpoint (folder, hub id, builtin:NAME), or run folder")
    ],
    out: Out,
    format: Annotated[
        Format | None, typer.Option(help="format of the source; detected by default")
    ] = None,
    ignore_unknown: Annotated[
        bool,
        typer.Option("--ignore-unknown", help="leave out names that the base lacks (recorded)"),
    ] = False,
) -> None:
    """Makes a mask file of a mask in another format (docs/masks.md)."""
    from vlopd.masks.files import save_mask
    from vlopd.masks.importing import import_mask
    from vlopd.models.parameter_names import classify

    found, inputs = import_mask(source, _base_folder(base), format, ignore_unknown)
    save_mask(out, found.mask, inputs, classify)
    print_artifact("mask", out, True)
    _print_left_out(found.summary())


@app.command("export")
def export_(
    file: MaskFile,
    format: Annotated[Format, typer.Option(help="format to write")],
    out: Annotated[Path, typer.Option(help="*.safetensors to write; for shira, a folder")],
    base: Annotated[
        str | None,
        typer.Option(help="for shira: the base checkpoint of the mask, or its run folder"),
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(
            help="for shira: the checkpoint whose update the adapter holds; zeros without"
        ),
    ] = None,
    linear_only: Annotated[
        bool,
        typer.Option("--linear-only", help="for shira: leave out what is not of linear layers"),
    ] = False,
) -> None:
    """Writes a mask file in another format (docs/masks.md)."""
    from vlopd.api.checkpoints import folder_of
    from vlopd.masks.exporting import export_mask

    folder = None if base is None else _base_folder(base)
    after = None if trained is None else folder_of(trained)
    lines = export_mask(file, out, format, folder, after, linear_only)
    print_artifact(f"mask as {format}", out, True)
    _print_left_out(lines)


def _base_folder(base: str) -> Path:
    """The folder of a checkpoint; of a run folder, its base's."""
    from vlopd.api.checkpoints import folder_of

    if (Path(base) / "run.json").is_file():
        folder, config = RunFolder.open(Path(base))
        return folder.checkpoint(config.base_arm)
    return folder_of(base)


def _print_left_out(lines: list[str]) -> None:
    for line in lines:
        say("left out", line, "yellow")


@app.command()
def show(file: MaskFile) -> None:
    """Shows a mask file: rule, origin, and density by component, module and layer."""
    from vlopd.masks.compare import densities_by, density
    from vlopd.masks.files import load_mask
    from vlopd.models.parameter_names import classify

    mask, about = load_mask(file)
    inputs = about["inputs"]
    origin = inputs.get("imported", inputs)
    rule = " ".join(f"{key}={value}" for key, value in inputs["rule"].items())
    count, total = sum(about["counts"].values()), sum(m.numel() for m in mask.values())
    lines = {
        "rule": rule,
        "coordinates": f"{count:,} of {total:,} ({density(mask):.4%})",
        "base": inputs["base"][:12],
        "of": inputs.get("of", "")[:12],
        "other base": ", ".join(inputs.get("other_base", {})),
        "files": ", ".join(
            f"{name} {digest[:12]}" for name, digest in origin.get("files", {}).items()
        ),
        "not in the file": _count_of(origin.get("unmentioned", ()), "parameters"),
        "ignored": _count_of(origin.get("ignored", ()), "names"),
        "digest": about["digest"][:12],
    }
    for key, value in lines.items():
        if value:
            say(key, value)

    def layer(name: str) -> str:
        where = classify(name)
        return f"{where.component} {where.layer:3d}" if where.layer is not None else "none"

    groups: dict[str, Callable[[str], str]] = {
        "component": lambda name: classify(name).component,
        "module": lambda name: classify(name).module,
        "layer": layer,
    }
    for title, label in groups.items():
        table = Table(title, "density")
        for group, its_density in densities_by(mask, label).items():
            table.add_row(group, f"{its_density:.4%}")
        console.print(table)


def _count_of(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}, as {names[0]}" if names else ""


@app.command()
def compare(
    a: MaskFile,
    b: MaskFile,
    base: Annotated[
        str | None,
        typer.Option(
            help="base checkpoint or run folder, for chance within quantiles of each tensor's |w|"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write, with values per tensor")
    ] = None,
) -> None:
    """Compares two masks: Jaccard index, coverage both ways and enrichment over chance; globally, by tensor, by |w|."""
    from vlopd.masks.compare import overlap, overlap_by_class, overlap_by_tensor, sum_overlaps
    from vlopd.masks.files import check_base, load_mask
    from vlopd.masks.rules import quantiles
    from vlopd.models.parameter_names import classify
    from vlopd.weights.delta import stream

    (mask_a, about_a), (mask_b, about_b) = load_mask(a), load_mask(b)
    try:
        tensors = overlap_by_tensor(mask_a, mask_b)
    except ValueError as error:
        raise RunError(
            f"{a} and {b}: {error}; of one model, make or import both for the same base (a run's masks: --base RUN)"
        ) from None
    rows = {
        "the whole model": overlap(mask_a, mask_b),
        "each tensor": sum_overlaps(tensors.values()),
    }
    if base is not None:
        folder = _base_folder(base)
        check_base(mask_a, folder)
        pairs = stream(folder, folder, classify)
        classes = ((pair.name, quantiles(pair.base)) for pair in pairs)
        rows["each tensor's quantiles of |w|"] = overlap_by_class(mask_a, mask_b, classes)
    table = Table(
        "chance is independence within", "Jaccard", "by chance", "A in B", "B in A", "enrichment"
    )
    for label, found in rows.items():
        numbers = (
            found.jaccard,
            found.expected_jaccard,
            found.coverage_of_a,
            found.coverage_of_b,
            found.enrichment,
        )
        table.add_row(label, *(f"{number:.4f}" for number in numbers))
    console.print(table)
    bases = {about["inputs"]["base"] for about in (about_a, about_b)}
    if len(bases) > 1:
        console.print("the masks are from different base checkpoints")
    if out is not None:
        content = {
            "a": {"file": str(a), "digest": about_a["digest"]},
            "b": {"file": str(b), "digest": about_b["digest"]},
            "same_base": len(bases) == 1,
            "overall": {label: found.row() for label, found in rows.items()},
            "tensors": {name: found.row() for name, found in tensors.items()},
        }
        write_json(out, content)
        print_artifact("comparison", out, True)
