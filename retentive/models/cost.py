"""Cost of a model as formulas of its config: parameters, FLOPs per token, bytes of weights, state and cache.

A multiply-add counts as two FLOPs. Retention counts as its recurrent form, whichever form computes it: per head and
token one K x V state is written and one read. Elementwise work (norms, gates, rotations) is not counted.
"""

import functools
from collections import Counter

import torch

from retentive.layers.config import AttentionConfig, ConvolutionConfig, RetentionConfig
from retentive.models.config import BlockConfig, ModelConfig
from retentive.models.model import Block
from retentive.models.peers import Peer, PeerConfig


def block_parameters(config: ModelConfig | PeerConfig) -> int:
    """Returns the parameters of the blocks, without embedding, output and last norm (which a peer's count includes)."""
    if isinstance(config, PeerConfig):
        return parameters(config) - config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return sum(sum(_of_block(b)) for b in config.blocks)


@functools.cache
def _of_block(config: BlockConfig) -> tuple[int, int]:
    """Returns the parameters of one block's matrices, and of its vectors (norms and biases)."""
    with torch.device("meta"):  # built without memory and counted, so that every option of a layer counts
        block = Block(config, norm_eps=1e-6, dropout=0.0)
    of_dims = [(p.ndim, p.numel()) for p in block.parameters()]
    return sum(n for dims, n in of_dims if dims > 1), sum(n for dims, n in of_dims if dims == 1)


def spare_width(config: ModelConfig, wanted: int) -> int:
    """Returns how much wider all feed-forward layers must be for the blocks to have `wanted` parameters.

    Differences below 1/400 are ignored, so that named models keep their exact shape.
    """
    spare = wanted - block_parameters(config)
    if abs(spare) * 400 < wanted:
        return 0
    return round(spare / (block_parameters(config.with_ffn(1)) - block_parameters(config)))


def parameters(config: ModelConfig | PeerConfig) -> int:
    """Returns the number of all parameters; tied embeddings count once."""
    if isinstance(config, PeerConfig):
        with torch.device("meta"):  # built without memory and counted
            return sum(p.numel() for p in Peer(config).parameters())
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return block_parameters(config) + embeddings + (config.final_norm + config.embed_norm) * config.dim


def matrix_parameters(config: ModelConfig) -> int:
    """Returns the parameters that every token is multiplied with: the blocks' matrices and the output matrix."""
    return sum(_of_block(b)[0] for b in config.blocks) + config.vocab_size * config.dim


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Returns the forward FLOPs of one token at context `context`, itself included. Training takes three times that."""
    fixed, by_window = _multiply_adds(config)
    return 2 * (fixed + sum(more * min(context, window or context) for window, more in by_window))


def multiply_adds(config: ModelConfig, tokens: int, context: int) -> int:
    """Returns the multiply-adds of `tokens` tokens, each at context `context`, which decide a step's threads."""
    return tokens * flops_per_token(config, context) // 2


@functools.cache  # called at every token
def _multiply_adds(config: ModelConfig) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Returns a token's multiply-adds without context, and those per token seen, by the attention's window."""
    fixed, by_window = matrix_parameters(config), Counter[int]()
    for mixer in config.mixers:
        # two per number of the state, k v and q S; or per token seen, q k and p v
        if isinstance(mixer, RetentionConfig):
            fixed += 2 * mixer.key_dim // mixer.heads * mixer.value_dim
        elif isinstance(mixer, AttentionConfig):
            by_window[mixer.slots] += 2 * mixer.heads * mixer.head_dim
    return fixed, tuple(by_window.items())


def training_flops_per_token(config: ModelConfig | PeerConfig, length: int) -> int:
    """Returns the forward and backward FLOPs of a token, averaged over a sequence of `length`.

    For a peer six per parameter in its blocks and output matrix; mixing of tokens is not counted.
    """
    if isinstance(config, PeerConfig):
        return 6 * (block_parameters(config) + config.vocab_size * config.dim)
    return 3 * mean_flops_per_token(config, length)


def mean_flops_per_token(config: ModelConfig, length: int) -> int:
    """Returns the forward FLOPs of a token, averaged over a sequence of `length`. Attention sees half of it on average;
    with a window, half of the window's first fill and then all of the window. Sinks count as part of the window."""
    fixed, by_window = _multiply_adds(config)
    total = fixed * length
    for window, more in by_window:
        first = min(length, window or length)
        total += more * (first * (first + 1) // 2 + (length - first) * window)  # tokens seen, summed over all tokens
    return 2 * total // length


def weight_bytes(config: ModelConfig, *, bytes_per_value: int = 4) -> int:
    """Returns the bytes of all weights; 4 per value for float32, 2 for bfloat16."""
    return parameters(config) * bytes_per_value


def state_bytes(config: ModelConfig, *, sequences: int = 1) -> int:
    """Returns the bytes of the float32 states of retention and convolutions, at any context length."""
    total = 0
    for m in config.mixers:
        if isinstance(m, RetentionConfig):
            total += m.key_dim // m.heads * m.value_dim * 4
        elif isinstance(m, ConvolutionConfig):
            total += (m.taps - 1) * m.dim * 4
    return sequences * total


def cache_bytes(config: ModelConfig, context: int, *, sequences: int = 1, bytes_per_value: int = 4) -> int:
    """Returns the bytes of keys and values of `context` tokens, or of their window, and of their log forget gates."""
    total = 0
    for m in config.mixers:
        if isinstance(m, AttentionConfig):
            slot = 2 * m.head_dim * m.kv_heads * bytes_per_value
            slot += m.heads * max(bytes_per_value, 4) if m.forget_gate else 0  # float32 at least
            total += m.seen(context) * slot
    return sequences * total


def attention_cache_bytes(config: ModelConfig) -> int | None:
    """Returns the bytes per token of the KV cache, in 16 bits, that a Transformer in this model's place would have.

    The Transformer has the model's layers and width. Its keys and values are as wide as the model's own if those are
    narrower (shared by groups of heads). A layer ends with its feed-forward: mixers before it count as one. None for a
    model without retention, which is a Transformer itself.
    """
    if not config.retains:
        return None
    total, widths = 0, [2 * config.dim]
    for block in config.blocks:
        m = block.mixer
        if isinstance(m, RetentionConfig):
            widths.append((m.key_dim + m.value_dim) * m.kv_heads // m.heads)
        elif isinstance(m, AttentionConfig):
            widths.append(2 * m.head_dim * m.kv_heads)
        if block.ffn:
            total, widths = total + min(widths), [2 * config.dim]
    if len(widths) > 1:  # mixers behind the last feed-forward
        total += min(widths)
    return 2 * total


def memory_bytes(config: ModelConfig, context: int, *, sequences: int = 1, bytes_per_value: int = 4) -> int:
    """Returns the bytes of a model's memory of `context` tokens: states of constant size, caches, or both."""
    cache = cache_bytes(config, context, sequences=sequences, bytes_per_value=bytes_per_value)
    return state_bytes(config, sequences=sequences) + cache


def break_even(config: ModelConfig) -> int | None:
    """Returns the context length from which the memory stays smaller than the cache of a Transformer in its place.

    Caches have 16 bits (see `attention_cache_bytes`), states are float32. None if there is no such length, as for a
    Transformer.
    """
    per_token = attention_cache_bytes(config)
    if per_token is None:
        return None

    def saved(context: int) -> int:
        return context * per_token - memory_bytes(config, context, bytes_per_value=2)

    start = max(n for n in {0, *config.windows} if saved(n) <= 0)  # `saved` is linear between two, and behind the last
    growth = saved(start + 1) - saved(start)
    return start + -saved(start) // growth + 1 if growth > 0 else None


def least_training_bytes(config: ModelConfig | PeerConfig, tokens: int) -> int:
    """Returns a lower bound of the bytes that a training step on `tokens` tokens at a time needs.

    Weights, gradients and AdamW's two moments in float32 (4 x 4 bytes per parameter); the tokens and their targets
    (2 x 8 bytes each); and the float32 input of every block, which even full recomputation keeps.
    """
    return 16 * parameters(config) + tokens * (16 + 4 * config.dim * config.layers)
