"""Embeddings of a request, computed in one thread beside the engine's."""

import asyncio
import base64
from typing import Any

from torch import Tensor

from retentive.infer.embed import embed_ids
from retentive.infer.generate import check_prompt
from retentive.serve.errors import Refused
from retentive.serve.requests import EmbeddingRequest
from retentive.serve.service import Service


async def embeddings(service: Service, request: EmbeddingRequest) -> dict[str, Any]:
    """Returns the JSON of the response.

    Raises:
        Refused: another model, a dimension that it has not, text that is empty or too long, or the time is over.
    """
    service = service.named(request.model)
    width = service.model.config.dim
    if request.dimensions not in (None, width):
        raise Refused(400, f"this model has {width} dimensions, got {request.dimensions}", param="dimensions")
    with service.admit():
        texts = await asyncio.to_thread(request.texts, service.tokenizer, service.options)
        for ids in texts:
            try:
                check_prompt(ids, service.model.config.vocab_size)
            except ValueError as error:
                raise Refused(400, str(error), param="input") from None
        work = service.opening.submit(embed_ids, service.model, texts, request.pooling or "mean")
        try:
            vectors = await asyncio.wait_for(asyncio.wrap_future(work), service.options.timeout)
        except asyncio.TimeoutError:
            message = f"the answer took more than this server's {service.options.timeout:g} s"
            raise Refused(504, message, code="timeout") from None
        except ArithmeticError as error:
            raise Refused(500, f"the model failed on this request: {error}", code="model_failed") from None
    written = [_written(vector, request.encoding_format) for vector in vectors]
    tokens = sum(map(len, texts))
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": n, "embedding": x} for n, x in enumerate(written)],
        "model": service.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _written(vector: Tensor, form: str | None) -> list[float] | str:
    """Returns a vector as numbers, or as base64 of little-endian float32, which OpenAI's client asks for."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
