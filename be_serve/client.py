"""HTTP client of the admin routes. The commands `register`, `list`, `show` and `remove` use it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from be_serve.core.addresses import checked_key, is_local, warn_of_clear_text
from be_serve.core.artifact import Token, read_limited
from be_serve.core.errors import InputError, ServerRefused
from be_serve.core.ids import validate_be_id
from be_serve.core.prompts import prompt_sha256
from be_serve.core.redaction import hide, safe_url


class BEClient:
    """Registers, lists, shows and removes the tokens of a server.

        with BEClient("http://127.0.0.1:8000", api_key="...") as client:
            client.register("captain.safetensors", match=True)

    `api_key` is the server's admin key; `vllm_api_key` is vLLM's own key, if it has one; `timeout` is in seconds.
    The client follows no redirect, because it would send the key to the new address. Every method raises
    ServerRefused if the server answers with an error, and InputError if the server cannot be reached.
    """

    def __init__(self, url: str, *, api_key: str, vllm_api_key: str | None = None, timeout: float = 60.0) -> None:
        headers = {"X-BE-Key": checked_key(api_key, "--admin-key or BE_ADMIN_KEY")}
        if vllm_api_key and (vllm_api_key := checked_key(vllm_api_key, "--vllm-api-key or VLLM_API_KEY")):
            headers["Authorization"] = f"Bearer {vllm_api_key}"
        base = url.rstrip("/").removesuffix("/v1")
        self._url = safe_url(base)
        self._secrets = {key for key in (api_key.strip(), vllm_api_key) if key}
        try:
            server = httpx.URL(base)
            # An explicit transport ignores the proxies of the environment, but still reads its certificates.
            direct = httpx.HTTPTransport() if is_local(server.host) else None
            self._http = httpx.Client(base_url=base, headers=headers, timeout=timeout, transport=direct)
        except httpx.InvalidURL:  # raised again without its text, which quotes the URL
            raise InputError(f"--url {self._url} is no URL. Use http://HOST:PORT.") from None
        warn_of_clear_text(server.scheme, server.host, by_proxy=True)

    def register(
        self,
        file: str | Path,
        *,
        be_id: str | None = None,
        match: bool | None = None,
        replace: bool = False,
        prompt: str | None = None,
    ) -> tuple[dict[str, Any], bool]:
        """Upload a token file. Returns its manifest, and whether it was new (False: already registered).

        `prompt` is the text of the token's prompt; the server stores it for requests with `be_fallback`.
        """
        data = read_limited(file)
        if prompt is not None and prompt_sha256(prompt) != (expected := Token.from_bytes(data).manifest.prompt.sha256):
            raise InputError(
                f"This text is not the prompt that the token replaces (SHA-256 {expected}). Give the prompt that the "
                "token was trained on."
            )
        params = {"replace": str(replace).lower()}
        if match is not None:
            params["match"] = str(match).lower()
        if be_id is not None:
            params["id"] = validate_be_id(be_id, param="--id")
        response = self._call("POST", "/v1/be/tokens", params=params, content=data)
        manifest = self._object(response, "id", str)
        if prompt is not None:
            try:
                put = self._call("PUT", f"/v1/be/tokens/{manifest['id']}/prompt", content=prompt.encode())
                manifest = self._object(put, "id", str)
            except ServerRefused as exc:
                raise ServerRefused(
                    exc.http_status,
                    f"token {manifest['id']} is registered, but its prompt is NOT stored: {exc.message}",
                ) from exc
        return manifest, response.status_code == 201

    def list(self) -> list[dict[str, Any]]:
        """The manifests of all tokens."""
        data: list[dict[str, Any]] = self._object(self._call("GET", "/v1/be/tokens"), "data", list)["data"]
        return data

    def show(self, be_id: str) -> dict[str, Any]:
        """The manifest of one token."""
        return self._object(self._call("GET", f"/v1/be/tokens/{validate_be_id(be_id, param='ID')}"), "id", str)

    def remove(self, be_id: str, *, prompt: bool = False) -> bool:
        """Remove a token with all its versions, and its stored prompt if `prompt`.

        Returns whether the server keeps a stored prompt.
        """
        params = {"prompt": str(prompt).lower()}
        response = self._call("DELETE", f"/v1/be/tokens/{validate_be_id(be_id, param='ID')}", params=params)
        answer = self._object(response)
        if prompt and not answer.get("prompt_forgotten"):
            raise ServerRefused(
                501, f"{be_id} is removed, but this server is too old to remove stored prompts; upgrade the server."
            )
        return bool(answer.get("prompt_kept"))

    def __enter__(self) -> BEClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def _object(self, response: httpx.Response, name: str = "", kind: type = object) -> dict[str, Any]:
        """The JSON object of an answer, with `name` of this kind. Raises ServerRefused if it is something else."""
        try:
            found = response.json()
        except ValueError:
            found = None
        if isinstance(found, dict) and (not name or isinstance(found.get(name), kind)):
            return found
        said = hide(response.text[:300], self._secrets)
        raise ServerRefused(
            response.status_code, f"{said!r} is no answer of be-serve. Check that {self._url} is a be-serve server."
        )

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as exc:
            why = hide(str(exc), self._secrets)
            raise InputError(
                f"No answer from {self._url}: {why}. Check that the server runs and that the URL is right."
            ) from None
        if response.is_success:
            return response
        message = hide(_message(response), self._secrets)
        if response.status_code == 401 and "Authorization" not in self._http.headers:
            message += " If vLLM was started with --api-key, also give that key (--vllm-api-key or VLLM_API_KEY)."
        raise ServerRefused(response.status_code, message)


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text[:300] or response.reason_phrase
