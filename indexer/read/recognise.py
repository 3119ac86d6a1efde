"""What a file holds, told by its first bytes; its name decides only where these leave it open."""

import codecs
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeVar

from gradindex.errors import InputError
from indexer.read.compressed import bare_name, compression, opened
from indexer.read.tables import first_row

PEEK, LONG_PEEK = 1 << 16, 1 << 20  # bytes looked at; the second where the first line is longer
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES = (".jsonl", ".ndjson", ".jl", ".jsonlines", ".ldjson")
TABLES = (".csv", ".tsv", ".tab", ".psv")
COMMENTS = (b"//", b"#", b"--", b";", b"/*", b"*")
_BEHIND = re.compile(rb"[^{]{1,200}(\{.*\})\s*")  # a JSON object, and what is before it
BY_NAME = {".parquet": "parquet", ".npy": "npy", ".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc"}

Line = TypeVar("Line", str, bytes)

JSONL = "Write its records into a .jsonl file, a JSON object a line."
UNPACK = "Unpack it, and give what was in it."
SAVE = "Save its rows as CSV (UTF-8), or as JSON lines."


@dataclass(frozen=True)
class Content:
    """What a file holds.

    `kind` is that of its DataSource, or else one of: "document" (one JSON object, with the fields
    `names`), "table" (a text that may be one, of the columns `names`), "structured" (a text that
    may hold records, as YAML may), "empty", "media" and "binary" (nothing to read), "refused"
    (`what` it is, and the `remedy`).
    """

    kind: str
    what: str = ""
    remedy: str = ""
    names: tuple[str, ...] = ()


STRUCTURED = {".yaml": "YAML", ".yml": "YAML", ".xml": "XML", ".toml": "TOML", ".plist": "XML",
              ".json5": "JSON5", ".jsonc": "JSON with comments"}

# ending: what a file with it is, that holds records and can't be read
_UNREAD: dict[str, tuple[str, str]] = {}
for _endings, _what, _remedy in (
    (".xlsx .xlsm .xls .ods", "a spreadsheet", SAVE),
    (".docx .doc .odt .epub .pptx .rtf", "a document of a word processor",
     "Save its text as a .txt file (UTF-8)."),
    (".pdf", "a PDF", "Save its text as a .txt file (UTF-8)."),
    (".pkl .pickle .pt .pth .ckpt .joblib", "a pickle, which may run code when it is read", JSONL),
    (".npz", "a NumPy archive", "Save the token ids as a .npy file, or records as JSON lines."),
    (".safetensors", "a file of tensors", "Save token ids as a .npy file."),
    (".tar .tgz .zip .7z .rar", "an archive", UNPACK),
    (".msgpack .mpk .cbor .bson .avro .orc .tfrecord .tfrecords .lance .mds .protobuf .pb",
     "a binary file of records", JSONL),
    (".bin .idx .dat", "a binary file", "Save token ids as a .npy file, or records as JSON lines."),
    (".sqlite .sqlite3 .db .mdb .duckdb", "a data base", JSONL),
    (".h5 .hdf5 .mat .rds .rdata .dta .sav", "a file of arrays or of a statistics program", SAVE),
    (".lz4 .br .z .lzma .lzo .sz", "compressed in a way that isn't read",
     "Decompress it, or compress it with gzip, zstd, bzip2 or xz."),
):
    _UNREAD |= {ending: (_what, _remedy) for ending in _endings.split()}

_MAGIC: tuple[tuple[bytes, str], ...] = (  # how a file begins: the ending of its kind, above
    (b"PK\x03\x04", ".zip"), (b"PK\x05\x06", ".zip"), (b"7z\xbc\xaf\x27\x1c", ".7z"),
    (b"Rar!", ".rar"), (b"%PDF", ".pdf"), (b"\xd0\xcf\x11\xe0", ".xls"), (b"{\\rtf", ".rtf"),
    (b"SQLite format 3\0", ".sqlite"), (b"\x89HDF", ".h5"), (b"Obj\x01", ".avro"),
    (b"ORC", ".orc"), (b"\x04\x22\x4d\x18", ".lz4"), (b"\x1f\x9d", ".z"),
    *((bytes([0x80, protocol]), ".pkl") for protocol in range(2, 6)),
)
_STANDS_FOR = (  # texts that hold no text to learn
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself",
     "Fetch it: git lfs pull."),
    (b"WARC/", "a web archive", JSONL), (b"<mediawiki", "a dump of a wiki", JSONL),
)
_FORMS = ((b"PAR1", "parquet"), (b"ARROW1\0", "ipc"), (b"\xff\xff\xff\xff", "ipc"),
          (b"\x93NUMPY", "npy"))
_MEDIA = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"ID3", b"OggS", b"fLaC", b"II*\0",
          b"MM\0*", b"\0\0\x01\0", b"wOFF", b"wOF2")
MEDIA_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".ico", ".tif", ".tiff", ".svg",
    ".mp3", ".wav", ".flac", ".ogg", ".m4a", ".mp4", ".avi", ".mov", ".mkv", ".webm",
    ".woff", ".woff2", ".ttf", ".otf",
)


def recognise(path: Path) -> Content:
    """What a file holds. Raises InputError where it can't be read or decompressed."""
    name = bare_name(path.name)
    ending = PurePath(name).suffix
    with opened(path) as file:
        head = file.read(PEEK)
        if len(head) == PEEK and b"\n" not in head and head.lstrip()[:1] in (b"{", b"["):
            head += file.read(LONG_PEEK)
        whole = not file.read(1)
    squeezed = compression(path)
    if not head and ending in _UNREAD:
        return _unread(ending)
    if not head:
        empty = "jsonl" if ending in (*LINES, ".json") else "csv" if ending in TABLES else "empty"
        return Content(BY_NAME.get(ending, empty))
    content = _binary(head, ending) or _json(head, ending, whole) or \
        _by_ending(head, ending, whole)
    if squeezed and content.kind in (*BY_NAME.values(), "refused"):
        # the libraries that read these map the file, and have compressions of their own
        what = content.what or f"a .{content.kind} file"
        return Content("refused", f"{what}, compressed with {squeezed}",
                       content.remedy or "Decompress it.")
    if not squeezed and name != path.name.lower() and content.kind == "binary":
        raise InputError(f"{path} is damaged, cut short or can't be read: it is neither text nor "
                         "compressed as its name says. Write it again.")
    return content


def _unread(ending: str) -> Content:
    return Content("refused", *_UNREAD[ending])


def _binary(head: bytes, ending: str) -> Content | None:
    """What bytes that aren't text are, or stand for something else; None for text."""
    for begin, what, remedy in _STANDS_FOR:
        if head.startswith(begin):
            return Content("refused", what, remedy)
    if ending in (*LINES, *TABLES, *BY_NAME, ".json") and \
            head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return Content("refused", "a web page, perhaps an error's", "Download it again.")
    if kind := BY_NAME.get(ending):
        return Content(kind)
    zeros = b"\0" in head  # which no text has, so that one may begin with the same letters
    for magic, kind in _FORMS:
        if zeros and head.startswith(magic):
            return Content(kind)
    for magic, like in _MAGIC:
        if head.startswith(magic) and (zeros or not magic.isalpha()):
            # several kinds of files are zip archives: their names say which
            return _unread(ending if ending in _UNREAD else like)
    if head[257:262] == b"ustar":
        return _unread(".tar")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return _unread(".safetensors")
    if (zeros and (head.startswith(_MEDIA) or head[4:8] == b"ftyp")) or ending in MEDIA_ENDINGS:
        return Content("media", "an image, a sound, a film or a font")
    if wide := _wide_text(head):
        return Content("refused", f"{wide} text, not UTF-8",
                       f"Convert it: iconv -f {wide} -t UTF-8 OLD > NEW.")
    if zeros and not _mostly_text(head):
        return _unread(ending) if ending in _UNREAD else Content("binary", "no text")
    return None


def _mostly_text(head: bytes) -> bool:
    """Whether bytes with some zeros are a text nevertheless, damaged or badly made."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return sum(letter < " " and letter not in "\t\n\r\f" for letter in text) < 0.02 * len(text)


def _wide_text(head: bytes) -> str | None:
    """UTF-16 or UTF-32, where bytes are a text in it, with or without a byte order mark."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    # every other byte of most languages' punctuation and digits is 0
    for high, low, name in ((head[1::2], head[::2], "UTF-16LE"),
                            (head[::2], head[1::2], "UTF-16BE")):
        if len(head) > 3 and high.count(0) > 0.4 * len(high) and not low.count(0):
            return name
    return None


def _json(head: bytes, ending: str, whole: bool) -> Content | None:
    """How the JSON objects stand that a text holds; None where it holds none."""
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    lines = [line for line in text.split(b"\n") if line.strip()]
    lines = lines if whole or len(lines) < 2 else lines[:-1]  # the last was cut off
    records = ending in (*LINES, ".json")
    if not text.startswith((b"[", b"{")) and ending not in (*STRUCTURED, *TABLES) and (
            content := _behind_others(lines, ending, whole)):
        return content
    if text.startswith(b"["):
        several = len(lines) > 1 and _parsed(lines[0]) is not None
        if re.match(rb'\[\s*(\{\s*["}]|\]\s*$)', text) and not (several and ending in LINES):
            return Content("json")
        if not records and whole and isinstance(values := _parsed(text), list) \
                and values and isinstance(values[0], (str, list)):
            return Content("json")  # no records, which is said of each
        if len(lines) > 1 and all(isinstance(values := _parsed(line), list) and len(values) > 1
                                  for line in lines[:10]):
            return Content("jsonl")  # no records either
        if not several and (content := _each_behind(lines, ending)):
            return content
        return Content("json" if ending == ".json" and not several else "jsonl") if records else \
            None
    if not text.startswith(b"{"):
        return Content("jsonl") if records else None
    if any(isinstance(_parsed(line), dict) for line in lines[:10]):
        single = len(lines) == 1 and whole and ending not in LINES
        return _document(text) if single else Content("jsonl")
    spans_lines = re.match(rb'\{\s*("([^"\\]|\\.)*"\s*:|\})', text) is not None
    if spans_lines and (ending not in LINES or lines[0].strip() == b"{"):
        return _document(text) if whole else Content("json")
    # as Python and JavaScript show a record
    if not records and re.match(rb"\{\s*(['\"]|\w+\s*:).*\}\s*$", lines[0]):
        return Content("refused", "lines in braces that are no JSON",
                       "Write a JSON object a line: names and texts in double quotes.")
    return Content("jsonl") if records else None


def _behind_others(lines: list[bytes], ending: str, whole: bool) -> Content | None:
    """What JSON objects are that stand behind something else: a comment, a number in each line."""
    bare = _without_comment(lines)
    objects = sum(isinstance(_parsed(line), dict) for line in bare[:10])
    commented = len(bare) < len(lines)
    if objects * 2 >= len(bare[:10]) and objects > (not commented):
        return Content("jsonl")  # what is none costs a row, and is said
    if commented and bare and bare[0].lstrip().startswith((b"{", b"[")):
        content = _json(b"\n".join(bare), ending, whole)
        if content and content.kind in ("json", "document"):
            return Content("refused", "JSON behind a comment", "Take the comment out.")
    return _each_behind(lines, ending)


def _each_behind(lines: list[bytes], ending: str) -> Content | None:
    """What lines are that each have something before a JSON object; None for others."""
    several = len(lines) > 1 or ending in LINES
    if several and all((found := _BEHIND.fullmatch(line)) and isinstance(_parsed(found[1]), dict)
                       for line in lines[:10]):
        return Content("refused", "JSON objects that each have something before them in their line",
                       "Take it off: sed 's/^[^{]*//' OLD > NEW.jsonl.")
    return None


def _document(text: bytes) -> Content:
    """One JSON object; where it is several, or none, a file of them."""
    content = _parsed(text)
    return Content("document", names=tuple(content)) if isinstance(content, dict) else \
        Content("json")


def _parsed(text: bytes) -> object:
    """What JSON text says, None where it is none."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def _by_ending(head: bytes, ending: str, whole: bool) -> Content:
    """What a text is whose bytes don't tell."""
    if ending in TABLES:
        return Content("csv")
    if ending in STRUCTURED:
        return Content("structured", f"{STRUCTURED[ending]}, which isn't read as records",
                       f"{JSONL} If it is one text to learn, call it .txt.")
    if ending in _UNREAD:
        return _unread(ending)
    text = head.decode("utf-8-sig", "replace")
    if names := first_row(text, whole):
        return Content("table", names=names)
    bare = "".join(_without_comment(text.splitlines(keepends=True)))
    # its header isn't where it is looked for
    return Content("table", names=("",)) if bare != text and first_row(bare, whole) else \
        Content("text")


def _without_comment(lines: list[Line]) -> list[Line]:
    """Lines of text or bytes without the comment that they begin with."""
    def says_nothing(line: Line) -> bool:
        return line.lstrip().startswith(COMMENTS if isinstance(line, bytes) else
                                        tuple(sign.decode() for sign in COMMENTS))
    return list(itertools.dropwhile(says_nothing, lines))
