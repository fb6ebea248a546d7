"""The routes: each reads a request, asks the queues, and writes an answer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from longclip_rt.search.page import STYLE
from longclip_rt.serving import answers, requests
from longclip_rt.serving.answers import cut, json_response, responses, usage
from longclip_rt.serving.bounds import Refusal
from longclip_rt.serving.collection import Collection
from longclip_rt.serving.server import Server

_PAGE = Path(__file__).parent / "page"
_ERRORS = (400, 401, 404, 405, 413, 415, 422, 429, 500, 503)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _asks(shape: str) -> dict[str, Any]:
    """A body of a named shape, in OpenAPI's words."""
    schema = {"$ref": f"#/components/schemas/{shape}"}
    return {"requestBody": {"required": True, "content": {requests.JSON: {"schema": schema}}}}


def add_models(app: FastAPI, server: Server) -> None:
    """Adds what tells of the model and its tokens."""
    bundle = server.embedder.bundle
    about = {
        "id": server.model,
        "object": "model",
        "created": 0,
        "owned_by": "longclip-rt",
        "dim": server.embedder.dim,
        "context_length": server.embedder.context_length,
        "image_size": server.embedder.image_size,
        "index_rows": len(server.collection) if server.collection is not None else None,
        "pca_dimensions": server.pca.k if server.pca else None,
        **{name: getattr(server.embedder, name) for name in ("batch_size", "concurrency", "pad_multiple", "buckets")},
        **server.embedder.describe(),
    }

    @app.get("/v1/models", responses=responses("Models", errors=(401, 500, 503)))
    async def models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [about]})

    @app.get("/v1/bundle/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        """What a client needs to tokenize and to crop by itself."""
        if name not in ("bundle.json", "tokenizer.json"):
            raise HTTPException(404, "Not Found")
        return FileResponse(bundle.file(name), media_type="application/json")

    @app.post("/v1/tokens", responses=responses("Words", errors=_ERRORS), openapi_extra=_asks("TokensRequest"))
    async def tokens(request: Request) -> Response:
        """The words of a text, each with the number of tokens up to its end, the start token included."""
        asked = await requests.json_of(request, requests.TokensRequest)
        words = asked.text.split()
        counted = await server.encoding.in_worker(lambda: server.embedder.tokenizer.encode(words))
        ends = list(itertools.accumulate((one.length - 2 for one in counted), initial=1))
        listed = [{"word": word, "end": end} for word, end in zip(words, ends[1:], strict=True)]
        about = {"tokens": ends[-1] + 1, "context_length": server.embedder.context_length}
        return json_response({**about, "words": listed})


def add_embeddings(app: FastAPI, server: Server) -> None:
    """Adds vectors and similarities."""
    body = _asks("EmbeddingRequest")
    body["requestBody"]["content"][requests.MULTIPART] = {"schema": {"$ref": "#/components/schemas/EmbeddingForm"}}

    @app.post("/v1/embeddings", responses=responses("Embeddings", raw=True, errors=_ERRORS), openapi_extra=body)
    async def embeddings(request: Request) -> Response:
        """Embeds texts, token ids and images, in OpenAI's shape; `Accept: application/octet-stream` gives float32."""
        asked, inputs = await requests.embedding_request(request, server.options.bounds)
        server.check_model(asked.model)
        encoded = await server.encoding.encode(inputs)
        vectors = server.shortened(encoded, asked.dimensions)
        raw = answers.RAW in request.headers.get("accept", "")

        def answer() -> Response:
            return answers.embeddings(encoded, vectors, server.model, asked.encoding_format, raw)

        return await server.encoding.in_worker(answer)

    @app.post(
        "/v1/similarity", responses=responses("Similarities", errors=_ERRORS), openapi_extra=_asks("SimilarityRequest")
    )
    async def similarity(request: Request) -> Response:
        """Cosine similarities of each query (rows) with each candidate (columns)."""
        asked = await requests.json_of(request, requests.SimilarityRequest)
        server.check_model(asked.model)
        queries = await server.encoding.encode(requests.inputs_of(asked.queries, "queries"), "queries")
        candidates = await server.encoding.encode(requests.inputs_of(asked.candidates, "candidates"), "candidates")
        scores = await server.encoding.in_worker(lambda: (queries.vectors @ candidates.vectors.T).tolist())
        truncated = {"queries": cut(queries), "candidates": cut(candidates)}
        about = {"model": server.model, "usage": usage(queries, candidates)}
        return json_response({"scores": scores, "truncated": truncated, **about})


def add_states(app: FastAPI, server: Server) -> None:
    """Adds the page, metrics and whether the server is well."""

    @app.get("/health", responses=responses("State", errors=(500,)))
    async def health() -> Response:
        """The process lives."""
        return json_response({"status": "ok"})

    @app.get("/ready", responses=responses("State", errors=(500, 503)))
    async def ready() -> Response:
        """The model is warm."""
        if not server.ready.is_set():
            raise Refusal(503, "The model is being warmed up.", "warming_up", retry_after=1)
        return json_response({"status": "ready"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        for kind, batcher in server.encoding.queues.items():
            server.metrics.queue.labels(kind).set(batcher.waiting)
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "page.html", headers=headers)

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return FileResponse(_PAGE / "page.js", headers=headers)

    @app.get("/page.css", include_in_schema=False)
    async def style() -> Response:
        rules = STYLE + (_PAGE / "page.css").read_text(encoding="utf-8")
        return Response(rules, media_type="text/css", headers=headers)


def add_search(app: FastAPI, server: Server, collection: Collection) -> None:
    """Adds search over a collection, and its thumbnails."""

    @app.post("/v1/search", responses=responses("Hits", errors=_ERRORS), openapi_extra=_asks("SearchRequest"))
    async def search(request: Request) -> Response:
        """The embeddings nearest to a text or an image, best first."""
        asked = await requests.json_of(request, requests.SearchRequest)
        server.check_model(asked.model)
        encoded = await server.query(asked.input)
        hits = await server.encoding.in_worker(lambda: collection.search(encoded.vectors[0], int(asked.k), asked.kind))
        listed = [
            {
                **{name: getattr(hit, name) for name in ("rank", "score", "id", "kind", "row")},
                "thumbnail": f"/v1/thumbnails/{hit.row}" if collection.picture(hit.row) else None,
            }
            for hit in hits
        ]
        about = {"model": server.model, "usage": usage(encoded), "truncated": cut(encoded)}
        return json_response({"hits": listed, **about})

    @app.get("/v1/thumbnails/{row}", include_in_schema=False)
    async def thumbnail(row: str) -> Response:
        """A small picture of a row of the index."""
        number = int(row) if row.isascii() and row.isdigit() and len(row) < 12 else -1
        picture = await server.encoding.in_worker(lambda: collection.thumbnail(number))
        if picture is None:
            raise HTTPException(404, "There is no picture")
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})
