"""Payloads as bytes: `encode` and `decode`. docs/wire.md describes the format byte by byte."""

from fedsieve.wire.envelope import decode, encode

__all__ = ["decode", "encode"]
