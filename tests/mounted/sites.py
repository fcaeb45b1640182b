"""The site of worker/site_app.py inside other applications, under `PREFIX`; for WSGI servers to load."""

from __future__ import annotations

from typing import Any

from site_app import PREFIX, make
from werkzeug.middleware.dispatcher import DispatcherMiddleware


def flask(directory: str) -> Any:
    """Return a Flask application that has the site mounted."""
    from flask import Flask

    host = Flask("host")
    host.add_url_rule("/", view_func=lambda: "the host's own page")
    host.wsgi_app = DispatcherMiddleware(host.wsgi_app, {PREFIX: make(directory)})  # type: ignore[method-assign]
    return host


def django(directory: str) -> Any:
    """Return a Django application that has the site mounted."""
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse
    from django.urls import path

    urls = (path("", lambda request: HttpResponse("the host's own page")),)
    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=urls, SECRET_KEY="of a test")
    return DispatcherMiddleware(get_wsgi_application(), {PREFIX: make(directory)})
