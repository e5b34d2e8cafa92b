"""The pages, a module each, which is imported when one of its pages is asked for."""

from __future__ import annotations

__all__ = ["ROUTES"]

ROUTES = (
    ("GET", "/", "models", "home"),
    ("GET", "/models", "models", "models"),
    ("GET", "/model", "models", "model"),
    ("GET", "/methods", "methods", "every"),
    ("GET", "/methods/{name}", "methods", "one"),
    ("GET", "/recipe", "recipe", "page"),
    ("GET", "/recipe/plan", "recipe", "plan_of"),
    ("POST", "/recipe/yaml", "recipe", "typed"),
    ("POST", "/recipe/set", "recipe", "set_value"),
    ("POST", "/recipe/model", "recipe", "model"),
    ("POST", "/recipe/stage", "recipe", "stage"),
    ("POST", "/recipe/rule", "recipe", "rule"),
    ("POST", "/recipe/save", "recipe", "save"),
    ("POST", "/recipe/revert", "recipe", "revert"),
    ("POST", "/recipe/add", "recipe", "add"),
    ("POST", "/recipe/run", "recipe", "run"),
    ("POST", "/recipe/inspect", "recipe", "inspect"),
    ("GET", "/run", "run", "every"),
    ("GET", "/run/{id}", "run", "one"),
    ("GET", "/run/{id}/events", "run", "events"),
    ("POST", "/run/{id}/stop", "run", "stop"),
    ("POST", "/run/{id}/resume", "run", "resume"),
    ("POST", "/run/{id}/remove", "run", "remove"),
    ("POST", "/verify", "run", "verify"),
    ("POST", "/check", "run", "check"),
)
"""GET or POST, an address, and the module and function that answer it."""
