"""Pictures, sounds and texts that people really give: each works, or is refused with offender, value and fix, where it can be
known first. All files are made here."""
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import wave
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import portraits
import pytest
from PIL import Image as Picture

from myspinbot.graph.catalogue import Catalogue
from myspinbot.core import InputError
from myspinbot.executor.engine import run_notebook
from myspinbot.executor.pool import KernelPool
from myspinbot.jobs.local import LocalRunner
from myspinbot.schema import Artifact, Graph, Node, ParamRef, Port, PortRef

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = Catalogue(ROOT / "pipelines")
PREPARE = Graph(name="face", params=(Port(name="portrait", type="Image", required=True, ge=48),),
                nodes=(Node(id="prepare", step="portrait.prepare",
                            inputs=dict(image=ParamRef(name="portrait"), size=256, upscaler="none")),),
                outputs={k: PortRef(node="prepare", port=k) for k in ("portrait", "landmarks")})
SAY = Graph(name="say", params=(Port(name="text", type="str", required=True),),
            nodes=(Node(id="speech", step="speech.piper", inputs=dict(text=ParamRef(name="text"))),),
            outputs=dict(phonemes=PortRef(node="speech", port="phonemes")))
VIDEO = CATALOGUE.pipeline("talking_portrait").to_graph()


def person() -> Picture.Image: return Picture.fromarray(portraits.astronaut())


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    "A PNG file of any size, without a picture in memory."
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def bomb() -> bytes:
    "A whole and valid PNG of 900 megapixels in about 500 kB."
    return png(30_000, 30_000, 1, 0, bytes(30_000 * (1 + 30_000 // 8)))


def encoded(folder: Path, name: str, im: Picture.Image, **how) -> Path:
    im.save(folder / name, **how)
    return folder / name


def in_16_bit(folder: Path, name: str, grey: bool) -> Path:
    a = portraits.astronaut().astype(np.uint16) * 257
    cv2.imwrite(str(folder / name), a.mean(2).astype(np.uint16) if grey else a[..., ::-1])
    return folder / name


def turned_by_exif(folder: Path, name: str) -> Path:
    exif = Picture.Exif()
    exif[0x0112] = 6  # "turn me a quarter to the right"
    return encoded(folder, name, person().transpose(Picture.Transpose.ROTATE_90), exif=exif, quality=95)


def with_alpha(folder: Path, name: str) -> Path:
    im = person().convert("RGBA")
    im.putalpha(Picture.fromarray(np.where(np.hypot(*np.mgrid[-150:362, -220:292]) < 260, 255, 0).astype(np.uint8)))
    return encoded(folder, name, im)


def animated(folder: Path, name: str) -> Path:
    frames = [person().convert("P", palette=Picture.Palette.ADAPTIVE), Picture.new("P", (512, 512))]
    return encoded(folder, name, frames[0], save_all=True, append_images=frames[1:])


GOOD = {
    "cmyk.jpg": lambda d, n: encoded(d, n, person().convert("CMYK"), quality=95),
    "grey16.png": lambda d, n: in_16_bit(d, n, grey=True),
    "rgb16.png": lambda d, n: in_16_bit(d, n, grey=False),
    "alpha.png": with_alpha,
    "palette.png": lambda d, n: encoded(d, n, person().convert("P", palette=Picture.Palette.ADAPTIVE)),
    "grey_and_alpha.png": lambda d, n: encoded(d, n, person().convert("LA")),
    "phone.jpg": turned_by_exif,
    "animated.gif": animated,
    "ein Bild, 100 % \"schön\" 東京.png": lambda d, n: encoded(d, n, person(), dpi=(72, 72)),  # other bytes than the plain one
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRunner]:
    r = LocalRunner(CATALOGUE, tmp_path_factory.mktemp("home"), 2)
    yield r
    r.close()


def read(runner: LocalRunner, a: Artifact) -> bytes: return runner.store.found(a).read_bytes()


@pytest.fixture(scope="module")
def plain(runner: LocalRunner, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    "The portrait that comes of the plain picture."
    path = encoded(tmp_path_factory.mktemp("plain"), "plain.png", person())
    return picture(read(runner, runner.run(PREPARE, dict(portrait=str(path))).job.outputs["portrait"]))


def picture(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_picture_gives_the_portrait_of_the_plain_one(name, runner, plain, tmp_path):
    job = runner.run(PREPARE, dict(portrait=str(GOOD[name](tmp_path, name)))).job
    assert job.status == "succeeded", job.error
    got, want = picture(read(runner, job.outputs["portrait"])), plain
    if "grey" in name: got, want = got.mean(2), want.mean(2)  # the face without its colours
    middle = slice(40, 216)
    assert np.abs(got[middle, middle] - want[middle, middle]).mean() < 9
    assert json.loads(read(runner, job.outputs["landmarks"]))["source"]["file"] == name.replace('"', "")


# What is refused at submission: before a job, before anything is stored.

def folder_named_as_picture(d: Path) -> Path:
    (d / "folder.png").mkdir()
    return d / "folder.png"


def link_to_itself(d: Path) -> Path:
    (d / "loop.png").symlink_to(d / "loop.png")
    return d / "loop.png"


def written(name: str, data: bytes):
    def make(d: Path) -> Path:
        (d / name).write_bytes(data)
        return d / name
    return make


def cut_png(d: Path) -> Path:
    path = encoded(d, "cut.png", person())
    path.write_bytes(path.read_bytes()[:200_000])
    return path


def wav(path: Path, samples: np.ndarray, keep: float = 1.0) -> Path:
    with wave.open(str(path), "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(22050)
        w.writeframes(samples.astype("<i2").tobytes())
    data = path.read_bytes()
    path.write_bytes(data[:44 + int(keep * (len(data) - 44))])
    return path


AT_SUBMIT = {  # maker of the file, what the message says beside parameter and file, what the fix says
    "text": (written("text.jpg", b"Dear all, here is my picture."), "but a text that begins 'Dear all", "Image"),
    "bomb": (written("bomb.png", bomb()), "900 megapixels; at most 100", "Reduce it"),
    "large": (written("large.png", png(20_000, 6_000, 1, 0, bytes(6_000 * 2501))), "20000x6000; at most 100", "Reduce"),
    "cut": (cut_png, "is damaged", "again"),
    "empty": (written("empty.png", b""), "is empty", "Image"),
    "one_pixel": (lambda d: encoded(d, "one_pixel.png", Picture.new("RGB", (1, 1))), "of only 1x1 pixels", "at least 48"),
    "noise": (written("noise.jpg", random.Random(1).randbytes(3000)), "it begins with the bytes", "JPEG, PNG or WebP"),
    "song": (lambda d: wav(d / "song.wav", np.zeros(22050)), "or a damaged one; it begins with the bytes 52 49", "JPEG, PNG"),
    "folder": (folder_named_as_picture, "is a folder", "Relative paths start at"),
    "missing": (lambda d: d / "missing.png", "there is no file", "Relative paths start at"),
    "loop": (link_to_itself, "is a link that leads to no file", "Relative paths start at"),
    "long": (lambda d: d / ("x" * 300 + ".png"), "no", ""),
}


@pytest.mark.parametrize("case", AT_SUBMIT)
def test_a_bad_picture_is_refused_before_there_is_a_job_or_a_copy(case, farm, runner, tmp_path):
    make, said, fix = AT_SUBMIT[case]
    path, client = make(tmp_path), farm(ROOT / "pipelines").client
    kept = set(runner.store.list())
    for submit in (lambda p: client.submit("talking_portrait", p), lambda p: runner.run(VIDEO, p)):
        with pytest.raises(InputError) as e: submit(dict(portrait=str(path), text="Hello."))
        assert "portrait" in e.value.message and said in e.value.message and fix in e.value.hint
        assert case == "long" or path.name in e.value.message
        assert len(str(e.value)) < 600
    assert client.jobs() == [] and list(client.store.list()) == [] and set(runner.store.list()) == kept


def test_a_file_without_read_permission_is_refused(runner):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = encoded(Path(folder), "secret.png", person())
        path.chmod(0)
        nobody = os.geteuid() == 0  # root reads everything: ask as somebody else
        if nobody: os.seteuid(65534)
        try:
            with pytest.raises(InputError) as e: runner.run(VIDEO, dict(portrait=str(path), text="Hello."))
        finally:
            if nobody: os.seteuid(0)
    assert "portrait" in e.value.message and "secret.png" in e.value.message and "ermission denied" in e.value.message
    assert e.value.hint


def test_a_bomb_costs_no_memory(tmp_path):
    path = written("bomb.png", bomb())(tmp_path)
    assert path.stat().st_size < 1_000_000
    code = ("import resource, sys; from pathlib import Path; from PIL import Image; "
            "from myspinbot.media.picture import load_picture; from myspinbot.graph.files import check_file; "
            "from myspinbot.core import InputError; from myspinbot.schema import Port\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "try: load_picture(sys.argv[2])\n"
            "except InputError: pass\n"
            "before, said = peak(), []\n"
            "port = Port(name='portrait', type='Image')\n"
            "for f in (lambda: check_file('portrait', sys.argv[1], port), lambda: load_picture(sys.argv[1])):\n"
            "    try: f()\n"
            "    except InputError as e: said.append(str(e))\n"
            "print(peak() - before, len(said), said)")
    small = encoded(tmp_path, "small.png", Picture.new("RGB", (10, 10)))
    done = subprocess.run([sys.executable, "-c", code, str(path), str(small)], capture_output=True, text=True, check=True,
                          timeout=120)
    grown, refused, said = done.stdout.split(maxsplit=2)
    assert int(grown) < 16 and refused == "2" and said.count("900 megapixels") == 2, done.stdout


# What only the step can know.

def no_face(d: Path) -> Path: return encoded(d, "meadow.jpg", Picture.fromarray(cv2.GaussianBlur(
    np.random.default_rng(3).integers(0, 255, (400, 500, 3), np.uint8), (0, 0), 9)))


def two_equal_faces(d: Path) -> Path:
    return encoded(d, "twins.png", Picture.fromarray(np.hstack([portraits.astronaut()[:, 60:400]] * 2)))


def cut_jpeg(d: Path) -> Path:
    path = encoded(d, "cut.jpg", person())
    path.write_bytes(path.read_bytes()[:20_000])
    return path


IN_THE_STEP = {
    "no_face": (no_face, "No face found in meadow.jpg.", "one face looks at the camera"),
    "two_equal_faces": (two_equal_faces, "twins.png shows 2 equally good faces (0: box [", "face=0, 1"),
    "cut_jpeg": (cut_jpeg, "cut.jpg is damaged", "again"),
}


@pytest.mark.parametrize("case", IN_THE_STEP)
def test_an_error_of_a_step_names_the_users_file_and_parameter(case, runner, tmp_path):
    make, said, fix = IN_THE_STEP[case]
    job = runner.run(PREPARE, dict(portrait=str(make(tmp_path)))).job
    assert job.status == "failed" and job.error["type"] == "InputError"
    assert job.error["message"].startswith("prepare: parameter portrait: ") and said in job.error["message"]
    assert fix in job.error["hint"]
    assert job.error["fields"]["parameter"] == "portrait" and job.error["fields"]["input"] == "image"


def test_the_fix_for_two_equal_faces_works(runner, tmp_path):
    twins = str(two_equal_faces(tmp_path))
    boxes = []
    for face in (0, 1):
        graph = PREPARE.model_copy(update=dict(nodes=(Node(id="prepare", step="portrait.prepare", inputs=dict(
            image=ParamRef(name="portrait"), size=256, upscaler="none", face=face)),)))
        job = runner.run(graph, dict(portrait=twins)).job
        assert job.status == "succeeded", job.error
        boxes.append(json.loads(read(runner, job.outputs["landmarks"]))["source"]["box"])
    assert boxes[0][0] < 340 < boxes[1][0]
    assert "face" in [p.name for p in VIDEO.params]


def test_the_step_notebook_by_hand_says_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIN_STEP_DIR", str(tmp_path))
    notebook = CATALOGUE.notebook("portrait.prepare")
    cases = AT_SUBMIT | IN_THE_STEP
    with KernelPool(spare=0) as pool:
        for case in [k for k in cases if k not in ("large", "song", "long", "cut_jpeg")]:
            (folder := tmp_path / case).mkdir()
            path = cases[case][0](folder)
            done = run_notebook(notebook, None, dict(image=str(path)), pool=pool, cwd=str(folder))
            assert type(done.error) is InputError and path.name in done.error.message and done.error.hint, (case, done.error)
            assert not (tmp_path / "portrait.prepare" / "outputs.json").exists()


# Texts

REFUSED_AT_SUBMIT = {"Hello \0 there": "NUL at position 6", "Hi \ud83d there": "surrogate",
                     "a" * 20_001: "20,001 characters; at most 20,000"}


@pytest.mark.parametrize("text", REFUSED_AT_SUBMIT, ids=["nul", "surrogate", "too_long"])
def test_a_text_that_no_job_can_carry_is_refused_at_submission(text, farm, runner):
    client = farm(ROOT / "pipelines").client
    for submit in (lambda p: client.submit("talking_portrait", p), lambda p: runner.run(VIDEO, p)):
        with pytest.raises(InputError) as e: submit(dict(text=text))
        assert "text" in e.value.message and REFUSED_AT_SUBMIT[text] in e.value.message and e.value.hint
        assert len(str(e.value)) < 400
    assert client.jobs() == []


UNSPEAKABLE = {
    "": "empty", " \n\t ": "empty", "... !? --": "Nothing in '... !? --' can be spoken", "😀🎉": "can be spoken",
    "red \x1b[31m alert": "control character U+001B at position 4",
    "Hello Москва": "cannot say 'Москва' (Cyrillic), at position 6",
    "你好": "(Cjk)", "שלום עולם": "'שלום' (Hebrew)", "नमस्ते": "(Devanagari)",
}


def test_what_the_voice_cannot_say_is_named(tmp_path, monkeypatch):
    from myspinbot.media.speech import speak
    for text, said in UNSPEAKABLE.items():
        with pytest.raises(InputError) as e: speak(text, tmp_path / "a.wav")
        assert said in e.value.message and e.value.hint, (text, e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["\u202bHello\u202c, world\u200f!", "Hello 👋🏽 world 🎉!", "Zażółć naïve café",
                                  "The angle α is 5 °."])
def test_marks_emoji_and_accents_are_spoken_around(text, runner):
    job = runner.run(SAY, dict(text=text)).job
    assert job.status == "succeeded", job.error
    assert json.loads(read(runner, job.outputs["phonemes"]))["duration_s"] > 0.8


def test_text_that_cannot_be_spoken_fails_in_the_first_step_alone(runner):
    for text in ("... !?", "red \x1b[31m alert", " \n "):
        lj = runner.run(VIDEO, dict(text=text))
        assert lj.job.status == "failed" and lj.job.error["type"] == "InputError" and lj.job.error["hint"]
        assert lj.job.error["message"].startswith("script: "), lj.job.error
        assert "talk" not in [k for k, r in lj.rows.items() if r.status == "succeeded"]


# Sounds

def tone(seconds: float) -> np.ndarray: return 8000 * np.sin(np.arange(int(22050 * seconds)) * 0.05)


SOUNDS = {
    "cut.wav": (lambda d: wav(d / "cut.wav", tone(2), keep=0.25), "cut.wav is cut off: of 2.0 s only about 0.5 s are there"),
    "header.wav": (lambda d: wav(d / "header.wav", tone(0)), "header.wav holds no sound (0 samples)"),
    "stub.wav": (written("stub.wav", b"RIFF\x24\0\0\0WAVE"), "stub.wav is no WAV file"),
    "song.wav": (written("song.wav", b"ID3\x04" + random.Random(2).randbytes(4000)), "song.wav is no WAV file"),
    "deep.wav": (None, "deep.wav has 24 bit samples"),
}


def in_24_bit(d: Path) -> Path:
    with wave.open(str(d / "deep.wav"), "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(3)
        w.setframerate(22050)
        w.writeframes(bytes(3 * 22050))
    return d / "deep.wav"


def talk(audio: Path) -> Graph:
    return Graph(name="talk", nodes=(Node(id="talk", step="portrait.talk", inputs=dict(audio=str(audio), size=128)),),
                 outputs=dict(video=PortRef(node="talk", port="video")))


@pytest.mark.parametrize("name", SOUNDS)
def test_a_bad_sound_is_named(name, runner, tmp_path):
    make, said = SOUNDS[name]
    job = runner.run(talk((make or in_24_bit)(tmp_path)), {}).job
    assert job.status == "failed" and job.error["type"] == "InputError"
    assert said in job.error["message"] and job.error["hint"]


def test_a_sound_that_is_a_text_or_empty_is_refused_at_once(runner, tmp_path):
    cases = ("words.wav", b"la la la, la la la", "no audio but a text that begins"), ("none.wav", b"", "is empty")
    for name, data, said in cases:
        with pytest.raises(InputError) as e: runner.run(talk(written(name, data)(tmp_path)), {})
        assert f"talk.audio: '{tmp_path / name}'" in e.value.message and said in e.value.message and e.value.hint


def test_silence_becomes_a_silent_video(runner, tmp_path):
    job = runner.run(talk(wav(tmp_path / "silence.wav", np.zeros(22050))), {}).job
    assert job.status == "succeeded", job.error
    from myspinbot.media.video import probe
    assert probe(runner.store.found(job.outputs["video"])).frames == 25


# The same through real processes, and on the command line.

def test_a_worker_outlives_all_of_it(farm, tmp_path):
    f = farm(ROOT / "pipelines")
    f.start("control")
    f.start("w1")
    given = {case: str(make(tmp_path)) for case, (make, *_) in IN_THE_STEP.items()}
    jobs = {case: f.client.submit(PREPARE, dict(portrait=path)).id for case, path in given.items()}
    jobs["script"] = f.client.submit(SAY, dict(text="Hello Москва")).id
    for case, id in jobs.items():
        job = f.done(id, 200)
        assert job.status == "failed" and job.error["type"] == "InputError", (case, job.error)
        said = IN_THE_STEP[case][1] if case in IN_THE_STEP else "speech: This English voice cannot say 'Москва' (Cyrillic)"
        assert said in job.error["message"]
        row = next(iter(f.client.steps(id)))
        assert row.attempt == 1 and row.notebook is not None, "what cannot succeed is not tried again, and leaves its record"
    good = f.client.submit(PREPARE, dict(portrait=str(encoded(tmp_path, "good.png", person()))))
    assert f.done(good.id).status == "succeeded"
    assert all(p.poll() is None for p in f.procs.values())


def test_the_command_line_refuses_in_one_line(farm, tmp_path):
    f = farm(ROOT / "pipelines")
    for case in ("bomb", "cut", "missing"):
        make, said, _ = AT_SUBMIT[case]
        path = make(tmp_path)
        done = subprocess.run([sys.executable, "-m", "myspinbot", "submit", "talking_portrait", "-p", f"portrait={path}",
                               "-p", "text=Hello."], env=f.env, capture_output=True, text=True, timeout=120)
        told = " ".join(done.stderr.split())
        assert done.returncode == 2 and said in told and "portrait" in told and "Traceback" not in told, done.stderr
    assert f.client.jobs() == []
