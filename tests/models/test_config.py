"""Configs against the papers' and projects' sizes, known from elsewhere, and against what cannot be built."""

import json
import math

import pytest
import torch

from retentive.layers.config import AttentionConfig
from retentive.models import ARCHITECTURES, PRESETS, ModelConfig, build, cost, retnet, transformer, twin
from retentive.models.config import LATER
from retentive.ops.rotary import Scaling
from tests.configs import changed


def parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


def matrices(config) -> int:
    """Parameters of the blocks' matrices: neither norms nor embedding nor output."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).blocks.parameters() if p.ndim == 2)


@pytest.mark.parametrize("size", PRESETS)
def test_presets_build_and_their_twins_have_as_many_parameters(size):
    config = retnet(size, vocab_size=32000)
    have, want = parameters(twin(config)), parameters(config)
    # the twin's feed-forward width is rounded to a whole number: 3 D parameters a block at most, 0.5 % at any size here
    assert have == pytest.approx(want, rel=0.005)


@pytest.mark.parametrize(
    "changes",
    [
        dict(kv_heads=2),
        dict(kv_heads=1),
        dict(gate=False),
        dict(ffn_gate=False),
        dict(key_dim=128),
        dict(value_dim=1024, ffn_dim=512),
        ARCHITECTURES["retnet-paper"],
        dict(tie_embeddings=True),
    ],
    ids=str,
)
def test_twins_of_variants_have_as_many_parameters(changes):
    config = retnet(vocab_size=1000, dim=512, heads=8, layers=4, **changes)
    other = twin(config)
    assert parameters(other) == pytest.approx(parameters(config), rel=0.005)
    same = ("vocab_size", "dim", "layers", "norm_eps", "tie_embeddings", "dropout")
    assert all(getattr(other, name) == getattr(config, name) for name in same)
    assert other.attention.heads == config.retention.heads


# arXiv 2307.08621, table 2: 1.3B, 2.7B, 6.7B; value width 2 D: 2 D^2 (q, k) + 6 D^2 (v, g, out) + 4 D^2 (feed-forward)
@pytest.mark.parametrize(
    ("size", "dim", "layers", "named"),
    [("paper-1.3b", 2048, 24, 1.3e9), ("paper-2.7b", 2560, 32, 2.7e9), ("paper-6.7b", 4096, 32, 6.7e9)],
    ids=["1.3b", "2.7b", "6.7b"],
)
def test_the_papers_sizes(size, dim, layers, named):
    config = retnet(size, vocab_size=50257, tie_embeddings=True)
    assert (config.dim, config.layers, config.retention.head_shape[1]) == (dim, layers, 256)
    assert matrices(config) == 12 * dim**2 * layers
    # a name has two digits, and the paper does not give its vocabulary: GPT-2's is assumed, counted once
    assert parameters(config) == pytest.approx(named, rel=0.03)


def test_torchscales_xl_has_1_3_billion():
    config = retnet("torchscale-xl", vocab_size=50257)
    assert matrices(config) == 24 * (2 * 2048**2 + 6 * 2048 * 3456)  # retnet_xl: value and ffn width 3456
    assert matrices(config) + 2048 * 50257 == pytest.approx(1.3e9, rel=0.05)  # two digits; the output apart


# numbers of parameters of fla-hub's published checkpoints, vocabulary 32000
@pytest.mark.parametrize(("size", "count"), [("fla-1.3b", 1_351_727_104), ("fla-2.7b", 2_722_548_224)])
def test_flas_sizes(size, count):
    assert parameters(retnet(size, vocab_size=32000)) == count


@pytest.mark.parametrize("size", [s for s in PRESETS if s[0].isdigit()])
def test_the_small_sizes_have_the_parameters_of_their_names(size):
    blocks = matrices(retnet(size, vocab_size=257))
    assert blocks == pytest.approx(float(size[:-1]) * 1e6, rel=0.25)  # a name, not a measure


def test_defaults_that_follow_from_others():
    config = retnet(dim=256, heads=4)
    # 5/3 * 256 = 426.7, up to a multiple of 8 a head
    mixer = config.retention
    assert (mixer.kv_heads, mixer.key_dim, mixer.value_dim, config.blocks[0].ffn.width) == (4, 256, 448, 448)
    config = retnet("1m", vocab_size=300, dim=64, dropout=0.1)
    assert (config.vocab_size, config.dim, config.dropout, config.layers) == (300, 64, 0.1, 5)


BAD = {
    "vocab": (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
    "dim": (dict(dim=-8), "dim must be at least 1, got -8"),
    "layers": (dict(layers=0), "layers must be at least 1"),
    "heads": (dict(heads=0), "heads must be at least 1"),
    "dim-fraction": (dict(dim=128.0), "dim must be a whole number, got 128.0"),
    "dim-text": (dict(dim="128"), "dim must be a whole number, got '128'"),
    "dim-true": (dict(dim=True), "dim must be a whole number, got True"),
    "vocab-beyond": (dict(vocab_size=2**62), "vocab_size must be at most 16,777,216, got 4,611,686,018,427,387,904"),
    "layers-beyond": (dict(layers=10**9), "layers must be at most 10,000, got 1,000,000,000"),
    "dim-beyond": (dict(dim=2**21), "dim must be at most 1,048,576"),
    "eps-text": (dict(norm_eps="x"), "norm_eps must be a number, got 'x'"),
    "eps-true": (dict(norm_eps=True), "norm_eps must be a number, got True"),
    "eps-negative": (dict(norm_eps=-1), "norm_eps must be in [0, 1], got -1"),
    "eps-nan": (dict(norm_eps=math.nan), "norm_eps must be in [0, 1], got nan"),
    "tie-text": (dict(tie_embeddings="yes"), "tie_embeddings must be true or false, got 'yes'"),
    "tie-number": (dict(tie_embeddings=1), "tie_embeddings must be true or false, got 1"),
    "dropout-nan": (dict(dropout=math.nan), "dropout must be in [0, 1), got nan"),
    "dropout-1": (dict(dropout=1.0), "dropout must be in [0, 1), got 1.0"),
    "dropout-negative": (dict(dropout=-0.1), "dropout must be in [0, 1)"),
}
BAD_RETNET = BAD | {
    "key-dim-odd-heads": (dict(dim=250), "key_dim 250 is not divisible by heads 4"),
    "value-dim": (dict(value_dim=201), "value_dim 201 is not divisible by heads 4"),
    "value-dim-negative": (dict(value_dim=-4), "value_dim must be at least 1"),
    "ffn-dim-negative": (dict(ffn_dim=-1), "ffn_dim must be at least 1"),
    "kv-heads-negative": (dict(kv_heads=-2), "kv_heads must be at least 1"),
    "odd-key-head": (dict(key_dim=20), "the key head dim must be even for the rotation, got 20 / 4 heads"),
    "kv-heads": (dict(kv_heads=3), "heads 4 is not divisible by kv_heads 3"),
    "activation": (dict(activation="relu"), "unknown activation 'relu', expected one of swish, gelu"),
    "rotary": (dict(rotary="quarter"), "unknown rotary 'quarter', expected one of interleaved, half"),
    "decay": (dict(decay="slow"), "unknown decay schedule 'slow'"),
    "decay-number": (dict(decay=3), "decay must be a name or a log decay for each head, got 3"),
    "decay-of-names": (dict(decay=("lm",) * 4), "decay must be a name or a log decay for each head"),
    "decay-nan": (dict(decay=(-0.1, math.nan, -0.1, -0.1)), "decay needs 4 log decays <= 0"),
    "activation-number": (dict(activation=1), "activation must be text, got 1"),
    "decay-count": (dict(decay=(-0.1, -0.2)), "decay needs 4 log decays <= 0"),
    "decay-positive": (dict(decay=(-0.1, -0.2, 0.3, 0.0)), "decay needs 4 log decays <= 0"),
    "gated-score-norm": (dict(score_norm=True), "set score_norm=False with decay='gated'"),
}
BAD_TWIN = BAD | {
    "heads-do-not-divide": (dict(dim=250), "key_dim 250 is not divisible by heads 4"),
    "kv-heads": (dict(kv_heads=3), "heads by kv_heads 3"),
    "kv-heads-negative": (dict(kv_heads=-2), "kv_heads must be at least 1"),
    "ffn-dim-negative": (dict(ffn_dim=-1), "ffn_dim must be at least 1"),
    "odd-head": (dict(dim=20), "the key head dim must be even for the rotation, got 20 / 4 heads"),
    "head-dim-odd": (dict(head_dim=5), "the head dim must be even for the rotation, got 5"),
    "rotary-base": (dict(rotary_base=1.0), "rotary_base must be above 1, got 1.0"),
}


@pytest.mark.parametrize("case", BAD_RETNET)
def test_retnets_that_cannot_be(case, refuses):
    changes, words = BAD_RETNET[case]
    with refuses(words):
        retnet(**changes)


@pytest.mark.parametrize("case", BAD_TWIN)
def test_twins_that_cannot_be(case, refuses):
    changes, words = BAD_TWIN[case]
    with refuses(words):
        transformer(**changes)


def test_unknown_sizes_and_fields(refuses):
    with refuses("unknown size '2b', expected one of 1m, 2m, 5m"):
        retnet("2b", vocab_size=10)
    with refuses("a RetNet has no field depth, width"):
        retnet("1m", vocab_size=10, width=3, depth=4)


def test_newer_fields_are_written_only_if_set():
    """Files and fingerprints of models without them stay as an earlier version wrote them."""
    plain, biased = transformer(dim=16, heads=2, layers=2), transformer(dim=16, heads=2, layers=2, qkv_bias=True)
    (block,) = plain.written()["blocks"]
    assert not set(LATER) & set(block["mixer"])
    (block,) = biased.written()["blocks"]
    assert block["mixer"]["qkv_bias"] is True and "rotary_scaling" not in block["mixer"]
    scaled = changed(plain, rotary_scaling=Scaling(8.0, 1.0, 4.0, 8192))
    (block,) = scaled.written()["blocks"]
    assert block["mixer"]["rotary_scaling"] == {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192}
    for config in (plain, biased, scaled):
        assert ModelConfig.read(json.loads(json.dumps(config.written()))) == config


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (8.0, "rotary_scaling must be its fields or null, got 8.0"),
        ({"factor": "8"}, "rotary_scaling must be numbers"),
        ({"factor": 8.0, "original": 0.5}, "and original a whole one"),
        ({"factor": 0.0}, "needs a factor above 0"),
        ({"factor": math.nan}, "needs a factor above 0"),
        ({"factor": 8.0, "low": 4.0, "high": 1.0, "original": 32}, "needs low below high, got 4.0 and 1.0"),
    ],
    ids=str,
)
def test_scalings_that_cannot_be(scaling, words, refuses):
    with refuses(words):
        AttentionConfig(rotary_scaling=scaling)


@pytest.mark.parametrize("size", ["1m", "2m", "5m", "60m", "130m", "350m"])
def test_the_portable_retnet_has_heads_of_64_and_the_parameters_of_the_default(size):
    found, default = retnet(size, architecture="retnet-portable"), retnet(size)
    assert found.retention.head_shape[1:] == (64, 64) and found.retention.key_dim == found.dim
    assert cost.parameters(found) == pytest.approx(cost.parameters(default), rel=0.005)  # of multiples of 32


@pytest.mark.parametrize(
    "change", [dict(heads=4), dict(key_dim=64), dict(dim=100), dict(decay="lm"), dict(qk_norm=True)]
)
def test_a_portable_retnet_keeps_what_makes_it_portable(change):
    with pytest.raises(ValueError, match="retnet-portable"):
        retnet("1m", architecture="retnet-portable", **change)
