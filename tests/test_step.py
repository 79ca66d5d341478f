"The step contract by hand, under papermill's own engine, and what it refuses."
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import papermill
import pytest

from myspinbot.core import InputError, StepFailed
from myspinbot.executor.step import Step, enter, preview_jpeg

NOTEBOOKS = Path(__file__).parent / "notebooks"


@pytest.fixture
def by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPIN_STEP_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def on_worker(tmp_path: Path):
    outputs = {"image": "image/png", "total": "int", "score": "float", "parts": "list[image/png]", "facts": "Data"}
    enter(dict(step="toy.toy", folder=str(tmp_path), outputs=outputs))
    yield tmp_path
    enter(None)


def events(folder: Path) -> list[dict]:
    return [json.loads(o) for o in (folder / "events.jsonl").read_text().splitlines()]


def test_step_notebook_under_papermills_own_engine(by_hand: Path):
    nb = papermill.execute_notebook(str(NOTEBOOKS / "step_toy.ipynb"), str(by_hand / "out.ipynb"),
                                    dict(text="by papermill", shade=7), progress_bar=False)
    done = json.loads((by_hand / "toy.toy/outputs.json").read_text())
    assert done == {"image": "toy.png", "total": 3, "facts": done["facts"]}
    bars = [o.data["text/html"] for c in nb.cells if c.cell_type == "code" for o in c.outputs if "data" in o and
            "text/html" in o.data]
    assert len(bars) == 1 and "100% done" in bars[0], "one bar, updated in place"


def test_by_hand_in_a_plain_process_needs_no_ipython(by_hand: Path):
    code = "from myspinbot import Step; s = Step('toy.plain'); s.progress(1, 'done'); s.output(x=1)"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "toy.plain 100% done" in r.stderr
    assert json.loads((by_hand / "toy.plain/outputs.json").read_text()) == {"x": 1}


def test_importing_the_step_contract_is_light():
    heavy = ("torch", "av", "cv2", "numpy", "redis", "psycopg", "minio", "papermill", "IPython", "PIL", "matplotlib")
    code = f"import sys, myspinbot.executor.step; print(sorted(set(m.split('.')[0] for m in sys.modules) & set({heavy})))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_second_run_by_hand_forgets_the_first_ones_outputs(by_hand: Path):
    Step("toy.again").output(x=1)
    Step("toy.again").output(y=2)
    assert json.loads((by_hand / "toy.again/outputs.json").read_text()) == {"y": 2}


def test_progress_for_every_frame_is_throttled_and_the_end_is_told(on_worker: Path):
    step = Step("toy.toy")
    for i in range(5000): step.progress(i / 5000, f"frame {i}")
    step.progress(1.0, "done")
    found = events(on_worker)
    assert len(found) < 100
    assert found[-1]["body"] == {"fraction": 1.0, "note": "done"}


def test_held_back_progress_goes_out_with_the_output(on_worker: Path):
    step = Step("toy.toy")
    step.progress(0.1)
    step.progress(0.9, "nearly")
    step.output(total=1)
    assert events(on_worker)[-1]["body"] == {"fraction": 0.9, "note": "nearly"}


@pytest.mark.parametrize("given, expected", [(-3, 0.0), (7, 1.0), (0.5, 0.5)])
def test_progress_is_clipped(on_worker: Path, given: float, expected: float):
    Step("toy.toy").progress(given)
    assert events(on_worker)[-1]["body"]["fraction"] == expected


def test_progress_that_is_no_number_is_refused(on_worker: Path):
    with pytest.raises(StepFailed, match="not a number"): Step("toy.toy").progress(float("nan"))


def test_preview_is_a_small_jpeg(on_worker: Path):
    from PIL import Image
    Step("toy.toy").progress(0.5, "look", preview=np.zeros((900, 600, 4), np.uint8))
    preview = next(e for e in events(on_worker) if e["kind"] == "preview")["body"]
    picture = Image.open(io.BytesIO(base64.b64decode(preview["image"])))
    assert picture.format == "JPEG" and max(picture.size) == 320


@pytest.mark.parametrize("picture", ["no such file.png", np.zeros((2, 2, 7), np.uint8), object(), np.zeros((0, 0, 3))])
def test_what_is_no_picture_is_refused(picture: object):
    with pytest.raises(InputError, match="Not a picture"): preview_jpeg(picture)


def test_preview_leaves_the_callers_picture_alone():
    from PIL import Image
    picture = Image.new("RGB", (1000, 500))
    preview_jpeg(picture)
    assert picture.size == (1000, 500)


def test_long_log_text_is_cut_and_odd_characters_survive(on_worker: Path):
    step = Step("toy.toy")
    step.log("x" * 100_000)
    step.log("naïve \ud800 \0 \n second line")
    long, odd = [e["body"]["text"] for e in events(on_worker)]
    assert len(long) < 4100
    assert "second line" in odd


@pytest.mark.parametrize("values, said", [
    (dict(nothing=1), "declares no output 'nothing'"),
    (dict(total=True), "declared int, got bool"),
    (dict(total="3"), "declared int, got str"),
    (dict(score=float("nan")), "Not a JSON value"),
    (dict(image=b"bytes"), "is a file"),
    (dict(image="missing.png"), "no such file"),
    (dict(parts="one.png"), "Give a list"),
])
def test_output_that_was_not_declared_so_is_refused(on_worker: Path, values: dict, said: str):
    with pytest.raises(StepFailed, match=said): Step("toy.toy").output(**values)
    assert not (on_worker / "outputs.json").exists()


def test_empty_file_is_no_output(on_worker: Path):
    step = Step("toy.toy")
    step.path("empty.png").touch()
    with pytest.raises(StepFailed, match="is empty"): step.output(image=step.path("empty.png"))


def test_files_from_elsewhere_are_copied_in(on_worker: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other") / "deep.png"
    other.write_bytes(b"picture")
    Step("toy.toy").output(parts=[str(other), other], facts={"a": [1]})
    found = json.loads((on_worker / "outputs.json").read_text())
    assert found == {"parts": ["parts_0.png", "parts_1.png"], "facts": "facts.json"}
    assert (on_worker / "parts_1.png").read_bytes() == b"picture"


@pytest.mark.parametrize("name", ["", "..", "a/b.png", "/etc/passwd", "nul\0.png", "outputs.json"])
def test_path_takes_plain_file_names_only(on_worker: Path, name: str):
    with pytest.raises(InputError, match="Not a file name"): Step("toy.toy").path(name)


def test_notebook_whose_id_differs_from_its_metadata_is_told(on_worker: Path):
    with pytest.raises(InputError, match=r"runs as step 'toy\.toy'"): Step("toy.other")


def test_input_is_the_given_file_or_the_sample(by_hand: Path, monkeypatch: pytest.MonkeyPatch):
    step = Step("toy.toy")
    (by_hand / "given.json").write_text("1")
    monkeypatch.chdir(by_hand)
    assert step.input("given.json", default="missing") == by_hand / "given.json"
    assert step.input("", default=by_hand / "given.json") == by_hand / "given.json"
    with pytest.raises(InputError, match="No such file: 'missing'") as e: step.input("missing", default="given.json")
    assert e.value.fields["path"] == "missing"
    with pytest.raises(InputError, match="Not a file"): step.input(os.curdir)
