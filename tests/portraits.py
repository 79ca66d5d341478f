"Portraits for the tests, made from the public domain pictures that ship with scikit-image and matplotlib."
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np


@lru_cache(maxsize=1)
def astronaut() -> np.ndarray:
    "Eileen Collins, NASA: 512x512, a face of 90 pixels, smiling with her teeth."
    from skimage import data
    return np.ascontiguousarray(data.astronaut())


@lru_cache(maxsize=1)
def hopper() -> np.ndarray:
    "Grace Hopper, US Navy: 512x600, glasses, a cap, mouth closed."
    from matplotlib import cbook
    from PIL import Image
    with cbook.get_sample_data("grace_hopper.jpg") as f: return np.asarray(Image.open(f).convert("RGB"))


@lru_cache(maxsize=1)
def marks() -> np.ndarray:
    "The astronaut's landmarks, the 68 of iBUG."
    from myspinbot.media.face import choose_face, find_faces, refine_face
    from myspinbot.media.mesh import ibug
    return ibug(refine_face(astronaut(), choose_face(find_faces(astronaut()))[0])[1])


def turned(rgb: np.ndarray, degrees: float, border: int = cv2.BORDER_REFLECT) -> np.ndarray:
    h, w = rgb.shape[:2]
    m = cv2.getRotationMatrix2D((w * 0.45, h * 0.3), degrees, 1)
    return cv2.warpAffine(rgb, m, (w, h), flags=cv2.INTER_CUBIC, borderMode=border)


def yawed(rgb: np.ndarray, p: np.ndarray, degrees: float) -> np.ndarray:
    "The head turned aside, as if it were painted on an upright cylinder; `p` are its 68 landmarks."
    y, x = np.mgrid[:rgb.shape[0], :rgb.shape[1]].astype(np.float32)
    middle, r = (p[0, 0] + p[16, 0]) / 2, 0.75 * (p[16, 0] - p[0, 0])
    seen = np.arcsin(np.clip((x - middle) / r, -1, 1)) - np.radians(degrees)
    aside = middle + r * np.sin(np.clip(seen, -np.pi / 2, np.pi / 2))
    near = (np.clip(1 - (np.abs(x - middle) - 0.8 * r) / (0.2 * r), 0, 1)
            * np.clip(1 - (np.abs(y - p[27:, 1].mean()) - 1.6 * r) / (0.3 * r), 0, 1))
    return cv2.remap(rgb, (x + near * (aside - x)).astype(np.float32), y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def dark(rgb: np.ndarray, light: float = 0.13) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 1.2, rgb.shape)
    return (rgb * light + noise).clip(0, 255).astype(np.uint8)


def glasses(rgb: np.ndarray, p: np.ndarray) -> np.ndarray:
    "Dark round frames with a slight reflection."
    out, k = cv2.resize(rgb, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC), 4
    eyes = [p[36:42].mean(0) * k, p[42:48].mean(0) * k]
    r = 0.30 * float(np.linalg.norm(eyes[1] - eyes[0]))
    ink, w = (38, 30, 34), max(2, round(r * 0.13))
    glass = out.copy()
    rings = [((round(e[0]), round(e[1])), (round(r), round(r * 0.82)), 0, 0, 360) for e in eyes]
    for ring in rings: cv2.ellipse(glass, *ring, (205, 215, 225), -1)
    out = cv2.addWeighted(out, 0.9, glass, 0.1, 0)
    for ring in rings: cv2.ellipse(out, *ring, ink, w, cv2.LINE_AA)
    a, b = eyes[0] + (r, 0), eyes[1] - (r, 0)
    cv2.line(out, tuple(np.round(a).astype(int)), tuple(np.round(b).astype(int)), ink, w, cv2.LINE_AA)
    for e, temple, s in ((eyes[0], p[0] * k, -1), (eyes[1], p[16] * k, 1)):
        cv2.line(out, (round(e[0] + s * r), round(e[1])), tuple(np.round(temple).astype(int)), ink, w, cv2.LINE_AA)
    return cv2.resize(out, (rgb.shape[1], rgb.shape[0]), interpolation=cv2.INTER_AREA)


def beard(rgb: np.ndarray, p: np.ndarray) -> np.ndarray:
    "A full beard and moustache of drawn hairs; the lips stay free."
    k, rng = 4, np.random.default_rng(2)
    out = cv2.resize(rgb, None, fx=k, fy=k, interpolation=cv2.INTER_CUBIC)
    q, unit = p * k, float(np.linalg.norm(p[45] - p[36])) * k
    low = q[2:15] + (0, 0.06 * unit)
    skin, lips = np.zeros(out.shape[:2], np.uint8), np.zeros(out.shape[:2], np.uint8)
    upper = np.array([q[14] * .75 + q[54] * .25, q[35] + (0.03 * unit, 0.10 * unit), q[33] + (0, 0.05 * unit),
                      q[31] + (-0.03 * unit, 0.10 * unit), q[2] * .75 + q[48] * .25])
    cv2.fillPoly(skin, [np.vstack([low, upper]).round().astype(np.int32)], 255)
    cv2.fillPoly(lips, [q[48:60].round().astype(np.int32)], 255)
    lips = cv2.dilate(lips, np.ones((5, 5), np.uint8))
    soft = cv2.GaussianBlur(((skin > 0) & (lips == 0)).astype(np.float32), (0, 0), unit * 0.025)
    hair = out.copy()
    ys, xs = np.nonzero((skin > 0) & (lips == 0))
    for i in rng.integers(0, len(xs), 9000):
        x, y = int(xs[i]), int(ys[i])
        lean, tone = (x - q[8][0]) / unit * 0.6 + rng.normal(0, .25), rng.integers(28, 92)
        n = unit * rng.uniform(.03, .07)
        ink = (int(tone), int(tone * .72), int(tone * .5))
        cv2.line(hair, (x, y), (round(x + n * lean), round(y + n)), ink, 2, cv2.LINE_AA)
    out = (out * (1 - soft[..., None]) + hair * soft[..., None]).astype(np.uint8)
    return cv2.resize(out, (rgb.shape[1], rgb.shape[0]), interpolation=cv2.INTER_AREA)


def wide_4000(rgb: np.ndarray) -> np.ndarray:
    "4000 pixels wide, the person at its right; the rest is a soft continuation of the wall."
    big = cv2.resize(rgb, (2600, 2600), interpolation=cv2.INTER_CUBIC)
    left = cv2.GaussianBlur(cv2.resize(big[:, :300], (1400, 2600)), (0, 0), 30)
    return np.hstack([left, big])


def small_face(rgb: np.ndarray, width: int = 320) -> np.ndarray:
    return cv2.resize(rgb, (width, width * rgb.shape[0] // rgb.shape[1]), interpolation=cv2.INTER_AREA)


VARIANTS: dict[str, Callable[[], np.ndarray]] = {
    "plain": astronaut,
    "dark": lambda: dark(astronaut()),
    "turned_15": lambda: turned(astronaut(), 15),
    "turned_minus_30": lambda: turned(astronaut(), -30),
    "upside_down": lambda: np.ascontiguousarray(astronaut()[::-1, ::-1]),
    "glasses": lambda: glasses(astronaut(), marks()),
    "beard": lambda: beard(astronaut(), marks()),
    "wide_4000": lambda: wide_4000(astronaut()),
    "face_of_90": lambda: np.ascontiguousarray(astronaut()[20:220, 120:330]),
    "face_of_55": lambda: small_face(astronaut()),
    "yaw_20": lambda: yawed(astronaut(), marks(), 20),
    "yaw_minus_20": lambda: yawed(astronaut(), marks(), -20),
    "hopper": hopper,
    "hopper_dark_turned": lambda: dark(turned(hopper(), -15)),
}


def write(name: str, folder: Path) -> Path:
    "A variant as a PNG file."
    path = folder / f"{name}.png"
    if not path.exists(): cv2.imwrite(str(path), VARIANTS[name]()[..., ::-1])
    return path


def drawn_face(seed: int, n: int = 400) -> np.ndarray:
    "A simple drawn face: an outline, eyes, brows, a nose, a mouth, perhaps hair and ears, in flat colours; (n, n, 3)."
    r, size = np.random.default_rng(seed), 4 * n
    skin = [(255, 204, 153), (240, 190, 150), (224, 172, 105), (141, 85, 36), (255, 224, 189), (198, 134, 66), (255, 255, 255),
            (250, 220, 120)][r.integers(8)]
    def colour(low: int, high: int) -> tuple[int, ...]: return tuple(int(v) for v in r.integers(low, high, 3))
    out, ink, w = np.full((size, size, 3), colour(150, 256), np.uint8), colour(0, 60), int(r.integers(6, 18))
    cx, cy, a, b = size * (0.5 + r.uniform(-.04, .04)), size * 0.5, size * r.uniform(.2, .29), size * r.uniform(.29, .38)
    hair, style, thin = colour(0, 200), r.integers(4), max(2, w // 2)

    def oval(x: float, y: float, wide: float, high: float, ink: tuple[int, ...], line: int = -1, arc: tuple[int, int] = (0, 360)):
        cv2.ellipse(out, (round(x), round(y)), (round(wide), round(high)), 0, *arc, ink, line, cv2.LINE_AA)
    if style == 1: oval(cx, cy - .06 * size, 1.18 * a, 1.05 * b, hair)
    if style == 2: oval(cx, cy + .02 * size, 1.3 * a, 1.25 * b, hair)
    if r.random() < .5:
        for s in (-1, 1):
            oval(cx + s * a, cy, .12 * a, .16 * b, skin)
            oval(cx + s * a, cy, .12 * a, .16 * b, ink, w)
    cv2.rectangle(out, (round(cx - .3 * a), round(cy + .8 * b)), (round(cx + .3 * a), size), skin, -1)
    oval(cx, cy, a, b, skin)
    oval(cx, cy, a, b, ink, w)
    if style: oval(cx, cy - .62 * b, .95 * a, .42 * b, hair, arc=(180, 360))
    y, apart, wide = cy - b * r.uniform(.08, .2), a * r.uniform(.36, .44), a * r.uniform(.14, .22)
    high = wide * r.uniform(.5, 1.0)
    for x in (cx - apart, cx + apart):
        oval(x, y, wide, high, (255, 255, 255))
        oval(x, y, wide, high, ink, thin)
        oval(x, y, .62 * high, .62 * high, colour(20, 150))
        oval(x, y, .3 * high, .3 * high, (0, 0, 0))
        oval(x, y - high - .08 * b, 1.2 * wide, .6 * high, hair if style else ink, w, (200, 340))
    oval(cx, cy + b * r.uniform(.1, .22), .1 * a, .06 * b, ink, thin, (0, 180))
    y, wide, red = cy + b * r.uniform(.42, .55), a * r.uniform(.26, .45), (int(r.integers(150, 255)), *colour(0, 90)[:2])
    if r.random() < .5: oval(cx, y - .06 * b, wide, .12 * b, red, w, (15, 165))
    else: oval(cx, y, wide, .07 * b, red)
    return cv2.resize(out, (n, n), interpolation=cv2.INTER_AREA)


def masked(rgb: np.ndarray, p: np.ndarray) -> np.ndarray:
    "A face mask over mouth and nose; `p` are the 68 landmarks."
    out = rgb.copy()
    edge = np.vstack([p[3:14], p[[29]] * 0.5 + p[[14]] * 0.5, p[[28]], p[[29]] * 0.5 + p[[2]] * 0.5])
    cv2.fillPoly(out, [edge.round().astype(np.int32)], (168, 200, 214), cv2.LINE_AA)
    noise = np.random.default_rng(3).normal(0, 2, out.shape)
    return (cv2.GaussianBlur(out, (0, 0), 0.6) + noise).clip(0, 255).astype(np.uint8)
