"""LanguageModel: embedding, a list of blocks, output matrix. RetNet, its twin and hybrids are configs of it.

    x, state = model.hidden(ids, state)      [B,T,D], the input of the output matrix
    logits = model.head(x)                   [B,T,vocab]
    logits, state = model(ids, state)        both

Source: arXiv 2307.08621 equation 9, with the details of torchscale's current code (RMSNorm, gated feed-forward, no
biases) or, by config, of fla's; attention as in Llama.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers import Attention, Convolution, FeedForward, MultiScaleRetention, Positions, RMSNorm, positions_of
from retentive.layers.positions import can_be_checked
from retentive.layers.quantized import Quantized
from retentive.models.config import BlockConfig, ModelConfig
from retentive.models.memory import MEMORIES, ConvolutionMemory, Memory
from retentive.models.state import State

LAYERS: dict[str, type[nn.Module]] = {layer.kind: layer for layer in (MultiScaleRetention, Attention, Convolution)}
"""Layer of each kind of mixer."""


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) if there is a feed-forward layer.

    The mixer and its norm are registered under the mixer's kind, so weight names show it:
    `blocks.0.retention.q_proj.weight`, `blocks.3.attention_norm.weight`.
    """

    def __init__(self, config: BlockConfig, *, norm_eps: float, dropout: float):
        super().__init__()
        self.kind, self.dropout, D = config.mixer.kind, dropout, config.mixer.dim
        self.add_module(f"{self.kind}_norm", RMSNorm(D, eps=norm_eps, before_products=True))
        self.add_module(self.kind, LAYERS[self.kind](config.mixer))
        self.ffn_norm = RMSNorm(D, eps=norm_eps, before_products=True) if config.ffn else None
        self.ffn = FeedForward(D, config.ffn) if config.ffn else None

    @property
    def mixer(self) -> Any:
        """MultiScaleRetention, Attention or Convolution."""
        return self.get_submodule(self.kind)

    @property
    def mixer_norm(self) -> Any:
        """Norm before the mixer."""
        return self.get_submodule(f"{self.kind}_norm")

    def phases(self, positions: Positions, dtype: torch.dtype) -> Any:
        """Computes values that depend on positions alone, shared by all blocks with an equal mixer."""
        return self.mixer.phases(positions, dtype)

    def forward(self, x: Tensor, memory: Any, positions: Positions, phases: Any) -> tuple[Tensor, Any]:
        """Returns (x `[B,T,D]`, the mixer's memory in its layer's form: `Memory.layer`)."""
        drops = self.training and self.dropout > 0
        x, y, memory = self.mixer.branch(x, self.mixer_norm, memory, positions, phases, drops=drops)
        y = F.dropout(y, self.dropout) if drops else y
        if self.ffn is not None and self.ffn_norm is not None:
            x, h = self.ffn_norm.branch(x, y)
            y = self.ffn(h)
            y = F.dropout(y, self.dropout) if drops else y
        return x if y is None else x + y, memory

    def reset_parameters(self) -> None:
        self.mixer.reset_parameters()


class LanguageModel(nn.Module):
    """`model(ids) -> (logits, state)`; `model(more_ids, state)` continues from there."""

    own_threads: ClassVar[bool] = False
    """True if the model chooses the number of threads of a call itself."""
    config: Any
    """ModelConfig; a PeerConfig for a peer."""
    origin: Any = None
    """Folder that it was loaded from, where its chat template is; or a GGUF file's settings. None for a new model."""
    embed: nn.Embedding
    head: nn.Linear
    blocks: nn.ModuleList
    """Blocks, first to last: compiled, recomputed or sharded one by one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.embed_norm = RMSNorm(c.dim, eps=c.norm_eps) if c.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(b, norm_eps=c.norm_eps, dropout=c.dropout) for b in c.blocks)
        self.norm = RMSNorm(c.dim, eps=c.norm_eps) if c.final_norm else nn.Identity()
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tie_embeddings:  # one parameter with two names, updated and saved once
            self.head.weight = self.embed.weight
        self.reset_parameters()

    @property
    def keeps_state(self) -> bool:
        """True if the model keeps a state and can decode; without one it can be trained and scored only."""
        return self.config.keeps_state

    @property
    def device(self) -> torch.device:
        """Device of ids and embeddings."""
        return next(self.embed.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of embeddings and hidden states outside autocast."""
        embed: nn.Module = self.embed
        return embed.dtype if isinstance(embed, Quantized) else next(embed.parameters()).dtype

    def init_state(self, batch: int) -> State:
        """Returns the state before the first token, for `batch` sequences, with the shapes of the current layers."""
        mixers: list[Any] = [block.mixer for block in self.blocks]
        memories = [MEMORIES[m.kind].empty(m.config, batch, self.dtype, self.device) for m in mixers]
        return State(memories, torch.zeros(batch, dtype=torch.int64, device=self.device))

    def hidden(
        self,
        ids: Tensor | None,
        state: State | None = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Returns hidden states `[B,T,D]`, the input of `head`, and the state; arguments as for `forward`."""
        if state is not None:
            state = self.checked(state)
        x, positions = self.begin(ids, state, embeds, cu_seqlens, lengths)
        before: list[Any] = [None] * len(self.blocks)
        if state is not None:  # reserve room for all new tokens, since a block can fill its cache but not grow it
            # with gradients it returns another cache, of the size that it needs
            grows = self.config.attends and not torch.is_grad_enabled()
            longest = int(state.position.max()) + x.shape[1] if grows else 0
            before = [m.reserve(longest) for m in state.memories]
        phases: dict[int, Any] = {}
        after: list[Memory] = []
        for block, memory in zip(self.blocks, before, strict=True):
            alike = id(block.mixer.config)  # blocks with an equal mixer share its config
            if alike not in phases:
                phases[alike] = block.phases(positions, x.dtype)
            x, own = block(x, None if memory is None else memory.layer, positions, phases[alike])
            if own is not None:
                mixer: Any = block.mixer
                after.append(MEMORIES[mixer.kind].first(mixer, own) if memory is None else memory.filled(own))
        if len(after) < len(self.blocks):  # packed in training: a state without memories, from which no model continues
            after = []
        return self.norm(x), State(after, positions.end) if state is None else state.then(after, positions.end)

    def forward(
        self,
        ids: Tensor | None,
        state: Any = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Returns logits `[B,T,vocab]` and the state after the last token.

        The operator chooses form, backend and chunk length of retention; `ops.using` forces them.

        Args:
            ids: int64 `[B,T]`.
            state: the state to continue from, of B sequences (N with cu_seqlens); None at the beginning. It may be
                written in place, and is then refused if passed again: use the returned one, or `clone()` it before.
            embeds: `[B,T,D]` instead of ids, for inputs that are not tokens.
            cu_seqlens: `[N+1]`, with B = 1: borders of N sequences packed into the row. In training, attention then
                keeps no cache unless a state is given.
            lengths: `[B]` valid tokens per row with padding on the right, or `[B,2]` begin and end of the valid tokens.
                Padding is exact: its own logits are meaningless, and nothing else depends on it.

        Raises:
            ValueError: there is no token, shapes do not fit, or the state is of another model or was used.
            TypeError, IndexError: ids are not integers, or outside the vocabulary.
        """
        x, state = self.hidden(ids, state, embeds=embeds, cu_seqlens=cu_seqlens, lengths=lengths)
        return self.head(x), state

    def begin(
        self,
        ids: Tensor | None,
        state: State | None = None,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Positions]:
        """Returns embedded tokens `[B,T,D]`, scaled, normalised and with dropout as configured, and their positions."""
        x = self.embed(checked_ids(ids, self.config.vocab_size)) if embeds is None else embeds
        if x.ndim != 3 or x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"the model needs ids [B,T] with at least one token, got {list(x.shape[:-1])}")
        start = None if state is None else state.position
        positions = positions_of(x.shape[0], x.shape[1], start, lengths, cu_seqlens, x.device)
        if self.config.embed_scale:
            x = x * self.config.dim**0.5
        return F.dropout(self.embed_norm(x), self.config.dropout, self.training), positions

    def checked(self, state: Any) -> State:
        """Returns the state in the form that this model reads.

        Raises:
            ValueError: it is no state, was used, or is of other blocks or another window.
        """
        if not isinstance(state, State):
            raise ValueError(f"a model goes on from a State, got a {type(state).__name__}")
        state.check_unused()
        if len(state.memories) != len(self.blocks):
            raise ValueError(f"the state is of {len(state.memories)} blocks, this model has {len(self.blocks)}")
        state = state.placed(self.config.kinds)
        if state.kinds != self.config.kinds:
            i = next(i for i, (a, b) in enumerate(zip(state.kinds, self.config.kinds, strict=True)) if a != b)
            raise ValueError(
                f"block {i} of this model is of {self.config.kinds[i]}, the state has {state.kinds[i]} there: another "
                "model's state?"
            )
        if state.sinks != self.config.sinks:
            raise ValueError(
                f"the state has attention sinks {sorted(set(state.sinks))}, this model has "
                f"{sorted(set(self.config.sinks))}: another model's state?"
            )
        for memory, mixer in zip(state.memories, self.config.mixers, strict=True):
            if isinstance(memory, ConvolutionMemory) and memory.reach != mixer.taps - 1:
                had = memory.reach + 1
                raise ValueError(f"the state is of {had} taps, this model has {mixer.taps}: another model's state?")
        if state.windows != self.config.windows:
            raise ValueError(
                f"the state has attention windows {sorted(set(state.windows))}, this model has "
                f"{sorted(set(self.config.windows))}: another model's state?"
            )
        return state

    def reset_parameters(self) -> None:
        """Initialises as torchscale: embedding and output N(0, 1/D), mixers by their own rules, others as nn.Linear."""
        for matrix in (self.embed.weight, self.head.weight):  # if tied, one matrix, drawn twice
            nn.init.normal_(matrix, std=self.config.dim**-0.5)
        for block in self.blocks:
            block.reset_parameters()


def checked_ids(ids: Any, vocab_size: int) -> Tensor:
    """Returns token ids after checks; on a GPU their values are not checked, since that would wait for it.

    Raises:
        TypeError: ids are no tensor of integers.
        IndexError: an id is outside the vocabulary.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = str(ids.dtype).removeprefix("torch.") if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"token ids must be a tensor of int64 or int32, got {got}")
    if can_be_checked(ids) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        bad = next(i for i in ids.flatten().tolist() if not 0 <= i < vocab_size)
        raise IndexError(f"token ids must be from 0 to {vocab_size - 1}, got {bad}")
    return ids
