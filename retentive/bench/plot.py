"""Pictures of measurements; matplotlib comes with the extra `plot`."""

from typing import Any


def panels(title: str) -> tuple[Any, Any]:
    """(figure, two axes side by side), to draw on and then `figure.savefig(path, dpi=120)`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen and keeps every figure
    except ImportError:
        raise ModuleNotFoundError("plots need an extra: pip install 'retentive[plot]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, 2)
