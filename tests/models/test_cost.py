"""Cost formulas against PyTorch's counts: parameters of built models, bytes of real states, FLOPs of real products."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retentive.layers.config import AttentionConfig, FeedForwardConfig, RetentionConfig
from retentive.models import (
    ARCHITECTURES,
    PRESETS,
    BlockConfig,
    ModelConfig,
    build,
    config_of,
    cost,
    retnet,
    transformer,
    twin,
)
from tests.configs import changed, hybrid

SMALL = dict(vocab_size=61, dim=24, layers=3, heads=2)
CONFIGS = {
    "retnet": retnet(**SMALL),
    "retnet-tied": retnet(**SMALL, tie_embeddings=True),
    "retnet-kv-heads": retnet(**SMALL | dict(heads=4), kv_heads=2),
    "retnet-widths": retnet(**SMALL, key_dim=12, value_dim=56, ffn_dim=17),
    "retnet-no-gate": retnet(**SMALL, gate=False),
    "retnet-plain-ffn": retnet(**SMALL, ffn_gate=False),
    "retnet-affine": retnet(**SMALL, head_norm=True, head_norm_affine=True),
    "retnet-vectors": retnet(**SMALL, decay_bias=True, qk_norm=True, qk_bias=True),
    "retnet-no-head-norm": retnet(**SMALL, head_norm=False, head_norm_affine=True),
    "retnet-embed-norm": retnet(**SMALL, embed_norm=True),
    "retnet-embed-norm-only": retnet(**SMALL, embed_norm=True, final_norm=False),
    "retnet-no-final-norm": retnet(**SMALL, final_norm=False),
    "retnet-paper": retnet(**SMALL, **ARCHITECTURES["retnet-paper"]),
    "hybrid": hybrid(**SMALL, attention_every=2),
    "hybrid-two": hybrid(**SMALL | dict(layers=4), attention_every=2, head_norm=True, head_norm_affine=True),
    "transformer": transformer(**SMALL),
    "transformer-tied": transformer(**SMALL, tie_embeddings=True),
    "transformer-kv-heads": transformer(**SMALL | dict(heads=4), kv_heads=1, ffn_dim=31),
    "transformer-window": transformer(**SMALL, attention_window=7),
    "transformer-gate": transformer(**SMALL, forget_gate=True),
    "transformer-all": transformer(**SMALL, attention_window=7, forget_gate=True, qk_norm=True),
    "hybrid-window": hybrid(**SMALL, attention_every=2, attention_window=7),
}
RETNETS = [name for name in CONFIGS if name.startswith("retnet")]
TRANSFORMERS = [name for name in CONFIGS if name.startswith("transformer")]


def meta(config):
    with torch.device("meta"):
        return build(config)


def check_parameters(config) -> None:
    model = meta(config)
    assert cost.parameters(config) == sum(p.numel() for p in model.parameters())
    assert cost.block_parameters(config) == sum(p.numel() for p in model.blocks.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert cost.matrix_parameters(config) == matrices + model.head.weight.numel()
    stored = cost.weight_bytes(config), cost.weight_bytes(config, bytes_per_value=2)
    assert stored == (sum(p.nbytes for p in model.parameters()), sum(p.nbytes for p in model.half().parameters()))


@pytest.mark.parametrize("size", PRESETS)
def test_parameters_of_every_size(size):
    check_parameters(retnet(size, vocab_size=32001))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_variants_and_their_twins(name):
    check_parameters(CONFIGS[name])
    if name in RETNETS:
        check_parameters(twin(CONFIGS[name]))


def held(state) -> int:
    """Bytes of a state without the 8 bytes a sequence of its position and of the note beside each window."""
    return state.nbytes - state.position.nbytes * (1 + sum(w > 0 for w in state.windows))


@pytest.mark.parametrize("sequences", [1, 3], ids=lambda n: f"{n}-sequences")
@pytest.mark.parametrize("name", RETNETS)
@torch.no_grad()
def test_state_bytes_are_those_of_a_state(name, sequences):
    config = CONFIGS[name]
    model = build(config).eval()
    want = cost.state_bytes(config, sequences=sequences)
    for T in (2, 5, 40):
        _, state = model(torch.zeros(sequences, T, dtype=torch.int64))
        assert held(state) == want == cost.memory_bytes(config, T, sequences=sequences)
    assert held(model.init_state(sequences)) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_cache_bytes_are_those_of_a_cache(name, dtype):
    """The cache of a text read at once: decoding token by token grows it by half at a time, ahead of its need."""
    config = CONFIGS[name]
    model, size = build(config).to(dtype).eval(), dtype.itemsize
    for T in (1, 5, 40):
        _, state = model(torch.zeros(3, T, dtype=torch.int64))
        assert held(state) == cost.cache_bytes(config, T, sequences=3, bytes_per_value=size)
        assert held(state) == cost.memory_bytes(config, T, sequences=3, bytes_per_value=size)


def counted(model, ids, state=None, gradients=False) -> dict[str, int]:
    """FLOPs by operation, as torch counts them; attention as two plain products, the only way that it counts on CPU."""
    grad = torch.set_grad_enabled(gradients)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), grad:
        model(ids, state)
    return {str(function).removeprefix("aten."): n for function, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_of_the_matrices_are_torchs(name):
    """Compared: all products of tokens and weights (aten.mm, or addmm with a bias) in one forward pass over 2 x 7
    tokens. Left out on both sides: retention and attention, which the next two tests look at.
    """
    config = CONFIGS[name]
    flops = counted(build(config).eval(), torch.zeros(2, 7, dtype=torch.int64))
    assert flops["mm"] + flops.get("addmm", 0) == 2 * 7 * 2 * cost.matrix_parameters(config)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("context", [1, 9, 64], ids=lambda n: f"context{n}")
def test_flops_of_attention_are_torchs(name, context):
    """One token decoded from a cache: everything that torch counts is the whole formula."""
    config = CONFIGS[name]
    model = build(config).eval()
    state = None
    if context > 1:
        with torch.no_grad():
            _, state = model(torch.zeros(1, context - 1, dtype=torch.int64))
    flops = counted(model, torch.zeros(1, 1, dtype=torch.int64), state)
    assert sum(flops.values()) == cost.flops_per_token(config, context)


@pytest.mark.parametrize("name", RETNETS)
def test_flops_of_retention_are_torchs(name):
    """One token decoded: the state's reading is a product that torch counts (bmm), its writing as large an elementwise
    one that it does not: half of the formula's retention. With gradients, as the step in place is not torch's to count.
    """
    config = CONFIGS[name]
    flops = counted(build(config).eval(), torch.zeros(1, 1, dtype=torch.int64), gradients=True)
    mixing = cost.flops_per_token(config, 1) - 2 * cost.matrix_parameters(config)
    assert flops["bmm"] * 2 == mixing == cost.flops_per_token(config, 10**6) - 2 * cost.matrix_parameters(config)


@pytest.mark.parametrize("name", ["retnet", "transformer", "transformer-window", "hybrid-window"])
def test_training_takes_three_forward_passes_at_the_mean_context(name):
    config = CONFIGS[name]
    for length in (5, 7, 9, 21, 700):
        forward = [cost.flops_per_token(config, context) for context in range(1, length + 1)]
        assert cost.mean_flops_per_token(config, length) == sum(forward) // length
        assert cost.training_flops_per_token(config, length) == 3 * (sum(forward) // length)


@pytest.mark.parametrize("size", PRESETS)
def test_break_even_is_the_first_context_where_the_state_is_smaller(size):
    config = retnet(size, vocab_size=1000)
    n = cost.break_even(config)
    before, at = (cost.cache_bytes(twin(config), c, bytes_per_value=2) for c in (n - 1, n))
    assert before <= cost.state_bytes(config) < at


def test_break_even_by_hand():
    """4 layers, each with a state of 2 heads x 8 x 24 values of 4 bytes, and a cache of 2 x 16 values of 2 a token.

    1,536 / 64 = 24 tokens are even.
    """
    config = retnet(dim=16, layers=4, heads=2, value_dim=48)
    assert cost.break_even(config) == 25
    assert cost.break_even(changed(config, value_dim=32)) == 17
    assert cost.break_even(transformer(dim=16, layers=4, heads=2)) is None


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("kind", ["hybrid", "student"])
def test_break_even_of_models_that_attend(kind, window):
    """The last context whose memory is no smaller than that of the cache, plus one."""
    config = config_of("hybrid", "1m", vocab_size=99, attention=[2], attention_window=window)
    if kind == "student":  # attention before each retention, as of a Transformer that was made a RetNet
        shared = AttentionConfig(dim=64, heads=4, kv_heads=1, window=window)
        retains = RetentionConfig(dim=64, heads=2, key_dim=32, value_dim=32)
        blocks = (BlockConfig(shared, None), BlockConfig(retains, FeedForwardConfig(128))) * 3
        config = ModelConfig(vocab_size=99, dim=64, blocks=blocks)
    cache = cost.attention_cache_bytes(config)
    least = [n for n in range(3000) if cost.memory_bytes(config, n, bytes_per_value=2) >= n * cache]
    assert cost.break_even(config) == (None if least[-1] == 2999 else least[-1] + 1)


@torch.no_grad()
def test_memory_of_a_window_stays():
    config = CONFIGS["hybrid-window"]
    model = build(config).eval()
    sizes = []
    for T in (5, 7, 8, 60):
        sizes.append(held(model(torch.zeros(2, T, dtype=torch.int64))[1]))
        assert sizes[-1] == cost.memory_bytes(config, T, sequences=2)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


@pytest.mark.parametrize("kind", ["retnet", "transformer", "hybrid", "transformer-window", "hybrid-window"])
def test_multiply_adds_are_half_the_flops_at_every_context(kind):
    config = CONFIGS[kind] if kind in CONFIGS else config_of(kind, "1m", vocab_size=300)
    for context in (0, 1, 7, 4096):
        assert cost.multiply_adds(config, 3, context) == 3 * cost.flops_per_token(config, context) // 2


def test_the_cache_of_narrow_keys_counts_each_layer_once():
    """As of a Transformer that was made a RetNet: its layers have a window of attention, then retention, then a FFN."""
    shared = AttentionConfig(dim=64, heads=4, kv_heads=2, window=8)
    narrow = RetentionConfig(dim=64, heads=2, key_dim=32, value_dim=32)
    blocks = (BlockConfig(shared, None), BlockConfig(narrow, FeedForwardConfig(128))) * 3
    assert cost.attention_cache_bytes(ModelConfig(vocab_size=257, dim=64, blocks=blocks)) == 3 * 2 * (32 + 32)
    assert cost.attention_cache_bytes(ModelConfig(vocab_size=257, dim=64, blocks=blocks[:-1])) == 3 * 2 * (32 + 32)
