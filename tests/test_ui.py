"""The studio: its widgets on real jobs, the page through Voila, and in a real browser where there is one."""
import io
import os
import re
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import ipywidgets as W
import nbformat
import pytest
from browser import BROWSER, FLAGS
from farm import Farm, wait_for
from PIL import Image

from myspinbot.core import InputError
from myspinbot.schema import Graph, Node, ParamRef, Port
from myspinbot.ui.fields import Form
from myspinbot.ui.job_view import JobView, job_view, result_widget
from myspinbot.ui.page import Studio

ROOT = Path(__file__).parents[1]
TOYS = Path(__file__).parent / "pipelines"
PAGE = ROOT / "dashboards/studio.ipynb"
_png = io.BytesIO()
Image.new("RGB", (4, 4), "red").save(_png, "PNG")
PNG = _png.getvalue()
def chosen(name: str, content: bytes) -> tuple[dict[str, Any], ...]:
    "What a FileUpload holds after a person chose a file."
    return (dict(name=name, type="", size=len(content), content=memoryview(content), last_modified=datetime.now(UTC)),)


def text_of(w: W.Widget) -> str:
    "All HTML in a tree of widgets."
    own = w.value if isinstance(w, W.HTML) else w.description if isinstance(w, W.Button) else ""
    return own + "".join(text_of(c) for c in getattr(w, "children", ()))


def test_form_gives_only_what_was_filled_in_and_stores_files(farm: Any) -> None:
    f = farm(TOYS)
    ports = (Port(name="portrait", type="Image", default=""), Port(name="text", type="str", required=True),
             Port(name="size", type="int", default=512), Port(name="loud", type="bool", default=False),
             Port(name="extra", type="dict", default={}), Port(name="clips", type="list[Audio]", default=[]))
    form = Form(Graph(name="talk", params=ports))
    assert form.values(f.client.store) == {}
    form.fields["portrait"][1].pick.value = chosen("me.png", PNG)
    assert any(isinstance(c, W.Image) for c in form.fields["portrait"][1].shown.children), "the picture is shown"
    form.fields["text"][1].value = "Hello"
    form.fields["size"][1].value = 256
    form.fields["loud"][1].value = True
    got = form.values(f.client.store)
    assert {k: v for k, v in got.items() if k != "portrait"} == dict(text="Hello", size=256, loud=True)
    assert (got["portrait"].name, got["portrait"].media_type, got["portrait"].size) == ("me.png", "image/png", len(PNG))
    assert f.client.store.exists(got["portrait"].sha256)
    form.fields["portrait"][1].drop.click()
    assert "portrait" not in form.values(f.client.store)
    form.fields["extra"][1].value = "{"
    with pytest.raises(InputError, match="extra is not JSON"): form.values(f.client.store)


def test_view_follows_a_job_to_its_result(site: Farm) -> None:
    job = site.client.submit("branches", {})
    view = job_view(site.client, job.id).view
    wait_for("the result in the view", lambda: view.results.children, 90)
    shown = text_of(view.widget)
    assert "spin-badge succeeded" in shown and "<svg" in shown and ">x<" in shown
    assert (view.cancel.layout.display, view.retry.layout.display) == ("none", "none")
    again = JobView(site.client, job.id).start()
    wait_for("a second view of the ended job", lambda: again.results.children)
    assert again.steps.value == view.steps.value
    wait_for("no thread outlives the job", lambda: not [t for t in threading.enumerate() if job.id in t.name], 10)


def test_cancel_and_retry_from_the_view(site: Farm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    view = job_view(site.client, site.client.submit("branches", dict(gate=str(gate)))).view
    wait_for("the slow step at work", lambda: re.search(r"spin-badge running", view.steps.value), 60)
    view.cancel.click()
    wait_for("cancelled", lambda: view.job.status == "cancelled" and view.retry.layout.display == "", 30)
    gate.touch()
    view.retry.click()
    wait_for("the result", lambda: view.results.children, 60)


def test_list_is_read_before_the_opened_job_has_been_painted(farm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f, go, paint = farm(TOYS), threading.Event(), JobView.paint
    job = f.client.cancel(f.client.submit("branches", {}).id)

    def late(self: JobView) -> None:
        go.wait(60)
        paint(self)
    monkeypatch.setattr(JobView, "paint", late)
    studio = Studio(f.client, every_s=0.02)
    try:
        wait_for("the last event", lambda: studio.view.followed)
        assert studio.view.job is None
        studio.refresh()
        assert [b.tooltip for b in studio.list.children] == [job.id]
        go.set()
        wait_for("the job", lambda: studio.view.job and studio.view.job.status == "cancelled")
    finally:
        go.set()
        studio.stop.set()
        studio.view.close()


def test_failure_is_shown_with_its_hint_and_numbers(farm: Any) -> None:
    f = farm(TOYS)
    job = f.client.submit("branches", {})
    gates = [dict(name="lip sync", ok=False, value=0.31, limit="at least 0.7")]
    error = dict(type="GateFailed", message="The video <failed>.", hint="Look at the sheet.", fields=dict(gates=gates))
    leased = f.client.journal.lease_jobs("test", 30, 1)[0]
    assert f.client.journal.finish_job(job.id, leased.epoch, "failed", error=error)
    view = job_view(f.client, job.id).view
    wait_for("the error", lambda: view.error.value)
    for told in ("GateFailed", "The video &lt;failed&gt;.", "Look at the sheet.", "lip sync", "0.31"):
        assert told in view.error.value


def test_question_is_put_and_answered_in_the_view(site: Farm) -> None:
    graph = Graph(name="ask", params=(Port(name="text", type="str", default="Hi there"),), nodes=(
        Node(id="ok", step="flow.approve", inputs=dict(prompt="Say this?", show=ParamRef(name="text"))),))
    view = job_view(site.client, site.client.submit(graph, {})).view
    wait_for("the question", lambda: "Say this?" in text_of(view.question) and "Hi there" in text_of(view.question), 60)
    view.question.children[-1].children[1].click()
    wait_for("the job's end", lambda: view.job.status == "succeeded", 60)


def test_outputs_become_players_and_tables(farm: Any, tmp_path: Path) -> None:
    f = farm(TOYS)
    put = f.client.store.put_bytes
    video = result_widget(f.client, "video", put(b"\0\0\0\x18ftypisom", "video/mp4", "v.mp4"))
    assert isinstance(video, W.Video) and video.format == "mp4"
    assert isinstance(result_widget(f.client, "sheet", put(PNG, "image/png", "s.png")), W.Image)
    assert "0.91" in result_widget(f.client, "report", put(b'{"sync": 0.91}', "application/json", "r.json")).value
    assert "42" in result_widget(f.client, "n", 42).value


def test_broken_pipeline_does_not_hide_the_others(farm: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pipelines"
    shutil.copytree(TOYS, folder)
    cell = nbformat.v4.new_code_cell("raise ValueError('half written')", metadata=dict(tags=["pipeline"]))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "broken.ipynb")
    studio = Studio(farm(folder).client)
    assert {v for _, v in studio.which.options} == {"branches", "fan"}
    assert "half written" in studio.broken.value
    studio.stop.set()


def test_page_runs_in_voila_without_an_error(voila: SimpleNamespace) -> None:
    page = httpx.get(voila.url, timeout=90, headers=voila.own).text
    assert "application/vnd.jupyter.widget-view+json" in page
    assert "Traceback" not in page and "error" not in re.findall(r'"output_type": ?"(\w+)"', page)


def in_every_state(site: Farm, gate: Path) -> set[str]:
    "Jobs in every state that a job can be in, the newest of which is queued; conductor and worker have ended."
    c = site.client
    assert site.done(c.submit("branches", {}).id).status == "succeeded"
    c.cancel(c.submit("branches", dict(gate=str(gate))).id)
    ask = Graph(name="ask", nodes=(Node(id="ok", step="flow.approve", inputs=dict(prompt="Go on?")),))
    no, asked = c.submit(ask, {}), c.submit(ask, {})
    for o in (no, asked): wait_for("the question", lambda o=o: c.job(o.id).status == "waiting")
    c.approve(no.id, "ok", approved=False)
    assert site.done(no.id).status == "failed"
    held = c.submit("branches", dict(gate=str(gate)))
    wait_for("a step at work", lambda: (r := site.step(held.id, "slow")) and r.status == "running")
    for name in ("control", "w1"): site.kill(name)
    c.submit("branches", {})
    return {j.status for j in c.jobs()}


if BROWSER or os.environ.get("CI"):  # elsewhere the page is still executed by Voila in the test above
    @pytest.mark.timeout(600)
    def test_page_shows_its_form_each_time_whatever_the_newest_job_does(voila: SimpleNamespace, tmp_path: Path) -> None:
        from playwright.sync_api import expect, sync_playwright
        site = voila.site
        assert in_every_state(site, tmp_path / "gate") == {"queued", "running", "waiting", "succeeded", "failed", "cancelled"}
        jobs = site.client.jobs()
        with sync_playwright() as p, p.chromium.launch(executable_path=BROWSER, args=[*FLAGS]) as browser:
            context = browser.new_context()
            expect.set_options(timeout=90_000)
            context.new_page().goto(f"{voila.url}/health?token={voila.token}")
            for n in range(0, 20, 2):  # two at a time
                pages = []
                for i in range(n, n + 2):
                    job = jobs[i % len(jobs)]
                    pages.append((context.new_page(), job))
                    pages[-1][0].goto(f"{voila.url}/?job={job.id}" if i % 3 else voila.url, wait_until="commit")
                for i, (page, job) in enumerate(pages, n):
                    expect(page.locator("button.spin-go")).to_have_text("Run Branches")
                    expect(page.locator(".spin-job p .spin-badge").first).to_have_text((job if i % 3 else jobs[0]).status)
                    expect(page.locator("button.spin-row")).to_have_count(len(jobs))
                    assert "Traceback" not in page.content()
                    page.close()

    def test_person_makes_reloads_cancels_and_retries_in_a_browser(voila: SimpleNamespace, tmp_path: Path) -> None:
        from playwright.sync_api import expect, sync_playwright
        site, gate, asked = voila.site, tmp_path / "gate", []
        photo = tmp_path / "photo.png"
        Image.frombytes("RGB", (2048, 2048), os.urandom(2048 * 2048 * 3)).save(photo, compress_level=0)
        with sync_playwright() as p, p.chromium.launch(executable_path=BROWSER, args=[*FLAGS]) as browser:
            page = browser.new_page(viewport=dict(width=1280, height=1000))
            page.set_default_timeout(90_000)
            expect.set_options(timeout=60_000)
            page.on("request", lambda r: asked.append(r.url))
            page.goto(f"{voila.url}/?token={voila.token}")
            expect(page).to_have_url(f"{voila.url}/")
            expect(page.locator("button.spin-go")).to_have_text("Run Branches")
            page.locator("textarea").first.fill(str(gate))
            page.keyboard.press("Tab")
            page.locator("button.spin-go").click()
            expect(page.locator(".spin-job h1")).to_have_text("Branches")
            expect(page.locator(".spin-steps .spin-badge.running")).to_have_count(1)
            page.get_by_text("Cancel", exact=True).click()
            expect(page.locator(".spin-job p .spin-badge")).to_have_text("cancelled")
            gate.touch()
            page.get_by_text("Retry", exact=True).click()
            expect(page.locator(".spin-job p .spin-badge")).to_have_text("succeeded")
            job = site.client.jobs()[0]
            page.goto(f"{voila.url}/?job={job.id}")
            expect(page.locator(".spin-job code")).to_have_text(job.id)
            expect(page.locator(".spin-job p .spin-badge")).to_have_text("succeeded")
            expect(page.locator(".spin-job svg")).to_be_visible()
            page.locator(".spin-card select").first.select_option("Photo")
            with page.expect_file_chooser() as chooser: page.get_by_text("Choose a file").click()
            chooser.value.set_files(photo)
            expect(page.locator(".spin-field img")).to_be_visible()
            page.locator("button.spin-go").click()
            expect(page.locator(".spin-job h1")).to_have_text("Photo")
            expect(page.locator(".spin-job p .spin-badge")).to_have_text("succeeded")
            page.screenshot(path=tmp_path / "studio.png")
        assert [u for u in asked if not u.startswith((voila.url, "data:", "blob:"))] == [], "nothing is fetched elsewhere"
        second, first = site.client.jobs()
        assert (first.status, first.params["gate"]) == ("succeeded", str(gate))
        assert second.params["picture"].size == photo.stat().st_size
