"""Pictures and questions to arrays, on the host."""
