"""File names from what people call sounds."""

import re

# Names that Windows keeps for devices, whatever the suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_MOST_CHARACTERS = 100


def safe_name(text: str) -> str:
    """A file name, without suffix, that every file system takes: ASCII letters, digits, ".-_"."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", text)[:_MOST_CHARACTERS].strip("_.")
    if not name or _RESERVED.fullmatch(name):
        return f"sound_{name}".rstrip("_")
    return name
