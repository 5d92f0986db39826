"""Check of models that can be exported."""

from retentive.models import LanguageModel
from retentive.models.encoders import encoders_of


def check_model(model: LanguageModel) -> None:
    """Raises ValueError for a model of another library, and for a model that sees or hears."""
    if model.config.library:
        raise ValueError(f"only this package's models are exported, this is one of {model.config.library}")
    if encoders_of(model):
        raise ValueError("a model that sees or hears cannot be exported: its pictures and sound are embeddings")
