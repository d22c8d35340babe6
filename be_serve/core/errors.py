"""All errors that users can see, with their HTTP status.

BEError                          500
├── RequestError                 400   the request itself is wrong
│   ├── InvalidBeId              400   not a well-formed be_id
│   ├── NameConflict             400   alias and be_id name different tokens
│   ├── MisnamedField            400   a key is misspelt or in the wrong place
│   ├── SystemConflict           400   the chat has a system message and a token
│   ├── SlotError                400   this chat has no place for the token
│   └── UnsupportedRequest       400   the endpoint or option cannot work with a token
│       ├── TooLarge             422   the embeddings of one request exceed the server's limit
│       └── TooManyVectors       422   the server has fewer rows than vectors
├── NotAuthenticated             401   the request has no key
├── Forbidden                    403   the key is wrong, or the route is switched off
│   └── TokenRequired            403   the request names no token, and this server requires one
├── TokenNotFound                404   no token has this id
├── TokenConflict                409   the id has another digest, or a second token matches a prompt
├── ArtifactTooLarge             413   the token file is too large
├── InvalidArtifact              422   not a token file, or a damaged one
│   └── WrongModel               422   trained for another model
├── InputError                   400   a file or option given to a command is wrong
├── RegistryError                503   the registry's database does not answer
│   └── SchemaMismatch           503   another version of be-serve made the database
├── RowsBusy                     503   no rows are free
├── OverBudget                   503   running requests use all memory for embeddings
├── IncompatibleVLLM             500   this vLLM, or its options, cannot run the plugin
├── Unfit                        500   internal: be_fallback replaces a token with a bad verdict
├── ServerError                  503   a server started by a command did not come up, or ended
├── ServerRefused                      the server answered with an error; has its HTTP status
└── BatchStopped                 500   run-batch cannot continue
"""

from __future__ import annotations


class BEError(Exception):
    """Base class of all errors with a message for users.

    `param` names the faulty request field or option, if there is one.
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
    """The registry's database failed. `detail` is for operators: logs and commands show it, HTTP answers do not."""

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
    """This vLLM, or the options it was started with, cannot run the plugin."""

    code = "be_incompatible_vllm"


class RowsBusy(BEError):
    """Running requests use all rows. The client may try again."""

    http_status = 503
    code = "be_rows_busy"


class OverBudget(BEError):
    """Running requests with tokens use all the allowed memory. The client may try again."""

    http_status = 503
    code = "be_over_budget"


class Unfit(BEError):
    """The token's verdict says that it does not keep its prompt's behaviour. Only logged; no client gets it."""

    code = "be_unfit"


class ServerError(BEError):
    """A server could not be started or reached, or refused a request."""

    http_status = 503
    code = "be_server_error"
    exit_status: int | None = None
    """Exit status of a server that ended while it started; None otherwise."""


class ServerRefused(BEError):
    """The server answered with an error. Has the server's HTTP status and message."""

    code = "be_server_refused"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"The server answered {status}: {message}")
        self.http_status = status


class BatchStopped(BEError):
    """`run-batch` cannot continue: the server ended, or it is the wrong server. The answers so far are kept."""

    code = "be_batch_stopped"


class TooLarge(UnsupportedRequest):
    """The embeddings of one request need more memory than the server allows for all requests together."""

    http_status = 422
    code = "be_over_capacity"


class TooManyVectors(UnsupportedRequest):
    """The tokens of one request have more vectors than the server process has rows."""

    http_status = 422
    code = "be_too_many_vectors"
