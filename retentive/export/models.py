"""Models that can be exported."""

from retentive.models import LanguageModel
from retentive.models.encoders import encoders_of


def check_model(model: LanguageModel) -> None:
    """Raises ValueError for a peer of another library, and for a model that sees or hears."""
    if model.config.library:
        raise ValueError(f"only this package's models are exported, this is one of {model.config.library}")
    if encoders_of(model):
        raise ValueError("a model that sees or hears is not exported: its pictures and sound come as embeddings")
