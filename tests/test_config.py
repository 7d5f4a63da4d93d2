"""Settings: what beats what, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from pathlib import Path

import pytest
import yaml

import config

ROOT = Path(__file__).parent.parent
CLASSES = config.all_settings()
LEAVES = [cls for cls in CLASSES if not cls.__subclasses__()]


def parse(cls, *argv):
    return config.parse(cls, "A stage.", list(argv), prog="stage.py")


def write_yaml(folder, text):
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(cls, *argv):
    with pytest.raises(config.UsageError) as caught:
        parse(cls, *argv)
    return str(caught.value)


# ------------------------------------------------------------------------------------- the table of settings


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_means_and_has_a_fitting_default(cls):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        about, default = field.metadata, field.default
        assert about["meaning"][0].isupper() and about["meaning"].endswith("."), field.name
        expected = tuple if typing.get_origin(hints[field.name]) is tuple else hints[field.name]
        assert type(default) is expected, field.name
        if about["choices"]:
            assert set(default if expected is tuple else [default]) <= set(about["choices"]), field.name
        if expected in (int, float):
            low = float("-inf") if about["minimum"] is None else about["minimum"]
            high = float("inf") if about["maximum"] is None else about["maximum"]
            assert low <= default <= high, field.name
            assert not about["multiple_of"] or default % about["multiple_of"] == 0, field.name


def test_processes_are_asked_for_where_there_are_some():
    assert parse(config.TrainSettings, "--num-workers", "2").num_workers == 2
    assert refused(config.ClassifySettings, "folder", "--num-workers", "2").startswith(
        "Unknown argument '--num-workers'"
    )


def test_settings_of_one_name_agree_in_type_wherever_they_stand():
    seen = {}
    for cls in CLASSES:
        for name, hint in typing.get_type_hints(cls).items():
            assert seen.setdefault(name, hint) == hint, f"{cls.__name__}.{name}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_settings_survive_yaml_and_come_back_equal(cls):
    settings = cls()
    if dataclasses.fields(cls):
        hints = typing.get_type_hints(cls)
        changed = {
            field.name: {str: ("a", "b"), int: (4, 8)}[typing.get_args(hints[field.name])[0]]
            for field in dataclasses.fields(cls)
            if field.default == ()
        }
        settings = settings.replace(**changed, **({"seed": 3} if hasattr(settings, "seed") else {}))
    plain = config.as_dict(settings)
    assert all(isinstance(value, (str, int, float, bool, list)) for value in plain.values())
    assert config.from_dict(cls, yaml.safe_load(yaml.safe_dump(plain))) == settings


def test_from_dict_ignores_other_classes_keys_but_checks_its_own():
    assert config.from_dict(config.MapSettings, {"epochs": 3, "top_frac": 0.5}).top_frac == 0.5
    with pytest.raises(config.UsageError, match=r"top_frac is 2\.0; expected at most 1\.0"):
        config.from_dict(config.MapSettings, {"top_frac": 2.0})


def test_settings_are_frozen_and_a_copy_is_checked():
    settings = config.DataSettings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.image_size = 64
    with pytest.raises(config.UsageError, match="multiple of 32"):
        settings.replace(image_size=100)


def test_an_encoder_without_branches_is_refused_by_its_settings():
    with pytest.raises(config.UsageError, match="no branch"):
        config.ClassifierModelSettings(profile_channels=0, widths=())
    with pytest.raises(config.UsageError, match="no branch"):
        parse(config.TrainClassifierSettings, "--profile-channels", "0", "--widths")


def test_saved_settings_are_read_again_by_config(tmp_path):
    settings = config.TrainSettings(epochs=7, flip_vertical=True, learning_rate=3e-5)
    config.save(settings, tmp_path / "models" / "config.yaml")
    assert parse(config.TrainSettings, "--config", str(tmp_path / "models" / "config.yaml")) == settings


@pytest.mark.parametrize(("name", "least"), [("perceptual_crop_px", 4), ("pixel_crop_px", 16)])
def test_a_crop_too_small_to_learn_from_is_refused(name, least):
    for fits in (0, least):
        assert getattr(config.LossSettings(**{name: fits}), name) == fits
    with pytest.raises(config.UsageError, match=f"{name} is {least // 2}; expected 0 or at least {least}"):
        config.TrainSettings(**{name: least // 2})


# ------------------------------------------------------------------------------------------ what beats what


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path):
    path = write_yaml(tmp_path, "epochs: 5\nbatch_size: 3\n")
    settings = parse(config.TrainSettings, "--config", path, "--epochs", "9")
    default = config.TrainSettings()
    assert (settings.epochs, settings.batch_size, settings.latent_dim) == (9, 3, default.latent_dim)


def test_a_flag_set_to_the_default_still_beats_the_file(tmp_path):
    default = config.TrainSettings().batch_size
    path = write_yaml(tmp_path, f"batch_size: {default + 1}\n")
    assert parse(config.TrainSettings, "--config", path, "--batch-size", str(default)).batch_size == default


def test_bare_arguments_may_stand_in_the_file(tmp_path):
    path = write_yaml(tmp_path, "images: [a.png, b.png]\n")
    assert parse(config.ClassifySettings, "--config", path).images == ("a.png", "b.png")
    assert parse(config.ClassifySettings, "c.png", "--config", path).images == ("c.png",)
    assert "arguments are required: images. See " in refused(
        config.ClassifySettings, "--config", write_yaml(tmp_path, "images: []\n")
    )


@pytest.mark.parametrize("key", ["learning_rate", "epochs", "widths"])
def test_a_number_too_large_to_compute_with_is_refused(tmp_path, key):
    value = "1" + 400 * "0"
    path = write_yaml(tmp_path, f"{key}: {f'[{value}]' if key == 'widths' else value}\n")
    assert "expected a finite number" in refused(config.TrainClassifierSettings, "--config", path)


def test_switches_can_be_turned_both_ways(tmp_path):
    path = write_yaml(tmp_path, "skips: false\nflip_vertical: true\n")
    off = parse(config.TrainSettings, "--config", path)
    on = parse(config.TrainSettings, "--config", path, "--skips", "--no-flip-vertical")
    assert (off.skips, off.flip_vertical) == (False, True)
    assert (on.skips, on.flip_vertical) == (True, False)


def test_bare_arguments_become_a_tuple_and_one_is_needed():
    assert parse(config.ClassifySettings, "a.png", "b", "--batch-size", "2").images == ("a.png", "b")
    assert parse(config.ClassifySettings, "a.png", "--batch-size", "2", "b").images == ("a.png", "b")
    assert "images holds an empty path; expected a file or a folder" in refused(config.ClassifySettings, "a.png", "")
    assert "required" in refused(config.ClassifySettings)


def test_a_file_may_be_a_pipe_which_can_be_read_once():
    for epochs in (7, 9):  # through pipes of the same number
        read, write = os.pipe()
        os.write(write, f"epochs: {epochs}".encode())
        os.close(write)
        path = f"/dev/fd/{read}"
        if not Path(path).exists():
            pytest.skip("no /dev/fd here")
        assert [parse(config.TrainSettings, "--config", path).epochs for _ in range(2)] == [epochs, epochs]
        os.close(read)


def test_behind_two_dashes_a_name_may_begin_with_one():
    found = parse(config.ClassifySettings, "a.png", "--batch-size", "3", "--", "-b.png", "--seed")
    assert found.images == ("a.png", "-b.png", "--seed") and (found.batch_size, found.seed) == (3, 0)
    assert parse(config.ClassifySettings, "--", "-b.png").images == ("-b.png",)
    assert "'-b.png'" in refused(config.TrainSettings, "--", "-b.png")


def test_yaml_keys_may_have_dashes_and_numbers_may_be_written_1e_3(tmp_path):
    settings = parse(
        config.TrainSettings, "--config", write_yaml(tmp_path, "learning-rate: 1e-3\nkl_weight: 2\nbatch-size: 4")
    )
    assert (settings.learning_rate, settings.kl_weight, settings.batch_size) == (0.001, 2.0, 4)
    assert type(settings.kl_weight) is float


def test_a_file_may_serve_several_stages(tmp_path):
    path = write_yaml(tmp_path, "epochs: 5\nbatch_size: 3\n")
    settings = parse(config.DetailTestSettings, "--config", path)
    assert settings.batch_size == 3 and settings.given == {"batch_size"}


def test_an_empty_file_changes_nothing(tmp_path):
    assert parse(config.TrainSettings, "--config", write_yaml(tmp_path, "# nothing\n")) == config.TrainSettings()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_is_valid_for_every_stage_that_can_take_it(path):
    values = config.read_yaml(str(path))
    trained = config.TrainClassifierSettings if path.name.startswith("classifier") else config.TrainSettings
    assert values and values.keys() <= vars(trained()).keys()
    for cls in LEAVES:
        settings = config.from_dict(cls, values)
        assert all(getattr(settings, key) == value for key, value in values.items() if hasattr(settings, key))


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--epoch", "--epochs"), ("--lr", "--learning-rate"), ("--bs", "--batch-size"), ("--zq", None)],
)
def test_an_unknown_flag_names_the_nearest(flag, nearest):
    message = refused(config.TrainSettings, flag, "3")
    assert f"'{flag}'" in message and f"did you mean '{nearest or '--'}" in message and "--help" in message


def test_flags_are_not_guessed_from_their_beginning():
    assert "--image-size" in refused(config.TrainSettings, "--image", "64")


def test_an_unknown_key_names_the_nearest_and_the_file(tmp_path):
    for key, nearest in (("batchsize", "batch_size"), ("lr", "learning_rate")):
        path = write_yaml(tmp_path, f"{key}: 3\n")
        message = refused(config.TrainSettings, "--config", path)
        assert f"'{key}'" in message and f"did you mean '{nearest}'?" in message and path in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--image-size", "100"], "image_size is 100; expected a multiple of 32"),
        (["--image-size", "32"], "image_size is 32; expected at least 64"),
        (["--image-size", "2048"], "image_size is 2048; expected at most 1024"),
        (["--device", "gpu"], "device is 'gpu'; expected one of auto, cpu, cuda"),
        (["--seed", "-1"], "seed is -1; expected at least 0"),
        (["--learning-rate", "nan"], "learning_rate is nan; expected a finite number"),
        (["--learning-rate", "inf"], "learning_rate is inf; expected a finite number"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--epochs"], "expected one argument"),
        (["--batch-size", str(10**30)], f"expected {2**63 - 1} at most"),
        (["--data-dir", "a\0b"], "expected text without a null character"),
    ],
)
def test_values_out_of_bounds_are_refused_with_what_was_expected(argv, words):
    message = refused(config.TrainSettings, *argv)
    assert words in message and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: many", "epochs is 'many'; expected int"),
        ("epochs: 1.5", "epochs is 1.5; expected int"),
        ("epochs: true", "epochs is True; expected int"),
        ("epochs:", "epochs is None; expected int"),
        ("kl_weight: true", "kl_weight is True; expected float"),
        ("kl_weight: little", "kl_weight is 'little'; expected float"),
        ("skips: 1", "skips is 1; expected bool"),
        ("data_dir: 5", "data_dir is 5; expected str"),
        ("image_size: 70", "expected a multiple of 32"),
        ("- epochs", "holds no settings"),
        ("[]", "holds no settings"),
        ("false", "holds no settings"),
        ("[" * 3000, "cannot be read"),
        ("epochs: [", "cannot be read"),
        ("data_dir: 2020-13-45", "cannot be read"),
    ],
)
def test_wrong_values_in_a_file_are_refused(tmp_path, text, words):
    message = refused(config.TrainSettings, "--config", write_yaml(tmp_path, text))
    assert words in message and "\n" not in message


@pytest.mark.parametrize("value", ["5", "", "[1, 2]", "{a: b}"])
def test_a_list_of_names_in_a_file_must_hold_text(value):
    with pytest.raises(config.UsageError) as caught:
        config.from_dict(config.ClassifySettings, yaml.safe_load(f"images: {value}"))
    message = str(caught.value)
    assert "images" in message and "\n" not in message


def test_a_missing_or_binary_file_is_refused(tmp_path):
    assert "no_such.yaml cannot be read" in refused(config.TrainSettings, "--config", str(tmp_path / "no_such.yaml"))
    (tmp_path / "image.yaml").write_bytes(bytes(range(256)))
    assert "cannot be read" in refused(config.TrainSettings, "--config", str(tmp_path / "image.yaml"))


def test_a_seed_that_torch_cannot_take_is_refused():
    assert "seed" in refused(config.TrainSettings, "--seed", str(2**63))


@pytest.mark.parametrize("cls", LEAVES, ids=lambda cls: cls.__name__)
def test_help_shows_every_flag_with_its_meaning_in_the_group_of_what_it_sets(cls):
    blocks = config.build_parser(cls, "A stage.", "stage.py").format_help().split("\n\n")[2:]
    groups = {title: " ".join(text.split()) for title, text in (block.split(":\n", 1) for block in blocks)}
    for field in dataclasses.fields(cls):
        about, flag = field.metadata, "--" + field.name.replace("_", "-")
        given = re.escape("{" + ",".join(about["choices"]) + "}") if about["choices"] else "[A-Z]+"
        flag = rf"{field.name} " if about["positional"] else rf"{flag}( {given}| \[({given}|\w+) .+?\]|, --no-\S+) "
        wanted = flag + re.escape(" ".join(about["meaning"].split()) + (f" [{about['unit']}]" if about["unit"] else ""))
        assert [bool(re.search(wanted, text)) for text in groups.values()].count(True) == 1, wanted
    own = cls.__doc__.strip(".").lower()
    assert own in groups and "--output-dir" not in groups[own] and "--output-dir" in list(groups.values())[-1]


def test_a_preset_fills_in_only_what_nobody_gave_also_where_the_default_was_given(tmp_path):
    default = config.TrainSettings().image_size
    (tmp_path / "a.yaml").write_text("batch_size: 2")
    settings = config.parse(
        config.TrainSettings, "", ["--image-size", str(default), "--config", str(tmp_path / "a.yaml")]
    )
    filled = settings.with_preset({"image_size": 128, "batch_size": 16, "learning_rate": 0.5})
    assert (filled.image_size, filled.batch_size, filled.learning_rate) == (default, 2, 0.5)
    assert filled.given == filled.replace(epochs=3).given == {"image_size", "batch_size"}
