"""What the kernels do, counted: floating-point operations, transcendental functions, and bytes of device memory."""

from typing import NamedTuple

from lin_jax.ops.linear_attention.tpu.blocks import TpuPlan


class Cost(NamedTuple):
    """Of one call, all rows and heads."""

    flops: int
    transcendentals: int
    bytes_accessed: int


def _tokens(plan: TpuPlan) -> int:
    return plan.sizes.B * plan.blocks * plan.rows


def _scores(plan: TpuPlan) -> int:
    """Products of queries and keys: pairs of the local and the grouped branch, times their width."""
    s, form = plan.sizes, plan.form
    grouped = form.grouped and not form.shared
    return plan.slots * (form.scored * s.D + grouped * s.state_rows)


def _transcendentals(plan: TpuPlan) -> int:
    return _tokens(plan) * plan.sizes.H * plan.slots * (plan.form.local in ("laplace", "softmax"))


def _token_bytes(plan: TpuPlan) -> tuple[int, int, int, int]:
    """Bytes of all queries, keys, values and outputs."""
    s = plan.sizes
    tokens = s.B * s.T * s.itemsize
    width = s.D + s.P
    return tokens * s.H * width, tokens * s.K * width, tokens * s.K * s.E, tokens * s.H * s.E


def _small_bytes(plan: TpuPlan) -> int:
    """Lines of bands, states and fields."""
    s = plan.sizes
    bands = 4 * s.H * plan.period * (plan.bias + plan.taps) * s.B
    states = 4 * s.B * s.K * s.state_rows * s.E * ((not plan.fresh) + plan.final)
    fields = 0 if plan.aligned else 32 * s.B * plan.blocks * plan.slots
    return bands + states + fields


def forward_cost(plan: TpuPlan) -> Cost:
    """Every input is read once and every output written once."""
    s, tokens = plan.sizes, _tokens(plan)
    state = s.state_rows * s.E * plan.form.grouped
    flops = 2 * tokens * (s.H * (_scores(plan) + plan.slots * s.E + state) + s.K * state)
    return Cost(flops, _transcendentals(plan), sum(_token_bytes(plan)) + _small_bytes(plan))


def query_cost(plan: TpuPlan) -> Cost:
    """The pass for the gradients of queries, alpha and bands, which reads the inputs and the gradient of y."""
    s, tokens = plan.sizes, _tokens(plan)
    state = s.state_rows * s.E * plan.form.grouped
    back = plan.slots * (plan.form.scored * s.D + plan.form.grouped * s.state_rows)
    flops = 2 * tokens * (s.H * (_scores(plan) + plan.slots * s.E + back + state) + s.K * state)
    q, k, v, y = _token_bytes(plan)
    return Cost(flops, _transcendentals(plan), 2 * q + k + v + y + _small_bytes(plan))


def key_cost(plan: TpuPlan) -> Cost:
    """The pass for the gradients of keys, values and the initial state; the windows' earlier tokens are read again."""
    s, tokens = plan.sizes, _tokens(plan)
    state = s.state_rows * s.E * plan.form.grouped
    back = plan.slots * (plan.form.scored * s.D + plan.form.grouped * s.state_rows + s.E)
    flops = 2 * tokens * (s.H * (_scores(plan) + plan.slots * s.E + back + state) + 2 * s.K * state)
    q, k, v, y = _token_bytes(plan)
    again = (k + v) * plan.back // plan.rows
    return Cost(flops, _transcendentals(plan), q + 2 * (k + v) + again + y + _small_bytes(plan))
