"""Every file of recipes/ is a recipe: its function returns a whole run or comparison, whose models can be built."""

from pathlib import Path

import pytest
import torch

from retentive.cli.train import read_recipe
from retentive.models import build
from retentive.studies.compare import Comparison
from retentive.train import TrainRun

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    kind = Comparison if recipe.stem.startswith("compare_") else TrainRun
    made, rest = read_recipe(["--recipe", str(recipe), "--steps", "1"], kind)
    assert rest == ["--steps", "1"] and made.train.steps > 1
    runs = [made] if isinstance(made, TrainRun) else [made.train_run(run) for run in made.plan()]
    for run in runs:
        if run.model in ("retnet", "transformer", "hybrid"):  # others need the extra `peers`
            with torch.device("meta"):
                model = build(run.config(4096))
            assert type(model).__name__.lower() == run.model
