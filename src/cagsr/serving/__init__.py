"""A model that goes on learning: an OpenAI-compatible server, and the adapter that is trained in idle time (docs/serve.md)."""
