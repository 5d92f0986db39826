"""The retention operator: arithmetic on tensors, without nn.Module or config.

Shape suffixes: B batch, T tokens, H heads, K query and key head dim, V value head dim, C chunk length,
M chunks of the whole batch, N sequences.
"""

from retentive.ops.pieces import across
from retentive.ops.retention import forced, retention, retention_step, using
from retentive.ops.ring import Ring

__all__ = ["Ring", "across", "forced", "retention", "retention_step", "using"]
