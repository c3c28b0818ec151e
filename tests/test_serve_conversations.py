"""The server's stored conversations, equal to the library's, and voices; files that state their length."""

import asyncio
import base64
import io
import json
import shutil
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import csm  # before mlx

httpx, starlette = (pytest.importorskip(name) for name in ("httpx", "starlette"))
serve = pytest.importorskip("csm_tools.serve")
from csm_tools import serve_conversations, serve_engine, serve_voices
from test_serve import ARGUMENTS, CLIP, SAID, ask, collector, same, samples

SOUND = base64.b64encode(CLIP.read_bytes()).decode()


def during(tiny, scenario, voices=None, **arguments):
    """Run scenario(client, engine) with an httpx client of the application, without a network."""

    async def run():
        engine = serve.Engine(csm.Generator(tiny.model, tiny.mimi, tiny.tokenizer, tiny.voices), 4, 4)
        args = SimpleNamespace(**vars(ARGUMENTS) | arguments)
        app = serve.make_app(engine, args, "", voices=voices)
        running = asyncio.create_task(engine.run())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=None) as client:
            result = await scenario(client, engine)
        running.cancel()
        return result

    return asyncio.run(run())


async def say(client, text, name="a", **fields):
    body = {"input": text, "voice": "calm", "response_format": "pcm", "conversation": name} | fields
    body = {name: value for name, value in body.items() if value is not None}
    return await client.post("/v1/audio/speech", json=body)


def test_a_conversation_is_the_librarys(tiny):
    talk = tiny.conversation(voice="calm", speaker=0)
    heard = csm.Segment(1, SAID, CLIP)
    want = [talk.say("Hello there.", 0, seed=1)]
    talk.hear(heard)
    want += [talk.say("Where are you going?", 0, seed=2), talk.say("Come in.", 1, seed=3)]

    async def scenario(client, engine):
        got = [await say(client, "Hello there.", seed=1)]
        turn = {"speaker": 1, "text": SAID, "audio": SOUND}
        answer = await client.post("/v1/conversations/a/turns", json=turn)
        assert [t["speaker"] for t in answer.json()["turns"]] == [0, 1], answer.text
        got.append(await say(client, "Where are you going?", seed=2, voice="deep"))  # which counts no more
        got.append(await say(client, "Come in.", speaker=1, seed=3, after_turns=3))
        assert [answer.headers["x-conversation-turns"] for answer in got] == ["0", "2", "3"]
        turns = (await client.get("/v1/conversations/a")).json()["turns"]
        assert [t["text"] for t in turns] == ["Hello there.", SAID, "Where are you going?", "Come in."]
        return [samples(answer.content) for answer in got]

    got = during(tiny, scenario)
    assert [same(g, w) for g, w in zip(got, want)] == [True] * 3


def test_a_context_names_the_voices_of_its_speakers(tiny, tmp_path):
    for suffix in (".wav", ".txt"):
        (tmp_path / f"mine{suffix}").write_bytes(CLIP.with_suffix(suffix).read_bytes())
    voices = serve_voices.Voices(tiny, tmp_path)
    context = [tiny.voice_prompt("deep", 0)[0], csm.Segment(1, SAID, CLIP)]
    talk = tiny.conversation(context)
    want = [talk.say("Hello there.", 0, seed=1), talk.say("Where are you going?", 1, seed=2)]

    async def scenario(client, engine):
        named = [{"speaker": 0, "voice": "deep"}, {"speaker": 1, "voice": "mine"}]
        got = [await say(client, "Hello there.", context=named, seed=1)]
        got.append(await say(client, "Where are you going?", speaker=1, seed=2))
        assert all("x-warning" not in answer.headers for answer in got)
        return [samples(answer.content) for answer in got]

    assert all(same(g, w) for g, w in zip(during(tiny, scenario, voices), want))


def test_a_turn_costs_its_own_rows_and_those_of_the_last(tiny, monkeypatch):
    rows, prefill = [], csm.prefill

    def counted(model, some, cache):
        rows.append(len(some))
        return prefill(model, some, cache)

    async def scenario(client, engine):
        cost = []
        for i in range(5):
            rows.clear()
            await say(client, "Good morning.", seed=i)
            cost.append(sum(rows))
        return cost

    monkeypatch.setattr(csm, "prefill", counted)
    first, *others = during(tiny, scenario)
    turn = len(tiny.text_rows("Good morning.", 0)) + tiny.max_frames(None, "Good morning.") + 1
    assert all(n <= turn + len(tiny.text_rows("Good morning.", 0)) for n in others) and first > 0


def test_who_leaves_in_a_turn_leaves_the_conversation_as_it_was(tiny):
    async def scenario(client, engine):
        await say(client, "Hello there.", seed=1)
        speech = serve_engine.Speech([("Hello.", 0), ("The cat sat on the mat.", 0)], 0, None, [], 5, csm.Sampling())
        speech.kept = kept = serve_conversations.Kept(csm.Conversation(engine.generator, voice="calm"))
        engine.submit(speech)
        while speech.part == 0:
            await asyncio.sleep(0.01)
        assert len(kept.turns()) == 1
        speech.gone = True
        await speech.ended.wait()
        assert kept.turns() == [] and len(kept.talk.blocks) == 1 and kept.talk.cache.offset <= kept.talk.length()

    during(tiny, scenario)


def test_two_at_once_are_said_one_after_the_other(tiny):
    talk = tiny.conversation(voice="calm")
    want = [talk.say("Number one.", seed=1), talk.say("Number two.", seed=2)]

    async def scenario(client, engine):
        both = await asyncio.gather(say(client, "Number one.", seed=1), say(client, "Number two.", seed=2))
        return [samples(answer.content) for answer in both]

    assert all(same(g, w) for g, w in zip(during(tiny, scenario), want))


def test_what_is_lost_is_said(tiny):
    async def scenario(client, engine):
        for method, path in (("GET", "a"), ("DELETE", "a")):
            answer = await client.request(method, f"/v1/conversations/{path}")
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "conversation_not_found"
        turn = {"speaker": 1, "text": SAID, "audio": SOUND}
        assert (await client.post("/v1/conversations/a/turns", json=turn)).status_code == 404
        answer = await say(client, "Hello.", after_turns=2)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "conversation_not_found"
        assert (await say(client, "Hello.")).status_code == 200
        assert (await client.delete("/v1/conversations/a")).json()["deleted"]
        assert (await client.get("/v1/conversations/a")).status_code == 404
        assert (await say(client, "Hello.", conversation="x" * 201)).status_code == 400

    during(tiny, scenario)


def test_conversations_are_bounded_by_bytes_and_time(tiny, monkeypatch):
    talks = serve_conversations.Conversations(10_000_000)
    cache = csm.KVCache(tiny.model.config.backbone)
    csm.prefill(tiny.model, tiny.text_rows("Hello.", 0), cache)
    each = sum(x.nbytes for x in (*cache.keys, *cache.values))
    talks.most = 3 * each
    for i in range(5):
        kept = talks.open(str(i))
        kept.talk, kept.used = SimpleNamespace(cache=cache, n_context=0, turns=[]), float(i)
        monkeypatch.setattr(serve_conversations.time, "monotonic", lambda i=i: float(i))
    asyncio.run(talks.kept["2"].lock.acquire())  # the oldest that is left is in use
    talks.tidy()
    assert list(talks.kept) == ["2", "3", "4"]
    talks.most = each
    talks.tidy()
    assert list(talks.kept) == ["2"]
    talks.kept["2"].lock.release()
    monkeypatch.setattr(serve_conversations.time, "monotonic", lambda: 3.0 + serve_conversations.IDLE)
    talks.tidy()
    assert not talks.kept


# ------------------------------------------------------------------------------------------------------ voices


def test_clients_keep_voices(tiny, tmp_path):
    voices = serve_voices.Voices(tiny, tmp_path)

    async def scenario(client, engine):
        form = {"name": "Anna B", "ref_text": f" {SAID}\n", "consent": "yes"}
        files = {"audio_sample": ("a.wav", CLIP.read_bytes(), "audio/wav")}
        answer = await client.post("/v1/audio/voices", data=form, files=files)
        assert answer.status_code == 201, answer.text
        again = await client.post("/v1/audio/voices", data=form, files=files)
        assert again.status_code == 400 and "already" in again.json()["error"]["message"]
        assert {"id": "Anna B", "name": "Anna B"} in (await client.get("/v1/audio/voices")).json()["data"]
        said = [await say(client, "Hello.", None, voice=voice, seed=1) for voice in ("Anna B", "calm")]
        assert same(samples(said[0].content), tiny.generate("Hello.", voice="calm", seed=1))
        for name in ("../x", ".hidden", "a/b", "", "none", "calm", "x" * 65):
            bad = await client.post("/v1/audio/voices", data=form | {"name": name}, files=files)
            assert bad.status_code == 400, name
        body = {"name": "json", "ref_text": SAID, "audio_sample": SOUND}
        assert (await client.post("/v1/audio/voices", json=body)).status_code == 201
        other = {"Origin": "http://elsewhere"}
        assert (await client.post("/v1/audio/voices", json=body, headers=other)).status_code == 403
        files["audio_sample"] = ("a.wav", b"no sound", "audio/wav")
        assert (await client.post("/v1/audio/voices", data=form | {"name": "n"}, files=files)).status_code == 400
        assert sorted(f.name for f in tmp_path.iterdir()) == ["Anna B.txt", "Anna B.wav", "json.txt", "json.wav"]
        assert list(serve_voices.Voices(tiny, tmp_path).kept) == ["Anna B", "json"]
        assert (await client.delete("/v1/audio/voices/json")).json()["deleted"]
        assert (await client.delete("/v1/audio/voices/json")).status_code == 404
        assert (await client.delete("/v1/audio/voices/calm")).status_code == 404
        assert sorted(f.name for f in tmp_path.iterdir()) == ["Anna B.txt", "Anna B.wav"]

    during(tiny, scenario, voices)


def test_a_folder_that_cannot_be_written(tiny, tmp_path, monkeypatch, caplog):
    """The log says which; the client sees no path. A voice whose clip cannot be deleted stays."""
    place = tmp_path / "voices"
    place.mkdir()
    for suffix in (".wav", ".txt"):
        (place / f"mine{suffix}").write_bytes(CLIP.with_suffix(suffix).read_bytes())
    voices = serve_voices.Voices(tiny, place)

    def denied(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    async def scenario(client, engine):
        with monkeypatch.context() as patched:
            patched.setattr(serve_voices.Path, "unlink", denied)
            answers = [await client.delete("/v1/audio/voices/mine")]
        shutil.rmtree(place)
        body = {"name": "new", "ref_text": SAID, "audio_sample": SOUND}
        answers.append(await client.post("/v1/audio/voices", json=body))
        for answer in answers:
            assert answer.status_code == 500 and "into its folder of voices" in answer.json()["error"]["message"]
            assert str(tmp_path) not in answer.text
        assert caplog.text.count(str(place)) == 2 and [*voices.kept] == ["mine"]

    during(tiny, scenario, voices)


def test_without_a_folder_no_voice_is_kept(tiny):
    async def scenario(client, engine):
        body = {"name": "json", "ref_text": SAID, "audio_sample": SOUND}
        answer = await client.post("/v1/audio/voices", json=body)
        assert answer.status_code == 403 and "--voices" in answer.json()["error"]["message"]

    during(tiny, scenario)


# ------------------------------------------------------------------------------------------------------ files, pages


@pytest.mark.parametrize("format", ["wav", "flac"])
def test_a_short_file_knows_its_length(tiny, format):
    async def scenario(client, engine):
        fields = {"response_format": format, "voice": "calm", "seed": 1}
        whole = await say(client, "Hello there.", None, **fields)
        streamed = await say(client, "Hello there.", None, **fields, stream=True)
        assert int(whole.headers["content-length"]) == len(whole.content)
        assert "content-length" not in streamed.headers
        return whole.content, streamed.content

    whole, streamed = during(tiny, scenario)
    audio, rate = soundfile.read(io.BytesIO(whole), dtype="int16")
    assert rate == 24_000 and same(audio.astype(np.int32), tiny.generate("Hello there.", voice="calm", seed=1))
    if format == "wav":
        assert wave.open(io.BytesIO(whole)).getnframes() == len(audio)
        assert int.from_bytes(whole[4:8], "little") == len(whole) - 8
        assert streamed[4:8] == b"\xff" * 4 and streamed[44:] == whole[44:]


def test_only_named_origins_may_ask(tiny):
    async def scenario(client, engine):
        asks = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
        asks["Access-Control-Request-Headers"] = "content-type"
        return await client.options("/v1/audio/speech", headers=asks)

    assert during(tiny, scenario, cors=["http://page"]).headers["access-control-allow-origin"] == "http://page"
    for cors in ([], ["http://other"]):
        assert "access-control-allow-origin" not in during(tiny, scenario, cors=cors).headers


def test_what_fails_on_the_way_is_logged_with_its_reason(tiny, monkeypatch, caplog):
    async def scenario(client, engine):
        decode, n = engine.decode, []

        def fails(frames):
            n.append(0)
            return 1 / 0 if len(n) > 3 else decode(frames)

        monkeypatch.setattr(engine, "decode", fails)
        body = {"input": "The cat sat on the mat.", "stream_format": "sse", "voice": "calm"}
        messages, send = collector()
        await ask(client._transport.app, body, send)
        assert messages[-1]["more_body"]  # so that the client sees that it is not whole
        return messages[-1]["body"]

    assert json.loads(during(tiny, scenario).split(b"data: ")[-1])["error"]["message"] == "generation failed"
    assert "broken off after" in caplog.text and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("format", ["pcm", "wav"])
def test_a_first_piece_of_no_length_begins_the_answer_once(tiny, monkeypatch, format):
    async def scenario(client, engine):
        def submit(speech, first):
            for piece in (np.zeros(0, np.int16), np.ones(1920, np.int16), None):
                engine.give(speech, piece)

        monkeypatch.setattr(engine, "submit", submit)
        messages, send = collector()
        await ask(client._transport.app, {"input": "One. Two.", "response_format": format}, send)
        return messages

    messages = during(tiny, scenario)
    assert [m["type"] for m in messages].count("http.response.start") == 1
    assert b"".join(m.get("body", b"") for m in messages).endswith(b"\x01\x00" * 1920)
