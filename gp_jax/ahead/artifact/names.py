"""What an exported folder holds."""

PROGRAM = "program.jax_export"  # the function, for every platform asked for
PARAMS = "params"  # its parameters (orbax)
EXAMPLE = "example.npz"  # inputs of one request
EXPECTED = "expected.npz"  # its outputs
PROCESSOR = "processor"  # tokenizer, picture settings and configuration: all that `artifact_inputs` needs
VENDOR = "vendor"  # flatbuffers: jax.export reads its files with it, and jax does not install it
FACTS = "export.json"  # plan, sizes, and where it came from
