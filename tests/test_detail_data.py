"""What DetailVAE learns from and what is held out, as the settings ask for."""

from __future__ import annotations

import pytest
import torch
from conftest import picture, save

import config
import detail_data
import engine
import image_folders


def read(folder, side=64, **changes):
    """What is read of eight good images of that side, and the warnings."""
    for i in range(8):
        save(folder / "train" / "good" / f"{i}.png", picture(side, side, seed=i))
    settings = config.TrainSettings(data_dir=str(folder), image_size=64, **changes)
    said = []
    return detail_data.read_data(settings, engine.Runtime(torch.device("cpu")), said.append), said


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_and_held_out_images_are_as_the_settings_ask(tmp_path, seed):
    data, said = read(tmp_path, seed=seed, variants=3, holdout_frac=0.25, drawn_defects=0.5)
    train, held = image_folders.split_holdout(data.folder.train_good, 0.25, seed)
    assert (data.training.paths, data.held_paths) == (train, held) and not said
    assert (data.training.n_variants, data.training.seed, data.training.defect_share) == (3, seed, 0.5)


def test_all_tiles_of_a_few_held_out_images_are_kept(tmp_path):
    data, _ = read(tmp_path, side=160, tile=True)
    n_held = len(data.held_paths)
    assert (len(data.held.images), len(data.training)) == (9 * n_held, 9 * (8 - n_held))
