"""Bidirectional retention for encoders, over a line or a grid, with the fields of retention.

A token's output comes from all tokens before and after it. Weights decay with the distance, on a grid along each axis
(`ops/bidirectional.py`). There is no state, since the input is known as a whole.
"""

import torch
from torch import Tensor

from retentive.layers.config import RetentionConfig
from retentive.layers.retention import MultiScaleRetention
from retentive.ops import rotary
from retentive.ops.bidirectional import over_grid
from retentive.ops.rows import rotate


class BidirectionalRetention(MultiScaleRetention):
    """`x [B,*G,D] -> [B,*G,D]` over a grid G of one or more axes.

    Raises:
        ValueError: the config has score_norm, which is for masks that only look back.
    """

    def __init__(self, config: RetentionConfig):
        if config.score_norm:
            raise ValueError("score_norm is for one direction: set score_norm=False for an encoder")
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        phases = [
            rotary.phases(torch.arange(n, device=x.device), self.K, self.config.rotary, dtype=wide)
            for n in x.shape[1:-1]
        ]
        heads = [self.query(x), self.key(x), self.v_proj(x).unflatten(-1, (self.kv_heads, self.V))]
        q, k, v = (y.repeat_interleave(self.H // y.shape[-2], -2) for y in heads)
        if self.decay_proj is not None:
            log_decay = self.decay_of(x, wide)
        else:
            log_decay = torch.tensor(self.config.log_decay(), dtype=wide, device=x.device)
        o = over_grid(q, k, v, log_decay, rotated=lambda y, axis: rotate(y, *phases[axis], self.config.rotary))
        return self.out(x, o)
