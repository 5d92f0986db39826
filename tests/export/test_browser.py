"""The folder for browsers in a real headless Chromium, from a server of files: tokens are the native engine's.

The oracle is the model that lies in the folder, as Python has it; states are exchanged with it in both directions.
"""

import copy
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from retentive.checkpoint import load, save_model
from retentive.data.templates import TEMPLATE, TURNS, load_template
from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.export.browser import ENGINES, chat_pieces
from retentive.export.folder import export
from retentive.infer import SamplingParams, generate
from retentive.infer.conversation import Conversation
from retentive.infer.engine import Engine
from retentive.infer.memory import blank, fingerprint, load_memory, save
from retentive.models import build, retnet
from retentive.native import with_engine
from retentive.native.library import FOLDER, OPS
from retentive.ops.compiler import FLAGS, LINK
from tests.pages import PHONE, expect

pytest.importorskip("ziglang", reason="the engine is compiled by pip install 'retentive[compiler]'")

pytestmark = pytest.mark.slow
WORDS = "It's the 5th of 1990's days, isn't it? We'll see: naïve «été» — 東京 don't end.\n"
GREEDY = {"temperature": 0, "max_tokens": 40}
STEPS = 120


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Isolating(Quiet):
    """Its pages may have threads."""

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@pytest.fixture
def serve_files():
    """`serve_files(folder)`: the address of a server of its files."""
    servers = []

    def start(folder, handler=Quiet) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


SAID = {
    "Hello, 東京": "Good day to you, and to all who are with you.",
    "And then?": "Then it was night, and nobody spoke for a while.",
    "My name is Ada.": "A good name: I shall not forget it, Ada.",
    "Tell me of trees.": "They stand, they grow, they do not speak.",
}


@functools.cache
def taught(seed: int = 0, convolution: int = 0):
    """A model that has learnt a few lines by heart: its choices are sure, those of a random one are all but ties."""
    tokenizer = train_bpe([WORDS * 20, *SAID, *SAID.values()], 400)
    torch.manual_seed(seed)
    model = build(retnet(vocab_size=tokenizer.vocab_size, dim=64, layers=2, heads=2, convolution=convolution))
    turns = load_template(Path("none"), tokenizer, default=TURNS)
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SAID.items()]
    rows = [ids * 8 for ids, _ in turns.taught(chats)] + [tokenizer.encode(WORDS * 8)] * 2
    ids = torch.tensor([row[:97] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        logits, _ = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    return model.eval(), tokenizer


def exported(folder, *, weights="int8", template=TURNS, seed=0, endless=False, convolution=0):
    model, tokenizer = taught(seed, convolution)
    if endless:
        model = copy.deepcopy(model)
        model.head.weight.data[tokenizer.eos_id] = model.head.weight.data.mean(0)  # a mean is never the largest
    save_model(folder.with_name("run") / "tiny", model, tokenizer, template=template)
    export(str(folder.with_name("run") / "tiny"), "browser", folder, weights=weights)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("browser") / "tiny")


@pytest.fixture
def conversation():
    """`conversation(folder, memory)`: as Python goes on from a memory of the model in the folder, or begins."""
    engines = []

    def begin(folder, memory=None) -> Conversation:
        model, tokenizer = load(folder / "model")
        engines.append(Engine(with_engine(model), slots=1).start())
        return Conversation(engines[-1], tokenizer, load_template(folder / "model", tokenizer), memory or blank(model))

    yield begin
    for engine in engines:
        engine.close()


def said(conversation, text) -> str:
    return "".join(conversation.say(text, SamplingParams(temperature=0), max_tokens=GREEDY["max_tokens"]))


def test_a_chat_is_the_native_engines(folder, serve_files, visit, conversation):
    here = visit(serve_files(folder), model="tiny")
    here.settings(**GREEDY)
    native = conversation(folder)
    for text in ("Hello, 東京", "And <|endoftext|> then?", "Tell me of trees."):
        assert here.say(text) == said(native, text) != ""
        assert here.read() == native.memory.tokens
    expect(here["kind"]).to_have_text("State, constant")
    expect(here["speed"]).to_have_text(re.compile(r"^[\d,]+$"))


THREADS = "import('./engine.js').then((engine) => engine.choose().threads)"


@pytest.mark.parametrize("handler", [Quiet, Isolating], ids=["alone", "threads"])
@pytest.mark.parametrize("weights, convolution", [("stored", 0), ("int8", 0), ("int4", 0), ("int8", 4)])
def test_a_text_is_written_on_as_natively(weights, convolution, handler, tmp_path, serve_files, visit):
    folder = exported(tmp_path / "base", weights=weights, template=None, convolution=convolution)
    here = visit(serve_files(folder, handler), model="tiny")
    assert (here.page.evaluate(THREADS) > 0) == (handler is Isolating)
    expect(here.page.get_by_label("Continue text")).to_be_checked()
    here.settings(**GREEDY)
    model, tokenizer = load(folder / "model")
    ids = [tokenizer.eos_id, *tokenizer.encode("It's the")]
    tokens = generate(with_engine(model), ids, SamplingParams(temperature=0), max_tokens=80)
    whole = tokenizer.decode([token.id for token in tokens])
    first = here.say("It's the")
    assert first and whole.startswith(first.rstrip("\ufffd"))
    assert first + here.say("") == whole


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_seed_draws_the_text_that_the_program_in_c_draws(tmp_path, serve_files, visit):
    folder = exported(tmp_path / "drawn", weights="stored", template=None, endless=True)
    sources = [str(FOLDER / "retentive.c"), str(FOLDER.parent / "write.c"), f"-I{FOLDER}", f"-I{OPS}"]
    subprocess.run(["gcc", *FLAGS, "-w", *sources, "-o", str(tmp_path / "write"), *LINK], check=True)
    here = visit(serve_files(folder), model="tiny")
    texts = []  # nothing like this was learnt by heart, so much is likely
    for seed in (7, 8):
        options = {"-p": "Zebra", "-n": 40, "-t": 2, "--top-p": 0.99, "-s": seed}
        command = [tmp_path / "write", folder / "model", *(x for pair in options.items() for x in pair)]
        done = subprocess.run(list(map(str, command)), capture_output=True, check=True)
        here.settings(temperature=2, top_p=0.99, max_tokens=40, seed=seed)
        texts.append(here.say("Zebra"))
        assert "Zebra" + texts[-1] + "\n" == done.stdout.decode(errors="replace")
        here["new"].click()
    assert texts[0] != texts[1]


def download(here, name, to) -> bytes:
    with here.page.expect_download() as waiting:
        here.page.get_by_role("button", name=f"Download {name}", exact=True).click()
    waiting.value.save_as(to)
    return to.read_bytes()


def keep(here, name) -> None:
    here["name"].fill(name)
    here.page.keyboard.press("Enter")
    expect(here.page.get_by_role("button", name=f"Continue from {name}", exact=True)).to_be_visible()


def test_states_are_saved_restored_and_exchanged_with_python(folder, serve_files, visit, tmp_path, conversation):
    here = visit(serve_files(folder), model="tiny")
    here.settings(**GREEDY)
    here.say("My name is Ada.")
    read = here.read()
    keep(here, "ada")
    kept = download(here, "ada", tmp_path / "ada.safetensors")
    memory = load_memory(tmp_path / "ada.safetensors", load(folder / "model")[0])
    assert memory.tokens == read
    goes_on = here.say("What is my name?")
    assert said(conversation(folder, memory), "What is my name?") == goes_on != ""
    here["new"].click()
    assert here.read() == 0
    here.page.get_by_role("button", name="Continue from ada").click()
    expect(here["read"]).to_have_text(str(read))
    keep(here, "ada.again")
    assert download(here, "ada.again", tmp_path / "again") == kept
    assert here.say("What is my name?") == goes_on
    # and the other way round
    native = conversation(folder)
    said(native, "Tell me of trees.")
    save(native.memory, tmp_path / "trees.safetensors")
    here["state"].set_input_files(tmp_path / "trees.safetensors")
    here.page.get_by_role("button", name="Continue from trees").click()
    expect(here["read"]).to_have_text(str(native.memory.tokens))
    assert here.say("And then?") == said(native, "And then?") != ""


def test_a_reload_goes_on_and_needs_no_network(folder, serve_files, visit, conversation):
    here = visit(serve_files(folder), model="tiny")
    here.settings(**GREEDY)
    here.page.evaluate("navigator.serviceWorker.ready.then(() => true)")
    here.page.context.set_offline(True)
    native = conversation(folder)
    assert here.say("Hello") == said(native, "Hello")
    assert here.page.evaluate(THREADS) == 0
    here.page.reload()
    expect(here["model"]).to_have_text("tiny")
    assert here.page.evaluate(THREADS) > 0  # what the browser kept of the folder, it may have threads for
    here.settings(**GREEDY)
    assert here.say("And then?") == said(native, "And then?")


def test_another_folder_at_the_same_address_takes_the_place_of_what_was_kept(tmp_path, serve_files, visit):
    address = serve_files(exported(tmp_path / "site"))
    here = visit(address, model="tiny")
    here.page.evaluate("navigator.serviceWorker.ready.then(() => true)")
    here.page.reload()
    expect(here["model"]).to_have_text("tiny")
    shutil.rmtree(tmp_path / "site")
    save_model(tmp_path / "newer", *taught(1), template=TURNS)
    export(str(tmp_path / "newer"), "browser", tmp_path / "site")
    here.page.goto(address)
    expect(here["model"]).to_have_text("newer")
    here.page.context.set_offline(True)
    here.page.reload()
    expect(here["model"]).to_have_text("newer")
    here.page.context.set_offline(False)
    shutil.rmtree(tmp_path / "site")
    (exported(tmp_path / "site") / "worker.js").unlink()
    here.page.goto(address)
    expect(here.page.get_by_text("is not complete")).to_be_visible()


def test_stop_strings_and_stopping_leave_the_state_as_it_was_read(tmp_path, serve_files, visit):
    here = visit(serve_files(exported(tmp_path / "endless", endless=True)), model="tiny")
    here.page.get_by_label("Continue text").check()
    here.settings(**GREEDY)
    whole = here.say("It's the 5th")
    further = here.say("")
    here["new"].click()
    stop = whole[len(whole) // 2 :][:3]
    here.settings(stops=stop)
    cut = here.say("It's the 5th")
    assert cut == whole[: whole.index(stop)]
    here.settings(stops="", max_tokens=1_000_000)
    here["input"].fill(whole[len(cut) :])  # what was cut off is not in the state: it can be said otherwise
    here.page.keyboard.press("Enter")
    expect(here.page.locator(".model").last).not_to_be_empty()
    here["stop"].click()
    stopped = here.answers()[-1]
    here.settings(**GREEDY)
    assert further.startswith(stopped[: len(further)])  # as far as it was shown before it was stopped
    assert here.say("")
    expect(here["error"]).to_be_empty()


def test_foreign_and_damaged_states_are_refused(folder, serve_files, visit, tmp_path, conversation):
    here = visit(serve_files(folder), model="tiny")
    here.settings(**GREEDY)
    native = conversation(folder)
    said(native, "Hello")
    good = tmp_path / "good.safetensors"
    save(native.memory, good)
    data = bytearray(good.read_bytes())
    data[-5] ^= 1
    other = exported(tmp_path / "other", seed=1)
    foreign = conversation(other)
    said(foreign, "Hello")
    save(foreign.memory, tmp_path / "foreign.safetensors")
    (tmp_path / "flipped.safetensors").write_bytes(data)
    (tmp_path / "cut.safetensors").write_bytes(data[:-100])
    (tmp_path / "text.safetensors").write_text("no state")
    words = {
        "foreign": "this state is another model's",
        "flipped": "was changed after it was written",
        "cut": "holds no state of one sequence of this model",
        "text": "this is no file of a saved state",
    }
    for name, wanted in words.items():
        here["state"].set_input_files(tmp_path / f"{name}.safetensors")
        expect(here["error"]).to_contain_text(wanted)
    expect(here.page.locator("#states li")).to_have_count(0)
    assert here.say("Hello")  # nothing was lost


FULL = "\nIDBObjectStore.prototype.put = () => { throw new DOMException('no room', 'QuotaExceededError'); };"


def test_a_full_storage_is_said(folder, serve_files, visit):
    here = visit(serve_files(folder), model=None)
    source = (folder / "store.js").read_text()
    changed = {"body": source + FULL, "content_type": "text/javascript"}
    here.page.context.route("**/store.js", lambda route: route.fulfill(**changed))
    here.page.evaluate("navigator.serviceWorker.ready.then((own) => own.unregister())")  # it has the file as it was
    here.page.reload()
    expect(here["model"]).to_have_text("tiny")
    here.settings(**GREEDY)
    assert here.say("Hello")
    here["name"].fill("much")
    here.page.keyboard.press("Enter")
    expect(here["error"]).to_contain_text("storage is full")
    assert here.say("And then?")


def test_a_browser_without_simd_is_told(folder, serve_files, visit):
    here = visit(serve_files(folder), model=None)
    here.page.add_init_script("WebAssembly.validate = () => false")
    here.page.reload()
    expect(here["error"]).to_contain_text("no WebAssembly with SIMD")


WORDS_OF_DAMAGE = {
    "cut": "it was cut short",
    "gone": "cannot be fetched (404)",
    "changed": "is not a complete safetensors file",
}


@pytest.mark.parametrize("damage", WORDS_OF_DAMAGE)
def test_a_folder_that_is_not_whole_is_told(damage, tmp_path, serve_files, visit):
    folder = exported(tmp_path / "damaged")
    weights = folder / "model" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(bytes(weights.stat().st_size))
    here = visit(serve_files(folder), model=None)
    expect(here["error"]).to_contain_text(WORDS_OF_DAMAGE[damage])


def test_on_a_phones_screen_everything_is_within_reach(folder, serve_files, visit):
    here = visit(serve_files(folder), model="tiny", viewport=PHONE, has_touch=True)
    here.settings(**GREEDY)
    here.say("averylongwordwithoutanyspaces" * 5)
    here["more"].click()
    here["name"].fill("phone")
    here.page.keyboard.press("Enter")
    expect(here.page.get_by_role("button", name="Continue from phone")).to_be_visible()
    assert here.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_what_is_downloaded_stays_small(folder):
    """Bounds: 320 kB for an engine, of which a browser takes one, and 400 kB with the page, all but the model."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    engines = [sizes.pop(engine) for engine in ENGINES]
    assert max(engines) < 320_000 and max(engines) + sum(sizes.values()) < 400_000
    description = json.loads((folder / "model.json").read_text())
    assert description["fingerprint"] == fingerprint(load(folder / "model")[0])
    assert (folder / "model" / TEMPLATE).read_text() == TURNS
    everything = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert everything - {"model.json", f"model/{TEMPLATE}"} == {*description["page"], *description["files"]}


def test_a_template_that_only_python_can_follow_leaves_writing_on(tmp_path):
    (tmp_path / TEMPLATE).write_text("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}")
    assert chat_pieces(load_template(tmp_path, ByteTokenizer())) is None
