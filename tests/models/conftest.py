"""Small models in which every weight matters, and a way to run one token by token."""

import pytest
import torch

from retentive.models import LanguageModel, build


@pytest.fixture
def make():
    """`make(config, dtype)`: a model in eval mode, matrices N(0, 1/width), gains around 1: no part of it is idle."""

    def model(config, dtype=torch.float64) -> LanguageModel:
        out = build(config)
        for p in out.parameters():
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
        return out.to(dtype).eval()

    return model


@pytest.fixture
def decode():
    """`decode(model, ids, state)`: logits and state, one token a call."""

    def run(model, ids, state=None, **how):
        logits = []
        for t in range(ids.shape[1]):
            y, state = model(ids[:, t : t + 1], state, **how)
            logits.append(y)
        return torch.cat(logits, 1), state

    return run
