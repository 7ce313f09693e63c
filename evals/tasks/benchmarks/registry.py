"""All published benchmarks by name, from the modules that read and score them."""

from evals.tasks.benchmarks import mathematics, perception, vision, visual_mathematics
from evals.tasks.benchmarks.documents import Benchmark

MODULES = (mathematics, vision, perception, visual_mathematics)
BENCHMARKS: dict[str, Benchmark] = {
    name: each for module in MODULES for name, each in module.BENCHMARKS.items()
}
