"""Real servers on free ports, in threads of this process, of tiny random models that write bytes."""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs pip install 'retentive[serve]'")

import httpx
import openai
import uvicorn

from retentive.checkpoint import save_model
from retentive.data.templates import BUILT_IN
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams, generate
from retentive.models import build, retnet, twin
from retentive.models.encoders import AudioConfig, ImageConfig, encoders_of, with_encoders
from retentive.serve.options import Options
from retentive.serve.server import config
from retentive.serve.service import Service, open_service

CONFIG = retnet(vocab_size=257, dim=32, layers=2, heads=2)
CONFIGS = {"retnet": CONFIG, "transformer": twin(CONFIG)}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The fastest for models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(kind: str, seed: int = 0):
    """Peaked enough that greedy choices are no ties; and it likes letters, so that there is text to look at."""
    torch.manual_seed(seed)
    model = build(CONFIGS[kind]).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5)
        letters = torch.zeros(257)
        letters[32:127] = 1
        model.head.weight[letters == 0] *= 0.4
    return model


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of the models, by kind; "other" is a RetNet of the same shape with other weights."""
    root = tmp_path_factory.mktemp("runs")
    for name, kind, seed in (("retnet", "retnet", 0), ("transformer", "transformer", 0), ("other", "retnet", 1)):
        save_model(root / name, tiny(kind, seed), ByteTokenizer())
    return root


@dataclass
class Running:
    """A server that runs: `url` without /v1."""

    url: str
    service: Service
    end: Callable[[], None]
    clients: list = field(default_factory=list)

    def client(self, key: str = "none") -> openai.OpenAI:
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0))
        return self.clients[-1]

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.clients.append(httpx.Client(base_url=self.url, headers=headers, timeout=30))
        return self.clients[-1]

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.end()

    def text(self, ids, *, max_tokens: int, stop_ids=(256,), **params) -> str:
        """Returns the text that the model generates after `ids` without other requests."""
        tokens = generate(
            self.service.model, ids, SamplingParams(**params), max_tokens=max_tokens, stop_ids=list(stop_ids)
        )
        return ByteTokenizer().decode([t.id for t in tokens])

    def idle(self) -> bool:
        """Waits until nothing is in flight; whether it came to that."""
        engine = self.service.engine
        return _eventually(lambda: not engine.taken and not engine.queue and not self.service.in_flight)


@pytest.fixture
def eventually():
    """`eventually(condition)`: whether it came true, waiting for it."""
    return _eventually


def _eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def run(service: Service) -> Running:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # so that who does not read is soon noticed
    server = uvicorn.Server(config(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()

    def end() -> None:
        server.should_exit = True
        service.engine.close(drain=False)
        thread.join()

    return Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, end)


@pytest.fixture(scope="session")
def eyes(tmp_path_factory):
    """A server of a model that sees and hears; what it sees and hears changes what it says."""
    folder, model = tmp_path_factory.mktemp("eyes"), tiny("retnet")
    image = ImageConfig(token=257, size=8, patch=4, channels=1, dim=16, layers=1)
    with_encoders(model, {"image": image, "audio": AudioConfig(token=258, rate=8000, mels=8, stack=2, dim=16)})
    for p in encoders_of(model).values():
        for matrix in p.parameters():
            torch.nn.init.normal_(matrix, std=2 * matrix.shape[-1] ** -0.5) if matrix.ndim == 2 else None
    save_model(folder / "eyes", model, ByteTokenizer(), template=BUILT_IN)
    running = run(open_service(folder / "eyes", Options(states=folder / "states", slots=4, max_prompt=200, media=2)))
    yield running
    running.stop()


@pytest.fixture
def serve(runs, tmp_path):
    """`serve("retnet", **options)`: a server of that model, gone after the test."""
    started = []

    def start(kind: str = "retnet", **options) -> Running:
        options = {"states": tmp_path / "states", **options}
        started.append(run(open_service(runs / kind, Options(**options))))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def shared(runs, tmp_path_factory):
    """`shared("retnet")`: one server of each kind for tests that leave it as it was."""
    started: dict[str, Running] = {}

    def get(kind: str) -> Running:
        if kind not in started:
            options = Options(states=tmp_path_factory.mktemp("states"), slots=8, max_tokens=500, max_prompt=2000)
            started[kind] = run(open_service(runs / kind, options))
        return started[kind]

    yield get
    for running in started.values():
        running.stop()


@pytest.fixture(params=CONFIGS)
def server(request, shared) -> Running:
    """A shared server of a RetNet, then of its twin."""
    return shared(request.param)


@pytest.fixture
def retnet(shared) -> Running:
    return shared("retnet")
