"""Finds models: local folders, models that come with the package, the Hugging Face hub."""

from pathlib import Path

from retentive.options import quoted

SHIPPED = Path(__file__).parents[1] / "shipped"
"""Folder of the models that come with the package, each with a model card, README.md."""


def find(path: str | Path) -> Path:
    """Returns the local folder of a model; `hf:owner/name` is downloaded from the Hugging Face hub.

    If no such folder exists, the name of a model that comes with the package is accepted. Nothing is downloaded without
    `hf:`, since a typing error in a path would fetch a stranger's model.

    Raises:
        TypeError: `path` has a wrong type.
        FileNotFoundError: there is no such folder, or no such model on the hub.
        ValueError: it is a file instead of a folder.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path must name a model folder, got {type(path).__name__}")
    name, folder = str(path), Path(path)
    if not name:
        raise ValueError("the model's name is empty: expected a run directory, a model folder, or hf:owner/name")
    if name.startswith("hf:"):
        return _download(name.removeprefix("hf:"))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; expected a model folder with config.json and model.safetensors")
    if name in shipped():
        return SHIPPED / name
    hint = f"; for the Hugging Face repository write hf:{path}" if name.count("/") == 1 and name[0] not in "./" else ""
    if not hint and "/" not in name:
        hint = f": expected a run directory, a model folder, hf:owner/name, or the shipped {', '.join(shipped())}"
    raise FileNotFoundError(f"no model folder at {path}{hint}")


def shipped() -> list[str]:
    """Returns the names of the models that come with the package."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/config.json"))


def _download(name: str) -> Path:
    """Downloads a repository into the hub's own cache and returns its folder. Fetches only safetensors as weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = quoted((str(error).strip() or type(error).__name__).splitlines()[0])
        raise FileNotFoundError(f"{name!r} cannot be had from the Hugging Face hub: {reason}") from None
