"""What a route can ask for. No imports: the commands that print roles start at once."""

PUBLIC = "public"  # the permission of /livez and /readyz, for which nobody is asked who they are
PERMISSIONS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "models": "names of the models",
    "tokens": "/tokenize, /detokenize, /tokenizer_info",
    "requests": "one's own requests: see and end them",
    "page": "the page at /",
    "state": "the state of the engine",
    "metrics": "/metrics",
    "drain": "/drain",
    "adapters": "/v1/load_lora_adapter, /v1/unload_lora_adapter",
    "keys": "keys over HTTP",
    "schema": "/openapi.json",
}
