"""The talking portrait: real speech, the finished video decoded, its lips measured by an independent landmark detector."""
import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from myspinbot.core import InputError
from myspinbot.media.face import Face, choose_face, find_faces, prepare_portrait, refine_face
from myspinbot.media.mesh import ibug
from myspinbot.media.video import probe, read_frames
from myspinbot.media.rig import CONTROLS, Rig
from myspinbot.media.speech import opening_curve, speak
from myspinbot.media.talk import frame_count, load_phonemes, load_rig, mouth_track, render, sound_seconds
from myspinbot.media.quality import correlate, measure_picture
from myspinbot.media.visemes import TRACKS, read_sounds

TEXT = "Papa made my mother a big map. Maybe five people want to move, but how do they open the old window?"


@pytest.fixture(scope="module")
def portrait():
    from skimage.data import astronaut
    return prepare_portrait(astronaut(), size=512)


@pytest.fixture(scope="module")
def rig(portrait) -> Rig:
    return Rig.from_portrait(portrait.image, portrait.landmarks)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("talk") / "speech.wav"
    return path, speak(TEXT, path)


@pytest.fixture(scope="module")
def video(rig, spoken, tmp_path_factory) -> tuple[Path, object, dict]:
    wav, phonemes = spoken
    out = tmp_path_factory.mktemp("talk") / "talk.mp4"
    track = mouth_track(phonemes, 25, frame_count(sound_seconds(wav), 25))
    render(rig, track, wav, out)
    return out, track, phonemes


@pytest.fixture(scope="module")
def measured(video) -> np.ndarray:
    gaps = np.array([np.nan if g is None else g for g in measure_picture(video[0]).opening])
    assert np.isfinite(gaps).mean() > 0.98
    return np.interp(np.arange(len(gaps)), np.flatnonzero(np.isfinite(gaps)), gaps[np.isfinite(gaps)])


def silence(path: Path, seconds: float, rate: int = 22050) -> Path:
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(rate)
        f.writeframes(bytes(2 * round(seconds * rate)))
    return path


def test_lips_in_the_video_follow_the_phonemes(video, measured):
    expected = opening_curve(video[2], 25, len(measured))
    now, lag, _ = correlate(measured, expected)
    assert now >= 0.8, now
    assert abs(lag) <= 1, lag
    assert correlate(measured, video[1].opening)[0] >= 0.9


def test_lips_in_the_video_close_on_p_b_and_m(video, measured):
    low, high = measured.min(), np.percentile(measured, 95)
    for sound in read_sounds(video[2]):
        if sound.symbol not in "pbm" or not sound.symbol: continue
        first, last = int(sound.start * 25) - 1, int(sound.end * 25) + 2
        assert measured[max(first, 0):last].min() < low + 0.25 * (high - low), sound


def test_picture_and_sound_are_equally_long_and_the_file_starts_at_once(video, spoken):
    info = probe(video[0])
    assert (info.width, info.height, info.codec, info.pix_fmt, info.audio_codec) == (512, 512, "h264", "yuv420p", "aac")
    assert info.faststart and info.fps == 25
    assert abs(info.video_s - sound_seconds(spoken[0])) <= 0.02 + 1e-6
    assert abs(info.video_s - info.audio_s) <= 1 / 25


def test_nothing_moves_outside_the_head(video, rig, portrait):
    frames = np.stack([f for i, (_, f) in enumerate(read_frames(video[0])) if i % 5 == 0]).astype(np.int16)
    change = np.abs(frames - frames[0]).max(0).max(-1)
    x0, y0, x1, y1 = rig.box
    outside = np.ones(change.shape, bool)
    outside[y0:y1, x0:x1] = False
    assert outside.mean() > 0.3
    assert np.percentile(change[outside], 99.9) <= 6  # what the codec does to still pixels
    drawn = [rig.frame(video[1].controls(i)) for i in range(0, len(video[1]), 17)]
    assert all(np.array_equal(f[outside], portrait.image[outside]) for f in drawn)
    assert all(np.array_equal(f[0], portrait.image[0]) for f in drawn)


def test_frames_change_smoothly(video, rig):
    jaw = video[1]["jaw"]
    assert np.abs(np.diff(jaw)).max() < 0.45
    for k in ("dx", "dy", "roll"): assert np.abs(np.diff(video[1][k], 2)).max() < 0.25, k
    base = rig.frame(jaw=0.3).astype(np.int16)
    x0, y0, x1, y1 = rig.fields.box
    still = [np.abs(rig.frame(jaw=0.3 + d).astype(np.int16) - base)[y0:y1, x0:x1].mean() for d in (0.01, 0.02, 0.04)]
    assert still[0] < still[1] < still[2] < 3


def test_the_same_controls_give_the_same_pixels_and_another_seed_another_motion(rig, portrait, spoken):
    track = mouth_track(spoken[1], 25, 40, seed=7)
    again = Rig.from_portrait(portrait.image, portrait.landmarks.to_json())
    assert np.array_equal(rig.frame(track.controls(20)), again.frame(track.controls(20)))
    other = mouth_track(spoken[1], 25, 40, seed=8)
    assert np.array_equal(track["jaw"], other["jaw"]) and not np.array_equal(track["dx"], other["dx"])


def test_mouth_shapes_of_a_smiling_portrait(rig):
    def lip_gap(**controls: float) -> float:
        frame = rig.frame(controls)
        p = rig.points
        rough = Face.around(tuple((p.min(0) + p.max(0)) / 2), float(np.ptp(p, axis=0).max()), 1.0)
        q = ibug(refine_face(frame, rough)[1])
        return float(np.mean([q[b, 1] - q[a, 1] for a, b in ((61, 67), (62, 66), (63, 65))])) / rig.axes.mm
    inner = [rig.points[b, 1] - rig.points[a, 1] for a, b in ((61, 67), (62, 66), (63, 65))]
    source = float(np.mean(inner)) / rig.axes.mm
    shut, half, wide = lip_gap(press=1), lip_gap(jaw=0.35), lip_gap(jaw=0.9)
    assert source > 4  # the teeth show
    assert shut < 2 < half < wide
    assert wide - shut > 7


def test_upper_teeth_stay_with_the_head_while_the_jaw_drops(rig):
    a = rig.axes
    line = np.interp(rig.lips.centre, rig.lips.x, rig.lips.lower)
    tooth = a.image(np.array([(rig.lips.centre + 3, line - 1.6)]))[0].round().astype(int)
    look = slice(tooth[1] - 1, tooth[1] + 2), slice(tooth[0] - 2, tooth[0] + 3)
    half, wide = (rig.frame(jaw=j)[look].astype(float) for j in (0.5, 0.8))
    assert half.mean() > 90 and np.abs(half - wide).mean() < 25


def test_eyes_close_on_a_blink(rig):
    for eye in rig.eyes:
        x0, _, x1, y1 = eye.box
        middle = eye.axes.image(np.array([(0.0, 0.0)]))[0].round().astype(int)
        iris = slice(middle[1] - 1, middle[1] + 2), slice(middle[0] - 2, middle[0] + 3)
        opened, shut = rig.frame(blink=0)[iris].astype(float), rig.frame(blink=1)[iris].astype(float)
        skin = rig.image[y1 - 8:y1 - 2, x0 + 10:x1 - 10].reshape(-1, 3).mean(0)
        assert np.abs(shut.mean((0, 1)) - skin).mean() < np.abs(opened.mean((0, 1)) - skin).mean()


@pytest.mark.parametrize("change", ["dark", "mirrored", "grey", "small", "large"])
def test_other_portraits_move_too(portrait, change):
    import cv2
    image, points = portrait.image, portrait.landmarks.array.astype(float)
    if change == "dark": image = (image * 0.25).astype(np.uint8)
    if change == "grey": image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
    if change == "mirrored":
        image = np.ascontiguousarray(image[:, ::-1])
        points = refine_face(image, choose_face(find_faces(image))[0])[1]
    if change in ("small", "large"):
        n = 256 if change == "small" else 1024
        image, points = cv2.resize(image, (n, n), interpolation=cv2.INTER_AREA), points * n / 512
    rig = Rig(image, points)
    shut, wide = rig.frame(press=1).astype(int), rig.frame(jaw=0.9).astype(int)
    assert shut.shape == image.shape
    line = np.interp(rig.lips.centre, rig.lips.x, rig.fields.move.rest)
    middle = rig.axes.image(np.array([(rig.lips.centre, line + 6)]))[0]
    x, y = middle.round().astype(int)
    assert shut[y - 1:y + 2, x - 2:x + 3].mean() > 1.5 * wide[y - 1:y + 2, x - 2:x + 3].mean()  # lip, then hollow


def test_memory_does_not_grow_with_the_length(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from myspinbot.media.samples import sample_inputs
from myspinbot.media.talk import frame_count, load_phonemes, load_rig, mouth_track, render
import wave
s, folder = sample_inputs(), Path(sys.argv[1])
rig, phonemes = load_rig(s["portrait"], s["landmarks"], 256), load_phonemes(s["phonemes"])
for seconds in (2, 4, 24):
    with wave.open(str(folder / "s.wav"), "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(22050)
        f.writeframes(bytes(2 * 22050 * seconds))
    render(rig, mouth_track(phonemes, 25, frame_count(seconds, 25)), folder / "s.wav", folder / "s.mp4")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    peak = [int(v) for v in done.stdout.split()]
    assert peak[2] - peak[1] < 40, peak


def test_a_stopped_rendering_leaves_no_half_video(rig, spoken, tmp_path):
    class Stop(Exception): pass
    def stop(done: float, frame: np.ndarray) -> None: raise Stop
    wav = silence(tmp_path / "s.wav", 2)
    with pytest.raises(Stop): render(rig, mouth_track(spoken[1], 25, 50), wav, tmp_path / "out.mp4", on_progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.wav"]


@pytest.mark.parametrize("seconds", [0.02, 0.5, 1.01])
def test_short_sounds_become_videos_of_their_length(rig, spoken, tmp_path, seconds):
    wav, out = silence(tmp_path / "s.wav", seconds), tmp_path / "out.mp4"
    n = frame_count(sound_seconds(wav), 25)
    render(rig, mouth_track(spoken[1], 25, n), wav, out)
    info = probe(out)
    assert info.frames == n and abs(info.video_s - max(seconds, 0.04)) <= 0.021


def test_unusable_portraits_are_refused_with_the_fix(portrait):
    image, points = portrait.image, portrait.landmarks.array
    cases = [
        (image[:, :400], points, "400x512, not square"), (image[..., 0], points, r"shape \(512, 512\)"),
        (image[::8, ::8].copy(), points / 8, "64x64"), (image, points[:68], r"shape \(68, 2\)"),
        (image, points * 2, "do not fit a portrait of 512x512"),
        (image, np.where(points > 250, np.nan, points), "not a number"),
        (image, points * 0.1 + 200, "too small"),
    ]
    for picture, marks, said in cases:
        with pytest.raises(InputError, match=said) as e: Rig.from_portrait(picture, marks)
        assert e.value.hint
    marks = portrait.landmarks.to_json()
    with pytest.raises(InputError, match=r"\[256, 256\], this one is \[512, 512\]"):
        Rig.from_portrait(image, {**marks, "size": [256, 256]})
    with pytest.raises(InputError, match="no points"): Rig.from_portrait(image, {"size": [512, 512]})


@pytest.mark.parametrize("phonemes, said", [
    ({}, "No list of phonemes"), ({"phonemes": []}, "no speech in these 0"),
    ({"phonemes": [{"phoneme": "_", "start_s": 0.0, "end_s": 1.0}]}, "no speech in these 1"),
    ({"phonemes": [{"phoneme": "a", "start_s": 0.0}]}, "end_s=None"),
    ({"phonemes": [{"phoneme": "a", "start_s": 0.0, "end_s": float("nan")}]}, "end_s=nan"),
    ({"phonemes": [{"phoneme": "a", "start_s": 2.0, "end_s": 1.0}]}, "runs from 2.0 s to 1.0 s"),
    ({"phonemes": ["a"]}, "Phoneme 0 is 'a'"),
])
def test_unusable_phonemes_are_refused_with_the_fix(phonemes, said):
    with pytest.raises(InputError, match=said) as e: mouth_track(phonemes, 25, 10)
    assert e.value.hint


def test_unusable_files_are_refused_by_name(tmp_path, rig, spoken):
    text = tmp_path / "notes.wav"
    text.write_text("not a sound")
    with pytest.raises(InputError, match=r"notes\.wav is no WAV file"): sound_seconds(text)
    with pytest.raises(InputError, match="no sound file"): sound_seconds(tmp_path / "none.wav")
    with pytest.raises(InputError, match="holds no sound"): sound_seconds(silence(tmp_path / "empty.wav", 0))
    with pytest.raises(InputError, match="holds no phonemes"): load_phonemes(text)
    marks = tmp_path / "marks.json"
    marks.write_text(json.dumps({"points": []}))
    with pytest.raises(InputError): load_rig(text, marks)
    with pytest.raises(InputError, match="The track has 3 frames at 25"):
        render(rig, mouth_track(spoken[1], 25, 3), spoken[0], tmp_path / "x.mp4")
    with pytest.raises(InputError, match="Unknown control 'jaws'"): rig.frame(jaws=1)


def test_raw_piper_symbols_and_joined_symbols_are_understood():
    def row(p: str, a: float, b: float) -> dict: return dict(phoneme=p, start_s=a, end_s=b)
    raw = [row("^", 0, .05), row("t", .05, .1), row("ʃ", .1, .15), row("ˈ", .15, .2), row("ɑ", .2, .3), row("ː", .3, .35),
           row("$", .35, .4)]
    sounds = read_sounds({"phonemes": raw})
    assert [(s.symbol, s.start, s.end) for s in sounds if s.symbol] == [("t", .05, .1), ("ʃ", .1, .15), ("ɑ", .15, .35)]
    assert sounds[3].stress > 1
    joined = read_sounds({"phonemes": [row("tʃ", 0, .1), row("aɪ", .1, .3)]})
    assert [s.symbol for s in joined] == ["t", "ʃ", "a", "ɪ"]


def test_the_controls_of_track_and_rig_are_the_same():
    assert TRACKS == CONTROLS
