"""Which models are exported: plain RetNets, whatever the runtime."""

from retentive.models import LanguageModel, RetNetConfig
from retentive.models.encoders import encoders_of


def check_plain(model: LanguageModel) -> None:
    """Raises ValueError for a model that is no RetNet, or that sees or hears."""
    if type(model.config) is not RetNetConfig:
        raise ValueError(f"only RetNets are exported, this is a {type(model).__name__}")
    if encoders_of(model):
        raise ValueError("a model that sees or hears is not exported: its pictures and sound come as embeddings")
