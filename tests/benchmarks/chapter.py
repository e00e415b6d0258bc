"""Run a chapter at `quick` as a plain script, or count what its training at a protocol would be.

``python -m tests.benchmarks.chapter NAME [PROTOCOL]`` prints JSON: processor seconds and the most
bytes held, in a process of its own; or the operations of all networks, of which none is trained.
"""

import contextlib
import json
import runpy
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import nbformat

from book import campaign
from tests.benchmarks.memory import resident


def quick(notebook: Path) -> dict[str, float]:
    """All code cells, those that only show included, as a reader would run them."""
    cells = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    matplotlib.use("Agg")
    start = time.process_time()  # of all threads: others on the machine do not count
    with TemporaryDirectory() as folder, contextlib.chdir(notebook.parent):
        script = Path(folder, f"{notebook.stem}.py")
        script.write_text("\n\n".join(cells), encoding="utf-8")
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(str(script), run_name="__main__")
    return {"seconds": time.process_time() - start, "bytes": resident("VmHWM")}


def counted(chapter: str, protocol: str) -> dict[str, float]:
    with contextlib.redirect_stdout(sys.stderr):
        units = campaign.units(chapter, "mnist", protocol, [0], campaign._data())
    return {"operations": sum(units.values())}


if __name__ == "__main__":
    name, *protocol = sys.argv[1:]
    found = counted(name, *protocol) if protocol else quick(campaign.CHAPTERS / f"{name}.ipynb")
    print(json.dumps(found))
