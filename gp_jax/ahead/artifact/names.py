"""Names of the files in an exported folder."""

PROGRAM = "program.jax_export"  # the function, for all requested platforms
PARAMS = "params"  # its parameters (orbax)
EXAMPLE = "example.npz"  # inputs of one request
EXPECTED = "expected.npz"  # its outputs
PROCESSOR = "processor"  # tokenizer, picture settings and configuration: everything that `artifact_inputs` needs
VENDOR = "vendor"  # flatbuffers, which jax.export needs to read its files and jax does not install
FACTS = "export.json"  # plan, sizes and origin of the program
