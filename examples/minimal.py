"""A Retentive Network in one file: it trains on the source of Python's own library, then writes Python.

    python examples/minimal.py      # needs only torch; a minute or two on two cores

From top to bottom: retention in two forms, the layer, the model, the training loop, and generation from a state of
constant size. It is the paper's architecture (`--model retnet-paper`) over bytes, with the package's parameter names;
tests/examples/test_minimal.py checks that both have the same losses. Source: Retentive Network, arXiv 2307.08621.

B rows, T tokens, H heads, K and V key and value dim of a head, D width, F feed-forward width, C tokens of a chunk.
"""

import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, LAYERS, D, H, K, V, FFN = 256, 4, 128, 4, 32, 56, 224  # tokens are bytes
BATCH, LENGTH, C, STEPS, WARMUP, LR = 8, 256, 64, 400, 50, 4e-3
# Each head forgets at its own rate, gamma from 1 - 1/32 to 1 - 1/512. Stored as float64 logarithms, since gamma^n of
# slow heads depends on the last digits of a number close to 1.
LOG_GAMMA = torch.log1p(-torch.linspace(math.log(1 / 32), math.log(1 / 512), H, dtype=torch.float64).exp())


def kept(steps, like):
    """gamma^steps, `[..., H]`: how much each head keeps of a token after that many steps."""
    return (steps[..., None] * LOG_GAMMA).exp().to(like.dtype)


def recurrent(q, k, v, S):
    """The definition: decay the state, add k v^T, read it with q. q, k [B,T,H,K], v [B,T,H,V], S [B,H,K,V]."""
    gamma, o = LOG_GAMMA.exp().to(q.dtype)[:, None, None], []
    for t in range(q.shape[1]):
        S = gamma * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(o, 1), S


def chunkwise(q, k, v, S):
    """The same numbers, suited to training: a masked product inside each chunk, and the state between chunks."""
    o = []
    for qc, kc, vc in zip(q.split(C, 1), k.split(C, 1), v.split(C, 1), strict=True):  # the last may be shorter
        n = torch.arange(qc.shape[1])
        ago = n[:, None] - n
        mask = kept(ago.clamp(min=0), q) * (ago >= 0)[..., None]  # clamped, since gamma^-1000 is inf and inf * 0 is nan
        scores = torch.einsum("bthk,bshk->btsh", qc, kc) * mask
        within = torch.einsum("btsh,bshv->bthv", scores, vc)
        before = torch.einsum("bthk,bhkv->bthv", qc * kept(n + 1, q)[..., None], S)
        o.append(within + before)
        written = torch.einsum("bshk,bshv->bhkv", kc * kept(n[-1] - n, k)[..., None], vc)
        S = kept(n[-1] + 1, q)[:, None, None] * S + written
    return torch.cat(o, 1), S


def rotate(x, position):
    """Rotates pairs of features by an angle times position, so that q_t . k_s depends only on the distance t - s."""
    angle = position[:, None] * 10000.0 ** -torch.linspace(0, 1, K // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle).to(x.dtype.to_complex())[:, None]  # [T,1,K/2]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Retention(nn.Module):
    """Gated multi-scale retention, equation 8 of the paper, in place of attention."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(D, H * K, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(D, H * V, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(H * V, D, bias=False)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(proj.weight, gain=2**-2.5)  # torchscale's choice
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)

    def forward(self, x, S, position, form):
        q, k, v = (proj(x).unflatten(-1, (H, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, position), rotate(k, position)
        total = (1 - kept(position + 1, LOG_GAMMA)) / (1 - LOG_GAMMA.exp())  # 1 + gamma + ... over the tokens so far
        q = q * (K * total).rsqrt().to(q.dtype)[..., None]  # brings early and late tokens to one scale
        o, S = form(q, k, v, S)
        o = F.rms_norm(o, (V,), eps=1e-6)  # one norm per head, in place of the softmax's denominator
        return self.out_proj(F.silu(self.g_proj(x)) * o.flatten(-2)), S


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D, FFN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(FFN, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.retention_norm, self.retention = nn.RMSNorm(D, eps=1e-6), Retention()
        self.ffn_norm, self.ffn = nn.RMSNorm(D, eps=1e-6), FeedForward()

    def forward(self, x, S, position, form):
        y, S = self.retention(self.retention_norm(x), S, position, form)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), S


class RetNet(nn.Module):
    """`logits, state = model(ids)`, and `model(more_ids, state)` continues from there, in either form."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(D, eps=1e-6), nn.Linear(D, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=D**-0.5)

    def forward(self, ids, state=None, form=chunkwise):
        x, after = self.embed(ids), []
        start, before = state or (0, [x.new_zeros(len(ids), H, K, V)] * LAYERS)  # a RetNet's whole memory
        position = start + torch.arange(ids.shape[1])
        for block, S in zip(self.blocks, before, strict=True):
            x, S = block(x, S, position, form)
            after.append(S)
        return self.head(self.norm(x)), (start + ids.shape[1], after)


def library():
    """Returns (training bytes, held-out bytes), int64: modules of Python's library, every tenth held out."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    modules = [path.read_bytes().replace(b"    ", b"\t") for path in paths]  # one byte per indent is easier to learn
    held_out = modules[::10]
    del modules[::10]
    return [torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long() for part in (modules, held_out)]


def loss_of(model, rows):
    """Returns the mean cross-entropy in nats over all tokens but each row's first."""
    logits, _ = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def adamw(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0)


def train_step(model, optimizer, rows, step):
    """One training step. The learning rate rises over WARMUP steps, then falls along a cosine to a tenth."""
    done = (step - WARMUP) / (STEPS - 1 - WARMUP)
    rate = (step + 1) / WARMUP if step < WARMUP else 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = LR * rate
    loss = loss_of(model, rows)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def write(model, prompt, count):
    """Returns the prompt with `count` more bytes: read in chunks, then generated step by step from the same state."""
    text = list(prompt.encode())
    logits, state = model(torch.tensor([text]))
    for _ in range(count):
        token = torch.multinomial((logits[:, -1] / 0.7).softmax(-1), 1)
        text.append(token.item())
        logits, state = model(token, state, form=recurrent)  # the millionth byte costs as much as this one
    return bytes(text).decode(errors="replace").expandtabs(4)


def main():
    torch.manual_seed(0)
    train, held_out = library()
    model = RetNet()
    optimizer = adamw(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} bytes to learn from")
    began = time.monotonic()
    for step in range(STEPS):
        starts = torch.randint(len(train) - LENGTH, (BATCH, 1))
        loss = train_step(model, optimizer, train[starts + torch.arange(LENGTH + 1)], step)
        if step % 50 == 49:
            print(f"step {step + 1:3}  {loss / math.log(2):.2f} bits per byte  {time.monotonic() - began:3.0f} s")
    with torch.no_grad():  # in one row, 256 times as long as in training, since any length works
        print(f"held out  {loss_of(model, held_out[None, : 256 * LENGTH + 1]).item() / math.log(2):.2f} bits per byte")
    print(write(model, "def ", 400))


if __name__ == "__main__":
    main()
