"""File names from names of sounds; different names give different file names."""

import hashlib
import re
import unicodedata

# Characters that some file systems forbid, and device names that Windows reserves.
_FORBIDDEN = frozenset('<>:"/\\|?*')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
# File systems allow 255 bytes; this leaves room for suffixes and names of temporary files.
_MOST_BYTES = 180


def file_name(text: str) -> str:
    """Returns a file name, without suffix, that is valid on every file system.

    Letters of every script, digits, spaces and most punctuation are kept. If anything was replaced
    or cut, a digest of the text is appended. The result depends on the text alone, not on other
    files in the folder.
    """
    name = "".join(character if _is_kept(character) else "_" for character in text)
    name = name.encode()[:_MOST_BYTES].decode(errors="ignore").strip(" .")
    if name == text and name and not _RESERVED.fullmatch(name):
        return name
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{name or 'sound'}-{digest}"


def _is_kept(character: str) -> bool:
    is_space = unicodedata.category(character) == "Zs"
    return character not in _FORBIDDEN and (character.isprintable() or is_space)
