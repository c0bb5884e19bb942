"""Agents: the ways in which the server can answer, each with its model, prompt, tools and windows.

The unnamed one is ``default`` and is the ``ai`` part of the configuration itself; a named one differs from it where
its own part says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from feishu_bot.config import AISettings

DEFAULT: Final = "default"


@dataclass(frozen=True, slots=True)
class Profile:
    """One way to answer. ``persona`` is the name of the one whose prompt stands in ``system_prompt``, if any."""

    name: str
    model: str
    fallback_models: tuple[str, ...]
    system_prompt: str
    tools: tuple[str, ...]  # patterns of names
    max_output_tokens: int
    max_history_turns: int
    max_history_tokens: int
    temperature: float | None
    summarize: bool
    persona: str | None = None

    def with_persona(self, name: str, prompt: str) -> Profile:
        """Return this agent as somebody: the persona's prompt takes the place of its own."""
        return replace(self, persona=name, system_prompt=prompt)

    def with_model(self, model: str) -> Profile:
        """Return this agent with another model; its own is the first to be asked if that one fails."""
        if model == self.model:
            return self
        others = (self.model, *self.fallback_models)
        return replace(self, model=model, fallback_models=tuple(name for name in others if name != model))


def make_profiles(settings: AISettings) -> dict[str, Profile]:
    """Return every agent of a configuration by its name, ``default`` first."""
    persistence = settings.conversation_persistence
    default = Profile(
        name=DEFAULT,
        model=settings.model,
        fallback_models=settings.fallback_models,
        system_prompt=settings.system_prompt,
        tools=settings.tools,
        max_output_tokens=settings.max_output_tokens,
        max_history_turns=persistence.max_history_turns,
        max_history_tokens=persistence.max_history_tokens,
        temperature=settings.temperature,
        summarize=settings.summarize,
    )
    profiles = {DEFAULT: default}
    for name, agent in settings.agents.items():
        own = {key: value for key in agent.model_fields_set if (value := getattr(agent, key)) is not None}
        persona = own.pop("persona", None)
        if "model" in own and "fallback_models" not in own:
            own["fallback_models"] = tuple(m for m in settings.fallback_models if m != own["model"])
        own.pop("description", None)
        profile = replace(default, name=name, **own)
        if persona is not None:
            profile = profile.with_persona(persona, settings.personas[persona])
        profiles[name] = profile
    return profiles


def models_of(settings: AISettings) -> tuple[str, ...]:
    """Return the names of all models that a configuration may ask, each once, ``ai.model`` first."""
    profiles = make_profiles(settings).values()
    return tuple(dict.fromkeys(m for p in profiles for m in (p.model, *p.fallback_models)))


def choose_profile(
    profiles: Mapping[str, Profile],
    personas: Mapping[str, str],
    *,
    agent: str,
    persona: str | None,
    model: str | None,
) -> Profile:
    """Return how a conversation is answered. What was chosen once and is configured no more is passed over."""
    profile = profiles.get(agent) or profiles[DEFAULT]
    if persona is not None and persona in personas:
        profile = profile.with_persona(persona, personas[persona])
    return profile if model is None else profile.with_model(model)
