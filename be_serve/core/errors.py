"""Every error a user can meet, with the HTTP status it travels as.

Of the server alone, and beside it: OverBudget and RowsBusy 503, TooLarge and TooManyVectors 422.

BEError                          500
├── RequestError                 400   the request itself is wrong
│   ├── InvalidBeId              400   not a well-formed be_id
│   ├── NameConflict             400   alias and be_id disagree
│   ├── MisnamedField            400   a key is a slip of one of our fields
│   ├── SystemConflict           400   a system message stands beside a token
│   ├── SlotError                400   this chat has no place for the token
│   └── UnsupportedRequest       400   the endpoint or option cannot honour a token
├── NotAuthenticated             401
├── Forbidden                    403
│   └── TokenRequired            403   no token is named, and this server requires one
├── TokenNotFound                404
├── TokenConflict                409   another digest under the id, or a second match
├── ArtifactTooLarge             413
├── InvalidArtifact              422   not a token file, or a damaged one
│   └── WrongModel               422   made for another model
├── InputError                   400   a file or option given to a command is wrong
└── RegistryError                503   the store cannot answer
    └── SchemaMismatch           503   the store was made by another version
"""

from __future__ import annotations


class BEError(Exception):
    """Base of all errors with a message meant for users.

    `param` names the request field or option at fault, where there is one.
    """

    http_status = 500
    code = "be_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class RequestError(BEError):
    http_status = 400
    code = "be_bad_request"


class InvalidBeId(RequestError):
    code = "be_invalid_id"


class NameConflict(RequestError):
    code = "be_name_conflict"


class MisnamedField(RequestError):
    code = "be_misnamed"


class SystemConflict(RequestError):
    code = "be_system_conflict"


class SlotError(RequestError):
    code = "be_slot"


class UnsupportedRequest(RequestError):
    code = "be_unsupported"


class NotAuthenticated(BEError):
    http_status = 401
    code = "be_not_authenticated"


class Forbidden(BEError):
    http_status = 403
    code = "be_forbidden"


class TokenRequired(Forbidden):
    code = "be_token_required"


class TokenNotFound(BEError):
    http_status = 404
    code = "be_not_found"


class TokenConflict(BEError):
    http_status = 409
    code = "be_conflict"


class ArtifactTooLarge(BEError):
    http_status = 413
    code = "be_too_large"


class InvalidArtifact(BEError):
    http_status = 422
    code = "be_invalid_artifact"


class WrongModel(InvalidArtifact):
    code = "be_wrong_model"


class InputError(BEError):
    http_status = 400
    code = "be_input"


class RegistryError(BEError):
    """`detail` is for operators: logs and commands show it, HTTP answers do not."""

    http_status = 503
    code = "be_registry"

    def __init__(self, detail: str) -> None:
        super().__init__("The token registry does not answer; please try again later.")
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class SchemaMismatch(RegistryError):
    code = "be_registry_schema"


class IncompatibleVLLM(BEError):
    """This vLLM, or the way it was started, cannot carry the plugin."""

    code = "be_incompatible_vllm"


class RowsBusy(BEError):
    """Every row is used by requests in flight; the client may try again."""

    http_status = 503
    code = "be_rows_busy"


class OverBudget(BEError):
    """Too many requests with tokens at once; the client may try again."""

    http_status = 503
    code = "be_over_budget"


class Unfit(BEError):
    """The token could answer; its own verdict says that it does not keep its prompt's behaviour. Never sent."""

    code = "be_unfit"


class ServerError(BEError):
    """A server could not be started or reached, or refused a request."""

    http_status = 503
    code = "be_server_error"
    exit_status: int | None = None
    """Of a server that ended while it was waited for."""


class ServerRefused(BEError):
    """The server answered with an error; its message is kept."""

    code = "be_server_refused"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"The server answered {status}: {message}")
        self.http_status = status


class BatchStopped(BEError):
    """What answers the rows is gone, or answers something else; the answers so far are kept."""

    code = "be_batch_stopped"


class TooLarge(UnsupportedRequest):
    """A request whose embeddings exceed what this server would hold of all requests together."""

    http_status = 422
    code = "be_over_capacity"


class TooManyVectors(UnsupportedRequest):
    """A token, or several in one request, that no server of this size can hold."""

    http_status = 422
    code = "be_too_many_vectors"
