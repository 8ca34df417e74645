"""What every test runs under: eight CPU devices, no silent broadcasting, repeatable examples."""

import hypothesis
import jax

jax.config.update("jax_platforms", jax.config.jax_platforms or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("lin_jax", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("lin_jax")
