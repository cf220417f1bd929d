"""A server of answers: continuous batching over pruned caches, behind an HTTP interface like OpenAI's."""
