"""What a chapter shows of the module is the module."""

from defenses.prose import Prose, source


def documented(x: int) -> int:
    """Say something
    over two lines."""
    return x + 1  # a reason


class Holder:
    def method(self) -> str:
        return "kept"


def test_source_is_the_code_without_its_docstring() -> None:
    shown = source(documented, Holder.method)
    assert shown == (
        "```python\n"
        "def documented(x: int) -> int:\n"
        "    return x + 1  # a reason\n"
        "\n"
        "def method(self) -> str:\n"
        '    return "kept"\n'
        "```"
    )


def test_prose_is_markdown_in_a_notebook_and_itself_in_a_terminal() -> None:
    text = Prose("**bold**")
    assert text._repr_markdown_() == repr(text) == "**bold**"
