"""Parses audio files whose headers omit or misstate the length.

libsndfile trusts the length in the header. A variable bit rate MP3 file may have none, a file made
by joining two states the length of the first, and a truncated file states its original length.
"""

import functools
import itertools
import mmap
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

_BIT_RATES = {  # kbit/s of layer III; the key says whether it is MPEG 1
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_BEGIN_OF_STREAM, _END_OF_STREAM = 2, 4
# By the first four bytes of a format: length in bytes of the head that files of the same kind have
# in common, and the range in it that holds a size and may differ.
_HEADS = {
    b"fLaC": (8, range(0)),  # the marker and the header of STREAMINFO, always the first block
    b".snd": (24, range(8, 12)),
    b"caff": (12, range(0)),
    b"riff": (40, range(16, 24)),  # W64
    b"RF64": (16, range(4, 8)),
    b"FORM": (16, range(4, 8)),
}
# First bytes of audio files by format, for `begins_file`; an ID3 tag precedes MP3.
_FILES = (b"RIFF", b"OggS", b"ID3\2\0", b"ID3\3\0", b"ID3\4\0", b"riff\x2e\x91\xcf\x11")
_FILES += (b"fLaC", b".snd", b"caff", b"RF64", b"FORM", b"wvpk", b"MAC ", b"#!AMR")
_FILES += (b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11")  # Matroska and WebM; WMA
# Files of these formats are often concatenated; libsndfile reads only the first.
JOINED = frozenset((b"OggS", b"RIFF", *_HEADS))
# With which chunks and tags begin that programs write after the samples of a WAV file.
_AFTER_SAMPLES = (b"LIST", b"id3 ", b"ID3", b"TAG", b"APETAGEX", b"JUNK", b"junk", b"PAD ", b"bext")
_AFTER_SAMPLES += (b"cue ", b"smpl", b"inst", b"acid", b"iXML", b"axml", b"_PMX", b"cart", b"PEAK")
_OGG_PAGE = struct.Struct("<4sBBqIIIB")


Bytes = bytes | mmap.mmap


class Mp3(NamedTuple):
    """Describes the frames of an MP3 file.

    Attributes:
      begin: byte offset of the first frame with sound.
      frames: number of frames, counted.
      frame_samples: samples per frame.
      sample_rate: sampling rate in Hz.
      promised: number of frames stated in the file's own header; None if not stated.
      whole: whether the last frame is complete.
    """

    begin: int
    frames: int
    frame_samples: int
    sample_rate: int
    promised: int | None
    whole: bool


class _Frame(NamedTuple):
    size: int
    samples: int
    sample_rate: int


@functools.lru_cache(maxsize=1024)
def _frame(header: bytes) -> _Frame | None:
    """Parses a frame header of four bytes; None if it is not one of MPEG layer III."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version, bits = header[1] >> 3 & 3, header[2]
    if version == 1 or not 1 <= bits >> 4 <= 14 or bits >> 2 & 3 == 3:
        return None
    samples = 1152 if version == 3 else 576
    rate = _RATES[version][bits >> 2 & 3]
    size = samples // 8 * _BIT_RATES[version == 3][bits >> 4] * 1000 // rate + (bits >> 1 & 1)
    return _Frame(size, samples, rate)


def _frames(data: Bytes) -> Iterator[tuple[int, _Frame]]:
    """Yields (byte offset, frame) of all frames of one kind, skipping anything between them."""
    at, kind = _after_id3(data, 0), None
    while at >= 0:
        header = bytes(data[at : at + 4])
        frame = _frame(header)
        # A frame after a gap counts only if another follows (see `_resync`): two bytes may look
        # like a frame header anywhere.
        if frame and (kind is None or kind == (header[1] & 0xFE, header[2] & 12)):
            yield at, frame
            kind = header[1] & 0xFE, header[2] & 12
            at += frame.size
            following = bytes(data[at : at + 4])
            if _frame(following) and (following[1] & 0xFE, following[2] & 12) == kind:
                continue
        at = _resync(data, _after_id3(data, at) if frame else at + 1, kind)


def _resync(data: Bytes, at: int, kind: tuple[int, int] | None) -> int:
    """Returns the next offset from `at` where two consecutive frames of this kind begin, or -1."""
    while (at := data.find(b"\xff", at)) >= 0:
        header = bytes(data[at : at + 4])
        frame = _frame(header)
        if frame and kind in (None, (header[1] & 0xFE, header[2] & 12)):
            following = bytes(data[at + frame.size : at + frame.size + 4])
            same = (following[1:2] and following[1] & 0xFE) == header[1] & 0xFE
            if _frame(following) and same:
                return at
        at += 1
    return -1


def _after_id3(data: Bytes, at: int) -> int:
    """Returns the end of the ID3 tags that begin at an offset; the offset itself if none do."""
    while bytes(data[at : at + 3]) == b"ID3" and at + 10 <= len(data):
        sizes = bytes(data[at + 6 : at + 10])
        at += 10 + sum((byte & 127) << 7 * place for place, byte in enumerate(sizes[::-1]))
    return at


def looks_like_mp3(data: Bytes) -> bool:
    """Tells whether the file begins with three MP3 frames, after any ID3 tags."""
    at = _after_id3(data, 0)
    for _ in range(3):
        frame = _frame(bytes(data[at : at + 4]))
        if frame is None:
            return False
        at += frame.size
    return True


def read_mp3(data: Bytes) -> Mp3 | None:
    """Counts the frames of an MP3 file; None if there are none."""
    first = promised = None
    count, whole = 0, True
    for at, frame in _frames(data):
        if first is None:
            promised = _promised(bytes(data[at : at + frame.size]))
            first = (at + frame.size if promised is not None else at), frame
            if promised is not None:
                continue
        if at + frame.size > len(data):
            whole = False
            break
        count += 1
    if first is None or not count:
        return None
    begin, frame = first
    return Mp3(begin, count, frame.samples, frame.sample_rate, promised, whole)


def _promised(frame: bytes) -> int | None:
    """Returns the number of frames stated by a Xing, Info or VBRI header in the first frame."""
    mpeg_1, mono = frame[1] >> 3 & 3 == 3, frame[3] >> 6 == 3
    side = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[mpeg_1, mono]
    tag, at = frame[4 + side : 8 + side], 8 + side
    if tag in (b"Xing", b"Info") and len(frame) >= at + 8:
        flags, frames = struct.unpack(">II", frame[at : at + 8])
        return frames if flags & 1 else None
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return struct.unpack(">I", frame[50:54])[0]
    return None


def header_of_mp3(data: Bytes, mp3: Mp3) -> bytes:
    """Returns a silent Info frame that tells decoders the number of frames that follow."""
    header = bytearray(data[mp3.begin : mp3.begin + 4])
    header[1] |= 1  # no checksum
    header[2] = header[2] & 12 | (9 if header[1] >> 3 & 3 == 3 else 8) << 4
    size = _frame(bytes(header)).size
    mpeg_1, mono = header[1] >> 3 & 3 == 3, header[3] >> 6 == 3
    side = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[mpeg_1, mono]
    length = size + len(data) - mp3.begin
    says = b"Info" + struct.pack(">III", 3, mp3.frames, min(length, 2**32 - 1))
    return (bytes(header) + bytes(side) + says).ljust(size, b"\0")


def begins_file(data: Bytes) -> bool:
    """Tells whether bytes begin an audio file of any format, as opposed to raw samples."""
    begin = bytes(data[:12])
    return begin.startswith(_FILES) or begin[4:8] == b"ftyp" or looks_like_mp3(data)


def joined_mp4(data: Bytes) -> bool:
    """Tells whether a second MP4 file follows the first; decoders ignore it."""
    at = 0
    while bytes(data[at + 4 : at + 8]).isalnum() and at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: extends to the end of the file
            return False
        at += size
        if bytes(data[at + 4 : at + 8]) == b"ftyp":
            return True
    return False


class Part(NamedTuple):
    """One of several concatenated recordings in a file.

    Attributes:
      begin, end: byte offsets.
      whole: whether its end is present; None if only decoding could tell.
    """

    begin: int
    end: int
    whole: bool | None = None


def is_opus(data: Bytes) -> bool:
    """Returns whether a file is Opus in Ogg: so says the first packet."""
    return data[:4] == b"OggS" and data[28:36] == b"OpusHead"


def read_parts(data: Bytes) -> list[Part]:
    """Returns the recordings in a file; several if files of a format in JOINED were joined."""
    magic = bytes(data[:4])
    if magic == b"OggS":
        return _ogg_parts(data)
    begins = _wav_begins(data) if magic == b"RIFF" else _begins_alike(data)
    return [Part(*ends) for ends in itertools.pairwise([*begins, len(data)])]


def _ogg_parts(data: Bytes) -> list[Part]:
    parts: list[Part] = []
    begin, at, before, ended = 0, 0, 0, False
    while 0 <= at <= len(data) - _OGG_PAGE.size:
        magic, _, flags, _, _, _, _, segments = _OGG_PAGE.unpack(data[at : at + _OGG_PAGE.size])
        if magic != b"OggS":
            at = data.find(b"OggS", at)
            continue
        if flags & _BEGIN_OF_STREAM and at and not before & _BEGIN_OF_STREAM:
            parts.append(Part(begin, at, ended))
            begin = at
        table = at + _OGG_PAGE.size
        size = _OGG_PAGE.size + segments + sum(data[table : table + segments])
        ended = bool(flags & _END_OF_STREAM) and at + size <= len(data)
        before, at = flags, at + size
    return [*parts, Part(begin, len(data), ended)]


def _begins_alike(data: Bytes) -> list[int]:
    """Returns the offsets where the head of the file (see _HEADS) occurs, the first included."""
    length, size = _HEADS.get(bytes(data[:4]), (0, range(0)))
    if not length:
        return [0]
    head = bytes(data[:length])
    before, after = (re.escape(part) for part in (head[: size.start], head[size.stop :]))
    alike = re.compile(before + b".{%d}" % len(size) + after, re.DOTALL)
    # A file shorter than its head matches nothing, not even itself.
    return [match.start() for match in alike.finditer(data)] or [0]


def _wav_begins(data: Bytes) -> list[int]:
    begins, at = [], 0
    while bytes(data[at : at + 4]) == b"RIFF" and bytes(data[at + 8 : at + 12]) == b"WAVE":
        begins.append(at)
        size = struct.unpack("<I", data[at + 4 : at + 8])[0]
        at += 8 + size + size % 2
    return begins or [0]


def wav_without_length(data: Bytes | memoryview) -> bytes | None:
    """Returns a repaired WAV header if more samples follow than it states, else None.

    As of a recorder that died, or of one that counts in 32 bits and went on beyond 4 GiB.
    """
    if bytes(data[:4]) != b"RIFF" or bytes(data[8:12]) != b"WAVE":
        return None
    at, second = 12, 0
    while at + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[at : at + 8])
        if name == b"fmt " and at + 20 <= len(data):
            second = struct.unpack("<I", data[at + 16 : at + 20])[0]  # in bytes
        if name == b"data":
            end = at + 8 + size + size % 2
            if size == 0:
                unsaid = end < len(data) and not _is_whole_riff(data, end)
            else:  # a little that follows a longer recording may be anything
                follows = len(data) - end
                much = follows > size or follows > second / 2 > 0
                unsaid = much and not _is_metadata(data, end)
            # Recorders write this size to a pipe; libsndfile reads it as "to the end".
            return bytes(data[: at + 4]) + b"\xff\xff\xff\xff" if unsaid else None
        at += 8 + size + size % 2
    return None


def _is_whole_riff(data: Bytes | memoryview, at: int) -> bool:
    """Returns whether a RIFF file states its length, and whole chunks fill it from an offset on."""
    return struct.unpack("<I", data[4:8])[0] == len(data) - 8 and _are_chunks(data, at)


def _is_metadata(data: Bytes | memoryview, at: int) -> bool:
    """Returns whether chunks or tags follow the samples, whole or cut off; else it is samples."""
    name = bytes(data[at : at + 8])
    # Where the file states a length beyond its samples, whatever can be a name is one. Elsewhere
    # one in fifty pairs of loud samples could be.
    stated = struct.unpack("<I", data[4:8])[0] + 8 > at + 1 and _is_name(name[:4])
    return stated or name.startswith(_AFTER_SAMPLES) or _are_chunks(data, at)


def _is_name(name: bytes) -> bool:
    """Returns whether bytes can name a chunk of a RIFF file."""
    return all(0x20 <= byte < 0x7F for byte in name)


def _are_chunks(data: Bytes | memoryview, at: int) -> bool:
    """Returns whether whole chunks fill a RIFF file from an offset on."""
    while at + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[at : at + 8])
        if not _is_name(name):  # samples, as of silence
            return False
        at += 8 + size
        # Some programs leave the padding out.
        at += size % 2 and not _is_name(bytes(data[at : at + 4]))
    return at <= len(data)  # a few bytes after the last one may be anything


def flac_samples(data: Bytes) -> int | None:
    """Returns the samples stated in a FLAC header, 0 if unknown; None if it is not FLAC."""
    if bytes(data[:4]) != b"fLaC" or len(data) < 26:
        return None
    return int.from_bytes(data[18:26], "big") & (1 << 36) - 1


def promised_share(log: str) -> float | None:
    """Returns stated over actual size of a WAV, AIFF, AU or W64 file; None if not above 1.

    Args:
      log: libsndfile's log of reading the header.
    """
    sizes = "data|SSND|Data Size|riff|Riff size"
    noted = re.findall(rf"^\s*(?:{sizes})\s*: (\d+) \(should be (\d+)\)", log, re.M)
    if not noted:
        return None
    promised, held = map(int, noted[-1])
    # Placeholder sizes of a file written to a pipe, when the length was unknown: the largest that
    # 31, 32 or 64 bits hold, or a little less.
    if any(abs(promised - 2**bits) <= 2**16 for bits in (31, 32)) or promised >= 2**62:
        return None
    return promised / held if promised > held > 0 else None
