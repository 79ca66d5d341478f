"""How head and face move beside the lips: nods with the prosody, a smile that relaxes."""
from pathlib import Path

import cv2
import numpy as np
import portraits
import pytest

from myspinbot.media.face import Portrait, prepare_portrait
from myspinbot.media.lips import MOUTH, Axes
from myspinbot.media.mesh import ibug, place_mesh, square_around
from myspinbot.media.rig import Rig
from myspinbot.media.speech import speak
from myspinbot.media.visemes import Track, mouth_track, read_sounds

TEXT = ("We were told that nothing would change here. But the old harbour, which my father built, has become a garden! "
        "Do you remember the summer of storms? I never forgot it, and I never will.")
VOWELS = "iyɨʉɪʏᵻeøɛœæaäɑɐʌɶəɘɜɝɚɞɵɒɔoɤʊɯu"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path: Path = tmp_path_factory.mktemp("said") / "speech.wav"
    return speak(TEXT, path)


@pytest.fixture(scope="module")
def smiling() -> Portrait: return prepare_portrait(portraits.astronaut(), size=512)


@pytest.fixture(scope="module")
def rig(smiling: Portrait) -> Rig: return Rig.from_portrait(smiling.image, smiling.landmarks)


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


def lips_of(rig: Rig, portrait: Portrait, **controls: float) -> np.ndarray:
    "Corners, and the middle of upper and lower inner lip, in mm of the face."
    found = place_mesh(rig.frame(controls), *square_around(portrait.landmarks.array), looks=2).points
    return rig.axes.local(found[[61, 291, 13, 14]])


def test_a_smile_relaxes_in_speech_and_comes_back_in_pauses(rig: Rig, smiling: Portrait):
    rest, relaxed = lips_of(rig, smiling), lips_of(rig, smiling, relax=1)
    bow, flat = (o[2:, 1].mean() - o[:2, 1] for o in (rest, relaxed))  # how far the corners stand above the middle
    assert (flat < bow - 0.5).all(), (bow, flat)
    assert np.ptp(relaxed[2:, 1]) < np.ptp(rest[2:, 1]) + 0.3  # the lips stay shut
    rows = [("_", 0.0, 1.0), ("m", 1.0, 1.2), ("a", 1.2, 1.6), ("_", 1.6, 3.4), ("m", 3.4, 3.6), ("a", 3.6, 4.0), ("_", 4.0, 5.0)]
    track = mouth_track({"phonemes": [dict(phoneme=p, start_s=a, end_s=b) for p, a, b in rows]}, 25, 125)
    relax = track["relax"]
    assert relax[:12].max() == relax[62:75].max() == relax[120:].max() == 0
    assert relax[32:39].min() > 0.8 and relax[92:99].min() > 0.8
    assert np.abs(np.diff(relax)).max() < 0.2


def test_a_relaxing_smile_does_not_tear_the_mouth(rig: Rig):
    fields, x0, y0 = rig.fields, *rig.fields.box[:2]
    for controls in (dict(relax=1.0), dict(relax=1.0, press=1.0), dict(relax=1.0, jaw=0.6)):
        w = np.array([1.0, *(controls.get(k, 0.0) for k in MOUTH)])
        for field in (fields.upper, fields.lower):
            down = np.gradient(np.tensordot(w, field, 1)[..., 1], fields.step, axis=0)
            assert down.min() > -1, controls  # skin never passes other skin
    x, y = (rig.axes.image(np.array([(rig.lips.centre, 0.0)]))[0] - (x0, y0)).astype(int) // fields.step
    one = MOUTH.index("relax") + 1
    assert np.abs(fields.upper[one, y - 6:y + 6, x - 6:x + 6] - fields.lower[one, y - 6:y + 6, x - 6:x + 6]).max() < 0.5


def moved(rig: Rig, place: tuple[float, float], half: float = 6.0, base: dict | None = None, **controls: float) -> np.ndarray:
    "How far the skin around a place of the face moves, in mm right and down, as its pixels show."
    (x0, y0), (x1, y1) = np.sort(rig.axes.image(np.array([place]) + [(-half, -half), (half, half)]).astype(int), axis=0)
    before, after = (cv2.cvtColor(rig.frame({**(base or {}), **c}), cv2.COLOR_RGB2GRAY) for c in ({}, controls))
    flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 4, 21, 5, 7, 1.5, 0)
    return np.median(flow[y0:y1, x0:x1].reshape(-1, 2), axis=0) / rig.axes.mm


SIDES = ((48, 31, 2, 41, -1), (54, 35, 14, 46, 1))  # corner of the mouth, nostril, jaw line, lower lid; left or right


def test_cheeks_follow_the_mouth(rig: Rig):
    p = rig.lips.p
    for corner, nostril, jaw, lid, _ in SIDES:
        apple = 0.65 * p[corner, 0] + 0.35 * p[jaw, 0], 0.6 * p[nostril, 1] + 0.4 * p[lid, 1]
        assert moved(rig, apple, wide=1)[1] < -0.7
        assert moved(rig, apple, round=1)[1] > 0.2


def test_folds_deepen_with_a_wide_mouth_and_flatten_with_a_round_one(rig: Rig, smiling: Portrait):
    p, image = rig.lips.p, smiling.image.copy()
    folds = [(p[nostril] + p[corner]) / 2 + (7.5 * side, -0.5) for corner, nostril, _, _, side in SIDES]
    for fold in folds:  # skin without any fold
        (x0, y0), (x1, y1) = np.sort(rig.axes.image(fold + np.array([(-9.0, -11), (9, 11)])).astype(int), axis=0)
        image[y0:y1, x0:x1] = 190, 150, 130
    flat = Rig.from_portrait(image, smiling.landmarks)
    for fold in folds:
        (x0, y0), (x1, y1) = np.sort(rig.axes.image(fold + np.array([(-4.0, -2), (4, 2)])).astype(int), axis=0)
        rest, wide, pursed = (flat.frame({k: 1.0} if k else {})[y0:y1, x0:x1].mean(-1) for k in ("", "wide", "round"))
        assert np.ptp(rest) < 2 and wide.min() < 0.94 * rest.min() and pursed.max() > 1.02 * rest.max()


def below(rig: Rig, mm: float) -> tuple[float, float]:
    "The place so far below the chin."
    return rig.lips.p[8, 0], rig.lips.p[8, 1] + mm


def test_a_beard_moves_as_one_piece_with_the_chin(smiling: Portrait):
    p = ibug(smiling.landmarks.array).copy()
    p[2:15, 1] += 12 * Axes.of(p).mm * np.cos(np.linspace(-1.4, 1.4, 13))  # it hangs 12 mm below the chin
    bearded = Rig.from_portrait(portraits.beard(smiling.image, p), smiling.landmarks)
    chin, tip = (moved(bearded, below(bearded, mm), half=4, jaw=0.6) for mm in (-8.0, 7.0))
    assert chin[1] > 4 and np.abs(tip - chin).max() < 0.15 * chin[1], (chin, tip)
    assert np.abs(moved(bearded, below(bearded, 29.0), half=3, jaw=0.6)).max() < 0.25 * chin[1]


def test_a_collar_near_the_chin_stays(smiling: Portrait):
    p, axes = ibug(smiling.landmarks.array), Axes.of(ibug(smiling.landmarks.array))
    q, image = axes.local(p), smiling.image.copy()
    x, y = np.moveaxis(axes.local(np.stack(np.meshgrid(np.arange(512), np.arange(512)), -1)), -1, 0)
    edge = np.interp(x, q[3:14, 0], q[3:14, 1]) + 13  # a knitted collar, 13 mm below the outline of the chin
    collar = (y > edge) & (np.abs(x - q[8, 0]) < 45)
    knit = np.float32((70, 90, 150)) + 30 * np.sin(2.0 * x + 2.0 * y)[..., None]
    image[collar] = knit[collar].clip(0, 255)
    rig = Rig.from_portrait(image, smiling.landmarks)
    seen = (y > edge + 1.5) & (y < edge + 8) & (np.abs(x - q[8, 0]) < 12)
    change = np.abs(rig.frame(jaw=0.7).astype(int) - rig.frame().astype(int))[seen]
    assert seen.sum() > 100 and change.mean() < 1, change.mean()
    assert moved(rig, below(rig, -8.0), half=4, jaw=0.7)[1] > 5  # while the chin drops


def frame_moves(rig: Rig, frame: np.ndarray, **controls: float) -> float:
    "Mean change of a frame's pixels, in grey levels."
    return float(np.abs(rig.frame(controls).astype(int) - rig.frame().astype(int))[frame].mean())


def test_glasses_stay_rigid(smiling: Portrait):
    p = ibug(smiling.landmarks.array)
    image = portraits.glasses(smiling.image, p)
    drawn = np.abs(image.astype(int) - smiling.image).max(-1) > 60
    middle = p[36:48, 1].mean()
    frame = drawn & (np.arange(512)[:, None] < middle - 3)  # its upper half, clear of the lids
    assert frame.sum() > 200
    rig = Rig.from_portrait(image, smiling.landmarks)
    for controls in (dict(brow=1.0), dict(brow=1.0, blink=1.0), dict(wide=1.0)):
        assert frame_moves(rig, frame, **controls) < 2, controls
    low = drawn & (np.arange(512)[:, None] > middle + 3)
    assert frame_moves(rig, low, wide=1.0, brow=1.0) < 4


@pytest.mark.parametrize("name", [n for n in portraits.VARIANTS if n not in ("upside_down", "wide_4000")])
def test_glasses_are_seen_where_there_are_some_and_brows_move_elsewhere(name: str):
    portrait = prepare_portrait(portraits.VARIANTS[name](), size=256)
    rig = Rig.from_portrait(portrait.image, portrait.landmarks)
    p = rig.lips.p
    brow = rig.axes.image(p[[19, 24]]).round().astype(int)
    change = max(np.abs(rig.frame(brow=1).astype(int) - rig.frame().astype(int))[y - 3:y + 4, x - 3:x + 4].mean() for x, y in brow)
    assert (change < 0.5) == (name in ("glasses", "hopper", "hopper_dark_turned")), change
