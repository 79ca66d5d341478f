"Eyes of the talking portrait: lids that cover the eye without an outline, irises that stay between them."
from functools import lru_cache

import cv2
import numpy as np
import portraits
import pytest
from scipy.ndimage import map_coordinates

from myspinbot.face import Portrait, prepare_portrait
from myspinbot.mesh import place_mesh, square_around
from myspinbot.rig import Rig

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
    near = inside(portrait.landmarks.array, 512, 9 * rig.axes.mm)
    for pose in ({}, dict(jaw=0.5, dx=1.0, roll=0.6)):
        a, b = rig.frame(pose), rig.frame(pose, blink=0.7, gaze_x=1.0, gaze_y=0.4)
        assert (a != b).any() and not (a != b).any(-1)[~near].any()
