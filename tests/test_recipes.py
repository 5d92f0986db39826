"""Every file of recipes/ is a recipe: its function returns a whole run or comparison, whose models can be built."""

from pathlib import Path

import pytest
import torch

from retentive.cli.compare import CompareCommand, train_command
from retentive.cli.train import read_recipe
from retentive.models import build
from retentive.studies import compare
from retentive.train import TrainRun

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    kind = CompareCommand if recipe.stem.startswith("compare_") else TrainRun
    made, rest = read_recipe(["--recipe", str(recipe), "--steps", "1"], kind)
    assert rest == ["--steps", "1"] and made.train.steps > 1
    if isinstance(made, TrainRun):
        runs = [made]
    else:
        planned = compare.plan(made.variants, made.sizes, made.seeds, made.lrs)
        runs = [train_command(made, one) for one in planned]
    for run in runs:
        if run.model in ("retnet", "transformer", "hybrid"):  # others need the extra `peers`
            with torch.device("meta"):
                model = build(run.config(4096))
            assert type(model).__name__.lower() == run.model
