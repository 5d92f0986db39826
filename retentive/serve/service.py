"""Service of a server: one model with its engine, template, sessions and saved states, within limits.

A server of several adapters has a service for each, beside that of the model itself; `Service.named` finds one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
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
from retentive.infer.conversation import NAME, Conversation
from retentive.infer.decoder import STATES
from retentive.infer.memory import Memory, blank, fingerprint
from retentive.models import LanguageModel, cost
from retentive.models.encoders import encoders_of
from retentive.native import with_engine
from retentive.options import option
from retentive.sampling import SAMPLED, SamplingParams
from retentive.serve.async_engine import AsyncEngine
from retentive.serve.errors import Refused, try_later
from retentive.serve.items import Kept
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
    kept: Kept = field(init=False)
    """Responses that later requests may refer to, of all adapters together."""
    open_media: OpenMedia | None = field(init=False)
    """Function that opens pictures and sound; None for a model that reads only text."""
    opening: ThreadPoolExecutor = field(init=False)
    """Thread that opens them one by one, since opening a picture may take 0.7 GB."""
    in_flight: int = 0
    """Number of completions in flight."""
    draining: bool = False
    sampling: SamplingParams | None = None
    """Sampling that the model's makers recommend, for requests that leave fields out; None: OpenAI's defaults."""
    adapters: "dict[str, Service]" = field(default_factory=dict)
    """Services of the same model with an adapter each, by the adapter's name in requests."""

    def __post_init__(self):
        options, model = self.options, self.model
        name = fingerprint(model)  # hashes all weights, so it is computed once
        self._blank: Memory = blank(model, name)
        self._check_slots()
        cache = None
        if options.cache:
            cache = PrefixCache(options.cache, folder=options.cache_folder, model=name)
        chunk = CPU_CHUNK if model.device.type == "cpu" else CHUNK
        self.engine = AsyncEngine(
            model, slots=options.slots, waiting=options.queue, prefill_chunk=chunk, cache=cache,
            state_dtype=STATES[options.state_precision],
        )  # fmt: skip
        self.sessions = Sessions(options.sessions, self.new_conversation)
        self.saved = SavedStates(self.states_folder, model, name, self.name)
        self.metrics, self.kept = Metrics(self.all), Kept()
        for each in self.adapters.values():
            each.metrics, each.kept = self.metrics, self.kept
        self.open_media, self.opening = senses(model), ThreadPoolExecutor(1, "retentive-opening")

    @property
    def largest_state(self) -> int:
        """Maximum bytes of an uploaded state: the state after max_prompt tokens."""
        context = self.options.max_prompt
        return cost.memory_bytes(self.model.config, context) + STATE_HEAD

    def new_conversation(self) -> Conversation:
        """Returns an empty conversation. All share one blank state, which is never written."""
        return Conversation(self.engine, self.tokenizer, self.template, self._blank)

    @property
    def all(self) -> "list[Service]":
        """This service and those of the adapters."""
        return [self, *self.adapters.values()]

    def named(self, name: str | None) -> "Service":
        """Returns the service of a model or an adapter by its name in a request; raises Refused (404) for others."""
        if name is None or name == self.name:
            return self
        if name not in self.adapters:
            have = ", ".join(repr(each.name) for each in self.all)
            message = f"the model {name!r} is not here; this server has {have}"
            raise Refused(404, message, param="model", code="model_not_found")
        return self.adapters[name]

    def drain(self) -> None:
        """Refuses new completions from now on; those in flight finish."""
        for each in self.all:
            each.draining = True

    @property
    def unfinished(self) -> int:
        """Number of completions in flight, of all adapters together."""
        return sum(each.in_flight for each in self.all)

    def _check_slots(self) -> None:
        """Raises ValueError if the states of all slots do not fit into memory; they are allocated with a request."""
        state: Any = self._blank.state
        state = state.reserve(max(state.windows))  # caches without a window grow later
        own = state.for_decoding(self.model.dtype, state_dtype=STATES[self.options.state_precision])
        needed = len(self.all) * self.options.slots * own.nbytes
        if needed > (free := machine.free_memory(state.position.device)):
            have = f"{needed / 1e9:,.1f} GB of states, {free / 1e9:,.1f} GB are free"
            raise ValueError(f"{option('slots', self.options.slots)}: they need {have}; ask for fewer")

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
            "sampling": self.sampling and {name: getattr(self.sampling, name) for name in SAMPLED},
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
    adapter: str | Path | ModelFolder | Mapping[str, str | Path | ModelFolder] | None = None,
    load: Callable[[ModelFolder, ModelFolder | None], LanguageModel] = _load,
) -> Service:
    """Returns the service for a run directory, a model folder, or a name on the hub.

    Args:
        adapter: folder of an adapter to merge into the model; its template is used then. Or several by name: each is
            served beside the model, under its name, with a copy of the weights that include its change.
        load: function that loads the model of a folder with an adapter; by default in C, if that can run it.

    Raises:
        FileNotFoundError, ValueError: no model, no tokenizer, a template that is refused, an invalid name of an
            adapter, or more slots than there is memory for; and what `load` raises.
    """
    options, folder = options or Options(), ModelFolder.open(run)
    found = folder.tokenizer_for_text(tokenizer)
    states = options.states or folder.path / "states"

    def service(name: str, change: ModelFolder | None, states: Path, **more: Any) -> Service:
        of = change or folder
        template = of.template(found, options.template)
        return Service(name, load(folder, change), found, template, options, states, sampling=of.sampling, **more)

    if not isinstance(adapter, Mapping):
        change = None if adapter is None else ModelFolder.open(adapter)
        return service(folder.short_name, change, states)
    for name in adapter:
        if not re.fullmatch(NAME, name) or name == folder.short_name:
            said = "is the model's own" if name == folder.short_name else "expected letters, digits, '.', '_' and '-'"
            raise ValueError(f"{option('adapter', name)}: {said}; choose another name")
    adapters = {name: service(name, ModelFolder.open(each), states / name) for name, each in adapter.items()}
    return service(folder.short_name, None, states, adapters=adapters)
