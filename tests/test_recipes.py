"""Every file of recipes/ is a recipe: its function returns a whole command, whose model can be built."""

from pathlib import Path

import pytest
import torch

from retentive.cli.train import model_config, read_recipe
from retentive.models import build

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    command, rest = read_recipe(["--recipe", str(recipe), "--steps", "1"])
    assert rest == ["--steps", "1"] and command.train.steps > 1
    with torch.device("meta"):
        model = build(model_config(command, 4096))
    assert type(model).__name__.lower() == command.model
