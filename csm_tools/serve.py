"""A speech server with OpenAI's API: many requests on one model, said together, and streamed as they are made.

    python -m csm_tools.serve --model tiny --port 8000

POST /v1/audio/speech takes the fields of `Request` in serve_requests.py: OpenAI's, and more. `/` is a page to try it,
`/health` is for what watches it. Here are HTTP and the command. serve_engine.py has the model, serve_files.py clips and
formats, serve_voices.py the voices, serve_network.py what connections may do.
"""

import asyncio
import base64
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import csm  # before mlx
from csm_tools import command
from csm_tools.serve_engine import Busy, Engine, Speech, failed

import mlx.core as mx  # isort: skip
import numpy as np

try:
    import anyio
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route, WebSocketRoute

    from csm_tools import serve_network
    from csm_tools.serve_conversations import Conversations
    from csm_tools.serve_files import FORMATS, SIZED, Encoder, Marker
    from csm_tools.serve_requests import Refused, Turn, hear, in_one_line, parse, read_clips, read_form, read_request
    from csm_tools.serve_socket import Sockets
    from csm_tools.serve_voices import Voices
except ImportError as e:
    packages = "starlette uvicorn websockets av pydantic"
    print(f"csm-serve needs csm-speech's extra [serve], or: pip install {packages} ({e})", file=sys.stderr)
    sys.exit(2)

LARGEST = 16 * 2**20  # bytes of a request
STALLED = 60  # seconds without reading after which a client is dropped

log = logging.getLogger("csm.serve")

# ------------------------------------------------------------------------------------------------------ HTTP


def make_app(engine, args, address, mark=None, voices=None):
    """The Starlette application of an Engine. args: of the command. mark: a Watermark for all that it says."""
    generator, rate, name = engine.generator, engine.generator.sample_rate, shown_name(args.model)
    voices, talks = voices or Voices(generator), Conversations(args.conversation_memory * 10**6)
    marking = ThreadPoolExecutor(1, "watermark")  # one for all, as MLX keeps something of each thread

    leaving = set()  # tasks, which asyncio alone would forget

    async def mark_piece(marker, piece):
        return await asyncio.get_running_loop().run_in_executor(marking, marker, piece)

    def check_key(request, given=None):
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = given or request.headers.get("xi-api-key") or (key.strip() if scheme.lower() == "bearer" else "")
        if args.api_key and not secrets.compare_digest(given.encode(), args.api_key.encode()):
            raise Refused("the API key is missing or wrong", None, 401, "invalid_api_key")

    def check_origin(request):
        origin = request.headers.get("origin")
        if origin and origin.partition("://")[2] != request.headers.get("host") and origin not in args.cors:
            raise Refused("a page of another origin may not do this (--cors)", None, 403)

    async def read_body(request, *types):
        """A request's bytes. Its type must be one of these, which no page of another origin can send unasked."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in types:
            raise Refused(f"the header Content-Type must be {' or '.join(types)}", None, 415)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > LARGEST:
                raise Refused(f"the request is larger than {LARGEST} bytes", None, 413)
        return bytes(body)

    async def speak(request):
        check_key(request)
        body = await read_body(request, "application/json")
        # in another thread, since a clip takes a while
        r, speech, *notes = await asyncio.to_thread(read_request, body, voices, generator, args.max_characters)
        say_notes(*notes)
        if r.conversation is not None:
            speech.kept = talks.open(r.conversation)
        await enter(speech, r.after_turns)
        return partial(answer, r, speech, notes)

    def say_notes(doubts, heard):
        for doubt in doubts:
            log.warning("%s", in_one_line(doubt))
        for text in heard if args.log_text else ():
            log.info("heard: %s", in_one_line(text))

    async def enter(speech, after=None, first=False):
        """Submit a Speech; one of a conversation as soon as those before it have ended."""
        kept = speech.kept
        if kept is None:
            return engine.submit(speech, first)
        await kept.lock.acquire()
        try:
            n = len(kept.turns())
            if after not in (None, n):
                message = f"the conversation has {n} turns here, not {after}: begin it again with its context"
                raise Refused(message, "conversation", 404, "conversation_not_found")
            if kept.talk and speech.parts:
                speech.context = []  # which counts in the first request alone
            engine.submit(speech, first)
        except BaseException:
            kept.lock.release()
            raise

        async def leave():
            await speech.ended.wait()
            kept.used = time.monotonic()
            kept.lock.release()
            talks.tidy()

        leaving.add(task := asyncio.create_task(leave()))
        task.add_done_callback(leaving.discard)

    async def answer(r, speech, notes, scope, receive, send):
        """The response, as an ASGI application. It breaks off where the client leaves or stops reading."""

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                try:
                    await tell(r, speech, notes, scope, receive, send)
                except TimeoutError:
                    log.error("dropped a client that read nothing for %d s", STALLED)
                except OSError:  # it left while something was sent to it
                    log.info("a client left after %.2f s of speech", speech.taken / rate)
                tasks.cancel_scope.cancel()
        except asyncio.CancelledError:  # SIGTERM, and --grace is over
            log.error("broken off after %.2f s of speech: the server stops", speech.taken / rate)
        finally:
            speech.gone = True
            engine.changed.set()

    async def tell(r, speech, notes, scope, receive, send):
        sse = r.stream_format == "sse"
        whole = r.response_format in SIZED and len(speech.parts) == 1 and not (sse or r.stream)
        encode = Encoder(r.response_format, rate, r.speed, whole)
        marker = Marker(mark, rate) if mark else None
        start, first, data, begun = time.perf_counter(), None, b"", False

        async def encoded(piece):
            if marker is None:
                return encode(piece)
            marked = await mark_piece(marker, piece)
            return encode(marked) + (encode(None) if piece is None else b"")

        async def begin(length=None):
            kind = "text/event-stream" if sse else FORMATS[r.response_format][0]
            headers = {"content-type": kind, "x-seed": str(r.seed), "cache-control": "no-store"}
            if speech.kept:
                headers["x-conversation-turns"] = str(len(speech.kept.turns()) - speech.added)
            headers |= {"x-accel-buffering": "no"} if length is None else {"content-length": str(length)}
            for name, lines in zip(("x-warning", "x-transcript"), notes):
                if lines:
                    headers[name] = in_one_line("; ".join(lines)).encode("ascii", "replace").decode()
            headers = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

        while True:
            piece = await speech.pieces.get()
            if not isinstance(piece, Exception):
                first = first or time.perf_counter() - start
                try:
                    data = await encoded(piece)
                except Exception as e:
                    piece = failed(e)
            if isinstance(piece, Exception):
                break
            if not begun and (piece is None or not whole):
                begun = True
                await begin(len(data) if whole else None)
            if sse:
                data = event("speech.audio.delta", audio=base64.b64encode(data).decode()) if data else b""
                data += captions(r, speech, piece)
                data += event("speech.audio.done", **outcome(speech)) if piece is None else b""
            if not whole or piece is None:
                with anyio.fail_after(STALLED):
                    await send({"type": "http.response.body", "body": data, "more_body": piece is not None})
            if piece is None:
                return report(r, speech, time.perf_counter() - start, first)
            speech.taken += len(piece)
            engine.changed.set()

        if not begun:
            if not isinstance(piece, ValueError):
                log.error("nothing was said: %s", piece)
            return await (await refuse(None, piece))(scope, receive, send)
        log.error("broken off after %.2f s of speech: %s", speech.taken / rate, in_one_line(str(piece)))
        if sse:
            data = event("error", error={"message": str(piece)})
            await send({"type": "http.response.body", "body": data, "more_body": True})
        # Without a last piece: so the client sees that the file is not whole.

    def captions(r, speech, piece):
        """The events of the parts whose sound ends with `piece`, or has ended."""
        heard, out = speech.taken + (0 if piece is None else len(piece)), b""
        while r.captions and speech.captions and (piece is None or speech.captions[0][2] <= heard):
            text, *times = speech.captions.pop(0)
            start, end = (round(n / rate / r.speed, 3) for n in times)
            out += event("speech.caption", text=text, start=start, end=end)
        return out

    def report(r, speech, taken, first):
        text = f": {in_one_line(r.input)}" if args.log_text else ""
        if speech.cut_off:
            parts = ", ".join(map(str, speech.cut_off))
            text = f"; cut off at its greatest length: part {parts} of {len(speech.parts)}{text}"
        what = speech.made / rate, r.response_format, taken, first, r.voice or "", r.seed, text
        log.info("%.2f s of %s in %.2f s, the first after %.2f s, voice %s, seed %d%s", *what)

    def outcome(speech):
        """What the last event says: OpenAI's usage; the parts, counted from 1, that were cut off at their length."""
        n = sum(len(generator.text_rows(text, speech.speaker)) for text, _ in speech.parts)
        frames = speech.made // generator.mimi.frame_size
        usage = {"input_tokens": n, "output_tokens": frames, "total_tokens": n + frames}
        return {"usage": usage, "cut_off": speech.cut_off}

    def event(kind, **fields):
        return f"data: {json.dumps({'type': kind} | fields)}\n\n".encode()

    # Lists and the page need no key: Open WebUI sends none.

    def models(request):
        model = {"id": name, "object": "model", "created": 0, "owned_by": "csm"}
        asked = request.path_params.get("id", "").rstrip("/")  # of /v1/models/ it is empty
        if asked not in ("", name):
            raise Refused(f"no model {asked[:80]!r}: there is {name!r}", "model", 404, "model_not_found")
        return JSONResponse(model if asked else {"object": "list", "data": [model]})

    def list_voices(request):
        known = [{"id": voice, "name": voice} for voice in voices.names()]
        return JSONResponse({"object": "list", "data": known, "voices": known})

    async def change_voices(change, *arguments):
        """Call voices.add or voices.remove in a thread."""
        try:
            return await asyncio.to_thread(change, *arguments)
        except ValueError as e:
            raise Refused(str(e)) from None
        except OSError as e:
            raise Refused(str(e), status=500) from None

    async def add_voice(request):
        check_key(request)
        check_folder()
        check_origin(request)
        body = await read_body(request, "multipart/form-data", "application/json")
        form = read_form(request.headers["content-type"], body)
        text = await change_voices(voices.add, form.name, form.audio_sample, form.ref_text, hear)
        log.info("voice %s was added", form.name)
        return JSONResponse({"id": form.name, "name": form.name, "object": "voice", "ref_text": text}, 201)

    async def remove_voice(request):
        check_key(request)
        check_folder()
        voice = request.path_params["id"]
        if not await change_voices(voices.remove, voice):
            raise Refused(f"no voice {voice[:80]!r} that was added here", "voice", 404, "voice_not_found")
        log.info("voice %s was deleted", voice)
        return JSONResponse({"id": voice, "object": "voice.deleted", "deleted": True})

    def conversation(request):
        check_key(request)
        name = request.path_params["id"]
        kept = talks.find(name)
        if kept is None:
            message = f"no conversation {name[:80]!r} here, or no more: begin it with its context"
            raise Refused(message, "conversation", 404, "conversation_not_found")
        return name, kept

    def described(name, kept):
        rate = generator.mimi.config.frame_rate
        turns = [(turn.speaker, turn.text, round(len(turn.codes) / rate, 2)) for turn in kept.turns()]
        turns = [dict(zip(("speaker", "text", "seconds"), turn)) for turn in turns]
        return JSONResponse({"id": name, "object": "conversation", "turns": turns})

    def show_conversation(request):
        return described(*conversation(request))

    def end_conversation(request):
        name, _ = conversation(request)
        talks.remove(name)
        return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})

    async def add_turn(request):
        """Add a turn that somebody else spoke."""
        name, kept = conversation(request)
        turn = parse(Turn, await read_body(request, "application/json"))
        seconds = generator.max_positions / generator.mimi.config.frame_rate
        segments, *notes = await asyncio.to_thread(read_clips, [("audio", turn)], seconds)
        say_notes(*notes)
        speech = Speech([], turn.speaker, None, segments, 0, csm.Sampling(), kept=kept)
        await enter(speech)
        end = await speech.pieces.get()
        if end is not None:
            raise end
        return described(name, kept)

    def check_folder():
        if voices.folder is None:
            raise Refused("this server keeps no voices: it was started without --voices DIR", None, 403)

    def page(request):
        inline = "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        policy = f"default-src 'none'; connect-src 'self'; media-src blob:; img-src data:; {inline}"
        return FileResponse(Path(__file__).with_name("serve.html"), headers={"content-security-policy": policy})

    async def refuse(request, e):
        if isinstance(e, ClientDisconnect):
            return Response(status_code=400)  # which nobody gets
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
        with suppress(asyncio.CancelledError):
            await running
        marking.submit(mx.clear_streams)  # or the process may not end well
        marking.shutdown()

    routes = [
        ("/v1/audio/speech", speak, "POST"),
        ("/v1/models", models, "GET"),
        ("/v1/models/{id:path}", models, "GET"),
        ("/v1/audio/models", lambda request: JSONResponse({"models": [{"id": name}]}), "GET"),
        ("/v1/audio/voices", list_voices, "GET"),
        ("/v1/audio/voices", add_voice, "POST"),
        ("/v1/audio/voices/{id}", remove_voice, "DELETE"),
        ("/v1/conversations/{id}", show_conversation, "GET"),
        ("/v1/conversations/{id}", end_conversation, "DELETE"),
        ("/v1/conversations/{id}/turns", add_turn, "POST"),
        ("/health", lambda request: JSONResponse(engine.health() | {"model": name}), "GET"),
    ]
    routes = [Route(path + end, f, methods=[method]) for end in ("", "/") for path, f, method in routes]
    routes.append(Route("/", page))
    new_marker = partial(Marker, mark, rate) if mark else None
    sockets = Sockets(engine, args, voices, talks, enter, (check_key, check_origin), (new_marker, mark_piece))
    for path, several in (("stream-input", False), ("multi-stream-input", True)):
        routes.append(WebSocketRoute(f"/v1/text-to-speech/{{voice}}/{path}", partial(sockets.talk, several=several)))
    handlers = dict.fromkeys((Refused, Busy, HTTPException, ClientDisconnect, Exception), refuse)
    own = ["x-seed", "x-warning", "x-transcript", "x-conversation-turns"]
    options = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": own}
    cors = [Middleware(CORSMiddleware, allow_origins=args.cors, **options)] if args.cors else []
    return Starlette(routes=routes, exception_handlers=handlers, middleware=cors, lifespan=lifespan)


def shown_name(model):
    """What clients read as the model's name: of a path the last part alone."""
    return Path(model).resolve().name if model and Path(model).exists() else model or "csm-1b"


# ------------------------------------------------------------------------------------------------------ command


def default_voice(args, generator):
    """A voice's name, or None: see Voices. Fine-tuning puts no voice before a text, so what it made gets none here."""
    tuned = args.adapter or (args.model != "tiny" and not generator.model.config.use_default_voice_prompt)
    return "none" if tuned and args.default_voice is None else args.default_voice


def serve(args):
    for name in ("max_batch", "max_characters", "max_waiting", "conversation_memory", "grace"):
        least = int(name in ("max_batch", "max_characters"))
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(args, name)}")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be 0 to 65535, not {args.port}")
    if not args.host:
        raise ValueError("--host is empty: give an address, such as 127.0.0.1, or 0.0.0.0 for all of this machine")
    logging.basicConfig(format="%(asctime)s %(message)s")
    mark = command.watermark() if args.watermark else None
    generator = command.load_for(args, fallback=False)
    voices = Voices(generator, args.voices, default_voice(args, generator))
    engine = Engine(generator, args.max_batch, args.max_waiting)
    engine.warm_up()
    if mark:  # so that its arrays are there for other threads
        mark.embed(np.sin(np.arange(generator.sample_rate, dtype=np.float32)), generator.sample_rate)
    log.setLevel(logging.INFO)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listener:
        host = f"[{args.host}]" if ":" in args.host else args.host
        app = make_app(engine, args, f"http://{host}:{listener.getsockname()[1]}", mark, voices)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which uvicorn raises again once all is said
        uvicorn.Server(serve_network.configure(app, args.grace)).run(sockets=[listener])


def main(argv=None):
    p = command.parser_for("csm_tools.serve", description="A speech server with OpenAI's API.")
    command.add_model_options(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="0: any that is free (default 8000)")
    p.add_argument("--api-key", default=os.environ.get("CSM_API_KEY"), help="asked of clients (default: $CSM_API_KEY)")
    p.add_argument("--voices", metavar="DIR", help="voices: name.wav with name.txt beside it; clients may add more")
    what = "for requests that name none, or one of OpenAI's names (default: the model's own; none if it was fine-tuned)"
    p.add_argument("--default-voice", metavar="NAME", help=what)
    p.add_argument("--cors", metavar="ORIGIN", action="append", default=[], help="let its pages ask; repeatable")
    p.add_argument("--max-batch", type=int, default=16, metavar="N", help="requests spoken at once (default 16)")
    p.add_argument("--max-waiting", type=int, default=64, metavar="N", help="that wait beyond those (default 64)")
    p.add_argument("--max-characters", type=int, default=4096, metavar="N", help="of an input (default 4096)")
    what = {"type": int, "default": 1000, "metavar": "MB", "help": "for kept conversations (default 1000)"}
    p.add_argument("--conversation-memory", **what)
    p.add_argument("--grace", type=int, default=30, metavar="S", help="seconds that SIGTERM leaves what is under way")
    p.add_argument("--watermark", action="store_true", help="mark all sound as generated; it comes a second later")
    p.add_argument("--log-text", action="store_true", help="log what is said")
    return command.run(p, serve, p.parse_args(argv), "stopped")


if __name__ == "__main__":
    sys.exit(main())
