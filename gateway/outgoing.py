"""Reading what others answer."""

import aiohttp


async def read(answer: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The whole body, in however many pieces it comes; of a longer one, the beginning."""
    raw = bytearray()
    async for piece in answer.content.iter_any():
        raw += piece
        if len(raw) >= most_bytes:
            break
    return bytes(raw[:most_bytes])
