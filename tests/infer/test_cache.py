"""The prefix cache against reading anew: the same states, within its bounds, even if files are damaged or lost."""

import random
import threading
from pathlib import Path

import pytest
import torch

from retentive.infer import SamplingParams, generate
from retentive.infer import cache as module
from retentive.infer.cache import PrefixCache, prefix_hashes
from retentive.infer.engine import Engine
from retentive.infer.memory import fingerprint
from retentive.models import build, retnet, twin
from tests.infer.kinds import kinds

CONFIG = retnet(vocab_size=61, dim=32, layers=2, heads=2)
MODELS = kinds(CONFIG)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(params=MODELS)
def model(request):
    out = build(MODELS[request.param]).eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


@torch.no_grad()
def read(model, ids):
    return model.hidden(torch.tensor([ids]))[1]


def tensors(state) -> list[torch.Tensor]:
    return [*state.named().values(), state.position]


def prefix(n: int, length: int = 8) -> list[int]:
    return [n, *range(1, length)]


def test_hashes_of_prefixes():
    rng = random.Random(0)
    ids = [rng.randrange(1 << 40) for _ in range(50)]
    found = prefix_hashes(ids, [1, 2, 17, 50])
    assert found == [prefix_hashes(ids[:n], [n])[0] for n in (1, 2, 17, 50)]
    assert len({name for _, name in found} | {prefix_hashes(ids[::-1], [50])[0][1]}) == 5


def test_the_longest_prefix_comes_back_as_it_was(model, same):
    cache, ids = PrefixCache(1 << 20), list(range(20))
    for n in (3, 7, 20):
        cache.store(ids[:n], read(model, ids[:n]))
    for asked, length in ((ids, 7), ([*ids, 1], 20), (ids[:3], 0), ([*ids[:5], 9, 9, 9], 3), ([5, 6], 0)):
        found, state = cache.longest(asked)
        assert found == length
        if length:
            same(tensors(state), tensors(read(model, ids[:length])), 0)
    assert (cache.hits, cache.misses) == (3, 2)


def test_what_is_kept_is_a_copy(model, same):
    cache, state = PrefixCache(1 << 20), read(model, [1, 2, 3])
    cache.store([1, 2, 3], state)
    want = tensors(state.clone())
    for x in tensors(state):
        x.zero_()
    for x in tensors(cache.longest([1, 2, 3, 4])[1]):
        x.zero_()
    same(tensors(cache.longest([1, 2, 3, 4])[1]), want, 0)


def test_the_least_recently_used_goes_first(model):
    size = read(model, prefix(0)).nbytes
    cache = PrefixCache(2 * size)
    for n in range(2):
        cache.store(prefix(n), read(model, prefix(n)))
    assert cache.longest([*prefix(0), 0])[0] == 8
    cache.store(prefix(2), read(model, prefix(2)))  # in place of 1
    assert [cache.longest([*prefix(n), 0])[0] for n in range(3)] == [8, 0, 8]
    cache.store(prefix(0), read(model, prefix(0)))  # used again, not kept twice
    assert cache.nbytes == 2 * size == sum(s.nbytes for _, s in cache.states.values())
    cache.store(prefix(3), read(model, prefix(3)))
    assert [cache.longest([*prefix(n), 0])[0] for n in range(4)] == [8, 0, 0, 8]


def test_a_state_larger_than_all_the_room_is_not_kept(model):
    cache = PrefixCache(read(model, prefix(0)).nbytes - 1)
    cache.store(prefix(0), read(model, prefix(0)))
    assert cache.longest([*prefix(0), 0]) == (0, None) and cache.nbytes == 0


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_hit_gives_the_tokens_of_a_miss(model, on_disk, tmp_path):
    """Prompts repeat, then continue, then continue after their replies; the bound holds about two states."""
    rng = random.Random(0)
    common = [rng.randrange(61) for _ in range(40)]
    prompts = [[*common[: rng.choice([8, 21, 40])], *(rng.randrange(61) for _ in range(9))] for _ in range(8)]
    prompts += [[*p, 5, 6] for p in prompts[:4]]
    bound = 3 * read(model, common).nbytes if on_disk else 1 << 24
    more = {"folder": tmp_path, "model": fingerprint(model)} if on_disk else {}
    cache = PrefixCache(bound, every=8, **more)
    engine = Engine(model, slots=3, prefill_chunk=16, cache=cache)
    for _ in range(2):
        for ids in prompts:
            (stream,) = engine.submit(ids, GREEDY, max_tokens=7)
            while engine.step():
                pass
            reply = [t.id for t in stream]
            assert reply == [t.id for t in generate(model, ids, GREEDY, max_tokens=7)]
    assert stream.cached >= len(prompts[-1]) - 1 - (8 if on_disk else 0)
    (stream,) = engine.submit([*prompts[-1], *reply, 3], GREEDY, max_tokens=3)  # the talk goes on
    while engine.step():
        pass
    assert stream.cached == len(prompts[-1]) + len(reply) - 1
    assert cache.nbytes <= bound
    assert not on_disk or cache.files


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def filled(model, folder, count=4, **more) -> PrefixCache:
    """A cache with room for one state in memory, and the others on disk."""
    cache = PrefixCache(read(model, prefix(0)).nbytes, folder=folder, model=fingerprint(model), **more)
    for n in range(count):
        cache.store(prefix(n), read(model, prefix(n)))
    return cache


def test_what_memory_has_no_room_for_goes_to_disk_and_comes_back(model, folder, same):
    cache = filled(model, folder)
    assert len(cache.files) == 3 == len(list(folder.iterdir()))
    for n in (0, 3, 1, 2, 0):
        length, state = cache.longest([*prefix(n), 0])
        assert length == 8
        same(tensors(state), tensors(read(model, prefix(n))), 0)
    assert cache.nbytes <= cache.most_bytes and len(cache.states) == 1
    assert cache.nbytes_on_disk == sum(f.stat().st_size for f in folder.iterdir())


def test_another_process_finds_the_files(model, folder, same):
    filled(model, folder)
    other = PrefixCache(1 << 20, folder=folder, model=fingerprint(model))
    length, state = other.longest([*prefix(1), 0])
    assert length == 8
    same(tensors(state), tensors(read(model, prefix(1))), 0)
    assert other.longest([*prefix(3), 0])[0] == 0, "that one was in memory"


def test_the_bound_on_disk_holds_here_and_for_who_comes_after(model, folder):
    size = next(iter(filled(model, folder / "one", 2).files.values()))[1]
    cache = filled(model, folder, 6, most_bytes_on_disk=2 * size)
    assert len([f for f in folder.iterdir() if f.is_file()]) == len(cache.files) == 2
    assert list(cache.files) == [prefix_hashes(prefix(n), [8])[0][1] for n in (3, 4)]
    later = PrefixCache(1 << 20, folder=folder, model=fingerprint(model), most_bytes_on_disk=size)
    assert len([f for f in folder.iterdir() if f.is_file()]) == len(later.files) == 1
    nothing = filled(model, folder / "none", 3, most_bytes_on_disk=0)
    assert not nothing.files and nothing.nbytes_on_disk == 0 and not list((folder / "none").iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


DAMAGE = {"gone": Path.unlink, "truncated": truncate, "flipped": flip, "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_dropped(damage, model, folder):
    cache = filled(model, folder)
    path = folder / f"{prefix_hashes(prefix(1), [8])[0][1]}.safetensors"
    DAMAGE[damage](path)
    assert cache.longest([*prefix(1), 0]) == (0, None)
    assert not path.exists() and len(cache.files) == 2
    cache.store(prefix(1), read(model, prefix(1)))
    assert cache.longest([*prefix(1), 0])[0] == 8


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "flipped"])
def test_a_damaged_file_is_not_found_by_who_comes_after(damage, model, folder):
    filled(model, folder)
    DAMAGE[damage](folder / f"{prefix_hashes(prefix(1), [8])[0][1]}.safetensors")
    (folder / "other.safetensors").write_bytes(b"no such thing")
    assert len(PrefixCache(1 << 20, folder=folder, model=fingerprint(model)).files) == 2


def test_files_of_another_model_are_left_alone(model, folder):
    filled(model, folder)
    before = sorted(folder.iterdir())
    other = build(model.config).eval()
    cache = PrefixCache(1 << 20, folder=folder, model=fingerprint(other), most_bytes_on_disk=0)
    assert not cache.files and cache.longest([*prefix(1), 0]) == (0, None)
    assert sorted(folder.iterdir()) == before


def test_a_full_disk_costs_the_states_and_nothing_else(model, folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save", full)
    cache = filled(model, folder)
    assert not cache.files and cache.nbytes_on_disk == 0
    assert [cache.longest([*prefix(n), 0])[0] for n in range(4)] == [0, 0, 0, 8]


def test_threads_share_it(model, folder, same):
    """Eight threads, room for two states in memory and four on disk; every answer is right."""
    states = [read(model, prefix(n)) for n in range(12)]
    cache = filled(model, folder, 1, most_bytes_on_disk=4 * 12_000)
    cache.most_bytes *= 2
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                n = rng.randrange(12)
                if rng.random() < 0.5:
                    cache.store(prefix(n), states[n])
                length, state = cache.longest([*prefix(n), 0])
                if length:
                    same(tensors(state), tensors(states[n]), 0)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.nbytes == sum(s.nbytes for _, s in cache.states.values()) <= cache.most_bytes
    assert cache.nbytes_on_disk == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert cache.hits > 50


def test_bad_arguments(refuses, tmp_path):
    with refuses("most_bytes >= 0 and every >= 1"):
        PrefixCache(-1)
    with refuses("most_bytes >= 0 and every >= 1"):
        PrefixCache(1, every=0)
    with refuses("needs the model's fingerprint"):
        PrefixCache(1, folder=tmp_path)


def test_a_file_larger_than_memory_evicts_nobody(tmp_path):
    model, long, short = build(twin(CONFIG)).eval(), list(range(20)), prefix(1)
    states, name = {n: read(model, ids) for n, ids in (("long", long), ("short", short))}, fingerprint(model)
    cache = PrefixCache(states["long"].nbytes, folder=tmp_path, model=name)
    cache.store(long, states["long"])
    cache.store(short, states["short"])  # evicts the long one, to disk
    cache = PrefixCache(states["long"].nbytes - 1, folder=tmp_path, model=name)  # as after a restart with less memory
    cache.store(short, states["short"])
    assert cache.longest([*long, 1])[0] == 20
    assert [tokens for tokens, _ in cache.states.values()] == [len(short)]
