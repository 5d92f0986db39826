"""The whole model in C: decoding at the speed of memory, over the same states in the same memory as torch."""

from retentive.native.model import NativeModel
from retentive.native.weights import refused

__all__ = ["NativeModel", "refused"]
