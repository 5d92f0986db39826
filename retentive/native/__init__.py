"""The native engine: the whole model in C. It prefills and decodes over the same states as torch."""

from retentive.native.library import describe
from retentive.native.model import ENGINES, NativeModel, refused, unfit, with_engine

__all__ = ["ENGINES", "NativeModel", "describe", "refused", "unfit", "with_engine"]
