"""What a function takes, as a JSON schema, and what a model sends, made into its arguments."""

from __future__ import annotations

import inspect
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    NotRequired,  # pydantic's own; Python 3.11's lack what it needs
    cast,
    get_args,
    get_origin,
)

import orjson
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_NAMED: Final = frozenset({inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY})
_MAX_SHOWN: Final = 8  # mistakes that the model is told of


class Arguments:
    """The parameters of a function behind its first one (the context).

    ``schema`` is their JSON schema. ``given`` takes its place, and what is sent is not checked against it then.
    Raises ValueError for a function that cannot be called by name.
    """

    def __init__(self, function: Callable[..., Any], given: Mapping[str, Any] | None = None) -> None:
        self._adapter: TypeAdapter[dict[str, Any]] | None = None
        if given is not None:
            self.schema: Mapping[str, Any] = given
            return
        fields, defaults = _fields(function)
        shape = cast("Any", TypedDict)("arguments", fields)
        try:
            self._adapter = TypeAdapter(with_config(ConfigDict(extra="forbid"))(shape))
            schema = self._adapter.json_schema()
        except PydanticUserError as error:
            raise ValueError(f"no JSON schema can be made of its parameters: {error.message}") from None
        schema.pop("title", None)
        properties = schema.setdefault("properties", {})
        for name, value in properties.items():
            value.pop("title", None)
            if name in defaults and isinstance(defaults[name], str | int | float | bool):
                value["default"] = defaults[name]
        self.schema = schema

    def parse(self, text: str) -> dict[str, Any]:
        """Return the arguments that ``text`` (JSON) holds. Raises ValueError with words for whoever sent it."""
        if self._adapter is None:
            try:
                found = orjson.loads(text) if text.strip() else {}
            except ValueError:
                raise ValueError("the arguments are not JSON") from None
            if not isinstance(found, dict):
                raise ValueError("the arguments are no JSON object")
            return found
        try:
            return dict(self._adapter.validate_json(text if text.strip() else "{}"))
        except ValidationError as error:
            mistakes = error.errors(include_url=False, include_input=False, include_context=False)
            told = [
                f"{'.'.join(map(str, m['loc'])) or 'arguments'}: {m['msg']}" for m in mistakes[:_MAX_SHOWN]
            ]
            raise ValueError("; ".join(told)) from None


def _fields(function: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return annotations and defaults of the parameters behind the first."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise ValueError("does not take (context, …)")
    own = parameters[1:]
    if any(p.kind not in _NAMED for p in own):
        raise ValueError("takes *args or **kwargs: give its parameters")
    # Only these are looked up: the context's type may be there for the type checker alone.
    named = {p.name: p.annotation for p in own if p.annotation is not p.empty}
    scope = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__globals__", {})
    try:
        types = {
            name: eval(value, scope) if isinstance(value, str) else value  # noqa: S307  # the plugin's own annotation
            for name, value in named.items()
        }
    except (NameError, SyntaxError, AttributeError, TypeError) as error:
        raise ValueError(f"an annotation cannot be looked up: {error}") from None
    fields: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for parameter in own:
        annotation = _described(types.get(parameter.name, Any))
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
            annotation = NotRequired[annotation]
        fields[parameter.name] = annotation
    return fields, defaults


def _described(annotation: Any) -> Any:
    """Return an annotation whose text, in ``Annotated[str, "the city's name"]``, describes the parameter."""
    if get_origin(annotation) is not Annotated:
        return annotation
    inner, *more = get_args(annotation)
    for item in more:
        described = Field(description=item) if isinstance(item, str) else item
        inner = Annotated[inner, described]
    return inner
