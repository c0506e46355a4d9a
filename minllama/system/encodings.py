"""What is UTF-8, and which encoding a text may have that is not, guessed by its common characters.

The guess is for messages: no text is read in an encoding that the user did not name.
"""

from __future__ import annotations

import codecs
import re

from minllama.system.errors import UsageError

# The most common Chinese characters, simplified and traditional, with their punctuation.
CHINESE = (
    "的一是不了在人有我他这这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用"
    "道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日"
    "這個們來為國說時會對於著過發後裡種經麼學現當沒動還進樣開從實"
    "，。、：；！？“”‘’「」『』《》（）…—"
)
KOREAN = "다이는을의에가고하지한은로도를서그나자시기사리어아있대인것들수"
JAPANESE = "[\u3041-\u30fe]"
CYRILLIC = "[\u0430-\u044f]{3,}"  # small letters, three in a row
OTHERS = "[\u03ac-\u03ce\u05d0-\u05ea\u0620-\u06d3\u0900-\u0e4e]{3,}"  # Greek to Thai
IN_UTF16 = f"[{CHINESE}{KOREAN}]|{JAPANESE}|{CYRILLIC}|{OTHERS}"
# Characters that text has in plenty when decoded as it was encoded, and rarely by chance.
LIKELY = {
    "gb18030": f"[{CHINESE}]",
    "big5": f"[{CHINESE}]",
    "utf-16-le": IN_UTF16,
    "utf-16-be": IN_UTF16,
    "shift_jis": JAPANESE,
    "euc_jp": JAPANESE,
    "cp949": f"[{KOREAN}]",
    "cp1251": CYRILLIC,
    "koi8-r": CYRILLIC,
    "cp1252": "(?<=[A-Za-z])[ß-ÿ]|[ß-ÿ](?=[A-Za-z])|[’“”–—…«»]",
}
# Names that Python has beside those of text files' encodings: escapes in programs, names of hosts.
NO_FILES = ("idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape", "utf-7")
LEAST = 0.2  # share of the non-ASCII characters that must look likely
BOMS = {  # UTF-32's first, for UTF-16's is the beginning of it
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def check_encoding(name: str) -> None:
    """Raise UsageError unless Python has a text encoding of this name, and decodes it in pieces."""
    try:
        "".encode(name)
        codecs.getincrementaldecoder(name)
        if codecs.lookup(name).name.replace("_", "-") in NO_FILES:
            raise LookupError
    except (LookupError, ValueError):
        raise UsageError(
            f"--encoding {name}: no text encoding of that name; gb18030, big5, utf-16, cp1252, ..."
        ) from None


def is_utf8(name: str) -> bool:
    """Whether this is one of the names of UTF-8; raises LookupError for no encoding's."""
    return codecs.lookup(name).name in ("utf-8", "utf-8-sig")


def likely_encoding(data: bytes) -> str | None:
    """The encoding that the first bytes of a text may have; None where none is likely."""
    for bom, name in BOMS.items():
        if data.startswith(bom):
            return name
    zeros = (data[0::2].count(0), data[1::2].count(0))
    if 20 * min(zeros) < len(data) < 4 * max(zeros):  # of ASCII in UTF-16 every second byte is 0
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    shares = {name: _share(data, name, looks) for name, looks in LIKELY.items()}
    best = max(shares, key=shares.get)
    return best if shares[best] >= LEAST else None


def _share(data: bytes, name: str, looks: str) -> float:
    """The share of the non-ASCII characters that look likely once decoded; 0.0 if it fails."""
    try:
        text = codecs.getincrementaldecoder(name)().decode(data)  # may end within a character
    except UnicodeError:
        return 0.0
    beyond_ascii = sum(character > "\x7f" for character in text)
    return len("".join(re.findall(looks, text))) / beyond_ascii if beyond_ascii else 0.0


def as_utf8(text: str) -> str:
    """The text with `?` for what UTF-8 cannot encode, which Python reads as surrogates.

    Such are a command line's odd bytes, and half a character that JSON spells.
    """
    return text.encode("utf-8", "replace").decode()
