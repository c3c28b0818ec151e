"""The server under load: nothing grows, voices do not mix, and nothing is lost without an error.

Each test takes CSM_LOAD_MINUTES minutes, by default half a minute, and prints its measurements:
CSM_LOAD_MINUTES=20 pytest -s tests/test_serve_load.py
"""

import base64
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import mimi

httpx = pytest.importorskip("httpx")
pytest.importorskip("csm_tools.serve")
websockets = pytest.importorskip("websockets")
from websockets.sync.client import connect

from test_serve import CLIP, LONG, SAID, health, running, samples, until
from test_watermark import hub, small, weights  # noqa: F401  fixtures

pytestmark = pytest.mark.slow
SECONDS = 60 * float(os.environ.get("CSM_LOAD_MINUTES", 0.5))
TURNS = [
    "Good morning to you.", "Where are you going today?", "The cat sat on the mat.", "It is a fine day.",
    "Come and sit down here.", "What did he say to you?", "We have time for tea.", "See you again tomorrow.",
]  # fmt: skip
VOICES = ["calm", "deep", "bright"]


class Heart(threading.Thread):
    """Records when this process itself stalled, so that the server is not blamed."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stalls = []

    def run(self):
        last = time.monotonic()
        while True:
            time.sleep(0.05)
            now = time.monotonic()
            if now - last > 0.2:
                self.stalls.append((last, now))
            last = now

    def awake(self, start, end):
        """Seconds between two times, without the stalls."""
        lost = sum(max(0, min(end, b) - max(start, a)) for a, b in [*self.stalls])
        return max(0.0, end - start - lost)


class Watch(threading.Thread):
    """Records a process's memory, threads and descriptors every second."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.place, self.rows, self.over = Path("/proc") / str(process.pid), [], threading.Event()

    def run(self):
        start = time.monotonic()
        while not self.over.wait(1):
            if not self.place.exists():
                return
            status = dict(line.split(":", 1) for line in (self.place / "status").read_text().splitlines())
            row = (
                int(status["VmRSS"].split()[0]) / 1e3,
                int(status["Threads"]),
                len(list((self.place / "fd").iterdir())),
            )
            self.rows.append((time.monotonic() - start, *row))

    def stop(self):
        """{"MB": ..., "threads": ..., "descriptors": ...}: the median of the second quarter and of the last."""
        self.over.set()
        self.join()
        rows = np.array(self.rows)
        n = len(rows) // 4
        before, after = np.median(rows[n : 2 * n + 1], axis=0), np.median(rows[-n - 1 :], axis=0)
        names = ("MB", "threads", "descriptors")
        return {
            name: (float(before[i + 1]), float(after[i + 1]), float(rows[:, i + 1].max()))
            for i, name in enumerate(names)
        }


def flat(found, most_mb=150):
    """Whether nothing grew from the second quarter to the last."""
    (mb, mb_now, _), (threads, threads_now, _), (files, files_now, _) = found.values()
    return mb_now <= mb + most_mb and threads_now <= threads + 10 and files_now <= files + 40


def fine(got, want):
    return len(got) == len(want) and abs(got - want).max() <= 1


def test_many_conversations_and_clients_that_leave(tiny):
    """16 conversations of 8 turns at once; a third of the turns is abandoned and then repeated."""
    want = {}  # by voice and turn
    for voice in VOICES:
        talk = tiny.conversation(voice=voice)
        want[voice] = [mimi.to_pcm16(talk.say(text, seed=i)).astype(np.int32) for i, text in enumerate(TURNS)]
    counts, over, heart, waits = Counter(), threading.Event(), Heart(), []
    heart.start()
    with running("--conversation-memory", 100, "--max-batch", 16) as (address, process):
        watch = Watch(process)
        watch.start()

        def turn(client, name, voice, i, leave):
            body = {"input": TURNS[i], "voice": voice, "seed": i, "conversation": name, "after_turns": i}
            body |= {"response_format": "pcm", "model": "csm"}
            data, asked = b"", time.monotonic()
            with client.stream("POST", f"{address}/v1/audio/speech", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    return answer.json()["error"]["code"] or "error"
                for piece in answer.iter_bytes():
                    if not data:
                        waits.append(heart.awake(asked, time.monotonic()))
                    data += piece
                    if leave and len(data) > 2 * 1920 * 3:
                        return "left"
            return "said" if fine(samples(data), want[voice][i]) else "wrong"

        def converse(n):
            draw = random.Random(n)
            with httpx.Client(timeout=900) as client:
                for k in range(10**6):
                    name, voice, i = f"{n}-{k}", VOICES[n % 3], 0
                    while i < len(TURNS):
                        if over.is_set():
                            return
                        told = turn(client, name, voice, i, leave=draw.random() < 1 / 3)
                        counts[told] += 1
                        if told == "said":
                            i += 1
                        elif told == "conversation_not_found":  # which is said: it begins again
                            name, i = f"{name}+", 0
                        elif told == "rate_limit_exceeded":
                            time.sleep(1)
                        elif told != "left":
                            return
                    counts["conversations"] += 1

        with ThreadPoolExecutor(16) as pool:
            jobs = [pool.submit(converse, n) for n in range(16)]
            over.wait(SECONDS)
            over.set()
            [job.result() for job in jobs]
        found = watch.stop()
        until(lambda: health(address)["live"] == health(address)["waiting"] == 0)
    print(f"\nconversations: {dict(counts)}\nsecond quarter, last quarter, most: {found}")
    print(
        f"first sound after {np.percentile(waits, [50, 99, 100]).round(2)} s; this process stood still {heart.stalls}"
    )
    assert counts["said"] > 8 and counts["left"] and not counts["wrong"] and not counts["error"]
    assert flat(found) and process.returncode == 0 and "Traceback" not in "".join(process.log)


def test_mixed_load_with_the_watermark(hub, tmp_path):  # noqa: F811
    """Clips, half-open connections, clients that leave, sockets, and one client that listens throughout."""
    counts, gaps, over, heart = Counter(), [], threading.Event(), Heart()
    heart.start()
    clip = base64.b64encode(CLIP.read_bytes()).decode()
    with running("--watermark", "--max-batch", 8, "--grace", 2, env=dict(hub)) as (address, process):
        host, port = address.removeprefix("http://").split(":")
        watch = Watch(process)
        watch.start()

        def speak(client, text, leave=False, **fields):
            body = {"input": text, "voice": "calm", "response_format": "pcm", "model": "csm"} | fields
            with client.stream("POST", f"{address}/v1/audio/speech", json=body) as answer:
                counts[f"{'left' if leave else 'heard'} {answer.status_code}"] += 1
                for n, _ in enumerate(answer.iter_bytes()):
                    if leave and n > 2:
                        return

        def listen():
            """Listen to one long text after another; record the gaps between pieces."""
            with httpx.Client(timeout=900) as client:
                while not over.is_set():
                    body = {"input": LONG, "voice": "deep", "response_format": "pcm", "model": "csm"}
                    with client.stream("POST", f"{address}/v1/audio/speech", json=body) as answer:
                        last, ahead = None, 0.0
                        for piece in answer.iter_bytes():
                            now = time.monotonic()
                            if last is not None:
                                gap = heart.awake(last, now)
                                ahead -= gap
                                gaps.append((gap, -ahead))
                                ahead = max(ahead, 0.0)
                            last, ahead = now, ahead + len(piece) / 48_000
                    counts["listener's texts"] += answer.status_code == 200

        def clips():
            with httpx.Client(timeout=900) as client:
                while not over.is_set():
                    context = [{"speaker": 0, "text": SAID, "audio": clip}] * random.randrange(1, 8)
                    speak(client, "Come in.", context=context)

        def leaving():
            with httpx.Client(timeout=900) as client:
                while not over.is_set():
                    speak(client, LONG, leave=True)

        def half_open():
            while not over.is_set():
                held = []
                for _ in range(40):
                    s = socket.create_connection((host, int(port)))
                    s.sendall(
                        random.choice([b"", b"GET /health HTT", b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\n"])
                    )
                    held.append(s)
                counts["half-open"] += len(held)
                over.wait(5)
                [s.close() for s in held]

        def sockets():
            while not over.is_set():
                url = f"{address.replace('http', 'ws')}/v1/text-to-speech/bright/multi-stream-input"
                try:
                    with connect(f"{url}?output_format=mp3_22050_32&conversation=s") as ws:
                        for name in "abc":
                            for word in LONG.split(" ")[:18]:
                                ws.send(json.dumps({"text": f"{word} ", "context_id": name}))
                            ws.recv(timeout=300)
                            ws.send(json.dumps({"context_id": name, "close_context": True}))
                            counts["stopped by socket"] += 1
                    httpx.delete(f"{address}/v1/conversations/s")
                except websockets.ConnectionClosed:
                    counts["socket closed"] += 1

        def mistakes():
            with httpx.Client(timeout=900) as client:
                while not over.wait(0.2):
                    answer = client.post(f"{address}/v1/audio/speech", json={"input": "Hi.", "voice": "nobody"})
                    counts[f"mistake {answer.status_code}"] += 1

        work = [listen, clips, leaving, half_open, sockets, mistakes]
        with ThreadPoolExecutor(len(work)) as pool:
            jobs = [pool.submit(job) for job in work]
            over.wait(SECONDS)
            found = watch.stop()
            over.set()
            [job.result() for job in jobs]
        with (
            httpx.Client(timeout=900) as client,
            client.stream(
                "POST", f"{address}/v1/audio/speech", json={"input": LONG, "voice": "calm", "response_format": "pcm"}
            ) as answer,
        ):
            pieces = answer.iter_bytes()
            next(pieces)
            process.send_signal(signal.SIGTERM)  # while the mark is made: broken off after --grace, or whole by then
            with suppress(httpx.RemoteProtocolError):
                for _ in pieces:
                    pass
    gap, late = max(gap for gap, _ in gaps), max(late for _, late in gaps)
    log = "".join(process.log)
    print(f"\nmixed load: {dict(counts)}\nsecond quarter, last quarter, most: {found}\nlog: {len(log)} bytes")
    print(f"listener: {len(gaps)} pieces, gaps {np.percentile([gap for gap, _ in gaps], [50, 99, 99.9]).round(2)} s")
    print(f"longest gap {gap:.2f} s, silence at most {max(late, 0):.2f} s; this process stood still {heart.stalls}")
    assert process.returncode == 0 and flat(found) and "Traceback" not in log
    assert counts["listener's texts"] and counts["heard 200"] and counts["left 200"] and counts["mistake 400"]
    assert len(log) < 10_000 + 300 * sum(counts.values())
