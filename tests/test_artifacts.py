"""Both artifact stores keep the same promises; the S3 one over real HTTP."""
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from farm import wait_for
from s3_front import S3Front

from myspinbot.store.artifacts import LocalStore, S3Store, media_type_of, open_store
from myspinbot.core import ConfigError, InputError, NotFound, ServiceUnavailable, hash_bytes, process_tag
from myspinbot.schema import Artifact

PNG = b"\x89PNG\r\n\x1a\n" + os.urandom(200)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "s3", "s3-no-cache"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore | S3Store]:
    if request.param == "local":
        yield open_store((tmp_path / "store").as_uri())
        return
    endpoint = request.getfixturevalue("s3_server")
    bucket = "b" + hash_bytes(str(tmp_path).encode())[:12]
    yield open_store(f"s3://key:s%2Fecret@{endpoint}/{bucket}/some/prefix?secure=false",
                     tmp_path / "cache" if request.param == "s3" else None)


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a: object) -> None: return


@contextmanager
def serving(handler: type[Quiet]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.endswith(".part") or (p.parent.name == "tmp" and p.is_file())]


def test_bytes_come_back_under_their_hash(store, tmp_path):
    a = store.put_bytes(PNG, name="me.png")
    assert (a.sha256, a.size, a.media_type, a.name) == (hash_bytes(PNG), len(PNG), "image/png", "me.png")
    assert store.exists(a.sha256) and list(store.list()) == [a.sha256]
    assert store.fetch(a, tmp_path / "out").read_bytes() == PNG
    with store.open(a) as f: assert f.read() == PNG
    assert not leftovers(tmp_path)


def test_what_a_killed_writer_left_is_swept_and_a_living_ones_is_not(tmp_path):
    store, part = LocalStore(tmp_path), 'from myspinbot.store.artifacts import LocalStore; import io, os, signal\n' \
        'class Dying(io.BytesIO):\n    def read(self, n=-1): return super().read(3) or os.kill(os.getpid(), signal.SIGKILL)\n'
    run = f"{part}LocalStore({str(tmp_path)!r}).put_stream(Dying(b'half a file'), None, 'x')"
    assert subprocess.run([sys.executable, "-c", run]).returncode == -9
    assert len(leftovers(tmp_path)) == 1
    (mine := tmp_path / "tmp" / f"0{process_tag()}").touch()
    assert (store.sweep(), leftovers(tmp_path)) == (1, [mine])


def test_file_is_stored_once_whatever_its_name(store, tmp_path):
    for name in ("a.bin", "b.png"): (tmp_path / name).write_bytes(PNG)
    a, b = store.put_file(tmp_path / "a.bin"), store.put_file(tmp_path / "b.png", name="portrait.png")
    assert (a.sha256, a.name, b.name) == (b.sha256, "a.bin", "portrait.png") and len(list(store.list())) == 1


def test_given_media_type_wins(store):
    assert store.put_bytes(b"{}", "application/x-ipynb+json", "a.ipynb").media_type == "application/x-ipynb+json"


def test_empty_file(store, tmp_path):
    (tmp_path / "empty").touch()
    a = store.put_file(tmp_path / "empty")
    assert a.size == 0 and store.fetch(a, tmp_path / "out").read_bytes() == b""


def test_first_bytes_come_without_the_rest(store):
    a, short, empty = store.put_bytes(PNG), store.put_bytes(b"ab"), store.put_bytes(b"")
    assert (store.head(a.sha256, 8), store.head(a.sha256)) == (PNG[:8], PNG)
    assert (store.head(short.sha256, 8), store.head(empty.sha256, 8)) == (b"ab", b"")
    with pytest.raises(NotFound, match="000000"): store.head("0" * 64)
    with pytest.raises(InputError, match="Not a sha256"): store.head("../../etc/passwd")
    if isinstance(store, S3Store):  # over the wire come these bytes and no more
        store.client._http.clear()
        seen, request = [], store.client._http.urlopen
        store.client._http.urlopen = lambda *a, **kw: seen.append(request(*a, **kw)) or seen[-1]
        assert store.head(a.sha256, 8) == PNG[:8] and [(r.status, r.headers["Content-Length"]) for r in seen] == [(206, "8")]


def test_large_file_in_parts(store, tmp_path):
    data = os.urandom(1 << 20) * 40
    (tmp_path / "large.bin").write_bytes(data)
    a = store.put_file(tmp_path / "large.bin")
    assert a.size == len(data) and store.fetch(a, tmp_path / "out").read_bytes() == data


def test_what_is_kept_is_not_forgotten(store):
    a, b = store.put_bytes(b"one"), store.put_bytes(b"two")
    store.fresh_s = 0.0  # as if both were old
    assert store.keep("0" * 64) is None and not store.forget("0" * 64, 0.0)
    before = time.time()
    assert set(store.stale(before)) == {a.sha256, b.sha256}
    wait_for("what is kept is new", lambda: store.keep(a.sha256) == a.size and set(store.stale(before)) == {b.sha256})
    assert store.forget(b.sha256, before) and not store.exists(b.sha256)
    assert not store.forget(a.sha256, before) and store.exists(a.sha256)
    with store.open(a) as f: assert f.read() == b"one"


def test_a_file_to_serve_is_in_the_store_or_in_its_cache(store, tmp_path):
    a = store.put_bytes(PNG)
    if isinstance(store, S3Store) and store.cache is None:
        with pytest.raises(ConfigError, match="no cache"): store.local(a)
        return
    path = store.local(a)
    assert path.read_bytes() == PNG and path.is_relative_to(tmp_path / ("store" if isinstance(store, LocalStore) else "cache"))
    assert store.delete(a.sha256)
    with pytest.raises(NotFound): store.local(a)


def test_a_store_belongs_to_the_first_journal(store):
    a = store.put_bytes(PNG)
    assert [store.owner(o) for o in ("the first", "another")] == ["the first", "the first"] and list(store.list()) == [a.sha256]


def test_fetch_replaces_an_older_file_and_leaves_the_blob_alone(store, tmp_path):
    one, two = store.put_bytes(b"one", name="x"), store.put_bytes(b"two", name="x")
    store.fetch(one, tmp_path / "out")
    assert store.fetch(two, tmp_path / "out").read_bytes() == b"two"
    assert store.fetch(one, tmp_path / "other").read_bytes() == b"one"


def test_names_that_would_leave_the_folder_do_not(store, tmp_path):
    a = store.put_bytes(b"x", name="../../evil\0.png")
    assert a.name == "evil.png"
    assert store.fetch(a, tmp_path / "out", "../../up.png") == tmp_path / "out" / "up.png"
    assert store.fetch(a, tmp_path / "out", "..").parent == tmp_path / "out"


def test_missing_blob_is_named(store, tmp_path):
    a = Artifact(sha256="0" * 64, size=3, name="voice.wav")
    assert not store.exists(a.sha256) and not store.delete(a.sha256)
    with pytest.raises(NotFound, match="000000"): store.fetch(a, tmp_path / "out")
    with pytest.raises(NotFound): store.open(a)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_missing_or_wrong_path_is_an_input_error(store, tmp_path):
    with pytest.raises(InputError, match="not there"): store.put_file(tmp_path / "no.png")
    with pytest.raises(InputError, match="a folder"): store.put_file(tmp_path)
    with pytest.raises(InputError, match="Not a sha256"): store.exists("../../etc/passwd")


def test_deleted_blob_is_gone_and_fetched_files_stay(store, tmp_path):
    a = store.put_bytes(PNG, name="p.png")
    p = store.fetch(a, tmp_path / "out")
    assert store.delete(a.sha256) and not store.exists(a.sha256) and list(store.list()) == []
    assert p.read_bytes() == PNG
    with pytest.raises(NotFound): store.fetch(a, tmp_path / "again")


def test_url_gives_the_content_to_a_browser(store):
    a = store.put_bytes(PNG, name="müde.png")
    with urllib.request.urlopen(store.url(a)) as r:
        assert r.read() == PNG
        if isinstance(store, S3Store): assert r.headers["Content-Type"] == "image/png"
    if not isinstance(store, S3Store): return
    for kind, shown in (("image/png", True), ("image/svg+xml", False), ("image/SVG+xml", False), ("text/html", False)):
        a = store.put_bytes(b"<svg/>", media_type=kind, name="x")
        with urllib.request.urlopen(store.url(a)) as r:
            assert r.headers["Content-Disposition"].startswith("inline" if shown else "attachment")


def test_many_threads_put_the_same_and_fetch(store, tmp_path):
    with ThreadPoolExecutor(8) as ex:
        found = list(ex.map(lambda i: store.put_bytes(b"same" * 1000, name=f"{i}"), range(16)))
        paths = list(ex.map(lambda i: store.fetch(found[i], tmp_path / "out", f"{i % 4}"), range(16)))
    assert len({a.sha256 for a in found}) == 1 and all(p.read_bytes() == b"same" * 1000 for p in paths)
    assert not leftovers(tmp_path)


def test_damaged_blob_is_refused_and_can_be_stored_again(tmp_path):
    store = LocalStore(tmp_path / "store")
    a = store.put_bytes(PNG, name="p.png")
    blob = store.path(a.sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"x" * len(PNG))
    with pytest.raises(NotFound, match="damaged"): store.fetch(a, tmp_path / "out")
    assert not (tmp_path / "out" / "p.png").exists()
    store.put_bytes(PNG, name="p.png")
    assert store.fetch(a, tmp_path / "out").read_bytes() == PNG


def test_truncated_blob_is_stored_again(tmp_path):
    store = LocalStore(tmp_path / "store")
    a = store.put_bytes(PNG)
    store.path(a.sha256).chmod(0o644)
    store.path(a.sha256).write_bytes(PNG[:50])
    with pytest.raises(NotFound): store.open(a)
    assert store.put_bytes(PNG) == a and store.open(a).read() == PNG


def test_damaged_object_is_refused_and_leaves_no_file(s3_server, tmp_path):
    store = open_store(f"s3://k:s@{s3_server}/damaged?secure=false", tmp_path / "cache")
    a = store.put_bytes(PNG, name="p.png")
    store.client.put_object(bucket_name="damaged", object_name=store.object(a.sha256), data=io.BytesIO(b"y" * len(PNG)),
                            length=len(PNG))
    with pytest.raises(NotFound, match="damaged"): store.fetch(a, tmp_path / "out")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_cache_is_used_and_bounded(s3_server, tmp_path):
    store = open_store(f"s3://k:s@{s3_server}/cached?secure=false", tmp_path / "cache")
    found = [store.put_bytes(bytes([i]) * 1000, name=f"{i}") for i in range(5)]
    store.cache_bytes = 2500
    for i, a in enumerate(found):
        store.fetch(a, tmp_path / "out")
        os.utime(store.cache.path(a.sha256), (i, i))
    assert sorted(store.cache.list()) == sorted(a.sha256 for a in found[-2:])
    store.client.remove_object(bucket_name="cached", object_name=store.object(found[-1].sha256))
    assert store.fetch(found[-1], tmp_path / "again").read_bytes() == b"\4" * 1000


def begin_upload(store: S3Store, data: bytes) -> str:
    "The first half of an upload in parts; its object name."
    name = store.object(hash_bytes(data))
    store.make_bucket()
    id = store.client._create_multipart_upload(store.bucket, name, {})
    store.client._upload_part(store.bucket, name, data, None, id, 1)
    return name


def test_unfinished_uploads_that_are_old_are_aborted_page_by_page(s3_server):
    front = S3Front(s3_server)
    front.page = 2
    try:
        store, other = (open_store(f"s3://k:s@{front.endpoint}/parts/{o}?secure=false&stale_s=100") for o in "ab")
        kept = store.put_bytes(PNG)
        old = {begin_upload(store, bytes([i])) for i in range(5)}
        foreign = begin_upload(other, b"another prefix")
        for id in front.begun: front.begun[id] -= timedelta(seconds=101)
        young = begin_upload(store, b"a living writer's")
        assert {o[0] for o in store.unfinished()} == old | {young}
        assert (store.sweep(), [o[0] for o in store.unfinished()]) == (5, [young])
        assert [o[0] for o in other.unfinished()] == [foreign] and list(store.list()) == [kept.sha256]
        for id in front.begun: front.begun[id] -= timedelta(seconds=101)
        assert store.sweep() == 0  # it has looked a moment ago
        assert open_store(f"s3://k:s@{front.endpoint}/nobody?secure=false").sweep() == 0
    finally: front.down()


def test_what_a_killed_download_left_in_the_cache_is_swept(s3_server, tmp_path):
    store = open_store(f"s3://k:s@{s3_server}/halves?secure=false", tmp_path / "cache")
    a = store.put_bytes(os.urandom(3 << 20))
    code = f"""
import os, signal
from myspinbot.store import artifacts
from myspinbot.schema import Artifact
artifacts.copy_hashed = lambda source, target: target.write(source.read(1 << 20)) and os.kill(os.getpid(), signal.SIGKILL)
store = artifacts.open_store({f"s3://k:s@{s3_server}/halves?secure=false"!r}, {str(tmp_path / "cache")!r})
store.fetch(Artifact(sha256={a.sha256!r}, size={a.size}), {str(tmp_path / "out")!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(leftovers(tmp_path)) == 1
    assert store.sweep() == 1 and not leftovers(tmp_path)
    assert store.fetch(a, tmp_path / "out").stat().st_size == a.size


def test_server_away_or_refusing_is_told_apart():
    away = open_store("s3://k:s@127.0.0.1:9/away?secure=false")
    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:9/away does not answer"): away.put_bytes(b"x")

    class Refuse(Quiet):
        def do_GET(self) -> None: self.send_error(403)
        do_HEAD = do_PUT = do_GET
    with serving(Refuse) as endpoint, pytest.raises(ConfigError, match="refuses access"):
        open_store(f"s3://k:s@{endpoint}/refused?secure=false").put_bytes(b"x")


def test_server_that_fails_for_a_moment_is_asked_again(tmp_path):
    class Flaky(Quiet):
        asked = 0

        def do_GET(self) -> None:
            Flaky.asked += 1
            self.send_response(200 if Flaky.asked > 2 else 503)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG)
    with serving(Flaky) as endpoint:
        store = open_store(f"s3://k:s@{endpoint}/flaky?secure=false", tmp_path / "cache")
        p = store.fetch(Artifact(sha256=hash_bytes(PNG), size=len(PNG)), tmp_path / "out")
    assert p.read_bytes() == PNG and Flaky.asked == 3


def test_server_that_breaks_off_leaves_no_file(tmp_path):
    class Half(Quiet):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x" * 5000)
    with serving(Half) as endpoint:
        store = open_store(f"s3://k:s@{endpoint}/half?secure=false", tmp_path / "cache")
        with pytest.raises(ServiceUnavailable):
            store.fetch(Artifact(sha256="0" * 64, size=1000000), tmp_path / "out")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_full_disk_is_a_clean_error(tmp_path):
    """A process that may write files of 1 MB at most: put and fetch report it and leave nothing behind."""
    code = """
import json, resource, signal, sys
from pathlib import Path
from myspinbot.store.artifacts import LocalStore
from myspinbot.core import ServiceUnavailable
root = Path(sys.argv[1])
store = LocalStore(root / "store")
a = store.put_bytes(b"small")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try: store.put_bytes(b"x" * (3 << 20))
except ServiceUnavailable as e: print(json.dumps([str(e), [str(p) for p in root.rglob("*") if p.is_file()]]))
assert store.fetch(a, root / "out").read_bytes() == b"small"
"""
    r = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    message, files = json.loads(r.stdout)
    assert "Cannot write" in message and len(files) == 1


def test_store_urls_are_checked(tmp_path):
    assert isinstance(open_store(tmp_path), LocalStore)
    assert open_store(f"file://{tmp_path}/a%20b").root == tmp_path / "a b"
    s = open_store("s3://k:p%40ss@minio:9000/bucket?secure=false&region=eu-west-1")
    assert (s.where, s.prefix) == ("http://minio:9000/bucket", "")
    for bad in ("s3://host/bucket?secrue=false", "s3://host/bucket?stale_s=soon", "s3://host", "s3://host/B_", "gopher://x", "file://"):
        with pytest.raises(ConfigError): open_store(bad)


@pytest.mark.parametrize(("head", "name", "expected"), [
    (b"\xff\xd8\xff\xe0", "x.png", "image/jpeg"), (b"RIFF....WEBPVP8 ", "x", "image/webp"),
    (b"\0\0\0\x20ftypM4A ", "x.mp4", "audio/mp4"), (b"hello", "x.txt", "text/plain"), (b"hello", "x.jpg", "image/jpeg"),
    (b"", "x", "application/octet-stream"), (b"PK\x03\x04", "x.npz", "application/zip"),
    (b"\x1aE\xdf\xa3", "x.mkv", "video/x-matroska"), (b"{}", "n.ipynb", "application/x-ipynb+json"),
    (b"\xff\xfb\x90\x64" + bytes(12), "x", "audio/mpeg"),
    (b"\xff\xfb\0\0\0\0\0\0{\"a\":", "m.safetensors", "application/octet-stream"),
    (b"\xff\xfb", "x", "application/octet-stream")])
def test_media_type_by_content_then_name(head, name, expected):
    assert media_type_of(head, name) == expected
