"""`retentive.generate` and `retentive.stream_generate`: the library's own tokens as text, without the prompt."""

import copy
import inspect
from dataclasses import fields

import pytest
import torch

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams, write_on
from retentive.infer.memory import save
from retentive.infer.writing import TEXT
from retentive.models import build, retnet
from retentive.native import with_engine
from tests.infer.memories import remember

PROMPT = "The café "


@pytest.fixture
def model():
    out = build(retnet(vocab_size=257, dim=32, layers=2, heads=2)).eval()
    for p in out.parameters():  # peaked enough that greedy choices are no ties
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


def expected(model, tokenizer, params: SamplingParams, prompt: str = PROMPT, **how) -> str:
    return "".join(write_on(model, tokenizer, prompt, params, max_tokens=30, **how))[len(prompt) :]


SAMPLING = {
    "default": {"seed": 3},
    "greedy": {"temperature": 0},
    "filtered": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 5},
    "biased": {"bias": {101: 5.0}, "seed": 1},
}


@pytest.mark.parametrize("case", SAMPLING)
def test_the_text_is_that_of_the_tokens(case, model, tokenizer):
    params = SamplingParams(**{"temperature": 0.8, "top_p": 0.95, **SAMPLING[case]})
    text = retentive.generate(model, tokenizer, PROMPT, max_tokens=30, **SAMPLING[case])
    assert text == expected(model, tokenizer, params) and len(text) > 9
    pieces = list(retentive.stream_generate(model, tokenizer, PROMPT, max_tokens=30, **SAMPLING[case]))
    assert "".join(pieces) == text and len(pieces) > 5


def test_other_ways_of_finding_the_likeliest_text(model, tokenizer):
    greedy = retentive.generate(model, tokenizer, PROMPT, max_tokens=30, temperature=0)
    for how in ({"lookup": True}, {"draft": model}):
        assert retentive.generate(model, tokenizer, PROMPT, max_tokens=30, temperature=0, **how) == greedy
    assert retentive.generate(model, tokenizer, PROMPT, max_tokens=30, beams=1) == greedy


def test_it_goes_on_from_a_memory_as_often_as_asked(model, tokenizer, tmp_path):
    memory = remember(model, [256, *tokenizer.encode("Once upon ")])
    save(memory, tmp_path / "a.mem")
    want = retentive.generate(model, tokenizer, "Once upon a time", max_tokens=20, temperature=0)
    for past in (memory, memory, tmp_path / "a.mem", str(tmp_path / "a.mem")):
        assert retentive.generate(model, tokenizer, "a time", max_tokens=20, temperature=0, memory=past) == want


def test_it_ends_at_a_stop_string(model, tokenizer):
    whole = retentive.generate(model, tokenizer, PROMPT, max_tokens=30, temperature=0)
    stop = whole[10:12]
    for stops in ([stop], (stop, "never"), stop):  # a string is one stop, not its characters
        text = retentive.generate(model, tokenizer, PROMPT, max_tokens=30, temperature=0, stop=stops)
        assert text == whole[: whole.index(stop)]


def test_every_field_of_the_sampling_is_an_option(model):
    options = inspect.signature(retentive.stream_generate).parameters
    for f in fields(SamplingParams):
        assert options[f.name].default == (getattr(TEXT, f.name) or None if f.name == "bias" else getattr(TEXT, f.name))


REFUSED = {
    "max-tokens": ({"max_tokens": 0}, "`max_tokens=0`: must be at least 1"),
    "temperature": ({"temperature": -1}, "`temperature=-1`: must be at least 0"),
    "seed": ({"seed": 2**70}, f"`seed={2**70}`: must be from -2^63 to 2^63 - 1"),
    "two-ways": ({"beams": 2, "lookup": True}, "`beams`, `lookup` and `draft` exclude each other"),
    "negative-beams": ({"beams": -1}, "`beams=-1`: must be at least 1, or 0 to sample"),
    "sampled-beams": ({"beams": 2, "top_p": 0.5}, "`beams` looks for the likeliest text"),
    "bias": ({"bias": {99999: 1.0}}, "expected token ids from 0 to 256, got [99999]"),
    "empty-stop": ({"stop": ["a", ""]}, "a stop string must not be empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_be_used(case, model, tokenizer, refuses):
    """Errors are raised at the call, not at the first piece."""
    options, words = REFUSED[case]
    with refuses(words):
        retentive.stream_generate(model, tokenizer, PROMPT, **options)


WRONG = {
    "prompt-number": ({"prompt": 5}, "prompt must be a string, got 5"),
    "model": ({"model": 1}, "model must be a model or its folder, got int"),
    "tokenizer": ({"tokenizer": "bytes"}, "tokenizer must be a tokenizer, as load_tokenizer('bytes') returns it"),
    "temperature": ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    "max-tokens": ({"max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5"),
    "top-k": ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
    "beams": ({"beams": "2"}, "beams must be a whole number, got '2'"),
    "seed": ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    "bias": ({"bias": {"a": 1.0}}, "a token of bias must be a whole number, got 'a'"),
    "stop": ({"stop": [1]}, "a stop string must be a string, got 1"),
    "no-stop": ({"stop": None}, "a stop string must be a string, got None"),
    "misspelt": ({"max_token": 2}, "generate has no option 'max_token': did you mean max_tokens?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_of_the_wrong_type(case, model, tokenizer, refuses):
    arguments, words = WRONG[case]
    with refuses(words, TypeError):
        retentive.generate(**{"model": model, "tokenizer": tokenizer, "prompt": PROMPT} | arguments)


def test_a_model_without_a_tokenizer(model, refuses):
    for given in ((model, None, PROMPT), (model,)):
        with refuses("`tokenizer` is needed beside a model: name one, as load_tokenizer('bytes')"):
            retentive.generate(*given)


def test_a_folder_in_place_of_a_model(model, tokenizer, tmp_path, refuses):
    run, bare = tmp_path / "run", tmp_path / "bare"
    save_model(run, model, tokenizer)
    save_model(bare, model)
    how = {"max_tokens": 30, "temperature": 0}
    want = retentive.generate(model, tokenizer, PROMPT, **how)
    for place in (run, str(run), ModelFolder.open(run)):
        assert retentive.generate(place, prompt=PROMPT, **how) == want
        assert retentive.generate(place, None, PROMPT, **how) == want
        assert "".join(retentive.stream_generate(place, prompt=PROMPT, **how)) == want
    assert all(retentive.generate(bare, name, PROMPT, **how) == want for name in ("bytes", tokenizer))
    with refuses(f"{bare} has no tokenizer.json: name one as `tokenizer` (bytes, or a file)"):
        retentive.generate(bare, prompt=PROMPT)
    with refuses("or a .tiktoken file; a text to continue is given as `prompt`", FileNotFoundError):
        retentive.generate(run, "Once upon")
    with refuses("no model folder at nowhere", FileNotFoundError):
        retentive.generate("nowhere")


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0}, {"beams": 2}, {"lookup": True}, {"draft": True}],
    ids=lambda how: "".join(how) or "-",
)
def test_weights_of_nan_write_nothing(how, model, tokenizer, refuses):
    with torch.no_grad():
        model.blocks[0].retention.k_proj.weight.fill_(float("nan"))
    how = {"draft": model} if "draft" in how else how
    with refuses("the model's logits are not finite", ArithmeticError):
        retentive.generate(model, tokenizer, PROMPT, **how)


def test_an_endless_temperature_picks_all_tokens_alike(model, tokenizer):
    """All allowed tokens are equally likely: the first one after "The" must begin with its last letter."""
    assert retentive.generate(model, tokenizer, "The", temperature=1e308, top_p=1.0, seed=0, max_tokens=40)


def test_a_model_in_memory_is_as_good_as_its_folder(tmp_path):
    """It has the chat template and the sampling of its folder, and the engine that the folder's model would have."""
    pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")
    model = build(retnet(vocab_size=257, dim=32, layers=1, heads=2))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
    save_model(tmp_path / "own", model, ByteTokenizer(), template=template)
    (tmp_path / "own" / "generation_config.json").write_text('{"temperature": 0.3}')
    loaded, tokenizer = retentive.load(tmp_path / "own")
    said = [{"role": "user", "content": "Who?"}]
    how = dict(prompt=said, temperature=0, max_tokens=8)
    assert retentive.generate(loaded, tokenizer, **how) == retentive.generate(tmp_path / "own", **how)
    with retentive.chat(loaded, tokenizer) as chat:
        assert chat.conversation.template.source == template and chat.sampling.temperature == 0.3
        assert type(chat.engine.model) is type(with_engine(loaded))  # in C, if that is here
    assert copy.deepcopy(loaded).origin == loaded.origin
    native = with_engine(loaded)
    assert with_engine(native) is native and retentive.generate(native, tokenizer, **how)


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_the_engine_may_be_chosen(engine, model, tokenizer, monkeypatch):
    made = []
    monkeypatch.setattr("retentive.infer.writing.with_engine", lambda model, engine: made.append(engine) or model)
    retentive.generate(model, tokenizer, "a", max_tokens=1, engine=engine)
    retentive.generate(model, tokenizer, ["a", "b"], max_tokens=1, engine=engine)
    assert made == [engine] * 2
