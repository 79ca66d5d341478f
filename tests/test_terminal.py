"""What a terminal is shown: texts of jobs, steps and strangers are text there, whatever bytes they hold."""
import json
import os
import pty
import re
import subprocess
import sys
import threading
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from myspinbot.core import InputError, printable, printable_json
from myspinbot.ui.theme import diagram_html, error_html, head_html, job_label, log_html, numbers_html, steps_html
from myspinbot.schema import Condition, Graph, Job, Node, ParamRef, Port, StepRow

ATTACKS = dict(
    colour="\x1b[8;35mhidden\x1b[0m", clipboard="\x1b]52;c;SGVsbG8=\x07", title="\x1b]0;owned\x07", screen="\x1b[2J\x1b[H\x1bc",
    link="\x1b]8;;http://evil.example/\x1b\\link\x1b]8;;\x1b\\", device="\x1bP+q544e\x1b\\", csi8="\x9b2J\x9b8mlow",
    osc8="\x9d0;owned\x9c", charset="\x1b(0", query="\x1b[6n\x05", half="\x1b[", open="\x1b]0;", bell="\x07", delete="\x7f",
    nul8="\x80\x84\x85", back="ok\b\bno", again="first\rsecond", feed="up\x0b\x0cdown", over="\u202egpj.exe\u202c",
    isolate="\u2067a\u2069", unseen="pay\u200bpal\ufeff\u2060\u00ad", tags="\U000e0041\U000e0042", lines="one\u2028two",
    markup="[link=http://evil.example]m[/link]", emoji=":bomb:")
HOSTILE = "seen " + " ".join(ATTACKS.values()) + " end"
WORDS = ("seen", "hidden", "link", "low", "no", "second", "down", "gpj.exe", "paypal", "two", ":bomb:", "end")
FLAG = re.compile("\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f")
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
                    "\U000e0000-\U000e007f\ud800-\udfff]")
OWN = re.compile(r"\x1b\[([012]|3[1-7]|38;5;\d+)(;([12]|3[1-7]))*m|\x1b\[\?25[lh]|\x1b\[1A|\r?\x1b\[2K")  # rich's, structlog's
STEP = '''import sys
from myspinbot.core import InputError
from myspinbot import Step
step = Step("toy.loud")
step.progress(0.5, text)
step.log(text)
print(text)
print(text, file=sys.stderr)
path = step.path(text.replace("/", "_")[:60] + ".json")
path.write_text("{}")
if fail: raise InputError(text, text)
step.output(value=text, file=path)'''
PIPELINE = '''from myspinbot.graph.builder import Pipeline
p = Pipeline("loud", title=TITLE)
text_, fail_ = p.param("text", str, default=TITLE, help=TITLE), p.param("fail", bool, default=False)
more_ = p.param("more", "list[str]", default=[])
loud = p.step("toy.loud", id="loud", text=text_, fail=fail_)
p.output(value=loud.value, file=loud.file)'''
TOMORROW = '''"A command added tomorrow, whose author knows nothing of terminals."
import logging, os, sys, threading, warnings
import structlog
from rich.table import Table
from rich.text import Text
from myspinbot.cli import console as cli
from myspinbot.cli.app import main
from myspinbot.core import InputError

bad = os.environ["HOSTILE"]

class Odd:
    def __repr__(self): return bad

@cli.app.command()
def tomorrow() -> None:
    cli.start_log()
    print(bad)
    print(bad, file=sys.stderr)
    sys.stdout.writelines([bad, "\\n"])
    cli.out.print(bad)
    cli.err.print("odd", bad, Odd(), soft_wrap=True)
    cli.out.print(Text(bad, "red"))
    t = Table(bad, "b")
    t.add_row(bad, Text(bad))
    cli.out.print(t)
    cli.show_json({bad: bad})
    cli.print_error(InputError(bad, bad))
    log = structlog.get_logger("x")
    log.info(bad, name=bad, word=bad.replace(" ", ""), odd=Odd(), many=[bad, Odd()])
    try: raise ValueError(bad)
    except ValueError: log.exception("caught")
    logging.getLogger("y").error("%s", bad)
    warnings.warn(bad)
    t = threading.Thread(target=lambda: 1 / len(warnings.warn(bad) or ""))
    t.start()
    t.join()
    raise RuntimeError(bad)
main()
'''


def run(env: dict[str, str], *args: str, terminal: bool, program: tuple[str, ...] = ("-m", "myspinbot")) -> str:
    "What a command writes, to a pipe or to a terminal that changes no byte."
    command = [sys.executable, *program, *args]
    env = dict(env, COLUMNS="100", TERM="xterm-256color", PYTHONUTF8="1")
    if not terminal:
        r = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=False)
        return r.stdout.decode()
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    p = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    got: list[bytes] = []

    def read() -> None:
        try:
            while block := os.read(ours, 65536): got.append(block)
        except OSError: return  # the last writer has gone
    reader = threading.Thread(target=read)
    reader.start()
    p.wait(120)
    reader.join(10)
    os.close(ours)
    return b"".join(got).decode()


def check(shown: str, *words: str, terminal: bool) -> None:
    "Only text, and on a terminal our own colours."
    bare = OWN.sub("", shown) if terminal else shown
    found = UNSEEN.search(bare)
    assert not found, f"{found[0]!r} in {bare[max(found.start() - 60, 0):found.end() + 60]!r}"
    for word in words: assert word in bare, (word, bare)
    assert not terminal or bare != shown, f"no colours: {shown}"


def check_whole(shown: str, *words: str, terminal: bool) -> None:
    "And nothing is left of what stood inside the sequences."
    check(shown, *words, terminal=terminal)
    for word in ("52;c", "0;owned", ";http://evil", "+q544e", "35m", "[8m", "2J"): assert word not in shown, (word, shown)


def write(path: Path, text: str, *cells: tuple[str, str], **about: Any) -> None:
    "A notebook of a text and of tagged code cells; keyword arguments are its metadata `myspinbot`."
    path.parent.mkdir(exist_ok=True, parents=True)
    kernel = dict(name="python3", display_name="python3", language="python")
    code = [new_code_cell(source, metadata=dict(tags=[tag] if tag else [])) for tag, source in cells]
    metadata = dict(kernelspec=kernel, **(dict(myspinbot=about) if about else {}))
    nbformat.write(new_notebook(cells=[new_markdown_cell(text), *code], metadata=metadata), path)


@pytest.fixture
def loud(farm: Any, tmp_path: Path) -> Iterator[Farm]:
    "An installation with a pipeline of which every text is hostile."
    folder = tmp_path / "pipelines"
    parameters = f'text: str = "a"  # {ATTACKS["title"]}\nfail: bool = False'
    write(folder / "steps" / "toy_loud.ipynb", f"# {HOSTILE}\n{HOSTILE}", ("parameters", parameters), ("", STEP),
          id="toy.loud", outputs=dict(value="str", file="Data"))
    write(folder / "loud.ipynb", f"# {HOSTILE}", ("parameters", "text: str = ''"),
          ("pipeline", PIPELINE.replace("TITLE", ascii(HOSTILE))))
    (folder / "steps" / f"{ATTACKS['title']}{ATTACKS['csi8']}broken.ipynb").write_text('{"cells": [')
    f = farm(folder)
    f.start("control")
    f.start("w1")
    yield f


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_no_command_lets_a_text_of_a_job_steer_the_terminal(loud: Farm, terminal: bool) -> None:
    see = lambda *args: run(loud.env, *args, terminal=terminal)
    check(see("pipelines"), "seen", "end", "list[str]", terminal=terminal)
    check(see("steps"), "toy.loud", "lowbroken.ipynb", terminal=terminal)
    check(see("doctor"), "lowbroken.ipynb", terminal=terminal)
    check(see("submit", "loud", "-p", f"text={HOSTILE}", "--wait"), "seen", "succeeded", terminal=terminal)
    check_whole(see("submit", "loud", "-p", f"text={HOSTILE}", "-p", "fail=true", "--wait"), *WORDS, "InputError", "failed",
          terminal=terminal)
    failed, done = loud.client.jobs()
    again = loud.client.rerun(failed.id).id
    check_whole(see("logs", "-f", again), *WORDS, "status=failed", terminal=terminal)
    for job in (done, failed):
        check(see("show", job.id), *WORDS, "succeeded" if job is done else "failed", terminal=terminal)
        check_whole(see("logs", job.id), *WORDS, "first", terminal=terminal)
        check(see("why", job.id, "loud"), "loud", terminal=terminal)
    check(see("jobs"), done.id, terminal=terminal)
    check(see("show", f"job_{HOSTILE}"), "job_", "NotFound", terminal=terminal)
    check(see("submit", f"loud{HOSTILE}"), "NotFound", terminal=terminal)
    check(see("submit", "loud", "-p", HOSTILE), "no parameter", terminal=terminal)
    check(see(f"no{HOSTILE}"), "No such command", terminal=terminal)
    check(see("worker", f"--slots={HOSTILE}"), "--slots", terminal=terminal)
    check(see("worker", f"--name={HOSTILE}"), "no name", terminal=terminal)
    for log in ("control", "w1"): check(loud.log(log), "ready", terminal=False)


def test_json_keeps_every_value_and_holds_no_byte_that_steers(loud: Farm) -> None:
    ended = [run(loud.env, "submit", "loud", "-p", f"text={HOSTILE}", "-p", f"fail={fail}", "--wait", "--json", terminal=True)
             for fail in ("false", "true")]
    ids = [json.loads(o)["job"] for o in ended]
    shown = [run(loud.env, "show", id, "--json", terminal=True) for id in ids]
    logs = run(loud.env, "logs", ids[0], "--json", terminal=True)
    for text in (*ended, *shown, logs, run(loud.env, "jobs", "--json", terminal=True)): assert not UNSEEN.search(text), text
    assert json.loads(shown[0])["error"] is None
    assert json.loads(shown[0])["params"]["text"] == json.loads(shown[0])["outputs"]["value"] == HOSTILE
    assert json.loads(shown[1])["error"]["hint"] == json.loads(ended[1])["error"]["hint"] == HOSTILE
    told = [json.loads(line)["body"].get("text", "") for line in logs.splitlines()]
    assert HOSTILE in told


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_command_of_tomorrow_cannot_forget_it(tmp_path: Path, terminal: bool) -> None:
    (tmp_path / "tomorrow.py").write_text(TOMORROW)
    env = os.environ | dict(SPIN_HOME=str(tmp_path / "home"), HOSTILE=HOSTILE)
    shown = run(env, "tomorrow", terminal=terminal, program=(str(tmp_path / "tomorrow.py"),))
    check("".join(o for o in shown.splitlines(True) if not o.startswith('{"')), *WORDS, "RuntimeError", "ValueError", "InputError",
          "UserWarning", terminal=terminal)
    assert {HOSTILE: HOSTILE} in [json.loads(o) for o in shown.splitlines() if o.startswith('{"')]


def test_data_folder_with_a_hostile_name(tmp_path: Path) -> None:
    home = tmp_path / ATTACKS["title"] / f"home{ATTACKS['csi8']}"
    shown = run(os.environ | dict(SPIN_HOME=str(home)), "doctor", terminal=True)
    check(shown, "homelow", "redis-server", terminal=True)
    check(run(os.environ | dict(SPIN_HOME=str(home)), "down", terminal=False), "Nothing was up", "homelow", terminal=False)


def test_page_holds_no_hidden_character() -> None:
    graph = Graph(name="loud", title=HOSTILE, params=(Port(name="text", type="str", help=HOSTILE, default=HOSTILE),),
                  nodes=(Node(id="loud", step="toy.loud", when=Condition(ref=ParamRef(name="text"), op="eq", value=HOSTILE)),))
    job = Job(id="job_1", graph=graph, params=dict(text=HOSTILE), status="failed")
    rows = [StepRow(job="job_1", key="loud", node="loud", step="toy.loud", status="running")]
    shown = [head_html(job, 1.0), diagram_html(job, rows), steps_html(graph, rows, dict(loud=(0.5, HOSTILE))), job_label(job),
             numbers_html({HOSTILE: HOSTILE}), error_html(InputError(HOSTILE, HOSTILE)), log_html([(HOSTILE, HOSTILE)])]
    for o in shown: assert "seen" in o and not UNSEEN.search(o), o


# --- the mechanism

@given(st.text() | st.lists(st.sampled_from([*ATTACKS.values(), *"\x1b[]0;m\x07\\\x9b\x9d\x9c\r\n \ud83d\udcff🏴"])).map("".join))
def test_any_text_is_only_text_afterwards(text: str) -> None:
    clean = printable(text)
    assert not UNSEEN.search(FLAG.sub("", clean))
    assert printable(clean) == clean
    clean.encode()


@given(st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp"),
                             include_characters="\t\n\u200c\u200d\u200e\u200f\ufe0f")))
def test_harmless_text_is_unchanged(text: str) -> None:
    assert printable(text) is text


@pytest.mark.parametrize("text", [
    "naïve – “quotes” …", "👩‍👩‍👧‍👦 ❤️ 👍🏽 🏳️‍🌈", "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f!",
    "שלום, עולם", "مرحبا ۱۲۳\u200f!",
    "می\u200cخواهم", "क्\u200dष", "葛\U000e0100飾", "a\tb\n", "[31m is no escape", "ᠮᠣᠩᠭᠣᠯ\u180eᠠ"])
def test_scripts_and_emoji_of_people_stay_whole(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(("text", "clean"), [
    ("\x1b[31mred\x1b[0m", "red"), ("\x1b[38;2;1;2;3mred\x1b[m", "red"), ("\x9b31mred", "red"), ("a\x1b[31", "a31"),
    ("\x1b]8;;http://x\x07link\x1b]8;;\x07", "link"), ("a\x1bPq#0;2\x1b\\b", "ab"), ("\x1b\x1b[0m[31mx", "[31mx"),
    ("a\x1b_x\x1b\\b\x1b^y\x9cc\x1bXz\x1b\\", "abc"), ("a\x1b(Bb\x1b7c\x1b=d", "abcd"),
    ("a\x1b]0;not closed\nb", "a0;not closed\nb"), ("\x1bPtmux;\x1b\x1b]52;c;eA==\x07\x1b\\", "tmux;"),
    ("10%\r20%\r\n", "10%\n20%\n"), ("a\r\r\nb", "a\nb"), ("a\x0bb\x0cc\x85d\u2028e\u2029f", "a\nb\nc\nd\ne\nf"),
    ("caf\udcc3\udca9 \udcc2\udc9b2J", "café "), ("\ud83d", "\ufffd"), ("🏴\U000e0041\U000e007f!", "🏴!"),
    ("a\u202eb\u2066c\u200bd\ufeff", "abcd")])
def test_whole_sequences_go_and_what_they_stood_around_stays(text: str, clean: str) -> None:
    assert printable(text) == clean


@given(st.recursive(st.text() | st.sampled_from([*ATTACKS.values()]), lambda o: st.lists(o) | st.dictionaries(st.text(), o)))
def test_json_stays_the_same_value(value: Any) -> None:
    text = printable_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == json.loads(json.dumps(value)) and not UNSEEN.search(text)


@pytest.mark.parametrize("part", ["\x9d", "\x1b]", "\x1b[;", "\x9b ", "\r", "\x1b", "🏴\U000e0061", "\x1b[0m", "\x1b]a"])
def test_a_hostile_megabyte_takes_no_time(part: str) -> None:
    code = f"import time; from myspinbot.core import printable; text = {part!r} * 300_000; began = time.process_time()"
    code += "; printable(text); print(time.process_time() - began)"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert float(r.stdout) < 5
