"""What this machine can do, as a contender of `benchmarks.generate`: the rate of products and the bandwidth of memory."""

import time

from benchmarks.contenders import serve


def run_roofline() -> None:
    """What the machine can do: FLOP/s of a product in both precisions, bytes/s of reading weights once (a matrix times a vector)."""
    from gp_jax.runtime.allocator import keep_memory

    keep_memory()
    import jax
    import jax.numpy as jnp

    def rate(function, work: float, *args) -> float:
        function(*args).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function(*args).block_until_ready()
            times.append(time.perf_counter() - start)
        return work / sorted(times)[2] / 1e9

    rates, key, n = {}, jax.random.key(0), 2048
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.random.normal(key, (n, n), dtype)
        product = jax.jit(lambda a, b: jnp.einsum("ik,jk->ij", a, b, preferred_element_type=jnp.float32))
        rates[f"{x.dtype.name} GFLOP/s"] = rate(product, 2 * n**3, x, x)
    import numpy as np

    big = np.ones(2**28, np.float32)  # 1 GiB, far beyond any cache
    times = []
    for _ in range(5):
        start = time.perf_counter()
        big.sum()
        times.append(time.perf_counter() - start)
    rates["read GB/s, one core"] = big.nbytes / sorted(times)[2] / 1e9
    total = jax.jit(jnp.sum)
    rates["read GB/s"] = rate(total, big.nbytes, jnp.asarray(big))
    serve(rates, dict)


if __name__ == "__main__":
    run_roofline()
