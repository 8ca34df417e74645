"""AdamW, its schedule, and skipping steps whose gradient is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lin_jax.settings.optimizer import OptimizerConfig

# `optax.apply_if_finite` gives up skipping after this many in a row; the loop stops long before.
_NEVER = 2**31 - 2


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: a linear rise from 0 over `warmup_steps`, then the chosen course up to `steps`."""
    peak, end, left = config.peak_learning_rate, config.end_learning_rate, steps - config.warmup_steps
    if config.schedule == "constant":
        course = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        course = optax.linear_schedule(peak, end, left)
    else:
        course = optax.cosine_decay_schedule(peak, left, alpha=end / peak)
    if not config.warmup_steps:
        return course
    return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup_steps), course], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, decay: Any) -> optax.GradientTransformation:
    """AdamW that leaves everything as it is when a gradient is not finite, and counts how often.

    Args:
        config: its settings.
        steps: updates of the whole run, for the schedule.
        decay: a tree of bools like the parameters: whether weight decay applies.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay,
    )
    alpha = optax.masked(optax.scale(config.alpha_rate), _is_alpha)
    clip = optax.clip_by_global_norm(config.gradient_clip) if config.gradient_clip else optax.identity()
    return optax.apply_if_finite(optax.chain(clip, adamw, alpha), max_consecutive_errors=_NEVER)


def _is_alpha(tree: Any) -> Any:
    """Which leaves are weights of grouped branches, by the last part of their path."""
    last = lambda path: jax.tree_util.keystr(path[-1:], simple=True)  # noqa: E731
    return jax.tree.map_with_path(lambda path, _: last(path) == "alpha", tree)


def skipped_steps(optimizer_state: Any) -> tuple[jax.Array, jax.Array]:
    """Steps that were skipped: in a row until now, and altogether."""
    return jnp.asarray(optimizer_state.notfinite_count), jnp.asarray(optimizer_state.total_notfinite)
