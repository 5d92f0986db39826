"""This package's models in the transformers library (extra `hf`).

    import retentive.hf                                         registers the model type "retentive"
    AutoModelForCausalLM.from_pretrained("folder")              a folder of `retentive export RUN --to hf`
    to_hf("runs/mine", Path("folder"))                          writes one (`folder`)

    to_mlx("runs/mine", Path("folder"))                         writes one for mlx-lm (`mlx`)

`modeling_retentive.py` is copied into each folder, which so loads where this package is not installed.
"""

try:
    import transformers
except ImportError:
    raise ImportError("transformers is missing: pip install 'retentive[hf]'", name="transformers") from None

from retentive.hf.folder import to_hf
from retentive.hf.mlx import to_mlx
from retentive.hf.modeling_retentive import (
    RetentiveCache,
    RetentiveConfig,
    RetentiveForCausalLM,
    RetentiveForSequenceClassification,
    RetentiveModel,
)

__all__ = [
    "RetentiveCache",
    "RetentiveConfig",
    "RetentiveForCausalLM",
    "RetentiveForSequenceClassification",
    "RetentiveModel",
    "to_hf",
    "to_mlx",
]

transformers.AutoConfig.register("retentive", RetentiveConfig)
transformers.AutoModel.register(RetentiveConfig, RetentiveModel)
transformers.AutoModelForCausalLM.register(RetentiveConfig, RetentiveForCausalLM)
transformers.AutoModelForSequenceClassification.register(RetentiveConfig, RetentiveForSequenceClassification)
