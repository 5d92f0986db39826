"""Measurements of whole models, each a ratio against the alternative in one run, with its hardware."""
