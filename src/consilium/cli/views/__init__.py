"""The content of commands that only look: data before it is used, a model, and the plan of a run."""
