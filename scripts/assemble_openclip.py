"""Assembles an OpenCLIP student: a vision tower, a new projector, a causal language model.

    python scripts/assemble_openclip.py ViT-B-32 HuggingFaceTB/SmolLM2-135M-Instruct students/clip-smollm2 \
        --pretrained laion2b_s34b_b79k

VISION is an open_clip name, `local-dir:FOLDER` or `hf-hub:ID`; LANGUAGE a hub id, a folder or `builtin:NAME`.
The output folder is used as a model: `student = "students/clip-smollm2"`. Its projector is random: distil with
`train.freeze = ["vision", "language", "embedding", "head"]` first, or train all of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlopd.errors import UserError
from vlopd.files import whole_folder
from vlopd.models.loaded import LoadedModel
from vlopd.models.openclip.assemble import assemble
from vlopd.models.save import save


def main(
    vision: str,
    language: str,
    out: Path,
    pretrained: Annotated[str | None, typer.Option(help="tag, or a .safetensors file")] = None,
    seed: Annotated[int, typer.Option(help="of the projector")] = 0,
    vision_layer: Annotated[
        int | None, typer.Option(help="block; the tower's output if not given")
    ] = None,
) -> None:
    """Assembles and saves the model, and prints its size."""
    if out.exists():
        sys.exit(f"{out} is there already; name another folder")
    try:
        model, processor = assemble(
            vision, language, pretrained=pretrained, seed=seed, vision_layer=vision_layer
        )
    except UserError as error:
        sys.exit(str(error))
    tower = f"{vision} ({pretrained or 'random weights'})"
    card = f"# {out.name}\n\n{tower}, a new projector (seed {seed}), {language}.\n"
    with whole_folder(out) as folder:
        save(LoadedModel(str(out), model, processor), folder, card)
    tokens = model.config.image_seq_length
    print(f"{out}: {model.num_parameters():,} parameters, {tokens} tokens per image")


if __name__ == "__main__":
    typer.run(main)
