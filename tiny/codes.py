"""What the codes of tiny mean. Real codecs leave theirs to training; here each codebook holds what the teacher knows.

    codebooks 0 to 3   the phoneme in each quarter of the frame, 20 ms
    4 and 5            the pitch of what is voiced in its first half, in its second, in steps of 1.2 %; 0: nothing is
    6                  the loudness of its halves
    7                  the voice: one of 512 mixes of the teacher's
So a language model has to learn nothing that the text does not tell but melody and timing, the decoder speaks from a
recipe, and the encoder is a recogniser. Each codebook has dimensions of its own in the latents, and therefore
residual quantization finds each code by itself. F frames, K codebooks.
"""

import numpy as np

K, N_CODES, CODE_DIM = 8, 512, 128
PARTS = 4  # of a frame, each with its phoneme
NO_WORD = 255
PHONEMES = "bdfhijklmnopstuvwzɑɔæðəɛɜɡɪŋɹɾʃʊʌʒʤʧθAIOWYɒɐaeᵊᵻʔ"  # Kokoro's letters for English
SILENCE = 1  # code 0 of codebook 0 is in no speech, since it ends the speech
PITCHES, LEVELS = 192, 22
LOWEST, HIGHEST = 50, 500  # Hz
PITCH_STEP = np.log(HIGHEST / LOWEST) / (PITCHES - 1)  # nepers
QUIETEST, LEVEL_STEP = -9, 0.86  # in Kokoro's measure of loudness, LEVEL nepers each
LEVEL = 0.45
STEPS_APART = 6  # levels whose vectors are 1 apart
VOICES = ("jm_kumo", "jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro")  # Kokoro's, which are mixed
SPANS = ((0, 32), (0, 32), (32, 64), (64, 96), (96, 107), (107, 118), (118, 120), (120, 125))  # of the dimensions
USED = (*[2 + len(PHONEMES)] * 4, PITCHES, PITCHES, LEVELS**2, N_CODES)  # how many codes a codebook has
SPARE = CODE_DIM - 1  # the dimension in which unused codes are far from everything


def encode(phonemes, pitch, level, voice):
    """Labels -> codes (F, K) int16.

    phonemes: letters of PHONEMES and others, which are silence; pitch in Hz, 0 for none; level: each (PARTS * F,).
    voice: int.
    """
    index = {letter: 2 + i for i, letter in enumerate(PHONEMES)}
    out = np.zeros((len(pitch) // PARTS, K), np.int16)
    out[:, :4] = np.reshape([index.get(p, SILENCE) for p in phonemes], (-1, PARTS))
    pitch = pitch.reshape(-1, 2, PARTS // 2).astype(float)
    voiced = (pitch > LOWEST) & (out[:, :4].reshape(pitch.shape) != SILENCE)
    height = (np.log(np.maximum(pitch, LOWEST) / LOWEST) * voiced).sum(2) / np.maximum(1, voiced.sum(2))  # nepers
    step = np.floor(height / PITCH_STEP).clip(0, PITCHES - 2)
    out[:, 4:6] = np.where(voiced.any(2), 1 + step, 0)
    halves = level.reshape(pitch.shape).astype(float).mean(2)
    out[:, 6] = np.floor((halves - QUIETEST) / LEVEL_STEP).clip(0, LEVELS - 1) @ (LEVELS, 1)
    out[:, 7] = voice
    return out


def hertz(code):
    """What a code of codebooks 4 and 5 stands for; below LOWEST for code 0."""
    return LOWEST * np.exp((code - 0.5) * PITCH_STEP)


def vectors(voices):
    """The codebooks (K, N_CODES, CODE_DIM) float32; voices: what code i of the last one is, {name: share}."""
    out, r = np.zeros((K, N_CODES, CODE_DIM), np.float32), np.random.default_rng(0)
    sounds = r.normal(size=(USED[0], 32))
    sounds *= 2 / np.linalg.norm(sounds, axis=1, keepdims=True)
    hz = hertz(np.arange(1, PITCHES))
    turns = 2 * np.pi * np.outer(hz, (0.0025, 0.005, 0.01, 0.02))  # how far a period comes in these seconds
    waves = np.stack([np.cos(turns), np.sin(turns)], 2).reshape(len(hz), -1)
    high = np.log(hz / 160)[:, None]
    level = (np.arange(LEVELS) - (LEVELS - 1) / 2) / STEPS_APART
    pitches = np.vstack([-np.eye(1, 11), np.hstack([0 * high + 1, 3 * high, 4 * high, 0.7 * waves])])
    books = [sounds] * 4 + [pitches] * 2
    books.append(np.stack([np.repeat(level, LEVELS), np.tile(level, LEVELS)], 1))
    books.append([[1.5 * voice.get(name, 0) for name in VOICES] for voice in voices])
    for k, (book, (a, b)) in enumerate(zip(books, SPANS)):
        out[k, : USED[k], a:b] = book
        out[k, USED[k] :, SPARE] = 6
    out[0, 0, SPARE] = 6
    return out


def pointer(rows, words, spans):
    """Which token each frame speaks (F,), -1: none. Tokens and phonemes of a word are taken to go along evenly.

    rows (F, K); words (F,): of each frame; spans: [(first token, end)] of each word.
    """
    sounds, out = np.pad(rows[:, :PARTS].reshape(-1), (1, 0)), np.full(len(rows), -1)
    begun = np.cumsum((sounds[1:] != sounds[:-1]) & (sounds[1:] != SILENCE))  # phonemes so far
    for word in set(words.tolist()) - {NO_WORD}:
        at, (a, b) = np.nonzero(words == word)[0], spans[word]
        first, last = begun[PARTS * at[0]], begun[PARTS * (at[-1] + 1) - 1]
        out[at] = a + (begun[PARTS * at] - first + 0.5) / (last - first + 1) * (b - a)
    return out
