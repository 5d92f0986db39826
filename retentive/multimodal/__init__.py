"""Pictures and sound: from files to the rows that a model's encoders read. Needs the extra `multimodal`.

    prepare("digits/train.jsonl", "data/digits", image={"size": 28, "patch": 7, "channels": 1})
    Opener.of(model).rows("image", Path("cat.png"))

The encoders are in `models/encoders.py`, the media of messages in `data/media.py`.
"""

from retentive.multimodal.audio import open_audio
from retentive.multimodal.image import open_image
from retentive.multimodal.prepare import Opener, fields_of, prepare

__all__ = ["Opener", "fields_of", "open_audio", "open_image", "prepare"]
