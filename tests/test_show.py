"""The picture of a run is correct and legible."""

import io
import re
import warnings
from pathlib import Path

import csm  # before mlx
import mimi
from csm_tools import show

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from conftest import clip, write_model

Text = pytest.importorskip("matplotlib.text").Text
HERE = Path(__file__).parent.parent
SHORT, LONG = "hello world", "it was the best of times, it was the worst of times, it was the age of wisdom. " * 3


@pytest.fixture(scope="module")
def tiny():
    return csm.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def run(generator):
    context = [csm.Segment(1, "how are you ?", clip(0.5))]
    return show.observe(generator, "i am fine .", 0, context, seed=3, max_audio_length_ms=480)


# ---------------------------------------------------------------------------------------------------- what is seen


def test_rows(generator, run):
    """The rows of the context and the text, and the frames of `generate`."""
    segment = csm.Segment(1, "how are you ?", clip(0.5))
    codes = generator.generate_codes("i am fine .", 0, [segment], seed=3, max_audio_length_ms=480)
    rows = [generator.segment_rows(segment), generator.text_rows("i am fine .", 0)]
    rows.append(generator.audio_rows(csm.Segment(0, "", codes=codes))[:-1])  # cut off, no frame of zeros
    np.testing.assert_array_equal(run.rows, np.concatenate(rows))
    assert run.n_prompt == len(run.rows) - 6 and not run.ended
    np.testing.assert_array_equal(run.audio, np.array(generator.decode(codes)))


def test_entropy(generator, run):
    """Equals that of the run step by step, with its caches."""
    model, T, K, n = generator.model, run.n_prompt, 8, generator.mimi.config.codebook_size
    cache, bits = csm.KVCache(model.config.backbone), []

    def note(logits):
        p = np.exp(np.array(logits, np.float64)[0, :n])
        p /= p.sum()
        bits.append(-(p * np.log2(p)).sum())

    for start, end in ((0, T), *((i, i + 1) for i in range(T, len(run.rows) - 1))):
        rows = mx.array(run.rows[None, start:end])
        h = model(rows, cache)[:, -1]
        frame = run.rows[end, :-1].tolist()

        def drawn(i, logits, frame=frame):
            note(logits)
            return mx.array([frame[i]])

        model.next_frame(h, drawn)
    np.testing.assert_allclose(run.entropy, np.reshape(bits, (-1, K)), atol=1e-4)


def test_attention(generator, run):
    """The first layer's equals its projections' with RoPE as rotations of complex numbers."""
    c, layer = generator.model.config.backbone, generator.model.backbone.layers[0]
    rows = mx.array(run.rows[None, :-1])
    x = layer.input_layernorm(generator.model.embed(rows))[0]
    S, angle = len(x), np.arange(len(x))[:, None] / c.rope_theta ** (np.arange(0, c.head_dim, 2) / c.head_dim)

    def turned(y, heads):  # (S, heads, head_dim / 2) complex
        y = np.array(y, np.float64).reshape(S, heads, -1, 2)
        return (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * angle)[:, None]

    q, k = turned(layer.self_attn.q_proj(x), c.n_heads), turned(layer.self_attn.k_proj(x), c.n_kv_heads)
    k = np.repeat(k, c.n_heads // c.n_kv_heads, axis=1)
    scores = np.einsum("shd,thd->hst", q, k.conj()).real / c.head_dim**0.5
    w = np.where(np.tri(S), np.exp(scores), 0)
    w = (w / w.sum(axis=-1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(run.attention[0], w[run.n_prompt - 1 :], atol=1e-5)
    assert run.attention.shape == (c.n_layers, len(run.entropy), S)
    np.testing.assert_allclose(run.attention.sum(axis=-1), 1, atol=1e-5)


def test_attention_is_left_as_it_was(generator):
    plain = mx.fast.scaled_dot_product_attention
    with pytest.raises(Exception):  # noqa: B017  of rows that are none
        show.read(generator.model, np.zeros((3, 2), np.int32), 0)
    assert mx.fast.scaled_dot_product_attention is plain


def test_speech_that_ends_at_once(folder, tmp_path):
    silent = csm.load(folder)
    for head in (silent.model.codebook0_head, *silent.model.audio_head):
        head.weight = head.weight * 0  # all codes alike, and the first of the likeliest is 0
    run = show.observe(silent, "hello", voice="none", temperature=0)
    assert run.ended and not len(run.audio) and not run.rows[-1, :-1].any()
    n = silent.mimi.config.codebook_size
    np.testing.assert_allclose(run.entropy, np.full((1, 8), np.log2(n)), atol=1e-4)  # no idea
    show.draw(run, silent).savefig(tmp_path / "a.png")


# ---------------------------------------------------------------------------------------------------- what is drawn


def test_panels(generator, run):
    fig = show.draw(run, generator, layer=1)
    T = run.n_prompt
    by_title = {re.match(r"\w+", ax.get_title("left"))[0]: ax for ax in fig.axes if ax.get_title("left")}
    assert list(by_title) == ["rows", "codes", "entropy", "attention", "waveform", "spectrogram"]
    kind = np.array(by_title["rows"].collections[0].get_array()).reshape(9, -1)
    names = [list(show.KINDS)[i].split(" ")[0] for i in kind.max(axis=0)]
    turn = generator.segment_rows(csm.Segment(1, "how are you ?", clip(0.5)))
    n_text = int((turn[:, -1] != csm.NO_TEXT).sum())
    assert names[: len(turn)] == ["text"] * n_text + ["a"] * (len(turn) - n_text - 1) + ["frame"]
    assert names[len(turn) :] == ["text"] * (T - len(turn)) + ["codes"] * 6
    assert (kind[:-1, :n_text] == 0).all() and (kind[-1, T:] == 0).all()
    np.testing.assert_array_equal(by_title["codes"].images[0].get_array(), run.rows[T:, :-1].T)
    np.testing.assert_array_equal(by_title["entropy"].images[0].get_array(), run.entropy.T)
    np.testing.assert_array_equal(by_title["attention"].images[0].get_array(), run.attention[1].T)
    assert "layer 1" in by_title["attention"].get_title("left")
    np.testing.assert_array_equal(by_title["waveform"].lines[0].get_ydata(), run.audio)
    for name in list(by_title)[1:]:
        assert by_title[name].get_xlim() == (0, 0.48)  # six frames: one axis of time
    for ax, unit in zip([*by_title.values()][4:], ("amplitude", "frequency (kHz)")):
        assert ax.get_ylabel() == unit
    bars = {ax.get_ylabel() for ax in fig.axes} - {ax.get_ylabel() for ax in by_title.values()}
    assert bars == {"code", "bits", "weight (sum 1)", "level (dB/kHz)"}


@pytest.mark.parametrize("kind", ["short", "clip", "long", "cut", "24 of 32 codebooks"])
def test_legible(tiny, kind, tmp_path):
    """At 1200 pixels no text is cut off or overlaps."""
    if kind == "24 of 32 codebooks":
        tiny = csm.load(write_model(tmp_path, "k32"), codebooks=24)
        run = show.observe(tiny, "hello there , how are you ?", seed=1, max_audio_length_ms=1200)
    elif kind == "clip":
        run = show.observe(tiny, SHORT, 0, tiny.voice_prompt(min(tiny.voices)), seed=1)
    else:
        length = {"max_audio_length_ms": 400 if kind == "cut" else None}
        run = show.observe(tiny, LONG if kind == "long" else SHORT, seed=1, **length)
        assert run.ended == (kind != "cut")
    fig = show.draw(run, tiny)
    fig.savefig(io.BytesIO())  # lays it out
    width, height = fig.canvas.get_width_height()
    assert width == 1200
    beyond = set()  # labels of ticks outside their axis, which are not drawn
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside = [tick for tick in axis.get_major_ticks() if not low - 1e-9 <= tick.get_loc() <= high + 1e-9]
        beyond |= {text for tick in outside for text in (tick.label1, tick.label2)}
    texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text() and t not in beyond]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    assert len(boxes) > 40
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for i, (text, a) in enumerate(boxes):
        for other, b in boxes[:i]:
            apart = a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5
            assert apart, (text, other)


def test_letters(tiny):
    """Each text row's letters, below the rows and beside the attention."""
    run = show.observe(tiny, SHORT, seed=1)
    fig = show.draw(run, tiny)
    below = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    assert "".join(below[2:-1]) == "HəLŌ_WɜLD"
    beside = [t.get_text() for ax in fig.axes for t in ax.get_yticklabels()]
    assert [x for x in beside if x in below][-len(below) :] == below and "frame 0" in beside
    assert show.pieces(tiny.tokenizer, tiny.tokenizer.encode("[0]a"))[-2] == "a"


def test_pieces(generator):
    """Also of tokenizer.json; a number replaces letters that the font may lack."""
    ids = generator.tokenizer.encode("[0]hello 你")
    names = show.pieces(generator.tokenizer, ids)
    assert names[1:5] == ["[", "0", "]", "hello"] and str(ids[-2]) in names


@pytest.mark.parametrize("kind", ["protan", "deutan", "tritan"])
def test_colours(kind):
    """The colour-blind can tell the kinds of cells apart (Machado et al. 2009, severity 1)."""
    matrix = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }[kind]
    colors = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in show.KINDS.values()])
    seen = np.clip(colors**2.2 @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
    for i, a in enumerate(seen):
        assert all(np.linalg.norm(a - b) > 0.25 for b in seen[:i]), (kind, i)


# ---------------------------------------------------------------------------------------------------- the command


def test_command(folder, tmp_path, capsys):
    mimi.write_audio(tmp_path / "me.wav", clip(1))
    (tmp_path / "turns.json").write_text('[{"speaker": 1, "text": "yes", "audio": "me.wav"}]')
    command = ["hello $ there $", "--model", str(folder), "--seed", "5", "--max-audio-length-ms", "240"]
    reference = ["--ref-audio", str(tmp_path / "me.wav"), "--ref-text", "no", "--context", str(tmp_path / "turns.json")]
    for name, options in (("a.png", reference), ("b.svg", []), ("c.pdf", [])):
        assert not show.main([*command, str(tmp_path / name), *options])
        assert "seed 5" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes()[16:20] == (1200).to_bytes(4, "big")
    assert b"<svg" in (tmp_path / "b.svg").read_bytes() and (tmp_path / "c.pdf").read_bytes()[:4] == b"%PDF"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font lacks is a box, and no warning
        assert not show.main(["你 hello", *command[1:], str(tmp_path / "e.png")])
    capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    mistakes = [("d.gif", [], ".png, .svg or .pdf"), ("d.png", ["--context", "nowhere.json"], "nowhere.json"),
                ("d.png", ["--ref-text", "yes"], "go together"), ("no/d.png", [], "cannot write")]  # fmt: skip
    for name, options, said in mistakes:
        with pytest.raises(SystemExit) as e:
            show.main([*command, str(tmp_path / name), *options])
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before
