"""How head and face move beside the lips: nods with the prosody."""
from pathlib import Path

import numpy as np
import pytest

from myspinbot.speech import speak
from myspinbot.visemes import Track, mouth_track, read_sounds

TEXT = ("We were told that nothing would change here. But the old harbour, which my father built, has become a garden! "
        "Do you remember the summer of storms? I never forgot it, and I never will.")
VOWELS = "iyɨʉɪʏᵻeøɛœæaäɑɐʌɶəɘɜɝɚɞɵɒɔoɤʊɯu"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path: Path = tmp_path_factory.mktemp("said") / "speech.wav"
    return speak(TEXT, path)


def whole(said: dict, **more: float) -> Track:
    return mouth_track(said, 25, round(25 * said["duration_s"]), **more)


def test_nods_fall_on_stressed_vowels(said: dict):
    vowels = [s for s in read_sounds(said) if s.symbol and s.symbol in VOWELS]
    stress, rng = np.array([s.stress for s in vowels]), np.random.default_rng(0)
    shuffled = [rng.permutation(stress) for _ in range(1000)]
    for seed in range(4):
        dy = whole(said, seed=seed)["dy"]
        at, speed = (np.arange(len(dy)) + 0.5) / 25, np.gradient(dy)
        falling = [np.interp(np.linspace(s.start - 0.08, s.start + 0.12, 9), at, speed).mean() for s in vowels]
        by_chance = [np.corrcoef(falling, o)[0, 1] for o in shuffled]
        found = np.corrcoef(falling, stress)[0, 1]
        assert found > 0.4 and found > max(by_chance), (seed, found, max(by_chance))
        assert speed.max() > 1.4 * -speed.min(), seed  # down fast, back slowly


def test_the_head_tilts_where_a_phrase_ends_and_goes_to_another_posture_in_the_pause(said: dict):
    seen = np.array([np.abs(whole(said, seed=seed)["roll"]) for seed in range(40)]).mean(0)
    at = (np.arange(len(seen)) + 0.5) / 25
    ends = [s["end_s"] for s in said["sentences"]]
    tilt = np.mean([np.interp(e + 0.1, at, seen) - np.interp(e - 0.5, at, seen) for e in ends])
    assert tilt > 0.15, tilt
    dx = np.array([whole(said, seed=seed)["dx"] for seed in range(40)])
    pace = np.abs(np.diff(dx)).mean(0)
    pauses = [int(25 * e) for e in ends[:-1]]
    assert np.mean([pace[p - 3:p + 12].mean() for p in pauses]) > 1.3 * pace.mean()


def test_without_motion_head_and_brows_are_still_and_seeds_differ(said: dict):
    still, one, other = whole(said, motion=0), whole(said, seed=1), whole(said, seed=2)
    for k in ("dx", "dy", "roll", "zoom", "brow"):
        assert not still[k].any(), k
        assert not np.array_equal(one[k], other[k]), k
        assert np.array_equal(one[k], whole(said, seed=1)[k]), k
    for track in (one, other, whole(said, seed=3)):
        for k in ("dx", "dy", "roll"): assert np.abs(np.diff(track[k], 2)).max() < 0.25, k
