"""The same C without Python: on this machine, for aarch64 under qemu and for WebAssembly under Node, against torch."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retentive.checkpoint import load, save_model
from retentive.checkpoint.quantize import quantize
from retentive.data.tokenizer import BPETokenizer, ByteTokenizer, train_bpe
from retentive.files import load_tensors
from retentive.infer.memory import ABOUT, blank, load_memory, save, tensors
from retentive.models import ARCHITECTURES, build, load_state, retnet, transformer
from retentive.native import NativeModel
from retentive.native.library import FOLDER, OPS, library
from retentive.ops.compiler import FLAGS, LINK, NotBuilt
from retentive.ops.rotary import Scaling
from tests.configs import changed as config_with
from tests.configs import hybrid, on_levels, stacked

HERE = Path(__file__).parent
ZIG = [sys.executable, "-m", "ziglang", "cc"]
NODE = ["node", "--no-warnings", str(HERE / "run_wasi.mjs")]
ARM = [*ZIG, "-target", "aarch64-linux-musl"]
TARGETS = {
    "native": (["gcc"], ["-march=native"], LINK, []),
    "aarch64": (ARM, [], ["-static", *LINK], ["qemu-aarch64"]),
    "dotprod": (ARM, ["-mcpu=generic+dotprod"], ["-static", *LINK], ["qemu-aarch64"]),
    "i8mm": (ARM, ["-mcpu=generic+dotprod+i8mm"], ["-static", *LINK], ["qemu-aarch64"]),
    "wasm": ([*ZIG, "-target", "wasm32-wasi"], ["-msimd128"], ["-lm"], NODE),
}
"""Targets: the compiler, its flags, the linker's flags, and the command that runs the program."""
CROSS = [target for target, (compiler, *_) in TARGETS.items() if compiler[0] == ZIG[0]]
"""Slow: ziglang compiles a C library too, for each kind of CPU and of optimisation that it links for."""
INCLUDE = [f"-I{FOLDER}", f"-I{OPS}", "-Wno-unknown-pragmas"]
RETENTIVE = FOLDER / "retentive.c"
TEXT = "It's the 5th of 1990's days, isn't it?  We'll see:\n\n\tnaïve «été» — 東京 don't end "
OLD = HERE.parent / "checkpoint" / "fixtures" / "v0.1.0"
SMALL = dict(vocab_size=257, dim=48, layers=2, heads=2)
RETNETS = {
    "float32": {},
    "bfloat16": {},
    "int8": {},
    "int4": dict(ffn_dim=50),
    "joint-norm": dict(head_norm=True, head_norm_affine=True, head_norm_joint=True, kv_heads=1),
    "levels-int4": dict(dim=64, tie_embeddings=True),
    "paper": ARCHITECTURES["retnet-paper"],
    "fla": ARCHITECTURES["fla"],
    "biases": dict(decay_bias=True, qk_bias=True, rotary="half", heads=4, kv_heads=2, tie_embeddings=True),
    "sigmoid-decay": dict(decay="sigmoid", decay_bias=True, rotary="none", gate_activation="sigmoid"),
    "plain": dict(gate=False, ffn_gate=False, activation="gelu", final_norm=False, decay="lm", qk_norm=False),
    "own-decays": dict(decay=(-0.3, 0.0), embed_norm=True, embed_scale=True, rotary="none", gate_activation="sigmoid"),
    "convolution": dict(convolution=3),
}
TRANSFORMERS = {
    "transformer": {},
    "transformer-bfloat16": dict(heads=4, kv_heads=2, qk_norm=True),
    "transformer-int4": dict(ffn_dim=50, head_dim=20, tie_embeddings=True),
    "forget-gate": dict(forget_gate=True, rotary="none"),
    "qkv-bias": dict(qkv_bias=True, heads=6, kv_heads=3, head_dim=10),
    "qkv-bias-int8": dict(qkv_bias=True, forget_gate=True),
    "window": dict(attention_window=9, rotary="interleaved", rotary_base=500_000.0),
    "window-gate": dict(attention_window=20, forget_gate=True),
    "sinks": dict(attention_window=6, attention_sinks=3),
    "output-gate": dict(output_gate=True, position_scale=9.0, heads=6, kv_heads=3, head_dim=10),
    "convolution-bfloat16": dict(convolution=2, attention_window=9),
}
HYBRIDS = {
    "hybrid": dict(attention=(0,), decay="lm", score_norm=True),
    "hybrid-int8": dict(layers=4, attention_every=2, attention_window=40),
    "hybrid-convolution-int4": dict(
        layers=4, attention_every=2, attention_window=9, attention_forget=True, convolution=4
    ),
}
MODELS = {
    name: make(**SMALL | fields)
    for make, models in ((retnet, RETNETS), (transformer, TRANSFORMERS), (hybrid, HYBRIDS))
    for name, fields in models.items()
}
MODELS["stacked"] = stacked(MODELS["hybrid-int8"])

WIDE_HEADS = transformer(**SMALL | dict(heads=1, layers=3))
MODELS["slower-angles"] = config_with(WIDE_HEADS, rotary_scaling=Scaling(8.0, 1.0, 4.0, 16))
MODELS["slower-angles-in-some"] = replace(  # turns that are shared by two layers of three
    WIDE_HEADS, blocks=(*WIDE_HEADS.blocks[:2], config_with(WIDE_HEADS, rotary_scaling=Scaling(4.0)).blocks[0])
)
MODELS["moving-sinks"] = config_with(MODELS["sinks"], moving_sinks=True)


@pytest.fixture(scope="session")
def programs(once):
    """`programs(target, sources)`: the command that runs these there (logits.c). Each file is compiled once for all
    workers."""

    def program(target, sources=(HERE / "logits.c", RETENTIVE)):
        compiler, flags, link, run = TARGETS[target]
        missing = [name for name in [compiler[0], *run[:1]] if not shutil.which(name)]
        if target in CROSS and not find_spec("ziglang"):
            missing = ["ziglang"]
        if missing:
            pytest.skip(f"needs {missing[0]}")

        def compiled(source):
            command = [*compiler, *FLAGS, *flags, *INCLUDE, "-c", source, "-o"]
            return once(f"{source.stem}-{target}.o", lambda file: subprocess.run([*command, file], check=True))

        def make(file):
            subprocess.run([*compiler, *FLAGS, *map(compiled, sources), "-o", file, *link], check=True)

        return [*run, str(once(f"{sources[0].stem}-{target}", make))]

    return program


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in CROSS else ()) for name in TARGETS])
def logits(request, programs):
    """`logits(folder, state, text, ids, bits)`: the lines that logits.c prints, by their first word."""
    command = programs(request.param)

    def run(folder, state, text, ids, bits=16):
        arguments, set_to = [str(folder), str(state), text, *map(str, ids)], os.environ | {"ACTIVATIONS": str(bits)}
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=set_to)
        found = {}
        for line in done.stdout.splitlines():
            name, _, rest = line.partition(" ")
            found[name] = rest if name in ("text", "error") else [float(x) for x in rest.split()]
        found["code"] = done.returncode
        return found

    return run


def folder_of(name, path, tokenizer):
    torch.manual_seed(3)
    model = build(replace(MODELS[name], vocab_size=tokenizer.vocab_size)).eval()
    how = name.rpartition("-")[2]
    model = on_levels(model) if name.startswith("levels") else model
    if how in ("int8", "int4"):
        model = quantize(model, int(how[3:]))
    elif how == "bfloat16":
        model = model.bfloat16()
    save_model(path, model, tokenizer)
    return load(path)[0]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["native", "aarch64"])
def test_threads_that_meet_when_it_is_least_convenient_go_on(target, programs):
    done = subprocess.run(programs(target, (HERE / "pool.c",)), capture_output=True, text=True, timeout=120)
    assert done.stdout == "400 20000\n"


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["16", "8"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_sums_of_integers_are_the_same_by_digits_and_by_blocks(name, bits, programs, tmp_path, monkeypatch):
    monkeypatch.setenv("ACTIVATIONS", bits)
    folder_of(name, tmp_path, ByteTokenizer())
    ids = map(str, torch.randint(257, (31,)).tolist())
    arguments = [str(tmp_path), str(tmp_path / "state.safetensors"), "", *ids]
    said = {t: subprocess.run([*programs(t), *arguments], capture_output=True, text=True) for t in ("dotprod", "i8mm")}
    assert said["dotprod"].returncode == 0
    assert said["dotprod"].stdout == said["i8mm"].stdout


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_states_are_those_of_torch(name, logits, tmp_path, same):
    model = folder_of(name, tmp_path, ByteTokenizer())
    ids = torch.randint(257, (1, 31))
    found = logits(tmp_path, tmp_path / "state.safetensors", "", ids[0].tolist())
    assert found["code"] == 0, found
    low = model.dtype == torch.bfloat16
    exact, state = model.float()(ids)
    close = 0.03 if low else 1e-4
    same(torch.tensor(found["read"]), exact[0, 14], close)
    same(torch.tensor(found["decoded"]), exact[0, 30], close)
    same(torch.tensor(found["copied"]), torch.tensor(found["decoded"]), 0)
    kept = load_state(tmp_path / "state.safetensors")
    assert kept.position.tolist() == [31] and kept.windows == model.config.windows
    same([x.float() for x in kept.named().values()], list(state.named().values()), close)


@torch.no_grad()
@pytest.mark.skipif(isinstance(library(), NotBuilt), reason=str(library()))
@pytest.mark.parametrize("name", ["int8", "levels-int4", "hybrid-int8"])
def test_activations_of_8_bits_are_those_of_python(name, logits, tmp_path, same):
    model = NativeModel(folder_of(name, tmp_path, ByteTokenizer()), activations="int8")
    ids = torch.randint(257, (1, 31))
    found = {bits: logits(tmp_path, tmp_path / f"{bits}.safetensors", "", ids[0].tolist(), bits) for bits in (8, 16, 7)}
    want, state = model(ids[:, :15])
    for n in range(15, 31):
        want, state = model(ids[:, n : n + 1], state)
    same(torch.tensor(found[8]["decoded"]), want[0, 0], 0.03)  # a number may be rounded to its other neighbour of 127
    assert found[8]["decoded"] != found[16]["decoded"]
    assert found[7] == {"code": 7}


OLD_NAMES = [file.stem for file in sorted(OLD.glob("*.expected")) if file.stem != "adapter"]


@pytest.mark.parametrize("name", OLD_NAMES)
def test_folders_and_states_of_version_0_1_0_are_read(name, programs, same):
    expected, _ = load_tensors(OLD / f"{name}.expected")
    (program,) = programs("native", (HERE / "after.c", RETENTIVE))
    ids, close = expected["ids"][0].tolist(), 1e-4 if "int4" not in name else 0.05
    for kept in (f"{name}.state", f"{name}.memory", "none"):
        has = (OLD / kept).is_file()
        command = [program, str(OLD / name), str(OLD / kept) if has else "", *map(str, ids[11:] if has else ids)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        same(torch.tensor([float(x) for x in done.stdout.split()]), expected["logits"][0, -1], close)


def test_text_is_split_as_the_tokenizer_splits_it(logits, tmp_path):
    words = "the days of it isn't don't we'll see 1990 été naïve 東京 — « » end\n\n\t" * 20
    tokenizer = train_bpe([words, TEXT], 400)
    assert isinstance(tokenizer, BPETokenizer)
    folder_of("int4", tmp_path, tokenizer)
    found = logits(tmp_path, tmp_path / "state.safetensors", TEXT.replace("\n", " "), [1, 2])
    assert [int(x) for x in found["ids"]] == tokenizer.encode(TEXT.replace("\n", " "))
    assert found["text"] == TEXT.replace("\n", " ")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def changed(folder, changes=(), mixer=(), **fields):
    """Change the folder's model: other tensors, or other fields of its mixers or of the whole model."""
    tensors = load_file(folder / "model.safetensors")
    save_file(  # without a checksum, as foreign tools do
        {name: x for name, x in ({**tensors, **dict(changes)}).items() if x is not None}, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= fields
    config["config"]["blocks"][0]["mixer"] |= dict(mixer)
    (folder / "config.json").write_text(json.dumps(config))


def flipped(path):
    """Flip a bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)


def without_sum(path):
    save_file(load_file(path), path)
    cut(path)


HALF = "blocks.0.retention_norm.weight"
PROJ = "blocks.1.ffn.down_proj.weight"
DAMAGES = {
    "no-folder": (lambda folder: shutil.rmtree(folder), "config.json cannot be read"),
    "no-json": (lambda folder: (folder / "config.json").write_text('{"format": '), "config.json is not JSON"),
    "cut-short": (
        lambda folder: cut(folder / "model.safetensors"),
        "model.safetensors is damaged: its bytes are not those",
    ),
    "flipped": (
        lambda folder: flipped(folder / "model.safetensors"),
        "model.safetensors is damaged: its bytes are not",
    ),
    "cut-short, no sum": (
        lambda folder: without_sum(folder / "model.safetensors"),
        "model.safetensors does not fit config.json: ",
    ),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is not a complete safetensors file"),
    "no-head": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        "is not a complete safetensors file",
    ),
    "foreign": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        "is none of this package's",
    ),
    "no-floats": (
        lambda folder: changed(folder, {HALF: torch.ones(48, dtype=torch.int8)}),
        f"{HALF} is I8: expected floats",
    ),
    "half-a-head": (lambda folder: changed(folder, dim=48.5), "config.json: dim is no whole number"),
    "uneven-heads": (lambda folder: changed(folder, mixer={"key_dim": 49}), "config.json describes no model"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 10000), "config.json is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage, programs, tmp_path):
    folder_of("int4", tmp_path / "model", ByteTokenizer())
    change, words = DAMAGES[damage]
    change(tmp_path / "model")
    command = [*programs("native"), str(tmp_path / "model"), "state", "", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout.startswith("error ") and words in done.stdout


TAPS = "blocks.0.convolution.weight"
BAD_TAPS = {
    "too-many": (dict(mixer={"taps": 65}), "config.json describes no model"),
    "none": (dict(mixer={"taps": 1}), "config.json describes no model"),
    "half": (dict(mixer={"taps": 2.5}), "config.json: taps is no whole number"),
    "missing": (dict(mixer={"taps": None}), "config.json has no such number as taps"),
    "another-width": (dict(mixer={"dim": 64}), "config.json describes no model"),
    "others": (dict(mixer={"taps": 4}), f"model.safetensors does not fit config.json: {TAPS}"),
    "turned": (dict(changes={TAPS: torch.ones(48, 3)}), f"model.safetensors does not fit config.json: {TAPS}"),
    "integers": (dict(changes={TAPS: torch.ones(3, 48, dtype=torch.int8)}), f"{TAPS} is I8: expected floats"),
    "no-weight": (dict(changes={TAPS: None}), f"model.safetensors has no {TAPS}"),
}


@pytest.mark.parametrize("bad", BAD_TAPS)
def test_damaged_convolutions_are_refused(bad, programs, tmp_path):
    folder_of("convolution", tmp_path, ByteTokenizer())
    change, words = BAD_TAPS[bad]
    changed(tmp_path, **change)
    command = [*programs("native"), str(tmp_path), "state", "", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout.startswith("error ") and words in done.stdout


def test_matrices_of_two_dtypes_are_refused(programs, tmp_path):
    folder_of("float32", tmp_path, ByteTokenizer())
    name = "blocks.0.retention.q_proj.weight"
    changed(tmp_path, {name: load_file(tmp_path / "model.safetensors")[name].bfloat16()})
    command = [*programs("native"), str(tmp_path), "state", "", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is F32, others are BF16: one dtype is needed" in done.stdout


def test_a_memory_is_not_replaced_by_a_bare_state(programs, tmp_path):
    folder_of("float32", tmp_path, ByteTokenizer())
    memory = tmp_path / "library.mem"
    state = build(retnet(**SMALL)).init_state(1)
    save_file(state.named(), memory, {"format": "retentive-state-1", "kind": "retention", "memory": "{}"})
    before = memory.read_bytes()
    done = subprocess.run(
        [*programs("native"), str(tmp_path), str(memory), "", "1", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "holds a memory, which says more than a state" in done.stdout
    assert memory.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["float32", "transformer-bfloat16", "window-gate", "sinks", "hybrid", "hybrid-convolution-int4"]
)
@pytest.mark.parametrize("length", [9, 30])
def test_memories_are_exchanged_with_python_and_damage_is_found(name, length, programs, tmp_path):
    """The digest equals hashlib's: each accepts the other's memories, and both refuse changed ones."""
    model = folder_of(name, tmp_path / "model", ByteTokenizer())
    memory = blank(model)
    memory.state, memory.tokens = model(torch.randint(257, (1, length)))[1], length
    memory.sources = [{"name": 'a "b"\\\n\u00e9', "tokens": 9, "sha256": ""}]
    save(memory, tmp_path / "written")
    (program,) = programs("native", (HERE / "memory.c", RETENTIVE))
    about = json.dumps({name: getattr(memory, name) for name in ABOUT})
    command = [program, str(tmp_path / "model"), str(tmp_path / "written")]
    subprocess.run([*command, str(tmp_path / "again"), about], check=True)
    again = load_memory(tmp_path / "again", model)
    assert again.sources == memory.sources and again.tokens == length
    assert all(torch.equal(a, b) for a, b in zip(tensors(again.state), tensors(memory.state), strict=True))
    data = bytearray((tmp_path / "written").read_bytes())
    data[-1] ^= 1
    (tmp_path / "written").write_bytes(data)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "was changed after it was written" in done.stdout


def test_a_state_of_another_model_is_refused(programs, tmp_path):
    for name, kind in (("one", "int4"), ("two", "window")):
        folder_of(kind, tmp_path / name, ByteTokenizer())
    state = tmp_path / "state.safetensors"
    build(retnet(**SMALL | dict(layers=3))).init_state(1).save(state)
    others = {
        "other-window": transformer(**SMALL, attention_window=8),
        "no-window": transformer(**SMALL),
        "sinks": transformer(**SMALL, attention_window=7, attention_sinks=2),
        "gates": transformer(**SMALL, attention_window=9, forget_gate=True),
        "retention": MODELS["int4"],
        "convolutions": transformer(**SMALL, convolution=4),
    }
    for name, config in others.items():
        build(config)(torch.tensor([[1, 2]]))[1].save(tmp_path / name)
    (program,) = programs("native", (HERE / "load.c", RETENTIVE))
    (tmp_path / "junk").write_bytes(b"no state")
    paths = [str(state), str(tmp_path / "junk"), str(tmp_path / "one" / "model.safetensors"), str(tmp_path / "none")]
    done = subprocess.run([program, str(tmp_path / "one"), *paths], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{state} holds no state of one sequence of this model",
        f"{tmp_path / 'junk'} is not a complete safetensors file",
        f"{tmp_path / 'one' / 'model.safetensors'} holds no state of one sequence of this model",
        f"{tmp_path / 'none'} cannot be read",
    ]
    paths = [str(tmp_path / name) for name in others]
    done = subprocess.run([program, str(tmp_path / "two"), *paths], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{path} holds no state of one sequence of this model" for path in paths]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_the_example_is_built_by_cmake_and_writes_what_torch_writes(tmp_path):
    from retentive.infer import SamplingParams
    from retentive.infer.generate import generate

    source = str(FOLDER.parent)
    subprocess.run(
        ["cmake", "-B", str(tmp_path / "build"), source, "-DINSTRUCTIONS=-O1"], check=True, capture_output=True
    )
    subprocess.run(["cmake", "--build", str(tmp_path / "build")], check=True, capture_output=True)
    model = folder_of("float32", tmp_path / "model", ByteTokenizer())
    ids = [256, *b"Once"]
    tokens = generate(model, ids, SamplingParams(temperature=0.0), max_tokens=20, stop_ids=[256])
    want = b"Once" + bytes(token.id for token in tokens)
    command = [str(tmp_path / "build" / "write"), str(tmp_path / "model"), "-p", "Once", "-n", "20", "-t", "0"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == want + b"\n"


@pytest.mark.parametrize(
    "file", ["retentive/native/CMakeLists.txt", "examples/phone/ios/Package.swift", "docs/native.md"]
)
def test_every_build_has_the_flags_of_the_compiled_library(file):
    """-fPIC and the language are said in other words there."""
    text = (HERE.parents[1] / file).read_text(encoding="utf-8")
    assert [flag for flag in FLAGS if flag not in ("-fPIC", "-std=gnu11") and flag not in text] == []
