"""What every test runs under: eight CPU devices, no silent broadcasting, repeatable examples, one compilation cache."""

import os
import signal
from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", jax.config.jax_platforms or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell lets jobs in the background ignore Ctrl-C, and so do the programs that they start: tests would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("lin_jax", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("lin_jax")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs in pytest's cache, for other workers, the programs that tests start, and the next run.

    Without that cache (`-p no:cacheprovider`) nothing is kept, but where the environment names a directory.
    """
    if hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None:
        return
    seconds = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Programs compiled with little optimisation: for modules that run many of them, each once.

    The optimised ones are compared with their truth by the golden tests and the training tests.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
