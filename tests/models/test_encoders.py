"""Encoders: embeddings replace exactly their placeholders, in order; each picture is encoded by itself."""

import pytest
import torch

from retentive.models import build, retnet, twin
from retentive.models.encoders import (
    AudioConfig,
    ImageConfig,
    ImageEncoder,
    configs_of,
    embedded,
    encoders_of,
    with_encoders,
)

TINY = retnet(vocab_size=50, dim=32, layers=2, heads=2)
IMAGE = ImageConfig(token=48, size=8, patch=4, channels=1, dim=16, layers=1)
AUDIO = AudioConfig(token=51, mels=5, stack=2, dim=16)


def seeing(config=TINY):
    torch.manual_seed(0)
    model = with_encoders(build(config), {"image": IMAGE, "audio": AUDIO}).double().eval()
    for encoder in encoders_of(model).values():  # as if trained: another picture is another embedding
        for p in encoder.parameters():
            torch.nn.init.normal_(p, std=0.5)
    return model


def pictures(n):
    return torch.randint(256, (n * IMAGE.tokens, IMAGE.features), dtype=torch.uint8)


@pytest.mark.parametrize("config", [TINY, twin(TINY)], ids=["retnet", "twin"])
@torch.no_grad()
def test_what_is_encoded_stands_where_its_placeholders_are(config, same):
    model, seen, heard = seeing(config), pictures(3), torch.randn(3, AUDIO.features)
    ids = torch.randint(48, (2, 20))
    ids[0, 3:11], ids[1, 5:9] = 48, 48  # two pictures, and one
    ids[0, 15], ids[1, :2] = 51, 51
    x = embedded(model, ids, {"image": seen, "audio": heard})
    text = ids < 48
    assert torch.equal(x[text], model.embed(ids[text]))
    of_pictures = model.encoders["image"](seen)
    same(x[0, 3:11], of_pictures[:8], 1e-12)
    same(x[1, 5:9], of_pictures[8:], 1e-12)
    same(x[1, :2], model.encoders["audio"](heard)[1:], 1e-12)
    # each picture by itself
    same(model.encoders["image"](seen[4:8]), of_pictures[4:8], 1e-12)
    assert (of_pictures[:4] - of_pictures[4:8]).abs().max() > 0.01
    # read in two parts, with the state in between, as at once
    logits, _ = model(None, embeds=x)
    first, state = model(None, embeds=x[:, :8])
    second, _ = model(None, state, embeds=x[:, 8:])
    same(torch.cat((first, second), 1), logits, 1e-12)


def test_gradients_reach_the_encoders():
    model = seeing().train()
    ids = torch.tensor([[1, 48, 48, 48, 48, 2, 51, 3]])
    x = embedded(model, ids, {"image": pictures(1), "audio": torch.randn(1, AUDIO.features)})
    model(None, embeds=x)[0].square().mean().backward()
    for encoder in encoders_of(model).values():
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_every_patch_is_seen_by_every_other():
    model = seeing()
    rows = pictures(1).double().requires_grad_()
    for n in range(IMAGE.tokens):
        (reached,) = torch.autograd.grad(model.encoders["image"](rows)[n].sum(), rows)
        assert (reached.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("stem", [0, 3])
def test_patches_are_cut_from_the_picture_after_the_stem(stem, same):
    """The encoder takes rows of patches, and convolutions see the picture that these were cut from."""
    torch.manual_seed(0)
    encoder = ImageEncoder(ImageConfig(token=0, size=12, patch=4, dim=16, layers=0, stem=stem), 8).double()
    pixels = torch.randint(256, (2, 12, 12, 3), dtype=torch.uint8)

    def cut(pictures):
        """[n, 12, 12, C] -> [n, 3, 3, 16 C], as multimodal.image.patches does."""
        return pictures.unflatten(2, (3, 4)).unflatten(1, (3, 4)).transpose(2, 3).flatten(3)

    rows = cut(pixels).flatten(0, 2)
    after = encoder.stem(pixels.double().permute(0, 3, 1, 2) / 127.5 - 1).permute(0, 2, 3, 1)
    same(encoder(rows), encoder.projector(encoder.in_proj(cut(after)) + encoder.place).flatten(0, 2), 1e-12)
    # what a patch is takes its neighbours in, two pixels of them
    reader = rows[:9].double().requires_grad_()
    (reached,) = torch.autograd.grad(encoder(reader)[0].sum(), reader)
    assert [bool(row.any()) for row in reached] == [True, stem > 0, False, stem > 0, stem > 0] + [False] * 4


def test_what_does_not_go_together(refuses):
    model, ids = seeing(), torch.tensor([[1, 48, 48, 48, 48, 2]])
    with refuses("4 placeholders of image and 8 rows: each takes one"):
        embedded(model, ids, {"image": pictures(2)})
    with refuses("4 placeholders of image and 0 rows"):
        embedded(model, ids, {"audio": torch.randn(0, AUDIO.features)})
    with refuses("the model has no encoder for image: it was trained without any"):
        embedded(build(TINY), ids, {"image": pictures(1)})
    with refuses("no encoder for 'video', expected one of image, audio"):
        with_encoders(build(TINY), {"video": IMAGE})
    with refuses("each kind must have a placeholder of its own, got [48, 48]"):
        with_encoders(build(TINY), {"image": IMAGE, "audio": AudioConfig(token=48)})
    with refuses("size 64 is not divisible by patch 7"):
        ImageConfig(token=1, patch=7)
    with refuses("size 100000 and patch 1 are 10,000,000,000 tokens"):
        ImageConfig(token=1, size=100_000, patch=1)
    with refuses("25 ms at 16,000 Hz tell 200 bands apart, got mels 4000"):
        AudioConfig(token=1, mels=4000)
    with refuses("channels must be 1 (grey) or 3 (colours), got 4"):
        ImageConfig(token=1, channels=4)
    with refuses("stem must be at least 0, got -1"):
        ImageConfig(token=1, stem=-1)
    with refuses("rate must be 1,000 to 399,999 samples a second, got 800"):
        AudioConfig(token=1, rate=800, hop=1, mels=8)
    with refuses("leaves gaps between frames"):
        AudioConfig(token=1, window=5)
    for how in ({"window": 100_000}, {"stack": 100_000}):
        with refuses("at most 1,000 ms, and 16,384 numbers a token"):
            AudioConfig(token=1, **how)
    assert embedded(model, ids, {}) is None and embedded(build(TINY), ids, None) is None  # the model reads the ids
    assert configs_of(build(TINY)) == {} and configs_of(model)["image"]["size"] == 8
