"""MetadataApp: the metadata route as a WSGI application, for whatever server already runs in the worker.

Mount it at the root or under any prefix: routing looks at PATH_INFO alone, and nothing in an answer depends
on the host or the prefix of the request. The same answers as the embedded server's; a plain hit goes straight
from the registry to `start_response`, everything else through a Werkzeug Response. With a token the server
must hand on the Authorization field (mod_wsgi does with `WSGIPassAuthorization On`).

An encoded slash separates no segments where the server tells how the path was spelt; wsgiref does not.

No `wsgi.file_wrapper`: servers that send a file with it lose step with the client when the file changes.
Every body is pinned content; one that comes up short raises, so that the server closes the connection.

Sharing: any number of threads and forked processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Optional, Union

from werkzeug.datastructures import EnvironHeaders
from werkzeug.wrappers import Response
from werkzeug.wsgi import get_path_info

from .access import Access
from .answer import INDEX, METHOD_NOT_ALLOWED, NOT_FOUND, Answer, answer_registered, find, has_encoded_slash
from .content import Content
from .index import Index
from .registry import MetadataArtifactRegistry

if TYPE_CHECKING:
    import os

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from ..settings import Settings

PIECE_BYTES = 256 * 1024  # of a range or of a held file; other pinned content leaves as one piece
_CONDITIONS = ("HTTP_RANGE", "HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")


class MetadataApp:
    """Serve a registry at /v1/metadata/{slug}/{suffix}[/{filename}]; a WSGI callable.

    Without `token` and `token_file` whoever reaches the port reads all of it, whatever the environment says:
    `from_settings` takes what is set. With one only requests that carry it see metadata; SettingsError if it
    cannot be used. `index` lists at /v1/metadata what is registered.
    """

    def __init__(
        self,
        registry: MetadataArtifactRegistry,
        *,
        token: Optional[str] = None,
        token_file: Union[str, os.PathLike[str], None] = None,
        index: bool = False,
    ) -> None:
        self.registry = registry
        self._access = Access.of(token, token_file)
        self._index = Index(registry) if index else None

    @classmethod
    def from_settings(cls, registry: MetadataArtifactRegistry, settings: Settings) -> MetadataApp:
        """Return the app with the token and the index that the settings ask for; SettingsError."""
        return cls(
            registry,
            token=settings.token,
            token_file=settings.token_file,
            index=settings.metadata_index,
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request (PEP 3333)."""
        method = environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            return _respond(METHOD_NOT_ALLOWED, environ, start_response)
        path, query = get_path_info(environ), environ.get("QUERY_STRING", "")
        if self._access is not None:
            refusal = self._access.refusal(path, environ.get("HTTP_AUTHORIZATION", ""))
            if refusal is not None:
                return _respond(refusal, environ, start_response)
        artifact = find(self.registry, path, query)
        target = environ.get("REQUEST_URI") or environ.get("RAW_URI")  # not in PEP 3333: some servers tell it
        if target and "%" in target and has_encoded_slash(target):
            return _respond(NOT_FOUND, environ, start_response)
        if artifact is not None and method == "GET" and not any(name in environ for name in _CONDITIONS):
            data = artifact.content.data
            if data is not None:
                start_response("200 OK", list(artifact.fields))
                return [data]
        return _respond(self._answer(method, path, query, environ), environ, start_response)

    def _answer(self, method: str, path: str, query: str, environ: WSGIEnvironment) -> Answer:
        headers = EnvironHeaders(environ)
        if path == INDEX and self._index is not None:
            return self._index.answer(method, query, headers)
        return answer_registered(self.registry, method, path, query, headers) or NOT_FOUND

    def __repr__(self) -> str:
        return f"<MetadataApp {self.registry!r}>"


class _Response(Response):
    default_mimetype = None  # the answer's fields are complete
    automatically_set_content_length = False


def _respond(answer: Answer, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    body: Iterable[bytes] = [answer.body] if answer.body else ()
    if answer.content is not None:
        body = _pieces(answer.content, answer.start, answer.stop)
    response = _Response(body, status=answer.status, headers=list(answer.fields), direct_passthrough=True)
    return response(environ, start_response)


def _pieces(content: Content, start: int, stop: int) -> Iterator[bytes]:
    """Yield the slice piece by piece; raise OSError in place of a piece that is not what was hashed."""
    for position in range(start, stop, PIECE_BYTES):
        yield content.read(position, min(position + PIECE_BYTES, stop))
