"""The whole model in C: it reads and decodes at the speed of memory, over the states that torch would use."""

from retentive.native.library import describe
from retentive.native.model import ENGINES, NativeModel, refused, unfit, with_engine

__all__ = ["ENGINES", "NativeModel", "describe", "refused", "unfit", "with_engine"]
