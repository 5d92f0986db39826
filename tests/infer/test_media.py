"""Pictures and sound read in chunks: the state of all at once, pictures never cut; what does not fit is refused."""

import numpy as np
import pytest
import torch

from retentive.data.media import Media
from retentive.infer import SamplingParams, generate
from retentive.infer.media import read, rows_of
from retentive.models import build, retnet, twin
from retentive.models.encoders import AudioConfig, ImageConfig, encoders_of, spliced, with_encoders

TINY = retnet(vocab_size=50, dim=32, layers=2, heads=2)
IMAGE = ImageConfig(token=50, size=8, patch=4, channels=1, dim=16, layers=1)
AUDIO = AudioConfig(token=51, mels=5, stack=2, dim=16)


def seeing(config=TINY):
    torch.manual_seed(0)
    model = with_encoders(build(config), {"image": IMAGE, "audio": AUDIO}).double().eval()
    for p in model.parameters():  # far from uniform: another state gives other tokens
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return model


def media():
    random = np.random.default_rng(0)
    return [
        Media("image", random.integers(0, 256, (4, 16), np.uint8)),
        Media("audio", random.standard_normal((7, 10)).astype(np.float16)),
        Media("image", random.integers(0, 256, (8, 16), np.uint8)),
    ]


IDS = [1, *[50] * 4, 2, *[51] * 7, 3, 4, *[50] * 8, 5, 6]


@pytest.mark.parametrize("config", [TINY, twin(TINY)], ids=["retnet", "twin"])
@pytest.mark.parametrize("chunk", [1, 3, 9, 4096])
@torch.no_grad()
def test_chunks_give_the_state_of_all_at_once(config, chunk, same):
    model, (a, b, c) = seeing(config), media()
    rows = rows_of([{"content": ["look", a, "and", b]}, {"content": "no"}, {"content": [c]}])
    assert np.array_equal(rows["image"], np.concatenate([a.rows, c.rows])) and np.array_equal(rows["audio"], b.rows)
    x = spliced(model, torch.tensor([IDS]), {kind: torch.from_numpy(each) for kind, each in rows.items()})
    want, _ = model(None, embeds=x)
    state = read(model, IDS[:-1], rows, chunk=chunk)
    logits, _ = model(torch.tensor([IDS[-1:]]), state)
    same(logits[0, -1], want[0, -1], 1e-10)
    # and on from there as from any text
    state = read(model, IDS[:-1], rows, chunk=chunk)
    tokens = [t.id for t in generate(model, IDS[-1:], SamplingParams(temperature=0), max_tokens=5, state=state)]
    assert tokens[0] == int(want[0, -1].argmax())
    other = read(model, IDS[:-1], {**rows, "audio": rows["audio"] + np.float16(1)}, chunk=chunk)
    assert (model(torch.tensor([IDS[-1:]]), other)[0] - logits).abs().max() > 1e-3


def test_what_does_not_fit(refuses):
    model = seeing()
    rows = rows_of([{"content": media()}])
    with refuses("4 placeholders of image and 12 rows: each takes one"):
        read(model, IDS[:6], {"image": rows["image"]})
    with refuses("the model has no encoder for audio: it was trained without any"):
        read(build(TINY), IDS, rows)
    with refuses("nothing to read"):
        read(model, [], {})
    assert rows_of([{"content": "text"}]) == {} and len(encoders_of(model)) == 2
