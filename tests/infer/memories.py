"""Small models, and memories of what they have read."""

import torch

from retentive.infer.memory import Memory, blank
from retentive.infer.reading import ingest
from retentive.models import retnet
from tests.infer.kinds import kinds

CONFIG = retnet(vocab_size=61, dim=32, layers=3, heads=2)
MODELS = kinds(CONFIG)


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(61, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def remember(model, tokens: list[int], memory: Memory | None = None, **how) -> Memory:
    *_, last = ingest(model, [tokens], memory or blank(model), **how)
    last.sources = [*(memory.sources if memory else []), {"name": "a", "tokens": len(tokens), "sha256": str(tokens)}]
    return last


def after(model, memory: Memory, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), memory.state.clone())[0]
