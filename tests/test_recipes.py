"""Every file of recipes/ is a recipe: its function returns a whole command, whose models can be built."""

from pathlib import Path

import pytest
import torch

from retentive.cli.compare import CompareCommand, train_command
from retentive.cli.train import TrainCommand, model_config, read_recipe
from retentive.models import build
from retentive.studies import compare

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    kind = CompareCommand if recipe.stem.startswith("compare_") else TrainCommand
    command, rest = read_recipe(["--recipe", str(recipe), "--steps", "1"], kind)
    assert rest == ["--steps", "1"] and command.train.steps > 1
    if isinstance(command, TrainCommand):
        trained = [command]
    else:
        runs = compare.plan(command.variants, command.sizes, command.seeds, command.lrs)
        trained = [train_command(command, run) for run in runs]
    for one in trained:
        if one.model in ("retnet", "transformer", "hybrid"):  # others need the extra `peers`
            with torch.device("meta"):
                model = build(model_config(one, 4096))
            assert type(model).__name__.lower() == one.model
