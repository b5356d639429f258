"""Payloads as bytes: `encode` and `decode`, and the longest that they make.

docs/wire.md describes the format byte by byte.
"""

from fedsieve.wire.envelope import decode, encode, longest

__all__ = ["decode", "encode", "longest"]
