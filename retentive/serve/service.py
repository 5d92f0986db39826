"""What a server serves: one model, its engine, its template, the conversations, and within which bounds."""

from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path
from typing import Any

import torch

from retentive import __version__
from retentive.checkpoint import load_with_tokenizer
from retentive.checkpoint.io import find
from retentive.data.templates import ChatTemplate, load_template
from retentive.data.tokenizer import Tokenizer
from retentive.infer.cache import PrefixCache
from retentive.infer.memory import fingerprint
from retentive.models import Model, cost
from retentive.serve.bridge import LoopEngine
from retentive.serve.errors import Refused, wait
from retentive.serve.metrics import Metrics
from retentive.serve.options import Options
from retentive.serve.sessions import SavedStates, Sessions, owner_of


@dataclass
class Service:
    """One model with all that requests share. For the thread of one event loop."""

    name: str
    """What clients call the model."""
    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate
    options: Options
    states_folder: Path
    fingerprint: str = field(init=False)
    engine: LoopEngine = field(init=False)
    sessions: Sessions = field(init=False)
    saved: SavedStates = field(init=False)
    metrics: Metrics = field(init=False)
    at_hand: int = 0
    """Completions that have begun and not ended."""
    draining: bool = False

    def __post_init__(self):
        options, model = self.options, self.model
        self.fingerprint = fingerprint(model)
        cache = None
        if options.cache:
            cache = PrefixCache(options.cache, folder=options.cache_folder, model=self.fingerprint)
        self.engine = LoopEngine(model, slots=options.slots, waiting=options.queue, cache=cache)
        self.sessions = Sessions(options.sessions)
        self.saved = SavedStates(self.states_folder, model, self.fingerprint, self.name)
        self.metrics = Metrics(self.engine, self.sessions)
        self._owners = {owner_of(key) for key in options.api_key}

    def owner(self, authorization: str | None) -> str:
        """Whose request it is, by its Authorization header.

        Raises:
            Refused: 401.
        """
        if not self._owners:
            return owner_of("")
        scheme, _, key = (authorization or "").partition(" ")
        owner = owner_of(key.strip())
        # all are compared, each in the same time
        if scheme.lower() != "bearer" or not sum(compare_digest(owner, each) for each in self._owners):
            said = "wrong API key" if authorization else "an API key is needed: Authorization: Bearer KEY"
            raise Refused(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return owner

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"the model {name!r} is not here; this server has {self.name!r}"
            raise Refused(404, message, param="model", code="model_not_found")

    def check_open(self) -> None:
        """Refused with 503 or 429 where no more requests are taken."""
        if self.draining:
            raise wait("the server is stopping", status=503, seconds=5)
        if self.at_hand >= 4 * (self.options.slots + self.options.queue):  # most of whom do not read their answers
            raise wait(f"{self.at_hand} requests are at hand already")

    def info(self) -> dict[str, Any]:
        """What the page, and whoever wants to know, is told."""
        return {
            "model": self.name,
            "kind": type(self.model).__name__,
            "parameters": cost.parameters(self.model.config),
            "state_bytes": self.model.init_state(1).nbytes,
            "context": None,  # without end
            "slots": self.options.slots,
            "max_tokens": self.options.max_tokens,
            "max_prompt": self.options.max_prompt,
            "tokenizer": {"vocab_size": self.tokenizer.vocab_size, "sha256": self.tokenizer.sha256},
            "chat": self.template.own,
            "version": __version__,
        }


def open_service(
    run: str | Path,
    options: Options | None = None,
    *,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Service:
    """The service of a run directory, model folder or hub's name.

    Raises:
        FileNotFoundError, ValueError: no model, no tokenizer, or a template that is refused.
    """
    options, folder = options or Options(), find(run)
    model, found = load_with_tokenizer(folder, tokenizer, device=device, dtype=dtype)
    template = load_template(folder, found, options.template)
    name = folder.resolve().name if Path(run).is_dir() else str(run)
    return Service(name, model, found, template, options, options.states or folder / "states")
