"""Narration: what is heard is what the phonemes say, at one loudness, the same each time; the rest is refused."""
import json
import os
import subprocess
import sys
import wave
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from myspinbot.core import InputError, hash_file
from myspinbot.media.sound import LoudnessMeter, limit_peaks, read_wav, write_wav
from myspinbot.media.speech import opening_curve, openness, speak
from myspinbot.language.text import clean_text, split_sentences

TEXT = "Hello, my name is Bob. Maybe you and I will fly above the moon!\n\nGoodbye."
CHILD = "import sys, json; from myspinbot.media.speech import speak; print(json.dumps(speak(sys.argv[1], sys.argv[2])))"


def child(folder: Path, name: str, home: Path) -> subprocess.Popen:
    "Speaks in a process of its own."
    env = os.environ | dict(SPIN_HOME=str(home))
    command = [sys.executable, "-c", CHILD, TEXT, str(folder / name)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    path = tmp_path_factory.mktemp("speech") / "a.wav"
    return path, speak(TEXT, path)


def silence_at(x: np.ndarray, rate: int, a: float, b: float) -> bool:
    return float(np.abs(x[round(a * rate):round(b * rate)]).max(initial=0)) < 1e-3


def test_phonemes_cover_the_whole_sound_without_gaps(spoken):
    path, doc = spoken
    with wave.open(str(path)) as w:
        assert (w.getnchannels(), w.getsampwidth(), w.getframerate()) == (1, 2, 22_050)
        assert doc["duration_s"] == round(w.getnframes() / 22_050, 6)
    found = doc["phonemes"]
    assert found[0]["start_s"] == 0 and found[-1]["end_s"] == doc["duration_s"]
    assert all(a["end_s"] == b["start_s"] and a["end_s"] > a["start_s"] for a, b in pairwise(found))
    assert [s["text"] for s in doc["sentences"]] == ["Hello, my name is Bob.", "Maybe you and I will fly above the moon!",
                                                     "Goodbye."]
    assert all(doc["sentences"][p["sentence"]]["start_s"] <= p["start_s"] < doc["sentences"][p["sentence"]]["end_s"]
               for p in found if p["phoneme"] != "_")


def test_pauses_are_silent_and_as_long_as_asked(spoken, tmp_path):
    path, doc = spoken
    x, rate = read_wav(path)
    for a, b, wanted in zip(doc["sentences"], doc["sentences"][1:], (0.35, 0.77), strict=False):
        assert b["start_s"] - a["end_s"] == pytest.approx(wanted, abs=0.001)
        assert silence_at(x, rate, a["end_s"] + 0.001, b["start_s"] - 0.001)
    assert silence_at(x, rate, 0, 0.149) and silence_at(x, rate, doc["duration_s"] - 0.149, doc["duration_s"])
    longer = speak("One. Two.", tmp_path / "b.wav", pause_s=1.5)["sentences"]
    assert longer[1]["start_s"] - longer[0]["end_s"] == pytest.approx(1.5, abs=0.001)


def test_sound_and_phonemes_agree_where_speech_is(spoken):
    path, doc = spoken
    x, rate = read_wav(path)
    level = lambda p: np.sqrt(np.mean(x[round(p["start_s"] * rate):round(p["end_s"] * rate)] ** 2))
    vowels = [level(p) for p in doc["phonemes"] if openness(p["phoneme"]) > 0.5]
    still = [level(p) for p in doc["phonemes"] if p["phoneme"] == "_"]
    assert len(vowels) > 8 and np.median(vowels) > 20 * max(still)


@pytest.mark.parametrize("text", ["Hi.", "5", TEXT, "word " * 60])
def test_loudness_is_the_same_for_short_and_long_texts(text, tmp_path):
    speak(text, tmp_path / "a.wav")
    x, rate = read_wav(tmp_path / "a.wav")
    meter = LoudnessMeter(rate)
    meter.add(x)
    assert meter.lufs() == pytest.approx(-16, abs=0.5)
    assert np.abs(x).max() <= 10 ** (-1 / 20) + 0.001


def test_speed_changes_the_length_of_speech_only(spoken, tmp_path):
    spoken_s = lambda doc: sum(s["end_s"] - s["start_s"] for s in doc["sentences"])
    slow, fast = (speak(TEXT, tmp_path / f"{v}.wav", speed=v) for v in (0.5, 2.0))
    assert 1.6 < spoken_s(slow) / spoken_s(spoken[1]) < 2.3
    assert 1.4 < spoken_s(spoken[1]) / spoken_s(fast) < 2.3
    assert fast["sentences"][1]["start_s"] - fast["sentences"][0]["end_s"] == pytest.approx(0.35, abs=0.001)


def test_two_processes_that_start_together_with_nothing_cached_speak_the_same_bytes(spoken, tmp_path):
    home = tmp_path / "home"
    running = [child(tmp_path, f"{i}.wav", home) for i in range(2)]
    docs = [json.loads(p.communicate(timeout=120)[0]) for p in running]
    assert [p.returncode for p in running] == [0, 0]
    assert docs[0] == docs[1] == spoken[1]
    assert hash_file(tmp_path / "0.wav") == hash_file(tmp_path / "1.wav") == hash_file(spoken[0])
    assert [p.suffix for p in (home / "cache" / "voices").iterdir()] == [".onnx"]


def test_another_seed_gives_another_intonation(spoken, tmp_path):
    assert speak(TEXT, tmp_path / "b.wav", seed=1)["sentences"] != spoken[1]["sentences"]


@pytest.mark.parametrize("text, why", [
    ("", "empty"), ("  \n", "empty"), ("😀🎉", "can be spoken"), ("—…!?", "can be spoken"), ("\ud83d", "U+D83D"),
    ("a" * 20_001, "20,001 characters; at most 20,000"), ("bad\x00text", "U+0000 at position 3"), ("\x1b[31mred", "U+001B")])
def test_what_cannot_be_spoken_is_refused_and_leaves_no_file(text, why, tmp_path):
    with pytest.raises(InputError) as e: speak(text, tmp_path / "a.wav")
    assert why in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [dict(speed=0.49), dict(speed=2.01), dict(speed=float("nan")), dict(pause_s=-1),
                                     dict(pause_s=6)])
def test_options_out_of_range_are_refused_with_the_range(options, tmp_path):
    with pytest.raises(InputError, match="out of range. Choose"): speak("Hi.", tmp_path / "a.wav", **options)


@pytest.mark.parametrize("text", [
    "Ｆｕｌｌ ｗｉｄｔｈ", "½ of x² is 3°C", "[[hɛ]] <b>tag</b> & $5", "naïve café", "Hawaiʻi",
    "👋 Hello 👋🏽 there", "line one\r\nline two", "\u202eabc\u202c", "x" * 90, "O'Brien's 3,000.50"])
def test_text_of_any_sort_is_spoken_without_a_crash(text, tmp_path):
    doc = speak(text, tmp_path / "a.wav")
    assert doc["duration_s"] > 0.5 and doc["notes"] == (["Not spoken: 👋 (2 times)."] if "👋" in text else [])


@pytest.mark.parametrize("text, named", [
    ("שלום עולם", "'שלום' (Hebrew), 'עולם' (Hebrew), at position 0"), ("مرحبا", "'مرحبا' (Arabic)"), ("你好，世界。", "(Cjk)"),
    ("Leo Толстой wrote it.", "'Толстой' (Cyrillic), at position 4"),
    ("the λόγος", "'λόγος' (Greek)"), ("カタカナ", "(Katakana)")])
def test_words_that_the_voice_would_spell_are_refused_by_name(text, named, tmp_path):
    with pytest.raises(InputError) as e: speak(text, tmp_path / "a.wav")
    assert named in e.value.message and e.value.hint
    assert not list(tmp_path.iterdir())


def test_a_lone_greek_letter_is_read_by_its_name_and_noted(tmp_path):
    assert speak("The angle α is π.", tmp_path / "a.wav")["notes"] == ["α, π: read by name."]


@pytest.mark.parametrize("text, pieces", [
    ("Dr. Smith met J. Doe. They left.", ["Dr. Smith met J. Doe.", "They left."]),
    ("It costs $3.50 at 5 p.m. today.", ["It costs $3.50 at 5 p.m. today."]),
    ('She said "Go." He went.', ['She said "Go."', "He went."]),
    ("Wait... what? No!", ["Wait... what?", "No!"]),
    ("And so did I. Then we left.", ["And so did I.", "Then we left."]),
    ("你好。世界！", ["你好。", "世界!"])])
def test_sentences_end_where_a_reader_would_stop(text, pieces):
    assert [p.text for p in split_sentences(clean_text(text))] == pieces


def test_a_long_sentence_is_cut_at_commas_and_stays_one_sentence():
    pieces = split_sentences(clean_text("many words here, " * 100))
    assert len(pieces) > 3 and all(len(p.text) <= 400 for p in pieces) and {p.sentence for p in pieces} == {0}
    assert [p.then for p in pieces][:-1] == ["clause"] * (len(pieces) - 1)


def test_opening_curve_follows_the_classes_of_sounds():
    items = [("_", 0.2), ("m", 0.12), ("ɑ", 0.2), ("p", 0.12), ("i", 0.2), ("_", 0.3)]
    ends = np.cumsum([d for _, d in items])
    doc = dict(duration_s=float(ends[-1]), phonemes=[dict(phoneme=p, start_s=float(e - d), end_s=float(e), sentence=0)
                                                     for (p, d), e in zip(items, ends, strict=True)])
    at = lambda t: opening_curve(doc, 100, 200)[round(t * 100)]
    assert at(0.05) == 0 and at(1.1) == 0 and at(1.9) == 0  # silence, and past the end
    assert at(0.42) > 0.95 and 0.2 < at(0.74) < 0.4
    assert at(0.26) < 0.1 and at(0.58) < 0.15
    assert len(opening_curve(doc, 25, 0)) == 0
    coarse, fine = opening_curve(doc, 25, 25), opening_curve(doc, 1000, 1000)
    assert np.allclose(coarse, fine[20::40], atol=0.03)     # a frame stands for its middle


def test_limiter_keeps_peaks_below_the_ceiling_and_quiet_sound_as_it_is():
    rng = np.random.default_rng(2)
    loud = (rng.standard_normal(22_050) * 0.5).astype(np.float32)
    assert np.abs(limit_peaks(loud)).max() <= 0.8901
    quiet = (loud / np.abs(loud).max() * 0.5).astype(np.float32)
    assert np.array_equal(limit_peaks(quiet), quiet)


def test_failing_writer_leaves_no_file(tmp_path):
    def parts():
        yield np.zeros(10)
        raise RuntimeError("disk")
    with pytest.raises(RuntimeError): write_wav(tmp_path / "a.wav", parts(), 22_050)
    assert not list(tmp_path.iterdir())
