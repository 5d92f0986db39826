"""Inference: sampling tokens, and generating them one by one from a state of constant size."""

from retentive.infer.generate import Token, generate
from retentive.infer.sample import SamplingParams
from retentive.infer.text import write_on

__all__ = ["SamplingParams", "Token", "generate", "write_on"]
