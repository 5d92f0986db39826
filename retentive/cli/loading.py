"""What verbs for a model share: the flags that say which model, and how it is loaded."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from retentive.checkpoint import load_with_tokenizer
from retentive.checkpoint.quantize import BITS, quantize
from retentive.data.tokenizer import Tokenizer
from retentive.models import LanguageModel
from retentive.native import with_engine


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The flags of a verb that loads a model."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory or model folder (ours, torchscale's or fla's), or hf:owner/name on the hub."""
    tokenizer: str | None = None
    """A tokenizer (bytes, or a tokenizer.json) for models that come without one."""
    device: str = "cpu"
    """cpu, cuda, mps, or auto."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights; the state is float32 in any case. A memory belongs to the dtype that wrote it."""
    weights: Literal["stored", "int8", "int4"] = "stored"
    """Quantise while loading; `retentive quantize` writes a folder of such weights once."""
    adapter: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """An adapter of this model (a run of --lora), merged into it; its folder alone also says which model it changes."""
    engine: Literal["auto", "native", "torch"] = "auto"
    """What reads tokens on a CPU: native is the model in C, auto takes it where it can run the model."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to load the weights in; None for that of the file."""
        return None if self.dtype == "stored" else getattr(torch, self.dtype)

    def load(self) -> tuple[LanguageModel, Tokenizer]:
        """The model and a tokenizer that fits it; errors as `load_with_tokenizer`, `quantize` and `with_engine`."""
        how = {"device": self.device, "dtype": self.torch_dtype, "adapter": self.adapter}
        model, tokenizer = load_with_tokenizer(self.run, self.tokenizer, **how)  # type: ignore[arg-type]
        return self.ready(model), tokenizer

    def ready(self, model: LanguageModel) -> LanguageModel:
        """A loaded model with the weights and the engine that were asked for."""
        if self.weights != "stored":
            model = quantize(model, BITS[self.weights], dtype=self.torch_dtype or torch.bfloat16)
        return with_engine(model, self.engine)
