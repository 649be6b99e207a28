"""`--model DIR` or `--model NAME[,ALIAS…]=DIR`, once for each model, as configs."""

from collections.abc import Sequence
from pathlib import Path

from baton.cli.defaults import DEMO_MODEL, name_of
from baton.core.config import ModelFolder
from baton.core.errors import InvalidConfig


def models_of(values: Sequence[str], name: str) -> tuple[ModelFolder, ...]:
    """Return the models that are asked for, the demo model if none is; at least one.

    `name` is what `--name` says, for a single one. Raises InvalidConfig for what names no model.
    """
    models = tuple(_model(value) for value in values)
    if not models:
        models = (ModelFolder(dir=DEMO_MODEL, name=name_of(DEMO_MODEL)),)
    named = any(model.name != name_of(model.dir) or model.aliases for model in models)
    if name and (len(models) > 1 or named):
        raise InvalidConfig("--name", name, "nothing, where --model NAME=DIR says it")
    return (models[0].model_copy(update={"name": name}),) if name else models


def _model(value: str) -> ModelFolder:
    names, equals, folder = value.partition("=")
    if not equals or Path(value).exists():
        return ModelFolder(dir=Path(value), name=name_of(Path(value)))
    name, *aliases = names.split(",")
    if not folder or not name or not all(aliases):
        raise InvalidConfig("--model", value, "DIR, NAME=DIR or NAME,ALIAS=DIR")
    return ModelFolder(dir=Path(folder), name=name, aliases=tuple(aliases))
