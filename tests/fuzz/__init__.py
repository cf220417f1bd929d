"""A fuzzer: inputs mutated at random, of which each may end in two ways only, a good result or one `GlimpseError`.

    python -m tests.fuzz --seconds 600              longer, with another seed every time
    python -m tests.fuzz --only config:3:17         one input again: target, seed, number

An input is known by target, seed and number; the same gives the same. What also counts as a failure: more than 5 s of processor time, more
memory than twice the input and 200 MB, a process started, a connection opened, standard input read, a file written outside the
folder for temporary ones, and a process that dies.
"""
