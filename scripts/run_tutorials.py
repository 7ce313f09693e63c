"""Executes the tutorials at their full size (about five minutes on two cores) and saves them with their outputs.

    .venv/bin/python scripts/run_tutorials.py [NAME ...]

The site shows the outputs: tables, pictures and printed text; progress bars and warnings are left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def execute(path: Path) -> None:
    """Executes one notebook in an empty folder, and writes it back."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=1800, resources={"metadata": {"path": folder}}, record_timing=False
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [its for its in cell.outputs if its.get("name") != "stderr"]
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
                for kind in ("image/png", "image/svg+xml", "text/html"):
                    if kind in output.get("data", {}):  # the richest form alone
                        output.data = {kind: output.data[kind]}
                        break
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            print(f"{path.stem}: running", flush=True)
            execute(path)
            print(f"{path.stem}: {path.stat().st_size / 1024:.0f} kB")
