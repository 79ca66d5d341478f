"""Samples: real, made once, never seen half made."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = ("from myspinbot.core import hash_file; from myspinbot.media.samples import sample_portrait; "
         "print(sample_portrait(), hash_file(sample_portrait()))")


def python(code: str, home: Path) -> subprocess.Popen:
    env = os.environ | dict(SPIN_HOME=str(home))
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def test_processes_that_ask_at_once_get_one_whole_portrait(tmp_path):
    told = {p.communicate(timeout=60)[0] for p in [python(CHILD, tmp_path) for _ in range(3)]}
    assert len(told) == 1 and "astronaut.png" in told.pop()
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_samples_are_what_the_steps_take(tmp_path):
    code = ("import json; from myspinbot.media.samples import *; "
            "print(json.dumps([str(p) for p in (*sample_prepared(), *sample_speech(), sample_video(), sample_video())]))")
    run = python(code, tmp_path)
    portrait, landmarks, wav, phonemes, video, again = map(Path, json.loads(run.communicate(timeout=120)[0]))
    from PIL import Image

    from myspinbot.media.face import load_landmarks
    from myspinbot.media.video import probe
    from myspinbot.media.talk import load_phonemes, sound_seconds
    assert Image.open(portrait).size == (256, 256)
    assert len(load_landmarks(landmarks).points) == 478
    assert load_phonemes(phonemes)["duration_s"] == pytest.approx(sound_seconds(wav), abs=1e-4)
    assert video == again and probe(video).video_s == pytest.approx(sound_seconds(wav), abs=0.05)


def test_changed_code_makes_new_samples(tmp_path, monkeypatch):
    from myspinbot.media import samples
    made = []
    monkeypatch.setattr(samples, "_kept", lambda name, key, make: made.append(key) or tmp_path)
    monkeypatch.setattr(samples, "modules_hash", lambda names: "one")
    samples.sample_speech()
    monkeypatch.setattr(samples, "modules_hash", lambda names: "two")
    samples.sample_speech()
    samples.sample_speech("other")
    assert len(set(made)) == 3
