"""Payloads as bytes: `encode`, `encode_for` and `decode`, and the longest that they make.

docs/wire.md describes the format byte by byte.
"""

from fedsieve.wire.envelope import decode, encode, encode_for, longest

__all__ = ["decode", "encode", "encode_for", "longest"]
