"""The front door: OpenAI-compatible HTTP. What lies behind it is generation.Dispatcher."""
