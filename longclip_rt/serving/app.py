"""The ASGI app: routes over an `Embedder`. Any ASGI server runs it; `longclip-rt serve` runs it with uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response

from longclip_rt.backends.base import Float32
from longclip_rt.errors import PcaError
from longclip_rt.pca.basis import Pca
from longclip_rt.runtime import Embedder
from longclip_rt.serving import answers, requests
from longclip_rt.serving.answers import cut, json_response, responses, usage
from longclip_rt.serving.bounds import Bounds, Refusal
from longclip_rt.serving.collection import Collection
from longclip_rt.serving.encoding import Encoded, Encoding
from longclip_rt.serving.guard import Guard
from longclip_rt.serving.metrics import Metrics
from longclip_rt.version import __version__

_PAGE = Path(__file__).parent / "page"
_ERRORS = (400, 401, 404, 405, 413, 415, 422, 429, 500, 503)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Options:
    """What a server offers.

    Attributes:
        bounds: Its limits.
        key: The API key; empty: none is asked for.
        index: Embeddings to search, from `embed`.
        pictures: The folder whose pictures may be shown.
    """

    bounds: Bounds = field(default_factory=Bounds)
    key: str = field(default="", repr=False)
    index: Path | None = None
    pictures: Path | None = None


class Server:
    """What the routes share: the model and its queues, the collection, the metrics."""

    def __init__(self, embedder: Embedder, options: Options) -> None:
        if embedder.pca is not None:
            raise PcaError("A server takes an embedder without a PCA, and applies the bundle's where a request asks.")
        self.embedder, self.options = embedder, options
        self.metrics = Metrics()
        self.encoding = Encoding(embedder, options.bounds, self.metrics)
        self.collection = None
        if options.index is not None:
            self.collection = Collection(options.index, embedder, options.pictures)
        self.model = embedder.bundle.name
        self.pca = embedder.bundle.pca
        self.ready = asyncio.Event()

    def check_model(self, name: str | None) -> None:
        """Refuses another model's name.

        Raises:
            Refusal: It is another's.
        """
        if name not in (None, self.model):
            raise Refusal(404, f"There is no model {name!r} here; there is {self.model}.", "model_not_found", "model")

    def shortened(self, encoded: Encoded, asked: float | None) -> Float32:
        """Vectors [N, `asked`]: the model's own, or the bundle's PCA's first components, of length 1 again.

        Raises:
            Refusal: The model cannot give so many.
        """
        if asked in (None, self.embedder.dim):
            return encoded.vectors
        pca, dimensions = self.pca, int(asked)
        if pca is None or not 1 <= dimensions <= pca.k or dimensions != asked:
            offered = f"{self.embedder.dim}" + (f" and 1 to {pca.k}" if pca else "; the bundle carries no PCA")
            raise Refusal(400, f"dimensions is {asked:g}; there are {offered}.", "bad_dimensions", "dimensions")
        first = Pca({name: basis.first(dimensions) for name, basis in pca.bases.items()})
        shorter = encoded.vectors[:, :dimensions].copy()
        for kind in set(encoded.kinds):
            rows = [index for index, one in enumerate(encoded.kinds) if one == kind]
            shorter[rows] = first.apply(encoded.vectors[rows], kind)
        return shorter

    async def query(self, item: Any) -> Encoded:
        """The vector of one text or image."""
        return await self.encoding.encode(requests.inputs_of(item))


def create_app(embedder: Embedder, options: Options = Options()) -> FastAPI:
    """The app.

    Args:
        embedder: The model, without a PCA; it stays the caller's to close.
        options: What is offered.

    Raises:
        BundleError: Another model made the index.
        PcaError: The embedder has a PCA, or the index was made with one.
        OutputError: The index cannot be read.
    """
    server = Server(embedder, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def warm_up() -> None:
            await server.encoding.warm_up()
            server.ready.set()

        warming = asyncio.create_task(warm_up())
        yield
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        server.encoding.close()

    app = FastAPI(title="longclip-rt", version=__version__, lifespan=lifespan, redoc_url=None)
    app.state.server = server
    app.add_middleware(
        Guard,
        bounds=options.bounds,
        key=options.key,
        metrics=server.metrics,
        check_room=server.encoding.check_room,
    )
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(HTTPException)(_http_error)
    _add_models(app, server)
    _add_embeddings(app, server)
    _add_states(app, server)
    if server.collection is not None:
        _add_search(app, server, server.collection)
    _describe(app, server)
    with contextlib.suppress(ImportError):  # traces where OpenTelemetry's package is there, to where it is set up to
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(app, excluded_urls="/health,/ready,/metrics")
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    request.scope["longclip.code"] = error.code
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    refusal = Refusal(error.status_code, f"{error.detail}: {request.method} {request.url.path}", code)
    request.scope["longclip.code"] = code
    return JSONResponse(refusal.body, refusal.status, error.headers)


def _asks(shape: str) -> dict[str, Any]:
    """A body of a named shape, in OpenAPI's words."""
    schema = {"$ref": f"#/components/schemas/{shape}"}
    return {"requestBody": {"required": True, "content": {requests.JSON: {"schema": schema}}}}


def _add_models(app: FastAPI, server: Server) -> None:
    bundle = server.embedder.bundle
    about = {
        "id": server.model,
        "object": "model",
        "created": 0,
        "owned_by": "longclip-rt",
        "dim": server.embedder.dim,
        "context_length": server.embedder.context_length,
        "image_size": server.embedder.image_size,
        "pca_dimensions": server.pca.k if server.pca else None,
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


def _add_embeddings(app: FastAPI, server: Server) -> None:
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


def _add_states(app: FastAPI, server: Server) -> None:
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
    for path, name in (("/", "page.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        if (_PAGE / name).exists():
            app.add_api_route(path, _file(_PAGE / name, headers), include_in_schema=False)


def _file(path: Path, headers: dict[str, str]) -> Any:
    async def answer() -> Response:
        return FileResponse(path, headers=headers)

    return answer


def _add_search(app: FastAPI, server: Server, collection: Collection) -> None:
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


def _describe(app: FastAPI, server: Server) -> None:
    """Puts the shapes into the app's OpenAPI schema, with what this model offers."""
    shapes = requests.schemas()
    sizes: list[dict[str, Any]] = [{"const": server.embedder.dim}, {"type": "null"}]
    if server.pca is not None:
        sizes.append({"type": "integer", "minimum": 1, "maximum": server.pca.k})
    for shape in shapes.values():
        fields = shape["properties"]
        if "model" in fields:
            fields["model"] = {"enum": [server.model, None]}
        if "dimensions" in fields:
            fields["dimensions"] = {"anyOf": sizes}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    shapes["EmbeddingForm"] = {"type": "object", "properties": {"image": files}, "required": ["image"]}
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made().setdefault("components", {}).setdefault("schemas", {}).update(shapes | answers.SCHEMAS)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
