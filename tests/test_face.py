"Portrait preparation on real pictures: what people bring, and what must be refused."
import io
import json
from pathlib import Path

import cv2
import numpy as np
import portraits
import pytest
from PIL import Image

from myspinbot.core import InputError
from myspinbot.media.face import (
    Landmarks, choose_face, crop_square, eye_line, find_faces, load_landmarks, prepare_portrait,
)
from myspinbot.media.picture import enlarge, fit_size, load_picture


@pytest.mark.parametrize("name", list(portraits.VARIANTS))
def test_every_kind_of_portrait_comes_out_straight_framed_and_lit(name: str, tmp_path: Path):
    p = prepare_portrait(portraits.write(name, tmp_path), 512)
    points = p.landmarks.array
    middle, distance, angle = eye_line(points)
    assert p.image.shape == (512, 512, 3) and p.image.dtype == np.uint8
    assert abs(angle) < 1.5, f"eyes lean by {angle:.1f} degrees"
    assert abs(middle[0] - 256) < 25 and 150 < middle[1] < 260 and 65 < distance < 125
    assert p.landmarks.score > 0.4
    assert (points > 0).all() and (points < 512).all()
    face = p.image[p.landmarks.box[1]:p.landmarks.box[3], p.landmarks.box[0]:p.landmarks.box[2]]
    assert 60 < np.median(face) < 215, "the face is neither dark nor burnt"
    border = np.concatenate([p.image[0], p.image[-1], p.image[:, 0], p.image[:, -1]]).max(axis=1)
    assert (border < 3).mean() < 0.2, "no black bars"


@pytest.mark.parametrize("name", ["dark", "turned_15", "face_of_55", "wide_4000", "upside_down", "glasses"])
def test_the_same_person_gives_nearly_the_same_portrait(name: str, tmp_path: Path):
    plain = prepare_portrait(portraits.astronaut(), upscaler="none")
    other = prepare_portrait(portraits.write(name, tmp_path), upscaler="none")
    apart = np.abs(plain.landmarks.array - other.landmarks.array)[17:].mean()
    assert apart < 8, f"landmarks are {apart:.1f} pixels apart"


def test_the_mission_patch_is_not_taken_for_the_face():
    p = prepare_portrait(portraits.astronaut(), upscaler="none")
    x0, y0, _, _ = p.landmarks.source["box"]
    assert 160 < x0 < 200 and 60 < y0 < 100


def test_the_larger_of_two_faces_is_taken_and_noted():
    a = portraits.astronaut()
    small = cv2.resize(a, (300, 300), interpolation=cv2.INTER_AREA)
    both = np.hstack([np.vstack([small, np.full((212, 300, 3), 180, np.uint8)]), a])
    p = prepare_portrait(both, upscaler="none")
    assert p.landmarks.source["box"][0] > 300
    assert "2 faces" in p.landmarks.source["notes"][0]
    assert prepare_portrait(both, face=0, upscaler="none").landmarks.source["box"][2] < 300


@pytest.mark.parametrize("left, right", [(0, 512), (60, 400), (100, 420), (90, 380)])
def test_a_face_is_its_copys_equal_wherever_it_stands(left: int, right: int):
    both = np.hstack([portraits.astronaut()[:, left:right]] * 2)
    with pytest.raises(InputError, match="2 equally good faces"): prepare_portrait(both, upscaler="none")


def test_in_a_group_every_face_that_is_found_is_found_at_its_own_tilt():
    head = portraits.astronaut()[:260, 90:350]
    group = np.full((600, 2000, 3), (120, 130, 140), np.uint8)
    for i, lean in enumerate((0, 30, 60, 90, 120, 150, 180)):
        tile = cv2.resize(head, (230, 230), interpolation=cv2.INTER_AREA)
        m = cv2.getRotationMatrix2D((115, 115), -lean, 1)
        group[100:330, 20 + 240 * i:250 + 240 * i] = cv2.warpAffine(tile, m, (230, 230), borderMode=cv2.BORDER_REPLICATE)
    found = find_faces(group)
    assert len(found) >= 4
    for f in found:
        lean = 30 * round((f.centre[0] - 135) / 240)
        assert abs((f.angle_deg - lean + 180) % 360 - 180) < 12, f
    assert [find_faces(np.zeros(size, np.uint8)) for size in ((1, 5000, 3), (5000, 1, 3))] == [[], []]


def test_two_equal_faces_are_a_question_for_the_user():
    both = np.hstack([portraits.astronaut()[:260]] * 2)
    with pytest.raises(InputError, match=r"2 equally good faces.*box \[.*face=0, 1"): prepare_portrait(both)
    left, right = (prepare_portrait(both, face=i, upscaler="none").landmarks.source["box"][0] for i in (0, 1))
    assert right - left > 400
    with pytest.raises(InputError, match="face=2, but"): prepare_portrait(both, face=2)


def test_pictures_without_a_face_are_refused():
    from skimage import data
    plain = np.zeros((300, 300), np.uint8), np.full((300, 300, 3), 255, np.uint8)
    for rgb in (data.coffee(), data.rocket(), data.chelsea(), data.gravel(), data.camera()[250:], *plain):
        with pytest.raises(InputError, match="No face found"): prepare_portrait(rgb)


def encoded(im: Image.Image, kind: str, **kw: object) -> bytes:
    buf = io.BytesIO()
    im.save(buf, kind, **kw)
    return buf.getvalue()


def test_every_colour_mode_reads_as_the_same_picture(tmp_path: Path):
    rgb = portraits.astronaut()
    im = Image.fromarray(rgb)
    grey16 = (np.asarray(im.convert("L")).astype(np.uint16) * 257)
    cases = {
        "cmyk.jpg": encoded(im.convert("CMYK"), "JPEG", quality=95),
        "palette.png": encoded(im.quantize(256), "PNG"),
        "grey.png": encoded(im.convert("L"), "PNG"),
        "grey16.png": encoded(Image.fromarray(grey16), "PNG"),
        "grey16.tif": encoded(Image.fromarray(grey16), "TIFF"),
        "float.tif": encoded(Image.fromarray(grey16.astype(np.float32) / 65535), "TIFF"),
        "web.webp": encoded(im, "WEBP", quality=95),
        "alpha.png": encoded(Image.fromarray(np.dstack([rgb, np.full((512, 512), 255, np.uint8)])), "PNG"),
        "moving.gif": encoded(im.quantize(256), "GIF", save_all=True, append_images=[im.quantize(64)]),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        got = load_picture(tmp_path / name)
        assert got.shape == rgb.shape and got.dtype == np.uint8, name
        apart = np.abs(got.mean(axis=2) - rgb.mean(axis=2)).mean()
        assert apart < 12, f"{name}: {apart:.1f}"


def test_transparent_parts_become_light_not_black():
    a = np.dstack([portraits.astronaut(), np.zeros((512, 512), np.uint8)])
    assert (load_picture(a) == 225).all()


def test_a_phone_picture_is_turned_by_its_exif_mark(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 8
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(portraits.astronaut(), -1)))
    lying.save(tmp_path / "phone.jpg", exif=exif)
    assert abs(prepare_portrait(tmp_path / "phone.jpg", upscaler="none").landmarks.angle_deg) < 8


def test_what_is_not_a_picture_is_named_with_what_it_is(tmp_path: Path):
    good = encoded(Image.fromarray(portraits.astronaut()), "JPEG")
    bomb = Image.new("1", (30000, 30000))
    files = {
        "text.jpg": (b"<html>404</html>", "is not a picture: found a text that begins '<html>"),
        "half.jpg": (good[:len(good) // 2], "half.jpg is damaged"),
        "empty.png": (b"", r"empty \(0 bytes\)"),
        "noise.png": (bytes(range(128, 256)), "found bytes 80 81"),
        "tiny.png": (encoded(Image.new("RGB", (20, 20)), "PNG"), "only 20x20"),
        "bomb.png": (encoded(bomb, "PNG"), "too large|megapixels"),
        "song.jpg": (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), "is not a picture"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message) as e: prepare_portrait(tmp_path / name)
        assert name in e.value.message and e.value.hint
    with pytest.raises(InputError, match=r"no picture none\.jpg"): load_picture(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="not a file"): load_picture(tmp_path)
    with pytest.raises(InputError, match="shape"): load_picture(np.zeros((4, 5, 6, 7)))


def test_parameters_out_of_range_are_refused():
    with pytest.raises(InputError, match="size=128"): prepare_portrait(portraits.astronaut(), 128)
    with pytest.raises(InputError, match="upscaler='ultra'"): prepare_portrait(portraits.astronaut(), upscaler="ultra")
    with pytest.raises(InputError, match="No face"): choose_face([])


def test_sizes_other_than_the_default():
    for size in (256, 1024):
        p = prepare_portrait(portraits.astronaut(), size)
        assert p.image.shape == (size, size, 3)
        assert abs(eye_line(p.landmarks.array)[0][0] - size / 2) < 0.05 * size


def test_a_face_at_the_edge_gets_a_soft_background():
    a = portraits.astronaut()[60:230, 170:290]
    p = prepare_portrait(np.ascontiguousarray(a))
    assert p.image.min(axis=2)[:40].mean() > 30
    crop, m = crop_square(portraits.astronaut(), np.array((20.0, 20.0)), 400, 20, 300)
    assert crop.shape == (300, 300, 3) and m.shape == (2, 3)
    assert crop[:30, :30].mean() > 20


def test_large_network_and_tiles_agree():
    crop = np.ascontiguousarray(portraits.astronaut()[90:122, 200:232])
    whole = enlarge(crop, "realesrgan-x4plus", tile=64)
    seen: list[float] = []
    tiled = enlarge(crop, "realesrgan-x4plus", tile=16, overlap=10, on_progress=seen.append)
    assert whole.shape == (128, 128, 3) and seen == [0.25, 0.5, 0.75, 1.0]
    assert np.abs(whole.astype(int) - tiled).mean() < 3
    assert fit_size(crop, 64, "best")[1] == "realesrgan-x4plus"


def test_landmarks_survive_a_file(tmp_path: Path):
    p = prepare_portrait(portraits.astronaut(), upscaler="none")
    (tmp_path / "l.json").write_text(json.dumps(p.landmarks.to_json()))
    assert load_landmarks(tmp_path / "l.json") == p.landmarks
    assert isinstance(p.landmarks, Landmarks) and p.landmarks.array.shape == (478, 2)
    (tmp_path / "bad.json").write_text('{"points": []}')
    with pytest.raises(InputError, match="no landmarks"): load_landmarks(tmp_path / "bad.json")
    old = p.landmarks.to_json() | dict(points=p.landmarks.to_json()["points"][:68])
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="points: .* 478 .* not 68.*portrait.prepare of this version"):
        load_landmarks(tmp_path / "old.json")


def test_a_small_face_in_a_huge_picture_is_found_at_full_resolution():
    wall = np.full((2600, 4000, 3), (190, 185, 180), np.uint8)
    wall[1500:2012, 3100:3612] = portraits.astronaut()
    best, _ = choose_face(find_faces(wall))
    assert abs(best.centre[0] - 3321) < 25 and abs(best.centre[1] - 1622) < 25
