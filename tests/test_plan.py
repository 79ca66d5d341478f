"""What can start next, in every order in which results can come."""
import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myspinbot.core import GraphError, InputError, NotFound
from myspinbot.graph.plan import (
    Plan,
    Result,
    Task,
    downstream,
    input_hash,
    is_done,
    job_error,
    node_of,
    outputs,
    ready,
    to_langgraph,
)
from myspinbot.schema import Artifact, Condition, Graph, Node, ParamRef, Port, PortRef, StepSpec


def par(name: str) -> ParamRef: return ParamRef(name=name)
def port(node: str, name: str = "out") -> PortRef: return PortRef(node=node, port=name)
def ok(out: Any = 1, **more: Any) -> Result: return Result("succeeded", {"out": out, **more})
def fail(message: str = "broken") -> Result:
    return Result("failed", error=dict(type="GateFailed", message=message, hint="mend it", fields={"score": 0.2}))


def node(id: str, *needs: str, **fields: Any) -> Node:
    return Node(id=id, step=f"toy.{id}", **{"inputs": {f"from_{o}": port(o) for o in needs}, **fields})


def graph(*nodes: Node, params: tuple[Port, ...] = (), **out: Any) -> Graph:
    return Graph(name="g", nodes=nodes, params=params, outputs=out)


def keys(tasks: list[Task]) -> list[str]: return [f"-{t.key}" if t.skip else t.key for t in tasks]
def reasons(tasks: list[Task]) -> dict[str, str]: return {t.key: t.reason for t in tasks if t.skip}


SKIP = Result("skipped")


def test_independent_branches_start_at_once() -> None:
    g = graph(node("a"), node("b"), node("c", "a", "b"))
    assert keys(ready(g, {}, {})) == ["a", "b"]


def test_slow_branch_does_not_hold_back_the_one_beside_it() -> None:
    g = graph(node("slow"), node("fast"), node("after_fast", "fast"), node("join", "slow", "after_fast"))
    plan = Plan(g, {})
    plan.start()
    assert keys(plan.apply("fast", ok())) == ["after_fast"]
    assert keys(plan.apply("after_fast", ok())) == []
    assert keys(plan.apply("slow", ok())) == ["join"]
    assert not plan.is_done()
    assert plan.apply("join", ok()) == [] and plan.is_done()


def test_a_result_counts_once_and_strangers_do_not_count() -> None:
    g = graph(node("a"), node("b", "a"))
    plan = Plan(g, {})
    plan.start()
    assert plan.apply("nobody", ok()) == [] and plan.apply("b", ok()) == [] and plan.apply("a[0]", ok()) == []
    assert keys(plan.apply("a", ok())) == ["b"]
    assert plan.apply("a", ok()) == []
    assert keys(ready(g, {}, {"b": ok()})) == ["a"]


def test_inputs_are_resolved_through_lists_and_dicts() -> None:
    art = Artifact(sha256="ab" * 32, size=1, media_type="image/png", name="x.png")
    g = graph(node("a"),
              node("b", inputs={"x": [par("p"), {"k": port("a")}], "y": {"kind": "odd"}, "z": port("a", "json")}))
    given_params = {"p": art.to_json()}
    task = ready(g, given_params, {"a": ok(art.to_json(), json={"kind": "port", "not": "ours"})})[0]
    assert task.inputs == {"x": [art, {"k": art}], "y": {"kind": "odd"}, "z": {"kind": "port", "not": "ours"}}
    assert Plan(Graph.model_validate(g.to_json()), given_params).start()[0].key == "a"


def test_map_over_a_parameter_and_over_an_upstream_list() -> None:
    g = graph(node("split"),
              node("say", inputs={"text": port("split"), "n": par("ns"), "v": par("v")}, each=("text", "n")),
              node("join", inputs={"parts": port("say"), "all": [port("say", "x")]}), film=port("say"))
    params = {"ns": [1, 2], "v": "voice"}
    tasks = ready(g, params, {"split": ok(["a", "b"])})
    assert [(t.key, t.index, t.inputs) for t in tasks] == [
        ("say[0]", 0, {"text": "a", "n": 1, "v": "voice"}), ("say[1]", 1, {"text": "b", "n": 2, "v": "voice"})]
    results = {"split": ok(["a", "b"]), "say[1]": ok("B", x=2)}
    assert keys(ready(g, params, results)) == ["say[0]"]
    results["say[0]"] = ok("A", x=1)
    assert ready(g, params, results)[0].inputs == {"parts": ["A", "B"], "all": [[1, 2]]}
    assert outputs(g, results, params) == {"film": ["A", "B"]}


def test_maps_in_a_chain_over_an_empty_list_end_at_once_with_empty_lists() -> None:
    g = graph(node("say", inputs={"text": par("texts")}, each=("text",)),
              node("film", inputs={"a": port("say")}, each=("a",)),
              node("join", inputs={"parts": port("film")}), clips=port("film"))
    plan = Plan(g, {"texts": []})
    tasks = plan.start()
    assert keys(tasks) == ["join"] and tasks[0].inputs == {"parts": []}
    plan.apply("join", ok())
    assert plan.is_done() and outputs(g, {"join": ok()}, {"texts": []}) == {"clips": []}
    only = graph(node("say", inputs={"text": []}, each=("text",)))
    assert ready(only, {}, {}) == [] and is_done(only, {})


def test_a_thousand_empty_maps_in_a_chain() -> None:
    chain = [node("n0", inputs={"a": []}, each=("a",))]
    chain += [node(f"n{i}", inputs={"a": port(f"n{i - 1}")}, each=("a",)) for i in range(1, 1000)]
    assert is_done(graph(*chain), {})


def test_failing_map_item_fails_the_job_but_lets_the_other_items_end() -> None:
    g = graph(node("say", inputs={"t": [1, 2, 3]}, each=("t",)), node("join", "say"), node("beside"))
    results = {"say[1]": fail(), "say[0]": ok()}
    assert sorted(keys(ready(g, {}, results))) == ["beside", "say[2]"]
    results |= {"say[2]": ok()}
    tasks = ready(g, {}, results)
    assert reasons(tasks) == {"join": "say failed"}
    assert job_error(g, results)["fields"]["failed"] == ["say[1]"]


def test_map_that_may_fail_leaves_the_failed_items_out() -> None:
    g = graph(node("say", inputs={"t": [1, 2, 3]}, each=("t",), on_failure="skip"), node("join", "say"),
              all=port("say"))
    results = {"say[0]": ok("a"), "say[1]": fail(), "say[2]": ok("c")}
    assert ready(g, {}, results)[0].inputs == {"from_say": ["a", "c"]}
    assert job_error(g, results) is None and outputs(g, results) == {"all": ["a", "c"]}


@pytest.mark.parametrize(("op", "value", "given", "runs"), [
    ("truthy", None, 1, True), ("truthy", None, [], False), ("falsy", None, "", True), ("eq", "a", "a", True), ("ne",
                                                                                                                "a",
                                                                                                                "a",
                                                                                                                False),
    ("lt", 3, 2, True), ("le", 3, 3, True), ("gt", 3, 3, False), ("ge", 3, 3.5, True), ("eq", [1], [1], True),
])
def test_conditions(op: str, value: Any, given: Any, runs: bool) -> None:
    c = Condition(ref=port("a"), op=op, value=value)
    assert keys(ready(graph(node("a"), node("b", when=c)), {}, {"a": ok(given)})) == (["b"] if runs else ["-b"])
    c = Condition(ref=par("p"), op=op, value=value)
    assert keys(ready(graph(node("b", when=c)), {"p": given}, {})) == (["b"] if runs else ["-b"])


def test_skipping_spreads_along_data_but_not_along_order() -> None:
    g = graph(node("b", when=Condition(ref=par("on"))), node("user", "b"), node("its_user", "user"),
              node("later", after=("b",)),
              node("asks", when=Condition(ref=port("b"), op="falsy")), node("both", "b",
                                                                            after=("b",)), video=port("user"),
                                                                            x=par("on"))
    plan = Plan(g, {"on": False})
    tasks = plan.start()
    assert reasons(tasks) == {"b": "not parameter on"}
    tasks = plan.apply("b", SKIP)
    assert sorted(keys(tasks)) == ["-asks", "-both", "-user", "later"] and reasons(tasks)["user"] == "b was skipped"
    assert keys(plan.apply("user", SKIP)) == ["-its_user"]
    results = {k: SKIP for k in ("b", "user", "its_user", "asks", "both")} | {"later": ok()}
    assert is_done(g, results, {"on": False}) and job_error(g, results) is None
    assert outputs(g, results, {"on": False}) == {"x": False}


def test_skipped_map_is_one_task() -> None:
    g = graph(node("say", inputs={"t": [1, 2]}, each=("t",), when=Condition(ref=par("on"))), node("join", "say"))
    assert keys(ready(g, {"on": 0}, {})) == ["-say"]
    assert keys(ready(g, {"on": 0}, {"say": SKIP})) == ["-join"]
    assert is_done(g, {"say": SKIP, "join": SKIP}, {"on": 0})


def test_failure_stops_only_what_depends_on_it_even_by_order() -> None:
    g = graph(node("bad"), node("good"), node("user", "bad"), node("its_user", "user"), node("later", after=("user",)),
              node("free", "good"))
    plan = Plan(g, {})
    plan.start()
    assert reasons(plan.apply("bad", fail())) == {"user": "bad failed"}
    assert sorted(reasons(plan.apply("user", SKIP)).items()) == [("its_user", "user was stopped by a failure"),
                                                                 ("later", "user was stopped by a failure")]
    assert keys(plan.apply("good", ok())) == ["free"]


def test_step_that_may_fail_counts_as_skipped() -> None:
    g = graph(node("maybe", on_failure="skip"), node("user", "maybe"), node("later", after=("maybe",)),
              out=port("maybe"))
    results = {"maybe": fail()}
    tasks = ready(g, {}, results)
    assert sorted(keys(tasks)) == ["-user", "later"]
    results |= {"user": SKIP, "later": ok()}
    assert job_error(g, results) is None and is_done(g, results) and outputs(g, results) == {}


def test_job_error_is_the_first_failure_in_the_graphs_order() -> None:
    g = graph(node("a"), node("b"), node("c", on_failure="skip"))
    assert job_error(g, {"a": ok(), "c": fail()}) is None
    e = job_error(g, {"c": fail(), "b": fail("second"), "a": fail("first")})
    assert e == dict(type="GateFailed", message="a: first", hint="mend it",
                     fields=dict(score=0.2, step="a", failed=["a", "b"]))
    assert job_error(g, {"a": Result("failed")})["type"] == "StepFailed"
    assert "cancelled" in job_error(g, {"a": Result("cancelled")})["message"]


def test_what_only_shows_while_it_runs_is_a_clear_error() -> None:
    uneven = graph(node("m", inputs={"a": par("a"), "b": [1, 2]}, each=("a", "b")))
    with pytest.raises(InputError, match="different lengths: a has 1, b has 2"): ready(uneven, {"a": [1]}, {})
    with pytest.raises(InputError, match="no list but 'abc'"): ready(uneven, {"a": "abc"}, {})
    with pytest.raises(InputError, match="'p' has no value"): ready(graph(node("a", inputs={"x": par("p")})), {}, {})
    with pytest.raises(InputError, match="without its output 'out'"):
        ready(graph(node("a"), node("b", "a")), {}, {"a": Result("succeeded")})
    c = Condition(ref=par("p"), op="lt", value=3)
    with pytest.raises(InputError, match="Cannot decide parameter p < 3"):
        ready(graph(node("a", when=c)), {"p": "x"}, {})


def test_graph_that_could_never_end_is_refused() -> None:
    with pytest.raises(GraphError, match="a -> b -> a"): ready(graph(node("a", "b"), node("b", "a")), {}, {})
    with pytest.raises(GraphError, match="needs the step 'gone'"): ready(graph(node("a", "gone")), {}, {})
    with pytest.raises(GraphError, match="a -> a"): ready(graph(node("a", "a")), {}, {})


def test_downstream() -> None:
    g = graph(node("d", "c"), node("a"), node("b", "a"), node("c", after=("b",)),
              node("e", when=Condition(ref=port("c"))), node("f"))
    assert downstream(g, "b") == {"c", "d", "e"} and downstream(g, "f") == set()
    with pytest.raises(NotFound, match="Its steps"): downstream(g, "x")


# ---- every order

FATES = ("succeeded", "succeeded", "succeeded", "cached", "failed")


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Graph, dict[str, Any], random.Random]:
    "A random graph with maps, conditions, order edges and steps that may fail."
    n, nodes = draw(st.integers(1, 9)), []
    for i in range(n):
        before = [f"n{j}" for j in range(i)]
        pick = lambda most: draw(st.lists(st.sampled_from(before), max_size=most, unique=True)) if before else []  # noqa: B023
        inputs: dict[str, Any] = {f"from_{o}": port(o) for o in pick(2)}
        each: tuple[str, ...] = ()
        if draw(st.integers(0, 3)) == 0:
            inputs["item"], each = par("items"), ("item",)
        when = None
        if before and draw(st.integers(0, 3)) == 0:
            when = Condition(ref=port(draw(st.sampled_from(before))), op=draw(st.sampled_from(["truthy", "falsy"])))
        nodes.append(Node(id=f"n{i}", step="toy.n", inputs=inputs, each=each, after=tuple(pick(1)), when=when,
                          on_failure=draw(st.sampled_from(["fail", "fail", "skip"]))))
    shuffled = draw(st.permutations(nodes))
    items = list(range(draw(st.integers(0, 3))))
    return graph(*shuffled,
                 params=(Port(name="items", type="list"),)), {"items": items}, random.Random(draw(st.integers(0, 99)))


def run(g: Graph, params: dict[str, Any], fate: dict[str, str], rng: random.Random) -> tuple[dict[str, Result],
                                                                                             dict[str, Task]]:
    "Run to the end in a random order, with the two ways of planning beside each other."
    plan, results, seen = Plan(g, params), {}, {}
    todo = plan.start()
    while todo:
        for t in todo:
            assert seen.setdefault(t.key, t) is t, "handed out twice"
        assert sorted(t.key for t in todo) == sorted(t.key for t in ready(g, params, results))
        assert not plan.is_done() and not is_done(g, results, params)
        t = todo.pop(rng.randrange(len(todo)))
        status = "skipped" if t.skip else fate[node_of(t.key)] if t.index in (None, 0) else "succeeded"
        results[t.key] = Result(status, {} if status in ("skipped", "failed") else {"out": t.key})
        todo += plan.apply(t.key, results[t.key])
    assert plan.is_done() and is_done(g, results, params)
    return results, seen


@settings(max_examples=150, deadline=None)
@given(worlds(), st.data())
def test_every_order_of_results_gives_the_same_job(world: tuple[Graph, dict[str, Any], random.Random],
                                                   data: st.DataObject) -> None:
    g, params, rng = world
    fate = {n.id: data.draw(st.sampled_from(FATES)) for n in g.nodes}
    first, tasks = run(g, params, fate, rng)
    second, _ = run(g, params, fate, random.Random(7))
    assert first == second and job_error(g, first) == job_error(g, second)
    expected = {n.id for n in g.nodes if not (n.each and not params["items"])}
    assert {node_of(k) for k in tasks} >= expected - {n.id for n in g.nodes if n.each}
    failed = {node_of(k) for k, r in first.items() if r.status == "failed"}
    stops = {n.id for n in g.nodes if n.id in failed and n.on_failure == "fail"}
    assert (job_error(g, first) is not None) == bool(stops)
    for id in stops:
        for user in downstream(g, id): assert first[user].status == "skipped", f"{user} ran after {id} had failed"


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"),
                       st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2), max_size=5),
       st.randoms())
def test_input_hash_knows_no_order(values: dict[str, Any], rng: random.Random) -> None:
    spec = StepSpec(id="toy.x", inputs=(Port(name="a", default=1),))
    mixed = list(values.items())
    rng.shuffle(mixed)
    assert input_hash(spec, values) == input_hash(spec, dict(mixed))
    assert input_hash(spec, {**values, "new": 1}) != input_hash(spec, values)


def test_input_hash_sees_content_and_nothing_else() -> None:
    spec = StepSpec(id="toy.x", inputs=(Port(name="image", type="Image"), Port(name="size", type="int", default=512),
                                        Port(name="speed", type="float", default=1.0)), source_hash="s")
    a = Artifact(sha256="ab" * 32, size=1, media_type="image/png", name="a.png")
    base = input_hash(spec, {"image": a})
    renamed = a.model_copy(update=dict(name="b.png", size=2))
    assert base == input_hash(spec, {"speed": 1, "size": 512, "image": renamed}) == input_hash(spec,
                                                                                               {"image": a.to_json()})
    nested = input_hash(spec, {"image": [{"k": a}]})
    assert nested == input_hash(spec, {"image": [{"k": renamed}]}) != base
    other = [dict(sha256="cd" * 32), dict(media_type="image/jpeg")]
    assert len({base, *(input_hash(spec, {"image": a.model_copy(update=o)}) for o in other)}) == 3
    changed = [dict(version="2"), dict(source_hash="t"), dict(id="toy.y"), dict(outputs={"v": "video/mp4"})]
    assert len({base, *(input_hash(spec.model_copy(update=o), {"image": a}) for o in changed)}) == 5
    assert base == input_hash(spec.model_copy(update=dict(timeout_s=1.0, title="t", queue="gpu")), {"image": a})


def test_langgraph_application_runs_maps_and_skips() -> None:
    g = graph(node("params", inputs={"t": par("texts")}, each=("t",)), node("join", "params"),
              node("off", when=Condition(ref=par("on"))),
              node("end", "join", after=("off",)))
    ran = []
    async def execute(t: Task) -> Result:
        ran.append(t.key)
        return ok(t.inputs)
    params = {"texts": ["a", "b"], "on": False}
    state = asyncio.run(to_langgraph(g, execute).ainvoke({"params": params}))
    assert sorted(ran) == ["end", "join", "params[0]", "params[1]"] and state["results"]["off"].status == "skipped"
    assert is_done(g, state["results"], params)


def test_ten_thousand_items_cost_one_visit_each() -> None:
    g = graph(node("say", inputs={"t": par("ts")}, each=("t",)), node("join", "say"))
    plan = Plan(g, {"ts": list(range(10_000))})
    tasks = plan.start()
    assert [keys(plan.apply(t.key, ok())) for t in tasks][-1] == ["join"]
