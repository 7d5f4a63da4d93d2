"""CSV series, plots of them, class folders, their cache, augmentation, and the render and generate commands."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import config
import data_loader
import data_loader_supervised as loader
import image_files
import plots
import series_generator
import series_plots

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = [1.5, -2.25, 3.0, 0.5]


def write(folder: Path, text, name: str = "series.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --------------------------------------------------------------------------------------------- good CSVs

LINES = "\n".join(map(str, NUMBERS)) + "\n"
COMMAS = LINES.replace(".", ",")
GOOD = {
    "no header": LINES,
    "header": "value\n" + LINES,
    "any header": "temperature\n" + LINES,
    "windows line ends": ("data\n" + LINES).replace("\n", "\r\n"),
    "blank first line": "\n\nvalue\n" + LINES,
    "no newline at the end": LINES.rstrip(),
    "semicolons": "time;value\n" + "".join(f"{i};{v}\n" for i, v in enumerate(NUMBERS)),
    "semicolons and decimal commas": "time;value\n"
    + "".join(f"{i};{v}\n".replace(".", ",") for i, v in enumerate(NUMBERS)),
    "tabs": "x\tvalue\n" + "".join(f"{9 - i}\t{v}\n" for i, v in enumerate(NUMBERS)),
    "tabs and decimal commas, no header": "".join(f"{i}\t{v}\n".replace(".", ",") for i, v in enumerate(NUMBERS)),
    "one column with decimal commas": "data\n" + COMMAS,
    "quoted decimal commas": "data,label\n" + "".join(f'"{v}",a\n'.replace(".", ",") for v in NUMBERS),
    "BOM": b"\xef\xbb\xbf" + ("value\n" + LINES).encode(),
    "UTF-16": ("value\n" + LINES).encode("utf-16"),
    "UTF-16 without BOM": ("value\n" + LINES).encode("utf-16-le"),
    "Latin-1": ("Größe\n" + LINES).encode("latin-1"),
    "quoted numbers": '"value"\n' + "".join(f'"{v}"\n' for v in NUMBERS),
    "spaces": "value , other\n" + "".join(f" {v} , 7\n" for v in NUMBERS),
    "dates first": "date,reading\n" + "".join(f"2020-01-0{i + 1},{v}\n" for i, v in enumerate(NUMBERS)),
    "dates first, no header": "".join(f"2020-01-0{i + 1},{v}\n" for i, v in enumerate(NUMBERS)),
    "index first, no header": "".join(f"{i},{v}\n" for i, v in enumerate(NUMBERS)),
    "time stamps first": "timestamp,reading\n" + "".join(f"{1600000000 + i * i},{v}\n" for i, v in enumerate(NUMBERS)),
    "as pandas writes a series": ",0\n" + "".join(f"{i},{v}\n" for i, v in enumerate(NUMBERS)),
    "data beats the first": "reading,data\n" + "".join(f"{i * i - 5},{v}\n" for i, v in enumerate(NUMBERS)),
    "upper case": "reading,VALUE\n" + "".join(f"{i * i - 5},{v}\n" for i, v in enumerate(NUMBERS)),
    "duplicate headers": "value,value\n" + "".join(f"{v},9\n" for v in NUMBERS),
    "text column first": "name,amount\n" + "".join(f"n{i},{v}\n" for i, v in enumerate(NUMBERS)),
    "exponents": "value\n" + "".join(f"{v:e}\n" for v in NUMBERS),
    "time with its unit": "Time (s),signal\n" + "".join(f"{i / 3:.3f},{v}\n" for i, v in enumerate(NUMBERS)),
    "rising first column with an empty field": "t_s,signal\n0,1.5\n,-2.25\n2,3\n3,0.5\n",
    "unix seconds with jitter": "when,temp\n1600000000,1.5\n1600000011,-2.25\n1600000019,3\n1600000030,0.5\n",
    "Excel's separator line": "sep=;\nreading;data\n" + "".join(f"{i * i - 5};{v}\n" for i, v in enumerate(NUMBERS)),
    "a comment above": "# recorded by X, room 3\nreading,data\n"
    + "".join(f"{i * i - 5},{v}\n" for i, v in enumerate(NUMBERS)),
    "as numpy writes a header": "# reading,data\n" + "".join(f"{i * i - 5},{v}\n" for i, v in enumerate(NUMBERS)),
    "a line of text above": "recorded by X\n\nreading,data\n"
    + "".join(f"{i * i - 5},{v}\n" for i, v in enumerate(NUMBERS)),
    "as R writes a table": '"reading","data"\n'
    + "".join(f'"{i + 1}",{i * i - 5},{v}\n' for i, v in enumerate(NUMBERS)),
    "as R writes one column": '"Flow"\n' + "".join(f'"{i + 1}",{v}\n' for i, v in enumerate(NUMBERS)),
    "as pandas writes a column without a name": "0\n" + LINES,
    "a separator behind every row": "temp,humidity\n" + "".join(f"{v},{50 + i},\n" for i, v in enumerate(NUMBERS)),
    "other marks than line ends in a name": "reading\x85\x0b\u2028,data\n"
    + "".join(f"{i * i - 5},{v}\n" for i, v in enumerate(NUMBERS)),
    "a typographer's minus": "".join(f"{v}\n".replace("-", "\u2212") for v in NUMBERS),
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_csv_gives_the_same_numbers(tmp_path, kind):
    series = series_plots.read_series(write(tmp_path, GOOD[kind]))
    assert series.values.dtype == np.float64
    np.testing.assert_allclose(series.values, NUMBERS)
    assert series.n_dropped == 0


@pytest.mark.parametrize("n_before", range(11))
def test_a_long_utf8_file_is_read_so_wherever_its_first_part_ends(tmp_path, n_before):
    text = "Größe\n" + "1" * n_before + "\n" + "\u22122.5\n3.5\n" * 6_000  # a minus takes three of eleven bytes
    assert len(text.encode()) > series_plots.SAMPLE_CHARACTERS + 11
    series = series_plots.read_series(write(tmp_path, text.encode()))
    assert series.column == "Größe" and series.values[-2:].tolist() == [-2.5, 3.5]


ABOVE = {
    "of two fields": "Sample rate,100\nChannel,3\ntime,data\n",
    "of one and of two fields": "Logger v2\nSerial,12345\ntime,data\n",
    "a table of parameters": "Parameter,Value\nSample rate,100\n\ntime,data\n",
    "with semicolons": "Sample rate;100\ntime;data\n",
    "within text": "Device: X, serial 12\nDate: 2024, 1\n\ntime,data\n",
    "of text as wide as the table": "Device: X, room 3\ntime,data\n",
    "above dates": "Sample rate,100\ndate,data\n",
    "and a row of units": "Sample rate,100\ntime,data\ns,mV\n",
    "above one column": "Sample rate,100\ndata\n",
}


@pytest.mark.parametrize("kind", ABOVE)
def test_lines_above_the_header_are_no_rows_even_with_a_number(tmp_path, kind):
    values = np.random.default_rng(0).normal(size=30).round(3)
    heading = ABOVE[kind]
    names = [line for line in heading.splitlines() if line][-1]
    separator = ";" if ";" in names else ","
    first = (
        (lambda i: "")
        if names == "data"
        else (lambda i: f"2020-01-{i + 1:02d}{separator}")
        if "date" in names
        else (lambda i: f"{i}{separator}")
    )
    series = series_plots.read_series(
        write(tmp_path, heading + "".join(f"{first(i)}{value}\n" for i, value in enumerate(values)))
    )
    np.testing.assert_array_equal(series.values, values)
    assert (series.column, series.n_dropped) == ("data", int("units" in kind))


@pytest.mark.parametrize("names", ["value", "reading,data"])
def test_a_row_with_the_name_of_the_data_is_the_header_also_below_numbers(tmp_path, names):
    rows = "".join(f"{i * i - 5},{v}\n" if "," in names else f"{v}\n" for i, v in enumerate(NUMBERS))
    above = "Logger 5,100\n2024,7\n" if "," in names else "Logger 5\n2024\n"
    series = series_plots.read_series(write(tmp_path, f"{above}{names}\n{rows}"))
    np.testing.assert_array_equal(series.values, NUMBERS)
    assert (series.column, series.n_dropped) == (names.split(",")[-1], 0)


def test_a_field_with_the_name_of_the_data_is_no_header(tmp_path):
    series = series_plots.read_series(write(tmp_path, "name,reading\na,1.5\ndata,\nb,-2.25\n"))
    assert (series.column, series.values.tolist(), series.n_dropped) == ("reading", [1.5, -2.25], 1)


@pytest.mark.parametrize(
    ("names", "firsts", "expected"),
    [
        ("signal,is_anomaly", [1, 2.5, 2.75, 4], "signal"),
        ("x,signal,label", [0.033, 0.067, 0.1, 0.133], "signal"),
        (",level", [1, 2.5, 2.75, 4], "level"),
        ("label,level", [0, 0, 1, 0], "level"),
        ("label", [0, 0, 1, 0], "label"),
        ("data,value", ["1 May", "2 May", "3 May", "4 May"], "value"),
    ],
)
def test_neither_what_passes_for_time_nor_labels_are_the_data(tmp_path, names, firsts, expected):
    further = [[second] * names.count(",") for second in (0, 1, 0, 3)]
    rows = "".join(",".join(map(str, [first, *rest])) + "\n" for first, rest in zip(firsts, further, strict=True))
    assert series_plots.read_series(write(tmp_path, f"{names}\n{rows}")).column == expected


CLOCKS = {
    "t_s,y": lambda i: i // 2,
    "Time_s,temp": lambda i: i // 2,
    "timestamp_ms,value_c": lambda i: 1_600_000_000_000 + i // 2,
    "elapsed,y": lambda i: 30 - i,
    "time_index,temp": lambda i: 30 - i,
    "Unnamed: 0,y": lambda i: i % 5,
    "sample_no,t_min,t_max": lambda i: f"{i % 5},{i * i - 3 * i}",
    "": lambda i: i // 2,
    " ": lambda i: 0.5 * (30 - i),
}


@pytest.mark.parametrize("names", CLOCKS)
def test_a_time_column_is_known_by_its_words_and_without_a_name_by_its_steps(tmp_path, names):
    values = np.random.default_rng(0).normal(size=30).round(3)
    series = series_plots.read_series(
        write(
            tmp_path, f"{names}\n".lstrip() + "".join(f"{CLOCKS[names](i)},{value}\n" for i, value in enumerate(values))
        )
    )
    np.testing.assert_array_equal(series.values, [i * i - 3 * i for i in range(30)] if "t_min" in names else values)


def test_a_first_column_of_uneven_steps_is_the_data(tmp_path):
    falling = np.sort(np.random.default_rng(0).normal(size=30).round(3))[::-1]
    np.testing.assert_array_equal(
        series_plots.read_series(
            write(tmp_path, "".join(f"{value},{i % 2}\n" for i, value in enumerate(falling)))
        ).values,
        falling,
    )
    np.testing.assert_array_equal(series_plots.read_series(write(tmp_path, "9\n7\n5\n3\n")).values, [9, 7, 5, 3])


def test_a_first_column_that_stands_still_is_the_data(tmp_path):
    assert series_plots.read_series(write(tmp_path, "a,b\n1,5\n1,3\n2,4\n")).column == "a"


THOUSANDS = [1007.0, 992.0, 12038.0, -1006.0, 967.0]
GROUPED = {
    "American": "date,value\n" + "".join(f'2020-01-0{i + 1},"{v:,.0f}"\n' for i, v in enumerate(THOUSANDS)),
    "American with decimals": "value\n" + "".join(f'"{v:,.2f}"\n' for v in THOUSANDS),
    "American, one column without quotes": "value\n" + "".join(f"{v:,.0f}\n" for v in THOUSANDS),
    "German": "datum;wert\n"
    + "".join(f"{i};{v:,.2f}\n".translate(str.maketrans(",.", ".,")) for i, v in enumerate(THOUSANDS)),
    "German with a gap": "datum;wert\n"
    + "".join(f"{i};{v:,.2f}\n".translate(str.maketrans(",.", ".,")) for i, v in enumerate(THOUSANDS))
    + "5;-\n",
    "German beside dates": "Datum;Wert\n"
    + "".join(
        f"0{i + 1}.01.2024;{v:_.1f}\n".replace(".0\n", ",0\n").replace("_", ".") for i, v in enumerate(THOUSANDS)
    ),
    "German beside small numbers": "Datum;Umsatz\n"
    + "".join(f"{i};{v:_.0f}\n".replace("_", ".") for i, v in enumerate(THOUSANDS)),
    "German with tabs and a gap": "Datum\tUmsatz\n"
    + "".join(f"{i}\t{v:_.0f}\n".replace("_", ".") for i, v in enumerate(THOUSANDS))
    + "5\t-\n",
    "Swiss": "value\n" + "".join(f"{v:_.2f}\n".replace("_", "'") for v in THOUSANDS),
    "typographer's Swiss": "t;wert\n"
    + "".join(f"{i};{v:_.2f}\n".replace("_", "\u2019") for i, v in enumerate(THOUSANDS)),
    "French": "t;valeur\n"
    + "".join(f"{i};{v:_.2f}\n".replace("_", "\u202f").replace(".", ",") for i, v in enumerate(THOUSANDS)),
    "French, one column, no semicolon": "valeur\n"
    + "".join(f"{v:_.1f}\n".replace("_", "\xa0").replace(".", ",") for v in THOUSANDS),
    "no-break spaces, no header": "".join(f"{v:_.0f}\n".replace("_", "\xa0") for v in THOUSANDS),
}


@pytest.mark.parametrize("kind", GROUPED)
def test_thousands_set_apart_are_one_number(tmp_path, kind):
    series = series_plots.read_series(write(tmp_path, GROUPED[kind]))
    np.testing.assert_allclose(series.values, THOUSANDS)
    assert series.n_dropped == kind.endswith("gap")


COUNTED = {
    "American": "t;count\n" + "".join(f"{i};{800 + i:,}\n" for i in range(400)),
    "American, one column": "count\n" + "".join(f"{800 + i:,}\n" for i in range(400)),
    "German": "t;wert\n" + "".join(f"{i};{800 + i:_},0\n".replace("_", ".") for i in range(400)),
    "German, whole": "t;wert\n" + "".join(f"{i};{800 + i:_}\n".replace("_", ".") for i in range(400)),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_thousands_are_known_wherever_they_begin(tmp_path, kind):
    series = series_plots.read_series(write(tmp_path, COUNTED[kind]))
    np.testing.assert_array_equal(series.values, 800 + np.arange(400))
    assert series.n_dropped == 0


def test_a_word_far_below_in_a_long_column_changes_no_number(tmp_path):
    values = np.random.default_rng(0).uniform(-5000, 5000, 300_000).round(1)
    rows = [f"{i};{v:_.1f}\n".replace(".", ",").replace("_", ".") for i, v in enumerate(values)]
    rows[-1] = "Fehler;Fehler\n"
    series = series_plots.read_series(write(tmp_path, "Zeit;Wert\n" + "".join(rows)))
    np.testing.assert_array_equal(series.values, values[:-1])
    assert series.n_dropped == 1


NOT_GROUPED = {
    "addresses alone": ("host,reading\n192.168.100.200,1.5\n192.168.100.199,2.5\n", [1.5, 2.5]),
    "three decimals": ("value\n1,007\n0,992\n1,038\n", [1.007, 0.992, 1.038]),
    "three decimals beside an index": ("time;x\n0;1,007\n1;2,992\n2;1,038\n", [1.007, 2.992, 1.038]),
    "three decimals after a point": ("value\n1.007\n992\n1.038\n", [1.007, 992, 1.038]),
    "points alone": ("t;x\n0;1.023\n1;12.250\n2;1.107\n", [1.023, 12.25, 1.107]),
    "points and a first digit of 0": ("t;x\n0;1.023\n1;0.998\n2;950\n3;1.107\n", [1.023, 0.998, 950, 1.107]),
    "points of one decimal": ("t;x\n0;1.023\n1;12.5\n2;950\n3;1.107\n", [1.023, 12.5, 950, 1.107]),
    "points beside one digit": ("t;x\n0;1.023\n1;2\n2;1.107\n3;3\n", [1.023, 2, 1.107, 3]),
    "points beside four digits": ("t;x\n0;1.023\n1;950\n2;1107\n3;1.250\n", [1.023, 950, 1107, 1.25]),
    "points beside four digits and a word": ("t;x\n0;1.023\n1;950\n2;1107\n3;1.250\n4;x\n", [1.023, 950, 1107, 1.25]),
    "points beside a comma": ("t;x\n0;1.023\n1;950\n2;0,5\n3;1.250\n", [1.023, 950, 0.5, 1.25]),
    "points beside 999 for a gap": ("t;x\n0;1.023\n1;999\n2;1.107\n3;-999\n", [1.023, 999, 1.107, -999]),
    "percentages": ("t;x\n0;100\n1;99.125\n2;98.251\n3;97.333\n4;100\n", [100, 99.125, 98.251, 97.333, 100]),
    "kelvins": ("t;x\n0;300\n1;299.125\n2;298.251\n3;301\n", [300, 299.125, 298.251, 301]),
    "a single point": ("t;x\n0;950\n1;1.023\n2;870\n", [950, 1.023, 870]),
    "points in a table of commas": ("t,x\n0,950\n1,1.023\n2,870\n3,1.107\n4,-x\n", [950, 1.023, 870, 1.107]),
    "addresses beside": ("host,value\n192.168.100.200,1.5\n192.168.100.201,2.5\n", [1.5, 2.5]),
    "points of thousands, decimal commas": (
        "value\n1.300,5\n950,25\n1.412,75\n1.380,1\n",
        [1300.5, 950.25, 1412.75, 1380.1],
    ),
    "millions, too": ("temp\n1.234.500,5\n2.250.100,25\n950,75\n", [1234500.5, 2250100.25, 950.75]),
    "commas of thousands, decimal points": ("temp\n1,500.5\n2,250.25\n950.75\n", [1500.5, 2250.25, 950.75]),
    "numbers of rows without a name": ("value\n1,500.5\n2,600.25\n3,550.75\n", [500.5, 600.25, 550.75]),
    "thousands of two kinds": ("value\n1,500\n2,250.5\n950.75\n", [1500, 2250.5, 950.75]),
    "decimal commas and a gap": ("value\n1007,54\nNA\n992,07\n1038,5\n", [1007.54, 992.07, 1038.5]),
    "decimal commas, a whole number and a gap": ("value\n1007\nNA\n992,07\n1038,5\n", [1007, 992.07, 1038.5]),
}


@pytest.mark.parametrize("kind", NOT_GROUPED)
def test_a_decimal_mark_is_not_taken_for_one_of_thousands(tmp_path, kind):
    text, expected = NOT_GROUPED[kind]
    np.testing.assert_allclose(series_plots.read_series(write(tmp_path, text)).values, expected)


def test_digits_joined_by_underscores_are_a_name(tmp_path):
    series = series_plots.read_series(write(tmp_path, "1_2,3_4\n1,3\n2,5\n3,4\n"))
    assert (series.column, series.n_dropped) == ("3_4", 0)


def test_a_row_of_units_is_counted_as_dropped(tmp_path):
    series = series_plots.read_series(
        write(tmp_path, "zeit,druck\ns,mV\n" + "".join(f"{i},{v}\n" for i, v in enumerate(NUMBERS)))
    )
    np.testing.assert_allclose(series.values, NUMBERS)
    assert (series.column, series.n_dropped) == ("druck", 1)


def test_rows_without_a_number_are_dropped_and_counted(tmp_path):
    series = series_plots.read_series(write(tmp_path, "time,data\n0,1.5\n1,\n2,nan\n3,-2.25\n4,broken\n5,3\n6,0.5\n"))
    np.testing.assert_allclose(series.values, NUMBERS)
    assert (series.column, series.n_dropped) == ("data", 3)


SUMS = {
    "dates": ("Datum;Wert\n", "0{i}.01.2024;{v}\n", "Summe;2,75\n", 1),
    "a mean, too, below an empty line": ("Datum;Wert\n", "0{i}.01.2024;{v}\n", "\nMittel;0,6875\nSumme;2,75\n", 2),
    "no header": ("", "0{i}.01.2024;{v}\n", "Summe;2,75\n", 1),
    "numbers called time": ("t;y\n", "7;{v}\n", "Total;2,75\n", 1),
    "rising numbers of any name": ("counter;u\n", "1{i};{v}\n", "Total;2,75\n", 1),
    "time behind": ("value;time\n", "{v};0{i}:00\n", "2,75;Summe\n", 1),
    "a gap above": ("Datum;Wert\n", "0{i}.01.2024;{v}\n", ";\nSumme;2,75\n", 1),
}


@pytest.mark.parametrize("kind", SUMS)
def test_sums_below_are_left_out_and_named(tmp_path, kind):
    header, row, below, n_sums = SUMS[kind]
    rows = "".join(row.format(i=i, v=str(v).replace(".", ",")) for i, v in enumerate(NUMBERS))
    series = series_plots.read_series(write(tmp_path, header + rows + below))
    assert (series.values.tolist(), len(series.sums), series.n_dropped) == (NUMBERS, n_sums, "gap" in kind)
    called = ", ".join(series.sums)
    assert f"the last {n_sums}, called {called}, were left out as sums" in loader.read_plot(tmp_path / "series.csv")[1]


NO_SUMS = {
    "words above": "Tag;Wert\nMo;1\nDi;3\nSumme;4\n",
    "a word above": "Datum;Wert\n01.01.2024;1\nheute;3\n02.01.2024;2\nSumme;4\n",
    "no time": "reading;data\n5;1\n3;3\nerr;4\n",
    "a remark": "t;value;remark\n0;1;7\n1;3;8\n2;4;end\n",
    "another word": "t;value\n0;1\n1;3\nend;4\n",
    "no letter": "t;value\n0;1\n1;3\n...;4\n",
    "none": "t;value\n0;1\n1;3\nNONE;4\n",
    "nothing": "t;value\n0;1\n1;3\n;4\n",
    "a gap above": "t;value\n0;1\n;3\nSumme;4\n",
    "words alone": "t;value\nSumme;1\nMittel;4\n",
}


@pytest.mark.parametrize("kind", NO_SUMS)
def test_rows_are_no_sums_for_want_of_a_time_alone(tmp_path, kind):
    series = series_plots.read_series(write(tmp_path, NO_SUMS[kind]))
    assert (series.values[0], series.values[-1], series.n_dropped) == (1, 4, 0)


SEVERAL = {
    "the first of prices": ("Date,Open,Close,Volume\n2024-01-01,1,2,7\n2024-01-02,2,1,9\n", "column 'Open' of 3"),
    "without header": ("5,1.5,7\n3,2.5,9\n4,1.5,8\n", "column 1 of 3"),
    "an index first": ("0,1.5,7\n1,2.5,9\n2,1.5,8\n", "column 2 of 2"),
    "and a gap": ("t,a,b\n0,1.5,7\n1,,9\n2,1,8\n", "column 'a' of 2"),
    "one called data": ("reading,data,b\n5,1.5,7\n3,2.5,9\n4,1.5,8\n", ""),
    "one beside time and a label": ("t,flow,label\n0,1.5,0\n1,2.5,1\n2,1.5,0\n", ""),
    "one beside a rising first": ("x,flow\n0,1.5\n1,2.5\n2,1.5\n", ""),
    "one beside a first that rises unevenly": ("pressure,flow\n0.5,1.5\n1.9,2.5\n2.1,1.5\n", "column 'flow' of 2"),
    "one beside times without a name": (",flow\n0.5,1.5\n1.9,2.5\n2.1,1.5\n", ""),
    "one beside uneven times": ("elapsed,flow\n0.5,1.5\n1.9,2.5\n2.1,1.5\n", ""),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_the_remark_says_which_of_several_columns_was_read(tmp_path, kind):
    text, which = SEVERAL[kind]
    clauses = [f"{which} that could be the series was read"] if which else []
    clauses += ["1 of 3 rows hold no number"] if "gap" in kind else []
    assert loader.read_plot(write(tmp_path, text))[1] == ", and ".join(clauses)


@pytest.mark.parametrize("header", ["", "data\n", "flow\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_empty_lines_of_a_lone_column_are_rows_without_a_number(tmp_path, header, end):
    series = series_plots.read_series(write(tmp_path, f"{header}1.5\n\n-2.25\n \nnan\n3\n0.5{end}"))
    np.testing.assert_allclose(series.values, NUMBERS)
    assert series.n_dropped == 3


def test_empty_lines_between_rows_of_several_columns_are_none(tmp_path):
    assert series_plots.read_series(write(tmp_path, "time,data\n0,1.5\n\n1,\n2,3\n")).n_dropped == 1


def test_a_rising_line_alone_is_the_data(tmp_path):
    np.testing.assert_array_equal(series_plots.read_series(write(tmp_path, "0\n1\n2\n3\n")).values, [0, 1, 2, 3])


CUT = {
    "two decimals": "time,value\n0,20,00\n1,20,37\n2,20,74\n",
    "two decimals, rows from 1": "t,value\n1,20,37\n2,20,74\n3,21,11\n",
    "one decimal": "time,value\n0,20,0\n1,20,5\n2,21,5\n",
    "dates and negative numbers": "datum,wert\n01.01.2024,-0,1257\n02.01.2024,1,3050\n03.01.2024,-2,0049\n",
    "an index without a name": ",value\n0,20,07\n1,20,37\n2,20,74\n",
}


@pytest.mark.parametrize("kind", CUT)
def test_numbers_cut_at_decimal_commas_are_refused(tmp_path, kind):
    with pytest.raises(
        series_plots.SeriesError, match=r"a field more than its header names .* decimal commas"
    ) as caught:
        series_plots.read_series(write(tmp_path, CUT[kind]))
    first = CUT[kind].splitlines()[1].split(",", 1)[1]
    assert f"such as {first} make; expected decimal points" in caught.value.reason


ROW_NAMES = {
    "quoted": '"a","b"\n"1",20,37\n"2",22,74\n"3",21,11\n',
    "numbers of rows and digits": "a,b\n1,20,0\n2,22,1\n3,21,0\n",
    "numbers of several widths": "a,b\n1,20,998\n2,22,1004\n3,21,1010\n",
    "decimal points": "a,b\n1,20,0.25\n2,22,1.75\n3,21,0.50\n",
    "decimal points elsewhere": "a,b,c,d\n1,20,1.5,7,37\n2,22,2.5,8,74\n3,21,0.5,9,11\n",
    "words": "a,b\n1,20,up\n2,22,no\n3,21,up\n",
    "numbers of rows and of two digits": "a,b\n1,20,30\n2,22,31\n3,21,32\n",
    "dates": "a,b\n2024-01-01,20,30\n2024-01-02,22,31\n2024-01-03,21,32\n",
    "places": "a,b\nBonn,20,30\nKiel,22,31\nUlm,21,32\n",
}


@pytest.mark.parametrize("kind", ROW_NAMES)
def test_the_names_of_rows_that_r_writes_are_no_decimals(tmp_path, kind):
    series = series_plots.read_series(write(tmp_path, ROW_NAMES[kind]))
    assert (series.column, series.values.tolist()) == ("a", [20, 22, 21])


BAD = {
    "empty": ("", "is empty"),
    "only spaces": (" \n\n", "is empty"),
    "header only": ("time,value\n", "header and no rows"),
    "one row": ("value\n3.5\n", "a single number"),
    "one row, no header": ("3.5\n", "a single number"),
    "no numeric column": ("name,place\na,b\nc,d\n", "no numeric column (columns: name, place)"),
    "time alone": ("time\n0\n1\n3\n", "no numeric column but time (columns: time)"),
    "time and an index alone": ("time,index\n0,4\n1,5\n3,6\n", "no numeric column but time (columns: time, index)"),
    "all NaN": ("value\nnan\nnan\nnan\n", "no number in 'value'"),
    "all empty": ("time,value\n0,\n1,\n2,\n", "no number in 'value'"),
    "infinite": ("value\n1\ninf\n3\n-inf\n", "2 infinite values"),
    "constant": ("value\n2\n2\n2\n", "the constant 2"),
    "overflowing": ("value\n1e200\n-1e200\n", "beyond 1e+100"),
    "ragged": ("a,b\n1,2\n1,2,3,4\n5,6\n" * 1, "is no table"),
    "not text": (bytes(range(256)) * 4, "is not a text file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_csv_is_refused_in_one_sentence(tmp_path, kind):
    text, expected = BAD[kind]
    path = write(tmp_path, text)
    if kind == "ragged":
        path = write(tmp_path, "a,b\n" + "1,2\n" * 300 + "1,2,3,4\n")
    with pytest.raises(
        config.InputError, match=f"series.csv .*{expected.replace('(', '.').replace(')', '.').replace('+', '.')}"
    ) as caught:
        series_plots.read_series(path)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and "Traceback" not in message


def test_a_missing_csv_is_named(tmp_path):
    with pytest.raises(config.InputError, match=r"nowhere\.csv cannot be read"):
        series_plots.read_series(tmp_path / "nowhere.csv")


def test_a_long_series_is_read_and_drawn_from_its_extremes(tmp_path):
    values = np.random.default_rng(0).normal(size=300_000).round(3)
    values[123_456] = 25.0
    read = series_plots.read_series(write(tmp_path, "\n".join(map(str, values))))
    np.testing.assert_array_equal(read.values, values)
    x, y = series_plots.decimate(values)
    assert len(x) <= 4 * series_plots.DECIMATE_BINS and x[0] == 0 and x[-1] == len(values) - 1
    np.testing.assert_array_equal(y, values[x])
    assert y.max() == 25.0 and y.min() == values.min()


# -------------------------------------------------------------------------------------------------- plots


def reference_plot(values: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    plots.series_figure(values).savefig(file, dpi=100, bbox_inches="tight")
    return np.asarray(Image.open(file).convert("RGB"))


def series_of(case: str) -> np.ndarray:
    rng = np.random.default_rng(len(case))
    noise = rng.normal(size={"short": 60, "medium": 350}.get(case, 1200))
    return {"walk": np.cumsum(noise), "tiny": noise * 1e-3, "large": 1e4 * noise, "offset": 1e8 + noise}.get(
        case, noise
    )


@pytest.mark.parametrize("case", ["short", "medium", "long", "walk", "tiny", "large", "offset"])
def test_the_fast_plot_is_matplotlibs_plot(case):
    values = series_of(case)
    slow, fast = reference_plot(values), series_plots.render_series(values)
    assert fast.dtype == np.uint8 and fast.shape == slow.shape
    axes_slow, axes_fast = loader.crop_to_axes(slow), loader.crop_to_axes(fast)
    assert axes_fast.shape == axes_slow.shape != slow.shape
    assert np.abs(axes_slow.astype(int) - axes_fast).mean() < 0.2
    for size in (224, 448):
        for crop in (False, True):
            pair = [loader.prepare_image(image, size, crop).astype(int) for image in (slow, fast)]
            assert np.abs(pair[0] - pair[1]).mean() < 0.4, (size, crop)


@pytest.mark.parametrize("case", ["medium", "offset"])  # by the short cut, by matplotlib alone
def test_the_plot_does_not_depend_on_the_users_settings(case):
    values = series_of(case)
    plain = series_plots.render_series(values)
    with matplotlib.rc_context({"xtick.labelsize": 30, "lines.linewidth": 9}):
        np.testing.assert_array_equal(series_plots.render_series(values), plain)


def test_the_plot_does_not_depend_on_what_was_drawn_before():
    values = series_of("medium")
    before = series_plots.render_series(values)
    for other in ("offset", "large", "short"):
        series_plots.render_series(series_of(other))
    np.testing.assert_array_equal(series_plots.render_series(values), before)


def test_a_long_series_looks_as_all_of_its_values_do(monkeypatch):
    n = series_plots.DECIMATE_ABOVE + 1
    values = np.random.default_rng(0).normal(size=n) * np.linspace(0.2, 1, n)
    thinned = series_plots.render_series(values).astype(float)
    monkeypatch.setattr(series_plots, "DECIMATE_ABOVE", n)
    assert np.abs(thinned - series_plots.render_series(values)).mean() < 0.5


def test_a_plot_file_reaches_the_network_like_its_csv(tmp_path):
    values = series_of("long")
    csv = write(tmp_path, "data\n" + "\n".join(map(repr, values.tolist())))
    png = write(tmp_path, series_plots.plot_png(series_plots.render_series(values)), "series.png")
    image = Image.open(png)
    assert image.mode == "P" and len(image.getcolors()) <= 32
    first, second = (loader.prepare_image(loader.read_plot(path)[0], 224, True).astype(int) for path in (csv, png))
    assert np.abs(first - second).mean() < 2.0 and np.abs(first - second).max() <= 12


def test_crop_finds_the_axes_and_leaves_other_pictures_alone():
    plot = series_plots.render_series(series_of("medium"))
    inside = loader.crop_to_axes(plot)
    height, width = inside.shape[:2]
    assert 500 < height < 540 and 690 < width < 730
    assert (inside.max(axis=2) < loader.DARK).mean() < 0.001  # no spine, no label
    line = [(image == (31, 119, 180)).all(axis=2).sum() for image in (inside, plot)]
    assert line[0] == line[1] > 1000
    rng = np.random.default_rng(0)
    black, photograph = np.zeros((200, 300, 3), np.uint8), rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)
    page = np.full((200, 300, 3), 255, np.uint8)
    for other in (black, photograph, page):
        assert loader.crop_to_axes(other) is other


# ------------------------------------------------------------------------------------------ class folders


def small_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path) -> Path:
    for part, n in (("train", 6), ("test", 3)):
        for label, name in enumerate(("beta", "alpha")):
            for i in range(n):
                image_files.write_png(tmp_path / "set" / part / name / f"{i}.png", small_image(100 * label + i))
    return tmp_path / "set"


def test_class_folders_become_sorted_labels(root):
    found = loader.ClassFolder(root)
    assert found.classes == ["alpha", "beta"]
    assert [label for _, label in found.train] == [0] * 6 + [1] * 6
    assert all(path.parent.name == found.classes[label] for path, label in found.train + found.test)
    assert len(found.test) == 6


def test_bad_class_folders_are_named(root):
    (root / "train" / "gamma").mkdir()
    with pytest.raises(config.InputError, match=r"class folder .*gamma holds no image"):
        loader.ClassFolder(root)
    (root / "train" / "gamma").rmdir()
    (root / "test" / "beta").rename(root / "test" / "delta")
    with pytest.raises(config.InputError, match=r"test has delta, which train does not and lacks beta"):
        loader.ClassFolder(root)
    for path in (root / "train" / "alpha").iterdir():
        path.unlink()
    (root / "train" / "alpha").rmdir()
    with pytest.raises(config.InputError, match="holds 1 class folder"):
        loader.ClassFolder(root)
    with pytest.raises(config.InputError, match="is no folder"):
        loader.ClassFolder(root / "nowhere")


def test_an_empty_test_folder_is_no_test(root):
    for path in (root / "test").glob("*/*"):
        path.unlink()
    for path in (root / "test").iterdir():
        path.rmdir()
    assert loader.ClassFolder(root).test == []


def test_the_split_keeps_the_share_of_every_class():
    labels = np.array([0] * 40 + [1] * 10 + [2] * 2 + [3])
    training, validation = loader.stratified_split(labels, 0.2, seed=3)
    assert sorted([*training, *validation]) == list(range(len(labels)))
    assert np.bincount(labels[validation], minlength=4).tolist() == [8, 2, 1, 0]
    np.testing.assert_array_equal(loader.stratified_split(labels, 0.2, seed=3)[1], validation)
    assert loader.stratified_split(labels, 0.2, seed=4)[1].tolist() != validation.tolist()


# -------------------------------------------------------------------------------------------------- cache


def paths_of(root: Path) -> list[Path]:
    return [path for path, _ in loader.ClassFolder(root).train]


def test_the_cache_decodes_once_and_again_only_what_changed(root, tmp_path):
    paths, cache = paths_of(root), tmp_path / "cache"
    write(root / "train" / "alpha", b"no image", "0.png")
    first = loader.load_plots(paths, 32, False, cache)
    assert first.n_decoded == 12 and first.images.shape == (11, 32, 32, 3)
    assert first.errors[0][0] == paths[0] and first.kept == list(range(1, 12))
    again = loader.load_plots(paths, 32, False, cache)
    assert again.n_decoded == 0 and again.errors == first.errors
    np.testing.assert_array_equal(again.images, first.images)
    image_files.write_png(paths[5], small_image(999))
    os.utime(paths[5], ns=(1, 1))
    changed = loader.load_plots(paths, 32, False, cache)
    assert changed.n_decoded == 1
    np.testing.assert_array_equal(changed.images[4], image_files.fit_image(small_image(999), 32, "stretch"))
    assert loader.load_plots(paths, 32, True, cache).n_decoded == 12
    assert loader.load_plots(paths, 64, False, cache).images.shape[1:] == (64, 64, 3)


def test_a_cache_of_plots_that_would_look_otherwise_today_is_made_anew(root, tmp_path, monkeypatch):
    paths, cache = paths_of(root), tmp_path / "cache"
    write(root / "train" / "alpha", b"no image", "0.png")
    before, real = loader.load_plots(paths, 32, False, cache), image_files.fit_image
    monkeypatch.setattr(image_files, "fit_image", lambda *given: 255 - real(*given))
    after = loader.load_plots(paths, 32, False, cache)
    assert after.n_decoded == 12 and (after.images == 255 - before.images).all()
    assert loader.load_plots(paths, 32, False, cache).n_decoded == 0


@pytest.mark.parametrize("name", ["0.png", "0.csv"])
def test_what_the_system_refused_to_read_is_tried_again(root, tmp_path, monkeypatch, name):
    paths, cache, opened = [root / "train" / "alpha" / name, *paths_of(root)[1:]], tmp_path / "cache", Path.open
    if name.endswith("csv"):
        write(root / "train" / "alpha", LINES, name)

    def refuses(file, *rest, **more):
        if file == paths[0]:
            raise PermissionError(13, "Permission denied")
        return opened(file, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuses)
        assert loader.load_plots(paths, 32, False, cache).errors == [(paths[0], "cannot be read (Permission denied)")]
    again = loader.load_plots(paths, 32, False, cache)
    assert not again.errors and again.n_decoded == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_cache_is_made_anew(root, tmp_path, damage):
    paths, cache = paths_of(root), tmp_path / "cache"
    first = loader.load_plots(paths, 32, False, cache)
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(
        {"cut": bytes(data[: len(data) // 2]), "flipped": bytes(data), "empty": b"", "text": b"no archive"}[damage]
    )
    second = loader.load_plots(paths, 32, False, cache)
    assert second.n_decoded == 12
    np.testing.assert_array_equal(second.images, first.images)
    assert loader.load_plots(paths, 32, False, cache).n_decoded == 0
    assert [path.name for path in cache.iterdir()] == [file.name]  # no temporary files left


# ------------------------------------------------------------------------------------------- augmentation

OFF = config.SupervisedDataSettings(
    flip_time=False, flip_value=False, stretch_frac=0.0, shift_frac=0.0, line_jitter=0.0
)


def test_no_augmentation_changes_nothing_and_flips_are_flips():
    image = loader.prepare_image(series_plots.render_series(series_of("medium")), 64, True)
    np.testing.assert_array_equal(loader.augment_plot(image, OFF, np.random.default_rng(0)), image)
    flips = OFF.replace(flip_time=True, flip_value=True)
    seen = {loader.augment_plot(image, flips, np.random.default_rng(i)).tobytes() for i in range(40)}
    assert seen == {np.ascontiguousarray(image[::a, ::b]).tobytes() for a in (1, -1) for b in (1, -1)}


def test_a_flip_in_time_is_the_plot_of_the_series_backwards():
    values = series_of("medium")
    there, back = (
        loader.prepare_image(series_plots.render_series(v), 224, True).astype(int) for v in (values, values[::-1])
    )
    upside = loader.prepare_image(series_plots.render_series(-values), 224, True).astype(int)
    off = np.abs(there - back).mean()
    assert np.abs(there[:, ::-1] - back).mean() < 0.5 * off and np.abs(there[::-1] - upside).mean() < 0.5 * off


def test_augmentation_keeps_shape_range_and_the_line():
    image = loader.prepare_image(series_plots.render_series(series_of("short")), 128, True)
    ink = (255 - image.astype(float)).sum()
    settings, changed = config.SupervisedDataSettings(), 0
    for i in range(60):
        out = loader.augment_plot(image, settings, np.random.default_rng(i))
        assert out.shape == image.shape and out.dtype == np.uint8 and out.flags["C_CONTIGUOUS"]
        assert 0.8 < (255 - out.astype(float)).sum() / ink < 1.5
        changed += not np.array_equal(out, image)
    assert changed >= 59


def test_samples_depend_on_seed_epoch_and_index_only():
    images = np.stack(
        [
            loader.prepare_image(series_plots.render_series(series_of(case)), 64, True)
            for case in ("short", "medium", "walk")
        ]
    )
    before = images.copy()
    data = loader.LabelledImages(images, [2, 0, 1], config.SupervisedDataSettings(), seed=5)
    other = loader.LabelledImages(images, [2, 0, 1], config.SupervisedDataSettings(), seed=5)
    later = [other[key] for key in (7, 4, 1)]
    assert torch.equal(data[1].images, later[2].images) and torch.equal(data[4].images, later[1].images)
    assert not torch.equal(data[1].images, data[4].images)
    assert [int(data[key].labels) for key in (0, 4, 8)] == [2, 0, 1]
    np.testing.assert_array_equal(images, before)
    plain = loader.LabelledImages(images, [2, 0, 1], None)
    assert torch.equal(plain[5].images, data_loader.to_tensor(images[2])[0])


def test_training_batches_smaller_than_a_batch():
    data = loader.LabelledImages(np.zeros((3, 32, 32, 3), np.uint8), [0, 1, 1], config.SupervisedDataSettings(), seed=0)
    (batch,) = list(data_loader.training_loader(data, data_loader.EpochSampler(len(data), 0), 32))
    assert batch.images.shape == (3, 3, 32, 32) and sorted(batch.labels.tolist()) == [0, 1, 1]


# ---------------------------------------------------------------------------------------------- streaming


def test_mixed_inputs_stream_in_order_with_bounded_reading(root, tmp_path, monkeypatch):
    csv = write(tmp_path / "set", "data\n" + LINES, "z.csv")
    write(tmp_path / "set", "data\n", "y.csv")
    paths = loader.find_plots([root / "train" / "beta", csv, root])
    assert paths[:7] == [root / "train" / "beta" / f"{i}.png" for i in range(6)] + [csv]
    assert len(paths) == 20 and len(set(paths)) == 20
    read, ahead, seen = [], [], []
    real = loader._read_prepared
    monkeypatch.setattr(loader, "_read_prepared", lambda path, *rest: (read.append(path), real(path, *rest))[1])
    errors = []
    for batch in loader.iter_plots(paths, 32, True, batch_size=4, n_threads=2):
        seen += batch.paths
        errors += batch.errors
        ahead.append(len(read) - len(seen) - len(errors))
        assert batch.images.dtype == torch.float32 and len(batch.images) == len(batch.paths) <= 4
    assert max(ahead) <= 2 * 4 + 4
    assert seen == [path for path in paths if path.name != "y.csv"]
    assert [path.name for path, _ in errors] == ["y.csv"] and "header and no rows" in errors[0][1]


def test_a_pipe_in_a_folder_is_no_plot_but_a_broken_link_is_told(root):
    os.mkfifo(root / "pipe.csv")
    os.mkfifo(root / "pipe.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    for given in (root, root / "*"):
        assert not any(path.name.startswith("pipe") for path in loader.find_plots(str(given)))
        assert root / "gone.png" in loader.find_plots(str(given))
    assert loader.find_plots(root / "gone.png") == [root / "gone.png"]


def test_inputs_that_are_nothing_are_named(tmp_path):
    with pytest.raises(config.InputError, match="does not exist"):
        loader.find_plots(tmp_path / "nowhere")
    with pytest.raises(config.InputError, match="No image or CSV found"):
        loader.find_plots(tmp_path)


# ----------------------------------------------------------------------------------------- render command


def test_render_draws_what_it_can_and_skips_what_is_done(tmp_path):
    source, out = tmp_path / "csv", tmp_path / "plots"
    for name in ("up/a.csv", "up/b.csv", "down/a.csv"):
        write(source, "data\n" + LINES + "nan\n", name)
    write(source, "data\n2\n2\n", "down/flat.csv")
    report = loader.render_folder(source, out, num_workers=0)
    assert (report["rendered"], report["kept"], report["classes"]) == (3, 0, {"down": 1, "up": 2})
    assert [row["source"] for row in report["skipped"]] == ["down/flat.csv"] and "constant" in report["skipped"][0][
        "reason"
    ]
    assert report["dropped_rows"] == {"down/a.csv": 1, "up/a.csv": 1, "up/b.csv": 1}
    assert json.loads((out / "render_report.json").read_text()) == report
    np.testing.assert_array_equal(
        image_files.read_image(out / "up" / "a.png"), image_files.read_image(out / "down" / "a.png")
    )
    later = out.stat().st_mtime_ns + 10**9
    os.utime(source / "up" / "a.csv", ns=(later, later))
    again = loader.render_folder(source, out, num_workers=0)
    assert (again["rendered"], again["kept"]) == (1, 2) and again["dropped_rows"] == report["dropped_rows"]


def test_render_says_which_of_several_columns_it_drew(tmp_path, capsys):
    source, out = tmp_path / "csv", tmp_path / "plots"
    write(source, "t,a,b\n0,1.5,7\n1,2.5,9\n2,1,8\n", "up/several.csv")
    write(source, "t,a\n0,1.5\n1,2.5\n2,1\n", "up/one.csv")
    for n_drawn in (2, 0):  # and is still there where nothing is drawn anew
        assert loader.run(["render", str(source), "--out", str(out)]) == 0
        said = capsys.readouterr()
        report = json.loads((out / "render_report.json").read_text(encoding="utf-8"))
        assert (report["rendered"], report["columns"]) == (n_drawn, {"up/several.csv": "a"})
        assert "warning: 1 CSVs have several columns" in said.err
    (source / "up" / "several.csv").write_text("t,a\n0,1.5\n1,2.5\n2,1\n", encoding="utf-8")
    assert loader.run(["render", str(source), "--out", str(out)]) == 0
    assert "several columns" not in capsys.readouterr().err


def test_a_plot_is_of_the_source_there_is_now(tmp_path):
    source, out, values = tmp_path / "csv", tmp_path / "plots", np.random.default_rng(0).normal(size=(3, 30))
    first, second, third = (series_plots.render_series(each) for each in values)
    text = ["data\n" + "\n".join(map(repr, each.tolist())) for each in values]
    for name, each in (("a/x.csv", text[0]), ("a/x.tsv", text[1]), ("a/y.csv", text[0])):
        write(source, each, name)
    loader.render_folder(source, out, num_workers=0)
    (source / "a" / "x.csv").unlink()
    write(source, text[2], "a/y.csv")
    os.utime(source / "a" / "y.csv", ns=(10**9, 10**9))
    report = loader.render_folder(source, out, num_workers=0)
    assert sorted(path.name for path in (out / "a").iterdir()) == ["x.png", "y.png"] and report["classes"] == {"a": 2}
    for name, plot in (("x", second), ("y", third)):
        assert (
            np.abs(image_files.read_image(out / "a" / f"{name}.png").astype(int) - plot).mean()
            < 2
            < np.abs(first.astype(int) - plot).mean()
        )
    assert loader.render_folder(source, out, num_workers=0)["kept"] == 2
    write(source, text[0], "a/x.csv")  # takes the plot's name from x.tsv, which gets another
    report = loader.render_folder(source, out, num_workers=0)
    assert (report["rendered"], report["kept"], report["skipped"]) == (2, 1, [])
    (source / "a" / "x.csv").unlink()
    assert loader.render_folder(source, out, num_workers=0)["rendered"] == 1
    loader.render_folder(write(tmp_path / "more", text[0], "b/z.csv").parent.parent, out, num_workers=0)
    # of sources that are still there
    assert sorted(path.name for path in out.glob("*/*.png")) == [
        "x.png",
        "y.png",
        "z.png",
    ]
    assert loader.render_folder(source, out, num_workers=0)["kept"] == 2


def test_plots_of_other_series_are_neither_drawn_over_nor_removed(tmp_path):
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "plots"
    for name in ("a/x.csv", "a/y.csv"):
        write(first, "data\n" + LINES, name)
    loader.render_folder(first, out, num_workers=0)
    image_files.write_png(out / "a" / "own.png", np.zeros((8, 8, 3), np.uint8))
    before = {path.name: path.read_bytes() for path in (out / "a").iterdir()}
    for name, text in (
        ("a/x.csv", ""),
        ("a/y.csv", "data\n9\n1\n5\n"),
        ("a/own.csv", ""),
        ("a/z.csv", "data\n" + LINES),
    ):
        write(second, text, name)
    report = loader.render_folder(second, out, num_workers=0)
    assert {path.name: path.read_bytes() for path in (out / "a").iterdir() if path.name != "z.png"} == before
    assert (report["rendered"], report["kept"]) == (1, 0)
    reasons = {row["source"]: row["reason"] for row in report["skipped"]}
    assert reasons.keys() == {"a/x.csv", "a/y.csv", "a/own.csv"}
    assert reasons["a/y.csv"] == f"is not drawn over the plot of {first / 'a' / 'y.csv'}; expected another --out"
    linked = tmp_path / "linked"
    linked.symlink_to(first, target_is_directory=True)
    assert loader.render_folder(linked, out, num_workers=0)["rendered"] == 2  # the same series
    (out / "a" / "y.png").unlink()
    assert loader.render_folder(second, out, num_workers=0)["rendered"] == 1  # y, which has no plot any more
    shutil.rmtree(first)
    report = loader.render_folder(second, out, num_workers=0)
    assert (report["rendered"], report["kept"]) == (0, 2) and not (out / "a" / "x.png").exists()


@pytest.mark.parametrize("row", [None, {}, {"source": 3}])
def test_a_damaged_report_of_rendering_is_no_report(tmp_path, row):
    write(tmp_path / "csv", "data\n" + LINES, "a/x.csv")
    report = tmp_path / "plots" / "render_report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"outputs": {"a/x.png": row}}))
    assert loader.render_folder(tmp_path / "csv", tmp_path / "plots", num_workers=0)["rendered"] == 1


def test_what_an_interrupted_rendering_has_drawn_is_kept(tmp_path, monkeypatch):
    for name in ("a/1.csv", "a/2.csv"):
        write(tmp_path / "csv", "data\n" + LINES, name)

    def interrupted(items, total):
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loader.render_folder(tmp_path / "csv", tmp_path / "plots", num_workers=0, progress=interrupted)
    again = loader.render_folder(tmp_path / "csv", tmp_path / "plots", num_workers=0)
    assert (again["rendered"], again["kept"]) == (1, 1)


def test_wrong_commands_end_with_2_and_name_the_right_ones(capsys):
    assert loader.run([]) == 2
    assert loader.run(["draw"]) == 2
    said = capsys.readouterr().err
    assert "unknown command 'draw'; expected render or generate" in said and "usage:" in said
    assert loader.run(["render", "--bogus"]) == 2
    assert loader.run(["render", "/nowhere/at/all"]) == 1
    assert "is no folder" in capsys.readouterr().err


def test_the_script_renders_with_processes(tmp_path):
    for i in range(16):
        write(
            tmp_path / "csv",
            "data\n" + "\n".join(map(str, np.random.default_rng(i).normal(size=50))),
            f"kind/{i:02d}.csv",
        )
    command = [
        sys.executable,
        str(ROOT / "data_loader_supervised.py"),
        "render",
        str(tmp_path / "csv"),
        "--out",
        "plots",
        "--output-dir",
        str(tmp_path),
        "--num-workers",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "16 plots drawn" in done.stdout and len(list((tmp_path / "plots" / "kind").glob("*.png"))) == 16


# --------------------------------------------------------------------------------------- generated series


@pytest.mark.parametrize("style", series_generator.STYLES)
@pytest.mark.parametrize("kind", series_generator.KINDS)
def test_series_repeat_by_seed_and_leave_global_chance_alone(kind, style):
    pytest.importorskip("betise")
    np.random.seed(1)
    random.seed(1)
    before = np.random.get_state()[1].tolist(), random.getstate()
    first = series_generator.generate_series(kind, style, (3, 1))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before
    np.random.seed(99)
    second = series_generator.generate_series(kind, style, (3, 1))
    np.testing.assert_array_equal(first.values, second.values)
    assert json.dumps(first.parameters) == json.dumps(second.parameters)
    assert 50 <= len(first.values) <= 10_000 and np.isfinite(first.values).all() and np.ptp(first.values) > 0
    assert not np.array_equal(series_generator.generate_series(kind, style, (3, 2)).values[:50], first.values[:50])


@pytest.mark.parametrize(
    ("base", "features"),
    [
        ("arma", {"mean_shift": {"mode": "multiple", "num_breaks": 3, "direction": "up", "location": "end"}}),
        (
            "ar",
            {
                "linear_trend": {"direction": "down"},
                "trend_shift": {"mode": "single", "location": "middle", "change_type": "direction_change"},
            },
        ),
        ("multiple_seasonality", {"contextual_anomaly": {"mode": "single", "location": "middle"}}),
        ("garch", {}),
    ],
)
def test_the_present_style_is_betises_own(base, features):
    betise = pytest.importorskip("betise")
    n, seed = 400, 11
    dataset = {
        "base_series": base,
        "num_series": 1,
        "length_range": [n, n],
        "random_seed": seed,
        "features": {name: {"enabled": True, **options} for name, options in features.items()},
    }
    expected = betise.generate_dataframe(betise.load_config(dataset=dataset))[0]["data"].to_numpy()
    state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    np.random.randint(n, n + 1)  # betise draws the length first
    made = series_generator._betise_series(base, features, n)
    np.random.set_state(state)
    random.setstate(python_state)
    np.testing.assert_array_equal(made, expected)


def test_home_overlays_do_what_they_say():
    pytest.importorskip("betise")
    base = np.random.default_rng(0).normal(size=1500)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        values, drawn = series_generator._home_variance_shift(base, rng)
        spread = [part.std() for part in np.split(values, drawn["at"])]
        for (before, after), factor in zip(pairwise(spread), drawn["factors"], strict=True):
            assert after / before == pytest.approx(factor, rel=0.2)
        values, drawn = series_generator._home_mean_shift(base, rng)
        means = [part.mean() for part in np.split(values, drawn["at"])]
        assert [np.sign(b - a) for a, b in pairwise(means)] == np.sign(drawn["shifts"]).tolist()


def test_the_smooth_part_is_hodrick_and_prescotts():
    pytest.importorskip("statsmodels")
    from statsmodels.tsa.filters.hp_filter import hpfilter

    values = np.cumsum(np.random.default_rng(2).normal(size=200))
    cycle, trend = hpfilter(values, lamb=11_000)
    smooth, rest = series_generator._smooth_and_rest(values)
    np.testing.assert_allclose(smooth, trend, atol=1e-6)
    np.testing.assert_allclose(rest, cycle, atol=1e-6)


def test_generate_writes_the_same_files_by_seed(tmp_path):
    pytest.importorskip("betise")
    first = loader.generate(tmp_path / "a", 1, seed=4, num_workers=0)
    loader.generate(tmp_path / "b", 1, seed=4, num_workers=0)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert [path.parts[0] for path in files] == list(series_generator.KINDS)
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
        series = series_plots.read_series(tmp_path / "a_csv" / path.with_suffix(".csv"))
        drawn = loader.prepare_image(series_plots.render_series(series.values), 64, True).astype(int)
        assert (
            np.abs(drawn - loader.prepare_image(image_files.read_image(tmp_path / "a" / path), 64, True)).mean() < 2.0
        )
    assert first["betise"].startswith("0.6") and first["seed"] == 4 and len(first["series"]) == 9
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["series"][0]["parameters"]["length"] >= 50
    third = loader.generate(tmp_path / "c", 1, seed=5, num_workers=0)
    assert [row["parameters"] for row in third["series"]] != [row["parameters"] for row in first["series"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 5}, "seed 4, not 5"),
        ({"per_class": 2}, "per_class 1, not 2"),
        ({"home_share": 1.0}, "home_share 0.5, not 1.0"),
    ],
)
def test_series_of_other_arguments_are_not_mixed_in_one_folder(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(series_generator, "require_betise", lambda: "1")
    monkeypatch.setattr(loader, "_generate_one", lambda job: {})
    given = {"per_class": 1, "seed": 4, "num_workers": 0}
    loader.generate(tmp_path / "a", **given)
    loader.generate(tmp_path / "a", **given)
    with pytest.raises(config.InputError, match=f"a holds series generated with {words}; expected another folder"):
        loader.generate(tmp_path / "a", **{**given, **changes})


@pytest.mark.parametrize("out", [".", ".."])
def test_series_lie_beside_a_folder_of_plots_however_it_is_spelled(tmp_path, monkeypatch, capsys, out):
    monkeypatch.setattr(series_generator, "require_betise", lambda: "1")
    monkeypatch.setattr(loader, "_generate_one", lambda job: {})
    (tmp_path / "plots" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "plots" / ("sub" if out == ".." else ""))
    assert loader.run(["generate", "--out", out, "--per-class", "1", "--num-workers", "0"]) == 0
    row = json.loads((tmp_path / "plots" / "manifest.json").read_text())["series"][0]
    assert row["csv"].startswith("plots_csv/") and row["plot"].startswith("plots/")
    assert f"series in {tmp_path / 'plots_csv'}," in capsys.readouterr().out


def test_files_shared_by_training_and_test_are_counted(root):
    assert loader.ClassFolder(root).n_shared() == 6  # drawn alike
    image_files.write_png(root / "test" / "alpha" / "0.png", small_image(999))
    (root / "test" / "alpha" / "1.png").write_bytes((root / "train" / "beta" / "3.png").read_bytes())
    for part in ("train", "test"):
        (root / part / "alpha" / "9.png").write_bytes(b"")
    assert loader.ClassFolder(root).n_shared() == 5


def test_without_betise_one_sentence_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "betise", None)
    with pytest.raises(config.InputError, match=r"pip install 'betise>=0.6,<0.7'"):
        series_generator.require_betise()


def test_unknown_kinds_are_refused():
    with pytest.raises(config.InputError, match="no series of kind 'spike'"):
        series_generator.generate_series("spike", "home", 0)


def test_area_averaging_keeps_a_thin_line():
    image = np.full((600, 800, 3), 255, np.uint8)
    cv2.line(image, (0, 301), (799, 301), (31, 119, 180), 1)
    small = loader.prepare_image(image, 100, False)
    assert (255 - small.astype(float)).sum() * 48 == pytest.approx((255 - image.astype(float)).sum(), rel=0.05)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="groups of processes are of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "timeout"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_to_all_processes_ends_rendering_in_one_sentence(tmp_path, number, begun):
    for n in range(400):
        write(tmp_path / "series" / "a", LINES, f"{n:03d}.csv")
    render = [str(tmp_path / "series"), "--out", str(tmp_path / "plots")]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "data_loader_supervised.py"), "render", *render, "--num-workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (
        list((tmp_path / "plots").rglob("*.png")) if begun else n_children(process.pid) >= 3
    ):  # two workers and what keeps track of shared memory
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "interrupted: " in said
    report = json.loads((tmp_path / "plots" / "render_report.json").read_text(encoding="utf-8"))
    assert report["rendered"] < 400


def n_children(pid: int) -> int:
    """Of a process, those it started itself; as many as are waited for where the system does not say."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return len(file.read_text(encoding="ascii").split()) if file.exists() else 3
