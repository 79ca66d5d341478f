"""Bad parameters through every door: client, `Pipeline.run`, command line, HTTP, papermill, batch. Nothing is half accepted."""
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from farm import Farm, http_of
from PIL import Image

from myspinbot.graph.catalogue import Catalogue
from myspinbot.cli.jobs import read_table
from myspinbot.core import InputError, NotFound, SpinError, error_from_dict
from myspinbot.jobs.local import LocalRunner
from myspinbot.schema import Graph, Node, ParamRef, Port

TOYS = Path(__file__).parents[1] / "pipelines"
PORTS = dict(text="str", n="int", x="float", on="bool", items="list", words="list[str]", table="dict", free="any",
             picture="Image", pictures="list[Image]")
G = Graph(name="g", params=tuple(Port(name=k, type=t, default={"list": [], "dict": {}}.get(t[:4])) for k, t in PORTS.items()),
          nodes=(Node(id="a", step="toy.mark", inputs=dict(value=ParamRef(name="text"))),))


def nested(levels: int, wrap: Callable[[Any], Any] = lambda v: [v]) -> Any:
    v: Any = 1
    for _ in range(levels): v = wrap(v)
    return v


JSON = {"Content-Type": "application/json"}
LOOP: list[Any] = []
LOOP.append(LOOP)
BAD: dict[str, tuple[Any, tuple[str, ...]]] = {  # given -> words of message and hint
    "unknown": (dict(text="x", txet=1), ("'txet'", "Did you mean text?")),
    "empty name": ({"": 1}, ("''", "Valid parameters")),
    "name of a megabyte": ({"k" * 2**20: 1}, ("no parameter 'kkk", "Valid parameters")),
    "name with NUL": ({"\0": 1}, ("'\\x00'",)),
    "name is code": ({"__import__('os')": 1}, ("__import__", "Valid parameters")),
    "name is a number": ({5: 1}, ("no parameter 5",)),
    "name is None": ({None: 1}, ("no parameter None",)),
    "text is a number": (dict(text=5), ("text", "5 (int)", "Give a text")),
    "text is null": (dict(text=None, n=None), ("text", "null")),
    "text is bytes": (dict(text=b"x"), ("text", "b'x'")),
    "text holds NUL": (dict(text="a\0b"), ("text", "NUL at position 1", "Remove")),
    "half a surrogate pair": (dict(text="ab\ud800"), ("text", "position 2")),
    "text of 9 MB": (dict(text="x" * 9 * 2**20), ("text", "8 MB")),
    "number is a bool": (dict(n=True), ("n takes int", "True (bool)", "whole number")),
    "number is a text": (dict(n="3"), ("n takes int", "'3' (str)")),
    "number of 16 000 bits": (dict(n=10**5000), ("n is a whole number of 16610 bits", "64 bits")),
    "float from a huge number": (dict(x=10**400), ("x is", "64 bits")),
    "NaN": (dict(x=math.nan), ("x is NaN", "finite")),
    "infinite": (dict(x=math.inf), ("x is inf", "finite")),
    "NaN inside": (dict(items=[1, dict(a=math.nan)]), ("items[1].a is NaN",)),
    "10 000 lists": (dict(items=nested(10_000)), ("items[0]", "100 levels", "Flatten")),
    "10 000 objects": (dict(table=nested(10_000, lambda v: {"a": v})), ("table.a.a", "100 levels")),
    "list in itself": (dict(free=LOOP), ("free[0]", "100 levels")),
    "key of an object is a number": (dict(table={1: 2}), ("table has the key 1",)),
    "a set": (dict(free={1}), ("free is {1} (set)", "JSON")),
    "an object of Python": (dict(free=object()), ("free is <object", "JSON")),
    "list of the wrong": (dict(words=["a", 2]), ("words takes list[str]",)),
    "list is a text": (dict(items="abc"), ("items takes list", "'abc' (str)")),
    "missing file": (dict(picture="nowhere.png"), ("picture", "no file 'nowhere.png'", "Relative paths start at")),
    "missing file in a list": (dict(pictures=["nowhere.png"]), ("pictures.0", "no file 'nowhere.png'")),
    "file is a folder": (dict(picture="/"), ("picture", "'/' is a folder")),
    "file is a device": (dict(picture="/dev/zero"), ("picture", "no plain file")),
    "path of 5000 letters": (dict(picture="x" * 5000), ("picture", "no path", "too long")),
    "home of nobody": (dict(picture="~nobody_here/x.png"), ("picture", "no path")),
    "file is a number": (dict(picture=5), ("picture takes Image", "5 (int)", "path of a file")),
    "torn artifact": (dict(picture=dict(kind="artifact", sha256="zz")), ("picture takes Image", "(dict)")),
}


@pytest.fixture
def home(farm: Callable[..., Farm]) -> Farm: return farm(TOYS)


def nothing_left(f: Farm) -> None: assert f.client.jobs() == [] and list(f.client.store.list()) == []


def well_said(e: SpinError, words: tuple[str, ...]) -> None:
    told = str(e)
    assert e.message and e.hint and all(w in told for w in words), told[:600]
    assert len(told) < 600, len(told)


@pytest.mark.parametrize("name", BAD)
def test_client_and_local_run_refuse_it_with_the_same_words(name: str, home: Farm, tmp_path: Path) -> None:
    given, words = BAD[name]
    if "text" not in given: given = dict(text="x") | given
    with pytest.raises(InputError) as e: home.client.submit(G, given)
    well_said(e.value, words)
    nothing_left(home)
    local = LocalRunner(Catalogue(TOYS), tmp_path / "local")
    with pytest.raises(InputError) as here: local.run(G, given)
    assert str(here.value) == str(e.value) and list(local.store.list()) == []
    local.close()


@pytest.mark.parametrize("given", [[1], "text", 5])
def test_parameters_that_are_no_mapping(given: Any, home: Farm) -> None:
    with pytest.raises(InputError) as e: home.client.submit(G, given)
    assert "which is no mapping of names to values" in str(e.value) and e.value.hint
    nothing_left(home)


KEYS = ["", "k" * 2**20, "k" * 201, "a\0b", "\ud800", 5, b"k"]


@pytest.mark.parametrize("key", KEYS)
def test_odd_idempotency_keys_and_parents(key: Any, home: Farm) -> None:
    for name in ("idempotency_key", "parent"):
        with pytest.raises(InputError) as e: home.client.submit("fan", **{name: key})
        assert name.replace("_", " ") in str(e.value) and "1 to 200" in e.value.hint and len(str(e.value)) < 300
    nothing_left(home)


def test_odd_but_sound_keys_are_keys(home: Farm) -> None:
    keys = ["../../x", "مرحبا 😀", "a b\n'\"\\;--", "k" * 200, "${x}{{y}}%s", "e\u0301", "\u00e9"]
    ids = {k: home.client.submit("fan", idempotency_key=k).id for k in keys}
    assert {k: home.client.submit("fan", idempotency_key=k).id for k in keys} == ids and len(set(ids.values())) == len(keys)


@pytest.mark.parametrize("id", ["", "../../x", "x" * 2**20, "a\0b", "\ud800", "مرحبا", "job_' OR '1'='1"])
def test_odd_job_ids_are_not_found(id: str, home: Farm) -> None:
    for call in (home.client.job, home.client.cancel, home.client.retry, home.client.rerun, home.client.wait,
                 lambda i: list(home.client.follow(i)), lambda i: home.client.approve(i, "a")):
        with pytest.raises((NotFound, InputError)) as e: call(id)
        assert e.value.hint and len(str(e.value)) < 400


@pytest.mark.parametrize("pipeline", ["", "fam", "../../etc/passwd", "x" * 2**20, "a\0b", 5, None, [], b"fan"])
def test_odd_pipelines(pipeline: Any, home: Farm) -> None:
    with pytest.raises((NotFound, InputError)) as e: home.client.submit(pipeline)
    assert e.value.hint and len(str(e.value)) < 400


LOOKS_LIKE_CODE = [
    "__import__('os').system('touch {0}')", "\"); open('{0}', 'w').close(); (\"", "'''+str(open('{0}','w'))+'''",
    '"""\nopen(\'{0}\', "w")\n"""', "\\", "\\\\'", "a\nb\r\nc\td", "${{HOME}} $(touch {0}) `touch {0}`",
    "{{{{ 7 * 7 }}}} {{% raw %}} %(x)s {{0}}", "!touch {0}", "%%bash\ntouch {0}", "\u2028\u2029\x85\x1b[31m\x7f", "ünï 😀 مرحبا",
    "\\N{{BULLET}} \\x41 \\u0041", "#'\"", "None", "nan",
]


def test_text_that_looks_like_code_stays_text_through_worker_and_local_run(farm: Callable[..., Farm], tmp_path: Path) -> None:
    up, trap = farm(TOYS), tmp_path / "trap"
    up.start("control")
    up.start("w1")
    texts = [t.format(trap) for t in LOOKS_LIKE_CODE]
    graph = Graph(name="g", params=(Port(name="texts", type="list[str]", required=True),),
                  nodes=(Node(id="a", step="toy.mark", each=("value",), inputs=dict(value=ParamRef(name="texts"))),),
                  outputs=dict(values=dict(kind="port", node="a", port="value")))
    job = up.done(up.client.submit(graph, dict(texts=texts)).id)
    assert job.error is None and job.outputs["values"] == texts and job.params["texts"] == texts
    local = LocalRunner(Catalogue(TOYS), tmp_path / "local")
    assert local.run(graph, dict(texts=texts)).job.outputs["values"] == texts
    local.close()
    assert not trap.exists()


def test_json_of_any_shape_comes_back_equal(farm: Callable[..., Farm]) -> None:
    up = farm(Path(__file__).parent / "pipelines")
    up.start("control")
    up.start("w1")
    values = [None, True, -2**63, 2**64 - 1, 1e308, 5e-324, -0.0, [], {}, [[[]]], {"": 0, "a b": {"'": '"', "\\": "{}"}},
              nested(95), dict(kind="port"), dict(kind="port", node="a", port="b"), dict(kind="param", name="x"),
              dict(kind="artifact", sha256="zz"), dict(kind="artifact", size=-1), {"__class__": "x", "$ref": "#"}, "x" * 10**6]
    graph = Graph(name="g", params=(Port(name="values", type="list", required=True),),
                  nodes=(Node(id="a", step="toy.echo", each=("value",), inputs=dict(value=ParamRef(name="values"))),
                         Node(id="b", step="toy.echo", inputs=dict(value=dict(kind="port", node="a", port="value")))),
                  outputs=dict(values=dict(kind="port", node="b", port="value")))
    job = up.done(up.client.submit(graph, dict(values=values)).id)
    assert job.error is None and job.outputs["values"] == values
    assert up.client.jobs()[0].params["values"] == values


def cli(f: Farm, *args: str, code: int = 2) -> str:
    r = subprocess.run([sys.executable, "-m", "myspinbot", *args], env=f.env, capture_output=True, timeout=120, check=False)
    said = r.stderr.decode(errors="replace")
    assert r.returncode == code and "Traceback" not in said, (args, r.returncode, r.stdout, said)
    return said


def test_command_line_refuses_with_the_name_and_the_fix(home: Farm) -> None:
    for args, words in ((("-p", "=5"), ("no parameter ''",)), (("-p", ""), ("name=value", "-p text=")),
                        (("-p", "names=5"), ("names takes list", "Give a list")),
                        (("-p", "names=[1"), ("names takes list", "as JSON")),
                        (("-p", "names=" + "[" * 100_000), ("names takes list", "as JSON")),
                        (("-p", "seconds=nan"), ("seconds is NaN",)), (("-p", "seconds=1e999"), ("seconds is inf",)),
                        (("-p", "seconds=soon"), ("seconds takes float", "'soon'", "Write a number")),
                        (("-p", "names=[NaN]"), ("names[0] is NaN",)), (("-p", "nmes=[]"), ("Did you mean names?",)),
                        (("--priority", "urgent"), ("'urgent'", "high, normal or low")),
                        (("--key", "k" * 201), ("201 characters",))):
        said = cli(home, "submit", "fan", *args)
        assert all(w in said for w in words), said
    said = cli(home, "submit", "fan", os.fsdecode(b"-pnames=[\"\xff\"]"))
    assert "names[0] is a text with half of a surrogate pair" in said
    assert "is empty" in cli(home, "show", "") and "No job is ever 'done'" in cli(home, "jobs", "--status", "done")
    for name in ("../../x", "a b", "-x"): assert "no name for a worker" in cli(home, "worker", f"--name={name}")
    assert "Not a queue name: 'GPU'" in cli(home, "worker", "--queues", "cpu,GPU")
    nothing_left(home)


def test_http_refuses_with_the_error_of_the_client(home: Farm) -> None:
    http = http_of(home.client, raise_server_exceptions=False)
    for name, (given, words) in BAD.items():
        if any(o in name for o in ("file", "path", "home")): continue  # over HTTP no path is read at all
        if any(not isinstance(k, str) for o in (given, given.get("table", {})) for k in o): continue  # JSON makes it a text
        try: body = json.dumps(dict(graph=G.to_json(), params=dict(text="x") | given))
        except (TypeError, ValueError, RecursionError): continue  # what JSON cannot say cannot arrive
        r = http.post("/jobs", content=body, headers=JSON)
        e = error_from_dict(r.json())
        assert r.status_code in (413, 422), (name, r.text[:300])
        assert e.message and e.hint and (r.status_code == 413 or words[0] in str(e) or "surrogate" in str(e)), (name, str(e)[:400])
    raw = dict(nan=b"NaN", inf=b"1e999", huge=b"9" * 400, digits=b"9" * 5000, deep=b"[" * 10_000 + b"]" * 10_000,
               bytes=b'"\xff"', torn=b'"')
    for name, v in raw.items():
        r = http.post("/jobs", content=b'{"pipeline": "fan", "params": {"names": ' + v + b"}}", headers=JSON)
        assert r.status_code in (400, 422) and r.json()["message"] and r.json()["hint"], (name, r.text)
    for body in (b"", b"[]", b"null", b'"x"', b'{"pipline": "fan"}', b"{}", b'{"pipeline": "fan", "graph": {}}'):
        r = http.post("/jobs", content=body, headers=JSON)
        assert r.status_code == 422 and r.json()["message"] and r.json()["hint"], (body, r.text)
    assert "Content-Type" in http.post("/jobs", content=b'{"pipeline": "fan"}').json()["hint"]
    nothing_left(home)


CSVS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "second row is no number": (b"seconds,names\n1,\"[\"\"a\"\"]\"\nsoon,\n", ("Row 2", "seconds takes float", "'soon'")),
    "unknown column": (b"secs\n1\n", ("Row 1", "no parameter 'secs'", "Did you mean seconds?")),
    "more cells than columns": (b"seconds\n1\n1,2\n", ("line 3", "more cells than the 1 columns", "double quotes")),
    "column twice": (b"seconds,seconds\n1,2\n", ("'seconds' is there twice",)),
    "no rows": (b"seconds\n", ("no list of parameter sets",)),
    "empty": (b"", ("no list of parameter sets",)),
    "not UTF-8": (b"names\n\xff\xfe\n", ("cannot be read", "UTF-8")),
    "open quote": (b'names\n"[\n', ("line", "unexpected end")),
    "NUL": (b'names\n"[""\0""]"\n', ("names", "JSON")),
    "cell of 200 000 characters": (b"names\n" + b"x" * 200_000 + b"\n", ("line", "field limit")),
    "semicolons between what are no names": (b"seconds;my names\n1;2\n", ("first line", "'seconds;my names'", "semicolon")),
    "tabs between what are no names": (b"seconds\tmy names\n1\t2\n", ("first line", "tab")),
    "semicolons and commas": (b"seconds;a,names\n1;2,3\n", ("first line", "semicolon")),
    "semicolons and an unknown column": (b"seconds;nmes\n1;2\n", ("Row 1", "no parameter 'nmes'", "Did you mean names?")),
    "semicolons and more cells": (b"seconds;names\n1;[];3\n", ("line 2", "more cells than the 2 columns", "semicolon")),
    "semicolons and decimal commas": (b"seconds;names\n0,5;[]\n", ("Row 1", "seconds takes float", "'0,5'")),
    "wrong number of cells behind a line for Excel": (b"sep=;\nseconds;names\n1;[];3\n", ("line 3", "more cells")),
    "Windows-1252": (b'names\n"[""Gr\xfc\xdfe""]"\n', ("line 2", "0xfc", "Windows-1252", "UTF-8")),
    "UTF-16 without a mark": ("names\n[]\n".encode("utf-16-le"), ("UTF-16", "UTF-8")),
    "half of UTF-16": (b"\xff\xfen\0a", ("cannot be read", "UTF-8")),
    "a workbook": (b"PK\x03\x04" + bytes(99), ("a ZIP archive", "CSV")),
}


@pytest.mark.parametrize("name", CSVS)
def test_batch_csv_is_refused_before_the_first_job(name: str, home: Farm, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(CSVS[name][0])
    said = cli(home, "batch", "fan", str(tmp_path / "rows.csv"))
    assert all(w in said for w in ("rows.csv", *CSVS[name][1])), said
    nothing_left(home)


READ: dict[str, bytes] = {  # two rows with the same parameters, as programs write them
    "semicolons": b'seconds;names\n0.5;"[""a"", ""b;c""]"\n;[]\n',
    "tabs": b'seconds\tnames\n0.5\t"[""a"", ""b;c""]"\n\t[]\n',
    "bars": b'seconds|names\n0.5|"[""a"", ""b;c""]"\n|[]\n',
    "commas": b'seconds,names\n0.5,"[""a"", ""b;c""]"\n,[]\n',
    "names in quotes": b'"seconds";"names"\r\n"0.5";"[""a"", ""b;c""]"\r\n;[]\r\n',
    "a semicolon at each end": b'seconds;names;\n0.5;"[""a"", ""b;c""]";\n;[];\n',
    "a mark before UTF-8": b'\xef\xbb\xbfseconds;names\n0.5;"[""a"", ""b;c""]"\n;[]\n',
    "UTF-16": 'seconds\tnames\r\n0.5\t"[""a"", ""b;c""]"\r\n\t[]\r\n'.encode("utf-16"),
    "UTF-16, the other order": b"\xfe\xff" + 'seconds\tnames\r\n0.5\t"[""a"", ""b;c""]"\r\n\t[]\r\n'.encode("utf-16-be"),
    "a line for Excel": b'sep=;\r\nseconds;names\r\n0.5;"[""a"", ""b;c""]"\r\n;[]\r\n',
    "lines as of old": b'seconds;names\r0.5;"[""a"", ""b;c""]"\r;[]\r',
}


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv"])
@pytest.mark.parametrize("name", READ)
def test_a_table_is_read_however_its_columns_are_separated(name: str, suffix: str, tmp_path: Path) -> None:
    (path := tmp_path / f"rows{suffix}").write_bytes(READ[name])
    assert read_table(path) == [dict(seconds="0.5", names='["a", "b;c"]'), dict(names="[]")]


def test_a_single_column_may_hold_any_sign(tmp_path: Path) -> None:
    (path := tmp_path / "rows.csv").write_text("text\nHello; world | all\t\n\"One, two\"\n")
    assert read_table(path) == [dict(text="Hello; world | all\t"), dict(text="One, two")]


LAUGHS = ["&a [x, x]"] + [f"&{b} [{', '.join([f'*{a}'] * 8)}]" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)]
YAMLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a date": ("- names: [2024-01-01]\n", ("Row 1", "names[0]", "date")),
    "laughs": ("\n".join(f"- {o}" for o in LAUGHS) + "\n", ("no list of parameter sets",)),
    "laughs inside": (f"- names: [{', '.join(LAUGHS)}]\n", ("Row 1", "100,000 values")),
    "in itself": ("- names: &a [*a]\n", ("Row 1", "100 levels")),
    "an object of Python": ("- names: !!python/object/apply:os.system ['true']\n", ("is not YAML",)),
    "no rows": ("names: [a]\n", ("no list of parameter sets",)),
    "open": ("- names: [\n", ("is not YAML",)),
}


@pytest.mark.parametrize("name", YAMLS)
def test_batch_yaml_is_refused_before_the_first_job(name: str, home: Farm, tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(YAMLS[name][0])
    said = cli(home, "batch", "fan", str(tmp_path / "rows.yaml"))
    assert all(w in said for w in YAMLS[name][1]), said
    nothing_left(home)


def test_path_in_an_untyped_parameter_is_not_read_on_the_worker(farm: Callable[..., Farm], tmp_path: Path) -> None:
    up, secret = farm(Path(__file__).parent / "pipelines"), tmp_path / "secret.png"
    Image.new("RGB", (32, 32)).save(secret)
    up.start("control")
    up.start("w1")
    graph = Graph(name="g", params=(Port(name="free", type="any"),),
                  nodes=(Node(id="a", step="toy.size", inputs=dict(picture=ParamRef(name="free"))),),
                  outputs=dict(size=dict(kind="port", node="a", port="size")))
    job = up.done(up.client.submit(graph, dict(free=str(secret))).id)
    assert job.status == "failed" and "picture takes Image, but got the path" in job.error["message"] and job.error["hint"]
    typed = graph.model_copy(update=dict(params=(Port(name="free", type="Image"),)))
    assert up.done(up.client.submit(typed, dict(free=str(secret))).id).outputs == dict(size=secret.stat().st_size)
