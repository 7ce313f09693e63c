"""On-policy distillation of language and vision-language models, and what it does to the weights.

    config = vlopd.load_config("mine.toml")            the settings of an experiment
    vlopd.Run("mine.toml").run()                       the whole experiment, in a run folder
    pair = vlopd.load_pair(student, teacher)           or step by step:
    data = vlopd.load_data("train.jsonl", question="problem", answer="solution")
    full = vlopd.distill(pair, data, vlopd.Recipe(train={"steps": 200}))
    vlopd.delta(student, full).frame
    mask = vlopd.make_mask({"type": "top_fraction", "fraction": 0.05}, student, full)
    vlopd.geometry(student, full).plot()
    vlopd.evaluate(full, ["gsm8k"]).scores
    vlopd.compare({"base": student, "full": full}, ["gsm8k"]).contrasts
    vlopd.paper("runs/paper")["main"]

Names load on first use: `import vlopd` alone imports neither torch nor pandas. Errors that a user can fix are
UserErrors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlopd.api.compare import compare, evaluate
    from vlopd.api.data import load_data
    from vlopd.api.delta import delta
    from vlopd.api.geometry import geometry
    from vlopd.api.masks import make_mask
    from vlopd.api.paper import paper
    from vlopd.api.run import Run
    from vlopd.config.input import load_config
    from vlopd.config.recipe import Recipe
    from vlopd.errors import UserError
    from vlopd.loop import distill
    from vlopd.train.pair import load_pair

    __version__: str

_MODULES = {
    "load_config": "vlopd.config.input",
    "Recipe": "vlopd.config.recipe",
    "load_pair": "vlopd.train.pair",
    "load_data": "vlopd.api.data",
    "distill": "vlopd.loop",
    "delta": "vlopd.api.delta",
    "make_mask": "vlopd.api.masks",
    "geometry": "vlopd.api.geometry",
    "evaluate": "vlopd.api.compare",
    "compare": "vlopd.api.compare",
    "paper": "vlopd.api.paper",
    "Run": "vlopd.api.run",
    "UserError": "vlopd.errors",
}
"""The module of each public name."""

__all__ = [
    "Recipe",
    "Run",
    "UserError",
    "compare",
    "delta",
    "distill",
    "evaluate",
    "geometry",
    "load_config",
    "load_data",
    "load_pair",
    "make_mask",
    "paper",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vlopd")
    if name not in _MODULES:
        raise AttributeError(f"module 'vlopd' has no attribute {name!r}")
    found = vars(import_module(_MODULES[name]))[name]
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    own = {name for name in globals() if name.startswith("__")}
    return sorted({*own, *__all__, "__version__"})
