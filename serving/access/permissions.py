"""What a route can ask for. No imports: the commands that print roles start at once."""

PUBLIC = "public"  # the permission of /livez and /readyz, for which nobody is asked who they are
PERMISSIONS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "classify": "/v1/classify",
    "files": "/v1/files: one's own",
    "batches": "/v1/batches: one's own, each line with the permission of its route",
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
