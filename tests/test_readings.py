"""What is written is spoken as an American narrator reads it, with the time of each word, and nothing is lost without a note."""
import csv
import json
import re
import string
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as hs

from myspinbot.graph.catalogue import Catalogue
from myspinbot.core import InputError, settings
from myspinbot.media import speech
from myspinbot.language.reading import plain_letters, read_aloud, read_pronunciations, reading
from myspinbot.jobs.local import LocalRunner
from myspinbot.schema import Graph, Node, ParamRef, Port, PortRef
from myspinbot.media.speech import load_voice, speak
from myspinbot.language.text import clean_text, plain_text, split_sentences

ROOT = Path(__file__).parents[1]
LEAST = 0.9
with open(Path(__file__).parent / "data" / "readings.tsv", encoding="utf-8") as f:
    LINES = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


def heard(text: str) -> str:
    "What an ear can tell apart: no capitals, no punctuation, no accents that English does not know."
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w\s']", " ", plain.replace("-", " ")).split())


def spoken(text: str) -> str: return " ".join(reading(line) for line in re.split(r"\n+", clean_text(text)))


def test_nine_of_ten_texts_are_read_as_a_narrator_reads_them():
    wrong, kinds = [], {}
    for line in LINES:
        got = spoken(line["text"].replace(r"\n", "\n"))
        right = heard(got) in {heard(o) for o in line["reading"].split("|")}
        kinds.setdefault(line["kind"], []).append(right)
        if not right: wrong.append(f"{line['kind']}: {line['text']!r} is read {got!r}, not {line['reading']!r}")
    share = 1 - len(wrong) / len(LINES)
    print(f"\n{share:.1%} of {len(LINES)} texts are read right;", ", ".join(f"{k} {sum(v)}/{len(v)}" for k, v in kinds.items()))
    print(*wrong, sep="\n")
    assert len(LINES) >= 150 and len(kinds) >= 12
    assert share >= LEAST, "\n".join(wrong)


# --- words and their times

TEXTS = [
    "It costs $5.99, and 50% of the people in the U.S. would have been there by 3:30 pm.",
    "See https://example.com/docs or write to jane.doe@mail.co.uk — now!",
    "# Title\n\n1. **One** of the 1,234,567.89 items.\n2. Two\n\n- a\n- b\n\nThe end of it.",
    "Nguyễn, Łódź, Þór; AT&T, C++ (and B2B) \"quoted\" it's John's we'll o'clock",
    "of the in the to the on the with a for the and the I am that is it was",
    "xlsx FBI NASA HTML5 mp3 well-known mother-in-law and/or ... wait -- what?!",
    "word " * 300, "a" * 90, "1234567890" * 5, "Hm. Mm. Shh. Psst!", "5", "α", "( - ) one"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t[:24])
def test_every_word_has_a_time_of_its_own_in_its_sentence(text, tmp_path):
    doc = speak(text, tmp_path / "a.wav")
    words, said = doc["words"], [re.sub(r"^\W+|\W+$", "", o) for o in doc["text"].split()]
    assert [w["text"] for w in words] == [o for o in said if o]
    assert all(w["start_s"] < w["end_s"] for w in words)
    assert all(a["end_s"] <= b["start_s"] for a, b in pairwise(words))
    for i, s in enumerate(doc["sentences"]):
        own = [w for w in words if w["sentence"] == i]
        assert own[0]["start_s"] == s["start_s"] and own[-1]["end_s"] == s["end_s"]
        assert heard(" ".join(w["written"] for w in own)) == heard(s["text"])


def test_a_word_sounds_when_its_sounds_do(tmp_path):
    doc = speak("Bob met Ann in the zoo of Ohio.", tmp_path / "a.wav")
    sounds = lambda w: "".join(p["phoneme"] for p in doc["phonemes"] if w["start_s"] <= p["start_s"] < w["end_s"]
                               and p["phoneme"] != "_")
    assert [sounds(w) for w in doc["words"] if w["text"] in ("Bob", "met", "Ann", "zoo", "Ohio")] == ["bɑb", "mɛt", "æn", "zu",
                                                                                                      "oʊhaɪoʊ"]


def test_what_is_written_stands_at_the_first_of_its_words(tmp_path):
    words = speak("He paid $5.99 — twice.", tmp_path / "a.wav")["words"]
    assert [(w["text"], w["written"]) for w in words] == [
        ("He", "He"), ("paid", "paid"), ("five", "$5.99 —"), ("dollars", ""), ("ninety-nine", ""), ("cents", ""),
        ("twice", "twice.")]


# --- letters

LATIN = [c for c in map(chr, range(0x80, 0x30000))
         if unicodedata.category(c)[0] == "L" and unicodedata.name(c, "").startswith("LATIN")]


def test_no_latin_letter_is_spelled_by_its_code():
    voice = load_voice()
    lost = [c for c in LATIN if not plain_letters(c).strip()]
    assert not lost, lost
    for start in range(0, len(LATIN), 60):
        part = LATIN[start:start + 60]
        said = ["".join(o) for o in voice.piper.phonemize(", ".join(f"ba{plain_letters(c)}a" for c in part))]
        groups = [o for s in said for o in s.split(", ")]
        assert len(groups) == len(part)
        assert not (coded := [c for c, o in zip(part, groups, strict=True) if re.search("l.?.?ɛɾɚ", o)]), coded


def test_a_vietnamese_name_is_a_word(tmp_path):
    doc = speak("Nguyễn Thị Phượng", tmp_path / "a.wav")
    assert [w["text"] for w in doc["words"]] == ["Nguyen", "Thi", "Phuong"] and doc["notes"] == []
    assert [w["written"] for w in doc["words"]] == ["Nguyễn", "Thị", "Phượng"]


# --- sentences, lists, Markdown

@pytest.mark.parametrize("text, sentences", [
    ("The U.S. Army. No. 5 is alive. Gen. Lee rode.", ["The U.S. Army.", "No. 5 is alive.", "Gen. Lee rode."]),
    ("He lives in the U.S. He likes it.", ["He lives in the U.S.", "He likes it."]),
    ("It is approx. 5 km. See Fig. 3, vol. 2, pp. 5-10. Ok.", ["It is approx. 5 km.", "See Fig. 3, vol. 2, pp. 5-10.", "Ok."]),
    ("No. That is wrong. I met Mr. and Mrs. Jones on Main St. They left.",
     ["No.", "That is wrong.", "I met Mr. and Mrs. Jones on Main St.", "They left."]),
    ("Visit example.com. It is v2.1.0. Ok?", ["Visit example.com.", "It is v2.1.0.", "Ok?"]),
    ("(He left.) She stayed.", ["(He left.)", "She stayed."]), ("In 2026. 5 came.", ["In 2026.", "5 came."])])
def test_abbreviations_do_not_end_sentences(text, sentences):
    assert [p.text for p in split_sentences(clean_text(text))] == sentences


def test_a_pause_follows_each_item_and_each_heading(tmp_path):
    doc = speak("# Fruit\n- apples\n- pears\n\nThat is all.", tmp_path / "a.wav", pause_s=0.4)
    assert [s["text"] for s in doc["sentences"]] == ["Fruit", "apples", "pears", "That is all."]
    pauses = [round(b["start_s"] - a["end_s"], 2) for a, b in pairwise(doc["sentences"])]
    assert pauses == [0.88, 0.4, 0.88]
    assert doc["text"] == "Fruit\n\napples pears\n\nThat is all."


@pytest.mark.parametrize("text", [
    "snake_case_name", "5 * 3 * 2", "2*3*4", "C#", "#1", "#hashtag", "a < b > c", "x_1 and _y", "-5 degrees", "1986. Great.",
    "1) one", "AT&T", "f(x) = y", "a | b", "[Narrator]: Welcome", "~5", "C:\\Users\\bob", "* one star", "<nobody> said", "100%",
    "2026. That was it.", "a*b", "5*x", "(a) [b] {c}", "a~b~c", "1. one\n3. three", "\tindented", "    four spaces",
    "__init__.py", "E = mc²"])
def test_what_only_looks_like_markdown_loses_no_word(text):
    kept = re.findall(r"[^\W_]+", clean_text(text))
    assert kept == re.findall(r"[^\W_]+", text)


# --- notes

@pytest.mark.parametrize("text, notes", [
    ("Hello 👋🏽 👋 world ⊕", ["Not spoken: 👋 (2 times), ⊕."]), ("Plain.", []), ("One 🎉.", ["Not spoken: 🎉."]),
    ("Do this:\n\n```\nx = 1\ny = 2\n```\n", ["A block of code with 2 lines is left out."]),
    ("30 ℃, 86 ℉, 25 ㎡, 3 ㎏, № 7", []), ("The angle α is 5 μm.", ["α: read by name."])])
def test_notes_name_what_is_not_spoken(text, notes, tmp_path):
    assert speak(text, tmp_path / "a.wav")["notes"] == notes


def test_every_sign_is_spoken_or_noted():
    for c in [*string.punctuation, *"§¶†‡•·¡¿«»‹›„“”‘’…–—°©®™€£¥¢¤≈≠≤≥±×÷√∞∑∏∂∫→←↑↓⇒★☆✓✗♥♪¼½¾⅓²³¹₂ªº"]:
        dropped: list[str] = []
        plain = plain_text(f"one {c} two")
        said = " ".join(u.spoken for line in plain.paragraphs for u in read_aloud(" ".join(line), (), dropped))
        assert heard(said).startswith("one") and heard(said).endswith("two"), (c, said)
        sign = unicodedata.category(c) in ("Sm", "Sc", "So", "No")
        assert not sign or heard(said) != "one two" or c in dropped + plain.dropped or c in "`^~|<>", (c, said)


# --- lists of pronunciations

def test_a_list_says_how_words_are_spoken(tmp_path):
    doc = speak("A GIF by Nguyễn, for Москва.", tmp_path / "a.wav", pronunciation="GIF=jif\nnguyễn=win; Москва = Moscow")
    assert doc["text"] == "A jif by win, for Moscow." and doc["notes"] == []
    assert [w["written"] for w in doc["words"]] == ["A", "GIF", "by", "Nguyễn,", "for", "Москва."]


@pytest.mark.parametrize("bad", ["GIF", "GIF=", "=jif", "GIF=?", "GIF=жиф", "\n".join(f"w{i}=x" for i in range(2001))])
def test_a_bad_list_is_refused_and_leaves_no_file(bad, tmp_path):
    with pytest.raises(InputError) as e: speak("A GIF.", tmp_path / "a.wav", pronunciation=bad)
    assert e.value.hint and len(str(e.value)) < 300 and not list(tmp_path.iterdir())


SAY = Graph(name="say", params=(Port(name="list", type="str", default=""),),
            nodes=(Node(id="speech", step="speech.piper", inputs=dict(text="A GIF.", pronunciation=ParamRef(name="list"))),),
            outputs=dict(phonemes=PortRef(node="speech", port="phonemes")))


def test_a_changed_list_is_not_answered_from_the_cache(tmp_path, monkeypatch):
    said = []
    for here, own in (("", ""), ("GIF=jif", ""), ("GIF=jif", ""), ("GIF=gift", ""), ("GIF=gift", "GIF=jif"), ("", "")):
        monkeypatch.setenv("SPIN_PRONUNCIATION", here)
        settings.cache_clear()
        runner = LocalRunner(Catalogue(ROOT / "pipelines"), tmp_path / "home")
        try: lj = runner.run(SAY, dict(list=own))
        finally:
            runner.close()
            monkeypatch.undo()
            settings.cache_clear()
        assert lj.job.status == "succeeded", lj.job.error
        said.append((json.loads(runner.store.found(lj.job.outputs["phonemes"]).read_text())["text"], lj.rows["speech"].status))
    assert said == [("A GIF.", "succeeded"), ("A jif.", "succeeded"), ("A jif.", "cached"), ("A gift.", "succeeded"),
                    ("A jif.", "succeeded"), ("A GIF.", "cached")]


def test_the_list_of_the_control_process_counts_and_not_the_worker_s(farm):
    f = farm(ROOT / "pipelines")
    said = []
    for here in ("GIF=jif", "GIF=gift"):
        f.start(f"control {here}", SPIN_PRONUNCIATION=here)
        if "w1" not in f.procs: f.start("w1", SPIN_PRONUNCIATION="GIF=wrong")
        job = f.done(f.client.submit(SAY, {}).id)
        assert job.status == "succeeded", job.error
        said.append(json.loads(f.client.file(job.outputs["phonemes"]).read_text())["text"])
        f.kill(f"control {here}")
    assert said == ["A jif.", "A gift."]


# --- texts of any sort

SIGNS = "abcAIXV019 .,;:!?-–—'\"()[]{}*_#`~<>|\\/@&$€£%°²½+=^…ẽ№αß¢ "


@given(hs.text(SIGNS, min_size=1, max_size=60))
def test_units_give_the_sentence_again(text):
    units = read_aloud(text)
    assert " ".join(" ".join(u.written for u in units).split()) == " ".join(text.split())
    assert all(w.strip() for u in units for w in u.words)


@given(hs.text(SIGNS + "\n\t😀", min_size=1, max_size=80))
def test_any_mixture_of_signs_is_prepared_or_refused(text):
    try: pieces = split_sentences(clean_text(text))
    except InputError as e: assert e.hint
    else: assert pieces[-1].then == "end" and all(any(c.isalnum() for c in p.text) for p in pieces)


def test_twenty_thousand_signs_take_no_long_time():
    for part in ("1 ", "1-", "a.", "a-", "a@", "[", "![[", "*", "- a\n", "IX ", "5 kg/", "$1-", "U."):
        began = time.process_time()
        try:
            for p in split_sentences(clean_text((part * 20_000)[:20_000])): read_aloud(p.text)
        except InputError as e: assert "can be spoken" in e.message
        assert time.process_time() - began < 10, part


@pytest.mark.parametrize("text", ["√" * 399 + "2", "9" * 300, "Hi " + "=" * 3])
def test_what_is_long_when_spoken_is_spoken_in_short_pieces(text: str):
    _, units, _ = speech._prepare(text, "Hi=" + "word " * 39)
    assert max(sum(len(u.spoken) + 1 for u in o) for o in units) <= 401
    assert "".join(u.written for o in units for u in o).replace(" ", "") == text.replace(" ", "")


def test_a_long_pronunciation_is_refused():
    with pytest.raises(InputError, match="'Hi' has 1,499 characters; 200 are the limit"):
        read_pronunciations("Hi=" + "word " * 300)


ODD = ["![" * 9990, "<?" * 9990, "<!--" * 4990, "word! " * 3300, "a. " * 6600, "“" * 19000]


@pytest.mark.parametrize("text", ODD, ids=lambda t: t[:4])
def test_any_text_is_split_in_little_time(text: str):
    began = time.process_time()
    pieces = split_sentences(clean_text(text + " word"))
    assert pieces[-1].text.rstrip().endswith("word") and time.process_time() - began < 10
