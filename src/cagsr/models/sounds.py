"""Sounds of prompts as samples: read with soundfile, mixed to one channel and resampled with soxr, as transformers does."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cagsr.errors import DataError
from cagsr.flow import Sound
from cagsr.support.extras import require

Samples = NDArray[np.float32]


def seconds_of(sound: Sound) -> float:
    """How long a sound lasts, of a file by its header; DataError, in one sentence, where it can't be read."""
    if isinstance(sound.source, tuple):
        samples, rate = sound.source
        return float(np.shape(samples)[-1] / rate)
    with _opened(sound) as file:
        return float(file.frames / file.samplerate)


def open_sound(sound: Sound, rate: int) -> Samples:
    """The samples ``(time,)`` between -1 and 1, at ``rate`` Hz; DataError, in one sentence, where the sound can't be read."""
    if isinstance(sound.source, tuple):
        samples, own = np.atleast_2d(np.asarray(sound.source[0], dtype=np.float32)), int(sound.source[1])
        mixed = samples.mean(axis=0)
    else:
        with _opened(sound) as file:
            mixed, own = file.read(dtype="float32", always_2d=True).mean(axis=1), int(file.samplerate)
    if not len(mixed):
        raise DataError(f"{sound.name}: the sound is empty; leave the row out.")
    if not np.isfinite(mixed).all():
        raise DataError(f"{sound.name}: the sound holds what is no number; mend it or leave the row out.")
    if own != rate:
        require("A sound of another rate than the model's", "audio", modules=["soxr"])
        import soxr

        mixed = soxr.resample(mixed, own, rate)
    return np.asarray(mixed, dtype=np.float32)


def as_data_url(samples: Samples, rate: int) -> str:
    """Samples as a data URL of a WAV file of 16 bits."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return f"data:audio/wav;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


@contextmanager
def _opened(sound: Sound) -> Iterator[Any]:
    require("A prompt with a sound", "audio", modules=["soundfile"])
    import soundfile

    source = io.BytesIO(sound.source) if isinstance(sound.source, bytes) else sound.source
    try:
        with soundfile.SoundFile(source) as file:
            yield file
    except (OSError, soundfile.LibsndfileError, TypeError, ValueError) as error:
        if isinstance(source, str) and not Path(source).is_file():
            raise DataError(
                f"{sound.name}: there is no such sound file; its path counts from the data's folder."
            ) from error
        reason = str(error).rstrip(".").partition(": ")[2] or str(error).rstrip(".")
        raise DataError(
            f"{sound.name}: the sound can't be read ({reason}); convert it to WAV, FLAC, OGG or MP3, or leave the row out."
        ) from error
