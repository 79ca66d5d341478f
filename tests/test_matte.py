"The matte of a portrait, other backgrounds, and a head that sways without them: on real pictures, with known mattes."
import json
from pathlib import Path

import av
import cv2
import numpy as np
import papermill
import portraits
import pytest
from PIL import Image
from skimage import data

from myspinbot.core import InputError
from myspinbot.media.face import Portrait, prepare_portrait
from myspinbot.media.video import contact_sheet, probe, read_frames, thumbnail
from myspinbot.media.matte import GREEN, UNSURE, Matte, find_matte, foreground, load_cutout
from myspinbot.media.picture import CLEAR, load_picture
from myspinbot.media.rig import Rig
from myspinbot.media.speech import speak
from myspinbot.media.talk import frame_count, load_phonemes, load_rig, mouth_track, render, sound_seconds, video_name
from myspinbot.media.quality import check_video

STEPS = Path(__file__).parents[1] / "pipelines" / "steps"
PICTURES = dict(astronaut=portraits.astronaut, hopper=portraits.hopper)


@pytest.fixture(scope="module", params=list(PICTURES))
def portrait(request) -> Portrait:
    return prepare_portrait(PICTURES[request.param](), 512)


@pytest.fixture(scope="module")
def matte(portrait) -> Matte:
    return find_matte(portrait.image, portrait.landmarks.array)


def scenes(n: int = 512) -> dict[str, np.ndarray]:
    "What to lay a cut-out on: plain, graded, and textured."
    ramp = np.linspace(60, 220, n)
    square = lambda a: cv2.resize(np.ascontiguousarray(a[:400, :400]), (n, n), interpolation=cv2.INTER_AREA)
    return dict(blue=np.full((n, n, 3), (120, 150, 190), np.uint8), graded=np.dstack([np.tile(ramp, (n, 1))] * 3).astype(np.uint8),
                rocket=square(data.rocket()), gravel=np.dstack([square(data.gravel())] * 3))


def gradient(a: np.ndarray) -> np.ndarray:
    return np.hypot(cv2.Sobel(a, cv2.CV_32F, 1, 0), cv2.Sobel(a, cv2.CV_32F, 0, 1))


def laid_on(portrait: Portrait, matte: Matte, scene: np.ndarray) -> np.ndarray:
    a = matte.alpha[..., None]
    return (foreground(portrait.image, matte.alpha) * a + scene * (1 - a) + 0.5).astype(np.uint8)


@pytest.mark.parametrize("scene, most", [("blue", 0.015), ("graded", 0.025), ("rocket", 0.04), ("gravel", 0.04)])
def test_the_matte_that_a_picture_was_made_with_is_found_again(portrait, matte, scene: str, most: float):
    picture = laid_on(portrait, matte, scenes()[scene])
    found = find_matte(picture, portrait.landmarks.array).alpha
    error, slope = np.abs(found - matte.alpha).mean(), np.abs(gradient(found) - gradient(matte.alpha)).mean()
    assert error < most, f"alpha is off by {error:.4f} on average"
    assert slope < 0.06, f"its gradient by {slope:.4f}"


def test_the_face_is_whole_and_the_corners_are_free(portrait, matte):
    face = np.zeros((512, 512), np.uint8)
    cv2.fillConvexPoly(face, cv2.convexHull(portrait.landmarks.array).round().astype(np.int32), 1)
    inner = cv2.erode(face, np.ones((9, 9), np.uint8)) > 0
    assert matte.alpha[inner].min() == 1, "nothing of the face, lenses of glasses included, is transparent"
    assert matte.alpha[400:, 200:312].mean() > 0.98, "neither is the chest"
    assert matte.alpha.dtype == np.float32 and 0 <= matte.alpha.min() and matte.alpha.max() <= 1


def test_another_person_in_the_picture_is_not_cut_out_with_the_first(portrait, matte):
    picture, small = np.full((512, 512, 3), 150, np.uint8), [cv2.resize(o, (240, 240), interpolation=cv2.INTER_AREA)
                                                             for o in (foreground(portrait.image, matte.alpha), matte.alpha)]
    narrow = small[1] * (np.abs(np.arange(240) - 120) < 100)  # so that the two do not touch
    for x in (10, 264):
        part = picture[272:, x:x + 240]
        part[:] = small[0] * narrow[..., None] + part * (1 - narrow[..., None])
    points = portrait.landmarks.array * (240 / 512) + (264, 272)
    found = find_matte(picture, points).alpha
    assert found[272:, :240].max() < 0.1 and found[272:, 264:504].mean() > 0.2
    assert find_matte(picture, points - (254, 0)).alpha[272:, 270:].max() < 0.1, "the other one, asked for, is the person"


@pytest.mark.parametrize("light, dark", [((245, 245, 245), (20, 20, 30))])
def test_no_rim_of_the_old_background_stays(portrait, matte, light, dark):
    edge = (matte.alpha > 0.2) & (matte.alpha < 0.8)
    assert edge.sum() > 200
    for old, new in ((light, dark), (dark, light)):
        picture = laid_on(portrait, matte, np.full((512, 512, 3), old, np.uint8))
        truth = laid_on(portrait, matte, np.full((512, 512, 3), new, np.uint8)).astype(float)
        a = matte.alpha[..., None]
        mixed = picture * a + np.float32(new) * (1 - a)  # without the person's own colours
        freed = foreground(picture, matte.alpha) * a + np.float32(new) * (1 - a)
        off = [np.abs(o[edge] - truth[edge]).mean() for o in (mixed, freed)]
        assert off[1] < 0.6 * off[0] and off[1] < 12, off


def test_kept_backgrounds_leave_every_bit_as_it_was(portrait):
    again = prepare_portrait(portrait.picture, 512, background="keep")
    assert np.array_equal(again.image, portrait.image) and again.cut is None and again.stored is again.image
    assert again.landmarks.points == portrait.landmarks.points
    assert "background" not in again.landmarks.source


@pytest.mark.parametrize("background", ["blur", "green", "navy", "#f80", "alpha", "picture"])
def test_each_background_stands_behind_the_same_person(portrait, matte, background: str, tmp_path: Path):
    scene = tmp_path / "scene.jpg"
    Image.fromarray(data.coffee()).save(scene)
    p = prepare_portrait(portrait.picture, 512, background=background, backdrop=scene if background == "picture" else "")
    sure, away = matte.alpha == 1, matte.alpha == 0
    assert np.abs(p.image[sure].astype(int) - portrait.image[sure]).max() <= 1, "the person is not touched"
    behind = dict(green=GREEN, navy=(0, 0, 128), alpha=CLEAR) | {"#f80": (255, 136, 0)}
    if background in behind: assert (p.image[away] == behind[background]).all()
    elif background == "blur":
        away = cv2.erode(away.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        sharp, soft = (cv2.Laplacian(cv2.cvtColor(o, cv2.COLOR_RGB2GRAY), cv2.CV_32F)[away] for o in (portrait.image, p.image))
        assert np.abs(soft).mean() < 0.4 * np.abs(sharp).mean()
        assert np.abs(p.image[away].mean(0) - portrait.image[away].mean(0)).max() < 12, "its colours stay"
    else: assert np.abs(p.image[away].astype(int).mean(0) - data.coffee()[:, 100:500].mean((0, 1))).max() < 40
    assert p.landmarks.source["background"] == background and p.landmarks.points == portrait.landmarks.points
    assert p.stored.shape == (512, 512, 4 if background == "alpha" else 3)


@pytest.mark.parametrize("background, backdrop, said", [
    ("bleu", "", "background='bleu' is unknown"), ("", "", "background='' is unknown"), ("#12345", "", "'#12345' is unknown"),
    (7, "", "background=7 is unknown"), (None, "", "background=None is unknown"), ("x" * 9000, "", "is unknown"),
    ("rgb(1,2,3)", "", "is unknown"), ("picture", "", "needs a picture"), ("keep", "a.png", "A picture is given as backdrop"),
    ("picture", "/none/a.png", "There is no picture a.png"), ("picture", __file__, "test_matte.py is not a picture")])
def test_bad_backgrounds_are_refused_before_the_picture_is_read(background, backdrop, said: str):
    with pytest.raises(InputError) as e: prepare_portrait("/none/portrait.png", background=background, backdrop=backdrop)
    assert said in e.value.message and e.value.hint and len(e.value.message) < 200


def test_an_uncertain_outline_is_noted_and_one_not_seen_refused():
    a = portraits.astronaut()
    calm = prepare_portrait(a, 256, background="green")
    assert calm.cut.doubt < UNSURE and not any("outline" in o for o in calm.landmarks.source["notes"])
    noise = np.random.default_rng(3).normal(0, 60, a.shape)
    doubts = []
    for share in (0.3, 0.6, 0.8, 1.0):
        noisy = np.clip(a + share * noise, 0, 255).astype(np.uint8)
        try: made = prepare_portrait(noisy, 256, upscaler="none", background="green")
        except InputError as e:
            assert "cannot be told from what is behind" in e.message
            doubts.append(1.0)
            continue
        doubts.append(made.cut.doubt)
        assert (made.cut.doubt > UNSURE) == any("outline" in o for o in made.landmarks.source["notes"])
    assert max(doubts) > UNSURE, doubts


@pytest.fixture(scope="module")
def clear(tmp_path_factory) -> tuple[Path, Rig, Path]:
    "A portrait without a background, its rig, and its video."
    folder = tmp_path_factory.mktemp("clear")
    made = prepare_portrait(portraits.astronaut(), 256, background="alpha")
    Image.fromarray(made.stored).save(folder / "portrait.png")
    (folder / "landmarks.json").write_text(made.landmarks.model_dump_json())
    rig = load_rig(folder / "portrait.png", folder / "landmarks.json", 256)
    phonemes = speak("Papa made a map.", folder / "n.wav")
    (folder / "phonemes.json").write_text(json.dumps(phonemes))
    track = mouth_track(phonemes, 25, frame_count(sound_seconds(folder / "n.wav"), 25))
    render(rig, track, folder / "n.wav", folder / video_name(rig))
    return folder, rig, track


def test_a_portrait_without_background_becomes_a_webm_whose_alpha_sways(clear):
    folder, rig, track = clear
    info = probe(folder / "talk.webm")
    assert (info.codec, info.pix_fmt, info.audio_codec) == ("vp9", "yuva420p", "opus")
    assert info.frames == len(track) and info.faststart
    assert abs(info.audio_s - info.video_s) < 1 / 25
    frames = [f for _, f in read_frames(folder / "talk.webm", form="rgba")]
    drawn = [rig.cutout(track.controls(i)) for i in range(len(track))]
    for f, d in zip(frames, drawn, strict=True):
        assert np.abs(f[..., 3].astype(int) - d[..., 3]).mean() < 1.5
        assert np.abs(f[..., :3].astype(int) - d[..., :3])[d[..., 3] > 250].mean() < 6
    assert max(np.abs(d[..., 3].astype(int) - drawn[0][..., 3]).max() for d in drawn) > 40, "the outline moves"


def test_its_pictures_elsewhere_lie_on_light_grey(clear):
    folder, _, _ = clear
    _, frame = next(read_frames(folder / "talk.webm"))
    assert np.abs(frame[:20, :20].astype(int) - CLEAR).max() <= 4
    _, grey = next(read_frames(folder / "talk.webm", form="gray", width=128))
    assert grey.shape == (128, 128) and abs(int(grey[4, 4]) - CLEAR[0]) <= 4
    assert np.abs(contact_sheet(folder / "talk.webm", 2, 1)[10, 10].astype(int) - CLEAR).max() <= 6
    assert np.abs(load_picture(thumbnail(folder / "talk.webm"))[5, 5].astype(int) - CLEAR).max() <= 12
    assert np.abs(load_picture(folder / "portrait.png")[5, 5].astype(int) - CLEAR).max() == 0


def test_the_gates_measure_it(clear):
    folder, _, _ = clear
    report = check_video(folder / "talk.webm", folder / "n.wav", load_phonemes(folder / "phonemes.json"))
    assert report.ok and report.sync > 0.7, report.gates


def test_the_video_does_not_depend_on_a_decoder_that_keeps_the_alpha(clear):
    with av.open(str(clear[0] / "talk.webm")) as f: assert sum(1 for _ in f.decode(video=0)) == len(clear[2])


def test_an_opaque_png_with_an_alpha_channel_makes_an_mp4(clear, tmp_path: Path):
    colours, alpha = load_cutout(clear[0] / "portrait.png")
    assert alpha is not None and alpha.min() == 0
    Image.fromarray(np.dstack([colours, np.full_like(alpha, 255)])).save(tmp_path / "p.png")
    rig = load_rig(tmp_path / "p.png", clear[0] / "landmarks.json", 256)
    assert rig.alpha is None and video_name(rig) == "talk.mp4"


def flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    "How far each pixel moved, by optical flow (Farneback)."
    a, b = (cv2.cvtColor(o, cv2.COLOR_RGB2GRAY) for o in (a, b))
    return np.linalg.norm(cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 4, 15, 5, 7, 1.5, 0), axis=2)


def test_the_background_beside_the_hair_does_not_sway(portrait, matte):
    "On a textured scene, where movement can be measured."
    scene = laid_on(portrait, matte, scenes()["gravel"])
    rig = Rig(scene, portrait.landmarks.array)
    assert rig._plate is not None, "the outline is certain"
    still, swayed = rig.frame(), rig.frame(dx=1.5, roll=1.0)
    x0, y0, x1, y1 = rig.box
    beside = np.zeros((512, 512), bool)
    beside[y0:y1, x0:x1] = True
    away = cv2.distanceTransform((matte.alpha < 0.02).astype(np.uint8), cv2.DIST_L2, 5)
    beside &= (away > 12) & (away < 40)
    moved = flow(still, swayed)
    rig._plate = None
    before = flow(still, rig.frame(dx=1.5, roll=1.0))
    head = matte.alpha[:200] == 1
    assert moved[:200][head].max() > 2.5, "the head does sway"
    assert (np.abs(still.astype(int) - swayed)[beside].max(-1) <= 1).mean() > 0.95, "what is behind does not change"
    beside &= away > 16  # nearer, the window of the optical flow reaches the head
    assert np.percentile(before[beside], 95) > 1
    assert np.percentile(moved[beside], 95) < 0.5


def test_at_rest_the_picture_is_the_portrait(portrait):
    rig = Rig.from_portrait(portrait.image, portrait.landmarks)
    x0, y0, x1, y1 = rig.fields.box
    change = np.abs(rig.frame().astype(int) - portrait.image).max(-1)
    change[y0:y1, x0:x1] = 0  # the lips close
    assert np.percentile(change, 99.9) <= 3, np.percentile(change, 99.9)


@pytest.mark.parametrize("background", ["alpha", "blur"])
def test_the_steps_hand_it_on_from_notebook_to_notebook(background: str, tmp_path: Path, monkeypatch):
    image = portraits.write("glasses", tmp_path)
    def step(name: str, **given: object) -> dict:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("SPIN_STEP_DIR", str(folder))
        papermill.execute_notebook(str(STEPS / f"{name}.ipynb"), str(folder / "out.ipynb"), given, progress_bar=False)
        left = next(folder.rglob("outputs.json"))
        return {k: str(left.parent / v) for k, v in json.loads(left.read_text()).items()}
    made = step("portrait_prepare", image=str(image), size=256, background=background)
    assert Image.open(made["portrait"]).mode == ("RGBA" if background == "alpha" else "RGB")
    spoken = step("speech_piper", text="Hello there.")
    talk = step("portrait_talk", portrait=made["portrait"], landmarks=made["landmarks"], size=256,
                audio=spoken["audio"], phonemes=spoken["phonemes"])
    assert Path(talk["video"]).name == ("talk.webm" if background == "alpha" else "talk.mp4")
    step("video_check", video=talk["video"], audio=spoken["audio"], phonemes=spoken["phonemes"])
