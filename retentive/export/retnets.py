"""Models that can be exported: plain RetNets, whatever the runtime."""

from retentive.models import LanguageModel
from retentive.models.encoders import encoders_of


def check_plain(model: LanguageModel) -> None:
    """Raises ValueError for a model that attends, whose blocks differ, or that sees or hears."""
    if model.config.library:
        raise ValueError(f"only RetNets are exported, this is a model of {model.config.library}")
    model.config.all_retention("an export")
    if encoders_of(model):
        raise ValueError("a model that sees or hears is not exported: its pictures and sound come as embeddings")
