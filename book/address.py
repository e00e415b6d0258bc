"""Carry the book's public address from `_config.yml` to every place that must spell it out.

Set-up cells, Colab badges, the README and CITATION.cff cannot read a configuration file.
`make sync` calls this after the one line in `_config.yml` has changed; tests compare.
"""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent

# What stands before an owner/repository, wherever one is spelled out.
SPELLED_OUT = re.compile(
    r"(?P<before>"
    r"colab\.research\.google\.com/github/"
    r"|clone (?:--depth 1 )?https://github\.com/"
    r'|clone\\?", .{0,30}?https://github\.com/'
    r'|address = \\?"https://github\.com/'
    r'|repository-code: "https://github\.com/'
    r'|(?:Repository|Issues|Changelog) = "https://github\.com/'
    r"|git\+https://github\.com/"
    r")(?P<slug>[\w.-]+/[\w-]+)"
)


def slug(root: Path) -> str:
    """The owner/repository that `_config.yml` names."""
    url = yaml.safe_load((root / "_config.yml").read_text())["repository"]["url"]
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w-]+", url):
        raise ValueError(
            f"_config.yml: repository.url is {url!r}; expected https://github.com/OWNER/REPOSITORY"
        )
    return url.removeprefix("https://github.com/")


def texts(root: Path) -> list[Path]:
    """The files that may spell the address out."""
    kinds = (
        "*.cff",
        "pyproject.toml",
        "*.md",
        "book/*.md",
        "book/*.ipynb",
        "chapters/*.md",
        "chapters/*.ipynb",
    )
    return [path for kind in kinds for path in sorted(root.glob(kind))]


def fill_in(root: Path) -> list[Path]:
    """Write the address of `_config.yml` wherever another stands; return what changed."""
    address = slug(root)
    changed = []
    for path in texts(root):
        text = path.read_text()
        new = SPELLED_OUT.sub(lambda match: match["before"] + address, text)
        if new != text:
            path.write_text(new)
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in fill_in(ROOT):
        print(f"address filled in: {path.relative_to(ROOT)}")
