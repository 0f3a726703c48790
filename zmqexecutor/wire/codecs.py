"""How the data of jobs becomes bytes and back, by a name that travels with it.

Without a codec, data is `str` or `bytes` and stays that. With one, it is what the codec
can carry, and so is the result:

    json      what JSON has: numbers, text, lists, dicts with text keys, booleans, None
    msgpack   the same and bytes, and keys that are no text; shorter and faster
    pickle    any Python object; only between peers that trust each other, since who can
              choose what is unpickled can run code
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

__all__ = ["CODECS", "SAFE", "decode", "decode_as_asked", "encode"]

TEXT: Final = "text"
BYTES: Final = ""


class _Codec(NamedTuple):
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


CODECS: Final = {
    "json": _Codec(msgspec.json.encode, msgspec.json.decode),
    "msgpack": _Codec(msgspec.msgpack.encode, msgspec.msgpack.decode),
    "pickle": _Codec(pickle.dumps, pickle.loads),
}
"""Those that can be asked for by name."""
SAFE: Final = frozenset({TEXT, BYTES, "json", "msgpack"})
"""Those whose data may come from anybody."""


def encode(data: Any, codec: str | None) -> tuple[bytes, str]:
    """The bytes of some data, and the name of what they are.

    Args:
        data: what the codec can carry.
        codec: a name in `CODECS`, or None for `str` and `bytes` as they are.

    Raises:
        TypeError: the codec cannot carry this.
        ValueError: nor this value of the right type, such as text that UTF-8 cannot encode;
            or there is no such codec.
    """
    if codec is None:
        if isinstance(data, str):
            return data.encode(), TEXT
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data), BYTES
        raise TypeError(
            f"expected str or bytes, not {type(data).__name__}; encode it, or name a codec: "
            f"{', '.join(CODECS)}"
        )
    if codec not in CODECS:
        raise ValueError(f"codec must be None or one of {', '.join(CODECS)}: {codec!r}")
    try:
        return CODECS[codec].encode(data), codec
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise TypeError(f"the codec {codec!r} cannot carry this: {error}") from error


def decode(data: bytes, codec: str) -> Any:
    """What `encode` has encoded.

    Raises:
        ValueError: the bytes are not what the codec says, or there is no such codec.
    """
    if codec == BYTES:
        return data
    if codec == TEXT:
        return data.decode()
    if codec not in CODECS:
        raise ValueError(f"no codec {codec!r} here; there are {', '.join(CODECS)}")
    try:
        return CODECS[codec].decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"this is not {codec}: {error}") from error


def decode_as_asked(data: bytes, codec: str, asked: str | None) -> Any:
    """The same for an answer. What was not asked for is not decoded, least of all unpickled.

    Args:
        data: the answer.
        codec: what it is said to be.
        asked: the codec that was asked for, or None for text or bytes.

    Raises:
        ValueError: as for `decode`, or the codec is another.
    """
    if codec != asked and (asked or codec not in (BYTES, TEXT)):
        raise ValueError(f"it is in the codec {codec!r}, not {asked or 'text or bytes'}")
    return decode(data, codec)
