"""Encoders turn pictures and sound into embeddings that stand among those of a model's tokens.

    image    a square picture -> convolutions -> patches -> blocks of retention in both directions over their grid -> D
    audio    stacks of log-mel frames -> convolutions over their bands, each by itself -> D: sound of any length can be
             read in parts

A text has a placeholder token for each of these embeddings; `embedded` puts them in its place. What is encoded comes as
rows of numbers, a row for each placeholder (`retentive.multimodal` makes them from files).

x, state = model.hidden(ids, state, embeds=embedded(model, ids, rows))
"""

from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers import BidirectionalRetention, FeedForward, FeedForwardConfig, RetentionConfig, RMSNorm
from retentive.layers.config import check_fields, positive
from retentive.models.model import LanguageModel

KERNEL = 5
"""Number of bands in the audio encoder's convolution window."""
MOST_SIDE, MOST_TOKENS = 4096, 1 << 16
"""Maximum side in pixels and tokens of a picture: more is a typing error, and would take all memory."""
RATES = range(1_000, 400_000)
"""Supported sample rates in Hz, of files and of the encoder's input."""
MOST_WINDOW, MOST_FEATURES = 1000, 1 << 14
"""Maximum milliseconds of a sound frame, and numbers per token."""


@dataclass(frozen=True)
class ImageConfig:
    """Rows of a picture, and the size of its encoder."""

    token: int
    """Id of the placeholder, which occurs in no text: it may be beyond the vocabulary."""
    size: int = 64
    """Side in pixels of the square that every picture is fitted into."""
    patch: int = 8
    """Side of a patch; a picture is (size / patch)^2 tokens."""
    channels: int = 3
    """3 for colours, 1 for grey."""
    stem: int = 16
    """Channels of two convolutions before patches are cut (arXiv 2106.14881); 0: patches of pixels."""
    dim: int = 128
    """Width of the encoder."""
    layers: int = 2
    """Blocks of bidirectional retention; with 0, apart from the stem, each patch is encoded alone."""
    heads: int = 2
    """Heads of these blocks."""

    def __post_init__(self):
        check_fields(self)
        positive(self, "size", "patch", "dim", "heads")
        for name in ("token", "layers", "stem"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colours), got {self.channels}")
        if self.size > MOST_SIDE or self.tokens > MOST_TOKENS:
            raise ValueError(
                f"size {self.size} and patch {self.patch} are {self.tokens:,} tokens of {self.size:,}² pixels: at most "
                f"{MOST_TOKENS:,} of {MOST_SIDE:,}²"
            )
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not divisible by patch {self.patch}: change either")
        self.retention()

    @property
    def tokens(self) -> int:
        """Number of tokens per picture."""
        return (self.size // self.patch) ** 2

    @property
    def unit(self) -> int:
        """Rows that are encoded together: a picture's."""
        return self.tokens

    @property
    def features(self) -> int:
        """Numbers per row: the pixels of a patch, 0 to 255."""
        return self.patch**2 * self.channels

    def retention(self) -> RetentionConfig:
        """Returns the blocks' config. Outputs over two axes are products of four numbers, so heads are normalised."""
        return RetentionConfig(dim=self.dim, heads=self.heads, head_norm=True)


@dataclass(frozen=True)
class AudioConfig:
    """Rows of a sound, and the size of its encoder."""

    token: int
    """Id of the placeholder."""
    rate: int = 16_000
    """Sample rate in Hz that all sound is converted to."""
    mels: int = 40
    """Bands per frame, evenly spaced in mel."""
    window: int = 25
    """Milliseconds per frame."""
    hop: int = 10
    """Milliseconds from frame to frame."""
    stack: int = 4
    """Frames per token."""
    dim: int = 256
    """Width of the encoder: four times the channels of its convolutions."""

    def __post_init__(self):
        check_fields(self)
        if self.dim < 4:
            raise ValueError(f"dim must be at least 4, got {self.dim}")
        positive(self, "rate", "mels", "window", "hop", "stack", "dim")
        if self.token < 0:
            raise ValueError(f"token must be at least 0, got {self.token}")
        if self.rate not in RATES:
            raise ValueError(f"rate must be {RATES[0]:,} to {RATES[-1]:,} samples a second, got {self.rate:,}")
        if self.mels > self.rate * self.window // 2000:
            most = self.rate * self.window // 2000
            raise ValueError(f"{self.window} ms at {self.rate:,} Hz tell {most} bands apart, got mels {self.mels}")
        if self.window < self.hop:
            raise ValueError(f"a window of {self.window} ms leaves gaps between frames every {self.hop} ms")
        if self.window > MOST_WINDOW or self.features > MOST_FEATURES:
            raise ValueError(
                f"a window of {self.window:,} ms and stack {self.stack:,} of mels {self.mels:,}: at most "
                f"{MOST_WINDOW:,} ms, and {MOST_FEATURES:,} numbers a token"
            )

    @property
    def unit(self) -> int:
        """Rows that are encoded together: each by itself."""
        return 1

    @property
    def features(self) -> int:
        """Numbers per row."""
        return self.mels * self.stack

    @property
    def tokens_per_second(self) -> float:
        """Number of placeholders per second of sound."""
        return 1000 / (self.hop * self.stack)


Config = ImageConfig | AudioConfig


class EncoderBlock(nn.Module):
    """x + retention(norm(x)), then x + ffn(norm(x)), over a grid."""

    def __init__(self, config: RetentionConfig):
        super().__init__()
        self.retention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.retention = BidirectionalRetention(config)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, FeedForwardConfig(config.value_dim))
        self.retention.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.retention(self.retention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Projector(nn.Module):
    """`[…,dim]` -> `[…,D]`, scaled like the embeddings it stands among."""

    def __init__(self, dim: int, D: int):
        super().__init__()
        self.norm, self.out_proj = RMSNorm(dim, eps=1e-6), nn.Linear(dim, D, bias=False)
        nn.init.normal_(self.out_proj.weight, std=(dim * D) ** -0.5)  # embeddings have a standard deviation of D^-1/2

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.norm(x))


class ImageEncoder(nn.Module):
    """Maps rows of patches `[n * tokens, features]`, picture by picture, to embeddings `[n * tokens, D]`."""

    def __init__(self, config: ImageConfig, D: int):
        super().__init__()
        self.config, side, channels = config, config.size // config.patch, config.channels
        self.stem = nn.Sequential()
        for _ in range(2 if config.stem else 0):
            seen = nn.Conv2d(channels, config.stem, 3, padding=1)
            nn.init.kaiming_normal_(seen.weight)  # keeps the scale
            nn.init.zeros_(seen.bias)  # type: ignore[arg-type]  # it has one
            self.stem += nn.Sequential(seen, nn.GELU())
            channels = config.stem
        self.in_proj = nn.Linear(config.patch**2 * channels, config.dim)
        self.place = nn.Parameter(torch.zeros(side, side, config.dim))
        self.blocks = nn.ModuleList(EncoderBlock(config.retention()) for _ in range(config.layers))
        self.projector = Projector(config.dim, D)

    def forward(self, rows: Tensor) -> Tensor:
        (Y, X, _), p = self.place.shape, self.config.patch
        patches = (rows.to(self.in_proj.weight.dtype) / 127.5 - 1).unflatten(-1, (p, p, -1))
        # rows of patches -> pictures [n, C, Y p, X p] -> and back
        pictures = patches.unflatten(0, (-1, Y, X)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        patches = self.stem(pictures).unflatten(3, (X, p)).unflatten(2, (Y, p)).permute(0, 2, 4, 3, 5, 1)
        x = self.in_proj(patches.flatten(3)) + self.place
        for block in self.blocks:
            x = block(x)
        return self.projector(x).flatten(0, 2)


class AudioEncoder(nn.Module):
    """Maps rows of frames `[n, features]` to embeddings `[n, D]`, each row alone.

    Two convolutions over the bands, with a row's frames as channels, detect spectral shapes at any pitch, which differs
    between voices.
    """

    def __init__(self, config: AudioConfig, D: int):
        super().__init__()
        self.config, width = config, config.dim // 4
        self.wide = nn.Conv1d(config.stack, width, KERNEL, stride=2, padding=KERNEL // 2)
        self.narrow = nn.Conv1d(width, width, KERNEL, stride=2, padding=KERNEL // 2)
        self.projector = Projector(-(-config.mels // 4) * width, D)

    def forward(self, rows: Tensor) -> Tensor:
        x = rows.to(self.wide.weight.dtype).unflatten(-1, (self.config.stack, self.config.mels))
        return self.projector(F.gelu(self.narrow(F.gelu(self.wide(x)))).flatten(1))


CONFIGS: dict[str, type[Config]] = {"image": ImageConfig, "audio": AudioConfig}
"""Config class of each kind, by its name in files and messages."""


def encoder_of(config: Config, D: int) -> ImageEncoder | AudioEncoder:
    """Returns a newly initialised encoder of a config, for models of width D."""
    return ImageEncoder(config, D) if isinstance(config, ImageConfig) else AudioEncoder(config, D)


def config_for(kind: str, how: Mapping[str, Any], **others: Any) -> Config:
    """Returns an encoder's config for rows made in this way (`Meta.media`), with other fields."""
    known = {f.name for f in fields(CONFIGS[kind])}
    return CONFIGS[kind](**{name: value for name, value in how.items() if name in known}, **others)


def with_encoders(model: LanguageModel, configs: Mapping[str, Config]) -> LanguageModel:
    """Adds a newly initialised encoder of each of these kinds to the model, in place, and returns it.

    Raises:
        ValueError: a kind is unknown, or two kinds share a placeholder.
    """
    tokens = [config.token for config in configs.values()]
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"each kind must have a placeholder of its own, got {tokens}")
    made = nn.ModuleDict()
    for kind, config in configs.items():
        if kind not in CONFIGS or not isinstance(config, CONFIGS[kind]):
            raise ValueError(f"no encoder for {kind!r}, expected one of {', '.join(CONFIGS)}")
        made[kind] = encoder_of(config, model.config.dim)
    model.encoders = made
    return model


def encoders_of(model: nn.Module) -> dict[str, Any]:
    """Returns the encoders of a model by kind; empty for a model that only reads text."""
    found = dict(model.named_children()).get("encoders")
    return dict(found.items()) if isinstance(found, nn.ModuleDict) else {}


def configs_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the configs of a model's encoders, as stored in config.json."""
    return {kind: asdict(encoder.config) for kind, encoder in encoders_of(model).items()}


def embedded(model: LanguageModel, ids: Tensor, rows: Mapping[str, Tensor] | None) -> Tensor | None:
    """Embeddings `[B,T,D]` of ids `[B,T]`, those of pictures and sound in place of their placeholders, in order.

    None without rows: the model embeds the ids itself.

    Args:
        rows: for each kind those of all its placeholders, `[n, features]`.

    Raises:
        ValueError: a kind that the model has no encoder for, or another number of rows than of placeholders.
    """
    if not rows:
        return None
    encoders = encoders_of(model)
    counts = {kind: int((ids == encoder.config.token).sum()) for kind, encoder in encoders.items()}
    check_rows(counts, rows)
    return inserted(model, ids, {kind: encoders[kind](given) for kind, given in rows.items() if len(given)})


def inserted(model: LanguageModel, ids: Tensor, encoded: Mapping[str, Tensor]) -> Tensor:
    """Embeddings `[B,T,D]` of ids `[B,T]`, with those that are encoded, for each kind `[n, D]`, at its placeholders."""
    places = {kind: ids == encoder.config.token for kind, encoder in encoders_of(model).items()}
    text = ids
    for where in places.values():
        text = text.masked_fill(where, 0)  # any token: its embedding is replaced
    x = model.embed(text)
    for kind, embeddings in encoded.items():
        x = x.masked_scatter(places[kind][..., None], embeddings.to(x.dtype))
    return x


def check_rows(placeholders: Mapping[str, int], rows: Mapping[str, Sized]) -> None:
    """Raises ValueError for rows of a kind without an encoder, or of another number than its placeholders.

    Args:
        placeholders: their number for each kind that the model has an encoder for.
    """
    if unknown := sorted(set(rows) - set(placeholders)):
        raise ValueError(f"the model has no encoder for {unknown[0]}: it was trained without any")
    for kind, count in placeholders.items():
        if count != (given := len(rows[kind]) if kind in rows else 0):
            raise ValueError(f"{count} placeholders of {kind} and {given} rows: each takes one")
