"""A CSV series -> its plot in the home style: one reader and one renderer for training and inference.

The look comes from ``plots.series_figure``. Drawing that figure takes about 0.1 s, most of it spent on finding out
where labels go, so ``SeriesRenderer`` keeps one such figure, asks it for ticks and styles, does the layout with
cached label sizes and strokes the line with the same Agg rasteriser: the same picture in a fraction of the time.
"""

from __future__ import annotations

import csv
import io
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import files

if TYPE_CHECKING:
    import pandas

DATA_NAMES = ("data", "value")
TIME_NAMES = (
    "epoch",
    "date",
    "index",
    "t",
    "step",
    "ds",
    "year",
    "month",
    "day",
    "hour",
    "minutes",
    "seconds",
    "sec",
    "sample",
    "id",
    "zeit",
    "uhrzeit",
    "datum",
    "",
)
LABEL_NAME = re.compile(r"(is_)?(label|class|target|anomal|outlier|flag)")
"""What the name of a column of labels begins with, which is the data only where nothing else is."""
TIME_ROOTS = ("time", "unixtime", "unix", "elapsed", "unnamed")
"""Names of time whatever follows them; after those of ``TIME_NAMES`` only words of ``TIME_UNITS`` may."""
TIME_UNITS = (
    "s",
    "sec",
    "seconds",
    "ms",
    "us",
    "ns",
    "h",
    "hours",
    "days",
    "utc",
    "stamp",
    "time",
    "index",
    "id",
    "no",
    "number",
)
MISSING = ("", "na", "n/a", "null", "none", "-")
SUM_NAME = re.compile(
    r"(grand |sub)?(total|sum|summe|somme|suma|gesamt|average|avg|mean|mittel|mittelwert|durchschnitt|moyenne|median|"
    r"min|max|minimum|maximum|count|anzahl)s?\b",
    re.IGNORECASE,
)
"""What begins the last rows of a table that sum up the others."""
SAMPLE_CHARACTERS = 65_536
THOUSANDS_APART = re.compile("(?<=\\d)['\u2019\\xa0\u2009\u202f](?=\\d{3}(?!\\d))")
"""Apostrophes and spaces that do not break, which are never decimal marks."""
ONES = str.maketrans("023456789", "111111111")
MAX_ABSOLUTE = 1e100  # beyond it the axis limits overflow
DECIMATE_ABOVE = 20_000  # rows; far more than the plot has pixel columns
DECIMATE_BINS = 3_200  # about five to a pixel column


class SeriesError(files.FileError):
    """One CSV file cannot be used."""


class Series(NamedTuple):
    values: np.ndarray  # float64 (n,), finite, at least two, not all equal
    column: str  # its name, or "column 2" in a file without header
    n_dropped: int  # rows without a number
    sums: tuple[str, ...]  # what the last rows were called that were left out because they sum up the others
    n_columns: int  # of numbers that could be the series; one where its name is data or value


# ----------------------------------------------------------------------------------------- reading a CSV


class _Layout(NamedTuple):
    encoding: str
    separator: str
    header: bool
    names: list[str]  # as written, or empty strings without header
    skip_rows: int  # lines before the first row below the header

    @property
    def frees_commas(self) -> bool:
        """Whether columns are separated by something else."""
        return self.separator != "," and len(self.names) > 1


def read_series(path: str | Path) -> Series:
    """The one series of a CSV file, by the rules of the data layout.

    With a header, the column called ``data`` or ``value``; else the first numeric column that is no time column (dates,
    a name such as ``time`` or ``t_s``, or first of several and rising all along; without a name also counting up or
    down). Comma, semicolon or tab; decimal commas where the separator allows them; thousands set apart, where that is
    no decimal mark for sure in the column, or, between semicolons or tabs, where 1.023 and 1.107 stand below 950; UTF-8
    with or without BOM, UTF-16, Latin-1. Comments and other lines above the header are left out. Rows without a number
    are dropped and counted, of a file of one column empty lines, too, but for those at its end. The last rows are left
    out and named where ``Total`` or the like stands in place of their time, and all others have numbers or time stamps
    there. In a file without header, ``1,5`` is two numbers.

    Raises:
        SeriesError: unreadable, empty, header only, no numeric column but time, no number in it, one row, infinite or
            constant, or cut at decimal commas.
    """
    layout = _sniff(path)
    table = _read_table(path, layout)
    numbers_of = cache(lambda i: _to_numbers(table.iloc[:, i], layout.frees_commas))
    column, n_columns = _choose_column(path, table, numbers_of, layout)
    numbers = numbers_of(column)
    places, sums = _without_sums(table, numbers_of, column, layout)
    values = numbers[places]
    name = layout.names[column] or f"column {column + 1}"
    _check_values(path, values, name)
    return Series(values, name, len(numbers) - len(values) - len(sums), sums, n_columns)


def _sniff(path: str | Path) -> _Layout:
    try:
        with Path(path).open("rb") as file:
            head = file.read(SAMPLE_CHARACTERS)
    except OSError as error:
        raise SeriesError(path, f"cannot be read ({error.strerror or error})") from error
    if not head.strip():
        raise SeriesError(path, "is empty; expected a column of numbers")
    encoding = _encoding(head)
    text = head.decode(encoding, errors="ignore").lstrip("\ufeff")
    if "\x00" in text:
        raise SeriesError(path, "is not a text file; expected a CSV")
    lines = [(number, line) for number, line in enumerate(re.split(r"\r\n|\r|\n", text)) if line.strip()]
    lines = _without_comments(lines[:-1] if len(head) == SAMPLE_CHARACTERS and len(lines) > 1 else lines)
    if not lines:
        raise SeriesError(path, "is empty; expected a column of numbers")
    numbers, lines = zip(*lines, strict=True)
    return _table_layout(path, list(lines), list(numbers), encoding)


def _without_comments(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Numbered lines without comments and Excel's ``sep=;`` on top; a last comment with a name for each column is the
    header.
    """
    start = next((i for i, (_, line) in enumerate(lines) if not re.match(r"\s*(#|sep=.\s*$)", line)), len(lines))
    rest = lines[start:]
    if start and rest:
        number, above = lines[start - 1]
        heading, separator = above.lstrip("# "), _separator([line for _, line in rest])
        names, first = (next(csv.reader([line], delimiter=separator)) for line in (heading, rest[0][1]))
        if above.lstrip().startswith("#") and len(names) == len(first) and _is_header(names) and not _is_header(first):
            return [(number, heading), *rest]
    return rest


def _encoding(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if head.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    if head[1::2].count(0) > len(head) // 4:
        return "utf-16-le"
    if head[0::2].count(0) > len(head) // 4:
        return "utf-16-be"
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return "utf-8" if len(head) - error.start < 4 else "latin-1"
    return "utf-8"


def _table_layout(path: str | Path, lines: list[str], numbers: list[int], encoding: str) -> _Layout:
    """The layout of non-blank lines that stand at those places in the file.

    Raises:
        SeriesError: its numbers seem to be cut at decimal commas.
    """
    separator = _separator(lines)
    rows = list(csv.reader(lines[:200], delimiter=separator))
    at = _header_row(rows)
    names, body = ([], rows) if at is None else ([name.strip() for name in rows[at]], rows[at + 1 :])
    skip_rows = numbers[0] if at is None else numbers[at] + 1
    if separator == "," and len(names) == 1 and '"' not in "".join(lines[1:]) and _splits_numbers(body):
        separator, body = "\t", [[",".join(row)] for row in body]  # one column, its commas are within numbers
    if names and body and all(len(row) == len(names) + 1 for row in body) and any(row[-1].strip() for row in body):
        quoted = all(line.lstrip().startswith('"') for line in lines[at + 1 :])
        # under another name than one of time the first field may be a name of the row
        if separator == "," and not quoted and _is_time(names[0].lower()) and _ends_in_decimals(body):
            raise SeriesError(
                path,
                "has a field more than its header names in every row, as decimal commas in numbers such as "
                f"{','.join(body[0][-2:])} make; expected decimal points, semicolons between the fields or a name for "
                "each",
            )
        names = ["", *names]  # R does not name the column of row names
    width = max(map(len, [names, *body]))
    return _Layout(encoding, separator, at is not None, names + [""] * (width - len(names)), skip_rows)


def _header_row(rows: list[list[str]]) -> int | None:
    """Which row is the header, if any: one of the rows of text right above the table, which starts at the first row
    like most of those further down.
    """
    n_text = next((i for i, row in enumerate(rows) if not _is_header(row)), len(rows))
    table = [row for row in rows[len(rows) // 2 :] if not _is_header(row)] or rows[n_text:] or rows
    (width, kind), _ = Counter((len(row), _kind(row[0])) for row in table).most_common(1)[0]
    start = next(
        (i for i, row in enumerate(rows) if (len(row), _kind(row[0])) == (width, kind) and not _is_header(row)), n_text
    )
    # lines with a number that are no rows of the table
    above = next((i + 1 for i in range(start - 1, -1, -1) if "number" in map(_kind, rows[i])), 0)
    heading = [
        i
        for i in range(above, start)
        if _is_header(rows[i]) and len(set(rows[i])) == len(rows[i]) in (width, width - 1)
    ]
    if above and heading:
        return _naming_row(rows, heading, width)
    written = [{field.strip().lower() for field in row} for row in rows]
    named = [
        i
        for i, row in enumerate(rows)
        if len(row) == width
        and _is_header(row)
        and written[i].intersection(DATA_NAMES)
        and written[i].isdisjoint(MISSING)
    ]
    if named:
        return named[0]
    if not n_text:
        counted = rows[0] == [str(i) for i in range(len(rows[0]))]  # as pandas names columns without a name
        return (
            0
            if counted
            and len(rows) > 1
            and not any(re.fullmatch(r"[+-]?\d*", field.strip()) for row in rows[1:] for field in row[-1:])
            else None
        )
    return _naming_row(rows, range(n_text), width)


def _naming_row(rows: list[list[str]], places: Sequence[int], width: int) -> int:
    """Of rows of text at those places the first that names every column, one of them ``data`` or ``value`` if there is
    such a one, else the last.
    """
    full = next(
        (
            [i for i in places if len(rows[i]) == n]
            for n in (width, width - 1)
            if any(len(rows[i]) == n for i in places)
        ),
        [places[-1]],
    )
    return next((i for i in full if any(field.strip().lower() in DATA_NAMES for field in rows[i])), full[0])


def _kind(field: str) -> str:
    """What a field looks like: a number, a date or time of day, or text."""
    field = field.strip()
    return "number" if _is_number(field) or _is_number(field, ",") else "stamp" if field[:1].isdigit() else "text"


def _is_sum(field: object) -> bool:
    """Whether a field names a row that sums up others.

    >>> _is_sum("Summe:"), _is_sum("Grand total"), _is_sum("end"), _is_sum("minute")
    (True, True, False, False)
    """
    return isinstance(field, str) and bool(SUM_NAME.match(field.strip()))


def _splits_numbers(body: list[list[str]]) -> bool:
    """Whether all rows of several fields are numbers cut at their commas: decimal marks, or, where other rows have one
    field, marks of thousands.
    """
    several = [_plain(",".join(row)) for row in body if len(row) > 1]
    kinds = [r"\d*(,\d+)+|[1-9]\d{0,2}(\.\d{3})+,\d+"]
    kinds += [r"[1-9]\d{0,2}(,\d{3})+(\.\d*)?"] if len(several) < len(body) else []
    return any(
        all(re.fullmatch(rf"\s*[+-]?({kind})(e[+-]?\d+)?\s*", row, re.IGNORECASE) for row in several) for kind in kinds
    )


def _ends_in_decimals(body: list[list[str]]) -> bool:
    """Whether the last two fields of all rows may be one number each, cut at its decimal comma: a whole number, then as
    many digits in all rows. No number has a decimal point, and a single digit is a 0 somewhere, in rows that are not
    numbered from 1 as those of R are.
    """
    wholes, digits = ([_plain(row[i]).strip() for row in body] for i in (-2, -1))
    widths = set(map(len, digits))
    pointed = any("." in field and _is_number(field) for row in body for field in row)
    if len(widths) > 1 or pointed or not all(re.fullmatch(r"[+-]?\d+", whole) for whole in wholes):
        return False
    numbered = [row[0].strip() for row in body] == [str(i + 1) for i in range(len(body))]
    return all(map(str.isdecimal, digits)) and (max(widths) > 1 or ("0" in digits and not numbered))


def _thousands(text: str, shapes: set[str], free_commas: bool) -> str:
    """The comma or point that sets thousands apart in a column; nothing where it may be a decimal mark, or is one of
    three points as in an address.

    Args:
        text: its fields, one a line.
        shapes: the different ones, with 1 for every digit.
        free_commas: whether they separate no columns, and points alone may set thousands apart.
    """
    small = {
        ",": any(re.fullmatch(r"[+-]?1{1,3}", shape) for shape in shapes),
        ".": free_commas and _are_points_of_thousands(text),
    }
    for mark, decimal in ((",", "."), (".", ",")):
        holding = [
            shape for shape in shapes if mark in shape and re.fullmatch(r"[+-]?[1.,]+(e[+-]?1+)?", shape, re.IGNORECASE)
        ]
        sure = any(decimal in shape or (shape.count(mark) > 1 and shape.count(".") != 3) for shape in holding) or (
            small[mark] and holding
        )
        grouped = re.compile(rf"[+-]?1{{1,3}}({re.escape(mark)}111)+({re.escape(decimal)}1*)?")
        if (
            sure
            and all(map(grouped.fullmatch, holding))
            and not re.search(rf"(?m)^[+-]?0\d*{re.escape(mark)}[\d.,]*$", text)
        ):
            return mark
    return ""


def _are_points_of_thousands(text: str) -> bool:
    """Whether several fields have a point, none a comma, and of those without, the longest are numbers of three digits,
    other than 999 for what is missing; and the numbers are more alike read so.
    """
    return (
        "," not in text
        and text.count(".") > 1
        and bool(re.search(r"(?m)^[+-]?(?!999$)[1-9]\d\d$", text))
        and not re.search(r"(?m)^[+-]?\d{4,}$", text)
        and _spread(text.replace(".", "")) < _spread(text)
    )


def _spread(text: str) -> float:
    """The largest by the smallest absolute value above 0 of the numbers in text, one a line.

    >>> round(_spread("950\\n1.023\\n1.100\\n"), 1), round(_spread("950\\n1023\\n1100\\n"), 2)
    (928.6, 1.16)
    """
    sizes = [abs(float(line)) for line in text.split() if _is_number(line)]
    return max(sizes, default=1.0) / min(filter(None, sizes), default=1.0)


def _plain(text: str) -> str:
    """Text with an ASCII minus and without what is never a decimal mark in a number.

    >>> _plain("\u221212'345.6")
    '-12345.6'
    """
    return text if text.isascii() and "'" not in text else THOUSANDS_APART.sub("", text.replace("\u2212", "-"))


def _separator(lines: list[str]) -> str:
    """Semicolon or tab when the first rows have it outside quotes, else comma."""
    plain = [re.sub(r'"[^"]*"', "", line) for line in lines[:50]]
    for separator in (";", "\t"):
        if sum(separator in line for line in plain) > len(plain) // 2:
            return separator
    return ","


def _is_number(field: str, decimal: str = ".") -> bool:
    if "_" in field:  # which Python takes
        return False
    try:
        float(_plain(field).replace(",", ".") if decimal == "," else _plain(field))
    except ValueError:
        return False
    return True


def _is_header(row: list[str]) -> bool:
    """No field is a number and not all are missing, or the first is empty as in an index column's heading."""
    if len(row) > 1 and not row[0].strip():
        return True
    return any(field.strip().lower() not in MISSING for field in row) and not any(
        _is_number(field) or _is_number(field, ",") for field in row
    )


def _read_table(path: str | Path, layout: _Layout) -> pandas.DataFrame:
    """Columns of numbers where all fields are, with decimal points and no mark of thousands, else of text as it is
    written.
    """
    table = _read_columns(path, layout, {})
    unsure = [i for i in table if layout.frees_commas and _may_be_thousands(table[i])]
    return _read_columns(path, layout, dict.fromkeys(unsure, str)) if unsure else table


def _may_be_thousands(column: pandas.Series) -> bool:
    """Whether numbers are as read from whole ones of three digits and less, others with a point before the last three
    digits.
    """
    if column.dtype != np.float64:
        return False
    sizes = column[column.notna()].abs().to_numpy()
    whole, thousands = sizes == sizes.round(), sizes * 1000
    return bool(
        (sizes < 1000).all() and (sizes[whole] >= 100).any() and (np.abs(thousands - thousands.round()) < 1e-6).all()
    )


def _read_columns(path: str | Path, layout: _Layout, types: dict[int, type]) -> pandas.DataFrame:
    import pandas

    alone = len(layout.names) == 1  # an empty line is a row of it, unless it is the end
    source = io.StringIO(Path(path).read_bytes().decode(layout.encoding, "replace").rstrip()) if alone else path
    try:
        return pandas.read_csv(
            source,
            skip_blank_lines=not alone,
            sep=layout.separator,
            header=None,
            names=range(len(layout.names)),
            index_col=False,
            skiprows=layout.skip_rows,
            encoding=layout.encoding,
            encoding_errors="replace",
            skipinitialspace=True,
            dtype=types,
            low_memory=False,  # else the type may change within a column
        )
    except pandas.errors.EmptyDataError:
        raise SeriesError(path, "holds a header and no rows; expected a column of numbers") from None
    except (pandas.errors.ParserError, UnicodeError, csv.Error) as error:
        raise SeriesError(path, f"is no table ({' '.join(str(error).split()).rstrip('.')})") from None


def _to_numbers(column: pandas.Series, free_commas: bool) -> np.ndarray:
    """float64, NaN where there is no number. ``free_commas``: none of them separates columns."""
    import pandas

    if pandas.api.types.is_bool_dtype(column):
        return np.full(len(column), np.nan)
    if not pandas.api.types.is_numeric_dtype(column):
        text = _plain("\n".join([str(field).strip().replace("\n", " ") for field in column.fillna("").tolist()]))
        shapes = set(text.translate(ONES).split("\n"))
        thousands = _thousands(text, shapes, free_commas)
        if thousands:
            text, shapes = text.replace(thousands, ""), {shape.replace(thousands, "") for shape in shapes}
        if not any(_is_number(shape, ",") for shape in shapes):
            return np.full(len(column), np.nan)
        column = pandas.to_numeric(pandas.Series(text.replace(",", ".").split("\n"), dtype=object), errors="coerce")
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def _choose_column(
    path: str | Path, table: pandas.DataFrame, numbers_of: Callable[[int], np.ndarray], layout: _Layout
) -> tuple[int, int]:
    """The place of the series, and of how many columns that could be it."""
    if not len(table):
        raise SeriesError(path, "holds a header and no rows; expected a column of numbers")
    names = [name.lower() for name in layout.names]
    named = [i for wanted in DATA_NAMES for i, name in enumerate(names) if name == wanted]
    candidates = named or [i for i in range(table.shape[1]) if _looks_numeric(table.iloc[:, i], numbers_of(i))]
    candidates = candidates or [i for i in range(table.shape[1]) if table.iloc[:, i].isna().all()]
    if not candidates:
        raise SeriesError(
            path, f"holds no numeric column ({_columns(layout)}); expected one called data or value, or any of numbers"
        )
    if named:
        return next((i for i in named if _looks_numeric(table.iloc[:, i], numbers_of(i))), named[0]), 1
    others = [i for i in candidates if not (layout.header and _is_time(names[i]))]
    others = [i for i in others if not LABEL_NAME.match(names[i])] or others
    if not others:
        raise SeriesError(
            path,
            f"holds no numeric column but time ({_columns(layout)}); expected one called data or value, or any other",
        )
    if others[0] != 0 or len(others) == 1:
        return others[0], len(others)
    is_even, is_unnamed = _ticks(numbers_of(0)), not names[0]
    if not _rises(numbers_of(0)) and not (is_unnamed and is_even):
        return 0, len(others)
    # it goes as times do, but in uneven steps and under a name of its own it may be the series all the same
    return others[1], len(others) - 1 if is_even or is_unnamed else len(others)


def _without_sums(
    table: pandas.DataFrame, numbers_of: Callable[[int], np.ndarray], column: int, layout: _Layout
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The places of rows with a number in that column, int (n,), without the last ones that name a sum in place of the
    time; and these names.
    """
    places = np.flatnonzero(~np.isnan(numbers_of(column)))
    for i, name in enumerate(layout.names):
        named = layout.header and _is_time(name.lower())
        if i == column or not (named or i == 0):
            continue
        times = table.iloc[places, i].tolist()
        if [_is_sum(time) for time in times[:1] + times[-1:]] != [False, True]:
            continue
        n_above = next(n for n in range(len(times), 0, -1) if not _is_sum(times[n - 1]))
        kinds = {_kind(time if isinstance(time, str) else "") for time in set(times[:n_above])}
        if "text" not in kinds and (named or "stamp" in kinds or _rises(numbers_of(i)[places])):
            return places[:n_above], tuple(str(time).strip() for time in times[n_above:])
    return places, ()


def _is_time(name: str) -> bool:
    """Whether a name in lower case is one of time, as ``time (s)``, ``t_s``, ``timestamp_ms`` or ``unnamed: 0`` are."""
    first, *rest = re.split(r"[\s_.:-]+", re.sub(r"\s*[\[(].*", "", name))
    return (
        first in TIME_ROOTS
        or first.startswith(("timestamp", "datetime"))
        or (first in TIME_NAMES and all(word in TIME_UNITS for word in rest))
    )


def _columns(layout: _Layout) -> str:
    shown = [name or f"column {i + 1}" for i, name in enumerate(layout.names)]
    return "columns: " + ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def _looks_numeric(column: pandas.Series, numbers: np.ndarray) -> bool:
    """At least half of the filled fields are numbers."""
    filled = column.notna().sum()
    return filled > 0 and np.count_nonzero(~np.isnan(numbers)) * 2 >= filled


def _rises(values: np.ndarray) -> bool:
    """Whether every number is larger than the one before."""
    steps = np.diff(values[~np.isnan(values)])
    return len(steps) > 0 and bool(steps.min() > 0)


def _ticks(values: np.ndarray) -> bool:
    """Whether numbers that never fall, or never rise, are whole or go in equal steps (and may stand still)."""
    values = values[~np.isnan(values)]
    steps = np.diff(values)
    moves = np.abs(steps[steps != 0])
    if not len(moves) or (steps.min() < 0 < steps.max()):
        return False
    return bool((values == values.round()).all() or np.ptp(moves) <= 0.01 * moves.max())


def _check_values(path: str | Path, values: np.ndarray, name: str) -> None:
    if len(values) == 0:
        raise SeriesError(path, f"holds no number in {name!r}; expected at least two")
    if len(values) == 1:
        raise SeriesError(path, f"holds a single number in {name!r}; expected at least two")
    if np.isinf(values).any():
        raise SeriesError(path, f"holds {np.isinf(values).sum()} infinite values in {name!r}; expected finite numbers")
    if np.abs(values).max() > MAX_ABSOLUTE:
        raise SeriesError(
            path, f"holds values beyond {MAX_ABSOLUTE:g} in {name!r}; expected numbers that a plot can show"
        )
    if values.min() == values.max():
        raise SeriesError(path, f"holds the constant {values[0]:g} in {name!r}; expected a series that varies")


# ------------------------------------------------------------------------------------- drawing the plot


def decimate(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) that draw the same picture: first, lowest, highest and last of each bin of a long series."""
    n = len(values)
    if n <= DECIMATE_ABOVE:
        return np.arange(n), values
    starts = np.unique(np.linspace(0, n, DECIMATE_BINS, endpoint=False).astype(np.int64))
    stops = np.append(starts[1:], n)
    picks = [(a, a + values[a:b].argmin(), a + values[a:b].argmax(), b - 1) for a, b in zip(starts, stops, strict=True)]
    x = np.unique(np.array(picks))
    return x, values[x]


class _Word(NamedTuple):
    extent: tuple[float, float, float, float]  # left, bottom, right, top of the text from its anchor, px, y up
    ink: np.ndarray  # uint8 h x w, 0 is black
    corner: tuple[int, int]  # column and row of the ink's top left from the anchor, px, y down


class _Frame(NamedTuple):
    box: tuple[float, float, float, float]  # axes: left, bottom, right, top, px, y up
    x_ticks: list[tuple[float, str]]  # position in px, label
    y_ticks: list[tuple[float, str]]
    x_label: tuple[float, float]
    y_label: tuple[float, float]
    tight: tuple[float, float, float, float]  # all of it with labels


class SeriesRenderer:
    """Draws series in the look of one reference figure; keep one a thread (``render_series`` does)."""

    def __init__(self):
        import plots

        self.figure = plots.series_figure(np.arange(10.0))
        self.axes = self.figure.axes[0]
        self.line = self.axes.lines[0]
        self.dpi = self.figure.dpi
        self.width, self.height = self.figure.bbox.width, self.figure.bbox.height
        self.renderer = self.figure.canvas.get_renderer()
        self.path_type, self.affine_type = type(self.line.get_path()), type(self.axes.transAxes.frozen())
        tick = self.axes.xaxis.get_major_ticks()[0]
        self.tick_px = self.axes.xaxis.get_tick_padding() * self.dpi / 72
        self.label_px = self.tick_px + tick.get_pad() * self.dpi / 72
        self.grid_style, self.mark_style = tick.gridline, tick.tick1line
        self.words: dict[tuple[str, str], _Word] = {}

    def pixels(self, values: np.ndarray) -> np.ndarray:
        """The plot of at least two finite values as uint8 H x W x 3 RGB, about 790 x 590 px."""
        self.line.set_data(*decimate(values))
        self.axes.relim()
        self.axes.autoscale_view()
        frame = self._tight_layout()
        if frame is None:
            import plots

            return plots.pixels(plots.series_figure(self.line.get_ydata(), self.line.get_xdata()), tight=True)
        return self._draw(frame)

    def _tight_layout(self) -> _Frame | None:
        """What ``Figure.tight_layout`` does: measure at the default place, then give every side what it needs."""
        w, h = self.width, self.height
        default = (0.125 * w, 0.11 * h, 0.9 * w, 0.88 * h)
        first = self._frame(default)
        if first is None:
            return None
        pad = 1.08 * 10 * self.dpi / 72  # of the default font size, 10 pt
        left, bottom, right, top = (max(0.0, abs(t - d)) + pad for t, d in zip(first.tight, default, strict=True))
        return self._frame((left, bottom, w - right, h - top))

    def _frame(self, box: tuple[float, float, float, float]) -> _Frame | None:
        """Ticks and extents for axes at ``box``; None where a label needs an offset text (1e7), left to matplotlib."""
        left, bottom, right, top = box
        self.axes.set_position(
            [left / self.width, bottom / self.height, (right - left) / self.width, (top - bottom) / self.height]
        )
        x_ticks = self._ticks(self.axes.xaxis, left, right)
        y_ticks = self._ticks(self.axes.yaxis, bottom, top)
        if x_ticks is None or y_ticks is None:
            return None
        extents = [box]
        extents += [_moved(self._word("x", text).extent, at, bottom - self.label_px) for at, text in x_ticks]
        extents += [_moved(self._word("y", text).extent, left - self.label_px, at) for at, text in y_ticks]
        gap = self.axes.xaxis.labelpad * self.dpi / 72
        x_label = ((left + right) / 2, min(extent[1] for extent in extents) - gap)
        y_label = (min(extent[0] for extent in extents) - gap, (bottom + top) / 2)
        extents.append(_moved(self._word("x_label", self.axes.get_xlabel()).extent, *x_label))
        extents.append(_moved(self._word("y_label", self.axes.get_ylabel()).extent, *y_label))
        low, high = np.min(extents, axis=0), np.max(extents, axis=0)
        return _Frame(box, x_ticks, y_ticks, x_label, y_label, (low[0], low[1], high[2], high[3]))

    def _ticks(self, axis, low_px: float, high_px: float) -> list[tuple[float, str]] | None:
        low, high = axis.get_view_interval()
        places = np.asarray(axis.get_major_locator()(), dtype=float)
        texts = axis.get_major_formatter().format_ticks(places)
        if axis.get_major_formatter().get_offset():
            return None
        at = low_px + (places - low) / (high - low) * (high_px - low_px)
        slack = 1e-10 * (high_px - low_px)  # as matplotlib's own test of what is in view
        return [(p, text) for p, text in zip(at.tolist(), texts, strict=True) if low_px - slack <= p <= high_px + slack]

    def _word(self, kind: str, text: str) -> _Word:
        key = (kind, text)
        if key not in self.words:
            self.words[key] = self._measure(kind, text)
        return self.words[key]

    def _measure(self, kind: str, text: str) -> _Word:
        axis = self.axes.xaxis if kind.startswith("x") else self.axes.yaxis
        model = axis.label if kind.endswith("label") else axis.get_major_ticks()[0].label1
        style = {
            name: getattr(model, f"get_{name}")()
            for name in ("fontproperties", "ha", "va", "rotation", "rotation_mode", "color")
        }
        artist = self.figure.text(0.5, 0.5, text, **style)
        w, h = int(self.width), int(self.height)
        extent = artist.get_window_extent(self.renderer)
        canvas = type(self.renderer)(w, h, self.dpi)
        artist.draw(canvas)
        artist.remove()
        alpha = np.asarray(canvas.buffer_rgba())[..., 3]
        rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
        if not len(rows):
            return _Word((0.0, 0.0, 0.0, 0.0), np.zeros((0, 0), np.uint8), (0, 0))
        ink = 255 - alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return _Word(_moved(extent.extents, -w / 2, -h / 2), ink, (columns[0] - w // 2, rows[0] - h // 2))

    def _draw(self, frame: _Frame) -> np.ndarray:
        """What ``savefig(bbox_inches="tight")`` draws: the tight box and 0.1 inch on every side."""
        pad = 0.1 * self.dpi
        dx, dy = pad - frame.tight[0], pad - frame.tight[1]
        width, height = (int(frame.tight[i + 2] - frame.tight[i] + 2 * pad) for i in (0, 1))
        canvas = type(self.renderer)(width, height, self.dpi)
        left, bottom, right, top = _moved(frame.box, dx, dy)
        identity, clip = self.affine_type(), self.axes.bbox.frozen().translated(dx, dy)
        self._stroke(canvas, [[(0, 0), (width, 0), (width, height), (0, height)]], identity, fill=(1.0, 1.0, 1.0))
        x_marks, y_marks = [at + dx for at, _ in frame.x_ticks], [at + dy for at, _ in frame.y_ticks]
        grid = [[(at, bottom), (at, top)] for at in x_marks] + [[(left, at), (right, at)] for at in y_marks]
        self._stroke(canvas, grid, identity, self.grid_style, clip)
        data_to_px = self._data_to_px(left, bottom, right, top)
        self._stroke(canvas, [self.line.get_path()], data_to_px, self.line, clip)
        spines = [[(left, bottom), (left, top)], [(left, bottom), (right, bottom)]]
        self._stroke(canvas, spines, identity, self.axes.spines["left"])
        marks = [[(at, bottom - self.tick_px), (at, bottom)] for at in x_marks] + [
            [(left - self.tick_px, at), (left, at)] for at in y_marks
        ]
        self._stroke(canvas, marks, identity, self.mark_style)
        image = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        self._write(image, frame, dx, dy)
        return image

    def _data_to_px(self, left: float, bottom: float, right: float, top: float):
        (x0, x1), (y0, y1) = self.axes.get_xlim(), self.axes.get_ylim()
        moved = self.affine_type().translate(-x0, -y0)
        return moved.scale((right - left) / (x1 - x0), (top - bottom) / (y1 - y0)).translate(left, bottom)

    def _stroke(self, canvas, paths: list, transform, style=None, clip=None, fill=None) -> None:
        pen = canvas.new_gc()
        pen.set_linewidth(0.0)
        if clip is not None:
            pen.set_clip_rectangle(clip)
        if style is self.mark_style:  # a marker, not a line: its width and colour have other names
            pen.set_linewidth(style.get_markeredgewidth())
            pen.set_foreground(style.get_markeredgecolor())
        elif style is not None:
            is_spine = not hasattr(style, "get_solid_capstyle")
            pen.set_linewidth(style.get_linewidth())
            pen.set_foreground(style.get_edgecolor() if is_spine else style.get_color())
            pen.set_capstyle(style.get_capstyle() if is_spine else style.get_solid_capstyle())
            pen.set_joinstyle(style.get_joinstyle() if is_spine else style.get_solid_joinstyle())
            pen.set_alpha(style.get_alpha())
        for path in paths:
            canvas.draw_path(pen, path if isinstance(path, self.path_type) else self.path_type(path), transform, fill)

    def _write(self, image: np.ndarray, frame: _Frame, dx: float, dy: float) -> None:
        left, bottom = frame.box[0] - self.label_px, frame.box[1] - self.label_px
        placed = [("x", text, at, bottom) for at, text in frame.x_ticks] + [
            ("y", text, left, at) for at, text in frame.y_ticks
        ]
        placed += [
            ("x_label", self.axes.get_xlabel(), *frame.x_label),
            ("y_label", self.axes.get_ylabel(), *frame.y_label),
        ]
        for kind, text, x, y in placed:
            word = self._word(kind, text)
            column, row = round(x + dx) + word.corner[0], round(len(image) - y - dy) + word.corner[1]
            top, start = max(row, 0), max(column, 0)
            under = image[top : row + word.ink.shape[0], start : column + word.ink.shape[1]]
            ink = word.ink[top - row :, start - column :][: under.shape[0], : under.shape[1], None]
            np.minimum(under, ink, out=under)


def _moved(extent, dx: float, dy: float) -> tuple[float, float, float, float]:
    left, bottom, right, top = extent
    return left + dx, bottom + dy, right + dx, top + dy


_LOCAL = threading.local()  # matplotlib artists must not be shared between threads


def render_series(values: np.ndarray) -> np.ndarray:
    """The plot of a series in the home style: uint8 H x W x 3 RGB, about 790 x 590 px.

    Training plots and inference plots are both made here. ``values``: finite, at least two.
    """
    import plots

    with plots.home_style:
        if not hasattr(_LOCAL, "renderer"):
            _LOCAL.renderer = SeriesRenderer()
        return _LOCAL.renderer.pixels(np.asarray(values, dtype=np.float64))


@cache
def _palette() -> tuple[np.ndarray, np.ndarray]:
    """32 colours from white to the line's blue and to black,
    and the nearest one for each pair of red and blue values."""
    blue_share, grey = np.linspace(0, 1, 20)[:, None], np.linspace(254, 0, 12).round()[:, None]
    colours = np.vstack([255 - blue_share * (255 - np.array([[31, 119, 180]])), np.repeat(grey, 3, axis=1)]).round()
    red, blue = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    distance = (red[..., None] - colours[:, 0]) ** 2 + (blue[..., None] - colours[:, 2]) ** 2
    return colours.astype(np.uint8), distance.argmin(axis=-1).astype(np.uint8).ravel()


def plot_png(image: np.ndarray) -> bytes:
    """A plot as a PNG file of 32 colours, as the home data are: small and quick to decode."""
    from PIL import Image

    colours, nearest = _palette()
    indexed = Image.fromarray(nearest[image[..., 0].astype(np.uint16) * 256 + image[..., 2]])
    indexed.putpalette(colours.tobytes())
    file = io.BytesIO()
    indexed.save(file, format="PNG", compress_level=1)
    return file.getvalue()
