"""Attacks: media that name other files, start other programs, or are not what they are called; the good ones still open."""
import io
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import ipywidgets as W
import numpy as np
import pytest
from farm import http_of
from PIL import EpsImagePlugin
from PIL import Image as Picture
from test_doors import picture, sound, video

from myspinbot.graph.catalogue import Catalogue
from myspinbot.graph.files import check_file
from myspinbot.core import InputError, SpinError
from myspinbot.media.video import contact_sheet, poster, probe, read_frames, read_sound, thumbnail
from myspinbot.media.picture import load_picture
from myspinbot.jobs.local import LocalRunner
from myspinbot.schema import Artifact, Graph, Node, ParamRef, Port
from myspinbot.executor.step import preview_jpeg
from myspinbot.ui.job_view import result_widget

ROOT = Path(__file__).resolve().parents[1]
RED = (250, 10, 10)  # what the private files show


def encode(path: Path, form: str, codec: str, **options: str) -> Path:
    "A second of red, 64 x 64."
    with av.open(str(path), "w", format=form, options=options) as o:
        s = o.add_stream(codec, rate=10 if form == "gif" else 25, width=64, height=64)
        s.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        red = np.full((64, 64, 3), RED, np.uint8)
        for _ in range(25): o.mux(s.encode(av.VideoFrame.from_ndarray(red).reformat(format=s.pix_fmt)))
        o.mux(s.encode())
    return path


def tone(path: Path, form: str, codec: str, **options: str) -> Path:
    "A second of a tone."
    with av.open(str(path), "w", format=form, options=options) as o:
        s = o.add_stream(codec, rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.sin(np.arange(48000, dtype=np.float32) / 9)[None], format="fltp", layout="mono")
        frame.sample_rate = 48000
        cut = av.AudioResampler(format=s.format, layout="mono", rate=48000, frame_size=s.frame_size or 1152)
        for part in (*cut.resample(frame), *cut.resample(None)): o.mux(s.encode(part))
        o.mux(s.encode())
    return path


@pytest.fixture
def private(tmp_path: Path) -> Path:
    "A folder with private files."
    (folder := tmp_path / "private").mkdir()
    encode(folder / "secret.ts", "mpegts", "mpeg2video")
    encode(folder / "secret.mp4", "mp4", "mpeg4")
    tone(folder / "secret.mp3", "mp3", "libmp3lame")
    Picture.new("RGB", (64, 64), RED).save(folder / "p001.png")
    return folder


# --- media that name other files

def hls(target: Path) -> str: return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target.as_uri()}\n#EXT-X-ENDLIST\n"


SDP = ("v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
       "m=video 5004 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n")
MPD = ('<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S"><Period>'
       '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="9"><BaseURL>{}</BaseURL></Representation>'
       '</AdaptationSet></Period></MPD>')
NAMING: dict[str, tuple[str, Callable[[Path], str], str]] = {  # name, content, what a message calls it
    "hls": ("clip.m3u8", lambda d: hls(d / "secret.ts"), "a playlist (HLS)"),
    "hls of sound": ("song.m3u8", lambda d: hls(d / "secret.mp3"), "a playlist (HLS)"),
    "hls as mp4": ("clip.mp4", lambda d: hls(d / "secret.ts"), "a playlist (HLS)"),
    "hls without a name": ("clip", lambda d: hls(d / "secret.ts"), "a playlist (HLS)"),
    "concat": ("list.ffconcat", lambda d: "ffconcat version 1.0\nfile secret.mp4\n", "a list of files (ffconcat)"),
    "concat as mp4": ("clip.mp4", lambda d: "ffconcat version 1.0\nfile secret.mp4\n", "a list of files (ffconcat)"),
    "dash": ("clip.mpd", lambda d: MPD.format((d / "secret.mp4").as_uri()), "a playlist (DASH)"),
    "sdp": ("clip.sdp", lambda d: SDP, "the description of a stream (SDP)"),
    "name of a sequence": ("p%03d.png", lambda d: "hello", "a text that begins 'hello'"),
    "name of a protocol": ("concat:secret.mp4", lambda d: "hello", "a text that begins 'hello'"),
    "metadata": ("clip.mp4", lambda d: ";FFMETADATA1\ntitle=x\n", "a text that begins ';FFMETADATA1"),
}
READERS: dict[str, Callable[[Path], Any]] = dict(
    probe=probe, frames=lambda p: list(read_frames(p)), sound=read_sound, sheet=contact_sheet, thumbnail=thumbnail, poster=poster)


@pytest.mark.parametrize("attack", NAMING)
def test_no_reader_opens_a_file_that_a_medium_names(attack: str, private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, found = NAMING[attack]
    monkeypatch.chdir(private)  # a name of a protocol is relative
    Path(name).write_text(content(private))
    for reader, read in READERS.items():
        with pytest.raises(InputError) as e: read(Path(name))
        assert name in e.value.message and found in e.value.message and e.value.hint, (reader, e.value)


def boxed(kind: bytes, data: bytes) -> bytes: return struct.pack(">I4s", 8 + len(data), kind) + data


def elsewhere(data: bytes, path: str) -> bytes:
    "The boxes of a QuickTime file whose media lie in another one, by an alias of its Data Reference (dref)."
    out, at = b"", 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        inner = data[at + 8:at + size]
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"): inner = elsewhere(inner, path)
        if kind == b"dref":
            name = path.encode() + bytes(len(path) % 2)
            alias = bytes(150) + struct.pack(">HH", 2, len(name)) + name + b"\xff\xff\0\0"
            inner = bytes(4) + struct.pack(">I", 1) + boxed(b"alis", bytes(4) + alias)
        if kind != b"mdat": out += boxed(kind, inner)
        at += size
    return out


def test_a_film_whose_media_lie_in_another_file_reads_nothing(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, path = encode(private / "secret.mov", "mov", "mpeg4"), private / "clip.mov"
    path.write_bytes(elsewhere(secret.read_bytes(), str(secret)))
    obeyed = dict(enable_drefs="1", use_absolute_path="1")
    with av.open(str(path), options=obeyed) as box: assert len(list(box.decode(video=0))) == 25  # the attack is a real one
    assert list(read_frames(path)) == []
    with pytest.raises(InputError, match=r"clip\.mov has no frames"): probe(path)
    # What answers FFmpeg's wish for another file is enough alone.
    monkeypatch.setattr("myspinbot.media.video._NOTHING_ELSE", obeyed)
    for read in (probe, lambda p: list(read_frames(p))):
        with pytest.raises(InputError, match=r"clip\.mov is not a video: it asks for another file"): read(path)


# --- pictures that start other programs

def test_postscript_in_a_picture_never_starts_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness, gs = tmp_path / "started", tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\necho $@ >> {witness}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    photo = tmp_path / "photo.jpg"
    Picture.new("RGB", (64, 64), RED).save(photo, "EPS")
    with pytest.raises(OSError), Picture.open(photo) as im: im.load()
    assert witness.exists(), "the trap is set"
    witness.unlink()
    readers = dict(load=load_picture, encoded=lambda p: load_picture(p.read_bytes()), preview=preview_jpeg, thumbnail=thumbnail,
                   submission=lambda p: check_file("portrait", str(p), Port(name="portrait", type="Image")))
    for reader, read in readers.items():
        with pytest.raises(InputError) as e: read(photo)
        assert reader == "preview" or "a PostScript program" in e.value.message, (reader, e.value)
        assert e.value.hint and not witness.exists(), reader


@pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO", "DDS", "SGI", "JPEG2000", "PDF"])
def test_other_pictures_that_pillow_knows_are_refused_whatever_they_are_called(form: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Picture.new("RGB", (64, 64), RED).save(path, form)
    for read in (load_picture, thumbnail, preview_jpeg):
        with pytest.raises(InputError): read(path)


# --- what is refused when a job is submitted

@pytest.fixture
def door(farm: Any) -> Iterator[SimpleNamespace]:
    "The HTTP API on the real pipelines, and its client."
    f = farm(ROOT / "pipelines")
    with http_of(f.client) as http: yield SimpleNamespace(http=http, client=f.client)


def film_graph(kind: str = "Video", **params: Any) -> dict[str, Any]:
    "A graph that takes a file and gives it to a port for a video."
    node = dict(id="check", step="video.check", inputs=dict(video=dict(kind="param", name="file")))
    return dict(name="check", params=[dict(name="file", type=kind, **params)], nodes=[node])


def fixed_graph(value: Any, step: str = "video.check", port: str = "video") -> dict[str, Any]:
    return dict(name="check", nodes=[dict(id="check", step=step, inputs={port: value})])


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "parameter": lambda a: dict(graph=film_graph(required=True), params=dict(file=a)),
    "default": lambda a: dict(graph=film_graph(default=a)),
    "literal": lambda a: dict(graph=fixed_graph(a)),
    "parameter of any type": lambda a: dict(graph=film_graph("any"), params=dict(file=a)),
    "list": lambda a: dict(graph=dict(name="g", params=[dict(name="file", type="list[Video]")],
                                      nodes=[dict(id="say", step="speech.piper")]), params=dict(file=[a])),
}
CLAIMS = (("clip.mp4", "video/mp4"), ("clip", "application/octet-stream"), ("clip.json", "text/plain"), ("clip.mp4", "VIDEO/MP4"))


@pytest.mark.parametrize("way", WAYS)
def test_an_uploaded_playlist_is_refused_for_a_video_whatever_it_is_called(way: str, door: SimpleNamespace, private: Path) -> None:
    for name, kind in CLAIMS:
        got = door.http.post("/artifacts", params=dict(name=name), content=hls(private / "secret.ts")).json()
        r = door.http.post("/jobs", json=WAYS[way](got | dict(media_type=kind)))
        assert r.status_code == 422, (name, kind, r.text)
        said = r.json()["message"]
        where = "check.video" if way == "literal" else "file"
        assert where in said and "takes" in said and "Video" in said and name in said, said
        if kind.lower().startswith("video"): assert "a playlist (HLS)" in said
        assert "MP4, WebM or MOV" in r.json()["hint"]
    assert door.http.get("/jobs").json() == []


WRONG: dict[str, tuple[str, str, Callable[[], bytes], str]] = {  # port, claimed type, content, what it is called
    "text as a picture": ("Image", "image/png", lambda: b"Dear all, here is my picture.", "of an unknown kind"),
    "PostScript as a picture": ("Image", "image/jpeg", lambda: picture("EPS"), "a PostScript program"),
    "drawing as a picture": ("Image", "image/svg+xml", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    "sound as a picture": ("Image", "image/png", lambda: sound("wav"), "a WAV sound"),
    "picture as a sound": ("Audio", "audio/wav", lambda: picture("PNG"), "a PNG picture"),
    "picture as a video": ("Video", "video/mp4", lambda: picture("GIF"), "a GIF picture"),
    "sound as a video": ("Video", "video/mp4", lambda: sound("mp3"), "an MP3 sound"),
    "noise as a sound": ("Audio", "audio/wav", lambda: bytes(range(200, 250)), "of an unknown kind"),
    "data as a video": ("Video", "application/json", lambda: b"{}", "application/json"),
    "picture as data": ("Data", "image/png", lambda: picture("PNG"), "a PNG picture"),
}


@pytest.mark.parametrize("case", WRONG)
def test_content_decides_which_port_takes_a_file(case: str, door: SimpleNamespace) -> None:
    kind, claimed, make, found = WRONG[case]
    a = door.http.post("/artifacts", params=dict(name="me"), content=make()).json() | dict(media_type=claimed)
    graph = dict(name="g", params=[dict(name="file", type=kind, help="what to use")], nodes=[dict(id="say", step="speech.piper")])
    r = door.http.post("/jobs", json=dict(graph=graph, params=dict(file=a)))
    assert r.status_code == 422 and r.json()["type"] == "InputError", r.text
    assert f"file takes {kind}, but got 'me', which is {found}." in r.json()["message"], r.text
    assert r.json()["hint"].startswith("Give ")
    with pytest.raises(InputError, match=f"file takes {kind}"): door.client.submit(graph, dict(file=Artifact(**a)))
    assert door.client.jobs() == []


def test_a_wrong_claim_about_a_right_file_does_no_harm(door: SimpleNamespace) -> None:
    for content, name, kind, claimed, right in ((video("webm"), "x.png", "Video", "image/png", "video/webm"),
                                                (video("mp4"), "x", "Audio", "text/plain", "video/mp4"),
                                                (picture("JPEG"), "x.svg", "Image", "video/mp4", "image/jpeg"),
                                                (b'{"a": 1}', "x.json", "Data", "application/json", "application/json"),
                                                (b"hello", "x.png", "Data", "image/png", "application/octet-stream")):
        a = door.http.post("/artifacts", params=dict(name=name), content=content).json() | dict(media_type=claimed)
        graph = dict(name="g", params=[dict(name="file", type=kind)], nodes=[dict(id="say", step="speech.piper")])
        r = door.http.post("/jobs", json=dict(graph=graph, params=dict(file=a)))
        assert r.status_code == 201, r.text
        assert r.json()["params"]["file"]["media_type"] == right
    fixed = door.http.post("/artifacts", content=picture("PNG")).json() | dict(media_type="application/json")
    r = door.http.post("/jobs", json=dict(graph=fixed_graph(fixed, "portrait.prepare", "image")))
    assert r.status_code == 201, r.text
    job = door.http.get(f"/jobs/{r.json()['id']}").json()
    assert job["graph"]["nodes"][0]["inputs"]["image"]["media_type"] == "image/png"


def test_a_media_type_in_a_request_is_type_and_subtype(door: SimpleNamespace) -> None:
    a = door.http.post("/artifacts", params=dict(name="clip.mp4"), content=video("mp4")).json()
    for bad in ("video", "", "/", "video/", "/mp4", "video/mp4/x", "video/mp4; codecs=x", " video/mp4", "é/mp4", "v/" + "m" * 200):
        for way, ask in WAYS.items():
            r = door.http.post("/jobs", json=ask(a | dict(media_type=bad)))
            assert r.status_code == 422 and r.json()["type"] == "InputError", (bad, way, r.text)
            assert "is not a media type" in r.json()["message"] and "type/subtype" in r.json()["hint"], r.text
    assert door.http.get("/jobs").json() == []


def test_a_file_in_a_graph_must_have_been_uploaded(door: SimpleNamespace) -> None:
    ghost = dict(kind="artifact", sha256="0" * 64, size=3, media_type="video/mp4", name="ghost.mp4")
    for ask in WAYS.values():
        r = door.http.post("/jobs", json=ask(ghost))
        assert r.status_code == 422 and r.json()["type"] == "InputError" and "stored" in r.json()["message"], r.text
    assert door.http.get("/jobs").json() == []


def test_a_job_of_old_with_an_odd_media_type_loads_and_runs_again(door: SimpleNamespace) -> None:
    a = door.client.store.put_bytes(video("mp4"), "video", "clip")
    graph = Graph(name="check", params=(Port(name="file", type="Video"),),
                  nodes=(Node(id="check", step="video.check", inputs=dict(video=ParamRef(name="file"))),))
    old = door.client.journal.submit(graph, dict(file=a))
    assert door.client.job(old.id).params["file"] == a
    assert door.http.get(f"/jobs/{old.id}").json()["params"]["file"]["media_type"] == "video"
    again = door.http.post(f"/jobs/{old.id}/rerun", json={})
    assert again.status_code == 201 and again.json()["params"]["file"]["media_type"] == "video/mp4"
    assert isinstance(result_widget(door.client, "clip", a), W.Video)


def test_values_that_hold_themselves_are_refused_at_once(door: SimpleNamespace) -> None:
    graph, loop = Graph(name="g", params=(Port(name="x"),), nodes=(Node(id="say", step="speech.piper"),)), []
    loop += [loop, loop]
    with pytest.raises(InputError, match="levels deep"): door.client.submit(graph, dict(x=loop))
    with pytest.raises(SpinError, match="levels deep"):
        door.client.submit(graph.model_copy(update=dict(nodes=(Node(id="say", step="speech.piper", inputs=dict(text=loop)),))), {})


def test_a_result_is_shown_whatever_its_media_type_is(door: SimpleNamespace) -> None:
    deep = b'{"a":' * 5000 + b"1" + b"}" * 5000
    for kind in ("video", "audio", "image", "", "/", "video/", "audio/x; y=z", "application", "text/plain", "vidéo/x", "x" * 300):
        for data in (b"", b"hello", b"\xff\xfe\x80", b"[1]", b"null", deep, picture("PNG")):
            a = door.client.store.put_bytes(data, None, "x").model_copy(update=dict(media_type=kind))
            assert isinstance(result_widget(door.client, "x", a), W.Widget), (kind, data[:9])


BAD_FILES: dict[str, tuple[str, str, bytes, str]] = {  # port, name, content, what the message says
    "playlist": ("Video", "clip.mp4", b"#EXTM3U\n", "is no video but a playlist (HLS)"),
    "concat": ("Audio", "song.wav", b"ffconcat version 1.0\nfile /etc/passwd", "is no audio but a list of files (ffconcat)"),
    "noise": ("Video", "clip.mp4", bytes(range(200, 250)), "is no video but bytes c8 c9"),
    "picture": ("Video", "clip.mp4", picture("GIF"), "is no video but a GIF picture"),
    "drawing": ("Image", "me.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image but an SVG drawing"),
    "noise with the name of a picture": ("Image", "me.heic", bytes(range(200, 250)), "begins with the bytes c8 c9"),
    "PostScript": ("Image", "me.jpg", picture("EPS"), "is no image but a PostScript program"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_given_by_path_is_looked_at_before_anything_is_stored(case: str, door: SimpleNamespace, tmp_path: Path) -> None:
    kind, name, data, said = BAD_FILES[case]
    (path := tmp_path / name).write_bytes(data)
    graph = Graph(name="g", params=(Port(name="file", type=kind),), nodes=(Node(id="say", step="speech.piper"),))
    runner = LocalRunner(Catalogue(ROOT / "pipelines"), tmp_path / "home")
    try:
        for submit in (door.client.submit, runner.run):
            with pytest.raises(InputError) as e: submit(graph, dict(file=str(path)))
            assert e.value.message.startswith("file: ") and said in e.value.message and "Give a" in e.value.hint, e.value
        with pytest.raises(InputError, match="which is"):
            runner.run(graph, dict(file=runner.store.put_bytes(data, "image/png" if kind == "Image" else f"{kind.lower()}/mp4")))
    finally: runner.close()
    assert door.client.jobs() == [] and list(door.client.store.list()) == []


# --- good media

FILMS = {"mp4": ("mp4", "libx264", {}), "mov": ("mov", "mpeg4", {}), "3gp": ("3gp", "mpeg4", {}),
         "mkv": ("matroska", "libx264", {}), "webm": ("webm", "libvpx", {}), "avi": ("avi", "mpeg4", {}),
         "ts": ("mpegts", "mpeg2video", {}),
         "mts": ("mpegts", "libx264", dict(mpegts_m2ts_mode="1")), "mpg": ("mpeg", "mpeg1video", {})}
TONES = {"wav": ("wav", "pcm_s16le", {}), "rf64": ("wav", "pcm_s16le", dict(rf64="always")), "mp3": ("mp3", "libmp3lame", {}),
         "mp3 without a tag": ("mp3", "libmp3lame", dict(write_xing="0", id3v2_version="0")), "flac": ("flac", "flac", {}),
         "opus": ("ogg", "libopus", {}), "aac": ("adts", "aac", {}), "m4a": ("ipod", "aac", {}), "mp4": ("mp4", "aac", {}),
         "aiff": ("aiff", "pcm_s16be", {}), "weba": ("webm", "libopus", {})}


def accepted(path: Path, kind: str) -> bool:
    check_file("file", str(path), Port(name="file", type=kind))
    return True


@pytest.mark.parametrize("kind", FILMS)
def test_good_videos_open_whatever_they_are_called(kind: str, tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.txt", FILMS[kind][0], FILMS[kind][1], **FILMS[kind][2])
    frames = [f for _, f in read_frames(path)]
    assert probe(path).frames == len(frames) == 25 and np.abs(frames[9].mean((0, 1)) - RED).max() < 12
    assert accepted(path, "Video") and thumbnail(path)[:3] == b"\xff\xd8\xff" and len(read_sound(path)) == 0


@pytest.mark.parametrize("kind", TONES)
def test_good_sounds_open_whatever_they_are_called(kind: str, tmp_path: Path) -> None:
    path = tone(tmp_path / "song.txt", TONES[kind][0], TONES[kind][1], **TONES[kind][2])
    heard = read_sound(path, 48000)
    assert abs(len(heard) - 48000) < 3000 and heard.max() > 0.5 and accepted(path, "Audio")
    with pytest.raises(InputError, match="no picture, only sound"): probe(path)


@pytest.mark.parametrize("kind", ["aac", "flac"])
def test_a_tag_before_a_sound_does_not_hide_what_it_is(kind: str, tmp_path: Path) -> None:
    path = tone(tmp_path / "plain", TONES[kind][0], TONES[kind][1])
    path.write_bytes(b"ID3\x04\0\0\0\0\x22\0" + bytes(34 << 7) + path.read_bytes())
    assert abs(len(read_sound(path, 48000)) - 48000) < 3000 and accepted(path, "Audio")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "MPO"])
def test_good_pictures_open_whatever_they_are_called(form: str, tmp_path: Path) -> None:
    path, im = tmp_path / "me.txt", Picture.new("RGB", (64, 64), RED)
    im.save(path, form, **(dict(save_all=True, append_images=[im]) if form == "MPO" else {}))
    assert accepted(path, "Image") and np.abs(load_picture(path).mean((0, 1)) - RED).max() < 8
    assert preview_jpeg(path)[:3] == thumbnail(path)[:3] == b"\xff\xd8\xff"
    assert load_picture(io.BytesIO(path.read_bytes()).getvalue()).shape == (64, 64, 3)


def boxes(brand: bytes, *others: bytes) -> bytes: return boxed(b"ftyp", brand + bytes(4) + b"".join(others)) + bytes(99)


UNREAD: dict[str, tuple[str, bytes, str, str]] = {  # name, content, what it is called, the way out
    "HEIC": ("IMG_1.HEIC", boxes(b"heic", b"mif1", b"heic"), "a HEIC picture", "Save it as JPEG: on a Mac with Preview"),
    "HEIC of several": ("IMG_2.jpg", boxes(b"mif1", b"mif1", b"heix"), "a HEIC picture", "an iPhone takes JPEG with Settings"),
    "HEIC that moves": ("IMG_3.heic", boxes(b"hevc", b"msf1"), "a HEIC picture", "heif-convert"),
    "JPEG XL": ("me.jxl", b"\xff\x0a\xfa\x7f\x01\x90" + bytes(99), "a JPEG XL picture", "djxl"),
    "JPEG XL in a box": ("me.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "a JPEG XL picture", "djxl"),
    "JPEG 2000": ("me.jp2", picture("JPEG2000"), "a JPEG 2000 picture", "Export it as JPEG or PNG"),
    "JPEG XR": ("me.jxr", b"II\xbc\1" + bytes(99), "a JPEG XR picture", "Export it"),
    "Photoshop": ("me.psd", b"8BPS\0\1" + bytes(99), "a Photoshop file (PSD)", "Export it"),
    "GIMP": ("me.xcf", b"gimp xcf v011\0" + bytes(99), "a GIMP file (XCF)", "Export it"),
    "OpenEXR": ("me.exr", b"v/1\1\2" + bytes(99), "an OpenEXR picture", "Export it"),
    "Radiance": ("me.hdr", b"#?RADIANCE\n", "a Radiance picture (HDR)", "Export it"),
    "icon": ("me.ico", picture("ICO"), "an icon (ICO)", "Export it"),
    "QOI": ("me.qoi", b"qoif\0\0\0\x40\0\0\0\x40\3\0" + bytes(99), "a QOI picture", "Export it"),
    "Canon": ("me.cr2", b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "the raw picture of a camera", "Export it as JPEG from the camera"),
    "newer Canon": ("me.cr3", boxes(b"crx ", b"isom"), "the raw picture of a camera", "Export it"),
    "Fuji": ("me.raf", b"FUJIFILMCCD-RAW 0201" + bytes(99), "the raw picture of a camera", "Export it"),
    "Olympus": ("me.orf", b"IIRO\x08\0\0\0" + bytes(99), "the raw picture of a camera", "Export it"),
    "Panasonic": ("me.rw2", b"IIU\0\x18\0\0\0" + bytes(99), "the raw picture of a camera", "Export it"),
}


@pytest.mark.parametrize("form", UNREAD)
def test_a_picture_that_is_not_read_is_named_with_the_way_out(form: str, door: SimpleNamespace, tmp_path: Path) -> None:
    name, data, called, way = UNREAD[form]
    (path := tmp_path / name).write_bytes(data)
    graph = dict(name="g", params=[dict(name="file", type="Image")], nodes=[dict(id="say", step="speech.piper")])
    uploaded = door.http.post("/artifacts", params=dict(name=name), content=data).json()
    refused = []
    for submit in (lambda: accepted(path, "Image"), lambda: door.client.submit(graph, dict(file=str(path))),
                   lambda: door.client.submit(graph, dict(file=Artifact(**uploaded))), lambda: load_picture(path),
                   lambda: load_picture(data, name), lambda: thumbnail(path)):
        with pytest.raises(InputError) as e: submit()
        refused.append((e.value.message, e.value.hint))
    for claimed in (uploaded["media_type"], "image/jpeg", "application/octet-stream"):
        r = door.http.post("/jobs", json=dict(graph=graph, params=dict(file=uploaded | dict(media_type=claimed))))
        assert r.status_code == 422, r.text
        refused.append((r.json()["message"], r.json()["hint"]))
    for said, fix in refused: assert name in said and called in said and way in fix and "Give a JPEG" in fix, (said, fix)
    assert door.client.jobs() == []
    graph["params"][0]["type"] = "Data"  # a step of one's own may read it
    assert door.http.post("/jobs", json=dict(graph=graph, params=dict(file=uploaded))).status_code == 201
    assert accepted(path, "Data")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "MPO"])
def test_a_picture_that_is_read_passes_at_submission(form: str, door: SimpleNamespace, tmp_path: Path) -> None:
    (path := tmp_path / "me").write_bytes(picture(form))
    graph = dict(name="g", params=[dict(name="file", type="Image")], nodes=[dict(id="say", step="speech.piper")])
    uploaded = door.http.post("/artifacts", params=dict(name="me"), content=picture(form)).json()
    assert door.http.post("/jobs", json=dict(graph=graph, params=dict(file=uploaded))).status_code == 201
    assert door.client.submit(graph, dict(file=str(path))).params["file"].media_type == uploaded["media_type"]


def test_a_moving_gif_is_a_picture_and_its_frames_can_be_read(tmp_path: Path) -> None:
    path = encode(tmp_path / "loop", "gif", "gif")
    assert accepted(path, "Image") and len(list(read_frames(path))) == 25
    with pytest.raises(InputError, match="no video but a GIF picture"): accepted(path, "Video")


def test_a_file_of_data_is_what_its_sender_calls_it(door: SimpleNamespace) -> None:
    graph = dict(name="g", params=[dict(name="file", type="Data")], nodes=[dict(id="say", step="speech.piper")])
    given = {"a.json": b"[1]", "a.npz": b"PK\x03\x04", "a.safetensors": b"\xff\xfb\0\0\0\0\0\0{", "a.bin": b"ID3 and so on"}
    for name, data in given.items():
        a = door.http.post("/artifacts", params=dict(name=name), content=data).json()
        if name == "a.bin": a["media_type"] = "application/octet-stream"
        r = door.http.post("/jobs", json=dict(graph=graph, params=dict(file=a)))
        assert r.status_code == 201 and r.json()["params"]["file"] == a, r.text
        r = door.http.post("/jobs", json=dict(graph=fixed_graph(a, "portrait.talk", "landmarks")))
        assert r.status_code == 201, r.text
        assert door.client.job(r.json()["id"]).graph.nodes[0].inputs["landmarks"] == a
