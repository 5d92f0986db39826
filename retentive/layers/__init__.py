"""nn.Modules that models are stacked from: retention, attention, convolution, feed-forward, norm.

Shape suffixes as in `retentive.ops`, and D model width, F feed-forward width, S slots of a cache.
"""

from retentive.layers.attention import Attention
from retentive.layers.bidirectional import BidirectionalRetention
from retentive.layers.config import AttentionConfig, ConvolutionConfig, FeedForwardConfig, RetentionConfig
from retentive.layers.convolution import Convolution
from retentive.layers.ffn import FeedForward
from retentive.layers.norm import RMSNorm
from retentive.layers.positions import Positions, positions_of
from retentive.layers.retention import MultiScaleRetention

__all__ = [
    "Attention",
    "AttentionConfig",
    "BidirectionalRetention",
    "Convolution",
    "ConvolutionConfig",
    "FeedForward",
    "FeedForwardConfig",
    "MultiScaleRetention",
    "Positions",
    "RMSNorm",
    "RetentionConfig",
    "positions_of",
]
