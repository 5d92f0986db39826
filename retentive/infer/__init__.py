"""Inference: picking tokens, and generating them one by one from a constant-size state."""

from retentive.infer.generate import Token, generate, write_on
from retentive.infer.sample import SamplingParams

__all__ = ["SamplingParams", "Token", "generate", "write_on"]
