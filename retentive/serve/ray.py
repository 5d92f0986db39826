"""The server as a Ray Serve deployment (extra `ray`): replicas of a model, with each session on the one that has it.

Every replica is a whole server: its own weights, engine, slots and sessions. Ray's proxies send requests with the same
X-Session-Id header to the same replica, by consistent hashing, and spread those without one; the page sets it, and so
must clients that use sessions. The folder of saved states must be one that all replicas see.

    serve run retentive.serve.ray:application run=runs/demo replicas=2
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from retentive.serve.options import Options

if TYPE_CHECKING:
    from ray.serve import Application

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Import path: Ray imports it in its own processes."""


def deployed(
    run: str,
    options: Options | None = None,
    *,
    replicas: int = 2,
    cpus: float = 1,
    device: str = "cpu",
    window: int | Sequence[int] | None = None,
    sinks: int | None = None,
) -> "Application":
    """Returns the application for `ray.serve.run`: `replicas` servers of `run`, which every node must find there.

    Replicas also accept the API keys in their environment variable RETENTIVE_API_KEY.

    Args:
        cpus: cores and threads of a replica; on "cuda" it has a GPU as well.
        window: limit of the model's attention, in tokens; None: none but its own.
        sinks: first tokens that stay visible beside the window; None: as many as the model has.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        from ray import serve
    except ImportError:
        raise ImportError("serving with Ray needs ray: pip install 'retentive[ray]'") from None
    options = options or Options()

    def build() -> Any:
        """Runs in each replica: its own model and engine."""
        # imported here, so that importing this module needs neither FastAPI nor a model
        from retentive.checkpoint import ModelFolder
        from retentive.native import with_engine
        from retentive.serve.app import create_app
        from retentive.serve.service import open_service

        def load(folder: Any, adapter: Any) -> Any:
            return with_engine(folder.model(device=device, adapter=adapter))

        folder = ModelFolder.open(run).windowed(window, sinks)
        return create_app(open_service(folder, options.with_environment_keys(), load=load))

    server = serve.deployment(
        name="retentive",
        num_replicas=replicas,
        # more than the server admits, so that it answers 429 itself; Ray would let clients wait
        max_ongoing_requests=8 * (options.slots + options.queue),
        graceful_shutdown_timeout_s=options.timeout,
        ray_actor_options={"num_cpus": cpus, "num_gpus": 1 if device.startswith("cuda") else 0},
        # no fallback to another replica, which does not have the session's state
        request_router_config={"request_router_class": ROUTER, "request_router_kwargs": {"num_fallback_replicas": 0}},
    )
    return server(serve.ingress(build)()).bind()


def application(args: Mapping[str, Any]) -> "Application":
    """Returns the application of `serve run retentive.serve.ray:application run=RUN …`.

    Args:
        args: arguments of `deployed`, and fields of Options.

    Raises:
        ValueError: `run` is missing, or an argument is unknown or has the wrong type.
    """
    of_options = {field.name for field in fields(Options)}
    known: dict[str, Any] = {"run": str, "replicas": int, "cpus": float, "device": str}
    known |= {"window": int | list[int], "sinks": int}
    if unknown := sorted(set(args) - set(known) - of_options):
        raise ValueError(f"unknown arguments {', '.join(unknown)}: expected {', '.join([*known, *sorted(of_options)])}")
    if "run" not in args:
        raise ValueError("run is missing: run=FOLDER, a run directory or model folder")
    try:  # strings on the command line, typed in a config file: pydantic takes both
        options = TypeAdapter(Options).validate_python({k: v for k, v in args.items() if k in of_options})
        own: dict[str, Any] = {k: TypeAdapter(kind).validate_python(args[k]) for k, kind in known.items() if k in args}
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'arguments'}: {first['msg']}") from None
    return deployed(own.pop("run"), options, **own)
