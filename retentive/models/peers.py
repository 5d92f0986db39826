"""Peers for comparisons: other architectures from the transformers library (extra `peers`), behind our interface.

They train in our loop, on our data, with our loss and output matrix. The mixing of tokens and the initialisation of
blocks are the library's. Their states are not those of `state.py`: they can be trained and scored, not decoded or
served.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retentive.layers.config import check_fields
from retentive.models.config import ModelConfig
from retentive.models.model import LanguageModel
from retentive.models.presets import twin

KINDS = ("llama", "mamba", "mamba2", "rwkv")
"""Names of these architectures in transformers."""


@dataclass(frozen=True)
class PeerConfig:
    """Config of a peer; the function `peer` chooses the numbers to match a RetNet."""

    keeps_state: ClassVar[bool] = False
    """False: it cannot decode here."""
    library: ClassVar[str] = "transformers"
    """Package that implements it."""
    constant_state: ClassVar[bool] = False
    """False: it has no state here."""
    kind: str
    """llama, mamba, mamba2 or rwkv."""
    vocab_size: int
    """Rows of the embedding."""
    dim: int
    """Model width D."""
    layers: int
    """Blocks."""
    heads: int
    """Heads, if the architecture has them."""
    ffn_dim: int
    """Width of the feed-forward layer, if the architecture has one."""
    tie_embeddings: bool = False
    """Use the embedding as the output matrix."""

    def __post_init__(self):
        check_fields(self)
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of model {self.kind!r}, expected one of {', '.join(KINDS)}")

    @property
    def name(self) -> str:
        """Architecture, for display."""
        return self.kind

    def with_window(self, window: int | Sequence[int] | None, sinks: int | None = None) -> "PeerConfig":
        """Returns itself; raises ValueError for a window or sinks, since the library's models take none here."""
        if window is not None or sinks is not None:
            raise ValueError(f"`window` and `sinks` are of this package's models, this is one of {self.library}")
        return self

    def written(self) -> dict[str, Any]:
        """Returns the config as JSON."""
        return asdict(self)

    def theirs(self) -> dict[str, Any]:
        """Returns the fields of transformers' config."""
        common = dict(vocab_size=self.vocab_size, hidden_size=self.dim, num_hidden_layers=self.layers)
        head = self.dim // self.heads
        of_kind: dict[str, dict[str, Any]] = {
            "llama": dict(num_attention_heads=self.heads, intermediate_size=self.ffn_dim),
            "mamba": dict(state_size=16),
            "mamba2": dict(num_heads=2 * self.heads, head_dim=head, state_size=head, n_groups=1, chunk_size=64),
            # rescale_every halves weights during evaluation, for the sake of float16
            "rwkv": dict(attention_hidden_size=self.dim, intermediate_size=self.ffn_dim, rescale_every=0),
        }
        return common | of_kind[self.kind]


def peer(config: ModelConfig, kind: str) -> PeerConfig:
    """Returns the config of a peer of the RetNet's width and about as many parameters.

    Llama has the twin's numbers. A block of Mamba has about 6 D^2 parameters and no feed-forward layer, half of a
    RetNet's block, so it gets twice as many blocks. RWKV's time mixing has 4 D^2; its channel mixing has two matrices,
    and a gate of D^2 more.
    """
    block = twin(config).blocks[0]
    ffn = (3 * block.ffn.width - config.dim) // 2 if kind == "rwkv" else block.ffn.width
    return PeerConfig(
        kind=kind,
        vocab_size=config.vocab_size,
        dim=config.dim,
        layers=config.layers * (2 if kind in ("mamba", "mamba2") else 1),
        heads=block.mixer.heads,
        ffn_dim=ffn,
        tie_embeddings=config.tie_embeddings,
    )


class Peer(LanguageModel):
    """`model(ids) -> (logits, None)`: it keeps no state.

    Raises:
        ModuleNotFoundError: the extra is missing.
    """

    config: PeerConfig

    def __init__(self, config: PeerConfig):
        nn.Module.__init__(self)  # it has none of the parts of our models
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError:
            raise ModuleNotFoundError(
                f"{config.kind} is a model of the transformers library: pip install 'retentive[peers]'"
            ) from None
        self.config, self.blocks = config, nn.ModuleList()  # empty, since the library's blocks cannot be wrapped singly
        self.backbone: Any = AutoModel.from_config(AutoConfig.for_model(config.kind, **config.theirs()))
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        nn.init.normal_(self.head.weight, std=config.dim**-0.5)  # as for RetNet, so that losses begin alike

    @property
    def embed(self) -> nn.Embedding:  # type: ignore[override]  # in the backbone, where it is registered
        return self.backbone.get_input_embeddings()

    def init_state(self, batch: int) -> Any:
        raise ValueError(f"{self.config.kind} has no state here: it can be trained and scored, not decoded")

    def hidden(
        self,
        ids: Tensor | None,
        state: Any = None,
        *,
        embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Returns the input of the output matrix, `[B,T,D]`; arguments as for `LanguageModel`, padding right only."""
        if state is not None or ids is None or embeds is not None or (lengths is not None and lengths.ndim != 1):
            raise ValueError(f"{self.config.kind} reads whole rows of ids here: no state, no embeds, no left padding")
        if cu_seqlens is None:
            return self.backbone(ids, use_cache=False).last_hidden_state, None
        counts = cu_seqlens.diff().tolist()
        # One row per sequence, padded on the right: all are causal, so no token sees the padding after it.
        rows = nn.utils.rnn.pad_sequence(list(ids[0].split(counts)), batch_first=True)
        x = self.backbone(rows, use_cache=False).last_hidden_state
        return torch.cat([row[:n] for row, n in zip(x, counts, strict=True)])[None], None
