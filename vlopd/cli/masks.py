"""`vlopd mask`: makes, combines, shows and compares masks of a run, of any checkpoints, or mask files.

Heavy imports are inside the commands, so that `--help` returns at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from vlopd.cli.common import AllowOtherBase, console, print_artifact, refuse, say
from vlopd.config.input import parse_override
from vlopd.config.masks import FileMask, MaskConfig, RandomMask
from vlopd.digests import digest_checkpoint
from vlopd.errors import ConfigError, RunError
from vlopd.files import write_json
from vlopd.run.folder import RunFolder

if TYPE_CHECKING:
    from vlopd.masks.rules import Mask

app = typer.Typer(no_args_is_help=True, help="Makes, combines, shows and compares masks.")
MaskFile = Annotated[Path, typer.Argument(help="mask file (*.safetensors)")]
Out = Annotated[Path, typer.Option(help="the mask file to write")]


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
) -> None:
    """Makes a run's masks from their rules, or one mask from any checkpoints."""
    from vlopd.run.arms import ArmOptions
    from vlopd.run.make import make_mask

    parsed = None if rule is None else _parse_rule(rule)
    is_run = (base / "run.json").is_file()
    if is_run:
        refuse(
            {"TRAINED": trained, "--rule": rule, "--out": out},
            f"{base} is a run, whose masks follow the rules of its config into {base}/masks; leave it out, or give "
            f"{base}/arms/NAME as checkpoints",
        )
    if is_run or (trained is None and rule is None and out is None):
        folder, config = RunFolder.open(base)
        for unknown in set(name or ()) - set(config.masks):
            raise ConfigError(
                f"--mask {unknown}: not in the config, which has {', '.join(config.masks)}"
            )
        for each in name or config.masks:
            made = make_mask(folder, config, each, ArmOptions(allow_other_base))
            print_artifact(f"mask {each}", folder.mask(each), made)
        return
    if parsed is None or out is None:
        raise ConfigError('a mask of checkpoints needs --rule "{type=...}" and --out FILE')
    refuse(
        {"--mask": name, "--allow-other-base": allow_other_base},
        "is for the masks of a run; leave it out",
    )
    from vlopd.masks.files import load_mask, save_mask
    from vlopd.masks.rules import build_mask
    from vlopd.models.parameter_names import classify
    from vlopd.weights.checks import refuse_unlike_config
    from vlopd.weights.delta import stream

    named: dict[str, Mask] = {}
    inputs: dict[str, Any] = {"rule": parsed.model_dump(mode="json")}
    if isinstance(parsed, RandomMask):
        named[parsed.like], like = load_mask(Path(parsed.like))
        _check_base(base, named[parsed.like])
        inputs["like"] = like["digest"]
    elif parsed.combines or isinstance(parsed, FileMask):
        raise ConfigError(
            f"a mask of type {parsed.type!r} is made from masks, not checkpoints; use `vlopd mask combine`"
        )
    if parsed.reads is not None and trained is None:
        raise ConfigError(f"a mask of type {parsed.type!r} reads the update; give BASE and TRAINED")
    for path in (base, *([trained] if trained is not None else [])):
        refuse_unlike_config(path)
    inputs["base"] = digest_checkpoint(base, whole=True)
    if trained is not None:
        inputs["of"] = digest_checkpoint(trained, whole=True)
    deltas = stream(base, trained or base, classify)
    left_out = deltas.report.summary() if parsed.reads is not None else ""
    if left_out:
        inputs["left_out"] = [its.name for its in deltas.report.left_out]
    mask = build_mask(parsed, deltas, named)
    save_mask(out, mask, inputs, classify)
    print_artifact("mask", out, True)
    if left_out:
        say("left out", left_out, "yellow")


def _parse_rule(text: str) -> MaskConfig:
    from pydantic import TypeAdapter, ValidationError

    from vlopd.config.explain import explain_errors

    try:
        return TypeAdapter(MaskConfig).validate_python(parse_override(f"rule={text}")["rule"])
    except ValidationError as error:
        raise ConfigError(f"--rule: {explain_errors(error, MaskConfig)}") from None


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
    from vlopd.config.masks import ComplementMask
    from vlopd.masks.files import load_mask, save_mask
    from vlopd.masks.rules import build_mask, combine
    from vlopd.models.parameter_names import classify

    if (operation == "complement") != (len(files) == 1):
        raise ConfigError(
            f"{operation} takes {'one file' if operation == 'complement' else 'two or more files'}"
        )
    loaded = [load_mask(path) for path in files]
    first = loaded[0][1]["inputs"]["base"]
    foreign: dict[str, str] = {}
    for path, (_, about) in zip(files, loaded, strict=True):
        its = about["inputs"]["base"]
        if its != first:
            if not allow_other_base:
                raise RunError(
                    f"{path} was made from base checkpoint {its[:12]}, {files[0]} from {first[:12]}; "
                    "pass --allow-other-base (recorded in every later artifact)"
                )
            foreign[str(path)] = its
        foreign |= about["inputs"].get("other_base", {})
    try:
        if operation == "complement":
            rule = ComplementMask(mask="mask")
            mask = build_mask(rule, masks={"mask": loaded[0][0]})
        else:
            mask = combine(operation, [mask for mask, _ in loaded])
    except ValueError as error:
        raise RunError(f"{', '.join(map(str, files))}: {error}") from None
    inputs: dict[str, Any] = {
        "rule": {"type": operation, "files": [str(path) for path in files]},
        "base": first,
        "masks": {str(p): about["digest"] for p, (_, about) in zip(files, loaded, strict=True)},
    }
    save_mask(out, mask, inputs | ({"other_base": foreign} if foreign else {}), classify)
    print_artifact("mask", out, True)


@app.command()
def show(file: MaskFile) -> None:
    """Shows a mask file: rule, origin, and density by component, module and layer."""
    from vlopd.masks.compare import densities_by, density
    from vlopd.masks.files import load_mask
    from vlopd.models.parameter_names import classify

    mask, about = load_mask(file)
    inputs = about["inputs"]
    rule = " ".join(f"{key}={value}" for key, value in inputs["rule"].items())
    count, total = sum(about["counts"].values()), sum(m.numel() for m in mask.values())
    lines = {
        "rule": rule,
        "coordinates": f"{count:,} of {total:,} ({density(mask):.4%})",
        "base": inputs["base"][:12],
        "of": inputs.get("of", "")[:12],
        "other base": ", ".join(inputs.get("other_base", {})),
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


@app.command()
def compare(
    a: MaskFile,
    b: MaskFile,
    base: Annotated[
        Path | None,
        typer.Option(help="base checkpoint, for chance within quantiles of each tensor's |w|"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write, with values per tensor")
    ] = None,
) -> None:
    """Compares two masks: Jaccard index, coverage both ways and enrichment over chance; globally, by tensor, by |w|."""
    from vlopd.masks.compare import overlap, overlap_by_class, overlap_by_tensor, sum_overlaps
    from vlopd.masks.files import load_mask
    from vlopd.masks.rules import quantiles
    from vlopd.models.parameter_names import classify
    from vlopd.weights.delta import stream

    (mask_a, about_a), (mask_b, about_b) = load_mask(a), load_mask(b)
    try:
        tensors = overlap_by_tensor(mask_a, mask_b)
    except ValueError as error:
        raise RunError(f"{a} and {b}: {error}") from None
    rows = {
        "the whole model": overlap(mask_a, mask_b),
        "each tensor": sum_overlaps(tensors.values()),
    }
    if base is not None:
        _check_base(base, mask_a)
        pairs = stream(base, base, classify)
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


def _check_base(base: Path, mask: Mask) -> None:
    """Raises RunError for a checkpoint whose tensors do not match the mask."""
    from vlopd.masks.files import check_shapes
    from vlopd.weights.reader import Weights

    with Weights(base) as weights:
        shapes = {n: weights.shape(n) for n in weights.names() if weights.is_parameter(n)}
    try:
        check_shapes(mask, shapes)
    except RunError as error:
        raise RunError(f"{base}: {error}") from None
