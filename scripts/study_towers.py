"""Swaps vision towers between two arms, to locate the gain of training in the tower or in the rest of the model.

    python scripts/study_towers.py runs/quickstart            # base and full, a minute on two cores

Each of the four combinations captions the same shapes test images by its answers to `list top row` etc. Prints the
percentage of captions identical to the reference, with the standard error over images.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from evals import stats
from evals.harness import open_arm
from evals.vision.alignment import caption_by_rows
from vlopd.data.shapes import ShapesDataset
from vlopd.models.parameter_names import classify
from vlopd.run.folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--arms", nargs=2, default=["base", "full"])
    parser.add_argument("--pictures", type=int, default=500)
    args = parser.parse_args()
    run, config = RunFolder.open(args.run)
    world = list(ShapesDataset("test", args.pictures, 0))
    references = [str(example.fields["caption"]) for example in world]
    towers = {arm: tower(open_arm(run, config, arm).model) for arm in args.arms}
    print(f"{args.pictures} pictures; the rest of, with the tower of: exact match, %")
    for rest, vision in product(args.arms, args.arms):
        loaded = open_arm(run, config, rest)
        loaded.model.load_state_dict(towers[vision], strict=False)
        captions = caption_by_rows(loaded, [example.images[0] for example in world])
        right = [float(a == b) for a, b in zip(captions, references, strict=True)]
        found = stats.mean_with_error(right)
        print(f"{rest:12} {vision:12} {100 * found.mean:6.1f} +- {100 * found.standard_error:.1f}")


def tower(model):
    """The state dict of the vision tower, by the model's parameter names."""
    return {n: t for n, t in model.state_dict().items() if classify(n).component == "vision"}


if __name__ == "__main__":
    main()
