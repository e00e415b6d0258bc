"""The book builds without a warning, and its pages work as a reader meets them.

The pages are built once from the committed notebooks, read as files, then opened in headless
Chromium with the network off.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import papermill
import pytest
import yaml
from bs4 import BeautifulSoup
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Page,
    Playwright,
    Request,
    sync_playwright,
)

from book import address, build, colab

ROOT = Path(__file__).resolve().parent.parent
SOURCES = build.pages(ROOT)
PAGES = [f"{source.removesuffix('.ipynb')}.html" for source in SOURCES]
CHAPTERS = [page for page in PAGES if page.startswith("chapters/")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("book")
    build.stage(ROOT, folder / "source")
    build.html(folder / "source", folder / "html")
    return folder / "html"


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


@cache
def anchors(path: Path) -> set[str]:
    return {str(tag["id"]) for tag in soup(path).select("[id]")}


# The pages as files.


def test_every_page_is_there(site: Path) -> None:
    assert [page for page in PAGES if not (site / page).exists()] == []
    assert PAGES[0] in (site / "index.html").read_text()


def test_pages_match_the_sources() -> None:
    notebooks = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("chapters/*.ipynb")}
    assert notebooks <= set(SOURCES), f"not in _toc.yml: {notebooks - set(SOURCES)}"
    paired = [source for source in SOURCES if (ROOT / f"{source}.ipynb").exists()]
    assert paired == [], f"name the notebook, with .ipynb, or Colab cannot open it: {paired}"


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_loaded_from_elsewhere(site: Path, page: str) -> None:
    tags = soup(site / page).select("[src], link[rel~=stylesheet], link[rel~=preload], object")
    used = [tag.get("src") or tag.get("href") or tag.get("data") for tag in tags]
    assert len(used) > 5
    assert [url for url in used if re.match(r"(https?:)?//", str(url))] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("chapters/results/*.csv")), ids=lambda p: p.stem)
def test_the_rows_behind_a_page_can_be_taken_along(site: Path, path: Path) -> None:
    (page,) = (page for page in PAGES if Path(page).stem == path.stem)
    papers = path.parent.parent / "paper" / path.name
    files = [path, papers] if len(papers.read_text().splitlines()) > 1 else [path]
    found = [link["href"] for link in soup(site / page).select("p.rows a[download]")]
    assert [((site / page).parent / str(link)).read_bytes() for link in found] == [
        file.read_bytes() for file in files
    ]


def test_every_brace_of_our_style_sheets_is_closed() -> None:
    sheets = sorted(ROOT.glob("book/static/*.css"))
    assert sheets
    for sheet in sheets:  # an open @media keeps all rules behind it from the other media
        text = sheet.read_text(encoding="utf-8")
        depths = list(itertools.accumulate({"{": 1, "}": -1}.get(c, 0) for c in text))
        assert min(depths) == 0 == depths[-1], sheet.name


def test_no_style_sheet_loads_from_elsewhere(site: Path) -> None:
    for sheet in site.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']+", sheet.read_text())
        assert not found, f"{sheet.name} loads {found}"


@pytest.mark.parametrize("page", PAGES)
def test_internal_links_and_anchors_resolve(site: Path, page: str) -> None:
    for link in soup(site / page).select("a[href]"):
        parts = urlsplit(str(link["href"]))
        if parts.scheme:
            continue
        target = ((site / page).parent / unquote(parts.path or Path(page).name)).resolve()
        assert target.exists(), f"{page} links to {link['href']}"
        if parts.fragment and target.suffix == ".html":
            found = unquote(parts.fragment) in anchors(target)
            assert found, f"{page} links to {link['href']}: no such anchor"


@pytest.mark.parametrize("source", [source for source in SOURCES if source.endswith(".ipynb")])
def test_colab_opens_the_notebook(site: Path, source: str) -> None:
    page = soup(site / source.replace(".ipynb", ".html"))
    links = {str(link["href"]) for link in page.select("a[href*='colab.research.google.com']")}
    slug, name = address.slug(ROOT), Path(colab.FOLDER, Path(source).name)
    assert links == {f"https://colab.research.google.com/github/{slug}/blob/main/{name.as_posix()}"}
    assert page.select(f"a[href$='_sources/{source}']"), "no download button"
    assert (site / "_sources" / source).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize("page", CHAPTERS)
def test_what_colab_opens_has_the_numbers_of_the_page(site: Path, page: str) -> None:
    numbered = ":is(.proof, .exercise) > .admonition-title:has(.caption-number)"
    titles = [" ".join(title.text.split()) for title in soup(site / page).select(numbered)]
    figures = [n.text.strip() for n in soup(site / page).select("figcaption .caption-number")]
    cells = nbformat.read(ROOT / colab.FOLDER / f"{Path(page).stem}.ipynb", as_version=4).cells
    said = "\n".join(cell.source for cell in cells)
    assert len(titles) > 3 and figures
    assert [title for title in titles + figures if f"**{title}.**" not in said] == []


@pytest.mark.parametrize("page", CHAPTERS)
def test_tables_say_what_they_show(site: Path, page: str) -> None:
    tables = soup(site / page).select(".side-by-side table")
    assert len(tables) >= 2
    for table in tables:
        assert re.fullmatch(r"\S.+ · .+", table.select("caption")[0].text)
        assert [th for th in table.select("th") if not th.get("scope")] == []
        heads = " ".join(th.text for th in table.select("th"))
        assert not re.search(r"\bmnist\b|\bcifar10\b|_|\bOurs\b(?!\")", heads), heads


@pytest.mark.parametrize("page", CHAPTERS)
def test_what_is_stored_is_seen_and_a_live_run_is_folded(site: Path, page: str) -> None:
    captions = soup(site / page).select(".side-by-side caption")
    live = [caption for caption in captions if ", this run" in caption.text]
    for caption in live:
        assert caption.find_parent("details"), f"not folded: {caption.text}"
        assert "MNIST" not in caption.text
    assert len(captions) > len(live)
    if "reevaluation" not in page:  # it checks its live table first, in words
        titles = [caption.text.partition(" · ")[0] for caption in captions]
        for place, title in enumerate(titles):
            stored = title.removesuffix(", this run")
            if title != stored and stored in titles:
                assert stored in titles[:place], f"before what is stored: {title}"


@pytest.mark.parametrize("page", PAGES)
def test_pictures_say_what_they_show(site: Path, page: str) -> None:
    for picture in soup(site / page).select("article img"):
        words = str(picture.get("alt", "")).split()
        assert len(words) >= 6, f"no alternative text but {words}"
        figure, beside = picture.find_parent("figure"), picture.find_parent("p")
        caption = figure.select_one("figcaption") if figure else beside
        assert caption and caption.get_text(strip=True), f"no caption: {' '.join(words)}"


@pytest.mark.parametrize("page", CHAPTERS)
def test_numbers_begin_in_each_chapter(site: Path, page: str) -> None:
    chapter = CHAPTERS.index(page) + 1
    (title,) = soup(site / page).select("article h1")
    assert title.text.startswith(f"{chapter}. ")
    assert not any(re.match(r"\d", h2.text) for h2 in soup(site / page).select("article h2"))
    numbers = [tag.text.split() for tag in soup(site / page).select("article .caption-number")]
    assert {kind for kind, _ in numbers} >= {"Fig.", "Exercise"}
    for kind in {kind for kind, _ in numbers}:
        found = [number for other, number in numbers if other == kind]
        assert found == [f"{chapter}.{k}" for k in range(1, len(found) + 1)], kind


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_one_title_a_description_and_ids_of_their_own(site: Path, page: str) -> None:
    html = soup(site / page)
    assert len(html.select("h1")) == 1
    ids = [tag["id"] for tag in html.select("[id]")]
    assert sorted(ids) == sorted(set(ids))
    (said,) = html.select("meta[name=description]")
    assert 40 <= len(said["content"]) <= 300
    named = {tag["property"]: tag["content"] for tag in html.select("meta[property]")}
    assert named["og:description"] == said["content"]
    assert named["og:title"] and not re.search(r"[<\d]", str(named["og:title"]))
    (icon,) = html.select("link[rel~=icon]")
    assert ((site / page).parent / str(icon["href"])).exists()


@pytest.mark.parametrize("page", PAGES)
def test_no_page_loads_a_megabyte_of_icons(site: Path, page: str) -> None:
    for script in soup(site / page).select("script[src], link[rel=preload]"):
        path = str(script.get("src") or script.get("href")).partition("?")[0]
        assert "fontawesome" not in path


# The pages in a browser.


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
    if not Path(found).exists():
        warnings.warn("no Chromium: nobody has looked at the pages", stacklevel=1)
        pytest.skip("no Chromium: install it, or run .venv/bin/playwright install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    running = playwright.chromium.launch(executable_path=found, args=arguments)
    yield running
    running.close()


# Each page is opened once a width, and the light switched there: opening is what takes long. The
# narrow ones are opened in the dark, the wide ones in the light, so both are met from the start.
WIDTHS = {390: ("dark", "light"), 1280: ("light", "dark")}


@pytest.fixture(scope="module")
def tabs(browser: Browser) -> dict[int, tuple[Page, list[str]]]:
    """For each width a tab without a network, and a list of everything that goes wrong in it."""
    return {width: watched(browser, width) for width in WIDTHS}


def watched(browser: Browser, width: int) -> tuple[Page, list[str]]:
    tab = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
    trouble: list[str] = []

    def console(message: ConsoleMessage) -> None:
        if message.type == "error":
            trouble.append(message.text)

    def request(request: Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:null/")):  # blob: made by the page
            trouble.append(f"asked for {request.url}")

    tab.on("console", console)
    tab.on("request", request)
    tab.on("requestfailed", lambda request: trouble.append(f"could not load {request.url}"))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    return tab, trouble


@pytest.fixture(scope="module")
def opened(
    tabs: dict[int, tuple[Page, list[str]]], site: Path, page: str, width: int
) -> tuple[Page, list[str]]:
    """A page, typeset and at rest, and everything that goes wrong from its first moment on."""
    tab, trouble = tabs[width]
    tab.goto("about:blank")  # nothing of the page before is still on its way ...
    trouble.clear()  # ... and its troubles were its own
    switch(tab, WIDTHS[width][0])
    tab.goto((site / page).as_uri())
    tab.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise }")
    tab.evaluate("async () => { await document.fonts.ready }")
    return tab, trouble


def switch(tab: Page, scheme: str) -> None:
    tab.emulate_media(color_scheme="dark" if scheme == "dark" else "light")


at_every_width = pytest.mark.parametrize("width", WIDTHS, scope="module")

# The lowest contrast (WCAG 2) between visible text and the ground behind it, and where it is.
LOWEST_CONTRAST = """selector => {
  const rgba = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0.99) return color;
    }
    return [255, 255, 255];
  };
  let lowest = {ratio: 21, text: "nothing found"};
  for (const element of document.querySelectorAll(selector)) {
    if (!element.checkVisibility() || !element.innerText.trim()) continue;
    const [a, b] = [rgba(getComputedStyle(element).color), ground(element)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < lowest.ratio) lowest = {ratio, text: element.innerText.slice(0, 60)};
  }
  return lowest;
}"""


@pytest.mark.parametrize("page", PAGES, scope="module")
@at_every_width
def test_page_works_offline(opened: tuple[Page, list[str]], width: int) -> None:
    tab, trouble = opened
    for scheme in WIDTHS[width]:
        switch(tab, scheme)
        tab.wait_for_function("s => document.documentElement.dataset.theme == s", arg=scheme)
        formulas, typeset = (tab.locator(name).count() for name in (".math", ".math mjx-container"))
        assert formulas == typeset, f"{formulas} formulas, {typeset} of them typeset"
        wrong = tab.locator(".math:has(mjx-merror, [style*='color: red'])")  # an unknown macro
        assert wrong.all_inner_texts() == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "scrolls sideways"
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        assert tab.evaluate(broken) == []
        text = "article :is(p, li, h1, h2, th, td, small, figcaption)"
        lowest = tab.evaluate(LOWEST_CONTRAST, text)
        assert lowest["ratio"] >= 4.5, f"hard to read in {scheme}: {lowest}"
    assert trouble == []


@pytest.mark.parametrize("page", CHAPTERS, scope="module")
@at_every_width
def test_solutions_fold_out(opened: tuple[Page, list[str]]) -> None:
    tab, trouble = opened
    solutions = tab.locator(".solution.dropdown").all()
    assert len(solutions) >= 4
    for solution in solutions:
        content = solution.locator(".section, section").first
        assert not content.is_visible()
        solution.locator(".toggle-button").first.click()
        assert content.is_visible()
    assert trouble == []


# For each table that is seen: what it is, how much of it is hidden to the right, how much of its
# first column of numbers is not, and whether something hints at what is hidden.
TABLES = """() => [...document.querySelectorAll(".side-by-side-scroll")]
  .filter(box => box.checkVisibility()).map(box => {
    const right = element => element.getBoundingClientRect().right;
    return {
      caption: box.querySelector("caption").innerText,
      hidden: box.scrollWidth - box.clientWidth,
      first: right(box) - right(box.querySelector("tbody td")),
      hint: getComputedStyle(box).backgroundImage.includes("gradient"),
    };
  })"""


@pytest.mark.parametrize("page", CHAPTERS, scope="module")
@at_every_width
def test_tables_show_their_numbers(opened: tuple[Page, list[str]], width: int) -> None:
    tab, _ = opened
    tables = tab.evaluate(TABLES)
    assert len(tables) >= 2
    assert [table for table in tables if table["first"] < 0] == []
    assert [table for table in tables if table["hidden"] > 1 and not table["hint"]] == []
    if width > 1000:
        assert [table for table in tables if table["hidden"] > 1] == []


@pytest.mark.parametrize("page", PAGES, scope="module")
@at_every_width
def test_formulas_are_no_tab_stops(opened: tuple[Page, list[str]]) -> None:
    tab, _ = opened
    assert tab.locator(".math[tabindex='0'], .math [tabindex='0']").count() == 0
    icons = "[...document.querySelectorAll('[class*=fa-]')].filter(e => e.checkVisibility())"
    families = tab.evaluate(f"{icons}.map(e => getComputedStyle(e, '::before').fontFamily)")
    assert families
    assert [family for family in families if "Font Awesome" not in family] == []


@pytest.mark.parametrize("page", CHAPTERS, scope="module")
@at_every_width
def test_curves_turn_light_in_the_dark_and_pictures_do_not(
    opened: tuple[Page, list[str]],
) -> None:
    tab, _ = opened
    switch(tab, "dark")
    tab.wait_for_function("document.documentElement.dataset.theme == 'dark'")
    for kind, wanted in (("img:not(.dark-light)", True), ("img.dark-light", False)):
        found = tab.locator(f"article figure {kind}")
        filters = found.evaluate_all("all => all.map(e => getComputedStyle(e).filter)")
        assert [text for text in filters if ("invert" in text) != wanted] == []
    switch(tab, "light")


# A reader's way: the words that are seen before the exercises, without code, numbers and formulas,
# and how many windows lie above the verdict.
WAY = """() => {
  const end = document.querySelector("#exercises");
  const other = "pre, .math, .side-by-side, .hide, script";
  const text = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  let words = 0;
  for (let node = text.nextNode(); node; node = text.nextNode()) {
    const place = node.parentElement;
    if (end && end.compareDocumentPosition(node) & Node.DOCUMENT_POSITION_FOLLOWING) continue;
    if (place.closest(other) || !place.checkVisibility({ visibilityProperty: true })) continue;
    words += (node.data.match(/[\\p{L}\\p{N}]+(?:['’.-][\\p{L}\\p{N}]+)*/gu) || []).length;
  }
  const verdict = document.querySelector("#verdict, #the-verdict");
  return {
    words,
    screens: verdict.getBoundingClientRect().top / innerHeight + scrollY / innerHeight,
    code: [...document.querySelectorAll(".cell_input")].filter(e => e.checkVisibility()).length,
  };
}"""
SOURCE_CHAPTERS = [page for page in CHAPTERS if "reevaluation" not in page]


@pytest.mark.parametrize("page", SOURCE_CHAPTERS, scope="module")
@at_every_width
def test_a_chapter_has_a_way_of_sixteen_minutes(opened: tuple[Page, list[str]], width: int) -> None:
    tab, _ = opened
    way = tab.evaluate(WAY)
    assert 1500 <= way["words"] <= 16 * 220, way  # words a minute
    if width > 1000:
        assert way["screens"] <= 30, way


@pytest.mark.parametrize("page", SOURCE_CHAPTERS, scope="module")
@at_every_width
def test_the_first_screens_hold_claim_answer_and_picture(
    opened: tuple[Page, list[str]], width: int
) -> None:
    tab, _ = opened
    height = tab.evaluate("innerHeight")
    last = tab.locator("article figure img:visible").first.bounding_box()
    assert last and last["y"] + tab.evaluate("scrollY") < (1.4 if width > 1000 else 2.2) * height


@pytest.mark.parametrize("page", SOURCE_CHAPTERS, scope="module")
@at_every_width
def test_a_link_into_a_fold_opens_it(opened: tuple[Page, list[str]], site: Path, page: str) -> None:
    tab, trouble = opened
    folded = "details:not([open]) [id]:is(section, .proof, .exercise)"
    found = tab.eval_on_selector_all(folded, "all => all.map(e => e.id)")
    assert found
    for name in {found[0], found[-1]}:
        tab.evaluate("name => { location.hash = name }", name)
        tab.wait_for_function("name => document.getElementById(name).checkVisibility()", arg=name)
        place = tab.evaluate("n => document.getElementById(n).getBoundingClientRect().top", name)
        assert -1 <= place < tab.evaluate("innerHeight")
    tab.goto((site / page).as_uri())
    assert trouble == []


@pytest.mark.parametrize("page", SOURCE_CHAPTERS, scope="module")
@at_every_width
def test_a_picture_is_chosen_by_keyboard(opened: tuple[Page, list[str]]) -> None:
    tab, trouble = opened
    figures = tab.locator("figure.frames").all()
    assert figures
    assert tab.locator("figure.frames input[type=range]").count() <= 1
    for figure in figures:
        seen = figure.locator("img:visible")
        assert seen.count() == 1
        before = seen.get_attribute("alt")
        control = figure.locator("input[type=range], input:checked").first
        control.focus()
        size = seen.bounding_box()
        tab.keyboard.press("ArrowRight")
        assert seen.count() == 1 and seen.get_attribute("alt") != before
        assert seen.bounding_box() == size, "the page jumps"
        if control.get_attribute("type") == "range":
            name = str(seen.get_attribute("data-frame"))
            assert str(control.get_attribute("aria-valuetext")).endswith(f"= {name}")
            assert figure.locator("output").inner_text() == name
    assert trouble == []


def test_without_a_script_a_picture_is_seen_and_a_fold_opens(browser: Browser, site: Path) -> None:
    silent = browser.new_context(java_script_enabled=False, offline=True)
    tab = silent.new_page()
    tab.goto((site / CHAPTERS[1]).as_uri())
    for figure in tab.locator("figure.frames").all():
        assert figure.locator("img:visible").count() == 1
    fold = tab.locator("details.fold:has(> p)").first
    assert not fold.locator("> p").first.is_visible()
    fold.locator("> summary").click()
    assert fold.locator("> p").first.is_visible()
    silent.close()


def test_an_excerpt_of_the_search_is_prose(browser: Browser, site: Path) -> None:
    tab = browser.new_page()
    tab.goto((site / "search.html").as_uri())
    for page in SOURCE_CHAPTERS:
        html = (site / page).read_text()
        text = tab.evaluate("html => Search.htmlToText(html, '')", html)
        assert "The claim." in text and "import" in html
        assert not re.search(r"\bimport \w|find_spec|def \w+\(|\\lVert", text)
    tab.close()


# What would be cut on paper, what could not be pushed there, and what would stay folded.
LOST_IN_PRINT = """() => {
  const shown = query => [...document.querySelectorAll(query)].filter(e => e.checkVisibility());
  const wide = e => e.getBoundingClientRect().right > innerWidth + 1;
  const folded = "details .cell_output, details .cell_input, details table";
  return [
    ...shown("article :is(table, pre, img, mjx-container)").filter(wide),
    ...shown("nav, header, .copybtn, .toggle-button, .headerlink"),
    ...[...document.querySelectorAll(folded)].filter(e => !e.checkVisibility()),
  ].map(e => e.tagName + " " + e.className + " " + e.innerText.slice(0, 60));
}"""


@pytest.mark.parametrize("page", PAGES)
def test_print_loses_nothing(browser: Browser, site: Path, page: str) -> None:
    paper = browser.new_context(viewport={"width": 718, "height": 1000}, offline=True)
    tab = paper.new_page()
    tab.goto((site / page).as_uri())
    tab.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise }")
    tab.emulate_media(media="print")
    assert tab.evaluate(LOST_IN_PRINT) == []
    paper.close()


# What the README shows.


def test_readme_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


# The tool that builds it.


@pytest.fixture
def little_book(tmp_path: Path) -> Path:
    root = tmp_path / "clone"
    for folder in ("book", "chapters", "defenses"):
        (root / folder).mkdir(parents=True)
    for name in ("_config.yml", "book/pages.py", "book/references.bib"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "book" / "static", root / "book" / "static")
    pages = [{"file": "chapters/a.ipynb"}]
    toc = {
        "format": "jb-book",
        "root": "book/intro",
        "parts": [{"caption": "A", "chapters": pages}],
    }
    (root / "_toc.yml").write_text(yaml.safe_dump(toc))
    (root / "book" / "intro.md").write_text("# Title\n\nText.\n")
    (root / "defenses" / "idea.py").write_text("")
    (root / "chapters" / "paper").mkdir()
    (root / "chapters" / "paper" / "claims.toml").write_text("")  # of no source
    write_chapter(root, "print(protocol)")
    return root


def write_chapter(root: Path, source: str) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# A"),
        nbformat.v4.new_code_cell("protocol: str = 'paper'", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    python = {"name": "python3", "display_name": "Python 3", "language": "python"}
    chapter = nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": python, "language_info": {"name": "python"}}
    )
    nbformat.write(chapter, root / "chapters" / "a.ipynb")


def run_chapter(root: Path) -> str:
    """What the chapter printed in the staged copy."""
    build.stage(root, root / "_build" / "source")
    build.run_all(root, root / "_build" / "source", root / "_build" / "executed")
    staged = nbformat.read(root / "_build" / "source" / "chapters" / "a.ipynb", as_version=4)
    return staged.cells[-1].outputs[0].text


def test_chapters_run_at_quick_on_a_copy(little_book: Path) -> None:
    before = (little_book / "chapters" / "a.ipynb").read_bytes()
    assert run_chapter(little_book) == "quick\n"
    assert (little_book / "chapters" / "a.ipynb").read_bytes() == before


def test_chapter_runs_again_only_when_its_inputs_changed(little_book: Path) -> None:
    write_chapter(little_book, "import time; print(time.time_ns())")
    first = run_chapter(little_book)
    assert run_chapter(little_book) == first
    (little_book / "defenses" / "idea.py").write_text("alpha = 1\n")
    second = run_chapter(little_book)
    assert second != first
    (little_book / "chapters" / "results.csv").write_text("table\n")
    third = run_chapter(little_book)
    assert third != second
    (little_book / "chapters" / "paper" / "claims.toml").write_text("# a claim\n")
    assert run_chapter(little_book) != third
    assert len(list((little_book / "_build" / "executed").iterdir())) == 1


def test_an_address_makes_a_canonical_one(little_book: Path, tmp_path: Path) -> None:
    build.stage(little_book, tmp_path / "source")
    config = tmp_path / "source" / "_config.yml"
    for owner, expected in (("OWNER", None), ("me", "https://me.github.io/does-it-hold/")):
        text = config.read_text().replace("github.com/OWNER/", f"github.com/{owner}/")
        config.write_text(text)
        build.html(tmp_path / "source", tmp_path / "html")
        page = BeautifulSoup((tmp_path / "html/chapters/a.html").read_text(), "html.parser")
        links = [str(link["href"]) for link in page.select("link[rel=canonical]")]
        picture = [str(tag["content"]) for tag in page.select("meta[property='og:image']")]
        assert links == ([f"{expected}chapters/a.html"] if expected else [])
        assert picture == ([f"{expected}_static/hook.png"] if expected else [])
        sitemap = tmp_path / "html" / "sitemap.xml"
        found = re.findall(r"<loc>(.+?)</loc>", sitemap.read_text()) if sitemap.exists() else []
        names = ("book/intro.html", "chapters/a.html") if expected else ()
        assert found == [f"{expected}{name}" for name in names]


FOLDED = """# A

Seen.

## Whole

<!-- fold -->

Hidden one.

### Below

Hidden two.

## In part

Seen, too.

<!-- fold: Some words & a sign -->

Hidden three.

<!-- unfold -->

Seen again.

<!-- fold: The rest -->

Hidden four.

### Heading

Seen at last.

:::{prf:proof}
Hidden five.
:::
"""


def test_what_is_marked_is_folded_and_nothing_else(little_book: Path, tmp_path: Path) -> None:
    (little_book / "book" / "intro.md").write_text(FOLDED)
    build.html(little_book, tmp_path / "html")
    page = BeautifulSoup((tmp_path / "html/book/intro.html").read_text(), "html.parser")
    folds = page.select("article details.fold")
    heads = [fold.select("summary")[0].text.strip("\n#") for fold in folds]
    assert heads == ["Whole", "Some words & a sign", "The rest", "Proof"]
    hidden = [p.text for fold in folds for p in fold.select("p")]
    assert hidden == [f"Hidden {n}." for n in ("one", "two", "three", "four", "five")]
    texts = [p.text for p in page.select("article p") if p.text not in hidden]
    assert texts == ["Seen.", "Seen, too.", "Seen again.", "Seen at last."]
    (section,) = page.select("#whole")
    assert section.select_one("details > summary > h2") and section.select_one("details #below")


def test_neighbors_of_hidden_code_are_one_line(little_book: Path, tmp_path: Path) -> None:
    path = little_book / "chapters" / "a.ipynb"
    chapter = nbformat.read(path, as_version=4)
    said = [nbformat.v4.new_output("stream", text="3\n")]
    for source, outputs in (("one = 1", []), ("two = 2", []), ("print(3)", said)):
        tags = {"tags": ["hide-input"]}
        cell = nbformat.v4.new_code_cell(source, metadata=tags, outputs=outputs)
        chapter.cells.append(cell)
    nbformat.write(chapter, path)
    build.html(little_book, tmp_path / "html")
    page = BeautifulSoup((tmp_path / "html/chapters/a.html").read_text(), "html.parser")
    (both,) = page.select("details.fold")
    assert both.select("summary")[0].text == "Show source of 2 cells"
    assert [code.text.strip() for code in both.select("pre")] == ["one = 1", "two = 2"]
    (other,) = page.select("details.hide")
    assert "print(3)" in other.text


@pytest.mark.parametrize("mark", ["> <!-- fold: words -->", "<!-- fold: words -->"])
def test_a_fold_that_cannot_be_is_an_error(little_book: Path, tmp_path: Path, mark: str) -> None:
    (little_book / "book" / "intro.md").write_text(f"# A\n\n{mark}\n\n## B\n")
    with pytest.raises(RuntimeError, match=r"a fold (inside a block|of nothing)"):
        build.html(little_book, tmp_path / "html")


def test_failed_chapter_leaves_nothing_that_looks_finished(little_book: Path) -> None:
    write_chapter(little_book, "1 / 0")
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        run_chapter(little_book)
    assert list((little_book / "_build" / "executed").iterdir()) == []


def test_warning_is_an_error_and_leaves_the_old_pages(little_book: Path, tmp_path: Path) -> None:
    build.html(little_book, tmp_path / "html")
    assert (tmp_path / "html" / "chapters" / "a.html").exists()
    (little_book / "book" / "intro.md").write_text("# Title\n\n{ref}`nowhere`\n")
    with pytest.raises(RuntimeError, match="undefined label"):
        build.html(little_book, tmp_path / "html")
    assert "Text." in (tmp_path / "html" / "book" / "intro.html").read_text()


ANYWHERE = """
import sys
sys.modules["fcntl"] = None
from pathlib import Path
from book import build, execute, pairs
root = build.ROOT = Path(sys.argv[1])
assert pairs.sync([root / "chapters" / "a.ipynb"], root) == []
assert execute.main([root / "chapters" / "a.ipynb"]) == []
build.main()
"""


def test_a_book_is_made_without_fcntl_in_any_folder_and_by_its_own_kernel(
    little_book: Path, tmp_path: Path
) -> None:
    """Without fcntl, as on Windows; in a folder with brackets; beside a foreign `python3`."""
    root = little_book.rename(tmp_path / "my [old] {book} (2)")
    write_chapter(root, "import sys\n\nprint(sys.executable)")
    shutil.copy(ROOT / "pyproject.toml", root)  # says what is paired with what
    kernel = {"argv": ["false"], "display_name": "Python 3", "language": "python"}
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps(kernel))
    environment = {"JUPYTER_PATH": str(tmp_path / "jupyter"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ANYWHERE, str(root)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    executed = nbformat.read(root / "chapters" / "a.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.strip() == sys.executable
    assert "sys.executable" in (root / "chapters" / "a.md").read_text()
    assert sys.executable in (root / "_build" / "html" / "chapters" / "a.html").read_text()
