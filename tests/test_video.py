"The video check on real encoded videos: a good one passes, each fault is found, named and measured."
import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import videos

from myspinbot.core import GateFailed, InputError, error_from_dict
from myspinbot.media.quality import (
    CheckReport, check_video, contact_sheet, correlate, gate_table, loudness, measure_picture, plot_check, poster,
    probe, read_frames, read_sound, save_png, thumbnail, write_video,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Path]:
    folder = tmp_path_factory.mktemp("good")
    path, timings = videos.make(folder / "good.mp4", size=512)
    return path, timings, videos.write_wav(folder / "voice.wav", videos.speech(timings))


def failed(report: CheckReport) -> set[str]: return {g.name for g in report.gates if not g.ok}


def test_a_good_video_passes_every_gate(good: tuple[Path, dict, Path]):
    path, timings, voice = good
    report = check_video(path, voice, timings)
    assert report.ok, report.gates
    report.demand()
    assert report.sync is not None and report.sync > 0.6 and abs(report.lag_frames or 0) <= 1
    assert report.border_crawl < 1.5
    assert len(report.expected) == len(report.level_db) == len(report.picture.opening) == report.video.frames
    assert CheckReport.model_validate_json(report.model_dump_json()) == report


def test_the_check_is_faster_than_the_video_plays(good: tuple[Path, dict, Path]):
    path, timings, voice = good
    check_video(path, voice, timings)
    start = time.process_time()
    report = check_video(path, voice, timings)
    assert time.process_time() - start < 2 * report.video.video_s


@pytest.mark.parametrize("fault,expected,words", [
    (dict(black=slice(40, 50)), "black stretch", "0.4, must be at most 0.1 s (at 1.60-2.00 s)"),
    (dict(frozen=slice(10, 34)), "frozen stretch while speaking", "must be at most 0.5 s (at 0.4"),
    (dict(cut_sound_s=0.5), "sound length - picture length", "-12.5, must be within 1 frame"),
    (dict(gain=0.0), "loudness", "unknown, must be -32 to -8 LUFS (silent)"),
    (dict(gain=0.02), "loudness", "must be -32 to -8 LUFS"),
    (dict(sound=False), "loudness", "(no sound)"),
    (dict(late=6), "lip lag", "6, must be within 3 frames"),
    (dict(faceless=True), "frames with a face", "0, must be at least 0.9"),
])
def test_each_fault_is_found_and_measured(fault: dict, expected: str, words: str, tmp_path: Path):
    path, timings = videos.make(tmp_path / "bad.mp4", **fault)
    report = check_video(path, phonemes=timings)
    assert expected in failed(report), report.gates
    with pytest.raises(GateFailed) as e: report.demand()
    assert words in e.value.message.split(expected, 1)[1]
    assert expected in e.value.fields["failed"]
    assert error_from_dict(e.value.to_dict()).fields["gates"] == e.value.fields["gates"]


def test_a_mouth_that_says_something_else_is_out_of_sync(tmp_path: Path):
    path, timings = videos.make(tmp_path / "v.mp4")
    said = [o["phoneme"] for o in timings["phonemes"]]
    moved = [dict(o, phoneme=p) for o, p in zip(timings["phonemes"], said[1:] + said[:1], strict=True)]
    assert "lip sync" in failed(check_video(path, phonemes=dict(timings, phonemes=moved)))


def test_a_still_pause_with_a_swaying_head_is_not_frozen(good: tuple[Path, dict, Path]):
    report = check_video(good[0], phonemes=good[1])
    assert not {"frozen stretch", "frozen stretch while speaking"} & failed(report)


def test_a_frozen_silence_is_allowed_for_two_seconds_only(tmp_path: Path):
    image = videos.person()[0]
    write_video(tmp_path / "s.mp4", [image] * 75, 25, np.zeros(3 * 22050), 22050)
    report = check_video(tmp_path / "s.mp4")
    assert "frozen stretch" in failed(report) and "frozen stretch while speaking" not in failed(report)


def test_another_narration_is_noticed(good: tuple[Path, dict, Path], tmp_path: Path):
    path, timings, _ = good
    sound = videos.speech(timings)
    backwards = videos.write_wav(tmp_path / "b.wav", sound[::-1])
    assert "likeness of sound and narration" in failed(check_video(path, backwards, timings))
    shifted = videos.write_wav(tmp_path / "s.wav", np.roll(sound, 4410))
    assert "delay of the sound" in failed(check_video(path, shifted, timings))
    longer = videos.write_wav(tmp_path / "l.wav", np.concatenate([sound, sound[:11025]]))
    assert "sound length - narration length" in failed(check_video(path, longer, timings))


def test_limits_are_parameters(good: tuple[Path, dict, Path]):
    report = check_video(good[0], good[2], good[1], min_sync=0.999, lufs=(-5, 0), max_offset=0.0)
    assert {"lip sync", "loudness"} <= failed(report)


def test_every_second_frame_is_nearly_as_good(good: tuple[Path, dict, Path]):
    whole, half = (check_video(good[0], phonemes=good[1], every=k) for k in (1, 2))
    assert half.ok and abs((whole.sync or 0) - (half.sync or 0)) < 0.1


def test_probe_tells_what_is_in_the_file(good: tuple[Path, dict, Path], tmp_path: Path):
    info = probe(good[0])
    assert (info.codec, info.pix_fmt, info.audio_codec) == ("h264", "yuv420p", "aac")
    assert (info.fps, info.width, info.height) == (25, 512, 512)
    assert info.faststart and info.channels == 1 and info.sample_rate == 22050
    assert abs(info.video_s - info.audio_s) < 0.041 and info.frames == round(info.video_s * 25)
    import av
    with av.open(str(tmp_path / "slow.mp4"), "w") as box:
        stream = box.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), i * 40, np.uint8), format="rgb24")
            box.mux(stream.encode(frame))
        box.mux(stream.encode(None))
    slow = probe(tmp_path / "slow.mp4")
    assert not slow.faststart and slow.audio_s == 0 and slow.frames == 5 and slow.video_s == 0.5


def test_frames_and_sound_come_back(good: tuple[Path, dict, Path]):
    frames = list(read_frames(good[0], every=10))
    assert frames[0][1].shape == (512, 512, 3) and frames[1][0] == pytest.approx(0.4)
    assert next(read_frames(good[0], width=64, form="gray"))[1].shape == (64, 64)
    first = next(iter(videos.talk(np.zeros(1), size=512)))
    assert np.abs(frames[0][1].astype(int) - first).mean() < 4
    sound = read_sound(good[2])
    assert len(sound) == len(videos.speech(good[1])) and sound.dtype == np.float32
    assert len(read_sound(good[2], 16000)) == pytest.approx(len(sound) * 16000 / 22050, abs=40)


def test_files_that_are_no_videos_are_refused(good: tuple[Path, dict, Path], tmp_path: Path):
    (tmp_path / "t.mp4").write_text("hello")
    (tmp_path / "cut.mp4").write_bytes(good[0].read_bytes()[:400])
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("t.mp4", "cut.mp4", "empty.mp4", "none.mp4"):
        with pytest.raises(InputError, match=name): check_video(tmp_path / name)
    with pytest.raises(InputError, match=r"voice\.wav has no picture"): probe(good[2])
    with pytest.raises(InputError, match=r"t\.mp4 is not a sound file"): read_sound(tmp_path / "t.mp4")
    with pytest.raises(InputError, match=r"no sound file x\.wav"): check_video(good[0], tmp_path / "x.wav")


def test_a_video_cut_off_in_transfer_does_not_pass(good: tuple[Path, dict, Path], tmp_path: Path):
    data = good[0].read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[:len(data) // 2])
    try: report = check_video(tmp_path / "half.mp4", good[2], good[1])
    except InputError as e: assert "half.mp4" in e.message
    else: assert not report.ok


def test_sheet_poster_and_plots_are_pictures(good: tuple[Path, dict, Path], tmp_path: Path):
    sheet = contact_sheet(good[0], columns=4, rows=3, width=96)
    assert sheet.shape == (3 * 100 + 4, 4 * 100 + 4, 3)
    assert cv2.imread(str(save_png(sheet, tmp_path / "s.png"))).shape == sheet.shape
    for data in (thumbnail(good[0]), poster(good[0]), thumbnail(tmp_path / "s.png", width=50)):
        assert cv2.imdecode(np.frombuffer(data, np.uint8), 1).shape[1] in (320, 512, 50)
    report = check_video(good[0], phonemes=good[1])
    assert plot_check(report, good[1]).data.startswith(b"\x89PNG")
    assert gate_table(report).data.count("✓") == len(report.gates)


def test_a_turned_face_in_a_dark_video_is_followed(tmp_path: Path):
    timings = videos.phonemes()
    n = round(timings["duration_s"] * 25)
    frames = ((f * 0.2).astype(np.uint8) for f in videos.talk(videos.opening(timings, n), size=512))
    p = measure_picture(write_video(tmp_path / "dark.mp4", frames, 25, crf=14))
    lips = np.array([np.nan if v is None else v for v in p.opening])
    assert np.isfinite(lips).mean() > 0.95
    assert correlate(lips[np.isfinite(lips)], videos.opening(timings, n)[np.isfinite(lips)])[0] > 0.5


def test_a_refused_video_still_leaves_report_and_sheet(
    good: tuple[Path, dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):
    import papermill
    monkeypatch.setenv("SPIN_STEP_DIR", str(tmp_path))
    (tmp_path / "p.json").write_text(json.dumps(good[1]))
    notebook = Path(__file__).parents[1] / "pipelines" / "steps" / "video_check.ipynb"
    given = dict(video=str(good[0]), audio=str(good[2]), phonemes=str(tmp_path / "p.json"), min_sync=0.999)
    with pytest.raises(papermill.PapermillExecutionError, match=r"GateFailed.*lip sync is 0\.\d+, must be"):
        papermill.execute_notebook(str(notebook), str(tmp_path / "out.ipynb"), given, kernel_name="python3",
                                   progress_bar=False)
    left = json.loads((tmp_path / "video.check" / "outputs.json").read_text())
    report = json.loads((tmp_path / "video.check" / left["report"]).read_text())
    assert [g["name"] for g in report["gates"] if not g["ok"]] == ["lip sync"]
    assert cv2.imread(str(tmp_path / "video.check" / left["sheet"])) is not None


def test_loudness_of_known_sounds():
    t = np.arange(48000 * 3) / 48000
    assert loudness(np.sin(2 * np.pi * 997 * t), 48000) == pytest.approx(-3.01, abs=0.1)
    assert loudness(0.1 * np.sin(2 * np.pi * 997 * t), 48000) == pytest.approx(-23.01, abs=0.1)
    assert loudness(np.zeros(10), 48000) == -np.inf
    assert np.isfinite(loudness(0.1 * np.sin(2 * np.pi * 997 * t[:6000]), 48000))


def test_correlation_finds_the_shift():
    rng = np.random.default_rng(3)
    wave = np.convolve(rng.normal(size=200), np.ones(5), "same")
    assert correlate(wave, wave) == pytest.approx((1, 0, 1))
    for k in (-7, -2, 4): assert correlate(np.roll(wave, k), wave)[1] == k
    assert correlate(np.ones(50), wave[:50])[0] == 0
