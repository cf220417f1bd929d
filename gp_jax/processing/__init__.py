"""Pictures and questions are converted to arrays, on the host."""
