"""Bad graphs, as Python data through the client and as JSON over HTTP: refused whole, named, and at once."""
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from farm import Farm, wait_for

from myspinbot.api.http import create_app
from myspinbot.graph.catalogue import Catalogue, using
from myspinbot.graph.check import read_graph, validate_graph
from myspinbot.core import GraphError, InputError, error_from_dict
from myspinbot.api.doors import authorization
from myspinbot.graph.builder import Pipeline
from myspinbot.schema import Graph, Node, ParamRef, Port

TOYS = Path(__file__).parents[1] / "pipelines"


def node(id: str = "a", **kw: Any) -> dict[str, Any]: return dict(id=id, step="toy.mark") | kw
def port(node: str, port: str = "value") -> dict[str, str]: return dict(kind="port", node=node, port=port)
def doc(*nodes: Any, **kw: Any) -> dict[str, Any]: return dict(name="g", nodes=list(nodes)) | kw


def nested(levels: int) -> Any:
    v: Any = 1
    for _ in range(levels): v = [v]
    return v


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {  # document -> words of message and hint
    "no object": (5, ("5",)),
    "a list": ([], ("[]",)),
    "nothing in it": ({}, ("graph lacks 'name'",)),
    "no nodes": (doc(), ("'g' has no steps", "p.step")),
    "cycle of three": (doc(node("a", after=["c"]), node("b", after=["a"]), node("c", inputs=dict(name=port("b")))),
                       ("cycle: a -> b -> c -> a", "Remove one")),
    "needs itself": (doc(node(inputs=dict(name=port("a")))), ("cycle: a -> a",)),
    "after itself": (doc(node(after=["a"])), ("cycle: a -> a",)),
    "asks itself": (doc(node(when=dict(ref=port("a")))), ("cycle: a -> a",)),
    "dangling input": (doc(node(inputs=dict(name=port("zz")))), ("a.name", "no step 'zz'", "Valid steps: a")),
    "dangling after": (doc(node(after=["zz"])), ("a needs the step 'zz'", "Valid names: a")),
    "dangling condition": (doc(node(when=dict(ref=port("zz")))), ("a, when", "no step 'zz'")),
    "dangling output": (doc(node(), outputs=dict(v=port("zz"))), ("Output 'v'", "no step 'zz'")),
    "unknown step": (doc(node(step="toy.mrk")), ("a: Unknown step 'toy.mrk'", "Did you mean toy.mark?")),
    "step named by a megabyte": (doc(node(step="x" * 2**20)), ("a: Unknown step 'xxx",)),
    "step is a path": (doc(node(step="../../x")), ("Unknown step '../../x'",)),
    "unknown port": (doc(node(), node("b", inputs=dict(name=port("a", "valu")))),
                     ("b.name", "no output 'valu'", "mean value?")),
    "unknown input": (doc(node(inputs=dict(nmae="x"))), ("a: toy.mark has no input 'nmae'", "Did you mean name?")),
    "unknown parameter": (doc(node(inputs=dict(name=dict(kind="param", name="q")))),
                          ("a.name", "no parameter 'q'", "declares none")),
    "input of the wrong type": (doc(node(inputs=dict(seconds="soon"))), ("a.seconds", "takes float", "'soon' (str)")),
    "torn reference": (doc(node(inputs=dict(name=dict(kind="port", node="a")))), ("a: Malformed port", "node and port")),
    "two equal ids": (doc(node(), node()), ("Two steps have the id 'a'", "Rename one")),
    "two equal parameters": (doc(node(), params=[dict(name="x"), dict(name="x")]), ("'x' is declared twice",)),
    "10 000 nodes": (doc(*[node(f"n{i}") for i in range(10_000)]), ("graph.nodes holds 10000 items", "1000", "each")),
    "newer": (doc(node(), schema_version=2, loops=[]), ("schema_version 2", "up to 1", "Update MySpinBot")),
    "newer by far": (doc(node(), schema_version=10**300), ("schema_version 1000", "Update MySpinBot")),
    "version is a text": (doc(node(), schema_version="1"), ("graph.schema_version is '1'",)),
    "unknown field": (doc(node(inptus={})), ("graph.nodes[0] has no field 'inptus'", "Did you mean inputs?")),
    "id with a blank": (doc(node("a b")), ("graph.nodes[0].id is 'a b'",)),
    "id is a path": (doc(node("../../x")), ("graph.nodes[0].id is '../../x'",)),
    "id of a megabyte": (doc(node("x" * 2**20)), ("graph.nodes[0].id is 'xxx",)),
    "name with NUL": (doc(node(), name="a\0b"), ("graph.name is a text with a NUL",)),
    "nodes is an object": (doc(node(), nodes={}), ("graph.nodes is {}", "list")),
    "node is a number": (doc(5), ("graph.nodes[0] is 5",)),
    "step is a list": (doc(node(step=[])), ("graph.nodes[0].step is []",)),
    "condition that is none": (doc(node(when=dict(ref=port("a"), op="like"))), ("when.op is 'like'", "'truthy'")),
    "parameter of no type": (doc(node(), params=[dict(name="x", type="Picture")]),
                             ("graph.params[0].type", "'Picture'", "Use one of")),
    "type without end": (doc(node(), params=[dict(name="x", type="list[" * 9999)]), ("graph.params[0].type", "Unknown type")),
    "output named like a path": (doc(node(), outputs={"../../x": port("a")}), ("graph.outputs has the name '../../x'",)),
    "10 000 lists in an input": (doc(node(inputs=dict(name=nested(10_000)))), ("graph.nodes[0].inputs.name", "100 levels")),
    "10 000 lists in a default": (doc(node(), params=[dict(name="x", default=nested(10_000))]),
                                  ("graph.params[0].default", "levels")),
    "NaN in an input": (doc(node(inputs=dict(seconds=float("nan")))), ("graph.nodes[0].inputs.seconds is NaN",)),
    "map over a text": (doc(node(each=["name"], inputs=dict(name="abc"))), ("a.name", "takes list[str]", "'abc'")),
    "map over what is not given": (doc(node(each=["name"])), ("a maps over 'name'", "not among its inputs")),
    "map over lists of two lengths": (doc(node(each=["name", "value"], inputs=dict(name=["a"], value=["a", "b"]))),
                                      ("different lengths: [1, 2]",)),
    "map over a text parameter": (doc(node(each=["name"], inputs=dict(name=dict(kind="param", name="t"))),
                                      params=[dict(name="t", type="str", default="a")]),
                                  ("a.name", "list[str]", "parameter t is str")),
}


@pytest.fixture
def home(farm: Callable[..., Farm]) -> Farm: return farm(TOYS)


@pytest.fixture
def http(home: Farm) -> Iterator[httpx.Client]:
    "The API on a real socket."
    server = uvicorn.Server(uvicorn.Config(create_app(home.client), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for("the server listens", lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    own = authorization(home.cfg)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=own) as c: yield c
    server.should_exit = True
    thread.join(10)


def nothing_left(f: Farm) -> None: assert f.client.jobs() == [] and list(f.client.store.list()) == []


def test_documents_are_refused_by_client_and_http_with_the_same_words(home: Farm, http: httpx.Client) -> None:
    for name, (graph, words) in BAD.items():
        with pytest.raises((GraphError, InputError)) as e: home.client.submit(graph)
        told = str(e.value)
        assert e.value.message and e.value.hint and all(w in told for w in words), (name, told[:500])
        assert len(told) < 500, (name, len(told))
        try: body = json.dumps(dict(graph=graph))
        except RecursionError: continue
        r = http.post("/jobs", content=body, headers={"Content-Type": "application/json"})
        assert r.status_code == 422 and str(error_from_dict(r.json())) == told, (name, r.text[:500])
    nothing_left(home)


def test_graph_objects_are_checked_like_documents(home: Farm) -> None:
    for name, (graph, words) in BAD.items():
        try: g = Graph.model_validate(graph)
        except (ValueError, RecursionError): continue  # pydantic itself refuses to make one
        with pytest.raises(GraphError) as e: home.client.submit(g)
        words = [w.replace("graph.nodes[0].inputs", "nodes.a").replace("graph.params[0]", "params.x") for w in words]
        assert e.value.hint and all(w in str(e.value) for w in words), (name, str(e.value)[:400])
    nothing_left(home)


def test_every_problem_of_a_large_graph_is_listed_but_the_answer_stays_small(home: Farm) -> None:
    with pytest.raises(GraphError) as e: home.client.submit(doc(*[node(f"n{i}", step=f"no.such{i}") for i in range(1000)]))
    assert "999 more" in e.value.hint and len(json.dumps(e.value.to_dict())) < 20_000


def test_builder_says_it_on_the_line(home: Farm) -> None:
    with using(Catalogue(TOYS)): p = Pipeline("g")
    loop: list[Any] = []
    loop.append(loop)
    for call, words in ((lambda: p.step("toy.mark", name=nested(10_000)), ("mark (toy.mark)", "nested")),
                        (lambda: p.step("toy.mark", name=loop), ("mark (toy.mark)", "nested")),
                        (lambda: p.step("toy.mark", seconds=float("inf")), ("seconds is inf",)),
                        (lambda: p.step("toy.mark", name="a\0b"), ("name is a text with a NUL",)),
                        (lambda: p.step("toy.mark", name=b"x"), ("name is b'x' (bytes)",)),
                        (lambda: p.step(5), ("Unknown step 5",)), (lambda: p.step("x" * 2**20), ("Unknown step 'xxx",)),
                        (lambda: p.param("x", float, default=float("nan")), ("default of x is NaN",)),
                        (lambda: p.param("x", "list[" * 9999), ("Unknown type",)),
                        (lambda: p.param("X y"), ("'X y' is no name",)),
                        (lambda: p.map("toy.mark", over=dict(name="abc")), ("takes list[str]",))):
        with pytest.raises(GraphError) as e: call()
        assert e.value.hint and all(w in str(e.value) for w in words) and len(str(e.value)) < 400, str(e.value)[:400]
    for i in range(1001): p.step("toy.mark", id=f"n{i}")
    with pytest.raises(GraphError, match="holds 1001 items, but 1000 are the limit"): p.to_graph()
    with using(Catalogue(TOYS)), pytest.raises(GraphError, match="no name for a pipeline"): Pipeline("../../x")
    nothing_left(home)


def test_50_mb_through_the_client_is_refused_before_it_is_copied(home: Farm) -> None:
    text = doc(node(inputs=dict(value="x" * 50 * 2**20)))
    large = ["x" * 100] * 500_000
    fine = Graph(name="g", params=(Port(name="values", type="list"),), nodes=(Node(id="a", step="toy.mark"),))
    big = fine.model_copy(update=dict(nodes=(Node(id="a", step="toy.mark", inputs=dict(value=large)),)))
    calls = [lambda: home.client.submit(text), lambda: home.client.submit(doc(node(inputs=dict(value=large)))),
             lambda: home.client.submit(big), lambda: home.client.submit(fine, dict(values=large))]
    for call in calls:
        tracemalloc.start()
        before, began = tracemalloc.get_traced_memory()[0], time.monotonic()
        with pytest.raises((GraphError, InputError), match="8 MB"): call()
        assert tracemalloc.get_traced_memory()[1] - before < 20 * 2**20 and time.monotonic() - began < 10
        tracemalloc.stop()
    nothing_left(home)


def test_50_mb_over_http_are_refused_by_size_in_bounded_memory(home: Farm, http: httpx.Client) -> None:
    head = {"Content-Type": "application/json"}
    me = psutil.Process()

    def pieces() -> Iterator[bytes]:
        yield b'{"graph": {"name": "g", "nodes": ['
        for _ in range(800): yield b'{"id": "a", "step": "toy.mark"},' * 2000

    http.get("/health")
    before, peak, stop = me.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005): peak[0] = max(peak[0], me.memory_info().rss - before)
    t = threading.Thread(target=watch)
    t.start()
    for kw in (dict(content=pieces()), dict(content=pieces(), headers=head | {"Content-Length": str(34 + 800 * 64_000)})):
        r = http.post("/jobs", **(dict(headers=head) | kw))
        assert r.status_code == 413 and "the limit is 8 MB" in r.json()["message"] and r.json()["hint"], r.text
    stop.set()
    t.join()
    assert peak[0] < 60 * 2**20, f"{peak[0] / 2**20:.0f} MB more at the peak"
    assert http.post("/artifacts", content=b"x" * 9 * 2**20).status_code == 201, "files travel another way"
    assert home.client.jobs() == []


def test_map_over_a_thousand_items_and_over_what_turns_out_to_be_none(farm: Callable[..., Farm]) -> None:
    up = farm(Path(__file__).parent / "pipelines")
    up.start("control")
    up.start("w1")
    graph = Graph(name="g", params=(Port(name="free", type="any"),), nodes=(
        Node(id="a", step="toy.echo", inputs=dict(value=ParamRef(name="free"))),
        Node(id="m", step="toy.echo", each=("value",), inputs=dict(value=dict(kind="port", node="a", port="value")))),
        outputs=dict(values=dict(kind="port", node="m", port="value")))
    for given, words in (("abc", ("m maps over value", "'abc'")), (5, ("m maps over value", "5")),
                         (list(range(10_001)), ("m maps over value", "10001 items", "10000"))):
        job = up.done(up.client.submit(graph, dict(free=given)).id)
        assert job.status == "failed" and all(w in job.error["message"] for w in words) and job.error["hint"], job.error
    assert up.done(up.client.submit(graph, dict(free=[])).id).outputs == dict(values=[])
    values = list(range(1000))
    job = up.done(up.client.submit(graph, dict(free=values)).id, 240)
    assert job.outputs == dict(values=values) and len(up.client.steps(job.id)) == 1001
    assert all(p.poll() is None for p in up.procs.values())


def test_chain_of_a_thousand_steps_is_checked_in_no_time() -> None:
    g = read_graph(doc(*[node(f"n{i}", after=[f"n{i - 1}"] if i else []) for i in range(1000)]))
    began = time.monotonic()
    validate_graph(g, Catalogue(TOYS))
    assert time.monotonic() - began < 10
