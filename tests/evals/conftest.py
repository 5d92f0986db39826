"""A model with known probabilities, and models with random weights."""

import pytest
import torch

from retentive.data.tokenizer import ByteTokenizer
from retentive.models import LanguageModel, build, retnet, twin


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(params=["RetNet", "Transformer"])
def model(request):
    """Random weights in float64: two ways of computing the same must agree to rounding."""
    config = retnet(vocab_size=257, dim=32, layers=2, heads=2, decay="paper")
    return build(config if request.param == "RetNet" else twin(config)).double().eval()


@pytest.fixture
def bigram():
    """`bigram(table)`: a RetNet with p(next | token) = softmax(table[token]); table `[257,257]`.

    Embeddings are unit vectors and blocks add nothing, so the output matrix is the table.
    """

    def make(table):
        model = LanguageModel(retnet(vocab_size=257, dim=258, layers=1, heads=1, tie_embeddings=False)).double().eval()
        with torch.no_grad():
            model.embed.weight.copy_(torch.eye(257, 258))
            for block in model.blocks:
                block.retention.out_proj.weight.zero_()
                block.ffn.down_proj.weight.zero_()
            unit = model.norm(torch.eye(257, 258, dtype=torch.float64)).diagonal()
            model.head.weight.zero_()[:, :257] = table.T / unit
        return model

    return make
