"""File names from what people call sounds: different names give different file names."""

import hashlib
import re
import unicodedata

# What some file system forbids in a name, and device names that Windows reserves.
_FORBIDDEN = frozenset('<>:"/\\|?*')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
# File systems take 255 bytes; suffixes and names of temporary files are added to these.
_MOST_BYTES = 180


def file_name(text: str) -> str:
    """Returns a file name, without suffix, that every file system takes.

    Letters of every script, digits, spaces and most signs are kept. Where anything had to be
    replaced or cut, a digest of the text follows. The result depends on the text alone, so that no
    file is named differently because of what lies beside it.
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
