"""What a model costs, as formulas of its config: parameters, FLOPs per token, bytes of weights, state and cache.

A multiply-add counts as two FLOPs. Retention counts as its recurrent form, whatever form computes it: one K x V state
written and one read, per head and token. Elementwise work (norms, gates, rotations) is left out.
"""

import functools
from dataclasses import replace

import torch

from retentive.models import retnet, transformer
from retentive.models.config import HybridConfig, OwnConfig, RetNetConfig, TransformerConfig, of_one_kind
from retentive.models.peers import Peer, PeerConfig


def block_parameters(config: OwnConfig | PeerConfig) -> int:
    """Parameters of the blocks, without embedding, output and last norm (a peer's count includes that norm)."""
    if isinstance(config, PeerConfig):
        return parameters(config) - config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return sum(c.layers * sum(_of_block(c)) for c in of_one_kind(config))


@functools.cache
def _of_block(c: OwnConfig) -> tuple[int, int]:
    """Parameters of one block's matrices, and of its vectors (norms and biases)."""
    with torch.device("meta"):  # built without memory, only to be counted: no option of a layer is forgotten here
        block = transformer.Block(c) if isinstance(c, TransformerConfig) else retnet.Block(c)
    of_dims = [(p.ndim, p.numel()) for p in block.parameters()]
    return sum(n for dims, n in of_dims if dims > 1), sum(n for dims, n in of_dims if dims == 1)


def fitted(config: OwnConfig, wanted: int) -> OwnConfig:
    """The config with a feed-forward width by which its blocks have `wanted` parameters.

    A difference below a four-hundredth is left: the model is then the one that goes by its name, and not nearly so.
    """
    spare = wanted - block_parameters(config)
    if abs(spare) * 400 < wanted:
        return config
    step = 24  # units of the width at a time: the twin's width in a hybrid is a rounded fraction of it
    each = (block_parameters(replace(config, ffn_dim=config.ffn_dim + step)) - block_parameters(config)) / step
    return replace(config, ffn_dim=config.ffn_dim + round(spare / each))


def parameters(config: OwnConfig | PeerConfig) -> int:
    """All parameters; tied embeddings count once."""
    if isinstance(config, PeerConfig):
        with torch.device("meta"):  # built without memory, only to be counted
            return sum(p.numel() for p in Peer(config).parameters())
    c = config
    embeddings = c.vocab_size * c.dim * (1 if c.tie_embeddings else 2)
    retnet = isinstance(c, RetNetConfig)
    norms = c.final_norm + c.embed_norm if retnet else 1
    return block_parameters(c) + embeddings + norms * c.dim


def matrix_parameters(config: OwnConfig) -> int:
    """Parameters that every token is multiplied with: the blocks' matrices and the output, not the embedding."""
    blocks = sum(c.layers * _of_block(c)[0] for c in of_one_kind(config))
    return blocks + config.vocab_size * config.dim


def flops_per_token(config: OwnConfig, context: int) -> int:
    """Forward FLOPs of one token at context `context`, itself included. Training takes three times as many."""
    mixing = 0
    for c in of_one_kind(config):
        # two multiply-adds of 2 FLOPs: k v and q S for each number of the state, or q k and p v for each token seen
        retains = isinstance(c, RetNetConfig)
        mixing += c.layers * 4 * (c.key_dim // c.heads * c.value_dim if retains else c.dim * _seen(c, context))
    return 2 * matrix_parameters(config) + mixing


def _seen(config: TransformerConfig, context: int) -> int:
    """Tokens that attention sees at this context, itself included."""
    return min(context, config.attention_window or context)


def window_of(config: OwnConfig) -> int:
    """Tokens beyond which a token sees none, and memory no longer grows; 0: attention sees all, or there is none."""
    return (config.attention_window or 0) if isinstance(config, TransformerConfig | HybridConfig) else 0


def multiply_adds(config: OwnConfig, tokens: int, context: int) -> int:
    """Of so many tokens, each at context `context`: what decides how many threads a step is worth."""
    fixed, more = _linear(config)
    return tokens * (fixed + more * min(context, window_of(config) or context))


@functools.cache  # asked for at every token
def _linear(config: OwnConfig) -> tuple[int, int]:
    """Multiply-adds of a token without context, and those that each token of context adds (of the window)."""
    fixed, one = (flops_per_token(config, context) // 2 for context in (0, 1))
    return fixed, one - fixed


def training_flops_per_token(config: OwnConfig | PeerConfig, length: int) -> int:
    """Forward and backward FLOPs of a token, averaged over a sequence of `length`.

    Of a peer six for each parameter in its blocks and output: how it mixes tokens is left out.
    """
    if isinstance(config, PeerConfig):
        return 6 * (block_parameters(config) + config.vocab_size * config.dim)
    return 3 * mean_flops_per_token(config, length)


def mean_flops_per_token(config: OwnConfig, length: int) -> int:
    """Forward FLOPs of a token, averaged over a sequence of `length`: attention sees half of it, or of its window's
    first fill and then all of the window."""
    window = window_of(config)
    if not window or length <= window:
        return flops_per_token(config, (length + 1) // 2)
    seen = window * (window + 1) // 2 + (length - window) * window  # summed over all tokens
    fixed, more = _linear(config)
    return 2 * (fixed * length + more * seen) // length


def weight_bytes(config: OwnConfig, *, bytes_per_value: int = 4) -> int:
    """Bytes of all weights; 4 for float32, 2 for bfloat16."""
    return parameters(config) * bytes_per_value


def state_bytes(config: RetNetConfig, *, sequences: int = 1) -> int:
    """Bytes of the float32 retention states, at any context length."""
    c = config
    return sequences * c.layers * (c.key_dim // c.heads) * c.value_dim * 4


def cache_bytes(config: TransformerConfig, context: int, *, sequences: int = 1, bytes_per_value: int = 4) -> int:
    """Bytes of the keys and values of `context` tokens, or of a window of them, and of their log forget gates."""
    c = config
    slot = 2 * (c.dim // c.heads) * c.kv_heads * bytes_per_value
    slot += c.heads * max(bytes_per_value, 4) if c.forget_gate else 0  # float32 at least
    return sequences * c.layers * _seen(c, context) * slot


def memory_bytes(config: OwnConfig, context: int, *, sequences: int = 1, bytes_per_value: int = 4) -> int:
    """Bytes in which a model remembers `context` tokens: a state of constant size, a cache, or both."""
    return sum(
        state_bytes(c, sequences=sequences)
        if isinstance(c, RetNetConfig)
        else cache_bytes(c, context, sequences=sequences, bytes_per_value=bytes_per_value)
        for c in of_one_kind(config)
    )


def break_even(config: RetNetConfig, other: TransformerConfig, *, bytes_per_value: int = 4) -> int | None:
    """Tokens of context from which on the state is smaller than the other's cache; None: never, for its window."""
    tokens = state_bytes(config) // cache_bytes(other, 1, bytes_per_value=bytes_per_value) + 1
    return tokens if _seen(other, tokens) == tokens else None


def least_training_bytes(config: OwnConfig | PeerConfig, tokens: int) -> int:
    """Bytes that a training step on so many tokens at a time needs at the very least; a real one takes more.

    Weights, gradients and AdamW's two moments in float32 (4 x 4 bytes a parameter); the tokens and their targets
    (2 x 8 bytes each); and the float32 input of every block, which even a backward pass that recomputes all else keeps.
    """
    return 16 * parameters(config) + tokens * (16 + 4 * config.dim * config.layers)
