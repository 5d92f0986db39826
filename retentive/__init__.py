"""Retentive Networks: train, evaluate, serve and ship them.

    import retentive
    model, tokenizer = retentive.load("runs/demo")
    logits, state = model(ids)

`retentive.models` builds models, `retentive.ops` is the operator alone, and `retentive --help` is the command line.
"""

__version__ = "0.1.0"


def load(path, *, device="cpu", dtype=None):
    """(model, tokenizer or None) from a run directory, a folder in torchscale's or fla's layout, or hf:owner/name."""
    from retentive.checkpoint import load

    return load(path, device=device, dtype=dtype)
