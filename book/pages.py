"""What the pages need beyond the theme: numbers by chapter, folds, descriptions, fewer bytes.

A Sphinx extension; `_config.yml` names it under `local_extensions`.
"""

import itertools
import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.util import logging
from sphinx_proof.nodes import proof_node

UNKNOWN = "https://github.com/OWNER/"  # as long as no address is known
MARK = re.compile(r"<!-- (fold|unfold)(?:: (.+))? -->\s*")  # a comment, so no notebook shows it


def publish(app: Sphinx, config: Any) -> None:
    """Once there is an address, each page names its own, at GitHub Pages, as the canonical one."""
    url = config.html_theme_options.get("repository_url", "")
    if url and not url.startswith(UNKNOWN):
        owner, _, name = url.removeprefix("https://github.com/").strip("/").partition("/")
        config.html_baseurl = f"https://{owner}.github.io/{name}/"


def number_by_chapter(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Number the chapters, and in each its propositions, exercises and figures: 3.1, 3.2, ..."""
    root = env.get_doctree(env.config.root_doc)
    entries = [toctree["entries"] for toctree in root.findall(addnodes.toctree)]
    chapters = [name for _, name in itertools.chain(*entries) if name.startswith("chapters/")]
    for number, name in enumerate(chapters, 1):
        title, *sections = env.tocs[name].findall(nodes.reference)
        title["secnumber"] = env.titles[name]["secnumber"] = (number,)
        env.toc_secnumbers[name] = {section["anchorname"]: () for section in sections}
        env.toc_secnumbers[name][""] = (number,)
    return [*chapters, *TocTreeCollector().assign_figure_numbers(env)]


def gather(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Neighboring cells of hidden code that show nothing wait behind one line."""
    for section in doctree.findall(nodes.section):
        for quiet, group in [(k, [*g]) for k, g in itertools.groupby(section.children, _is_quiet)]:
            cells = [cell for cell in group if cell.children]  # a removed input has none
            if quiet and len(cells) > 1:
                words = (
                    f'<details class="fold"><summary>Show source of {len(cells)} cells</summary>'
                )
                section.insert(section.index(cells[0]), _html(words))
                section.insert(section.index(cells[-1]) + 1, _html("</details>"))
                for cell in cells:
                    cell[0].replace_self(cell[0].children)


def _is_quiet(node: nodes.Node) -> bool:
    if not isinstance(node, nodes.container) or node.get("nb_element") != "cell_code":
        return False
    return not node.children or (
        node.get("hide_mode") == "input"
        and len(node) == 1
        and isinstance(node[0], HideCodeCellNode)
    )


def fold(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Put behind a fold what a reader of the main way passes by: nothing is lost, little is open.

    `<!-- fold -->` right below a heading folds its section, and the heading opens it.
    `<!-- fold: words -->` folds what follows, up to `<!-- unfold -->`, the next heading or the end
    of the section, behind these words. Every proof is folded.
    """
    for mark in list(doctree.findall(_is_mark)):
        kind, words = MARK.fullmatch(mark.astext()).groups()  # type: ignore[union-attr]
        section = mark.parent
        if not isinstance(section, nodes.section):
            logging.getLogger(__name__).warning("a fold inside a block", location=mark)
        elif kind == "fold" and words:
            at = section.index(mark)
            rest = range(at + 1, len(section))
            ends = (
                k for k in rest if isinstance(section[k], nodes.section) or _is_mark(section[k])
            )
            if (end := next(ends, len(section))) == at + 1:
                logging.getLogger(__name__).warning("a fold of nothing", location=mark)
            section.insert(end, _html("</details>"))
            section[at] = _html(f'<details class="fold"><summary>{escape(words)}</summary>')
        elif kind == "fold":
            section.remove(mark)
            section.insert(1, _html("</summary>"))
            section.insert(0, _html('<details class="fold"><summary>'))
            section.append(_html("</details>"))
    for proof in list(doctree.findall(proof_node)):
        first = proof[0][0]  # sphinx-proof writes a "Proof." before it
        first[0] = nodes.Text(first[0].astext().removeprefix("Proof. "))
        opened = _html('<details class="fold proof-fold"><summary>Proof</summary>')
        proof.parent.replace(proof, [opened, proof, _html("</details>")])


def _is_mark(node: nodes.Node) -> bool:
    return isinstance(node, nodes.raw) and MARK.fullmatch(node.astext()) is not None


def _html(text: str) -> nodes.raw:
    return nodes.raw("", text, format="html")


def describe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Say in a page's head what it is about: its first paragraph of some length."""
    if doctree is None:
        return
    texts = (p.astext() for p in doctree.findall(nodes.paragraph))
    text = " ".join(next((text for text in texts if len(text) > 80), "").split())
    text = re.sub(r"(?<=[.?!]) .{0,200}$", "", text[:300]) if len(text) > 300 else text
    said = {"og:title": app.env.titles[page].astext(), "og:type": "article"}
    said |= {"og:description": text}
    if app.config.html_baseurl:
        said["og:url"] = context["pageurl"]
        said["og:image"] = f"{app.config.html_baseurl}_static/hook.png"
    tags = [f'<meta name="description" content="{escape(text)}" />']
    tags += [f'<meta property="{key}" content="{escape(value)}" />' for key, value in said.items()]
    context["metatags"] = context.get("metatags", "") + "\n".join(tags)


def offer(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Below a chapter: the rows behind its tables, and what its paper prints, to be taken along."""
    links = []
    for folder, said in (("results", "what was measured"), ("paper", "what the paper prints")):
        file = Path(app.srcdir, "chapters", folder, f"{Path(page).name}.csv")
        if file.is_file() and len(file.read_bytes().split()) > 1:
            target = Path(app.outdir, "_static", folder, file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            link = context["pathto"](f"_static/{folder}/{file.name}", 1)
            links.append(f'<a href="{link}" download>{said}</a>')
    if links:
        context["body"] += (
            f'<p class="rows">The numbers of this page, as CSV: {", ".join(links)}.</p>'
        )


def mended(html: str) -> str:
    """A page without what it does not need, and with ids that are each there once.

    Out go the contents that the theme prints first under a second title, and the script that draws
    icons, for which the style sheet has fonts. sphinx-proof and sphinx-exercise give all their
    boxes the same ids, to which nothing leads. The theme's button leads Colab to the page's own
    notebook, which says in MyST what Colab cannot show.
    """
    html = re.sub(r'<div id="jb-print-docs-body".*?(?=<div id="searchbox")', "", html, flags=re.S)
    html = re.sub(
        r"(colab\.research\.google\.com/[^\"]+/)(?:book|chapters)/(\w+\.ipynb)",
        r"\1chapters/colab/\2",
        html,
    )
    html = re.sub(r"<script[^>]*/fontawesome\.js[^>]*></script>\n?", "", html)
    return re.sub(r' id="(?:proof|(?:proof|exercise|solution)-content)"', "", html)


def mend(app: Sphinx, error: Exception | None) -> None:
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        page.write_text(mended(page.read_text(encoding="utf-8")), encoding="utf-8")
    for notebook in Path(app.srcdir, "chapters", "colab").glob("*.ipynb") if error is None else ():
        for offered in Path(app.outdir, "_sources").rglob(notebook.name):  # for download
            shutil.copyfile(notebook, offered)


def map_site(app: Sphinx, error: Exception | None) -> None:
    """Once there is an address, the sitemap names every page with it."""
    if error is None and app.config.html_baseurl:
        pages = map(app.builder.get_target_uri, sorted(app.env.found_docs))
        urls = (f"<url><loc>{escape(app.config.html_baseurl + page)}</loc></url>" for page in pages)
        schema = "http://www.sitemaps.org/schemas/sitemap/0.9"
        text = f'<?xml version="1.0" encoding="utf-8"?>\n<urlset xmlns="{schema}">\n'
        text += "\n".join([*urls, "</urlset>\n"])
        Path(app.outdir, "sitemap.xml").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", publish)
    app.connect("env-get-updated", number_by_chapter, priority=900)  # after Sphinx's own numbers
    app.connect("doctree-resolved", gather)
    app.connect("doctree-resolved", fold)
    app.connect("html-page-context", describe)
    app.connect("html-page-context", offer)
    app.connect("build-finished", mend)
    app.connect("build-finished", map_site)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
