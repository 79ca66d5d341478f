"""Random and mutated documents, messages, parameters and keys: success, or a `SpinError` with message and fix, nothing else."""
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myspinbot.bridge.streams import entry_of
from myspinbot.graph.catalogue import Catalogue
from myspinbot.graph.params import check_key, params_from_text, resolve_params
from myspinbot.graph.check import read_graph, validate_graph
from myspinbot.core import SpinError, canonical_json
from myspinbot.bridge.keys import BODY, split_stream, work_stream
from myspinbot.graph.plan import Plan, Result, input_hash
from myspinbot.schema import PRIORITIES, Artifact, Graph, Port, StepMessage, StepSpec, check_json, dump_value, parse_value, revive
from myspinbot.graph.spec import NotebookError, fits, parse_parameters

FIXED = settings(derandomize=True, deadline=None, max_examples=300, database=None)  # the same cases in every run
CAT = Catalogue(Path(__file__).parents[1] / "pipelines")

texts = st.text(max_size=12) | st.sampled_from(
    ["", "a", "..", "../../x", "a\0b", "\ud800", "__import__('os')", "{{x}}", "toy.mark", "é", "e\u0301"])
scalars = (st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | texts | st.sampled_from([10**4000, 2**64 - 1]))
json_like = st.recursive(scalars, lambda o: st.lists(o, max_size=4) | st.dictionaries(texts, o, max_size=4) | st.builds(
    lambda k, v: dict(kind=k, **v), st.sampled_from(["param", "port", "artifact"]),
    st.dictionaries(st.sampled_from(["name", "node", "port", "sha256", "size"]), o, max_size=3)), max_leaves=12)
deep = st.integers(90, 900).map(lambda n: json.loads("[" * n + "]" * n))
odd = json_like | st.binary(max_size=4) | st.sampled_from([{1}, object(), 1j, TypeError, {5: 6}, {None: 1}]) | deep
sound = st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
                     | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
                     lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text("abc", max_size=2), o, max_size=3), max_leaves=8)


def only_spin_errors(call: Callable[[], Any]) -> Any:
    "The result, or None after a `SpinError` that a user can act on."
    try: return call()
    except SpinError as e:
        assert e.message and e.hint and len(str(e)) < 1500, repr(e)[:500]
        json.dumps(e.to_dict())
        return None


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    "A sound graph of the toy steps: each node may use parameters and nodes before it."
    params = [dict(name="t", type="str", default="x"), dict(name="l", type="list[str]", default=["a", "b"]),
              dict(name="f", type="float", default=1)]
    nodes: list[dict[str, Any]] = []
    for i in range(draw(st.integers(1, 5))):
        before = [n["id"] for n in nodes if "each" not in n]
        names = ["x", dict(kind="param", name="t"), *(dict(kind="port", node=b, port="value") for b in before)]
        seconds = [0, 0.5, dict(kind="param", name="f")]
        inputs = dict(name=draw(st.sampled_from(names)), seconds=draw(st.sampled_from(seconds)))
        n: dict[str, Any] = dict(id=f"n{i}", step="toy.mark", inputs=inputs)
        if nodes and draw(st.booleans()): n["after"] = draw(st.lists(st.sampled_from([m["id"] for m in nodes]), max_size=2))
        if before and draw(st.booleans()):
            n["when"] = dict(ref=dict(kind="port", node=before[0], port="value"), op="eq", value="x")
        if draw(st.integers(0, 3)) == 0: n |= dict(each=["value"], inputs=n["inputs"] | dict(value=dict(kind="param", name="l")))
        n |= dict(on_failure=draw(st.sampled_from(["fail", "skip"])))
        nodes.append(n)
    return dict(name="g", params=params, nodes=nodes, outputs=dict(v=dict(kind="port", node="n0", port="value")))


def places(value: Any, at: tuple = ()) -> list[tuple]:
    "Every place in a document."
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for k, v in inner for p in places(v, (*at, k)))]


def value_at(doc: Any, path: Any) -> Any:
    for k in path: doc = doc[k]
    return doc


@st.composite
def mutated(draw: st.DrawFn, of: st.SearchStrategy) -> Any:
    "A document with one to three places replaced, removed, doubled, renamed or filled from another place."
    doc = copy.deepcopy(draw(of))
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        *path, last = draw(st.sampled_from([p for p in places(doc) if p] or [(None,)]))
        if last is None: return draw(odd)
        at = value_at(doc, path)
        how = draw(st.sampled_from(["replace", "remove", "double", "rename", "borrow", "borrow"]))
        if how == "replace": at[last] = draw(odd)
        elif how == "borrow": at[last] = copy.deepcopy(value_at(doc, draw(st.sampled_from(places(doc)))))
        elif how == "remove": del at[last]
        elif how == "double" and isinstance(at, list): at.append(copy.deepcopy(at[last]))
        elif isinstance(at, dict): at[draw(texts)] = at.pop(last)
    return doc


@FIXED
@given(documents())
def test_sound_document_is_accepted_and_comes_back_equal(doc: dict[str, Any]) -> None:
    g = read_graph(doc)
    validate_graph(g, CAT)
    again = read_graph(json.loads(json.dumps(g.to_json())))
    assert again == g and canonical_json(again.to_json()) == canonical_json(g.to_json())
    assert Graph.model_validate_json(g.model_dump_json()) == g


def accept(doc: Any) -> Graph:
    g = read_graph(doc)
    validate_graph(g, CAT)
    return g


@FIXED
@given(mutated(documents()) | odd)
def test_mutated_document_is_accepted_or_refused_and_an_accepted_one_runs_to_an_end(doc: Any) -> None:
    if (g := only_spin_errors(lambda: accept(doc))) is None: return
    assert read_graph(json.loads(json.dumps(g.to_json()))) == g
    if (values := only_spin_errors(lambda: resolve_params(g, {}))) is None: return
    plan = Plan(g, values)
    if (todo := only_spin_errors(plan.start)) is None: return
    for _ in range(200):
        if not todo: break
        t = todo.pop()
        more = only_spin_errors(lambda: plan.apply(t.key, Result("skipped" if t.skip else "succeeded", dict(value="x"))))  # noqa: B023
        if more is None: return
        todo += more
    assert plan.is_done()


def test_mutations_reach_both_ends() -> None:
    "The property above would be empty if every mutant were refused, or none."
    seen = {True: 0, False: 0}

    @FIXED
    @given(mutated(documents()))
    def count(doc: Any) -> None: seen[only_spin_errors(lambda: accept(doc)) is not None] += 1
    count()
    assert min(seen.values()) >= 20, seen


TYPES = dict(t="str", n="int", f="float", b="bool", l="list", w="list[str]", r="list[float]", d="dict", a="any", i="Image")
G = Graph(name="g", params=tuple(Port(name=n, type=t) for n, t in TYPES.items()))


@FIXED
@given(st.dictionaries(st.sampled_from([p.name for p in G.params]) | texts | st.integers() | st.none(), odd, max_size=4) | odd)
def test_parameters_are_resolved_or_refused(given_: Any) -> None:
    if (values := only_spin_errors(lambda: resolve_params(G, given_))) is None: return
    assert set(values) == {p.name for p in G.params}
    for p in G.params: assert fits(values[p.name], p.type) or p.name not in given_
    plain = dump_value(values)
    check_json(plain, "values")
    assert json.loads(canonical_json(plain).encode()) == plain
    assert resolve_params(G, {k: v for k, v in plain.items() if v is not None}) == values


@FIXED
@given(st.dictionaries(st.sampled_from([p.name for p in G.params]), sound, max_size=4))
def test_parameters_written_as_text_are_the_same_parameters(values: dict[str, Any]) -> None:
    right = {k: v for k, v in values.items() if fits(v, next(p.type for p in G.params if p.name == k)) and k != "a"}
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in right.items()}
    assert resolve_params(G, params_from_text(G, text)) == resolve_params(G, right)


@FIXED
@given(st.dictionaries(st.sampled_from([p.name for p in G.params]) | texts, st.text(max_size=20) | st.sampled_from(
    ["[" * 5000, "NaN", "1e999", "9" * 5000, "[1, NaN]", "true", "{}", "\0"]), max_size=4))
def test_any_text_is_read_or_refused(text: dict[str, str]) -> None:
    only_spin_errors(lambda: resolve_params(G, params_from_text(G, text)))


storable = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=200)


@FIXED
@given(storable, storable)
def test_message_comes_back_equal(job: str, key: str) -> None:
    m = StepMessage(job=job, key=key)
    e = entry_of("spin:q:cpu:normal", "1-0", {BODY: m.model_dump_json().encode()}, "w")
    assert (e.message, e.error) == (m, "")


def encoded(doc: Any) -> bytes:
    try: return json.dumps(doc, default=repr, skipkeys=True).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError): return b"9" * 9999


bodies = st.binary(max_size=40) | mutated(st.just(dict(schema_version=1, job="job_1", key="a[0]"))).map(encoded)


@FIXED
@given(st.dictionaries(st.just(BODY) | st.binary(max_size=3), bodies, max_size=3))
def test_any_entry_is_a_message_or_has_a_reason(raw: dict[bytes, bytes]) -> None:
    e = entry_of("spin:q:cpu:normal", "1-0", raw, "w")
    assert (e.message is None) == bool(e.error) and len(e.error) < 500
    if e.message is None: return
    assert e.message.schema_version <= 1 and StepMessage.model_validate_json(e.message.model_dump_json()) == e.message


@FIXED
@given(texts | st.text("abc_9", max_size=5), st.sampled_from([*PRIORITIES, "", "urgent"]))
def test_stream_name_says_queue_and_priority_or_is_refused(queue: str, priority: str) -> None:
    name = only_spin_errors(lambda: work_stream(queue, priority))
    if name is not None: assert split_stream(name) == (queue, priority)
    only_spin_errors(lambda: split_stream(queue))


@FIXED
@given(odd | st.text(max_size=300))
def test_accepted_key_is_a_short_text_that_utf8_and_postgres_hold(key: Any) -> None:
    def check() -> bool:
        check_key(key, "key")
        return True
    good = isinstance(key, str) and 1 <= len(key) <= 200 and "\0" not in key and not any("\ud800" <= c <= "\udfff" for c in key)
    assert bool(only_spin_errors(check)) == (good or key is None)


SPEC = StepSpec(id="toy.x", inputs=(Port(name="f", type="float", default=1.0), Port(name="fs", type="list[float]", default=[]),
                                    Port(name="v", type="any"), Port(name="w", type="any")), source_hash="s")
FILE = Artifact(sha256="a" * 64, size=3, media_type="image/png", name="me.png")


def shuffled(v: Any) -> Any:
    "The same value, with the keys of its objects in another order and tuples for lists."
    if isinstance(v, dict): return {k: shuffled(v[k]) for k in sorted(v, reverse=True)}
    return tuple(shuffled(o) for o in v) if isinstance(v, list) else v


@FIXED
@given(sound, sound, st.integers(-2**53, 2**53))
def test_equal_meaning_has_an_equal_cache_key_and_another_value_another(a: Any, b: Any, n: int) -> None:
    key = input_hash(SPEC, dict(v=a, w=b, f=n, fs=[n]))
    assert key == input_hash(SPEC, dict(fs=[float(n)], f=float(n), w=shuffled(b), v=shuffled(a)))
    assert key == input_hash(SPEC, json.loads(json.dumps(dict(v=a, w=b, f=n, fs=[n]))))
    assert (key == input_hash(SPEC, dict(v=b, w=a, f=n, fs=[n]))) == (canonical_json(a) == canonical_json(b))
    assert key != input_hash(SPEC, dict(v=[a], w=b, f=n, fs=[n])) != input_hash(SPEC, dict(v=a, w=b, f=n, fs=[n, n]))
    assert input_hash(SPEC, dict(v=a)) == input_hash(SPEC, dict(v=a, f=1, fs=[], w=None))
    for change in (dict(version="2"), dict(source_hash="t"), dict(id="toy.y"), dict(outputs=dict(o="str"))):
        assert input_hash(SPEC.model_copy(update=change), dict(v=a, w=b, f=n, fs=[n])) != key


@FIXED
@given(st.text(min_size=1, max_size=9), st.integers(0, 9))
def test_cache_key_sees_the_content_of_a_file_and_not_its_name(name: str, place: int) -> None:
    def hide(a: Any) -> Any: return [place, dict(deep=[a])]
    key = input_hash(SPEC, dict(v=hide(FILE)))
    assert key == input_hash(SPEC, dict(v=hide(FILE.model_copy(update=dict(name=name)))))
    assert key == input_hash(SPEC, dict(v=hide(FILE.to_json())))
    assert key != input_hash(SPEC, dict(v=hide(FILE.model_copy(update=dict(sha256="b" * 64)))))
    assert key != input_hash(SPEC, dict(v=hide(FILE.model_copy(update=dict(media_type="image/jpeg")))))


@FIXED
@given(sound)
def test_values_come_back_from_json_equal(v: Any) -> None:
    check_json(v, "v")
    assert revive(json.loads(json.dumps(dump_value(v)))) == v
    assert dump_value(parse_value(v)) == v


pieces = ["x", ": int", ": Image", "=", "1", "'a'", "[", "]", "(", ")", "\n", "#", " ", "lambda:", "import os", "\0", "\ud800",
          "1e999", "b'x'", "{1}", ",", "**", "f'{x}'"]


@FIXED
@given(st.text(max_size=60) | st.lists(st.sampled_from(pieces), max_size=12).map("".join))
def test_any_parameters_cell_is_read_or_refused(src: str) -> None:
    try: ports = parse_parameters(src, "x.ipynb, cell 1")
    except NotebookError as e: assert e.message.startswith("x.ipynb, cell 1") and e.hint
    else:
        for p in ports: assert Port.model_validate_json(p.model_dump_json()) == p


NOTEBOOK = json.loads((CAT.dir / "steps" / "toy_mark.ipynb").read_text())


def test_mutated_notebook_never_takes_the_catalogue_down(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.mkdir()
    (steps / "a_good.ipynb").write_text(json.dumps(NOTEBOOK | dict(metadata=dict(myspinbot=dict(id="a.good")))))
    seen = {True: 0, False: 0}

    @settings(FIXED, max_examples=200)
    @given(mutated(st.just(NOTEBOOK)))
    def check(nb: Any) -> None:
        (steps / "b_bad.ipynb").write_bytes(encoded(nb))
        cat = Catalogue(tmp_path)
        assert "a.good" in cat.steps()
        bad = [e for w, e in cat.errors().items() if w.endswith("b_bad.ipynb")]
        assert all(isinstance(e, SpinError) and "b_bad.ipynb" in e.message and e.hint for e in bad), bad
        seen[not bad] += 1
    check()
    assert min(seen.values()) >= 20, seen


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**30, "\ud800", "a\0", b"x", {1: 2}, {1, 2}])
def test_what_json_cannot_hold_has_no_cache_key_and_is_no_parameter(value: Any) -> None:
    with pytest.raises(SpinError): resolve_params(G, dict(a=[value]))
