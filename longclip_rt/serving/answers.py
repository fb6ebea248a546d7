"""What the server sends: vectors as OpenAI's JSON or as raw numbers, and the shapes of every answer."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from longclip_rt.backends.base import Float32
from longclip_rt.serving.encoding import Encoded

RAW = "application/octet-stream"


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Content as JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def usage(*encoded: Encoded) -> dict[str, Any]:
    """Tokens that the model read; images have none."""
    tokens = sum(sum(each.read) for each in encoded)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def cut(encoded: Encoded) -> list[dict[str, int]]:
    """The texts that were cut: where they stand, and how many tokens they have."""
    return [{"index": index, "tokens": encoded.lengths[index]} for index in encoded.truncated]


def embeddings(encoded: Encoded, vectors: Float32, model: str, form: str, raw: bool) -> Response:
    """Vectors [N, K] as the client wants them.

    Args:
        encoded: What they were made of.
        vectors: float32 [N, K].
        model: The model's name.
        form: `float` or `base64` (little-endian float32), of each vector in JSON.
        raw: All vectors as little-endian float32 and nothing else; the shape is in a header.
    """
    if raw:
        shape = ",".join(map(str, vectors.shape))
        headers = {"X-Embeddings-Shape": shape, "X-Truncated-Inputs": str(len(encoded.truncated))}
        return Response(vectors.astype("<f4").tobytes(), headers=headers, media_type=RAW)
    rows = (
        [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        if form == "base64"
        else vectors.tolist()
    )
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    return json_response(
        {"object": "list", "data": data, "model": model, "usage": usage(encoded), "truncated": cut(encoded)}
    )


def _fields(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": sorted(fields)}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _NUMBER, _COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_OPTIONAL = {"type": ["string", "null"]}
_ABOUT = {
    "model": _TEXT,
    "usage": _fields(prompt_tokens=_COUNT, total_tokens=_COUNT),
}
_CUT = _list(_fields(index=_COUNT, tokens=_COUNT))
_HIT = _fields(rank=_COUNT, score=_NUMBER, id=_TEXT, kind=_TEXT, row=_COUNT, thumbnail=_OPTIONAL)

SCHEMAS: dict[str, Any] = {
    "Error": _fields(error=_fields(message=_TEXT, type=_TEXT, param=_OPTIONAL, code=_TEXT)),
    "Embeddings": _fields(
        object={"const": "list"},
        data=_list(
            _fields(object={"const": "embedding"}, index=_COUNT, embedding={"anyOf": [_list(_NUMBER), _TEXT]}),
        ),
        truncated=_CUT,
        **_ABOUT,
    ),
    "Similarities": _fields(scores=_list(_list(_NUMBER)), truncated=_fields(queries=_CUT, candidates=_CUT), **_ABOUT),
    "Hits": _fields(hits=_list(_HIT), truncated=_CUT, **_ABOUT),
    "Words": _fields(tokens=_COUNT, context_length=_COUNT, words=_list(_fields(word=_TEXT, end=_COUNT))),
    "Models": _fields(object={"const": "list"}, data=_list({"type": "object"})),
    "State": _fields(status=_TEXT),
}
"""The answers' shapes, by name."""


def responses(name: str, raw: bool = False, errors: tuple[int, ...] = ()) -> dict[int | str, dict[str, Any]]:
    """An operation's answers in OpenAPI's words.

    Args:
        name: The shape of a good one.
        raw: Whether raw numbers are offered too.
        errors: Statuses of the others.
    """

    def content(named: str) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{named}"}}}

    good = content(name)
    if raw:
        good[RAW] = {"schema": {"type": "string", "format": "binary"}}
    found: dict[int | str, dict[str, Any]] = {200: {"description": "The answer.", "content": good}}
    return found | {status: {"description": "An error.", "content": content("Error")} for status in errors}
