"""Digests, by which processes know what they have."""

from __future__ import annotations

try:
    # It is hashlib's, without OpenSSL, which takes 3 ms to load and 4 MB.
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

__all__ = ["digest_of"]


def digest_of(*parts: bytes | memoryview) -> bytes:
    """Return 16 bytes that differ if what follows each other in `parts` differs."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.digest()
