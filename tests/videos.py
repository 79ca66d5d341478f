"Small real videos for the tests of the checks: a crude talker, and what can go wrong with it."
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import portraits

from myspinbot.media.face import prepare_portrait
from myspinbot.media.mesh import ibug
from myspinbot.media.quality import write_video

RATE, FPS = 22050, 25
SPOKEN = "m ɑ p æ s oʊ b ɑ n aɪ m p ɑ t i b æ m oʊ f ɑ m".split()


def phonemes(pause_at: int = 11, pause_s: float = 0.6) -> dict:
    "Timings of two made-up sentences with a pause between them."
    t, out, sentences, start = 0.1, [], [], 0.1
    for i, p in enumerate(SPOKEN):
        if i == pause_at:
            sentences.append(dict(text="one", start_s=start, end_s=round(t, 3)))
            t += pause_s
            start = t
        d = 0.16 if p in "ɑæoʊaɪi" else 0.11
        out.append(dict(phoneme=p, start_s=round(t, 3), end_s=round(t + d, 3), sentence=len(sentences)))
        t += d
    sentences.append(dict(text="two", start_s=round(start, 3), end_s=round(t, 3)))
    return dict(sample_rate=RATE, duration_s=round(t + 0.1, 3), phonemes=out, sentences=sentences)


def opening(timings: dict, frames: int) -> np.ndarray:
    "Own reference, so that a talker and the library's curve are independent: vowels open, the rest closed."
    t, curve = (np.arange(frames) + 0.5) / FPS, np.zeros(frames)
    for o in timings["phonemes"]:
        wide = {"ɑ": 1.0, "æ": 0.9, "aɪ": 0.8, "oʊ": 0.6, "i": 0.35, "s": 0.15, "t": 0.2, "n": 0.2, "f": 0.1}
        curve[(t >= o["start_s"]) & (t < o["end_s"])] = wide.get(o["phoneme"], 0.0)
    return np.convolve(np.pad(curve, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")


def speech(timings: dict) -> np.ndarray:
    "A hoarse hum as loud as the mouth is open."
    n = round(timings["duration_s"] * RATE)
    frames = round(timings["duration_s"] * FPS)
    loud = np.interp(np.arange(n) / RATE, (np.arange(frames) + 0.5) / FPS, opening(timings, frames))
    rng = np.random.default_rng(0)
    hum = np.sin(np.arange(n) * 2 * np.pi * 140 / RATE) + rng.normal(0, 0.7, n)
    return ((0.005 + 0.25 * loud) * hum).astype(np.float32)


@lru_cache(maxsize=1)
def person() -> tuple[np.ndarray, np.ndarray]:
    p = prepare_portrait(portraits.astronaut(), upscaler="none")
    return p.image, ibug(p.landmarks.array)


def talk(curve: np.ndarray, sway: float = 1.5, size: int = 256) -> Iterator[np.ndarray]:
    "The jaw goes down with the curve, the head sways a little."
    image, p = person()
    y, x = np.mgrid[:512, :512].astype(np.float32)
    unit = float(np.linalg.norm(p[45] - p[36]))
    jaw = np.clip((y - p[62, 1]) / 12, 0, 1) * np.exp(-((x - p[62, 0]) / (0.45 * unit)) ** 4)
    jaw *= np.exp(-(np.maximum(y - p[8, 1], 0) / 30) ** 2)
    head = np.exp(-(((x - 256) / 170) ** 2 + ((y - 200) / 190) ** 2) ** 2)
    for i, c in enumerate(curve):
        dx, dy = sway * np.sin(i / 9), 0.6 * sway * np.sin(i / 13 + 1)
        across, down = x - dx * head, y - dy * head - 0.2 * unit * c * jaw
        frame = cv2.remap(image, across.astype(np.float32), down.astype(np.float32), cv2.INTER_LINEAR)
        yield cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)


def make(path: Path, *, late: int = 0, black: slice | None = None, frozen: slice | None = None,
         cut_sound_s: float = 0.0, gain: float = 1.0, sound: bool = True, faceless: bool = False,
         size: int = 256) -> tuple[Path, dict]:
    "A video with the given faults, and its phonemes."
    timings = phonemes()
    n = round(timings["duration_s"] * FPS)
    frames = list(talk(np.roll(opening(timings, n), late), size=size))
    if black: frames[black] = [np.zeros_like(f) for f in frames[black]]
    if frozen: frames[frozen] = [frames[frozen.start]] * len(frames[frozen])
    if faceless: frames = [cv2.resize(cv2.resize(f, (6, 6)), (size, size)) for f in frames]
    voice = speech(timings)
    if cut_sound_s: voice = voice[:-round(cut_sound_s * RATE)]
    return write_video(path, frames, FPS, voice * gain if sound else None, RATE), timings


def write_wav(path: Path, sound: np.ndarray) -> Path:
    import wave
    with wave.open(str(path), "wb") as f:
        f.setparams((1, 2, RATE, 0, "NONE", ""))
        f.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return path
