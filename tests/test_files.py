"""Files: whole or not at all, names that fit, and what of an earlier run goes."""

import csv
import json
import math
import os
import re
import stat
from pathlib import Path

import pytest

import files
from config import InputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_in_a_new_folder_with_the_usual_permissions(tmp_path):
    path = tmp_path / "new" / "deeper" / "a.bin"
    for content in (b"first", memoryview(b"second, longer")):
        files.write_whole(path, content)
        assert path.read_bytes() == content and names(path.parent) == ["a.bin"]
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_each_row_is_in_a_table_as_soon_as_it_is_written(tmp_path):
    with files.open_table(tmp_path / "a.csv") as file:
        for number in range(3):
            csv.writer(file).writerow([f"photo\udcff{number}.png", number])
            assert len((tmp_path / "a.csv").read_bytes().splitlines()) == number + 1


def test_a_table_for_which_there_is_no_room_is_named(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # a write beyond fails as on a full disk
    try:
        with (
            pytest.raises(InputError, match=r"Cannot write .*a\.csv: File too large\."),
            files.open_table(tmp_path / "a.csv") as file,
        ):
            for number in range(300):
                csv.writer(file).writerow(["photo.png", number])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(FileNotFoundError), files.open_table(tmp_path / "a.csv"):
        (tmp_path / "gone").read_bytes()


@pytest.mark.parametrize("sync", [False, True])
def test_the_disk_is_waited_for_where_that_is_asked_for(tmp_path, monkeypatch, sync):
    waited = []
    monkeypatch.setattr(os, "fsync", waited.append)
    files.write_whole(tmp_path / "a", b"x", sync)
    assert bool(waited) == sync


def test_a_failure_while_writing_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_whole(path, b"before")

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(InputError, match=r"Cannot write .*a: No space left on device; expected a writable folder"):
        files.write_whole(path, b"after")
    assert path.read_bytes() == b"before" and names(tmp_path) == ["a"]


def test_a_file_where_the_folder_should_be_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "deeper" / "a"):
        with pytest.raises(InputError, match=r"Cannot write .*a: .*; expected a writable folder"):
            files.write_whole(path, b"x")


def test_names_that_are_no_text_and_as_long_as_can_be_are_written(tmp_path):
    for name in ("\udcff.png", "n" * 255):
        files.write_whole(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"


def test_what_another_run_removes_first_is_gone_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "b.jpg").touch()
    unlink = Path.unlink

    def later(path, **options):
        unlink(path)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", later)
    files.remove_written(tmp_path, {"": re.compile(r".*\.jpg")})
    assert not names(tmp_path)


def test_json_is_written_whole_and_says_null_where_a_number_is_not_finite(tmp_path, monkeypatch):
    path = tmp_path / "metrics" / "a.json"
    files.write_json(path, {"loss": [1.5, math.nan, {"x": -math.inf}], "name": "NaN"})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"loss": [1.5, None, {"x": None}], "name": "NaN"}
    assert files.read_json(path)["name"] == "NaN"
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"Cannot write .*a\.json: No space left"):
        files.write_json(path, {"loss": 2.0})
    assert path.read_bytes() == before and names(path.parent) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", None])
def test_what_is_no_mapping_reads_as_an_empty_one(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert files.read_json(tmp_path / "a.json") == {}


def test_a_long_stem_is_cut_and_stays_one_of_a_kind():
    long = "ä" * 200
    assert (
        files.short_stem("short") == "short" and files.short_stem("n" * files.LONGEST_STEM) == "n" * files.LONGEST_STEM
    )
    cut = {files.short_stem(long), files.short_stem(long + "b")}
    assert len(cut) == 2 and all(
        len(each.encode()) <= files.LONGEST_STEM and each.startswith("ä" * 100) for each in cut
    )


def test_what_an_earlier_run_wrote_goes_but_no_other_file_and_no_input(tmp_path):
    folder = tmp_path / "pictures"
    for name in ("1.png", "2.png", "note.txt", "11.png.bak"):
        files.write_whole(folder / name, b"x")
    (tmp_path / "link").symlink_to(folder / "2.png")
    files.remove_written(
        tmp_path, {"pictures": re.compile(r"\d+\.png"), "absent": re.compile(".*")}, [tmp_path / "link"]
    )
    assert names(folder) == ["11.png.bak", "2.png", "note.txt"]
