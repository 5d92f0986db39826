"""A RetNet or a hybrid in vLLM: this package's model, whose states and caches lie in vLLM's pages.

vLLM packs the tokens of all requests of a step into one row. Retention reads them in one call of the operator, with
borders between the requests and the state of each; a state is float32, whatever the weights are. Attention is
computed by vLLM, from our queries, keys and values.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers import attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from retentive.checkpoint import hf
from retentive.layers import Attention, AttentionConfig, MultiScaleRetention, Positions
from retentive.layers.past import Layer, Span
from retentive.models import LanguageModel, ModelConfig
from retentive.ops import retention


def config_of(vllm_config: VllmConfig) -> ModelConfig:
    """Returns our config of the model that vLLM loads.

    Raises:
        ValueError: it has other blocks than those that fit, or is to be shared by several devices.
    """
    config = hf.read_config(vllm_config.model_config.hf_config.to_dict())
    if wrong := unfit(config):
        raise ValueError(f"the plugin does not run this {config.name}: it needs {wrong}; use `retentive serve`")
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "the plugin runs a model on one device: set tensor_parallel_size and pipeline_parallel_size to 1"
        )
    return config


def unfit(config: ModelConfig) -> str:
    """Returns what keeps a model from vLLM, as it should be; empty if it fits."""
    if config.retention is None:
        return "blocks of retention, and others of attention if wanted"
    mixers: list[Any] = list(config.mixers)
    for mixer in mixers:
        if mixer.kind == Attention.kind and (mixer.forget_gate or mixer.sinks):
            return "attention without forget gate and sinks"
        if mixer.kind not in (Attention.kind, MultiScaleRetention.kind):
            return f"blocks without a {mixer.kind}"
    if len({mixer.head_shape for mixer in mixers if mixer.kind == MultiScaleRetention.kind}) > 1:
        return "states of one shape"
    return ""


class Cache:
    """Pages with the keys and values of one block of attention; the `context` of its layer."""

    def __init__(self, config: AttentionConfig, name: str, vllm_config: VllmConfig):
        self.attention = attention.Attention(
            config.heads, config.head_dim, config.head_dim**-0.5, num_kv_heads=config.kv_heads,
            cache_config=vllm_config.cache_config, per_layer_sliding_window=config.window, prefix=name,
        )  # fmt: skip

    def attend(self, layer: Attention, q: Tensor, new: Layer, spans: list[Span]) -> Tensor:
        """Returns `[1,N,H,K]` of the N tokens of this step, whose keys and values are written to the pages."""
        if layer.window and q.device.type == "cpu":
            self.clear()
        return self.attention(*(x[0].contiguous() for x in (q, *new))).unflatten(-1, (layer.H, layer.K))[None]

    def clear(self) -> None:
        """Fills the pages that begin in this step with zeros, as vLLM does for attention without a window.

        Its kernel for CPUs multiplies what is beyond the last token by 0, and earlier states there may read as NaN.
        """
        pages, slots = self.attention.kv_cache, get_forward_context().slot_mapping
        if slots:  # unless vLLM measures the memory of a step
            slot, size = slots[self.attention.layer_name], pages.shape[2]  # of [pages, heads, slots, keys and values]
            pages[slot[slot % size == 0] // size] = 0


class States(MambaBase):
    """Pages with the state of one block for every request; the `context` of its retention layer."""

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, shape: tuple[int, int, int], name: str):
        self.shape, self.name = shape, name
        self.kv_cache = (torch.empty(0),)
        known = get_current_vllm_config().compilation_config.static_forward_context
        if name in known:
            raise ValueError(f"two layers are named {name}")
        known[name] = self

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        """Shape of one request's state."""
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        """Dtype of states."""
        return (torch.float32,)

    def retention(self, positions: Positions) -> Callable[..., tuple[Tensor, Tensor]]:
        """Returns the operator for the tokens of this step, which reads and writes the pages."""

        def operator(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
            step = get_forward_context().attn_metadata
            step = step.get(self.name) if isinstance(step, dict) else None
            out = q.new_zeros(*q.shape[:3], v.shape[-1])
            if step is None:  # vLLM measures the memory of a step
                return out, out
            count = step.num_decodes + step.num_prefills
            borders, pages = step.query_start_loc[: count + 1], step.state_indices_tensor[:count].long()
            n = int(borders[-1])  # tokens beyond it fill up the batch
            begun = step.seq_lens[:count] > borders.diff()  # pages of new requests hold anything, even NaN
            before = self.kv_cache[0][pages]
            before = torch.where(begun[:, None, None, None], before, 0.0)
            decay = log_decay[:, :n] if log_decay.ndim == 3 else log_decay
            how |= {"state": before, "cu_seqlens": borders}
            out[:, :n], after = retention(q[:, :n], k[:, :n], v[:, :n], decay, **how)
            assert isinstance(after, Tensor)  # a Ring comes only from a Ring
            self.kv_cache[0][pages] = after
            return out, after

        return operator


class RetentiveForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """The language model, as vLLM loads it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.own = LanguageModel(config_of(vllm_config)).eval()
        blocks: list[Any] = list(self.own.blocks)
        for i, block in enumerate(blocks):
            mixer, name = block.mixer, f"{prefix}.layers.{i}.{block.mixer.kind}".strip(".")
            if mixer.kind == Attention.kind:
                mixer.context = Cache(mixer.config, name, vllm_config)
            else:
                mixer.context = States(mixer.config.head_shape, name)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int, int]]:
        mixer = config_of(vllm_config).retention
        assert mixer is not None
        return (mixer.head_shape,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.own.embed(input_ids)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns hidden states `[N,D]` of the N tokens of this step."""
        x = self.own.embed(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.own.embed_norm(x * self.own.config.dim**0.5 if self.own.config.embed_scale else x)[None]
        # borders of requests are known to each layer's pages: here they only say that no token is a step by itself
        borders = torch.tensor([0, len(positions)], device=positions.device)
        where = Positions(positions[None], None, borders, None, positions[-1:] + 1)
        phases: dict[int, Any] = {}
        for block in self.own.blocks:
            alike = id(block.mixer.config)
            if alike not in phases:
                phases[alike] = block.phases(where, x.dtype)
            x, _ = block(x, None, where, phases[alike])
        return self.own.norm(x)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Returns logits `[N,vocab]`."""
        return self.own.head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the tensors of a folder and returns the names of those that are filled."""
        found = hf.read_tensors(dict(weights), self.own.config, {})
        parameters = dict(self.own.named_parameters())
        if missing := sorted(parameters.keys() - found.keys()):
            raise ValueError(f"the folder has no {', '.join(missing[:3])}: it is not of this model")
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(found[name])
        return {f"own.{name}" for name in parameters}
