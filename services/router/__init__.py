"""The router: OpenAI-compatible HTTP in front; placement and relaying of tokens behind. Imports no torch."""
