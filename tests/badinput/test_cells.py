"""What cells print, show, send and take away: the run goes on, or fails with the notebook's own error; never an exception here."""
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jupyter_client.session import Session

from myspinbot.core import GateFailed, InputError, KernelDied, StepFailed, StepTimeout, whole_text
from myspinbot.executor.outputs import Collector
from myspinbot.executor.engine import RunRecord, run_notebook
from myspinbot.executor.document import notebook_bytes
from myspinbot.executor.pool import KernelPool
from myspinbot.executor.inside import packed
from myspinbot.schema import MAX_DEPTH

Run = Callable[..., tuple[RunRecord, list[Any]]]


@pytest.fixture(scope="module")
def pool() -> Iterator[KernelPool]:
    with KernelPool(spare=1) as p: yield p


def book(*cells: str, **meta: Any) -> dict[str, Any]:
    blank = dict(cell_type="code", execution_count=None, metadata={}, outputs=[])
    code = [dict(blank, id=f"c{i}", source=c) for i, c in enumerate(cells)]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    return dict(cells=code, metadata=dict(kernelspec=kernel) | meta, nbformat=4, nbformat_minor=5)


@pytest.fixture
def run(pool: KernelPool, tmp_path: Path) -> Run:
    "Run cells; the record, and the outputs of each cell from a file that must be UTF-8 and a sound notebook."
    def go(*cells: str, **kw: Any) -> tuple[RunRecord, list[Any]]:
        (tmp_path / "in.ipynb").write_text(json.dumps(book(*cells)))
        kw = dict(pool=pool, cwd=tmp_path, timeout_s=30, grace_s=0.3) | kw
        r = run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", **kw)
        nb = nbformat.reads((tmp_path / "out.ipynb").read_bytes().decode("utf-8"), 4)
        nbformat.validate(nb)
        return r, [c.outputs for c in nb.cells if c.cell_type == "code"]
    return go


def texts(outputs: list[Any], kind: str = "") -> str:
    "What a cell's streams say, those of one name or all."
    return "".join(o.text for o in outputs if o.output_type == "stream" and kind in ("", o.name))


# Text

DISPLAY = "from IPython.display import HTML, display\n"
SAID = {  # cell -> what its output holds
    "print('a \\ud83d b')": "a \ufffd b\n",
    "print('a \\udcff b')": "a \ufffd b\n",
    "print('caf\\udcc3\\udca9')": "café\n",                            # a file name of another encoding, as Jupyter shows it
    "print('\\ud83d', end=''); print('\\ude00')": "😀\n",              # halves that stand together are their character
    "import sys; print('a \\ud83d', file=sys.stderr)": "a \ufffd\n",
    "'a \\ud83d b'": "'a \\ud83d b'",                                  # Python's own repr escapes it
    "type('R', (), dict(__repr__=lambda s: 'a \\ud83d b'))()": "a \ufffd b",
    DISPLAY + "display(HTML('<b>\\ud83d</b>'))": "<b>\ufffd</b>",
    DISPLAY + "display({'text/plain': 'x', 'text/\\ud83d': 'y'}, metadata={'\\ud83d': '\\ude00'}, raw=True)": "text/\ufffd",
    DISPLAY + "h = display('x', display_id='\\ud83d'); h.update('new')": "'new'",
    "import threading; t = threading.Thread(target=print, args=('\\ud83d',)); t.start(); t.join()": "\ufffd\n",
    "import warnings; warnings.warn('a \\ud83d')": "UserWarning: a \ufffd",
    "import logging; logging.warning('a \\ud83d')": "a \ufffd\n",
    "import os; os.write(1, b'\\xed\\xa0\\xbd x\\n')": "\ufffd x\n",
    "get_ipython().set_next_input('\\ud83d')\nprint('asked')": "asked\n",
    "from comm import create_comm; create_comm(target_name='x', data={'a': '\\ud83d'})": "BaseComm",
    "print('\\x00nul \\x1b[31mred\\x1b[0m')": "\0nul \x1b[31mred\x1b[0m\n",
}


@pytest.mark.parametrize("cell", SAID)
def test_half_a_character_is_shown_as_such_and_the_notebook_goes_on(run: Run, cell: str) -> None:
    began = time.monotonic()
    r, (outputs, after) = run(cell, "print('after')")
    assert r.ok, r.error
    assert SAID[cell] in "".join(texts(outputs) + str(o.get("data", "")) for o in outputs).replace("\\\\", "\\")
    assert texts(after) == "after\n" and time.monotonic() - began < 10


def test_output_of_a_child_or_of_c_is_in_its_cell_however_late_the_thread_is_that_reads_it(run: Run) -> None:
    late = """import fcntl, os, sys, termios, threading, time
write = type(sys.stdout).write
def slow(stream, text):
    if threading.current_thread() is not threading.main_thread(): time.sleep(0.3)
    return write(stream, text)
type(sys.stdout).write = slow
def read(): return not any(fcntl.ioctl(sys.stdout._fid, termios.FIONREAD, bytes(4)))
"""
    read = "\nwhile not read(): pass"  # the pipe is empty, but what came from it is not shown yet
    elsewhere = "import io\nkept, sys.stdout = sys.stdout, io.StringIO()\nos.write(1, b'x');"
    r, (_, raw, child, replaced, after) = run(late, "os.write(1, b'raw');" + read, "os.system('echo child');" + read,
                                              elsewhere, "sys.stdout = kept")
    assert r.ok, r.error
    assert [texts(o) for o in (raw, child, replaced, after)] == ["raw", "child\n", "x", ""]


def test_character_that_comes_through_a_pipe_in_two_parts_stays_whole(run: Run) -> None:
    long = "a" + "é😀" * 9000  # more than a pipe holds: its parts end inside of a character
    all_of_it = f"import os, time\ndata = {long!r}.encode()\nwhile data: data = data[os.write(1, data):]"
    in_parts = "for b in 'é😀'.encode(): os.write(1, bytes([b])); time.sleep(0.01)"
    r, (whole, parts, half, after) = run(all_of_it, in_parts, "os.write(1, b'x\\xc3');", "print('after')")
    assert r.ok, r.error
    assert [texts(o) for o in (whole, parts, half, after)] == [long, "é😀", "x\ufffd", "after\n"]


def test_error_with_half_a_character_is_the_notebooks_own(run: Run) -> None:
    r, (outputs,) = run("raise ValueError('bad \\ud800 text')")
    assert type(r.error) is StepFailed and r.error.message == "ValueError: bad \ufffd text"
    assert outputs[-1].evalue == "bad \ufffd text" and "'bad \\ud800 text'" in "".join(outputs[-1].traceback)
    r, (outputs,) = run("raise ExceptionGroup('g \\ud800', [ValueError('\\ud800'), TypeError(1)])")
    assert r.error.fields["ename"] == "ExceptionGroup" and "g \ufffd" in r.error.message


def test_error_of_ours_keeps_its_class_whatever_its_fields_are(run: Run) -> None:
    raises = "from myspinbot.core import GateFailed\n"
    r, _ = run(raises + "raise GateFailed('bad \\ud83d', 'hint \\ud83d', a='\\ud83d', **{'b\\ud83d': 1})")
    assert type(r.error) is GateFailed and str(r.error) == "bad \ufffd. hint \ufffd"
    assert r.error.fields == {"a": "\ufffd", "b\ufffd": 1, "cell": 0}
    r, _ = run(raises + "raise GateFailed('low', score=float('nan'), of={1, 2})")
    assert type(r.error) is GateFailed and r.error.fields["score"] == "nan" and r.error.fields["of"] == "{1, 2}"
    r, _ = run(raises + "e = GateFailed('low', 'h'); e.fields, e.message, e.hint = 7, None, ['x']\nraise e")
    assert type(r.error) is GateFailed and r.error.message == "unknown error"


def test_widget_with_half_a_character_keeps_its_state(run: Run, tmp_path: Path) -> None:
    r, _ = run("import ipywidgets\nipywidgets.Text(value='a\\ud83db')")
    assert r.ok and "a\ufffdb" in (tmp_path / "out.ipynb").read_text(encoding="utf-8")


def test_variable_keeps_its_half_character(run: Run) -> None:
    r, (_, outputs) = run("x = 'a\\ud83d'", "print(ascii(x))")
    assert r.ok and texts(outputs) == "'a\\ud83d'\n", "only what leaves the process changes"


def test_source_with_half_a_character_is_refused_with_its_cell(run: Run) -> None:
    with pytest.raises(InputError, match="surrogate pair in cell 1"): run("1", "print('\ud83d')")
    r, (_, outputs) = run("print(ascii(n))", parameters=dict(n="\ud83d"))
    assert r.ok and texts(outputs) == "'\\ud83d'\n", "papermill writes a parameter as an escape"


@given(st.text(st.characters(), max_size=20))
@settings(derandomize=True, deadline=None, database=None, max_examples=500)
def test_any_text_leaves_as_utf8_and_sound_text_as_it_was(text: str) -> None:
    whole = whole_text(text)
    whole.encode()
    assert json.loads(packed({"t": text}).decode("utf-8", "replace"))["t"].replace("\ufffd", "") == whole.replace("\ufffd", "")
    if not any("\ud800" <= c <= "\udfff" for c in text): assert whole is text


# Outputs

LEFT_OUT = {  # what a cell shows -> words of the note, "" where it is an output as any other
    "{'text/plain': {'a': 1}}": "text/plain holds a dict, not text",
    "{'image/png': 5}": "image/png holds a number, not text",
    "{'application/x': float('nan')}": "application/x holds nothing, not text",
    "{'text/html': None}": "text/html holds nothing, not text",
    "{'text/html': ['a', 5]}": "text/html holds a list, not text",
    "{'text/plain': {1, 2}}": "text/plain holds a list, not text",
    "{'application/x': object()}": "application/x cannot be JSON",
    "{'application/json': (lambda x: [x.append(x), x][1])([])}": "application/json cannot be JSON",
    "{'application/json': 10**5000}": "application/json cannot be JSON",
    "{'application/json': __import__('functools').reduce(lambda v, _: [v], range(500), 1)}": "levels deep",
    "{'application/json': __import__('functools').reduce(lambda v, _: [v], range(50_000), 1)}": "cannot be JSON",
    "{'text/html': ['a', 'b']}": "", "{5: 'x', 'text/plain': 'y'}": "", "{'image/png': b'abc'}": "", "{}": "",
    "{'application/json': {'a': float('nan')}}": "", "{'application/x': b'\\xff\\0'}": "",
}


@pytest.mark.parametrize("shown", LEFT_OUT)
def test_output_that_no_notebook_holds_is_left_out_with_a_note(run: Run, shown: str) -> None:
    seen: list[Any] = []
    cell = f"{DISPLAY}print('x')\ndisplay({shown}, raw=True)\nprint('y')"
    r, (outputs, after) = run(cell, "print('after')", on_output=lambda i, m: seen.append(m))
    assert r.ok, r.error
    assert texts(outputs, "stdout") == "x\ny\n" and texts(after) == "after\n"
    note = texts(outputs, "stderr")
    assert bool(note) == bool(LEFT_OUT[shown]) and LEFT_OUT[shown] in note
    assert not note or note.startswith("[an output was left out: ")
    assert len(outputs) == 3 and all(isinstance(m["content"].get("text", ""), str) for m in seen)


@pytest.mark.parametrize("bundle, note", [("5", ""), ("(1, 2, 3)", ""), ("{'text/plain': 5}", "text/plain holds a number"),
                                          ("({'text/plain': 'x'}, 'meta')", "its metadata is str")])
def test_representation_that_is_none_is_left_out(run: Run, bundle: str, note: str) -> None:
    r, (outputs, after) = run(f"class R:\n  def _repr_mimebundle_(self, **k): return {bundle}\nR()", "print('after')")
    assert r.ok and note in texts(outputs, "stderr") and texts(after) == "after\n"


@pytest.mark.parametrize("method", ["_repr_mimebundle_(self, **k)", "__repr__(self)"])
def test_representation_that_raises_fails_with_what_it_raised(run: Run, method: str) -> None:
    r, _ = run(f"class R:\n  def {method}: raise ValueError('no')\nR()", "print('after')")
    assert type(r.error) is StepFailed and r.error.message == "ValueError: no"


def test_deepest_output_that_is_kept_can_be_written(run: Run) -> None:
    show = f"{DISPLAY}v = 1\nfor _ in range({{}}): v = [v]\ndisplay({{{{'application/json': v}}}}, raw=True)"
    r, ((kept,),) = run(show.format(MAX_DEPTH - 3))
    assert r.ok and kept.output_type == "display_data"
    r, ((note,),) = run(show.format(MAX_DEPTH - 2))
    assert r.ok and "100 levels deep" in note.text


def test_output_that_another_thread_is_sending_belongs_to_its_cell(run: Run) -> None:
    r, (outputs, after) = run("""import sys, threading, time
send = get_ipython().kernel.session.send
def slow(*args, **kw):
    if threading.current_thread() is not threading.main_thread(): time.sleep(0.5)
    return send(*args, **kw)
get_ipython().kernel.session.send = slow
print("late")
threading.Thread(target=sys.stdout._flush).start()
time.sleep(0.1)""", "print('after')")
    assert r.ok and texts(outputs) == "late\n" and texts(after) == "after\n"


# Messages

SEND = ("k = get_ipython().kernel\n"
        "def s(kind, content, **kw): k.session.send(k.iopub_socket, kind, content, parent=k.get_parent(), **kw)\n")
SENT = [
    "s('update_display_data', dict(data={'text/plain': 'x'}, metadata={}, transient=dict(display_id='nope')))",
    "s('update_display_data', dict(data=5, transient=dict(display_id=['x'])))", "s('display_data', {})",
    "s('display_data', dict(data=[1], metadata={}))", "s('display_data', dict(data=None, metadata=None))",
    "s('stream', dict(name='stdout'))", "s('stream', dict(name='stdout', text=5))", "s('stream', dict(text='x'))",
    "s('stream', dict(name=5, text='x'))", "s('stream', None)", "s('error', {})",
    "s('error', dict(ename=5, evalue=None, traceback='x'))", "s('execute_result', dict(data={'text/plain': 'x'}))",
    "s('execute_input', {})", "s('execute_input', dict(code='x', execution_count='many'))", "s('my_type', dict(a=1))", "s('', {})",
    "s('status', {})", "s('status', dict(execution_state='idle'))", "s('comm_open', {})", "s('comm_close', dict(comm_id='x'))",
    "s('comm_msg', dict(comm_id=[1], data=5))", "s('comm_msg', dict(comm_id='x', data=dict(state={}, buffer_paths=[5])))",
    "s('comm_open', dict(comm_id='x', target_name='jupyter.widget', data=dict(state=5)))",
    "s('comm_open', dict(comm_id='x', target_name='jupyter.widget', data=dict(state=dict(_model_name='OutputModel'))))",
    "s('clear_output', dict(wait=True)); s('clear_output', {}); s('clear_output', dict(wait='x'))",
    "k.iopub_socket.send_multipart([b'x', b'y'])", "k.iopub_socket.send_multipart([b'<IDS|MSG>', b'x'])",
    "m = k.session.msg('stream', dict(name='stdout', text='h'), parent=k.get_parent()); m['header']['msg_id'] = 5\n"
    "k.session.send(k.iopub_socket, m)",
    "k.session.send(k.iopub_socket, 'stream', dict(name='stdout', text='h'), parent=dict(header={'msg_id': [5]}))",
    "get_ipython().payload_manager.write_payload(dict(source='x', a=object()))", "get_ipython().payload_manager.write_payload(5)",
    "get_ipython().payload_manager.write_payload(dict(source='page', data={}, start=0))", "get_ipython().set_next_input('y = 1')",
]


@pytest.mark.parametrize("sent", SENT)
def test_message_of_a_notebooks_own_making_ends_no_run(run: Run, sent: str) -> None:
    r, (_, after) = run(f"{SEND}print('before')\n{sent};", "print('after')")
    assert r.ok or r.error.fields["ename"] in ("TypeError", "ValueError"), r.error
    assert not r.ok or texts(after) == "after\n"


KINDS = ["stream", "display_data", "execute_result", "update_display_data", "error", "clear_output", "status", "execute_input",
         "comm_open", "comm_msg", "comm_close", "other"]
words = st.sampled_from(["", "a", "x", "stdout", "stderr", "idle", "jupyter.widget", "OutputModel", "text/plain", "image/png"])
fields = st.sampled_from(["name", "text", "data", "metadata", "transient", "display_id", "execution_count", "execution_state",
                          "wait", "comm_id", "target_name", "state", "buffer_paths", "method", "msg_id", "_model_name",
                          "_model_module", "ename", "evalue", "traceback", "code", "outputs", "left_out"])
values = st.recursive(st.none() | st.booleans() | st.integers(-2, 2) | words, lambda o: st.lists(o, max_size=3) | st.dictionaries(
    fields | words, o, max_size=4), max_leaves=10)
sound = st.sampled_from([
    ("stream", dict(name="stdout", text="a\rb\n")), ("display_data", dict(data={"text/plain": "1"}, metadata={},
                                                                          transient=dict(display_id="a"))),
    ("update_display_data", dict(data={"text/plain": "2"}, metadata={}, transient=dict(display_id="a"))),
    ("clear_output", dict(wait=True)), ("clear_output", dict(wait=False)),
    ("comm_open", dict(comm_id="a", target_name="jupyter.widget", data=dict(state=dict(
        _model_name="OutputModel", _model_module="@jupyter-widgets/output", outputs=[], msg_id="")))),
    ("comm_msg", dict(comm_id="a", data=dict(method="update", state=dict(msg_id="cell"))))])
messages = st.lists(sound | st.tuples(st.sampled_from(KINDS), st.dictionaries(fields, values, max_size=6)), max_size=8)


@given(messages)
@settings(derandomize=True, deadline=None, database=None, max_examples=500)
def test_any_messages_in_any_order_leave_a_sound_notebook(sent: list[tuple[str, Any]]) -> None:
    nb = nbformat.from_dict(book("1"))
    sockets = dict(shell=SimpleNamespace(send_multipart=lambda *a, **k: None))
    collect = Collector(nb, SimpleNamespace(session=Session(), sockets=sockets))
    collect.start(0)
    for kind, content in sent:
        header = dict(msg_id="m", msg_type=kind, date="2026-01-01T00:00:00Z")
        collect(dict(header=header, msg_id="m", msg_type=kind, parent_header=dict(msg_id="cell"), metadata={}, content=content,
                     buffers=[]))
    collect.join()
    collect.client.set_widgets_metadata()
    nbformat.validate(nbformat.reads(notebook_bytes(nb).decode(), 4))


# Deeds

FAILS = {  # cells -> type of the error, a word of it
    ("raise KeyboardInterrupt('why')",): (StepFailed, "KeyboardInterrupt: why"),
    ("raise GeneratorExit",): (StepFailed, "GeneratorExit"),
    ("class B(BaseException): pass\nraise B('x')",): (StepFailed, "B: x"),
    ("class E(Exception):\n  def __str__(self): raise ValueError('no')\nraise E",): (StepFailed, "ValueError: no"),
    ("class E(Exception):\n  def __str__(self): return 5\nraise E",): (StepFailed, "TypeError: __str__ returned non-string"),
    ("class E(Exception):\n  def __str__(self): raise SystemExit(0)\nraise E",): (StepFailed, "SystemExit"),
    ("raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",): (StepFailed, "ExceptionGroup: g (2 sub-exceptions)"),
    ("raise ValueError('x' * 10_000_000)",): (StepFailed, "ValueError: xxxx"),
    ("def f(): f()\nf()",): (StepFailed, "RecursionError"),
    ("import sys\nsys.stdout.close()", "print(1)"): (StepFailed, "closed file"),
    ("%xmode Minimal", "1 / 0"): (StepFailed, "ZeroDivisionError: division by zero"),
    ("get_ipython().showtraceback = lambda *a, **k: None", "1 / 0"): (StepFailed, "ZeroDivisionError"),
    ("import sys\nsys.excepthook = sys.displayhook = None", "1 / 0"): (StepFailed, "ZeroDivisionError"),
    ("input()",): (StepFailed, "StdinNotImplementedError"),
    ("import getpass\ngetpass.getpass()",): (StepFailed, "StdinNotImplementedError"),
    ("f = get_ipython().display_formatter.formatters['text/plain']\nf.for_type(str, lambda s, p, c: p.text('x'))",
     "from myspinbot.core import GateFailed\nraise GateFailed('low')"): (StepFailed, "GateFailed: low"),
    ("import os\nos._exit(0)",): (KernelDied, "exit code 0"),
    ("import sys\nclass B:\n  def write(self, *a): raise OSError('broken')\n  flush = write\nsys.stdout = B()", "1"): (
        KernelDied, "The notebook broke its kernel: OSError: broken"),
    ("import sys\nsys.stdout = sys.stderr = None", "5"): (KernelDied, "The notebook broke its kernel: AttributeError"),
    ("import builtins\nfor n in ('print', 'len', 'isinstance'): delattr(builtins, n)", "1"): (KernelDied, "broke its kernel"),
    ("import builtins\nbuiltins.__import__ = None", "1"): (KernelDied, "broke its kernel"),
    ("import os\nos.closerange(3, 200)", "1"): (KernelDied, ""),
    ("import asyncio\nasyncio.get_event_loop().stop()", "1"): (KernelDied, ""),
}


@pytest.mark.parametrize("cells", FAILS)
def test_deed_that_ends_a_run_is_its_reason_and_comes_soon(run: Run, cells: tuple[str, ...]) -> None:
    began, (kind, said) = time.monotonic(), FAILS[cells]
    r, _ = run(*cells, "print('after')")
    assert type(r.error) is kind and said in r.error.message, r.error
    assert time.monotonic() - began < 15 and not isinstance(r.error, StepTimeout)


WORKS = [
    "In = Out = get_ipython = 5\n_ = __ = 3", "x = 1\n%reset -f", "import os\nos.close(1)",
    "import os, tempfile\nd = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)",
    "import signal\nfor s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)",
    "import sys\nsys.displayhook = lambda v: 1 / 0", "import sys\nsys.last_value = 5", "import sys\nsys.setrecursionlimit(90)",
    "import os\npid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0);",
    "class D:\n  def __del__(self): raise ValueError('\\ud83d')\nd = D(); del d",
    "import threading\nt = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
    "get_ipython().kernel.do_shutdown(False);",
    "exit(1)",  # IPython's `keep_kernel`: goes on, as by papermill
]


@pytest.mark.parametrize("cell", WORKS)
def test_deed_that_harms_nobody_ends_no_run(run: Run, cell: str) -> None:
    r, (*_, after) = run(cell, "print('after')")
    assert r.ok and texts(after) == "after\n", r.error


def test_kernel_after_any_of_this_is_as_before(run: Run) -> None:
    r, (outputs,) = run("print(len('abc'), 'k' in dir(), [1])\n{'a': 1}")
    assert r.ok and texts(outputs) == "3 False [1]\n" and outputs[-1].data["text/plain"] == "{'a': 1}"
