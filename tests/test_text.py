"""csm_tools.text: typed text to spoken words, and to sentences."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from csm_tools.text import LONGEST, PAUSES, sentences, spoken

HERE = Path(__file__).parent


def table():
    """Read tests/spoken.txt: a typed line, then the spoken one, indented; `\\n` is a line break in both."""
    lines = (HERE / "spoken.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) % 2 == 0 and all(line.startswith("    ") for line in lines[1::2])
    return [(typed.replace("\\n", "\n"), said[4:].replace("\\n", "\n")) for typed, said in zip(lines[::2], lines[1::2])]


@pytest.mark.parametrize("typed, said", table())
def test_spoken(typed, said):
    assert spoken(typed) == said
    assert spoken(said) == said


def test_the_table_is_long_and_nothing_that_is_said_has_signs():
    rows = table()
    assert len(rows) >= 150
    latin = [said for typed, said in rows if typed.isascii() and typed != said and "<" not in typed]
    assert len(latin) > 100
    for said in latin:
        assert not set(said) & set("0123456789#$%&*+/<=>@[]^_`{|}~()"), said


def test_the_docs_table_is_true():
    rows = [
        line.strip("| \n").split(" | ")
        for line in (HERE.parent / "docs/text.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and ";" in line
    ]
    checked = 0
    for typed, said in rows:
        typed, said = typed.split("; "), said.replace(" (both)", "; August seventeenth, twenty twenty-six").split("; ")
        if len(typed) == len(said) and not set("".join(typed)) & set("`&“"):
            sayings = [spoken(part).rstrip(".").lower() for part in typed]
            assert sorted(sayings) == sorted(part.lower() for part in said)
            checked += len(typed)
    assert checked > 40


def test_ordinary_prose_is_unchanged():
    prose = (HERE / "prose.txt").read_text(encoding="utf-8")
    lines = [line for line in prose.splitlines() if line]
    assert len(lines) >= 300
    for line in lines:
        assert spoken(line) == line
    assert spoken(prose) == prose


def test_emoji_may_be_named():
    assert spoken("Well done 🎉!") == "Well done!"
    assert spoken("Well done 🎉!", emoji=True) == "Well done, party popper!"
    assert spoken("👍🏽 and ❤️", emoji=True) == "thumbs up sign, and, heavy black heart"


@pytest.mark.parametrize("joint", [" ", "\n", "\n\n", ". ", ", ", ""])
def test_spoken_is_idempotent_for_texts_side_by_side(joint):
    rows = [typed for typed, _ in table()]
    for first, second in zip(rows, rows[7:] + rows[:7]):
        said = spoken(first + joint + second)
        assert spoken(said) == said, (first, second)


ADVERSARIAL = """
1 1, 1,111, 1- 1: 1. 1/2. $1, 5km+ 1^2 ½ ( ) ()[] {[( * _ a_ ** ~~ ` < <b <!-- > &amp; & @ a@b. a.com. http://
/ # 😀 … . ... ' " “ — -- - = => | |a|b 。 ؟ \\* [a]( ![[ [^1] [1] :) [pause:1] [pause: <break
f1 f 0x1 1e1 1.1. 1,11, 1_000 <a> 2x4s B-1 1" 1° ₂ ¹ √ v. John1:1 MM 1/ x- 12"a 1st/
""".split()
ADVERSARIAL += [
    "a. ",
    "1 ",
    "A ",
    "AB ",
    "Mr. ",
    "St. ",
    "12 Main ",
    "Jan 5, ",
    "1 x ",
    "- ",
    "> ",
    "1. ",
    "a-\n",
    "A\n",
    "1 000 ",
    "5 mg/",
    "4x - ",
    "a $5 ",
    "1-800-A",
    "p.m. ",
]
ADVERSARIAL += ["\n", " \n", " ", "\n\n", "|a|b|\n", "-|-\n", "[a]: b\n", "# a\n", ". ", "word ", "x" * 60 + " "]


@pytest.mark.parametrize("function", [spoken, sentences])
@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_time_is_proportional_to_length(function, piece):
    def seconds(n):
        return timed(function, (piece * n)[:n] + "z")

    little = max(seconds(1_500), seconds(1_500), 0.001)
    assert seconds(12_000) < 32 * little  # 8 times as much text; squared it would be 64 times as long


def timed(function, text):
    start = time.process_time()
    function(text)
    return time.process_time() - start


def test_the_import_is_light():
    code = "import sys, csm_tools.text; print(*{'csm', 'mimi', 'mlx', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr


# ------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    "text, expected",
    [
        ("This is the first one. And this is the second! Is this the third?", 3),
        ("Mr. Smith met Dr. Jones in St. Paul at noon. Both of them were late.", 2),
        ("Pi is 3.14159 and e is 2.71828 or so. That is version 1.2.3 of it.", 2),
        ("J. R. R. Tolkien wrote it for his children. It was a long book.", 2),
        ('"Stop right there!" he cried out loud. "I will not," she said to him.', 2),
        ("They came from the U.S. and the U.K. to see it. Nobody knew why.", 2),
        ("He waited for a while ... and then he left us. That was all.", 2),
        ("“Where are you going?” asked the old man. The boy did not answer.", 2),
        ("See fig. 3 on the next page, e.g. the left half. It is quite small.", 2),
        ("no end mark at all and nothing but small letters", 1),
        ("A title without an end\n\nAnd a paragraph that follows it.", 2),
        ("这是第一句话，它说得比较长一点。这是第二句话，它也说得比较长一点！", 2),
        ("Short. Words. Are. Said. Together. Here in one go.", 2),
        ("*** \n\n --- \n\n ... \n\n ______", 0),
        ("It was written by J.R.R. Tolkien in the year 1937. He served in the U.S. Army for ten years.", 2),
        ("They met again at 5 p.m. Then they went home, to No. 12 Park Rd. in town.", 2),
        ("He looked at me and said no. Then he simply left the room. We sat in the hot sun. Nobody spoke.", 4),
        ("It happened on Jan. 5 in the rain. They met Messrs. Brown and Maj. Tom there.", 2),
        ("It rained all through the night.[1] The river rose by a metre.[2] People left.", 3),
        ("1. Take the eggs and the milk. 2. Break them into a bowl.", 2),
        ("i went home early that day. then i slept until noon.", 2),
        ("“Yes.” He nodded, and then he left the room.", 1),
        ("." * 20_000 + "x", 1),
    ],
)
def test_sentences(text, expected):
    parts = sentences(text)
    assert len(parts) == expected, parts
    letters = [c for c in text if c.isalnum()]
    assert not parts or [c for part, _ in parts for c in part if c.isalnum()] == letters  # nothing lost
    assert all(part in " ".join(text.split()) for part, _ in parts)  # nothing changed


def test_long_sentences_are_cut():
    comma = "word " * 30 + "end, " + "more " * 40 + "end"
    for text in (comma, "word " * 200, "x" * 1000):
        parts = sentences(text)
        assert 1 < len(parts) and max(len(p) for p, _ in parts) <= LONGEST
        assert "".join(p for p, _ in parts).replace(" ", "") == text.replace(" ", "")
    assert sentences(comma)[0][0].endswith("end,")
    for text in ("word " * 40 + "about 12,345,678 people " * 8, "see http://example.com/a,b for " * 12):
        for part, _ in sentences(text):
            assert all(w in text.split() for w in part.split()), part  # no word is cut
    pauses = [pause for _, pause in sentences(f"{comma}. And then another one.\n\nA new paragraph.")]
    assert pauses == [0.05, 0.25, 0.7, 0.7]


def parts(text, **options):
    return [part for part, _ in sentences(text, **options)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("She has cover (eg. Dental and more) for a year. It is fine.", 2),
        ("It is for all, ie. Everybody in the house. That is a lot.", 2),
        ("They saw John Smith, a.k.a. The Boss of it all. He was not amused.", 2),
        ("There was laughter, and then . . . silence fell over the room. Nobody moved.", 2),
        ("there was laughter, and then . . . silence fell over the room. nobody moved.", 2),
        ("यह पहला वाक्य है और थोड़ा लंबा है। यह दूसरा वाक्य है और लंबा है।", 2),
        ("كيف حالك اليوم يا صديقي العزيز؟ أنا بخير شكرا جزيلا لك يا أخي.", 2),
        ("یہ پہلا جملہ ہے اور ذرا لمبا ہے۔ یہ دوسرا جملہ ہے اور لمبا ہے۔", 2),
    ],
)
def test_ends_of_sentences(text, expected):
    assert len(parts(text)) == expected, parts(text)


def test_a_line_break_that_is_meant_ends_a_sentence():
    wrapped = (
        "It was a long and tiresome journey, and by the time that we arrived in the\n"
        "Old Town the inn was shut. We slept in the barn, for which the owner asked\n"
        "5 shillings, and went on in the morning."
    )
    assert len(parts(wrapped)) == 2 and " the Old Town " in parts(wrapped)[0]
    assert parts("The History of the World\nIt began with a very large explosion, as far as anybody can tell.") == [
        "The History of the World",
        "It began with a very large explosion, as far as anybody can tell.",
    ]
    assert parts("# A heading of some words\nThe text that follows it.") == [
        "# A heading of some words",
        "The text that follows it.",
    ]
    assert len(parts("- the first item of a list\n- the second item of a list\n  which goes on here")) == 2
    assert parts("1. the first item of a list\n2. the second item of a list")[1].startswith("2.")
    assert parts("Kind regards,\nAnna") == ["Kind regards, Anna"]
    assert parts("milk\neggs\nbread\nbutter and jam") == ["milk. eggs. bread. butter and jam"]


def test_a_word_cut_by_a_line_break_is_whole():
    assert parts("This is a fine exam-\nple of it.") == ["This is a fine example of it."]
    assert parts("He was a self-\nmade man, twenty-\none years old.") == [
        "He was a self-made man, twenty-one years old."
    ]
    assert parts("It goes from A-\nB and on.") == ["It goes from A- B and on."]


@pytest.mark.parametrize(
    "pause, seconds",
    [
        ("[pause:1.5]", 1.5),
        ("[pause: 2s]", 2),
        ("[PAUSE 500ms]", 0.5),
        ("[pause:999]", 10),
        ('<break time="1.5s"/>', 1.5),
        ('<break strength="strong" time="250ms" />', 0.25),
        ("<break/>", PAUSES["paragraph"]),
        ("[pause:1][pause:.5]\n\n[pause:1]", 2.5),
        ("[pause:6] [pause:6]", 10),
    ],
)
def test_pauses(pause, seconds):
    text = f"Wait a moment. Wait {pause} for it to begin."
    expected = [("Wait a moment. Wait", seconds), ("for it to begin.", PAUSES["paragraph"])]
    assert sentences(text) == sentences(spoken(text)) == expected
    assert sentences(f"{pause} Hello there. {pause}") == [("Hello there.", seconds)]
    assert sentences(pause) == []


def test_what_is_no_pause():
    assert parts("[pause:x] and so") == ["[pause:x] and so"]


def test_longest():
    text = "word " * 40 + "end."
    for longest in (40, 80, 240, 10_000):
        assert max(map(len, parts(text, longest=longest))) <= longest
        assert " ".join(parts(text, longest=longest)) == text
    assert len(parts(text, longest=80)) == 3
    assert parts("She keeps all the keys and has never turned anybody away.", longest=55) == [
        "She keeps all the keys and has never turned",
        "anybody away.",
    ]
    assert parts("x" * 50 + " away.", longest=52) == ["x" * 50, "away."]  # no word is cut


@pytest.mark.parametrize(
    "text", ["", " ", "🎉 👍", "?!", "* * *", "---", "…", "“”", "[pause:2]", "&nbsp;", "<br>", ":-)"]
)
def test_nothing_to_say(text):
    assert sentences(spoken(text)) == []


def test_an_items_number_stays_with_its_item():
    text = spoken(
        "Ingredients are these:\n- 2 cups of white flour\n1. Mix them all in a bowl.\n2. Bake them for an hour."
    )
    assert [part for part, _ in sentences(text)][1:] == [
        "Two cups of white flour.",
        "One. Mix them all in a bowl.",
        "Two. Bake them for an hour.",
    ]
