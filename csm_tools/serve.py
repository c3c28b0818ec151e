"""A speech server with OpenAI's API: many requests on one model, said together, and streamed as they are made.

    python -m csm_tools.serve --model tiny --port 8000

POST /v1/audio/speech takes the fields of `Request` below: OpenAI's, and more. `/` is a page to try it, `/health` is for
what watches it. serve_engine.py has the model; here are requests, files, HTTP and the command.
"""

import asyncio
import base64
import io
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import asynccontextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import soundfile
import soxr

import csm  # before mlx
import mimi as codec
from csm_tools import command
from csm_tools.serve_engine import Busy, Engine, Speech
from csm_tools.text import parts_of

import mlx.core as mx  # isort: skip
import numpy as np

try:
    import anyio
    import av
    import uvicorn
    from pydantic import Base64Bytes, BaseModel, Field, ValidationError, model_validator
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import FileResponse, JSONResponse
    from starlette.routing import Route
except ImportError as e:
    print(f"csm-serve needs `pip install 'csm-speech[serve]'` ({e})", file=sys.stderr)
    sys.exit(2)

# response_format -> media type, container, encoder, bits a second, the container's options
FORMATS = {
    "mp3": ("audio/mpeg", "mp3", "libmp3lame", 64_000, {"write_xing": "0", "id3v2_version": "0"}),
    "opus": ("audio/ogg", "ogg", "libopus", 48_000, {"page_duration": "80000"}),  # microseconds
    "aac": ("audio/aac", "adts", "aac", 64_000, {}),
    "flac": ("audio/flac", "flac", "flac", None, {}),
    "wav": ("audio/wav", "wav", "pcm_s16le", None, {"fflags": "+bitexact"}),  # a header of 44 bytes
    "pcm": ("audio/pcm", "s16le", "pcm_s16le", None, {}),
}
OPENAI_VOICES = "alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse".split()
LARGEST = 16 * 2**20  # bytes of a request
LONGEST_CLIP = 60  # seconds
STALLED = 60  # seconds without reading after which a client is dropped

log = logging.getLogger("csm.serve")

# ---------------------------------------------------------------------------------------------------- requests


class Refused(Exception):
    """Why a request fails, as OpenAI says it: which field is wrong, the HTTP status, a code."""

    def __init__(self, message, param=None, status=400, code=None, headers=None):
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.status, self.headers = status, headers


class Turn(BaseModel):
    """What was said before."""

    speaker: int = Field(0, ge=0)
    text: str = Field(min_length=1)
    audio: Base64Bytes  # an audio file

    def segment(self):
        try:
            with soundfile.SoundFile(io.BytesIO(self.audio)) as file:
                if file.frames > LONGEST_CLIP * file.samplerate:
                    raise Refused(f"a clip may last {LONGEST_CLIP} s", "ref_audio")
                audio, rate = file.read(dtype="float32", always_2d=True).mean(axis=1), file.samplerate
            return csm.Segment(self.speaker, self.text, csm.as_samples(soxr.resample(audio, rate, 24_000)))
        except (ValueError, TypeError, soundfile.LibsndfileError):
            raise Refused("the clip is no audio file (WAV, FLAC, MP3, OGG)", "ref_audio") from None


class Request(BaseModel):
    """OpenAI's fields (platform.openai.com/docs/api-reference/audio/createSpeech), and from `speaker` on our own.

    `model` and `instructions` are taken and change nothing. What is null counts as absent.
    """

    input: str
    voice: str | dict[Literal["id"], str] | None = None
    response_format: Literal[tuple(FORMATS)] = "mp3"
    speed: float = Field(1, ge=0.25, le=4)
    stream_format: Literal["audio", "sse"] = "audio"
    normalize: bool = True  # say numbers, signs and markdown in words
    speaker: int = Field(0, ge=0)
    seed: int = Field(default_factory=lambda: secrets.randbits(32), ge=0, lt=2**64)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    ref_audio: Base64Bytes | None = None  # a clip of the voice to speak with, an audio file
    ref_text: str | None = None  # what that clip says
    context: list[Turn] = []  # what was said since

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, fields):
        return {name: x for name, x in fields.items() if x is not None} if isinstance(fields, dict) else fields


def read_request(body, voices, generator, longest):
    """A request's bytes -> Request, Speech, or Refused. voices: {name: the model's}; longest: an input's characters."""
    try:
        r = Request.model_validate_json(body)
        sampling = generator.read_options(r.seed, r.model_dump(include={"temperature", "top_k", "top_p", "min_p"}))[1]
    except ValidationError as e:
        field = ".".join(map(str, e.errors()[0]["loc"]))
        raise Refused(f"{field or 'the body'}: {e.errors()[0]['msg']}", field or None) from None
    except ValueError as e:
        raise Refused(str(e)) from None
    if not r.input.strip():
        raise Refused("`input` is empty", "input")
    if len(r.input) > longest:
        raise Refused(f"`input` has {len(r.input)} characters, and may have {longest}", "input")
    voice = r.voice.get("id", "") if isinstance(r.voice, dict) else r.voice
    if voice is not None and voice not in voices:
        raise Refused(f"unknown voice {voice!r}; there are: {', '.join(voices)}", "voice")
    if bool(r.ref_audio) != bool(r.ref_text):
        raise Refused("`ref_audio` and `ref_text` go together: a clip needs its transcript", "ref_audio")
    turns, voice = r.context, voices.get(voice)
    if r.ref_audio:  # in place of the voice
        turns, voice = [Turn.model_construct(speaker=r.speaker, text=r.ref_text, audio=r.ref_audio), *turns], "none"
    try:
        parts = parts_of(r.input, not r.normalize, generator.model.config.max_part_characters)
    except ValueError as e:
        raise Refused(f"`input`: {e}", "input") from None
    return r, Speech(parts, r.speaker, voice, [turn.segment() for turn in turns], r.seed, sampling)


# ------------------------------------------------------------------------------------------------------ files


class Encoder:
    """Pieces of sound -> pieces of one file. speed: how much faster than it was said, the pitch kept."""

    def __init__(self, format, rate, speed):
        _, container, encoder, bits, options = FORMATS[format]
        self.rate, self.samples, self.data = rate, 0, bytearray()
        pipe = SimpleNamespace(write=self.data.extend)  # which has no seek, so that no header is gone back to
        self.file = av.open(pipe, "w", format=container, options=options | {"flush_packets": "1"})
        self.track = self.file.add_stream(encoder, rate=rate, layout="mono")
        self.track.codec_context.thread_count = 1
        if bits:
            self.track.bit_rate = bits
        self.file.start_encoding()
        factors = [] if speed == 1 else [speed] if speed >= 0.5 else [0.5, speed / 0.5]  # atempo takes 0.5 and more
        self.graph = av.filter.Graph()
        self.graph.threads = 1
        source = self.graph.add_abuffer(sample_rate=rate, format="s16", layout="mono", time_base=Fraction(1, rate))
        tempo = [self.graph.add("atempo", str(factor)) for factor in factors]
        self.graph.link_nodes(source, *tempo, self.graph.add("abuffersink")).configure()

    def __call__(self, audio):
        """(samples,) int16, or None after the last -> the bytes that are ready."""
        frame = None
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(audio[None], format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = self.rate, self.samples, Fraction(1, self.rate)
            self.samples += len(audio)
        self.graph.push(frame)
        while True:
            try:
                self.file.mux(self.track.encode(self.graph.pull()))
            except (av.BlockingIOError, av.EOFError):
                break
        if audio is None:
            self.file.mux(self.track.encode(None))
            self.file.close()
        data = bytes(self.data)
        self.data.clear()
        return data


# ------------------------------------------------------------------------------------------------------ HTTP


def make_app(engine, args, address, mark=None):
    """The Starlette application of an Engine. args: of the command. mark: a Watermark for all that it says."""
    generator, rate, name = engine.generator, engine.generator.sample_rate, args.model or "csm-1b"
    own = sorted(generator.voices)
    voices = {name: own[i % len(own)] if own else "none" for i, name in enumerate(OPENAI_VOICES)}
    voices |= {name: name for name in (*own, "none")}

    def check_key(request):
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if args.api_key and not secrets.compare_digest(given.encode(), args.api_key.encode()):
            raise Refused("the API key is missing or wrong", None, 401, "invalid_api_key")

    async def speak(request):
        check_key(request)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > LARGEST:
                raise Refused(f"the request is larger than {LARGEST} bytes", None, 413)
        # in another thread, since a clip takes a while
        r, speech = await asyncio.to_thread(read_request, bytes(body), voices, generator, args.max_characters)
        engine.submit(speech)
        return partial(answer, r, speech)

    def marked(speech, loop):
        """The queue of its pieces with the watermark in them, which a thread makes, a mark (0.975 s) at a time."""
        out, last = asyncio.Queue(), []

        def said():
            while True:
                piece = asyncio.run_coroutine_threadsafe(speech.pieces.get(), loop).result()
                if not isinstance(piece, np.ndarray):
                    return last.append(piece)
                yield piece / np.float32(32767)

        def work():
            for piece in mark.embed_stream(said(), rate):
                loop.call_soon_threadsafe(out.put_nowait, codec.to_pcm16(piece))
            loop.call_soon_threadsafe(out.put_nowait, *last)
            mx.clear_streams()  # or the process may not end well

        threading.Thread(target=work, daemon=True).start()
        return out

    async def answer(r, speech, scope, receive, send):
        """The response, as an ASGI application. It breaks off where the client leaves or stops reading."""

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                try:
                    await tell(r, speech, scope, receive, send)
                except TimeoutError:
                    log.error("dropped a client that read nothing for %d s", STALLED)
                tasks.cancel_scope.cancel()
        finally:
            speech.gone = True
            speech.pieces.put_nowait(None)  # for a thread that waits for more
            engine.changed.set()

    async def tell(r, speech, scope, receive, send):
        pieces = marked(speech, asyncio.get_running_loop()) if mark else speech.pieces
        start, piece = time.perf_counter(), await pieces.get()
        first = time.perf_counter() - start
        if isinstance(piece, Exception):
            return await (await refuse(None, piece))(scope, receive, send)
        sse = r.stream_format == "sse"
        headers = {"content-type": "text/event-stream" if sse else FORMATS[r.response_format][0], "x-seed": str(r.seed)}
        headers |= {"cache-control": "no-store", "x-accel-buffering": "no"}
        headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        encode = Encoder(r.response_format, rate, r.speed)
        while not isinstance(piece, Exception):
            data = encode(piece)
            if sse:
                data = event("speech.audio.delta", audio=base64.b64encode(data).decode()) if data else b""
                data += event("speech.audio.done", usage=usage(speech)) if piece is None else b""
            with anyio.fail_after(STALLED):
                await send({"type": "http.response.body", "body": data, "more_body": piece is not None})
            if piece is None:
                taken, text = time.perf_counter() - start, f": {r.input}" if args.log_text else ""
                what = speech.made / rate, r.response_format, taken, first, speech.voice, r.seed, text
                return log.info("%.2f s of %s in %.2f s, the first after %.2f s, voice %s, seed %d%s", *what)
            speech.taken += len(piece)
            engine.changed.set()
            piece = await pieces.get()
        if sse:
            data = event("error", error={"message": str(piece)})
            await send({"type": "http.response.body", "body": data, "more_body": True})
        # Without a last piece: so the client sees that the file is not whole.

    def usage(speech):
        n = sum(len(generator.text_rows(text, speech.speaker)) for text, _ in speech.parts)
        frames = speech.made // generator.mimi.frame_size
        return {"input_tokens": n, "output_tokens": frames, "total_tokens": n + frames}

    def event(kind, **fields):
        return f"data: {json.dumps({'type': kind} | fields)}\n\n".encode()

    def models(request):
        check_key(request)
        model = {"id": name, "object": "model", "created": 0, "owned_by": "csm"}
        return JSONResponse({"object": "list", "data": [model]})

    def voice_list(request):
        return JSONResponse({"voices": [{"id": voice, "name": voice} for voice in (*own, "none")]})

    def page(request):
        inline = "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        policy = f"default-src 'none'; connect-src 'self'; media-src blob:; img-src data:; {inline}"
        return FileResponse(Path(__file__).with_name("serve.html"), headers={"content-security-policy": policy})

    async def refuse(request, e):
        if isinstance(e, HTTPException):
            e = Refused(e.detail, None, e.status_code, headers=e.headers)
        elif isinstance(e, Busy):
            e = Refused(str(e), None, 429, "rate_limit_exceeded", {"Retry-After": "1"})
        elif isinstance(e, ValueError):  # the Engine's
            e = Refused(str(e))
        elif not isinstance(e, Refused):
            e = Refused(str(e) if isinstance(e, RuntimeError) else "internal error", None, 500)
        return JSONResponse(e.body, e.status, e.headers)

    @asynccontextmanager
    async def lifespan(app):
        running = asyncio.create_task(engine.run())
        print(f"ready: {address}", file=sys.stderr, flush=True)
        yield
        running.cancel()

    routes = [
        Route("/v1/audio/speech", speak, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/audio/models", lambda request: JSONResponse({"models": [{"id": name}]})),  # this and the voices
        Route("/v1/audio/voices", voice_list),  # without a key: Open WebUI sends none
        Route("/health", lambda request: JSONResponse(engine.health())),
        Route("/", page),
    ]
    handlers = dict.fromkeys((Refused, Busy, HTTPException, Exception), refuse)
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


# ------------------------------------------------------------------------------------------------------ command


def serve(args):
    if args.max_batch < 1 or args.max_waiting < 0 or not 0 <= args.port < 2**16:
        raise ValueError("--max-batch is 1 or more, --max-waiting 0 or more, --port 0 to 65535")
    mark = command.watermark() if args.watermark else None
    generator = command.load_for(args)
    if args.voices:
        clips = [f for f in Path(args.voices).glob("*.wav") if f.with_suffix(".txt").is_file()]
        if not clips:
            raise ValueError(f"{args.voices} holds no clips (name.wav) with their transcripts (name.txt)")
        generator.voices |= {f.stem: f.parent for f in clips}
    engine = Engine(generator, args.max_batch, args.max_waiting)
    engine.warm_up()
    if mark:  # so that its arrays are there for other threads
        mark.embed(np.sin(np.arange(generator.sample_rate, dtype=np.float32)), generator.sample_rate)
    logging.basicConfig(format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listener:
        host = f"[{args.host}]" if ":" in args.host else args.host
        app = make_app(engine, args, f"http://{host}:{listener.getsockname()[1]}", mark)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=args.grace)
        uvicorn.Server(config).run(sockets=[listener])


def main(argv=None):
    p = command.parser_for("csm_tools.serve", description="A speech server with OpenAI's API.")
    command.add_model_options(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="0: any that is free (default 8000)")
    p.add_argument("--api-key", default=os.environ.get("CSM_API_KEY"), help="asked of clients (default: $CSM_API_KEY)")
    p.add_argument("--voices", metavar="DIR", help="clips to speak like: name.wav with name.txt beside it")
    p.add_argument("--max-batch", type=int, default=16, metavar="N", help="requests spoken at once (default 16)")
    p.add_argument("--max-waiting", type=int, default=64, metavar="N", help="that wait beyond those (default 64)")
    p.add_argument("--max-characters", type=int, default=4096, metavar="N", help="of an input (default 4096)")
    p.add_argument("--grace", type=int, default=30, metavar="S", help="seconds that SIGTERM leaves what is under way")
    p.add_argument("--watermark", action="store_true", help="mark all sound as generated; it comes a second later")
    p.add_argument("--log-text", action="store_true", help="log what is said")
    return command.run(p, serve, p.parse_args(argv), "stopped")


if __name__ == "__main__":
    sys.exit(main())
