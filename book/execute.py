"""Run the notebooks in place at their default parameters: what `make execute` does.

What is committed is what a reader would get: outputs kept, and nothing that differs from one
run to the next for no reason (progress bars, time stamps, random cell ids).
Then the notebooks that readers open are made from them (`book.colab`).
Name notebooks to run only these: `python -m book.execute PATH`.
"""

import base64
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbformat import NotebookNode

from book import colab
from book.build import ROOT, notebooks, run
from book.colab import unused_id
from book.pairs import FORMATS, in_step

KEPT = ("accelerator", "colab", "jupytext", "kernelspec")
KEPT_OF_CELLS = ("mystnb", "nbgrader", "tags")


def clean(notebook: NotebookNode) -> NotebookNode:
    """Drop progress bars and volatile metadata; name each cell after its source."""
    kept = {key: value for key, value in notebook.metadata.items() if key in KEPT}
    notebook.metadata = NotebookNode(kept | {"language_info": {"name": "python"}})
    taken: set[str] = set()
    for cell in notebook.cells:
        cell.metadata = NotebookNode(
            {key: cell.metadata[key] for key in KEPT_OF_CELLS if cell.metadata.get(key)}
        )
        cell.id = unused_id(cell.source, taken)
        taken.add(cell.id)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with what a busy machine prints piece by piece in one piece."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.get("name") == found[-1].get("name") == "stdout":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def picture(notebook: NotebookNode, tag: str) -> bytes | None:
    """The picture that the cell with this tag shows: the book's front page borrows one."""
    for cell in notebook.cells:
        if tag in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    return None


def main(paths: list[Path]) -> list[str]:
    """Run each notebook in place; return why some were not written, one message a notebook.

    A run takes minutes, in which an author may save either side of the pair: what was written
    then would be lost, now or at the next `make sync`.
    """
    refused = []
    for path in paths:
        if not in_step(path):
            refused.append(f"{path.name} says other things than its .md: `make sync`, then again")
            continue
        before = _sides(path)
        with TemporaryDirectory() as folder:
            result = Path(folder, path.name)
            run(path, result)
            notebook = clean(nbformat.read(result, as_version=4))
        if _sides(path) != before:
            refused.append(f"{path.name} or its .md was edited while it ran: nothing was written")
            continue
        nbformat.write(notebook, path)
        if hook := picture(notebook, "hook"):
            (ROOT / "book" / "static" / "hook.png").write_bytes(hook)
    return refused


def _sides(path: Path) -> list[bytes]:
    sides = (path.with_suffix(suffix) for suffix in FORMATS)
    return [side.read_bytes() if side.exists() else b"" for side in sides]


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:]] or [ROOT / page for page in notebooks(ROOT)]
    refused = main(chosen)
    colab.write(ROOT)
    sys.exit("\n".join(refused) or None)
