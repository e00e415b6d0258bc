"""Tables of our numbers beside the paper's, each with how it was measured."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from defenses import words
from defenses.results import KEY, best, is_own, printed
from defenses.run import Run


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
    chapter: str | Run,
    table: str,
    rows: Sequence[str] | None = None,
    columns: str | Sequence[str] | None = None,
    **choice: Any,
) -> Table:
    """Return a table of the paper with our best numbers beside its own.

    Parameters
    ----------
    chapter : str or Run
        With a run of somebody's own (longer than quick, or kept in a folder), what it measured
        stands below what is stored, where the two differ.
    table : str
        It may be one that only we have measured.
    rows : names, optional
        Those to show, in this order; default: all, in the paper's order, then what only we have
        (rows in the order in which the paper first names them, columns with the strongest attack
        first).
    columns : names or str, optional
        Likewise; a single text stands for every column that begins with it, such as `mnist fgsm`.
    **choice
        `measured`, `dataset`, `protocol`, `folder` as for `best`: `measured=rows` shows what a live
        run measured, in place of the store, beside the paper only where the data set is the same.

    A table of which nothing is measured yet is a line that folds out to what the paper prints.

    Raises
    ------
    ValueError
        Neither the paper nor the measurements have such a table, row or column.
    """
    run, folder = (chapter if isinstance(chapter, Run) else None), choice.get("folder")
    chapter = chapter.chapter if isinstance(chapter, Run) else chapter
    ours, live = best(chapter, **choice), choice.get("measured") is not None
    mine = run.rows if run and run.own and not live else []
    own = best(chapter, [row for row in mine if row["table"] == table], folder=folder)
    theirs = printed(chapter, folder)[[*KEY, "printed"]]
    places = {row: place for place, row in enumerate(theirs["row"].unique())}
    more = ours[ours["own"] == ""].sort_values(KEY)
    more = more.sort_values("row", key=lambda row: row.map(places), kind="stable")
    cells = pd.concat([theirs.merge(ours, on=KEY, how="left"), more, own[KEY]])
    cells = cells.drop_duplicates(KEY)
    cells = cells.merge(own[[*KEY, "value"]], on=KEY, how="left", suffixes=("", "_of_run"))
    cells = cells[cells["table"].isin(_chosen("table", [table], cells["table"]))]
    names = [*dict.fromkeys(cells.loc[cells["printed"].notna(), "column"])]
    names += sorted({*cells["column"]} - {*names}, key=words.rank)
    if isinstance(columns, str):
        columns = [name for name in names if name.startswith(columns)] or [columns]
    columns, rows = _chosen("column", columns, names), _chosen("row", rows, cells["row"])
    cells = cells[cells["row"].isin(rows) & cells["column"].isin(columns)].fillna({"printed": ""})

    measured = cells[cells["value"].notna()]
    if live and len(measured):
        same = [is_own(*two) for two in measured[["dataset", "own"]].to_numpy()]
        cells = measured = measured.assign(printed=measured["printed"].where(same, ""))
        rows = [row for row in rows if row in {*cells["row"]}]
        columns = [column for column in columns if column in {*cells["column"]}]
    kinds: dict[Any, pd.DataFrame] = dict([*measured.groupby(["protocol", "dataset"], sort=False)])
    marks = dict(zip(kinds, "abcdefghijkl", strict=False)) if len(kinds) > 1 else {}
    decimals = cells["printed"].str.partition(".")[2].str.len().groupby(cells["metric"]).max()
    texts = [_cell(cell, int(decimals[cell.metric]), marks) for cell in cells.itertuples()]
    cells = cells.assign(html=[t[0] for t in texts], text=[t[1] for t in texts])
    wide = cells.pivot(index="row", columns=["column", "metric"], values=["html", "text"])
    heads = cells.drop_duplicates(["column", "metric"]).set_index("column")["metric"].loc[columns]
    wide = wide.reindex(rows).fillna("").rename(index=words.row).rename_axis(index=None)
    header, said = _header([*heads.items()], [words.DATA.get(d, d) for _, d in kinds])
    as_html, as_text = (wide[kind][[*heads.items()]] for kind in ("html", "text"))
    as_text = as_text.set_axis(pd.MultiIndex.from_tuples(header), axis=1)

    title = " · ".join([words.title(table) + ", this run" * live, *said])
    asked, filled = ((frame["printed"] != "").sum() for frame in (cells, measured))
    own = own.merge(cells[KEY], on=KEY)
    nothing = measured.empty and own.empty
    if nothing:
        note = f"{asked} cells printed, none measured yet."
    elif asked:
        note = f"{filled} of {asked} cells measured. This book's number first, with its 95% "
        note += "interval; the paper's in parentheses."
    else:
        note = "This book's numbers, with 95% intervals"
        note += "." if live else "; the paper has no such table."
    legend = [_how(marks.get(kind, ""), kind, group) for kind, group in kinds.items()]
    if len(own):
        note += f" This run measured {len(own)} of them; where it differs, its number is below."
        legend += [_how("this run", kind, g) for kind, g in own.groupby(["protocol", "dataset"])]
    text = "\n".join([title, as_text.to_string(), note, *legend])
    page = _page(as_html, header, title, note, legend)
    if nothing:
        page = f"<details><summary>{escape(f'{title}: {note}')}</summary>{page}</details>"
    return Table(page, text)


def _chosen(what: str, asked: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(known))
    for name in names if asked is None else asked:
        if name not in names:
            raise ValueError(f"no {what} {name!r}: expected one of {', '.join(names)}")
    return names if asked is None else list(asked)


def _cell(cell: Any, digits: int, marks: Mapping[tuple[str, str], str]) -> tuple[str, str]:
    """HTML and text: the paper's decimals, or four digits, whichever is less.

    Of what the paper does not have: one decimal of a share, else two digits of what is small.
    """
    share = words.is_percent(cell.metric)
    if not digits and not share and 0 < abs(cell.value) < 0.1:
        digits = min(4, 1 - math.floor(math.log10(abs(cell.value))))
    digits = digits or (1 if share else 2)

    def number(value: float) -> str:
        if math.isnan(value):
            return "–"
        before = len(f"{int(abs(value))}".lstrip("0"))
        return f"{value:,.{digits if share else min(digits, max(0, 4 - before))}f}"

    ours, interval, mark = number(cell.value), "", marks.get((cell.protocol, cell.dataset), "")
    of_run = "" if number(cell.value_of_run) in ("–", ours) else number(cell.value_of_run)
    if cell.ci_low < cell.ci_high:
        digits = 1 if share else len(ours.partition(".")[2])
        interval = f"{cell.ci_low:,.{digits}f}–{cell.ci_high:,.{digits}f}"
    html = [f'<b class="ours">{ours}</b>' + (f"<sup>{mark}</sup>" if mark else "")]
    html += [f'<small class="interval">{interval}</small>'] if interval else []
    html += [f'<small class="paper">({cell.printed})</small>'] if cell.printed else []
    html += [f'<small class="run">this run {of_run}</small>'] if of_run else []
    text = f"{ours}{mark}" + f" ({cell.printed})" * bool(cell.printed)
    return "<br>".join(html), text + f" | {of_run}" * bool(of_run)


def _header(
    heads: Sequence[tuple[str, str]], measured_on: Sequence[str]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Head each column by data set, attack, size and metric; what all share is said once.

    Where a column has one metric only, the metric stands above.
    """
    lines = [(*words.column(key), words.METRICS.get(metric, metric)) for key, metric in heads]
    sized = {line[2] for line in lines if line[1] != words.COLUMNS["clean"]}
    data, metrics = {line[0] for line in lines}, {line[3] for line in lines}
    once = [len(data) == 1, False, len(sized) == 1, len(metrics) == 1]
    order = (0, 3, 1, 2) if len({key for key, _ in heads}) == len(heads) else (0, 1, 2, 3)
    kept = [k for k in order if not once[k] and any(line[k] for line in lines)]
    data = {*measured_on} if len({*measured_on}) == 1 else data
    said = [*metrics] * once[3] + [*data] * once[0] + [*sized] * once[2]
    return [tuple(line[k] for k in kept) for line in lines], [*filter(None, said)]


def _how(mark: str, kind: tuple[str, str], measured: pd.DataFrame) -> str:
    protocol, dataset = kind
    others = [name for name in measured["own"].unique() if name not in ("", dataset)]
    others = [words.DATA.get(name, name) for name in others]
    seeds = sorted({int(seed) for text in measured["seed"] for seed in text.split()})
    n = sorted({int(n) for n in measured["n"]})
    return (mark and f"{mark}: ") + "; ".join(
        [
            f"protocol {protocol} on {words.DATA.get(dataset, dataset)}"
            + (f", not {' or '.join(others)}" if others else ""),
            f"n = {n[0]:,}" + (f" to {n[-1]:,}" if len(n) > 1 else ""),
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
            *dict.fromkeys(name for text in measured["device"] for name in text.split("; ")),
            f"{measured['seconds'].sum():,.0f} s in all",
        ]
    )


def _page(
    table: pd.DataFrame,
    header: Sequence[tuple[str, ...]],
    title: str,
    note: str,
    legend: Sequence[str],
) -> str:
    html = '<div class="side-by-side">'
    for part in _parts(header):
        html += '<div class="side-by-side-scroll" style="overflow-x:auto"><table class="table">'
        html += (
            f"<caption><span>{escape(title)}{' · continued' * (part.start > 0)}</span></caption>"
        )
        html += f"<thead>{''.join(_header_rows(header[part]))}</thead><tbody>"
        for row, cells in zip(table.index, table.to_numpy()[:, part], strict=True):
            html += f'<tr><th scope="row">{escape(str(row))}</th>'
            html += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        html += "</tbody></table></div>"
    html += f'<p class="side-by-side-caption">{escape(note)}</p><ul class="side-by-side-legend">'
    return html + "".join(f"<li>{escape(line)}</li>" for line in legend) + "</ul></div>"


def _parts(header: Sequence[tuple[str, ...]], most: int = 8) -> Iterator[slice]:
    """At most as many columns as a page has room for, parted where a head ends if it can be."""
    start, count = 0, len(header)
    size = -(-count // -(-count // most))
    ends = [k for k in range(1, count) if header[k][:-1] != header[k - 1][:-1]] + [count]
    while start < count:
        near = [k for k in ends if start < k <= start + most] or [start + size]
        stop = min(near, key=lambda k: abs(k - start - size))
        yield slice(start, stop)
        start = stop


def _header_rows(header: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Neighbors under one head share its cell; a head with nothing below reaches down."""
    depth, taken = len(header[0]), set[tuple[int, int]]()
    for level in range(depth):
        row = "" if level else f'<td rowspan="{depth}"></td>'
        paths = [heads[: level + 1] for heads in header]
        for path, group in itertools.groupby(range(len(header)), paths.__getitem__):
            at, low = [*group], level + 1
            if (level, at[0]) in taken:
                continue
            while low < depth and not any(header[k][low] for k in at):
                taken |= {(low, k) for k in at}
                low += 1
            scope = "col" if len(at) == 1 else f'colgroup" colspan="{len(at)}'
            reach = f' rowspan="{low - level}"' if low - level > 1 else ""
            row += f'<th scope="{scope}"{reach}>{escape(path[-1])}</th>'
        yield f"<tr>{row}</tr>"
