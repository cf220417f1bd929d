"""Vision towers and the one decoder."""
