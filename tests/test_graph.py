"""Pipelines as people write them, right and wrong; graphs as documents from anywhere; the diagram."""
import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Picture
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from myspinbot.store.artifacts import LocalStore
from myspinbot.graph.catalogue import Catalogue, control_step
from myspinbot.core import GraphError, InputError, NotFound
from myspinbot.graph.draw import edges_of
from myspinbot.graph.builder import Pipeline
from myspinbot.graph.draw import draw
from myspinbot.graph.files import file_values, store_files
from myspinbot.graph.params import params_from_text, resolve_params
from myspinbot.graph.check import validate_graph
from myspinbot.schema import Artifact, Audio, Condition, Data, Graph, Image, Job, Node, ParamRef, Port, PortRef, Video


@control_step("gt.read", outputs={"text": "str", "words": "int", "lines": "list[str]", "score": "float", "ok": "bool"})
async def read(ctx: Any, image: Image = "", hint: str = "") -> dict[str, Any]: return {}
@control_step("gt.say", outputs={"audio": "audio/wav", "phonemes": "application/json"})
async def say(ctx: Any, text: str, speed: float = 1.0) -> dict[str, Any]: return {}
@control_step("gt.film", outputs={"video": "video/mp4"})
async def film(ctx: Any, portrait: Image, audio: Audio, marks: Data = "", size: int = 512) -> dict[str, Any]: return {}
@control_step("gt.join", outputs={"video": "video/mp4"})
async def join(ctx: Any, parts: list[Video], names: list[str] = ()) -> dict[str, Any]: return {}
@control_step("gt.note", outputs={})
async def note(ctx: Any, what: Any, more: dict = {}) -> dict[str, Any]: return {}  # noqa: B006


@pytest.fixture
def cat(tmp_path: Path) -> Catalogue: return Catalogue(tmp_path)


@pytest.fixture
def p(cat: Catalogue) -> Pipeline: return Pipeline("talking", title="Talking", catalogue=cat)


def same(graph: Graph) -> Graph: return Graph.model_validate(json.loads(json.dumps(graph.to_json())))


def test_design_example_becomes_the_expected_document(p: Pipeline, cat: Catalogue) -> None:
    portrait, text = p.param("portrait", Image, help="one frontal face"), p.param("text", str)
    voice = p.step("gt.say", text=text)
    talk = p.step("gt.film", portrait=portrait, audio=voice.audio, marks=voice.phonemes)
    p.output(video=talk.video)
    g = p.to_graph()
    validate_graph(g, cat)
    assert [n.id for n in g.nodes] == ["say", "film"]
    assert g.node("film").inputs == dict(portrait=ParamRef(name="portrait"), audio=PortRef(node="say", port="audio"),
                                         marks=PortRef(node="say", port="phonemes"))
    assert g.outputs == dict(video=PortRef(node="film", port="video"))
    assert [(o.name, o.type, o.required) for o in g.params] == [("portrait", "Image", True), ("text", "str", True)]
    validate_graph(same(g), cat)
    assert same(g).to_json() == g.to_json()


def test_ids_are_numbered_and_outputs_complete(p: Pipeline) -> None:
    handles = [p.step("gt.say", text="x") for _ in range(3)]
    assert [repr(h.audio) for h in handles] == ["<say.audio: Audio>", "<say_2.audio: Audio>", "<say_3.audio: Audio>"]
    assert {"audio", "phonemes"} <= set(dir(handles[0])) and handles[0]["audio"].type == "Audio"
    assert "say_2 (gt.say) -> audio: Audio" in repr(handles[1])


def build(p: Pipeline) -> dict[str, Any]:
    return dict(p=p, say=p.step("gt.say", text="x"), read=p.step("gt.read"), face=p.param("face", Image),
                n=p.param("n", int, 1))


@pytest.mark.parametrize(("code", "said"), [
    ("p.step('gt.sai', text='x')", "Unknown step 'gt.sai'. Did you mean gt.say?"),
    ("p.step('gt.say')", "say_2 (gt.say) lacks text. Pass text=..."),
    ("p.step('gt.say', txt='x')", "gt.say has no input 'txt'. Did you mean text?"),
    ("p.step('gt.read', zzzzz='x')", "Valid inputs: hint, image."),
    ("p.step('gt.say', text=5)", "say_2.text (gt.say) takes str, but got 5 (int)"),
    ("p.step('gt.say', text='x', speed=True)", "takes float, but got True (bool)"),
    ("p.step('gt.say', text=say.audio)", "say_2.text (gt.say) takes str, but say.audio is Audio."),
    ("p.step('gt.film', portrait=face, audio=say.phonemes)",
     "takes Audio, but say.phonemes is Data. Did you mean say.audio?"),
    ("p.step('gt.film', portrait=n, audio=say.audio)",
     "takes Image, but parameter n is int. Declare the parameter as Image."),
    ("p.step('gt.film', portrait=face, audio=say.audio, size=read.score)",
     "takes int, but read.score is float. Did you mean read.words"),
    ("p.step('gt.film', portrait=face, audio=say)",
     "got the step say, which has 2 outputs. Choose one: say.audio or say.phonemes."),
    ("p.step('gt.note', what=p.step('gt.note', what=1))", "which has no outputs. Use it in `after=`."),
    ("p.step('gt.join', parts=[say.audio])", "join.parts (gt.join)[0] takes Video, but say.audio is Audio"),
    ("p.step('gt.join', parts=say.audio)", "takes list[Video], but say.audio is Audio"),
    ("p.step('gt.note', what=n > 1)", "got a comparison. Conditions go into `when=`."),
    ("p.step('gt.say', 'say', text='x')", "There is a step 'say' already"),
    ("p.step('gt.say', 'Say It', text='x')", "id='Say It'"),
    ("p.step('gt.say', text='x', after='sai')", "after='sai' names no step. Did you mean say?"),
    ("p.step('gt.say', text='x', on_failure='ignore')", "on_failure='ignore'"),
    ("p.step('gt.say', text='x', when=True)", "when=True is no condition"),
    ("p.step('gt.say', text='x', when=read.words == 'two')", "comparing it with 'two' is never meant"),
    ("p.step('gt.say', text='x', when=say.audio > 3)", "say.audio is Audio, which has no 'gt' comparison"),
    ("p.step('gt.say', text='x', when=n > read.words)", "can only be compared with a plain value"),
    ("p.map('gt.say', over={})", "`over` is empty"),
    ("p.map('gt.say', over={'text': read.text})", "takes list[str], but read.text is str. Did you mean read.lines?"),
    ("p.map('gt.say', over={'text': ['a', 1]})", "say_2.text (gt.say)[1] takes str, but got 1 (int)"),
    ("p.map('gt.say', over={'text': ['a']}, text='b')", "'text' is given twice"),
    ("p.map('gt.say', over={'text': ['a'], 'speed': [1.0, 2.0]})", "lists of different lengths: [1, 2]"),
    ("p.output(video=say.video)", "say (gt.say) has no output 'video'"),
    ("p.output(video='x.mp4')", "not an output of a step"),
    ("(p.output(a=say.audio), p.output(a=say.audio))", "'a' is declared twice"),
    ("p.param('n', int)", "'n' is declared twice"),
    ("p.param('N', int)", "'N' is no name for a parameter"),
    ("p.param('m', int, default='x')", "default of m is 'x' (str), which is not int"),
    ("p.param('m', 'Picture')", "Unknown type 'Picture'"),
    ("bool(n)", "parameter n has no value while the graph is built"),
    ("1 if n > 1 else 2", "A condition has no value while the graph is built"),
    ("[o for o in read.lines]", "cannot be looped over"),
])
def test_mistakes_are_told_where_they_are_written_with_the_fix(p: Pipeline, code: str, said: str) -> None:
    names = build(p)
    before = p.to_graph()
    with pytest.raises(GraphError) as e: eval(code, {}, names)
    assert said in str(e.value)
    if "what=p.step" not in code and "p.output(a" not in code:
        assert p.to_graph() == before, "a refused line leaves nothing behind"


def test_value_of_another_pipeline_is_refused(p: Pipeline, cat: Catalogue) -> None:
    other = Pipeline("other", catalogue=cat)
    with pytest.raises(GraphError, match="belongs to the pipeline 'other'"): p.step("gt.say", text=other.param("text"))


def test_bad_pipeline_name(cat: Catalogue) -> None:
    with pytest.raises(GraphError, match="'My film' is no name"): Pipeline("My film", catalogue=cat)


def test_map_outputs_are_lists_that_map_again(p: Pipeline, cat: Catalogue) -> None:
    says = p.map("gt.say", over={"text": p.param("texts", list[str])}, speed=2)
    films = p.map("gt.film", {"audio": says.audio}, portrait="me.png", after=says)
    p.output(film=p.step("gt.join", parts=films.video, names=["a", "b"]))
    assert says.audio.type == "list[Audio]" and p.to_graph().node("film").each == ("audio",)
    validate_graph(same(p.to_graph()), cat)


def test_conditions_are_data(p: Pipeline) -> None:
    r, on = p.step("gt.read"), p.param("on", bool, True)
    made = [on, ~on, r.words > 3, ~(r.words > 3), r.text == "x", ~(r.text != "x"), r.score <= 1, r.ok]
    for i, c in enumerate(made): p.step("gt.say", f"s{i}", text="x", when=c)
    whens = [n.when for n in p.to_graph().nodes[1:]]
    assert [c.op for c in whens] == ["truthy", "falsy", "gt", "le", "eq", "eq", "le", "truthy"]
    assert {type(c) for c in whens} == {Condition}
    assert same(p.to_graph()).to_json() == p.to_graph().to_json()


def test_approval_goes_before(p: Pipeline, cat: Catalogue) -> None:
    r = p.step("gt.read")
    ok = p.approve("Use it?", show={"text": r.text, "lines": r.lines})
    p.step("gt.say", text=r.text, after=ok)
    assert p.to_graph().node("say").after == ("approve",)
    validate_graph(same(p.to_graph()), cat)


# ---- documents

def doc(*nodes: Node, **fields: Any) -> Graph: return Graph(name="g", nodes=nodes, **fields)
def node(id: str, step: str = "gt.say", **fields: Any) -> Node:
    return Node(id=id, step=step, **{"inputs": {"text": "x"}, **fields})


@pytest.mark.parametrize(("graph", "said"), [
    (doc(), "has no steps"),
    (doc(node("a", "gt.sai")), "Unknown step 'gt.sai'. Did you mean gt.say?"),
    (doc(node("a"), node("a")), "Two steps have the id 'a'"),
    (doc(node("a", inputs={"text": PortRef(node="b", port="text")})), "There is no step 'b'"),
    (doc(node("a", inputs={"text": ParamRef(name="t")})), "There is no parameter 't'"),
    (doc(node("a", inputs={"text": {"kind": "param"}})), "Malformed param value"),
    (doc(node("a"), node("b", inputs={"text": PortRef(node="a", port="text")})), "has no output 'text'"),
    (doc(node("a", after=("b",))), "a needs the step 'b', which is not in the graph"),
    (doc(node("a", when=Condition(ref=ParamRef(name="t")))), "There is no parameter 't'"),
    (doc(node("a"), outputs={"v": PortRef(node="a", port="video")}), "Output 'v': a (gt.say) has no output 'video'"),
    (doc(node("a"), params=(Port(name="x"), Port(name="x"))), "'x' is declared twice"),
    (doc(node("a", each=("speed",))), "maps over 'speed', which is not among its inputs"),
    (doc(node("a", after=("c",)), node("b", after=("a",)), node("c", after=("b",)), node("d")),
     "a cycle: a -> b -> c -> a"),
    (doc(node("a", after=("a",))), "a cycle: a -> a."),
])
def test_bad_documents_are_refused(graph: Graph, said: str, cat: Catalogue) -> None:
    for g in (graph, same(graph)):
        with pytest.raises(GraphError) as e: validate_graph(g, cat)
        assert said in str(e.value)


def test_all_problems_are_listed(cat: Catalogue) -> None:
    g = doc(node("a", inputs={}), node("b", inputs={"text": 1, "speed": "x"}), node("c", "no.step"))
    with pytest.raises(GraphError) as e: validate_graph(g, cat)
    assert len(e.value.fields["problems"]) == 4 and "3 more" in str(e.value)


def test_broken_step_notebook_is_told_from_an_unknown_step(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "gt_cut.ipynb").write_text("{")
    with pytest.raises(GraphError, match="gt_cut.ipynb is no notebook"):
        validate_graph(doc(node("a", "gt.cut")), Catalogue(tmp_path))


def test_a_thousand_steps_are_checked_and_drawn_quickly(cat: Catalogue) -> None:
    chain = [node("n0")] + [node(f"n{i}", after=(f"n{i - 1}",)) for i in range(1, 1000)]
    began = time.perf_counter()
    validate_graph(doc(*chain[::-1]), cat)
    svg = draw(doc(*chain))
    assert time.perf_counter() - began < 5 and svg.count("<g>") == 1000
    with pytest.raises(GraphError, match="cycle: n0 -> n1 -> n2"):
        validate_graph(doc(node("n0", after=("n999",)), *chain[1:]), cat)


# ---- parameters and files

G = doc(node("a"),
        params=(Port(name="face", type="Image", required=True, help="one face"), Port(name="n", type="int", default=3),
                           Port(name="x", type="float", default=1.0), Port(name="tags", type="list[str]",
                                                                           default=[]),
                                                                           Port(name="free", default=None)))
FACE = Artifact(sha256="ab" * 32, size=1, media_type="image/png", name="f.png")


def test_bounds_under_their_old_names_are_the_same_bounds_with_a_warning(tmp_path: Path) -> None:
    old, new = (Pipeline("p", catalogue=Catalogue(tmp_path)) for _ in range(2))
    new.param("side", int, ge=8, le=16)
    with pytest.warns(DeprecationWarning, match=r"param\(\): (least is called ge|most is called le) now") as told:
        old.param("side", int, least=8, most=16)
    assert len(told) == 2 and {w.filename for w in told} == {__file__}
    assert old.to_graph() == new.to_graph()
    [port] = old.to_graph().params
    with pytest.warns(DeprecationWarning, match="Port: (least is called ge|most is called le) now") as told:
        assert (port.least, port.most) == (8, 16)
    with pytest.warns(DeprecationWarning, match="Job: fresh is called no_cache now") as of_job:
        assert Job(id="j", graph=old.to_graph(), no_cache=["a"]).fresh == ("a",)
    assert {w.filename for w in [*told, *of_job]} == {__file__}
    with pytest.raises(InputError, match="side is 7; at least 8 and at most 16 can be given"):
        resolve_params(old.to_graph(), dict(side=7))
    with pytest.raises(TypeError, match="least"): old.param("other", int, ge=8, least=8)
    with pytest.raises(ValidationError, match="least"): Port(name="other", ge=8, least=8)


def test_parameters_are_filled_and_typed() -> None:
    assert resolve_params(G, {"face": Path("me.png"), "x": 2}) == dict(face="me.png", n=3, x=2.0, tags=[], free=None)
    assert resolve_params(G, {"face": FACE.to_json()})["face"] == FACE
    assert type(resolve_params(G, {"face": Image("me.png")})["face"]) is str


@pytest.mark.parametrize(("given", "said"), [
    ({}, "g needs face (Image: one face). Pass face=..."),
    ({"face": ""}, "g needs face"),
    ({"face": "a", "m": 1}, "g has no parameter 'm'. Valid parameters: face, free, n, tags, x."),
    ({"face": "a", "n": "3"}, "n takes int, but got '3' (str)"),
    ({"face": "a", "n": None}, "n takes int, but got nothing (null)"),
    ({"face": "a", "tags": ["a", 1]}, "tags takes list[str]"),
    ({"face": FACE.model_copy(update=dict(media_type="audio/wav"))}, "face takes Image"),
])
def test_bad_parameters_are_told_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as e: resolve_params(G, given)
    assert said in str(e.value)


def test_parameters_from_text() -> None:
    assert params_from_text(G, dict(face="5", n="5", x="5", tags='["5"]', free="5")) == dict(face="5", n=5, x=5.0,
                                                                                             tags=["5"], free=5)
    assert params_from_text(G, dict(free="five", m="1")) == dict(free="five", m="1")
    flag = doc(node("a"), params=(Port(name="on", type="bool"),))
    assert [params_from_text(flag, dict(on=o))["on"] for o in ("true", "0", "Yes")] == [True, False, True]
    for g, name, text in ((G, "n", "5.5"), (G, "tags", "a, b"), (flag, "on", "maybe")):
        with pytest.raises(InputError, match=f"{name} takes .* but got '{text}'"): params_from_text(g, {name: text})


def test_files_go_to_the_store_once_and_artifacts_take_their_place(p: Pipeline, cat: Catalogue, tmp_path: Path) -> None:
    for n, colour in dict(a="red", b="blue").items(): Picture.new("RGB", (4, 4), colour).save(tmp_path / f"{n}.png")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    p.param("faces", list[Image])
    p.step("gt.read", image=a, hint=a)
    p.map("gt.read", {"image": [b, ""]}, id="many")
    g, params = p.to_graph(), {"faces": [a, FACE]}
    assert file_values(g, params, cat) == [(("params", "faces", 0), a), (("nodes", "read", "image"), a),
                                           (("nodes", "many", "image", 0), b)]
    store = LocalStore(tmp_path / "store")
    g2, values = store_files(g, params, store, cat)
    first = values["faces"][0]
    assert first.name == "a.png" and first.media_type == "image/png" and values["faces"][1] == FACE
    assert g2.node("read").inputs == {"image": first, "hint": a} and g2.node("many").inputs["image"][1] == ""
    assert g.node("read").inputs["image"] == a and params["faces"][0] == a, "the originals stay"
    validate_graph(same(g2), cat)
    assert file_values(same(g2), values, cat) == [] and store.exists(first.sha256)
    with pytest.raises(InputError, match=r"faces.0: there is no file 'gone.png'"):
        store_files(g, {"faces": ["gone.png"]}, store, cat)


# ---- the picture

def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    return [tuple(float(r.get(k)) for k in ("x", "y", "width",
                                            "height")) for r in ET.fromstring(svg).findall(".//{*}g/{*}rect")]


@st.composite
def graphs(draw_: st.DrawFn) -> Graph:
    n, nodes = draw_(st.integers(1, 12)), []
    for i in range(n):
        before = draw_(st.lists(st.sampled_from([f"n{j}" for j in range(i)]), max_size=3, unique=True)) if i else []
        inputs = {f"i{o}": PortRef(node=o,
                                   port=draw_(st.sampled_from(["out", "a_long_port_name", "<&>"]))) for o in before}
        if draw_(st.booleans()): inputs["p"] = ParamRef(name="p")
        nodes.append(Node(id=f"n{i}", step="toy.n", inputs=inputs))
    return Graph(name="g", nodes=draw_(st.permutations(nodes)), params=(Port(name="p", help="<b>"),),
                 outputs={"o": PortRef(node="n0", port="out")})


@settings(max_examples=80, deadline=None)
@given(graphs())
def test_boxes_never_overlap_and_the_svg_is_well_formed(g: Graph) -> None:
    svg = draw(g, {n.id: "running" for n in g.nodes[:1]})
    found = boxes(svg)
    assert len(found) == len(g.nodes) + 1 + any(isinstance(v, ParamRef) for n in g.nodes for v in n.inputs.values())
    for i, (x, y, w, h) in enumerate(found):
        for x2, y2, w2, h2 in found[i + 1:]: assert x + w < x2 or x2 + w2 < x or y + h < y2 or y2 + h2 < y
    _, _, width, height = map(float, ET.fromstring(svg).get("viewBox").split())
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in found)


def test_picture_shows_states_and_runs_left_to_right(p: Pipeline) -> None:
    s = p.map("gt.say", {"text": p.param("texts", list[str])})
    p.output(film=p.map("gt.film", {"audio": s.audio}, portrait="x.png", when=p.param("on", bool, True)).video)
    svg = p.draw({"say[0]": "succeeded", "say[1]": "running", "film": "skipped"}, {"say[0]": 2.0})
    assert "running · 1/2 · 2.0 s" in svg and "if on" in svg and "gt.film × audio" in svg and ">audio<" in svg
    assert "<script" not in svg and "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert edges_of(p.to_graph())["say", "film"] == ["audio"]
    assert p._repr_mimebundle_()["text/html"].startswith("<svg")
    empty = Pipeline("empty", catalogue=p.catalogue)
    assert empty._repr_html_().startswith("<svg") and "no steps yet" in repr(empty)


def test_unknown_step_of_the_catalogue_itself_is_not_found(cat: Catalogue) -> None:
    with pytest.raises(NotFound, match="Did you mean gt.join"): cat.step("gt.joi")
