"""The ASGI app: routes over an `Embedder`. Any ASGI server runs it; `longclip-rt serve` runs it with uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from longclip_rt.runtime import Embedder
from longclip_rt.serving import answers, requests, routes
from longclip_rt.serving.bounds import Refusal
from longclip_rt.serving.guard import Guard
from longclip_rt.serving.server import Options, Server
from longclip_rt.version import __version__


def create_app(embedder: Embedder, options: Options | None = None) -> FastAPI:
    """The app.

    Args:
        embedder: The model, without a PCA; it stays the caller's to close.
        options: What is offered; None: the default bounds, no key and no index.

    Raises:
        BundleError: Another model made the index.
        PcaError: The embedder has a PCA, or the index was made with one.
        OutputError: The index cannot be read.
    """
    options = options or Options()
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
    routes.add_models(app, server)
    routes.add_embeddings(app, server)
    routes.add_states(app, server)
    if server.collection is not None:
        routes.add_search(app, server, server.collection)
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
