"""Readers of files that others may have written, given generated and damaged ones.

Each target holds: a right answer or the reader's own error, never another exception. In a test run
they are short and deterministic; `FUZZ_MINUTES=10 pytest -rP tests/fuzz/...` runs each for so long.
"""
