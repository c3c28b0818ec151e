"""Text in pieces over WebSockets: ElevenLabs' client and plain messages, barge-in, conversations."""

import base64
import json

import pytest

import csm  # before mlx
import mimi

import mlx.core as mx  # isort: skip
import numpy as np

pytest.importorskip("csm_tools.serve")
httpx, elevenlabs = (pytest.importorskip(name) for name in ("httpx", "elevenlabs.client"))
websockets = pytest.importorskip("websockets")
from websockets.sync.client import connect

from csm_tools import serve_requests
from csm_tools.serve_socket import standing
from csm_tools.text import sentences
from test_serve import CLIP, LONG, SAID, decoded, health, running, same, samples, until

SENTENCES = ["The cat sat on the mat.", "Where are you going today?", "It is a fine day, Dr. Smith."]
PCM = "output_format=pcm_24000&inactivity_timeout=180"  # seconds, for a slow machine


@pytest.fixture(scope="module")
def address():
    with running() as (address, _):
        yield address


def socket(address, options=PCM, voice="calm", path="stream-input", **more):
    return connect(f"{address.replace('http', 'ws')}/v1/text-to-speech/{voice}/{path}?{options}", **more)


def send(ws, **fields):
    ws.send(json.dumps(fields))


def receive(ws, until_final=True):
    """Receive messages until a text's last, or until the connection ends."""
    out = []
    while not (out and until_final and (out[-1].get("isFinal") or out[-1].get("error"))):
        try:
            out.append(json.loads(ws.recv(timeout=60)))
        except websockets.ConnectionClosed:
            break
    return out


def sound(messages):
    return b"".join(base64.b64decode(m["audio"]) for m in messages if m.get("audio"))


def said(tiny, texts, voice="calm", seed=1, speaker=0):
    """The server's speech of sentences by the library, 16 bits, with a quarter of a second between them."""
    pause = np.zeros(6000, np.int32)
    parts = [tiny.generate(text, speaker, voice=voice, seed=seed + i) for i, text in enumerate(texts)]
    parts = [x for part in parts for x in (pause, mimi.to_pcm16(part).astype(np.int32))]
    return np.concatenate(parts[1:])


def alike(got, want):
    return len(got) == len(want) and abs(got - want).max() <= 1


# ------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("size", [1, 3, 7, 20])
@pytest.mark.parametrize("text", [
    " ".join(SENTENCES),
    "“Stop!” he cried. It costs $3.50, e.g. at 5 p.m. tomorrow. Yes.\n\nA new line here, J. Smith.",
    "No end of a sentence, " * 8, "Wait [pause:1.5] for it, my good old friend. I waited for all of them.", "Hm", "",
])  # fmt: skip
def test_however_a_text_is_cut_its_sentences_are_the_same(text, size):
    rest, got = "", []
    for i in range(0, len(text), size):
        whole, rest = standing(rest + text[i : i + size], 80)
        got += whole
    assert [part for part, _ in got + sentences(rest, 80)] == [part for part, _ in sentences(text, 80)]


def test_a_sentence_stands_once_the_next_one_begins():
    assert standing("The cat sat on the mat. ", 80) == ([("The cat sat on the mat.", 0.25)], "")
    assert standing("The cat sat on the mat.", 80) == ([], "The cat sat on the mat.")  # it may be "mat.com"
    assert standing("The cat sat with Dr. ", 80) == ([], "The cat sat with Dr. ")


# ------------------------------------------------------------------------------------------------------ one text


def test_elevenlabs_own_client(address, tiny):
    client = elevenlabs.ElevenLabs(api_key="none", base_url=address)
    client.text_to_speech._ws_base_url = address.replace("http", "ws")  # which would be wss://
    text = iter([*(" ".join(SENTENCES[:2]))])
    pieces = client.text_to_speech.convert_realtime("calm", text=text, model_id="any", output_format="mp3_44100_128")
    got = decoded(b"".join(pieces))
    expected = len(said(tiny, SENTENCES[:2], seed=0)) / 24_000  # of another seed, and so of about this length
    assert 0.5 * expected < len(got) / 24_000 < 2 * expected and abs(got).max() > 0.1


def test_a_text_in_pieces_is_said_as_the_library_says_it(address, tiny):
    with socket(address, f"{PCM}&seed=1") as ws:
        for word in " ".join(SENTENCES).split(" "):
            send(ws, text=f"{word} ")
        send(ws, text="")
        messages = receive(ws, until_final=False)
    assert messages[-1] == {"audio": None, "isFinal": True} and ws.close_code == 1000
    assert alike(samples(sound(messages)), said(tiny, SENTENCES))
    times = [m["alignment"] for m in messages if m.get("alignment")]
    assert ["".join(t["chars"]).strip() for t in times] == SENTENCES
    spoken = ["".join(m["normalizedAlignment"]["chars"]).strip() for m in messages if m.get("alignment")]
    assert spoken[2] == "It is a fine day, Doctor Smith."
    ends = [t["charStartTimesMs"][-1] + t["charDurationsMs"][-1] for t in times]
    lengths = [tiny.generate(text, voice="calm", seed=1 + i).size / 24 for i, text in enumerate(SENTENCES)]
    assert ends == [round(n) for n in lengths]


def test_an_adapter_speaks_without_a_voice(tmp_path, tiny):
    """OpenAI's names are nobody then, as training put nobody before a text; and whoever --default-voice says."""
    parts = {"lora_a": mx.zeros((256, 1)), "lora_b": mx.zeros((1, 515))}
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), {f"codebook0_head.{name}": w for name, w in parts.items()}
    )
    (tmp_path / "adapter_config.json").write_text('{"rank": 1, "alpha": 1}')
    for options, voice in (([], "none"), (["--default-voice", "deep"], "deep")):
        with running("--adapter", tmp_path, *options) as (address, _):
            with socket(address, f"{PCM}&seed=1", voice="alloy") as ws:
                send(ws, text=SENTENCES[0])
                send(ws, text="")
                got = samples(sound(receive(ws)))
            body = {"input": SENTENCES[0], "voice": "echo", "seed": 1, "response_format": "pcm"}
            answer = httpx.post(f"{address}/v1/audio/speech", json=body, timeout=60)
            known = httpx.get(f"{address}/v1/audio/voices").json()["voices"]
        assert alike(got, said(tiny, SENTENCES[:1], voice)) and alike(samples(answer.content), got)
        assert known[0]["id"] == voice


def test_the_first_sentence_is_heard_before_the_second_is_written(address):
    with socket(address) as ws:
        send(ws, text=" ")
        send(ws, text=f"{SENTENCES[0]} ")
        first = json.loads(ws.recv(timeout=60))
        assert first["audio"]
        send(ws, text=f"{SENTENCES[1]} ")
        send(ws, text="")
        assert len(receive(ws)) > 20


def test_half_a_sentence_waits_for_a_flush(address, tiny):
    with socket(address, f"{PCM}&seed=1") as ws:
        send(ws, text="The cat sat on ")
        with pytest.raises(TimeoutError):
            ws.recv(timeout=0.5)
        send(ws, text="the mat", flush=True)
        until_end = [json.loads(ws.recv(timeout=60))]
        while not until_end[-1].get("alignment"):
            until_end.append(json.loads(ws.recv(timeout=60)))
        assert alike(samples(sound(until_end)), said(tiny, ["The cat sat on the mat"]))
        send(ws, text="And it slept there all day.", flush=True)
        send(ws, text="")
        rest = samples(sound(receive(ws)))
    assert not rest[:6000].any() and rest[6000:].any()


@pytest.mark.parametrize("form, ends", [
    ("mp3_22050_32", b""), ("opus_48000_64", b"OggS"), ("pcm_16000", b""), ("ulaw_8000", b""), ("alaw_8000", b""),
])  # fmt: skip
def test_output_formats(address, tiny, form, ends):
    with socket(address, f"output_format={form}&seed=1") as ws:
        send(ws, text=SENTENCES[0])
        send(ws, text="")
        data = sound(receive(ws))
    seconds = len(said(tiny, SENTENCES[:1])) / 24_000
    if form.startswith(("pcm", "ulaw", "alaw")):
        wide = 2 if form.startswith("pcm") else 1
        assert abs(len(data) / wide / int(form.split("_")[1]) - seconds) < 0.02
    else:
        assert data.startswith(ends) and abs(len(decoded(data)) / 24_000 - seconds) < 0.1


def test_a_voice_of_the_first_sentence_is_that_of_the_others(address, tiny):
    with socket(address, f"{PCM}&seed=1", "none") as ws:
        send(ws, text=" ".join(SENTENCES[:2]))
        send(ws, text="")
        got = samples(sound(receive(ws)))
    codes = tiny.generate_codes(SENTENCES[0], voice="none", seed=1)
    voice = csm.Segment(0, SENTENCES[0], codes=codes)
    first, then = tiny.generate(SENTENCES[0], voice="none", seed=1), tiny.generate(SENTENCES[1], 0, [voice], seed=2)
    assert same(got[: first.size], first) and same(got[first.size + 6000 :], then)


# ------------------------------------------------------------------------------------------------------ many texts


def test_texts_side_by_side_as_pipecat_sends_them(address, tiny):
    with socket(address, f"{PCM}&seed=1&auto_mode=true&model_id=any&language_code=en", path="multi-stream-input") as ws:
        for name in "ab":
            send(ws, text=" ", context_id=name, voice_settings={"stability": 0.5, "speed": None})
        send(ws, text="")  # keeps the connection alive
        for name, text in zip("ab", SENTENCES):
            send(ws, text=text, context_id=name)
            send(ws, text="", context_id=name)
        for name in "ab":
            send(ws, context_id=name, flush=True)
            send(ws, context_id=name, close_context=True)
        messages = []
        while sum(bool(m.get("isFinal")) for m in messages) < 2:
            messages.append(json.loads(ws.recv(timeout=60)))
        send(ws, close_socket=True)
        assert receive(ws) == [] and ws.close_code == 1000
    for name, text in zip("ab", SENTENCES):
        mine = [m for m in messages if m["contextId"] == name]
        assert alike(samples(sound(mine)), said(tiny, [text])) and mine[-1]["isFinal"]


def test_livekits_messages(address, tiny):
    """Each sentence is flushed, then the text is closed; the rest is spoken before isFinal."""
    with socket(address, f"{PCM}&seed=1&sync_alignment=true", path="multi-stream-input") as ws:
        send(ws, text=" ", voice_settings={}, context_id="x", generation_config={"chunk_length_schedule": [50]})
        for text in SENTENCES[:2]:
            send(ws, text=f"{text} ", context_id="x", flush=True)
        send(ws, text="", context_id="x", flush=True)
        send(ws, context_id="x", close_context=True)
        assert alike(samples(sound(receive(ws))), said(tiny, SENTENCES[:2]))
        send(ws, text=f"{SENTENCES[2]} ", context_id="x", flush=True)  # the name is free again
        send(ws, context_id="x", close_context=True)
        assert alike(samples(sound(receive(ws))), said(tiny, SENTENCES[2:]))


# ------------------------------------------------------------------------------------------------------ stopping


def kept(tiny, turns, **options):
    """The library's Conversation of turns [(text, frames (F, K))]."""
    talk = tiny.conversation(voice="calm", **options)
    for text, codes in turns:
        talk.hear(csm.Segment(0, text, codes=codes))
    return talk


def turns_of(address, name):
    answer = httpx.get(f"{address}/v1/conversations/{name}")
    return [(turn["text"], turn["seconds"]) for turn in answer.json()["turns"]] if answer.status_code == 200 else None


def test_who_stops_hears_no_more_and_the_conversation_holds_what_was_said(address, tiny):
    length = len(said(tiny, SENTENCES[:1]))
    with socket(address, f"{PCM}&seed=1&conversation=stop", path="multi-stream-input") as ws:
        send(ws, text=f"{SENTENCES[0]} {LONG}", context_id="a")
        got = []
        while len(sound(got)) < length * 2 + 48_000:
            got.append(json.loads(ws.recv(timeout=60)))
        send(ws, context_id="a", close_context=True)
        got += receive(ws)
        with pytest.raises(TimeoutError):
            ws.recv(timeout=0.5)
        until(lambda: health(address)["live"] == 0)
        (first, _), *broken = turns_of(address, "stop")
        assert first == SENTENCES[0] and broken and all(text in LONG for text, _ in broken)
        heard = len(samples(sound(got))) - length
        pauses = 6000 * sum(1 for m in got if m.get("alignment"))
        assert sum(seconds for _, seconds in broken) == pytest.approx((heard - pauses) / 24_000, abs=0.26)
        # the next turn goes on from there
        codes = tiny.generate_codes(SENTENCES[0], voice="calm", seed=1)
        talk = kept(tiny, [(SENTENCES[0], codes)])
        for i, (text, seconds) in enumerate(broken):
            whole = kept(tiny, zip([t.text for t in talk.turns[1:]], [t.codes for t in talk.turns[1:]]))
            sentence = sentences(LONG, 80)[i][0]
            frames = np.stack([*whole.frames(sentence, seed=2 + i)])
            talk.hear(csm.Segment(0, text, codes=frames[: round(seconds * 12.5)]))
        send(ws, text=f"{SENTENCES[1]} ", context_id="b", flush=True)
        send(ws, context_id="b", close_context=True)
        assert same(samples(sound(receive(ws))), talk.say(SENTENCES[1], seed=1))


def test_of_what_was_sent_the_conversation_holds_what_was_heard(address, tiny):
    with socket(address, f"{PCM}&seed=1&conversation=heard", path="multi-stream-input") as ws:
        send(ws, text=" ".join(SENTENCES), context_id="a", flush=True)
        got = []
        while sum(bool(m.get("alignment")) for m in got) < 3:  # all is sent
            got.append(json.loads(ws.recv(timeout=60)))
        first = tiny.generate(SENTENCES[0], voice="calm", seed=1).size / 24_000
        second = tiny.conversation(voice="calm")
        second.say(SENTENCES[0], seed=1)
        length = second.say(SENTENCES[1], seed=2).size / 24_000
        send(ws, context_id="a", heard=first + 0.25 + 0.6 * length)
        assert receive(ws)[-1]["isFinal"]
        (one, _), (two, seconds) = turns_of(address, "heard")
        assert one == SENTENCES[0] and SENTENCES[1].startswith(two) and two != SENTENCES[1]
        assert seconds == pytest.approx(0.6 * length, abs=0.081)
        send(ws, text=f"{SENTENCES[2]} ", context_id="b", flush=True)
        send(ws, context_id="b", heard=0)  # nothing
        receive(ws)
        assert [text for text, _ in turns_of(address, "heard")] == [one, two]


def test_who_leaves_leaves_what_was_sent(address):
    with socket(address, f"{PCM}&seed=1&conversation=left") as ws:
        send(ws, text=LONG)
        got = [json.loads(ws.recv(timeout=60)) for _ in range(12)]
    until(lambda: health(address)["live"] == health(address)["waiting"] == 0)
    until(lambda: turns_of(address, "left"))
    assert sum(seconds for _, seconds in turns_of(address, "left")) >= len(sound(got)) / 48_000 - 0.5
    assert all(text in LONG for text, _ in turns_of(address, "left"))


def test_a_conversation_over_http_and_by_socket_is_one(address, tiny):
    body = {"input": SENTENCES[0], "voice": "calm", "response_format": "pcm", "conversation": "both", "seed": 1}
    httpx.post(f"{address}/v1/audio/speech", json=body, timeout=60)
    turn = {"speaker": 1, "text": SAID, "audio": base64.b64encode(CLIP.read_bytes()).decode()}
    httpx.post(f"{address}/v1/conversations/both/turns", json=turn, timeout=60)
    with socket(address, f"{PCM}&seed=2&conversation=both&after_turns=2") as ws:
        send(ws, text=SENTENCES[1])
        send(ws, text="")
        got = samples(sound(receive(ws)))
    talk = tiny.conversation(voice="calm")
    talk.say(SENTENCES[0], seed=1)
    talk.hear(csm.Segment(1, SAID, CLIP))
    assert same(got, talk.say(SENTENCES[1], seed=2))


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("voice, options, param", [
    ("nobody", "", "voice"), ("calm", "output_format=exe", "output_format"), ("calm", "seed=-1", "seed"),
    ("calm", "speaker=x", "speaker"), ("calm", "temperature=-1", "temperature"),
    ("calm", "inactivity_timeout=0", "inactivity_timeout"),
])  # fmt: skip
def test_a_wrong_address_is_refused_before_it_opens(address, voice, options, param):
    with pytest.raises(websockets.InvalidStatus) as e:
        socket(address, options, voice)
    error = json.loads(e.value.response.body)["error"]
    assert e.value.response.status_code == 400 and error["param"] == param and "\n" not in error["message"]


@pytest.mark.parametrize("message, words", [
    ("{", "JSON"), ("[]", "object"), ('{"text": 1}', "text"), ('{"heard": -1}', "heard"),
    ('{"text": "a", "voice_settings": {"speed": 9}}', "voice_settings.speed"),
    (json.dumps({"text": "a" * 5000}), "4096"),
])  # fmt: skip
def test_a_wrong_message_is_told_and_closes(address, message, words):
    with socket(address) as ws:
        ws.send(message)
        told = receive(ws, until_final=False)[-1]
    assert words in told["message"] and told["error"] == told["message"] and ws.close_code in (1008, 1013)


def test_one_wrong_text_does_not_end_the_others(address, tiny):
    with socket(address, f"{PCM}&seed=1", path="multi-stream-input") as ws:
        send(ws, text="a" * 5000, context_id="long")
        send(ws, text=SENTENCES[0], flush=True, context_id="good")
        send(ws, context_id="good", close_context=True)
        (error,) = receive(ws)
        messages = receive(ws)
        assert error["contextId"] == "long" and "4096" in error["error"]
        assert alike(samples(sound(m for m in messages if m["contextId"] == "good")), said(tiny, SENTENCES[:1]))
        for _ in range(20):
            send(ws, text="The cat sat on the mat. " * 170, context_id="much")
        assert "wait to be said" in receive(ws)[-1]["error"]
        for i in range(6):
            send(ws, text="Hello ", context_id=str(i))
        told = receive(ws, until_final=False)[-1]
        assert "at once" in told["error"] and ws.close_code == 1013


def test_keys_origins_and_silence():
    with running("--cors", "http://page", env={"CSM_API_KEY": "sesame"}) as (address, process):
        for key, status in (("wrong", 401), ("sesame", None)):
            if status:
                with pytest.raises(websockets.InvalidStatus) as e:
                    socket(address, additional_headers={"xi-api-key": key})
                assert e.value.response.status_code == status
        with pytest.raises(websockets.InvalidStatus) as e:
            socket(address, origin="http://elsewhere")
        assert e.value.response.status_code == 403
        for headers, first in (({"xi-api-key": "sesame"}, {}), ({}, {"xi_api_key": "sesame"})):
            with socket(address, additional_headers=headers, origin="http://page") as ws:
                send(ws, text=SENTENCES[0], **first)
                send(ws, text="")
                assert sound(receive(ws))
        for first in ({}, {"xi_api_key": "wrong"}):
            with socket(address) as ws:
                send(ws, text=SENTENCES[0], **first)
                assert "key" in receive(ws, until_final=False)[-1]["message"] and ws.close_code == 1008
        with socket(address, "inactivity_timeout=0.5", additional_headers={"xi-api-key": "sesame"}) as ws:
            assert receive(ws) == [] and ws.close_code == 1000
    assert process.returncode == 0 and "Traceback" not in "".join(process.log)


def test_the_formats_are_those_of_the_encoder():
    assert all(form in {"mp3", "pcm", "opus", "ulaw", "alaw"} for form, *_ in serve_requests.STREAMS.values())
