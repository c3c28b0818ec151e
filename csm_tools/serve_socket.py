"""Text that comes in pieces and is said as soon as a sentence stands, over ElevenLabs' WebSockets.

/v1/text-to-speech/{voice}/stream-input takes one text, multi-stream-input several, each under its context_id. A text
that is stopped is heard no more, and a conversation keeps of it what was heard.
"""

import asyncio
import base64
import json
import logging
import re
import time
from contextlib import suppress
from itertools import pairwise

import anyio
import numpy as np
from starlette.responses import JSONResponse
from starlette.websockets import WebSocketDisconnect, WebSocketState

import csm
from csm_tools.serve_engine import Busy, Speech
from csm_tools.serve_files import Encoder
from csm_tools.serve_network import Connection
from csm_tools.serve_requests import STREAMS, Message, Refused, Stream, check_voice, in_one_line, parse
from csm_tools.text import PAUSES, parts_of, sentences

MOST_TEXTS = 5  # at once in a socket
MOST_WAITING = 2**16  # characters of a text that are not said yet
STALLED = 60  # seconds without reading after which a client is dropped
PLAIN_END = re.compile(r"(?<![\w.])[^\W_]{2,}[.!?]\s+$")  # after `5 p.m. ` or `"No!" ` a sentence may go on
CODES = {401: 1008, 429: 1013, 500: 1011}  # HTTP's -> those with which a socket is closed; 1008 for all others

log = logging.getLogger("csm.serve")


def standing(text, longest):
    """A text that may go on -> [(a sentence that stands, the seconds of silence after it)], the rest."""
    probe = f"{text}So" if PLAIN_END.search(text) else text  # elsewhere the next word has to come first
    *whole, (last, _) = sentences(probe, longest) or [("", 0)]
    n, rest = len("".join(last.split())), ""
    for i in range(len(probe) - 1, -1, -1):
        if n == 0:
            break
        rest, n = probe[i:], n - (not probe[i].isspace())
    if not whole or "".join(rest.split()) != "".join(last.split()):  # words may have been joined: wait for more
        return [], text
    return whole, rest.removesuffix("So") if probe != text else rest


class Sockets:
    """All that are open. enter: submits a Speech. checks: of the key, of a page's origin. marking: see Text."""

    def __init__(self, engine, args, voices, talks, enter, checks, marking):
        self.engine, self.args, self.voices, self.talks, self.enter = engine, args, voices, talks, enter
        self.check_key, self.check_origin = checks
        self.new_marker, self.mark_piece = marking
        self.open = set()

    async def talk(self, websocket, several):
        """Serve one, until it is closed."""
        try:
            self.check_origin(websocket)
            if len(self.open) >= max(1, Connection.most // 2):
                raise Refused("there are too many connections", None, 503)
            asked = dict(websocket.query_params) | {"voice": websocket.path_params["voice"]}
            options = parse(Stream, json.dumps(asked))
            known = self.voices.table()
            check_voice(options.voice, known, "voice")
            allowed = not self.args.api_key
            if not allowed and {"xi-api-key", "authorization"} & {*websocket.headers}:  # or the first message has it
                self.check_key(websocket)
                allowed = True
            sampling = options.sampling(self.engine.generator)
        except Refused as e:
            return await websocket.send_denial_response(JSONResponse(e.body, e.status))
        await websocket.accept()
        socket = Socket(self, websocket, options, known[options.voice], sampling, several, allowed)
        self.open.add(socket)
        try:
            await socket.listen()
        except (WebSocketDisconnect, RuntimeError, OSError):  # it left while something was sent to it
            pass
        finally:
            self.open.discard(socket)
            for text in [*socket.texts.values()]:
                await text.stop()


class Socket:
    """A connection and its Texts by their context_id."""

    def __init__(self, sockets, websocket, options, voice, sampling, several, allowed):
        self.all, self.websocket, self.options, self.voice = sockets, websocket, options, voice
        self.sampling, self.several, self.allowed, self.texts = sampling, several, allowed, {}

    def connected(self):
        return self.websocket.application_state is self.websocket.client_state is WebSocketState.CONNECTED

    async def listen(self):
        """Take messages until the client leaves, or sends nothing while nothing is said."""
        while True:
            received = None
            with anyio.move_on_after(self.options.inactivity_timeout):
                received = await self.websocket.receive()
            if received is None:
                if any(text.speaking for text in self.texts.values()):
                    continue
                return await self.close(1000, "nothing was sent for too long")
            if received["type"] == "websocket.disconnect":
                return
            try:
                message = parse(Message, received.get("text") or received.get("bytes") or b"")
                if not self.allowed:
                    self.all.check_key(self.websocket, message.xi_api_key)
                    self.allowed = True
                if message.close_socket:
                    return await self.close(1000)
                await self.take(message)
            except Refused as e:
                await self.fail(e)
                if not self.connected():
                    return

    async def take(self, message):
        name = (message.context_id or "") if self.several else None
        text = self.texts.get(name)
        if message.heard is not None or (message.close_context and text and text.closed):
            if text:
                await text.stop(message.heard)
            return
        ends = message.close_context or (message.text == "" and not self.several and not message.flush)
        if text is None:
            if ends or (message.text == "" and not message.flush):  # a sign of life, or what has ended already
                return None if self.several else await self.close(1000)
            if len(self.texts) >= MOST_TEXTS:
                raise Refused(f"more than {MOST_TEXTS} texts at once: close one first", None, 429)
            text = self.texts[name] = Text(self, name, message.voice_settings.speed)
        try:
            text.add(message.text)
            if message.flush or (ends and not self.several):
                text.flush()
        except Refused as e:
            await text.stop(tell=False)
            return await self.fail(e, name)
        if ends and text.flushed:
            text.close()
        elif ends:  # without a flush its rest is not wanted, as with ElevenLabs
            await text.stop()

    async def send(self, name, **fields):
        if self.several:
            fields["contextId"] = name
        with anyio.fail_after(STALLED):
            await self.websocket.send_text(json.dumps(fields))

    async def fail(self, e, name=None):
        """Tell of a mistake; one outside of a text, and in a socket for one text, closes it."""
        message = e.body["error"]["message"]
        code = CODES.get(e.status, 1008)
        await self.send(name, message=message, error=message, code=code)
        if name is None or not self.several:
            await self.close(code, message.encode()[:120].decode("utf-8", "ignore"))

    async def close(self, code, reason=""):
        if self.connected():
            await self.websocket.close(code, reason)


class Text:
    """A text that comes in pieces, and its speech: `add`, `flush`, `close`, or `stop`."""

    def __init__(self, socket, name, speed):
        self.socket, self.name, self.all = socket, name, socket.all
        self.options, generator = socket.options, socket.all.engine.generator
        self.rest, self.flushed, self.closed = "", False, False
        self.longest = generator.model.config.max_part_characters
        self.parts, self.waiting = asyncio.Queue(), 0  # (as it was typed, as it is said, silence after it); characters
        self.speaking, self.context, self.said = False, [], []  # said: (Speech, the sample that it begins with)
        self.rate, self.frame_size = generator.sample_rate, generator.mimi.frame_size
        form, file_rate, bits = STREAMS[self.options.output_format]
        self.encoder = Encoder(form, self.rate, speed, file_rate=file_rate, bits=bits)
        self.speed, self.marker = speed, self.all.new_marker and self.all.new_marker()
        self.sent, self.began = 0, time.perf_counter()  # samples
        self.task = asyncio.create_task(self.run())

    # What the client says of it.

    def add(self, text):
        most = self.all.args.max_characters
        if len(text) > most:
            raise Refused(f"a piece of text has {len(text)} characters, and may have {most}", "text")
        self.rest += text
        self.flushed = self.flushed and not text.strip()
        whole, self.rest = standing(self.rest, self.longest)
        if len(self.rest) > most:  # in which no sentence can be found
            self.flush()
        for sentence, pause in whole:
            self.put(sentence, pause)

    def put(self, typed, pause=None):
        """Let a sentence be said. pause: after it; None: as it is written."""
        try:
            parts = parts_of(typed, self.options.apply_text_normalization == "off", self.longest)
        except ValueError:  # it has no words
            return
        parts[-1] = parts[-1][0], parts[-1][1] or pause or 0
        for said, silence in parts:
            self.parts.put_nowait((typed if len(parts) == 1 else said, said, silence))
            self.waiting += len(said)
        if self.waiting > MOST_WAITING:
            raise Refused(f"more than {MOST_WAITING} characters wait to be said", "text", 429)

    def flush(self):
        """Say also what is no whole sentence yet."""
        rest, self.rest, self.flushed = self.rest, "", True
        if rest.strip():
            self.put(rest)

    def close(self):
        """No more text will come."""
        if not self.closed:
            self.closed = True
            self.parts.put_nowait(None)

    async def stop(self, heard=None, tell=True):
        """Say no more. Of a conversation's turns what was sent, or the seconds that were `heard`, stays."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
        heard = self.sent if heard is None else min(self.sent, round(heard * self.speed * self.rate))
        cuts = []
        for speech, start in self.said:
            speech.gone = True
            self.all.engine.changed.set()
            await speech.ended.wait()
            for cut in speech.turns:
                cut.heard = max(0, min(heard - start, speech.taken)) // self.frame_size
                cuts.append(cut)
        if any(cut.heard < cut.whole for cut in cuts):
            await self.all.enter(Speech([], 0, None, [], 0, csm.Sampling(), kept=speech.kept, cuts=cuts), first=True)
        self.socket.texts.pop(self.name, None)
        with suppress(WebSocketDisconnect, RuntimeError, OSError, TimeoutError):
            if tell:
                await self.socket.send(self.name, audio=None, isFinal=True)

    # What is said of it.

    async def run(self):
        pause, n = 0, 0
        try:
            while (part := await self.parts.get()) is not None:
                typed, said, silence = part
                self.waiting -= len(said)
                self.speaking = True
                if n:
                    await self.give(np.zeros(int((pause or PAUSES["sentence"]) * self.rate), np.int16))
                await self.say(typed, said, n)
                pause, n, self.speaking = silence, n + 1, not self.parts.empty()
            if pause not in (0, *PAUSES.values()):  # which somebody wrote
                await self.give(np.zeros(int(pause * self.rate), np.int16))
            last = await self.encoded(None) if n else b""
            await self.socket.send(self.name, audio=base64.b64encode(last).decode() or None, isFinal=True)
            self.report(n)
            self.socket.texts.pop(self.name, None)
            if not self.socket.several:
                await self.socket.close(1000)
        except (WebSocketDisconnect, TimeoutError, OSError):  # it has left, or reads nothing
            await self.socket.close(1001)
        except (ValueError, RuntimeError, Busy, Refused) as e:
            if not self.socket.connected():  # it is stopped in a moment
                return
            for speech, _ in self.said:
                speech.gone = True
            self.all.engine.changed.set()
            self.speaking = False
            self.socket.texts.pop(self.name, None)
            if not isinstance(e, Refused):
                log.error("broken off after %.2f s of speech: %s", self.sent / self.rate, in_one_line(str(e)))
                e = Refused(str(e), None, 429 if isinstance(e, Busy) else 400 if isinstance(e, ValueError) else 500)
            with suppress(WebSocketDisconnect, RuntimeError, OSError, TimeoutError):
                await self.socket.fail(e, self.name)

    async def say(self, typed, said, n):
        """Say the n-th part, as part n of a request over HTTP is said."""
        o, talks = self.options, self.all.talks
        seed = (o.seed + n) % 2**64
        speech = Speech([(said, 0)], o.speaker, self.socket.voice, self.context, seed, self.socket.sampling, keeps=True)
        speech.kept = talks.open(o.conversation) if o.conversation else None
        after = o.after_turns if n == 0 else None
        await self.all.enter(speech, after, first=n > 0)
        self.said.append((speech, self.sent))
        while isinstance(piece := await speech.pieces.get(), np.ndarray):
            await self.give(piece)
            speech.taken += len(piece)
            self.all.engine.changed.set()
        if piece is not None:
            raise piece
        self.context = speech.context
        ms = 1000 * speech.made / self.rate / self.speed
        await self.socket.send(self.name, audio=None, isFinal=None, **aligned(typed, said, ms))

    async def give(self, piece):
        """Send (samples,) int16."""
        data = await self.encoded(piece)
        self.sent += len(piece)
        if data:
            await self.socket.send(self.name, audio=base64.b64encode(data).decode(), isFinal=None)

    async def encoded(self, piece):
        if self.marker is None:
            return self.encoder(piece)
        marked = await self.all.mark_piece(self.marker, piece)
        return self.encoder(marked) + (self.encoder(None) if piece is None else b"")

    def report(self, n):
        what = self.sent / self.rate, self.options.output_format, time.perf_counter() - self.began, n
        log.info("%.2f s of %s by WebSocket in %.2f s: %d sentences", *what)


def aligned(typed, said, ms):
    """ElevenLabs' times of the characters of a part that took so many milliseconds, all as long: an estimate."""

    def spread(text):
        text = f"{text} "
        ends = [round(ms * i / len(text)) for i in range(len(text) + 1)]
        return {
            "chars": [*text],
            "charStartTimesMs": ends[:-1],
            "charDurationsMs": [end - start for start, end in pairwise(ends)],
        }

    return {"alignment": spread(typed), "normalizedAlignment": spread(said)}
