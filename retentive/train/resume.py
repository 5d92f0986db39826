"""A run as it goes on: its own options, as train.json has them, and those of the user's that may change."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from retentive.train.checkpoints import folders
from retentive.train.config import TrainConfig

if TYPE_CHECKING:
    from retentive.train.run import TrainRun

FREE = {
    "async_save",
    "device",
    "eval_every",
    "keep",
    "save_every",
    "sample_every",
    "sample_prompt",
    "tensorboard",
    "wandb",
}
"""Options that a resumed run may change at any time: none of them alters what is computed."""


def resumed(
    run: "TrainRun", saved: Mapping[str, Any], fingerprint: str, overrides: Collection[str] | None
) -> "TrainRun":
    """The run at `run.out` as it is resumed: with its own options (`saved`), and with those of `run` that may change.

    The folder of the data may have been moved, but its content must be the same. A run that has no checkpoint yet may
    change in anything.

    Raises:
        ValueError: an option that may not change, other data, or a damaged train.json.
    """
    chosen = set(options_of(run)) if overrides is None else set(overrides) & set(options_of(run))
    free = FREE if overrides is None else FREE | {"steps"}
    free = free | {"init"} if saved.get("command", {}).get("lora") else free  # which is known by its weights
    kept = folders(run.out)
    try:
        own = saved["command"] | {"data": run.data, "out": run.out, "set": changes_of(saved["command"]["set"])}
        before = type(run)(**own, train=TrainConfig(**saved["train"]), resume=True, parallel=run.parallel)
        same_data = saved["data_sha256"] == fingerprint
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.out / 'train.json'} does not hold a run's options ({error}): it cannot go on") from None
    if not kept:
        free = chosen
    elif not same_data:
        named = as_typed(run.data)
        raise ValueError(
            f"{named} holds other data than the run at {run.out} was trained on: name those, in their order"
        )
    new, old = options_of(run), options_of(before)
    for name in sorted(chosen - free):
        # train.json has the precision that "auto" was found to mean, and JSON's lists for tuples
        same_precision = name == "precision" and new[name] == "auto"
        if plain(new[name]) != plain(old[name]) and not same_precision:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} {as_typed(new[name])} contradicts the run at {run.out}, which has {as_typed(old[name])}: "
                f"leave it out"
            )
    done = int(kept[-1].name.removeprefix("step-")) if kept else 0
    if "steps" in chosen & free and run.train.steps < done:
        raise ValueError(f"--steps {run.train.steps} is less than the {done} that the run at {run.out} has done")
    return with_options(before, {name: new[name] for name in chosen & free})


def changes_of(stored: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """The config's changes as train.json has them; runs from before 26 November 2026 have FIELD=VALUE strings."""
    if isinstance(stored, Mapping):
        return dict(stored)
    pairs = [str.partition(item, "=")[::2] for item in stored]
    numbers = {name: text for name, text in pairs if text[:1] in "[-0123456789" or text in ("true", "false")}
    return dict(pairs) | {name: json.loads(text) for name, text in numbers.items()}


def options_of(run: "TrainRun") -> dict[str, Any]:
    """All options that say what is trained, by name: those of TrainRun and of TrainConfig, without the folders."""
    apart = ("data", "out", "resume", "overwrite", "train", "parallel")
    own = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in apart}
    return own | {f.name: getattr(run.train, f.name) for f in fields(run.train)}


def with_options(run: "TrainRun", options: Mapping[str, Any]) -> "TrainRun":
    """The run with some fields changed, its own and those of its TrainConfig and its Parallel."""
    inner = {}
    for name in ("train", "parallel"):
        part = getattr(run, name)
        theirs = {f.name for f in fields(part)} & set(options)
        inner[name] = replace(part, **{key: options[key] for key in theirs})
        options = {key: value for key, value in options.items() if key not in theirs}
    return replace(run, **options, **inner)


def plain(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def as_typed(value: Any) -> str:
    """The value of an option as it is typed on the command line."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={x}" for name, x in value.items()) or "none"
    return (" ".join(map(str, value)) or "none") if isinstance(value, tuple | list) else str(value)
