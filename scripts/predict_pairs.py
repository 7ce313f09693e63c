"""Writes the predicted memory and time of one H100 into the comments of configs/pairs; nothing is run on one.

    python scripts/predict_pairs.py [FILE ...]

The line is that of `vlopd check FILE --meta --device-like CARD`, for dense training with the file's settings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from vlopd.config.input import load_config
from vlopd.preflight.pair import preflight_meta

PAIRS = Path(__file__).parents[1] / "configs" / "pairs"
LINE = re.compile(r"^# Predicted for one (\w+), not measured: .*$", re.MULTILINE)


def predicted(path: Path, card: str) -> str:
    """The comment of a pair: peak memory of the card's, seconds a step, hours, completions at once."""
    config = load_config(path)
    rows = preflight_meta(config, torch.device("cpu"), PAIRS / "architectures", card)
    values = {row.what: row.values[0] for row in rows}
    start = f"# Predicted for one {card.upper()}, not measured: "
    if "memory and time" in values:
        return start + "nothing; this family's forward pass needs values"
    peak = values["memory, all coordinates"].split(" (")[0].replace(", fits", "")
    limit = values["device, as published"].split(": ")[1].split(" for")[0]
    seconds = values["seconds a step"].split(" (")[0].removeprefix("about ")
    hours = values["hours of training"].split(" (")[0].removeprefix("about ")
    at_once = values["completions at once"]
    return f"{start}{peak} of {limit}, {seconds} s a step, {hours} h; at once: {at_once}"


def main(paths: list[Path]) -> None:
    for path in paths:
        text = path.read_text()
        if found := LINE.search(text):
            path.write_text(LINE.sub(predicted(path, found[1].lower()), text))
            print(path.stem, LINE.search(path.read_text())[0], sep=": ")  # type: ignore[index]


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(PAIRS.glob("*.toml")))
