"""Ask a running `retentive serve` about pictures and sounds by the official client: pip install openai

    retentive serve runs/see
    python examples/openai_media.py digits/pictures/test-0.png "Which digit?"

Files are sent inside the request: pictures (PNG, JPEG, WebP) as data URLs, sounds (WAV, FLAC, OGG) as input_audio.
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI, OpenAIError

IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)


def part(path: Path) -> dict:
    """Returns the part of a message that holds this file."""
    data = base64.b64encode(path.read_bytes()).decode()
    if kind := IMAGES.get(path.suffix.lower()):
        return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
    return {"type": "input_audio", "input_audio": {"data": data, "format": path.suffix.lower().lstrip(".")}}


if len(sys.argv) < 2:
    sys.exit("usage: openai_media.py [FILE ...] QUESTION")
*files, question = sys.argv[1:]
try:
    content = [*(part(Path(file)) for file in files), {"type": "text", "text": question}]
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        max_tokens=200,
        temperature=0,
    )
except (OSError, OpenAIError) as error:  # the file is missing, or the server is down or refuses
    sys.exit(f"openai_media.py: {error}")
print(answer.choices[0].message.content)
