"""The HTTP API as another program sees it: a real server, journal and Redis, a conductor and a worker behind it."""
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from myspinbot.core import InputError, NotFound, error_from_dict

TOYS = Path(__file__).parent / "pipelines"


def events(api: SimpleNamespace, job: str, after: int = 0) -> tuple[list[dict[str, Any]], int]:
    "All messages of a job's WebSocket, and the code it was closed with."
    got = []
    with connect(f"{api.ws}/jobs/{job}/ws?after={after}", additional_headers=api.own) as ws:
        try:
            while True: got.append(json.loads(ws.recv(timeout=60)))
        except ConnectionClosed as e: return got, e.rcvd.code


def test_job_from_submission_to_its_outputs_over_http_and_websocket(api: SimpleNamespace) -> None:
    api.farm.start("control")
    api.farm.start("w1")
    job = api.http.post("/jobs", json=dict(pipeline="branches", params={}, priority="high")).raise_for_status().json()
    got, code = events(api, job["id"])
    assert code == 1000
    assert [e["body"]["status"] for e in got if e["kind"] == "job"][-1] == "succeeded"
    assert {e["key"] for e in got if e["kind"] == "step"} == {"slow", "fast", "after"}
    ended = api.http.get(f"/jobs/{job['id']}").json()
    assert (ended["status"], ended["priority"], ended["outputs"]) == ("succeeded", "high", dict(value="x", slow="x"))
    steps = api.http.get(f"/jobs/{job['id']}/steps").json()
    assert {s["key"]: s["status"] for s in steps} == dict(slow="succeeded", fast="succeeded", after="succeeded")
    record = steps[0]["notebook"]
    notebook = api.http.get(f"/artifacts/{record['sha256']}", params=dict(name=record["name"])).raise_for_status()
    assert notebook.json()["nbformat"] == 4
    listed = api.http.get("/jobs", params=dict(status="succeeded", limit=1)).json()
    assert [(j["id"], j["pipeline"], "graph" in j) for j in listed] == [(job["id"], "branches", False)]
    journal = api.http.get(f"/jobs/{job['id']}/events").json()
    half = journal[len(journal) // 2]["seq"]
    rest, _ = events(api, job["id"], half)
    assert [e["seq"] for e in rest if e["seq"]] == [e["seq"] for e in journal if e["seq"] > half]


def test_error_crosses_http_with_type_message_and_hint(api: SimpleNamespace) -> None:
    cases = [("/jobs", dict(pipeline="branchs"), 404), ("/jobs", dict(pipeline="branches", params=dict(gat="x")), 422),
             ("/jobs", dict(pipeline="branches", priority="urgent"), 422), ("/jobs", dict(), 422),
             ("/jobs", dict(graph=dict(name="g", nodes=[dict(id="a", step="no.such")])), 422),
             ("/jobs/job_0000000000000000/cancel", {}, 404)]
    for path, body, code in cases:
        r = api.http.post(path, json=body)
        e = error_from_dict(r.json())
        assert r.status_code == code, (path, body, r.text)
        assert e.message and type(e) is not Exception
    unknown = error_from_dict(api.http.post("/jobs", json=dict(pipeline="branchs")).json())
    assert isinstance(unknown, NotFound) and "branches" in str(unknown)
    assert api.http.get("/jobs").json() == []


def test_path_on_the_server_is_not_read_for_a_request(api: SimpleNamespace, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG\r\n\x1a\n secret")
    graphs = [dict(name="g", params=[dict(name="picture", type="Image", default=str(secret))],
                   nodes=[dict(id="a", step="toy.mark", inputs=dict(value=dict(kind="param", name="picture")))]),
              dict(name="g", params=[dict(name="pictures", type="list[Image]", default=[str(secret)])],
                   nodes=[dict(id="a", step="toy.mark")])]
    for g in graphs:
        r = api.http.post("/jobs", json=dict(graph=g))
        assert r.status_code == 422 and isinstance(error_from_dict(r.json()), InputError), r.text
    assert api.http.get("/jobs").json() == [] and list(api.farm.client.store.list()) == []


def test_same_idempotency_key_gives_the_first_job(api: SimpleNamespace) -> None:
    body = dict(pipeline="branches", idempotency_key="order-7")
    first, second = (api.http.post("/jobs", json=body).json() for _ in range(2))
    assert first["id"] == second["id"]
    other = api.http.post("/jobs", json=body | dict(params=dict(gate="x")))
    assert other.status_code == 409
    assert error_from_dict(other.json()).message


def test_cancel_then_retry(api: SimpleNamespace) -> None:
    id = api.http.post("/jobs", json=dict(pipeline="branches")).json()["id"]
    assert api.http.post(f"/jobs/{id}/cancel").json()["status"] == "cancelled"
    assert events(api, id)[1] == 1000
    assert api.http.post(f"/jobs/{id}/retry").json()["status"] == "queued"
    assert api.http.post(f"/jobs/{id}/retry").status_code == 409


def test_uploaded_file_comes_back_in_ranges(api: SimpleNamespace) -> None:
    data = bytes(range(256)) * 4096
    a = api.http.post("/artifacts", params=dict(name="../a clip.mp4"), content=b"\0\0\0\x18ftypisom" + data).json()
    assert (a["media_type"], a["name"], a["size"]) == ("video/mp4", "a clip.mp4", len(data) + 12)
    part = api.http.get(f"/artifacts/{a['sha256']}", headers=dict(Range="bytes=12-15"))
    assert (part.status_code, part.content, part.headers["content-type"]) == (206, data[:4], "video/mp4")
    assert api.http.post("/artifacts", content=b"").status_code == 422
    assert api.http.get("/artifacts/" + "0" * 64).status_code == 404
    assert api.http.get("/artifacts/..%2f..%2fetc%2fpasswd").status_code in (404, 422)


def test_artifact_that_was_never_uploaded_is_refused(api: SimpleNamespace) -> None:
    ghost = dict(kind="artifact", sha256="0" * 64, size=3, media_type="image/png", name="ghost.png")
    graph = dict(name="g", params=[dict(name="picture", type="Image", required=True)], nodes=[])
    r = api.http.post("/jobs", json=dict(graph=graph, params=dict(picture=ghost)))
    assert r.status_code == 422 and "/artifacts" in r.json()["hint"]


def test_unknown_job_closes_its_websocket_with_the_reason(api: SimpleNamespace) -> None:
    got, code = events(api, "job_0000000000000000")
    assert (got[0]["type"], code) == ("NotFound", 4404)


def test_catalogue_health_and_metrics(api: SimpleNamespace) -> None:
    assert set(api.http.get("/pipelines").json()) == {"branches", "fan"}
    assert "toy.mark" in {s["id"] for s in api.http.get("/steps").json()}
    health = api.http.get("/health")
    assert health.status_code == 200 and health.json()["postgres"]["ok"]
    api.http.post("/jobs", json=dict(pipeline="branches"))
    parsed = {s.name: s for f in text_string_to_metric_families(api.http.get("/metrics").text) for s in f.samples}
    assert parsed["spin_jobs"].value == 1 and parsed["spin_jobs"].labels == dict(status="queued")
    assert parsed["spin_up"].value == 1


def test_health_is_503_and_says_which_server_is_away(api: SimpleNamespace) -> None:
    from myspinbot.bridge.streams import Bridge
    api.farm.client.bridge.close()
    api.farm.client.bridge = Bridge("redis://127.0.0.1:1/0")
    r = api.http.get("/health")
    assert r.status_code == 503 and r.json()["postgres"]["ok"] and not r.json()["redis"]["ok"]
    assert 'spin_up{service="redis"} 0.0' in api.http.get("/metrics").text
