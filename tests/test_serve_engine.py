"""The engine, stepped by hand: encoding between others' frames, checks, waiting; the watermark for many."""

import asyncio
import json
import threading

import numpy as np
import pytest
import soundfile

import csm  # before mlx
import csm_batch

serve = pytest.importorskip("csm_tools.serve")
from csm_tools import serve_engine, serve_files, watermark
from test_serve import ARGUMENTS, CLIP, LONG, SAID, TEXT, ask, collector, samples


def speech():
    return soundfile.read(CLIP, dtype="int16")[0]


# ------------------------------------------------------------------------------------------------------ the model


@pytest.fixture
def engine(tiny):
    return lambda *sizes: serve.Engine(
        csm.Generator(tiny.model, tiny.mimi, tiny.tokenizer, tiny.voices), *sizes or (4, 4)
    )


def a_speech(text, context=(), voice="calm", seed=1, **fields):
    parts = text if isinstance(text, list) else [(text, 0)]
    return serve_engine.Speech(parts, 0, voice, list(context), seed, csm.Sampling(), **fields)


def all_said(engine, *speeches, steps=4000):
    """Step the engine until all have ended: {Speech: its samples, or the exception that ended it}."""
    said, ends, joining = {speech: [] for speech in speeches}, {}, list(speeches)
    for _ in range(steps):
        for speech, piece in engine.step(joining):
            if speech not in said:
                continue
            if isinstance(piece, np.ndarray):
                said[speech].append(piece)
            else:
                ends[speech] = np.concatenate(said[speech]) if piece is None else piece
        joining, engine.waiting = engine.waiting, []
        if len(ends) == len(speeches):
            return ends
    raise AssertionError("it goes on and on")


def alike(x, y):
    """Whether two sounds (S,) int16 are equal but for rounding: a product's rows may be summed differently."""
    return len(x) == len(y) and np.abs(x.astype(int) - y).max() <= 2


def test_a_clip_is_encoded_between_the_frames_of_others(engine, tiny):
    e, audio = engine(), np.tile(speech(), 20)[: 50 * 24_000] / np.float32(32768)
    hears = a_speech(LONG)
    while not e.live:
        e.step([hears] if not e.preparing else [])
    asks, steps, frames = a_speech("Yes.", [csm.Segment(0, SAID, audio)]), 0, 0
    while asks not in e.live.values():
        frames += sum(speech is hears and len(piece) == 1920 for speech, piece in e.step([] if steps else [asks]))
        steps += 1
    assert frames == steps > 50 * 12.5 / serve_engine.PIECE  # a frame beside each piece
    want = np.array(tiny.encode(csm.Segment(0, SAID, audio)).codes)
    assert (asks.context[0].codes == want).mean() > 0.99  # products of other sizes round differently


def test_a_voice_is_encoded_once_for_all_who_ask_for_it(engine, monkeypatch):
    e, voice, n = engine(), csm.Segment(0, SAID, speech() / np.float32(32768)), []
    rows, encode = [], e.generator.mimi.encode_step
    monkeypatch.setattr(type(e.generator.mimi), "encode_step", lambda self, *x: n.append(0) or encode(*x))
    prefill = csm.prefill
    monkeypatch.setattr(csm, "prefill", lambda *x: rows.append(x[1].tobytes()) or prefill(*x))
    three = [a_speech("Yes.", voice=voice) for _ in range(3)]
    ends = all_said(e, *three)
    assert len(n) == -(-len(speech()) // (serve_engine.ALONE * 1920))  # nobody listens yet
    assert all(alike(ends[s], ends[three[0]]) for s in three)
    assert rows.count(e.generator.context_rows(three[0].context).tobytes()) == 1


def test_who_leaves_while_a_voice_is_encoded_keeps_nobody_waiting(engine):
    e, voice = engine(), csm.Segment(0, SAID, np.tile(speech(), 9) / np.float32(32768))
    leaves, stays = a_speech("Yes.", voice=voice), a_speech("Yes.", voice=voice)
    e.step([leaves, stays])
    assert voice.codes is None and e.shared
    leaves.gone = True
    assert len(all_said(e, stays)[stays]) > 0 and not e.shared


def test_all_parts_are_checked_before_the_first_is_said(engine, tiny):
    digits = "9" * 1000
    for voice, context in (("calm", ()), ("none", ()), ("none", tiny.voice_prompt("calm"))):
        e = engine()
        speech = a_speech([("Hello there.", 0.2), (digits, 0)], context, voice)
        assert isinstance(all_said(e, speech)[speech], ValueError) and not speech.made
        assert "999" in str(all_said(e, a_speech([(digits, 0)], context, voice)).popitem()[1])


def test_a_first_part_that_leaves_no_room_is_not_the_voice_of_the_others(engine, monkeypatch):
    e, parts = engine(), [("Hello there.", 0.1), ("How are you?", 0)]
    rows = len(e.generator.text_rows(parts[1][0], 0))
    speech = a_speech(parts, voice="none")
    speech.codes = [np.ones(8, np.int32)] * (e.generator.max_positions - rows - 10)
    e.live[0] = speech
    e.after(speech)
    assert speech.context == [] and speech.part == 1


def test_one_that_fails_alone_ends_alone(engine, tiny, monkeypatch):
    """As if its numbers overflow: the batch drops it, and the others continue."""
    e, fails, stays = engine(), a_speech("Yes.", seed=1), a_speech("Yes.", seed=2)
    want = all_said(engine(), a_speech("Yes.", seed=2)).popitem()[1]
    own, raised = csm_batch.Batch.next, []

    def once(self):
        if len(self.live) == 2 and not raised:
            error = ValueError("NaN")
            error.uid = next(uid for uid, speech in e.live.items() if speech is fails)
            raised.append(self.remove(error.uid))
            raise error
        return own(self)

    monkeypatch.setattr(csm_batch.Batch, "next", once)
    ends = all_said(e, fails, stays)
    assert str(ends[fails]) == "NaN" and np.abs(ends[stays].astype(int) - want).max() <= 1


def test_a_part_that_is_cut_off_is_told(engine, monkeypatch):
    monkeypatch.setattr(csm.Generator, "max_frames", lambda *_: 3)
    for text, parts in (("Good morning to you all. And a good evening it was.", [1, 2]), ("One.", [1])):

        async def scenario(e, text):
            running = asyncio.create_task(e.run())
            messages, send = collector()
            body = {"input": text, "stream_format": "sse", "voice": "calm"}
            await ask(serve.make_app(e, ARGUMENTS, ""), body, send)
            running.cancel()
            return json.loads(messages[-1]["body"].split(b"data: ")[-1])

        assert asyncio.run(scenario(engine(), text))["cut_off"] == parts


def test_what_listeners_have_yet_to_hear_makes_nobody_wait(engine):
    e = engine(1, 0)
    full = a_speech(LONG)
    full.made, full.part = 31 * 24_000, 0
    e.waiting = [full]
    e.submit(a_speech("Yes."))
    assert e.count_waiting() == 1 and e.health()["waiting"] == 1
    with pytest.raises(serve_engine.Busy):
        e.submit(a_speech("Yes."))


# ------------------------------------------------------------------------------------------------------ the mark


class Halved(watermark.Watermark):
    """A stand-in for the networks."""

    def __init__(self):
        pass

    def mark(self, clip, symbols, sdr):
        return clip / 2


@pytest.mark.parametrize("rate", [24_000, 44_100])
def test_pieces_are_marked_as_a_stream_is(rate):
    audio = np.tile(speech(), 2)
    pieces = np.split(audio, range(1920, len(audio), 1920))
    marker = serve_files.Marker(Halved(), rate)
    got = np.concatenate([marker(piece) for piece in (*pieces, None)])
    want = np.concatenate([*Halved().embed_stream((p / np.float32(32767) for p in pieces), rate)])
    assert len(got) == len(audio) and abs(got - want * 32767).max() <= 1


def test_one_thread_marks_all_and_its_failure_reaches_the_client(engine, caplog):
    threads = set()

    class Noted(Halved):
        def mark(self, clip, symbols, sdr):
            threads.add(threading.current_thread().name)
            return clip / 2

    class Broken(Halved):
        def mark(self, clip, symbols, sdr):
            raise ZeroDivisionError

    async def scenario(mark, n):
        e = engine()
        app = serve.make_app(e, ARGUMENTS, "", mark)
        running = asyncio.create_task(e.run())
        out = [collector() for _ in range(n)]
        body = {"input": TEXT, "response_format": "pcm", "seed": 1, "voice": "calm"}
        await asyncio.gather(*(ask(app, body, send) for _, send in out))
        running.cancel()
        return [messages for messages, _ in out]

    said = asyncio.run(scenario(Noted(), 4))
    sound = [samples(b"".join(m.get("body", b"") for m in messages)) for messages in said]
    assert len(threads) == 1 and all(alike(x, sound[0]) for x in sound) and sound[0].any()
    (broken,) = asyncio.run(scenario(Broken(), 1))
    assert broken[0]["status"] == 500 or broken[-1]["more_body"]  # not as if it were whole
    assert "generation failed" in caplog.text
