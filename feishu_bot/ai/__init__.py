"""Models, tokens and the agent that answers."""
