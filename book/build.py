"""Run every chapter at protocol `quick` and build the HTML: what `make book` does.

Everything happens on a copy, `_build/source`, so the notebooks of the clone stay as committed.
A chapter whose inputs have not changed since its last run is not run again, and the finished
pages replace the old ones only once they are complete: a killed run leaves nothing half-made.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from book import zoo
from defenses.claims import answer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # everything else
    msvcrt = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent


def pages(root: Path) -> list[str]:
    """The pages of `_toc.yml`, in reading order, as they are named there."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]


def notebooks(root: Path) -> list[Path]:
    """The notebooks among the pages, in reading order, relative to `root`."""
    return [Path(name) for name in pages(root) if name.endswith(".ipynb")]


def stage(root: Path, source: Path) -> None:
    """Copy what Jupyter Book reads from `root` to a fresh folder `source`."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy2(root / name, source)
    for name in ("book", "chapters"):
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.py")
        shutil.copytree(root / name, source / name, ignore=ignore)
    (source / "book" / "answer.md").write_text(answer(source / "chapters"), encoding="utf-8")
    (source / "book" / "static" / "zoo.js").write_text(zoo.script())
    shutil.copy2(root / "book" / "pages.py", source / "book")  # a part of the configuration
    _exclude_what_is_no_page(source)


def _exclude_what_is_no_page(source: Path) -> None:
    """`only_build_toc_files` does this too, but not in a folder whose path has brackets."""
    files = [path.relative_to(source) for path in source.rglob("*.*")]
    files = [path for path in files if path.suffix in (".md", ".ipynb")]
    named = {name.removesuffix(".md") for name in pages(source)}
    extra = [p.as_posix() for p in files if p.as_posix().removesuffix(".md") not in named]
    with (source / "_config.yml").open("a", encoding="utf-8") as config:
        config.write(yaml.safe_dump({"exclude_patterns": sorted(extra)}))


class OwnKernel(AsyncKernelManager):
    """A kernel of this very Python, whatever else goes by the name python3 on JUPYTER_PATH."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def run(notebook: Path, result: Path, **parameters: object) -> None:
    """Execute `notebook` where it lies and write it, with its outputs, to `result`."""
    executed = papermill.execute_notebook(
        nbformat.read(notebook, as_version=4),  # papermill formats a path that holds braces
        None,
        parameters,
        kernel_name="python3",
        kernel_manager_class=OwnKernel,
        cwd=notebook.parent,
        progress_bar=sys.stderr.isatty(),
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
    )
    for cell in executed.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")
    partial = result.with_name(f"{result.name}.{os.getpid()}")
    nbformat.write(executed, partial)
    partial.replace(result)


def html(source: Path, target: Path) -> None:
    """Build the pages of `source` with every warning an error; replace the folder `target`.

    Raises
    ------
    RuntimeError
        If Sphinx warns or fails; the message is what it printed.
    """
    work = target.with_name(f".{target.name}")
    shutil.rmtree(work, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(source), "-W"]
    command += ["-n", "--keep-going", "-q", "--path-output", str(work)]
    outcome = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONUTF8": "1"},  # elsewhere it is so without being asked
    )
    if outcome.returncode:
        raise RuntimeError(outcome.stdout)
    shutil.rmtree(target, ignore_errors=True)
    (work / "_build" / "html").replace(target)
    shutil.rmtree(work)


def _fingerprint(root: Path, notebook: Path) -> str:
    inputs = [root / notebook, *sorted((root / "defenses").rglob("*.py"))]
    stored = {".csv", ".toml", ".npz", ".png"}  # numbers, claims, images' outcomes, pictures
    inputs += sorted(p for p in (root / "chapters").rglob("*") if p.suffix in stored)
    inputs += sorted((root / "defenses").rglob("*.npz"))
    digest = hashlib.sha256(f"{platform.python_version()} {version('torch')}".encode())
    for path in inputs:
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _takes_protocol(notebook: Path) -> bool:
    cells = nbformat.read(notebook, as_version=4).cells
    return any("parameters" in cell.metadata.get("tags", []) for cell in cells)


def run_all(root: Path, source: Path, executed: Path) -> None:
    """Put into `source` each notebook's run at `quick`, kept in `executed` while it still holds."""
    executed.mkdir(parents=True, exist_ok=True)
    for notebook in notebooks(root):
        result = executed / f"{notebook.stem}-{_fingerprint(root, notebook)}.ipynb"
        if result.exists():
            print(f"{notebook.stem}: unchanged, its last run stands")
        else:
            print(f"{notebook.stem}: running ...", flush=True)
            start = time.perf_counter()
            parameters = {"protocol": "quick"} if _takes_protocol(root / notebook) else {}
            run(source / notebook, result, **parameters)
            print(f"{notebook.stem}: ran in {time.perf_counter() - start:.0f} s")
            for old in set(executed.glob(f"{notebook.stem}-*.ipynb")) - {result}:
                old.unlink()
        shutil.copy2(result, source / notebook)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Wait for whoever is inside with the same `file`; a process that ends has left it."""
    with file.open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        while fcntl is None and msvcrt is not None:
            with contextlib.suppress(OSError):  # it gives up after ten seconds
                msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
                break
        yield


def main() -> None:
    build = ROOT / "_build"
    build.mkdir(exist_ok=True)
    with locked(build / ".lock"):  # two builds at once: the second waits
        stage(ROOT, build / "source")
        try:
            run_all(ROOT, build / "source", build / "executed")
        except papermill.PapermillExecutionError as error:
            sys.exit(f"A chapter failed.\n{error}")
        print("building the pages ...", flush=True)
        try:
            html(build / "source", build / "html")
        except RuntimeError as error:
            sys.exit(f"{error}\nThe pages were not built: every warning above counts as an error.")
    print(f"The book is ready. Open {(build / 'html' / 'index.html').as_uri()}")


if __name__ == "__main__":
    main()
