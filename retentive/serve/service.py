"""Service of a server: one model with its engine, template, sessions and saved states, within limits."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retentive import __version__, machine
from retentive.checkpoint import ModelFolder
from retentive.data.templates import ChatTemplate
from retentive.data.tokenizer import Tokenizer
from retentive.infer.cache import PrefixCache
from retentive.infer.conversation import Conversation
from retentive.infer.memory import Memory, blank, fingerprint
from retentive.models import LanguageModel, cost
from retentive.models.encoders import encoders_of
from retentive.native import with_engine
from retentive.options import option
from retentive.serve.async_engine import AsyncEngine
from retentive.serve.errors import Refused, try_later
from retentive.serve.media import OpenMedia, senses
from retentive.serve.metrics import Metrics
from retentive.serve.options import Options
from retentive.serve.sessions import SavedStates, Sessions

CHUNK, CPU_CHUNK = 512, 256
"""Prompt tokens read between two decoding steps. On two cores, 512 doubles the pauses of running streams without a
sooner first token."""
STATE_HEAD = 1 << 20
"""Maximum bytes of a state's file beside its tensors: names of the documents read."""


@dataclass
class Service:
    """Model with everything that requests share. Only one event loop's thread uses it, so it has no locks."""

    name: str
    """Name of the model in requests and responses."""
    model: LanguageModel
    tokenizer: Tokenizer
    template: ChatTemplate
    options: Options
    states_folder: Path
    engine: AsyncEngine = field(init=False)
    sessions: Sessions = field(init=False)
    saved: SavedStates = field(init=False)
    metrics: Metrics = field(init=False)
    open_media: OpenMedia | None = field(init=False)
    """Function that opens pictures and sound; None for a model that reads only text."""
    opening: ThreadPoolExecutor = field(init=False)
    """Thread that opens them one by one, since opening a picture may take 0.7 GB."""
    in_flight: int = 0
    """Number of completions in flight."""
    draining: bool = False

    def __post_init__(self):
        options, model = self.options, self.model
        name = fingerprint(model)  # hashes all weights, so it is computed once
        self._blank: Memory = blank(model, name)
        # fails now, since the pool is allocated with the first request
        state: Any = self._blank.state
        needed = options.slots * state.reserve(max(state.windows)).nbytes  # caches without a window grow later
        if needed > (free := machine.free_memory(self._blank.state.position.device)):
            have = f"{needed / 1e9:,.1f} GB of states, {free / 1e9:,.1f} GB are free"
            raise ValueError(f"{option('slots', options.slots)}: they need {have}; ask for fewer")
        cache = None
        if options.cache:
            cache = PrefixCache(options.cache, folder=options.cache_folder, model=name)
        chunk = CPU_CHUNK if model.device.type == "cpu" else CHUNK
        self.engine = AsyncEngine(model, slots=options.slots, waiting=options.queue, prefill_chunk=chunk, cache=cache)
        self.sessions = Sessions(options.sessions, self.new_conversation)
        self.saved = SavedStates(self.states_folder, model, name, self.name)
        self.metrics = Metrics(self.engine, self.sessions)
        self.open_media, self.opening = senses(model), ThreadPoolExecutor(1, "retentive-opening")

    @property
    def largest_state(self) -> int:
        """Maximum bytes of an uploaded state: the state after max_prompt tokens."""
        context = self.options.max_prompt
        return cost.memory_bytes(self.model.config, context) + STATE_HEAD

    def new_conversation(self) -> Conversation:
        """Returns an empty conversation. All share one blank state, which is never written."""
        return Conversation(self.engine, self.tokenizer, self.template, self._blank)

    def check_model(self, name: str | None) -> None:
        """Raises Refused (404) for any other model."""
        if name is not None and name != self.name:
            message = f"the model {name!r} is not here; this server has {self.name!r}"
            raise Refused(404, message, param="model", code="model_not_found")

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Counts a completion while it is in flight.

        Raises:
            Refused: 503 or 429 if the server accepts no more.
        """
        if self.draining:
            raise try_later("the server is stopping", status=503, seconds=5)
        # Far more than have or await a slot: the others have finished, but their clients do not read the answers.
        if self.in_flight >= 4 * (self.options.slots + self.options.queue):
            raise try_later(f"too many requests are in flight already ({self.in_flight})")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def info(self) -> dict[str, Any]:
        """Returns the JSON of /v1/info: the model and its limits, for the page."""
        return {
            "model": self.name,
            "kind": self.model.config.name,
            "parameters": cost.parameters(self.model.config),
            "state_bytes": self._blank.nbytes,
            "state_bounded": self.model.config.constant_state,
            "kv_cache_bytes_per_token": cost.attention_cache_bytes(self.model.config),
            "context": None,  # no limit
            "slots": self.options.slots,
            "max_tokens": self.options.max_tokens,
            "max_prompt": self.options.max_prompt,
            "tokenizer": {"vocab_size": self.tokenizer.vocab_size, "sha256": self.tokenizer.sha256},
            "chat": self.template.own,
            "media": sorted(encoders_of(self.model)),
            "version": __version__,
        }


def _load(folder: ModelFolder, adapter: ModelFolder | None) -> LanguageModel:
    return with_engine(folder.model(adapter=adapter))


def open_service(
    run: str | Path | ModelFolder,
    options: Options | None = None,
    *,
    tokenizer: str | Tokenizer | None = None,
    adapter: str | Path | ModelFolder | None = None,
    load: Callable[[ModelFolder, ModelFolder | None], LanguageModel] = _load,
) -> Service:
    """Returns the service for a run directory, a model folder, or a name on the hub.

    Args:
        adapter: folder of an adapter to merge into the model; its template is used then.
        load: function that loads the model of a folder with an adapter; by default in C, if that can run it.

    Raises:
        FileNotFoundError, ValueError: no model, no tokenizer, a template that is refused, or more slots than there is
            memory for; and what `load` raises.
    """
    options, folder = options or Options(), ModelFolder.open(run)
    change = None if adapter is None else ModelFolder.open(adapter)
    found = folder.tokenizer_for_text(tokenizer)
    model = load(folder, change)
    template = (change or folder).template(found, options.template)
    return Service(folder.short_name, model, found, template, options, options.states or folder.path / "states")
