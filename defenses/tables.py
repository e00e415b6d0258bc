"""Tables of our numbers beside the paper's, each with how it was measured."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from defenses.results import KEY, best, printed


@dataclass(frozen=True, repr=False)
class Table:
    """Our numbers beside the paper's: HTML in a notebook, text in a terminal."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def side_by_side(
    chapter: str,
    table: str,
    rows: Sequence[str] | None = None,
    columns: str | Sequence[str] | None = None,
    **choice: Any,
) -> Table:
    """Return a table of the paper with our best numbers beside its own.

    Parameters
    ----------
    chapter, table : str
        The table may be one that only we have measured.
    rows : names, optional
        Those to show, in this order; default: all, in the paper's order, then what only we have
        (rows in the order in which the paper first names them).
    columns : names or str, optional
        Likewise; a single text stands for every column that begins with it, such as `mnist fgsm`.
    **choice
        `measured`, `dataset`, `protocol`, `folder` as for `best`: `measured=rows` shows a live run
        in place of the store.

    Raises
    ------
    ValueError
        Neither the paper nor the measurements have such a table, row or column.
    """
    ours = best(chapter, **choice)
    theirs = printed(chapter, choice.get("folder"))[[*KEY, "printed"]]
    places = {row: place for place, row in enumerate(theirs["row"].unique())}
    more = ours[ours["own"] == ""].sort_values(KEY)
    more = more.sort_values("row", key=lambda row: row.map(places), kind="stable")
    cells = pd.concat([theirs.merge(ours, on=KEY, how="left"), more])
    cells = cells[cells["table"].isin(_chosen("table", [table], cells["table"]))]
    if isinstance(columns, str):
        columns = [c for c in cells["column"].unique() if c.startswith(columns)] or [columns]
    columns, rows = _chosen("column", columns, cells["column"]), _chosen("row", rows, cells["row"])
    cells = cells[cells["row"].isin(rows) & cells["column"].isin(columns)].fillna({"printed": ""})

    measured = cells[cells["value"].notna()]
    kinds: dict[Any, pd.DataFrame] = dict([*measured.groupby(["protocol", "dataset"], sort=False)])
    marks = dict(zip(kinds, "abcdefghijkl", strict=False)) if len(kinds) > 1 else {}
    decimals = cells["printed"].str.partition(".")[2].str.len().groupby(cells["metric"]).max()
    texts = [_cell(cell, decimals[cell.metric] or 2, marks) for cell in cells.itertuples()]
    cells = cells.assign(html=[t[0] for t in texts], text=[t[1] for t in texts])
    wide = cells.pivot(index="row", columns=["column", "metric"], values=["html", "text"])
    heads = cells.drop_duplicates(["column", "metric"]).set_index("column")["metric"].loc[columns]
    wide = wide.reindex(rows).fillna("").rename_axis(index=None)
    as_html, as_text = (_headed(wide[kind][[*heads.items()]]) for kind in ("html", "text"))
    title = re.sub(r"^(table|figure)(\d+\w?)$", lambda m: f"{m[1].title()} {m[2]}", table)
    asked, filled = ((frame["printed"] != "").sum() for frame in (cells, measured))
    caption = f"{title}: " + (
        f"{filled} of {asked} cells measured. Ours first, with its 95% interval; the paper's "
        "number in parentheses."
        if asked
        else "ours, with 95% intervals; the paper has no such table."
    )
    legend = [_how(marks.get(kind, ""), kind, group) for kind, group in kinds.items()]
    return Table(
        _page(as_html, caption, legend), "\n".join([as_text.to_string(), caption, *legend])
    )


def _chosen(what: str, asked: Sequence[str] | None, known: pd.Series) -> list[str]:
    names = list(dict.fromkeys(known))
    for name in names if asked is None else asked:
        if name not in names:
            raise ValueError(f"no {what} {name!r}: expected one of {', '.join(names)}")
    return names if asked is None else list(asked)


def _cell(cell: Any, digits: int, marks: Mapping[tuple[str, str], str]) -> tuple[str, str]:
    ours, interval, mark = "–", "", marks.get((cell.protocol, cell.dataset), "")
    if not math.isnan(cell.value):
        ours = f"{cell.value:.{digits}f}"
    if cell.ci_low < cell.ci_high:
        interval = f"{cell.ci_low:.{digits}f}–{cell.ci_high:.{digits}f}"
    html = [f'<b class="ours">{ours}</b>' + (f"<sup>{mark}</sup>" if mark else "")]
    html += [f'<small class="interval">{interval}</small>'] if interval else []
    html += [f'<small class="paper">({cell.printed})</small>'] if cell.printed else []
    return "<br>".join(html), f"{ours}{mark}" + (f" ({cell.printed})" if cell.printed else "")


def _headed(frame: pd.DataFrame) -> pd.DataFrame:
    """Head columns by what neighbors share, `mnist fgsm`, above what is their own, `0.3`."""
    heads = [
        column.rpartition(" ")[::2] if metric == "accuracy" else (column, metric)
        for column, metric in frame.columns
    ]
    return frame.set_axis(pd.MultiIndex.from_tuples(heads), axis=1)


def _how(mark: str, kind: tuple[str, str], measured: pd.DataFrame) -> str:
    protocol, dataset = kind
    others = [name for name in measured["own"].unique() if name not in ("", dataset)]
    seeds = sorted({int(seed) for text in measured["seed"] for seed in text.split()})
    n = sorted({int(n) for n in measured["n"]})
    return (mark and f"{mark}: ") + "; ".join(
        [
            f"protocol {protocol} on {dataset}"
            + (f", not {' or '.join(others)}" if others else ""),
            f"n = {n[0]:,}" + (f" to {n[-1]:,}" if len(n) > 1 else ""),
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
            *dict.fromkeys(name for text in measured["device"] for name in text.split("; ")),
            f"{measured['seconds'].sum():,.0f} s in all",
        ]
    )


def _page(table: pd.DataFrame, caption: str, legend: list[str]) -> str:
    table = table.rename(index=escape).rename(columns=escape)
    return (
        '<div class="side-by-side"><div class="side-by-side-scroll" style="overflow-x:auto">'
        f"{table.to_html(escape=False, border=0, classes='table')}</div>"
        f'<p class="side-by-side-caption">{escape(caption)}</p><ul class="side-by-side-legend">'
        f"{''.join(f'<li>{escape(line)}</li>' for line in legend)}</ul></div>"
    )
