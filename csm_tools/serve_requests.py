"""What clients of the server may ask for: the fields of a request, checked; what they are told of their mistakes."""

import base64
import binascii
import difflib
import email.message
import json
import re
import secrets
import threading
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

import csm
from csm_tools.audio import RATE, SHORTEST, check_clip, trimmed
from csm_tools.command import LAST_SPEAKER
from csm_tools.serve_engine import Speech
from csm_tools.serve_files import FORMATS, LONGEST_CLIP, read_clip
from csm_tools.text import parts_of
from csm_tools.transcribe import transcribe

MOST_CLIPS = 64  # in one request

ears = threading.BoundedSemaphore(3)  # one clip is transcribed, two wait


class Refused(Exception):
    """Why a request fails, as OpenAI says it: which field is wrong, the HTTP status, a code."""

    def __init__(self, message, param=None, status=400, code=None, headers=None):
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.status, self.headers = status, headers


def without_nulls(x):
    """What is null counts as absent, in lists of objects too."""
    if isinstance(x, dict):
        return {name: without_nulls(value) for name, value in x.items() if value is not None}
    return [without_nulls(value) for value in x] if isinstance(x, list) else x


def read_base64(x):
    """An audio file in base64, with or without "data:...;base64," before it and "=" behind it -> its bytes."""
    if not isinstance(x, str) or not x.strip():
        raise ValueError("expected an audio file in base64")
    if re.match(r"\s*(https?:|file:|\.{0,2}/|~|[A-Za-z]:\\)", x) and len(x) < 4096:
        raise ValueError("expected an audio file in base64, not an address or a path: nothing is fetched or opened")
    x = x.partition(",")[2] if x.lstrip().startswith("data:") else x
    x = re.sub(r"\s", "", x).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(x + "=" * (-len(x) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("expected an audio file in base64, which this is not") from None


def read_voice(x):
    """A name, {"id": name}, or what stands for none -> the name or None."""
    x = x.get("id", x) if isinstance(x, dict) else x
    if x and not isinstance(x, str):
        raise ValueError('expected a name, or {"id": name}')
    return x or None


def lower(x):
    return x.lower() if isinstance(x, str) else x


Sound = Annotated[bytes, BeforeValidator(read_base64)]


class Turn(BaseModel):
    """What was said before: a clip."""

    speaker: int = Field(0, ge=0, le=LAST_SPEAKER)
    text: str | None = Field(None, min_length=1)  # None: what is heard in the clip
    audio: Sound


class Voiced(BaseModel):
    """A voice that a speaker of a context has."""

    speaker: int = Field(0, ge=0, le=LAST_SPEAKER)
    voice: Annotated[str, BeforeValidator(read_voice)]


def which_turn(x):
    return "~voice" if isinstance(x, dict) and x.get("voice") and "audio" not in x else "~clip"


AnyTurn = Annotated[Annotated[Turn, Tag("~clip")] | Annotated[Voiced, Tag("~voice")], Discriminator(which_turn)]


class Speaking(BaseModel):
    """How something is said: our own fields, the same over HTTP and by a WebSocket."""

    speaker: int = Field(0, ge=0, le=LAST_SPEAKER)
    seed: int = Field(default_factory=lambda: secrets.randbits(32), ge=0, lt=2**64)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    conversation: str | None = Field(None, min_length=1, max_length=200)  # a name: this is said after all said there
    after_turns: int | None = Field(None, ge=0)  # how many turns it must have, so that a lost one is noticed

    def sampling(self, generator):
        """A csm.Sampling. Raises Refused."""
        which = {"temperature", "top_k", "top_p", "min_p"}
        try:
            return generator.read_options(self.seed, self.model_dump(include=which))[1]
        except ValueError as e:
            raise Refused(str(e), next((name for name in which if str(e).startswith(name)), None)) from None


class Request(Speaking):
    """OpenAI's fields (platform.openai.com/docs/api-reference/audio/createSpeech), and from `captions` on our own.

    `model` and `instructions` are taken and change nothing, and other programs' fields too. What is null is absent.
    """

    input: str
    voice: Annotated[str | None, BeforeValidator(read_voice)] = None
    response_format: Annotated[Literal[tuple(FORMATS)], BeforeValidator(lower)] = "mp3"
    speed: float = Field(1, ge=0.25, le=4)
    stream_format: Annotated[Literal["audio", "sse"], BeforeValidator(lower)] = "audio"
    normalize: bool = True  # say numbers, signs and markdown in words
    captions: bool = False  # with sse: an event for each part that was said, with its times
    stream: bool = False  # a short WAV or FLAC too: at once, not with its length in the header
    ref_audio: Sound | None = None  # a clip of the voice to speak with
    ref_text: str | None = None  # what that clip says; None: what is heard in it
    context: list[AnyTurn] = Field([], max_length=MOST_CLIPS)  # what was said since, and voices of speakers

    @model_validator(mode="before")
    @classmethod
    def prepare(cls, fields):
        if not isinstance(fields, dict):
            return fields
        known = {*cls.model_fields, "model", "instructions"}
        for name in fields.keys() - known:
            if meant := difflib.get_close_matches(str(name), known, 1, 0.8):
                raise ValueError(f"unknown field `{str(name)[:40]}`: did you mean `{meant[0]}`?")
        for name in ("ref_audio", "ref_text"):
            if fields.get(name) == "":
                fields = fields | {name: None}
        return without_nulls(fields)


class NewVoice(BaseModel):
    """A voice to keep. `consent`, of other servers' form, is not asked for."""

    name: str
    audio_sample: Sound
    ref_text: str | None = None  # None: what is heard in the clip

    @model_validator(mode="before")
    @classmethod
    def prepare(cls, fields):
        return without_nulls(fields)


RATES = 8000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000
STREAMS = {  # ElevenLabs' output_format -> the format, its samples a second, bits a second or None
    **{f"pcm_{rate}": ("pcm", rate, None) for rate in RATES},
    **{f"mp3_{rate}_{k}": ("mp3", rate, 1000 * k) for rate in (22_050, 24_000, 44_100) for k in (32, 48, 64, 96, 128)},
    "mp3_44100_192": ("mp3", 44_100, 192_000),
    **{f"opus_48000_{k}": ("opus", 48_000, 1000 * k) for k in (32, 64, 96, 128, 192)},
    "ulaw_8000": ("ulaw", 8000, None),
    "alaw_8000": ("alaw", 8000, None),
}


class Stream(Speaking):
    """What the address of a WebSocket says: the voice and ElevenLabs' options."""

    voice: str
    output_format: Literal[tuple(STREAMS)] = "mp3_44100_128"
    apply_text_normalization: Literal["auto", "on", "off"] = "auto"
    inactivity_timeout: float = Field(20, gt=0, le=180)  # seconds


class VoiceSettings(BaseModel):
    """Of these only the speed is known here."""

    speed: float = Field(1, ge=0.25, le=4)


class Message(BaseModel):
    """What comes by a WebSocket: ElevenLabs' fields, and `heard` of our own."""

    text: str = ""
    flush: bool = False
    context_id: str | None = Field(None, max_length=200)
    close_context: bool = False
    close_socket: bool = False
    voice_settings: VoiceSettings = VoiceSettings()
    xi_api_key: str | None = None
    heard: float | None = Field(None, ge=0, allow_inf_nan=False)  # stop: so many seconds of it were heard

    @model_validator(mode="before")
    @classmethod
    def prepare(cls, fields):
        return without_nulls(fields)


def parse(kind, body):
    """A request's bytes -> a BaseModel of this kind. Raises Refused, which names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(name) for name in error["loc"] if not str(name).startswith("~"))  # which is a Tag
        message = error["msg"].removeprefix("Value error, ")
        raise Refused(f"{field}: {message}" if field else message, field or None) from None


def read_clips(turns, seconds):
    """[(field, Turn)] -> Segments, doubts about them, and what was heard in those without a text.

    seconds: how many all together may last, with their silence, which takes as long to read.
    """
    segments, warnings, heard, left = [], [], [], seconds
    for field, turn in turns:
        try:
            whole = read_clip(turn.audio, min(LONGEST_CLIP, left))
            audio, note = trimmed(whole)
            doubts = check_clip(audio, turn.text, SHORTEST if field == "ref_audio" else 0.0)  # "Yes." is short
            if not (turn.text or "").strip():
                turn.text = hear(audio)
                heard.append(turn.text)
        except ValueError as e:
            more = f" (the clips of a request may last {seconds:.0f} s together)" if left < LONGEST_CLIP else ""
            raise Refused(f"{field}: {e}{more}", field) from None
        left -= len(whole) / RATE
        segments.append(csm.Segment(turn.speaker, turn.text, audio))
        warnings += [f"{field}: {doubt}" for doubt in (note, *doubts) if doubt]
    return segments, warnings, heard


def hear(audio):
    """transcribe.transcribe, for few at once: it keeps a thread and the processor busy."""
    if not ears.acquire(blocking=False):
        raise Refused("other clips are being transcribed", None, 429, "rate_limit_exceeded", {"Retry-After": "5"})
    try:
        return transcribe(audio)
    finally:
        ears.release()


def check_voice(voice, known, field):
    if voice not in known:
        raise Refused(f"unknown voice {voice[:80]!r}; there are: {', '.join(known)}", field)


def read_request(body, voices, generator, longest):
    """A request's bytes -> Request, Speech, doubts about it, what was heard in its clips. Raises Refused.

    longest: an input's characters.
    """
    r = parse(Request, body)
    sampling = r.sampling(generator)
    if not r.input.strip():
        raise Refused("`input` is empty", "input")
    if len(r.input) > longest:
        raise Refused(f"`input` has {len(r.input)} characters, and may have {longest}", "input")
    try:
        parts = parts_of(r.input, not r.normalize, generator.model.config.max_part_characters)
    except ValueError as e:
        raise Refused(f"`input`: {e}", "input") from None
    known = voices.table()
    if r.voice is not None:
        check_voice(r.voice, known, "voice")
    if r.ref_audio is None and r.ref_text is not None:
        raise Refused("`ref_audio` and `ref_text` go together: a transcript is that of a clip", "ref_audio")
    for i, turn in enumerate(r.context):
        if isinstance(turn, Voiced):
            check_voice(turn.voice, known, f"context.{i}.voice")
    turns = [(f"context.{i}.audio", turn) for i, turn in enumerate(r.context) if isinstance(turn, Turn)]
    if r.ref_audio is not None:
        clip = Turn.model_construct(speaker=r.speaker, text=r.ref_text or None, audio=r.ref_audio)
        turns.insert(0, ("ref_audio", clip))
    seconds = generator.max_positions / generator.mimi.config.frame_rate
    clips, warnings, heard = read_clips(turns, seconds)
    n = int(r.ref_audio is not None)
    context, rest = clips[:n], iter(clips[n:])
    context += [next(rest) if isinstance(turn, Turn) else (known[turn.voice], turn.speaker) for turn in r.context]
    speakers = {turn.speaker for turn in (*clips, *r.context)}
    if context and r.speaker not in speakers:
        warnings.append(f"no clip is of speaker {r.speaker}, who has the voice of another or none")
    voice = voices.default if r.voice is None else known[r.voice]
    return r, Speech(parts, r.speaker, voice, context, r.seed, sampling), warnings, heard


def read_form(content_type, body):
    """A NewVoice as JSON or as multipart/form-data. Raises Refused."""
    header = email.message.Message()
    header["content-type"] = content_type
    if header.get_content_type() == "application/json":
        return parse(NewVoice, body)
    fields, mark = {}, f"--{header.get_boundary()}".encode()
    for part in (b"\r\n" + body).split(b"\r\n" + mark)[1:-1]:
        head, _, value = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        of_part = email.message.Message()
        for line in head.decode("utf-8", "replace").splitlines():
            name, _, rest = line.partition(":")
            of_part[name] = rest.strip()
        field = of_part.get_param("name", header="content-disposition")
        fields[field] = (
            base64.b64encode(value).decode() if field == "audio_sample" else value.decode("utf-8", "replace")
        )
    return parse(NewVoice, json.dumps(fields))


def in_one_line(text):
    """A text for the log: control characters and newlines escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
