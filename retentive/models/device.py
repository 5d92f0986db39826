"""Devices by name."""

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: a name that is none, or of a device that is not here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or mps") from None
    here = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device.type in here and not here[device.type]():
        raise ValueError(f"device {name!r} is not here: torch finds no such GPU on this machine")
    return device
