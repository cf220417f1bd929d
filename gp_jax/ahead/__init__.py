"""Compiling for a TPU that is not here: topologies and their memory, the programs of generation, what a compiled program says of itself."""
