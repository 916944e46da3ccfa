"""Which models an experiment compares, and the overrides that make each of them the base."""

from __future__ import annotations

from steerlora.cli.compose import Compose, refuse_name
from steerlora.config import Config


def options_of_model(config: Config, name: str) -> tuple[str, ...]:
    """Overrides that make a model the base: none for the configuration's own, whatever gave it."""
    return () if name == config.model.name else (f"model={name}",)


def compared_models(config: Config, compose: Compose) -> dict[str, tuple[str, ...]]:
    """{model of the study: overrides that make it the base}, in the study's order.

    Where the study does not list its main model, it is of that one alone. So it is where
    ``model.path`` or ``model.name`` makes all options of ``model`` one.

    Raises:
        UserError: an option has another name than its file.
    """
    study = config.study
    if not study.models:
        return {}
    found = {name: options_of_model(config, name) for name in study.models}
    own = {study.main_model: options_of_model(config, study.main_model)}
    main = compose(*own[study.main_model]).model
    if main.name != study.main_model:
        refuse_name("model", study.main_model, main.name)
    if study.main_model not in found:
        return own
    for name in (name for name in found if name != main.name):
        model = compose(*found[name]).model
        if model.name == main.name or (main.path is not None and model.path == main.path):
            return own
        if model.name != name:
            refuse_name("model", name, model.name)
    return found
