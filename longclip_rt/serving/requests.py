"""What clients send: the shapes of OpenAI, of infinity (`modality`) and of Jina (objects), as JSON or multipart."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.datastructures import UploadFile
from starlette.requests import Request

from longclip_rt.serving.bounds import Bounds, Refusal
from longclip_rt.serving.encoding import Input

JSON = "application/json"
MULTIPART = "multipart/form-data"
_DATA_URI = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,")
_PATTERN = r"^data:image/[a-zA-Z0-9.+-]+;base64,[A-Za-z0-9+/]+={0,2}$"

_URI = Meta(description="A data URI; URLs are not fetched.", extra_json_schema={"pattern": _PATTERN})

Words = Annotated[str, Meta(min_length=1)]
# JSON knows no integers: 5.0 is one.
Id = Annotated[float, Meta(ge=0, extra_json_schema={"type": "integer"})]
Ids = Annotated[list[Id], Meta(min_length=1)]


class Item(Struct, forbid_unknown_fields=True):
    """A text or an image; one of the two."""

    text: Words | None = None
    image: Annotated[str, _URI] | None = None


Items = Annotated[list[Words | Id | Ids | Item], Meta(min_length=1)]
Given = Words | Items | Item
Modality = Literal["text", "image"]


class EmbeddingRequest(Struct):
    """Inputs to embed."""

    input: Given
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[float, Meta(extra_json_schema={"type": "integer"})] | None = None
    modality: Annotated[Modality, Meta(description="`image`: strings are data URIs of images, as infinity's.")] = "text"
    user: str | None = None


class SimilarityRequest(Struct):
    """Two lists to compare."""

    queries: Given
    candidates: Given
    model: str | None = None


class SearchRequest(Struct):
    """What to look for among the embeddings of `--index`."""

    input: Words | Item
    k: Annotated[float, Meta(ge=1, le=1000, multiple_of=1, extra_json_schema={"type": "integer"})] = 10
    kind: Modality | None = None
    model: str | None = None


class TokensRequest(Struct):
    """A text whose words are to be counted in tokens."""

    text: Annotated[str, Meta(max_length=100_000)]


Shape = TypeVar("Shape")


async def json_of(request: Request, shape: type[Shape]) -> Shape:
    """The body as one of the shapes above.

    Raises:
        Refusal: It is no JSON, or of another shape.
    """
    if _content_type(request) != JSON:
        raise Refusal(415, f"Send a body of the type {JSON}.", "unsupported_media_type")
    try:
        return msgspec.json.decode(await request.body(), type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        path = re.search(r" - at `\$\.([^`]+)`", str(error))
        message = f"The body is not what is expected here: {error}."
        raise Refusal(400, message, "invalid_body", path[1] if path else None) from error


def inputs_of(given: Any, param: str = "input", modality: str = "text") -> list[Input]:
    """The inputs of a request.

    Raises:
        Refusal: An item is neither a text nor a list of ids nor an image, or an image is no data URI.
    """
    items: Sequence[Any] = given if isinstance(given, list) else [given]
    if all(isinstance(one, float) for one in items):
        return [_ids(items, param)]
    found: list[Input] = []
    for index, one in enumerate(items):
        place = f"{param}[{index}]"
        if isinstance(one, Item):
            if (one.text is None) == (one.image is None):
                raise Refusal(422, 'An object holds either "text" or "image".', "invalid_body", place)
            found.append(one.text if one.text is not None else image_of(str(one.image), place))
        elif isinstance(one, float):
            message = "A number stands among inputs of other kinds. Token ids are lists of numbers alone."
            raise Refusal(422, message, "invalid_body", place)
        elif modality == "image":
            found.append(image_of(one if isinstance(one, str) else "", place))
        else:
            found.append(one if isinstance(one, str) else _ids(one, place))
    return found


def _ids(numbers: Sequence[float], param: str) -> list[int]:
    if not all(one.is_integer() for one in numbers):
        raise Refusal(422, "Token ids are whole numbers.", "bad_token_ids", param)
    return [int(one) for one in numbers]


def image_of(uri: str, param: str) -> bytes:
    """The content of an image's data URI.

    Raises:
        Refusal: It is something else.
    """
    if (head := _DATA_URI.match(uri)) is None:
        message = 'An image is a data URI, "data:image/png;base64,...". This server fetches no URLs.'
        raise Refusal(422, message, "not_a_data_uri", param)
    try:
        content = base64.b64decode(uri[head.end() :], validate=True)
    except binascii.Error as error:
        raise Refusal(422, f"The image's data are not base64: {error}.", "not_a_data_uri", param) from error
    if not content:
        raise Refusal(422, "The image's data URI holds no data.", "not_a_data_uri", param)
    return content


async def embedding_request(request: Request, bounds: Bounds) -> tuple[EmbeddingRequest, list[Input]]:
    """A request for embeddings in JSON or as a form, and its inputs.

    A form has files named `image` and fields named `text`, in the order of the vectors, and the fields of the JSON
    shape.

    Raises:
        Refusal: It is neither.
    """
    if _content_type(request) != MULTIPART:
        asked = await json_of(request, EmbeddingRequest)
        return asked, inputs_of(asked.input, "input", asked.modality)
    inputs: list[Input] = []
    fields: dict[str, Any] = {}
    try:
        async with request.form(max_files=bounds.inputs, max_fields=bounds.inputs) as form:
            for name, value in form.multi_items():
                if name == "image" and isinstance(value, UploadFile):
                    inputs.append(await value.read())
                elif name == "text" and isinstance(value, str):
                    inputs.append(value)
                elif name in ("model", "encoding_format", "dimensions", "user"):
                    fields[name] = value
        asked = msgspec.convert({"input": "-", **fields}, EmbeddingRequest, strict=False)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"The form is not what is expected here: {error}.", "invalid_body") from error
    except Exception as error:
        if isinstance(error, Refusal):
            raise
        # What the parser raises for a damaged form: HTTPException, MultipartException, UnicodeDecodeError, KeyError.
        raise Refusal(400, "The body is no form that can be read.", "invalid_body") from error
    if not inputs or not all(inputs):
        message = "Send at least one file named image or field named text, none empty."
        raise Refusal(422, message, "invalid_body", "image")
    return asked, inputs


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def schemas() -> dict[str, Any]:
    """The shapes in OpenAPI's words, by name."""
    shapes = (EmbeddingRequest, SimilarityRequest, SearchRequest, TokensRequest)
    _, found = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    return found
