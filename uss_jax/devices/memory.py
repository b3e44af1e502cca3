"""Recognises that a device has too little memory."""


def is_exhausted(error: RuntimeError) -> bool:
    """Returns whether JAX raised an error because an allocation on a device failed."""
    return "RESOURCE_EXHAUSTED" in str(error)


def exhausted(remedy: str) -> str:
    """Returns a sentence that says so, and what to do."""
    return f"the device has too little memory for this; {remedy}"
