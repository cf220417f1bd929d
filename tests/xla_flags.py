"""How XLA compiles in tests."""

import os

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def flags(devices: int) -> str:
    """XLA's, for this many fake devices and quick compilation: the suite's time is compilation of tiny programs.

    Without LLVM's optimisation, with the older code generator, in one part: the last two take tests/pruning/test_pruning.py from 101 to
    64 s of the processor. The environment variable GP_JAX_TEST_XLA replaces these flags; empty, programs are compiled as users compile
    them.
    """
    return f"--xla_force_host_platform_device_count={devices} {os.environ.get('GP_JAX_TEST_XLA', QUICK)}"
