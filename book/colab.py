"""Write the notebooks that Colab, JupyterLab, VS Code and GitHub open: what `make sync` does last.

What authors edit is MyST, which only the pages understand. From each notebook among the pages this
makes `chapters/colab/NAME.ipynb`, with the stored outputs: citations and references resolved,
plumbing folded, exercises without solutions. `NAME-solutions.ipynb` has the exercises with their
solutions, and of the chapter's code as much as these need.
"""

import base64
import copy
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pybtex.database import parse_file
from pybtex.plugin import find_plugin

from book.address import slug
from book.build import ROOT, notebooks
from book.needed import needed

FOLDER = "chapters/colab"
NUMBERED = {"prf:proposition", "prf:lemma", "prf:theorem", "exercise"}
FOLDED = {"hide-input", "remove-input", "hide-cell"}
OUTPUT_FOLDED = {"hide-output", "remove-output", "hide-cell"}
TITLES = {  # of a folded cell, by what its code says
    "find_spec(": "Set-up: find the book, or fetch it",
    "side_by_side(": "Table",
    "claims.table(": "Claims",
    "Prose(": "Sentences with stored numbers",
    "source(": "From the module",
    "claim(": "Checks",
    "note(": "Measurements",
    "def ": "Definitions",
    "import ": "Imports",
    "": "Code",
}
LINKED = re.compile(r"\{(?:prf:ref|eq)\}`([\w-]+)`|\]\([^)\s#]*#([\w-]+)\)")
ADDRESSES = {"url": "", "doi": "https://doi.org/", "eprint": "https://arxiv.org/abs/"}
WIDTH = 760  # of a picture, at most: that of a page's text
# What has a meaning in MyST and none elsewhere, and what must stay as it is: code and mathematics.
INLINE = re.compile(
    r"^```.*?^```$|\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]+`"
    r"|\{(?P<role>[a-z:]+)\}`(?P<names>[^`]+)`"
    r"|(?<!!)\[(?P<words>[^\]\[]*)\]\((?P<link>[^)\s]+)\)",
    re.M | re.S,
)


@dataclass
class Part:
    """A stretch of a notebook that becomes a cell: text, a directive or a code cell."""

    kind: str
    text: str = ""
    title: str = ""
    folds: bool = False
    labels: list[str] = field(default_factory=list)
    cell: NotebookNode | None = None
    solves: str = ""  # the label of the exercise that it belongs to the solution of
    name: str = ""  # with its number: "Proposition 3.1"

    @property
    def id(self) -> str:
        """What links call the cell; both Colab's own links and nbformat take it."""
        return re.sub(r"[^\w-]", "-", self.labels[0], flags=re.A)[:64] if self.labels else ""


def parts(notebook: NotebookNode, linked: set[str]) -> list[Part]:
    """The parts of a notebook, in order.

    A heading, a directive, and a label that is among `linked` begin a new one.
    """
    found: list[Part] = []
    solves = ""
    for cell in notebook.cells:
        text = cell.cell_type == "markdown"
        for part in _split(cell.source, linked) if text else [Part("code", cell=cell)]:
            if part.kind == "solution-start":
                solves, part.labels = part.title, [f"solution-{part.title}"]
            part.solves = solves
            solves = "" if part.kind == "solution-end" else solves
            heads = found and found[-1].kind == "solution-start"
            if heads and part.kind == "text" and not part.labels:
                found[-1].text += part.text  # the heading stands on its line
            else:
                found.append(part)
    return found


def _split(source: str, linked: set[str]) -> Iterator[Part]:
    """The parts of a markdown cell.

    Raises
    ------
    ValueError
        A directive is in backticks or in another one, or has no end.
    """
    part, inside, code = Part("text"), False, False
    for line in source.splitlines():
        if begins := re.match(r"(:{3,}|`{3,})\{([\w:-]+)\} ?(.*)", line):
            if inside or begins[1] != ":::":
                raise ValueError(f"expected a directive with three colons, on its own: {line}")
            yield part
            part, inside = Part(begins[2], title=begins[3]), True
        elif inside and line == ":::":
            yield part
            part, inside = Part("text"), False
        elif inside and not part.text.strip() and (option := re.match(r":([\w-]+): (.*)", line)):
            part.labels += [option[2]] if option[1] == "label" else []
            part.folds |= option[2] == "dropdown"
        elif not (inside or code) and (label := re.fullmatch(r"\(([\w-]+)\)=", line)):
            if label[1] in linked:
                yield part
                part = Part("text", labels=[label[1]])
        else:
            code ^= line.startswith("```")
            heading = None if inside or code else re.match("#+ (.+)", line)
            if heading and part.text.strip():
                yield part
                part = Part("text")
            part.labels += [_anchor(heading[1])] if heading else []
            part.text += f"{line}\n"
    if inside:
        raise ValueError(f"no end: {part.kind} {part.title}")
    yield part


def _anchor(heading: str) -> str:
    """What MyST calls a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


class Book:
    """All notebooks of the pages, numbered as there, and where each label of the book is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bibliography = parse_file(str(root / "book" / "references.bib"))
        self.places: dict[str, str] = {}  # label: the file that has it, seen from FOLDER, and cell
        self.names: dict[str, str] = {}
        self.notebooks: dict[str, NotebookNode] = {}
        self.parts: dict[str, list[Part]] = {}
        self.folders: dict[str, str] = {}
        chapter = 0
        texts = {path: (root / path).read_text(encoding="utf-8") for path in notebooks(root)}
        self.linked = {a or b for text in texts.values() for a, b in LINKED.findall(text)}
        for path, text in texts.items():
            self.notebooks[path.stem] = nbformat.reads(text, as_version=4)
            self.folders[path.stem] = path.parent.as_posix()
            self.parts[path.stem] = parts(self.notebooks[path.stem], self.linked)
            chapter += path.parent.name == "chapters"
            self._number(path.stem, chapter if path.parent.name == "chapters" else 0)
        for page in sorted((root / "book").glob("*.md")):
            text = "" if page.stem in self.notebooks else page.read_text(encoding="utf-8")
            for label in re.findall(r"^(?:\$\$ )?\(([\w-]+)\)=?$", text, re.M):
                self.places[label] = f"../../book/{page.name}#{label}"

    def _number(self, stem: str, chapter: int) -> None:
        count: Counter[str] = Counter()
        for part in self.parts[stem]:
            caption = part.cell is not None and "figure" in part.cell.metadata.get("mystnb", {})
            kind = "Fig." if caption else part.kind.removeprefix("prf:").capitalize()
            if (caption or part.kind in NUMBERED) and chapter:
                count[kind] += 1
                part.name = f"{kind} {chapter}.{count[kind]}"
            elif tag := re.search(r"\\tag\{(.+?)\}", part.text):
                part.name = f"({tag[1]})"
            elif part.text.startswith("#"):
                part.name = part.text.splitlines()[0].strip("# ")
            for label in part.labels:
                file = f"{stem}{'-solutions' * bool(part.solves)}.ipynb"
                for known in (label, f"{stem}#{label}"):
                    self.places.setdefault(known, f"{file}#scrollTo={part.id}")
                    self.names.setdefault(known, part.name)

    def place(self, link: str, stem: str, file: str) -> str:
        """The target of `link`, which stands in the source of `stem`, seen from the cell in `file`.

        Raises
        ------
        ValueError
            Nothing has the label, or there is no such file.
        """
        if re.match(r"https?:", link):
            return link
        if link.endswith("book/references.md"):
            return "#scrollTo=references"  # every notebook has its own
        path, _, label = link.partition("#")
        other = PurePosixPath(path).stem or stem
        if label and (found := self.places.get(f"{other}#{label}") or self.places.get(label)):
            return found.removeprefix(f"{file}.ipynb")
        if label and (not path or other in self.notebooks):
            raise ValueError(f"{stem}: nothing is called {link}")
        if path.endswith(".ipynb") and other in self.notebooks:
            return f"{other}.ipynb"
        path = normpath(f"{self.folders[stem]}/{path}")
        if not (self.root / path).is_file():
            raise ValueError(f"{stem}: no file {link}")
        return relpath(path, FOLDER) + f"#{label}" * bool(label)

    def plain(self, text: str, stem: str, file: str, cited: set[str]) -> str:
        """`text` in plain Markdown; the keys that it cites are added to `cited`."""

        def replaced(match: re.Match[str]) -> str:
            role, names, words, link = match["role"], match["names"], match["words"], match["link"]
            if link:
                return f"[{words or self.title(link)}]({self.place(link, stem, file)})"
            if role in ("cite", "cite:t"):
                keys = re.split(r",\s*", names)
                cited.update(keys)
                texts = [self.cite(key, role == "cite:t") for key in keys]
                return ", ".join(texts) if role == "cite:t" else f"({'; '.join(texts)})"
            if role in ("prf:ref", "eq"):
                name = self.names.get(names) or "this equation"
                return f"[{name}]({self.place(f'#{names}', stem, file)})"
            if role:
                raise ValueError(f"{stem}: no plain text for the role {match[0]}")
            return match[0]

        return INLINE.sub(replaced, text)

    def title(self, link: str) -> str:
        """What the page that `link` names is called."""
        path = self.root / "book" / f"{PurePosixPath(link).stem}.md"
        if not path.is_file():
            raise ValueError(f"[]({link}): a link without words names a page of book/")
        return re.findall("^# (.+)", path.read_text("utf-8"), re.M)[0]

    def cite(self, key: str, in_text: bool = False) -> str:
        """Authors and year, linked to the paper, or else to the list of references."""
        entry = self.bibliography.entries[key]
        people = entry.persons.get("author") or entry.persons["editor"]
        last = ["".join(map(str, person.rich_last_names)) for person in people]
        who = f"{last[0]} et al." if len(last) > 2 else " and ".join(last)
        year = entry.fields["year"]
        words = f"{who} ({year})" if in_text else f"{who}, {year}"
        found = (at + entry.fields[name] for name, at in ADDRESSES.items() if name in entry.fields)
        return f"[{words}]({next(found, '#scrollTo=references')})"

    def references(self, cited: set[str]) -> Part:
        """What was cited, in the order of the authors."""
        style = find_plugin("pybtex.style.formatting", "plain")()
        lines = ["## References\n"]
        for entry in style.format_bibliography(self.bibliography, sorted(cited)):
            text = entry.text.render_as("markdown").replace("\n", " ")
            lines.append("- " + re.sub(r"\\([.\-()])", r"\1", text))  # escaped without need
        return Part("text", "\n".join(lines), labels=["references"])

    def readable(self, stem: str) -> NotebookNode:
        """The notebook `stem` without solutions."""
        chosen = [part for part in self.parts[stem] if not part.solves]
        return self._notebook(stem, stem, chosen)

    def solutions(self, stem: str) -> NotebookNode | None:
        """The exercises of `stem` that have solutions, with these; None where there are none."""
        own = [part for part in self.parts[stem] if part.solves or self._solved(part)]
        if not own:
            return None
        before = itertools.takewhile(lambda part: not part.solves, self.parts[stem])
        cells = [part.cell for part in before if part.cell is not None]
        kept = needed(cells, [part.cell for part in own if part.cell is not None])
        title = self.parts[stem][0].name or next(p.name for p in self.parts[stem] if p.name)
        address = f"https://colab.research.google.com/github/{slug(self.root)}/blob/main/{FOLDER}"
        head = f"# {title}: the solutions\n\n[Open in Colab]({address}/{stem}-solutions.ipynb)\n\n"
        head += f"The exercises of [{title}]({stem}.ipynb) with their solutions. The code in "
        head += "between is what they need of the chapter.\n"
        given = [Part("code", cell=cell, title="From the chapter") for cell in kept]
        for part in given[:1]:
            part.title = ""  # the set-up has its own
        return self._notebook(stem, f"{stem}-solutions", [Part("text", head), *given, *own])

    def _solved(self, part: Part) -> bool:
        return part.kind == "exercise" and f"solution-{part.id}" in self.places

    def _notebook(self, stem: str, file: str, chosen: Iterable[Part]) -> NotebookNode:
        cited: set[str] = set()
        cells: list[NotebookNode] = []
        taken: set[str] = set()
        for part in self._ending(stem, file, chosen, cited):
            for cell in self._cells(part, stem, file, cited):
                cell.id = part.id if part.id and cell.cell_type == "markdown" else ""
                if not cell.id or cell.id in taken:
                    cell.id = unused_id(cell.source, taken)
                taken.add(cell.id)
                cells.append(cell)
        source = self.notebooks[stem].metadata
        kept = {key: source[key] for key in ("accelerator", "kernelspec") if key in source}
        kept |= {"jupytext": {"formats": "ipynb"}, "language_info": {"name": "python"}}
        return new_notebook(cells=cells, metadata=kept)

    def _ending(
        self, stem: str, file: str, chosen: Iterable[Part], cited: set[str]
    ) -> Iterator[Part]:
        yield from chosen
        if cited:
            yield self.references(cited)
        text = f"*Made from `{self.folders[stem]}/{stem}.md` by `make sync`: edit that one.*"
        yield Part("text", text)

    def _cells(self, part: Part, stem: str, file: str, cited: set[str]) -> Iterator[NotebookNode]:
        """The cells of one part: none, one, or a code cell and its caption."""
        if part.cell is not None:
            yield self._code(part, stem, file, cited)
            if caption := part.cell.metadata.get("mystnb", {}).get("figure", {}).get("caption"):
                name = f"**{part.name}.** " if part.name else ""
                text = self.plain(" ".join(caption.split()), stem, file, cited)
                yield new_markdown_cell(f"{name}{text}")
            return
        text = _dressed(part)
        if file == stem and self._solved(part):
            text += f"\n\n[Solution](#solution-{part.id})"
        if text := self.plain(text, stem, file, cited).strip():
            own = part.id == "references" or part.kind == "solution-start"
            linked = own or self.linked & {*part.labels}
            anchor = f'<a id="scrollTo={part.id}"></a>\n\n' if linked else ""
            yield new_markdown_cell(anchor + text)

    def _code(self, part: Part, stem: str, file: str, cited: set[str]) -> NotebookNode:
        assert part.cell is not None
        cell = new_code_cell(
            part.cell.source,
            execution_count=part.cell.execution_count,
            outputs=copy.deepcopy(part.cell.outputs),
        )
        tags = part.cell.metadata.get("tags", [])
        if tags:
            cell.metadata.tags = tags
        if {*tags} & FOLDED:
            says = next(title for word, title in TITLES.items() if word in cell.source)
            cell.source = f"# @title {part.name or part.title or says}\n{cell.source}"
            cell.metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}
            cell.metadata["transient"] = {"remove_source": True}  # nbconvert
        if {*tags} & OUTPUT_FOLDED:
            cell.metadata.collapsed = True
            cell.metadata.setdefault("jupyter", {})["outputs_hidden"] = True
        said = part.cell.metadata.get("mystnb", {}).get("image", {})
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = self.plain(data["text/markdown"], stem, file, cited)
            if "image/png" in data:
                header = base64.b64decode(data["image/png"][:32])
                shown: dict[str, int | str] = {
                    "width": min(WIDTH, int.from_bytes(header[16:20], "big"))
                }
                shown |= {"alt": " ".join(said["alt"].split())} if "alt" in said else {}
                output.metadata["image/png"] = shown
        return cell


def _dressed(part: Part) -> str:
    """The text of a part with the title that its directive has on the page.

    Raises
    ------
    ValueError
        The directive is none that is known here.
    """
    title, text = part.title, part.text.strip()
    match part.kind:
        case "text" | "solution-end":
            return part.text
        case "prf:proof":
            return _joined("*Proof.*", text) + ("\n\n∎" if text.endswith(("$$", ":::")) else " ∎")
        case "admonition" if part.folds:
            return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
        case "admonition":
            return _joined(f"**{title}.**", text)
        case "margin" | "warning" | "note":
            return f"*{text}*" if "\n" not in text and "*" not in text else text
        case "solution-start":
            return _joined("**Solution.**", text)
        case kind if kind in NUMBERED:
            return _joined(f"**{part.name}{f' ({title})' if title else ''}.**", text)
    raise ValueError(f"no plain text for the directive {part.kind}")


def unused_id(source: str, taken: set[str]) -> str:
    """A cell id made from the cell's text, which changes only with it."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    return next(digest[i : i + 8] for i in range(len(digest)) if digest[i : i + 8] not in taken)


def _joined(heading: str, text: str) -> str:
    """The heading on the line of the text, unless that begins with a formula, a list or a table."""
    return f"{heading}\n\n{text}" if re.match(r"\$\$|\d+\. |[-*|] ", text) else f"{heading} {text}"


def made(root: Path) -> dict[str, str]:
    """Every file of the folder, by name."""
    book = Book(root)
    files: dict[str, NotebookNode | None] = {}
    for stem in book.notebooks:
        files |= {stem: book.readable(stem), f"{stem}-solutions": book.solutions(stem)}
    return {
        f"{name}.ipynb": nbformat.writes(notebook) + "\n"
        for name, notebook in files.items()
        if notebook is not None
    }


def write(root: Path) -> list[Path]:
    """Write what has changed, delete what is no longer made; return what was written."""
    folder, files = root / FOLDER, made(root)
    folder.mkdir(exist_ok=True)
    changed = []
    for old in {*folder.glob("*.ipynb")} - {folder / name for name in files}:
        old.unlink()
    for name, text in files.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in write(ROOT):
        print(f"made: {path.relative_to(ROOT)}")
