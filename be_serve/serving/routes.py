"""The admin routes under /v1/be/tokens: register, list, show, remove."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from be_serve.core.errors import ArtifactTooLarge, BEError, Forbidden, InvalidArtifact, NotAuthenticated, TokenNotFound
from be_serve.serving.middleware import error_body
from be_serve.serving.service import Service


def service(request: Request) -> Service:
    """The Service that the plugin stored on this app."""
    stored: Service = request.app.state.be_serve
    return stored


class AdminRoute(APIRoute):
    """A route that counts what it refuses, keys included. Refusals of chats are counted where they are raised."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                return await answer(request)
            except BEError as exc:
                service(request).metrics.refused(exc)
                raise

        return counted


router = APIRouter(tags=["be-serve"], route_class=AdminRoute)


async def be_error_handler(_request: Request, exc: BEError) -> JSONResponse:
    """The response to a BEError: OpenAI's error body with the error's HTTP status."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(exc.http_status)
    return JSONResponse(error_body(exc), status_code=exc.http_status, headers=headers)


def require_admin(
    request: Request,
    x_be_key: Annotated[str | None, Header(description="The admin key (BE_ADMIN_KEY).")] = None,
    authorization: Annotated[str | None, Header(description="`Bearer KEY`, where vLLM has no --api-key.")] = None,
) -> None:
    """Check the admin key of a request. Raises Forbidden or NotAuthenticated."""
    state = service(request)
    expected = state.settings.admin_key
    if expected is None:
        raise Forbidden("Token administration is off: start the server with --be-admin-key or BE_ADMIN_KEY.")
    given = x_be_key
    if given is None and authorization is not None and not state.vllm_has_api_key:
        scheme, _, value = authorization.partition(" ")
        given = value.strip() if scheme.lower() == "bearer" else None
    if not given:
        where = "`X-BE-Key`" if state.vllm_has_api_key else "`X-BE-Key` or `Authorization: Bearer`"
        raise NotAuthenticated(f"Send the admin key as {where}.")
    if not hmac.compare_digest(given.encode(), expected.encode()):
        raise Forbidden("This is not the server's admin key; compare it with the server's BE_ADMIN_KEY.")


Admin = Depends(require_admin)
_RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"description": "No admin key in the request."},
    403: {"description": "Wrong admin key, or administration is off."},
}


@router.post(
    "/v1/be/tokens",
    dependencies=[Admin],
    status_code=201,
    summary="Register a token",
    responses={
        **_RESPONSES,
        200: {"description": "The same file was already registered under this id."},
        409: {"description": "The id has another file and `replace` is false, or another token matches the prompt."},
        413: {"description": "Larger than --be-max-upload."},
        422: {"description": "Not a valid token file, or trained for another model."},
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def register_token(
    request: Request,
    be_id: Annotated[str | None, Query(alias="id", description="The id. Default: the id in the file.")] = None,
    match: Annotated[
        bool | None, Query(description="Also answer chats with the exact prompt. Absent: unchanged, at first false.")
    ] = None,
    replace: Annotated[bool, Query(description="If the id has another file, make this a new version.")] = False,
) -> JSONResponse:
    """Body: the bytes of a `.safetensors` token file. The server executes nothing in it."""
    state = service(request)
    data = await _read_body(request, state.settings.max_upload)
    result = await asyncio.to_thread(state.register, data, be_id=be_id, match=match, replace=replace)
    return JSONResponse(result.record.public(), status_code=201 if result.created else 200)


@router.get("/v1/be/tokens", dependencies=[Admin], summary="List tokens", responses=_RESPONSES)
async def list_tokens(request: Request) -> dict[str, Any]:
    """The manifests of all tokens, without vectors."""
    return {"object": "list", "data": [record.public() for record in service(request).index.records()]}


@router.get(
    "/v1/be/tokens/{be_id}",
    dependencies=[Admin],
    summary="Show a token",
    responses={**_RESPONSES, 404: {"description": "No such token."}},
)
async def show_token(request: Request, be_id: str) -> dict[str, Any]:
    """The manifest of one token."""
    return service(request).index.get(be_id).public()


@router.put(
    "/v1/be/tokens/{be_id}/prompt",
    dependencies=[Admin],
    summary="Store a token's prompt",
    responses={
        **_RESPONSES,
        404: {"description": "No such token."},
        413: {"description": "Larger than --be-max-upload."},
        422: {"description": "Not the token's prompt, or not UTF-8."},
    },
    openapi_extra={"requestBody": {"required": True, "content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def store_prompt(request: Request, be_id: str) -> dict[str, Any]:
    """Body: the prompt's text, for requests with `be_fallback`. No route returns this text."""
    state = service(request)
    data = await _read_body(request, state.settings.max_upload)
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise InvalidArtifact("The prompt must be UTF-8 text; convert the file to UTF-8.") from exc
    return (await asyncio.to_thread(state.store_prompt, be_id, text)).public()


@router.delete(
    "/v1/be/tokens/{be_id}",
    dependencies=[Admin],
    summary="Remove a token",
    responses={**_RESPONSES, 404: {"description": "No such token."}},
)
async def remove_token(
    request: Request,
    be_id: str,
    prompt: Annotated[bool, Query(description="Also remove the stored text of the prompt.")] = False,
) -> dict[str, Any]:
    """Remove a token with all its versions. This server process stops using the token at once.

    A stored prompt is kept for requests with `be_fallback`, unless `prompt` is true.
    """
    if not 0 < len(be_id) <= 64:
        raise TokenNotFound(f"No token {be_id[:64]!r} is registered.")
    kept = await asyncio.to_thread(service(request).remove, be_id, prompt=prompt)
    prompt_state = {"prompt_forgotten": True} if prompt else {"prompt_kept": True} if kept else {}
    return {"id": be_id, "deleted": True, **prompt_state}


def is_post_route(app: Any, path: str) -> bool:
    """Whether the app has a POST route with exactly this path."""
    return any(path == getattr(r, "path", None) and "POST" in (getattr(r, "methods", None) or ()) for r in app.routes)


async def _read_body(request: Request, limit: int) -> bytes:
    """The request body. Raises ArtifactTooLarge as soon as it exceeds `limit` bytes."""
    refusal = ArtifactTooLarge(f"The token file is larger than {limit} bytes (--be-max-upload).")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise refusal
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise refusal
        chunks.append(chunk)
    return b"".join(chunks)
