"Eyes of the talking portrait: lids that cover the eye without an outline, irises that stay between them, blinks in pauses."
from functools import lru_cache

import cv2
import numpy as np
import portraits
import pytest
from scipy.ndimage import map_coordinates

from myspinbot.media.face import Portrait, prepare_portrait
from myspinbot.media.mesh import place_mesh, square_around
from myspinbot.media.rig import Rig
from myspinbot.media.visemes import Track, mouth_track

UPPER = ((246, 161, 160, 159, 158, 157, 173), (398, 384, 385, 386, 387, 388, 466))
LOWER = ((7, 163, 144, 145, 153, 154, 155), (382, 381, 380, 374, 373, 390, 249))
CORNERS = ((33, 133), (362, 263))
IRISES = (slice(468, 473), slice(473, 478))


@lru_cache(maxsize=4)
def prepared(name: str, size: int) -> tuple[Portrait, Rig]:
    portrait = prepare_portrait(portraits.VARIANTS[name](), size=size)
    return portrait, Rig.from_portrait(portrait.image, portrait.landmarks)


def contour(points: np.ndarray, eye: int) -> np.ndarray:
    first, last = CORNERS[eye]
    return points[[first, *UPPER[eye], last, *LOWER[eye][::-1]]]


def inside(points: np.ndarray, n: int, wider: float = 0.0) -> np.ndarray:
    "The pixels between the lids of both eyes, and so many around them."
    out = np.zeros((n, n), np.uint8)
    for eye in (0, 1): cv2.fillPoly(out, [contour(points, eye).round().astype(np.int32)], 1)
    k = 2 * round(wider) + 1
    return cv2.dilate(out, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k))) > 0


def seen(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    "The landmarks in a frame."
    return place_mesh(frame, *square_around(points), looks=2).points


def gaps(points: np.ndarray) -> np.ndarray:
    return np.array([np.linalg.norm(points[list(u[1:6])] - points[list(d[1:6])], axis=1).mean()
                     for u, d in zip(UPPER, LOWER, strict=True)])


def outline(frame: np.ndarray, points: np.ndarray, rig: Rig) -> float:
    "How deep a dark line is left where the upper lids were, as a share of the skin's light."
    light, depth, t = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(float), [], np.arange(-4, 2.01, 0.25)
    for i in (i for lid in UPPER for i in lid):
        x, y = (points[i] + t[:, None] * rig.axes.mm * rig.axes.down).T
        v = map_coordinates(light, [y, x], order=1)
        low = 6 + int(v[6:18].argmin())
        depth.append(max(0.0, (min(v[:low + 1].max(), v[low:].max()) - v[low]) / v.max()))
    return float(np.mean(depth))


@pytest.mark.parametrize(("name", "least"), [("plain", 0.81), ("hopper", 0.69), ("dark", 0.8), ("beard", 0.81)])
def test_closed_lids_cover_the_eye(name, least):
    portrait, rig = prepared(name, 512)
    points = portrait.landmarks.array
    closed = 1 - gaps(seen(rig.frame(blink=1), points)) / gaps(seen(rig.frame(), points))
    assert closed.min() > least, closed


@pytest.mark.parametrize("name", ["hopper", "glasses", "face_of_55", "hopper_dark_turned"])
def test_a_closed_eye_has_no_outline_at_256_pixels(name):
    portrait, rig = prepared(name, 256)
    assert outline(rig.frame(blink=1), portrait.landmarks.array, rig) < 0.004


def test_lids_move_further_the_more_they_close():
    portrait, rig = prepared("plain", 512)
    open_ = [gaps(seen(rig.frame(blink=b), portrait.landmarks.array)).mean() for b in (0, 0.25, 0.5, 0.75, 1)]
    assert (np.diff(open_) < 0).all(), open_


@pytest.mark.parametrize("name", ["plain", "hopper"])
def test_irises_move_and_stay_inside_the_lids(name):
    portrait, rig = prepared(name, 512)
    points, mm = portrait.landmarks.array, rig.axes.mm
    still, lids = rig.frame(), inside(points, 512, 0.5 * mm)
    for gaze in ((-1.2, 0), (1.2, 0), (0.6, 0.4)):
        frame = rig.frame(gaze_x=gaze[0], gaze_y=gaze[1])
        assert not (frame != still).any(-1)[~lids].any()
        here, there = seen(still, points), seen(frame, points)
        moved = np.array([(there[i] - there[list(c)].mean(0) - here[i] + here[list(c)].mean(0)).mean(0)
                          for i, c in zip(IRISES, CORNERS, strict=True)]) / mm
        assert (np.sign(moved[:, 0]) == np.sign(gaze[0])).all() and np.abs(moved).max() < 1.8, moved
    assert np.array_equal(rig.frame(gaze_x=0.0), still)


def test_highlights_stay_when_an_iris_moves():
    portrait, rig = prepared("plain", 512)
    points = portrait.landmarks.array
    for i in IRISES:
        x, y = points[i][0]
        r = round(0.6 * float(np.linalg.norm(points[i][1:] - points[i][0], axis=1).mean()))
        cut = slice(round(y) - r, round(y) + r + 1), slice(round(x) - r, round(x) + r + 1)
        at = [np.unravel_index(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY)[cut].argmax(), (2 * r + 1, 2 * r + 1))
              for f in (rig.frame(), rig.frame(gaze_x=1.0))]
        assert np.hypot(*np.subtract(*at)) <= 1


def test_nothing_outside_the_eyes_changes():
    portrait, rig = prepared("plain", 512)
    for pose, sway in (({}, 0), (dict(jaw=0.5, dx=1.0, roll=0.6), 2.5)):
        near = inside(portrait.landmarks.array, 512, (9 + sway) * rig.axes.mm)
        a, b = rig.frame(pose), rig.frame(pose, blink=0.7, gaze_x=1.0, gaze_y=0.4)
        assert (a != b).any() and not (a != b).any(-1)[~near].any()


def spoken(phrases: int, sounds: int = 16) -> tuple[dict, list[tuple[float, float]]]:
    "Phrases of equal sounds with pauses of 0.3 s after them, and where the pauses are."
    rows, pauses, t = [], [], 0.1
    for _ in range(phrases):
        for c in ("m", "ɐ") * (sounds // 2):
            rows.append(dict(phoneme=c, start_s=round(t, 3), end_s=round(t + 0.2, 3)))
            t += 0.2
        pauses.append((t, t + 0.3))
        t += 0.3
    return {"phonemes": [*rows, dict(phoneme=" ", start_s=round(t, 3), end_s=round(t + 0.1, 3))]}, pauses


def blinks(track: Track) -> np.ndarray:
    "When the lids of a track are first shut, in seconds."
    shut = track["blink"] > 0.9
    return np.flatnonzero(shut & ~np.r_[False, shut[:-1]]) / track.fps


def test_blinks_prefer_pauses():
    phonemes, pauses = spoken(12)
    at = np.concatenate([blinks(mouth_track(phonemes, 50, 50 * 42, seed=s)) for s in range(12)])
    chance = 0.4 * len(pauses) / 42
    share = np.mean([any(a - 0.05 <= t <= b + 0.05 for a, b in pauses) for t in at])
    assert len(at) / (12 * 42) > 1 / 6  # a blink in six seconds at least
    assert share > max(0.45, 3 * chance), share


def test_lids_close_faster_than_they_open():
    track = mouth_track(spoken(4)[0], 120, 120 * 12, motion=0)
    v = track["blink"]
    top = np.flatnonzero((v > 0.999) & (np.r_[0, v[:-1]] <= 0.999))[0]
    after = v[top:top + 48]
    closing, opening = (v[top - 24:top] > 0.01).sum(), ((after > 0.01) & (after <= 0.999)).sum()
    assert 0.05 <= closing / 120 <= 0.09 and 0.11 <= opening / 120 <= 0.16, (closing, opening)


def test_gaze_returns_to_the_camera_and_follows_motion_and_seed():
    phonemes, _ = spoken(8)
    track = mouth_track(phonemes, 25, 25 * 28, seed=3)
    x, y = track["gaze_x"], track["gaze_y"]
    assert 0.4 < np.abs(x).max() <= 1.2 and np.abs(y).max() < 0.6
    assert ((x == 0) & (y == 0)).mean() > 0.4
    moving = np.abs(np.diff(x)) > 1e-3
    assert moving.mean() < 0.15  # saccades are short, fixations long
    assert not mouth_track(phonemes, 25, 25 * 28, seed=3, motion=0)["gaze_x"].any()
    assert (mouth_track(phonemes, 25, 25 * 28, seed=4)["gaze_x"] != x).any()
    assert np.array_equal(track["jaw"], mouth_track(phonemes, 25, 25 * 28, seed=4)["jaw"])
