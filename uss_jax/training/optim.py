"""Optimisers and learning-rate schedules for optax, those of the reference first."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from uss_jax.errors import UserError, counted


class AmsgradState(NamedTuple):
    """Moments of `scale_by_torch_amsgrad`; `nu_max` is the running maximum of `nu`."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates


def scale_by_torch_amsgrad(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Scales updates as PyTorch's AMSGrad: takes the maximum before the bias correction.

    optax.amsgrad takes it after, so the large early corrections stay in it forever.
    """

    def init(params: optax.Params) -> AmsgradState:
        # Three separate trees: a donated buffer may not appear twice.
        mu, nu, nu_max = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        return AmsgradState(jnp.zeros((), jnp.int32), mu, nu, nu_max)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)

        def step(m, v):
            first, second = (_bias_correction(b, count, m.dtype) for b in (b1, b2))
            return m / first / (jnp.sqrt(v / second) + eps)

        return jax.tree.map(step, mu, nu_max), AmsgradState(count, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)


def _bias_correction(decay: float, count: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns 1 - decay ** count, accurate to the last digit of the dtype.

    Direct evaluation in float32 has a relative error of 1.3e-5 at decay 0.999 and count 1, and the
    first step half of that. PyTorch uses double precision.
    """
    return -jnp.expm1(count.astype(dtype) * math.log(decay))


def adamw_amsgrad(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Returns the equivalent of torch.optim.AdamW(amsgrad=True): betas 0.9, 0.999, eps 1e-8."""
    return optax.chain(
        scale_by_torch_amsgrad(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Returns AdamW with betas 0.9 and 0.999, eps 1e-8."""
    return optax.adamw(learning_rate, weight_decay=weight_decay)


# Optimisers by their name in a tagger's config.
OPTIMIZERS = {f.__name__: f for f in (adamw_amsgrad, adamw)}


def clipped(optimizer: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    """Clips the global norm of an optimiser's gradients; 0 for no clipping.

    Equivalent to torch.nn.utils.clip_grad_norm_. The state is that of the optimiser alone, so a
    run can be resumed with another norm.
    """
    if not norm:
        return optimizer

    def update(updates, state, params=None):
        scale = jnp.minimum(1, norm / (optax.tree.norm(updates) + 1e-6))
        return optimizer.update(jax.tree.map(lambda g: scale * g, updates), state, params)

    return optax.GradientTransformation(optimizer.init, update)


def constant_warm_up(learning_rate: float, warm_up_steps: int) -> optax.Schedule:
    """Scales by 0.001, 0.01 and 0.1 for `warm_up_steps` each (0: no warm-up), then by 1."""

    def schedule(step):
        stage = jnp.clip(step // warm_up_steps, 0, 3) if warm_up_steps else 3
        return learning_rate * jnp.asarray([1e-3, 1e-2, 1e-1, 1.0])[stage]

    return schedule


def linear_warm_up(
    learning_rate: float, warm_up_steps: int, reduce_lr_steps: int
) -> optax.Schedule:
    """Scales by step / warm_up_steps up to 1, then by 0.9 ** (step // reduce_lr_steps)."""

    def schedule(step):
        rising = step / warm_up_steps if warm_up_steps else 1.0
        reduced = 0.9 ** (step // reduce_lr_steps)
        return learning_rate * jnp.where(step <= warm_up_steps, rising, reduced)

    return schedule


def cosine(learning_rate: float, warm_up_steps: int, total_steps: int) -> optax.Schedule:
    """Rises linearly over `warm_up_steps`, then decays by a cosine to 1/100 at `total_steps`."""
    if total_steps <= warm_up_steps:
        raise UserError(
            f"config.schedule.total_steps={total_steps} is not above "
            f"config.schedule.warm_up_steps={warm_up_steps}; change one of them"
        )
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warm_up_steps, total_steps, learning_rate / 100
    )


def stepped(
    learning_rate: float, boundaries: Sequence[int], scales: Sequence[float]
) -> optax.Schedule:
    """Scales by scales[i + 1] from step boundaries[i] on, by scales[0] before the first."""
    if len(scales) != len(boundaries) + 1:
        raise UserError(
            f"config.schedule has {counted(len(scales), 'scale')} for "
            f"{counted(len(boundaries), 'boundary', 'boundaries')}; "
            "give one scale more than boundaries"
        )

    def schedule(step):
        stage = jnp.sum(jnp.asarray(step)[..., None] >= jnp.asarray(boundaries), axis=-1)
        return learning_rate * jnp.asarray(scales)[stage]

    return schedule


def make_schedule(
    name: str = "", learning_rate: float | None = None, **arguments: Any
) -> optax.Schedule:
    """Returns the schedule that a config names: one of the functions above."""
    schedules = {f.__name__: f for f in (constant_warm_up, linear_warm_up, cosine, stepped)}
    if name not in schedules:
        raise UserError(f"config.schedule.name is {name!r}, expected {' or '.join(schedules)}")
    if learning_rate is not None:
        arguments = {"learning_rate": learning_rate, **arguments}
    wanted = list(inspect.signature(schedules[name]).parameters)
    if sorted(wanted) != sorted(arguments):
        raise UserError(
            f"config.schedule: {name} takes {', '.join(wanted)}, "
            f"not {', '.join(arguments) or 'nothing'}; set the section as a whole, "
            f"--config.schedule=\"{{'name': '{name}', ...}}\""
        )
    return schedules[name](**arguments)


def unfinished_warm_up(schedule: Mapping[str, Any], total_steps: int) -> str:
    """Returns a sentence that says that a run ends before its full learning rate; else ""."""
    if schedule.get("name") == stepped.__name__:
        return _unreached_stage(**schedule, total_steps=total_steps)
    stages = 3 if schedule.get("name") == constant_warm_up.__name__ else 1
    if total_steps > stages * schedule.get("warm_up_steps", 0):
        return ""
    reached = float(make_schedule(**schedule)(max(total_steps - 1, 0)))
    if reached >= schedule["learning_rate"]:
        return ""
    return (
        f"this run ends while the learning rate still rises: it reaches {reached:.2g}, not "
        f"config.schedule.learning_rate={schedule['learning_rate']:g}; for config.total_steps="
        f"{total_steps}, set config.schedule.warm_up_steps (and its total_steps) lower"
    )


def _unreached_stage(
    name: str,
    learning_rate: float,
    boundaries: Sequence[int],
    scales: Sequence[float],
    total_steps: int,
) -> str:
    """As `unfinished_warm_up`, of the schedule `stepped`."""
    del name
    begins = (0, *boundaries)
    reached = max(
        scale for scale, begin in zip(scales, begins, strict=True) if begin < max(total_steps, 1)
    )
    if reached >= max(scales):
        return ""
    return (
        f"this run ends before the learning rate is at its largest: it reaches "
        f"{learning_rate * reached:.2g}, not {learning_rate * max(scales):.2g} (from step "
        f"{begins[list(scales).index(max(scales))]} on); for config.total_steps={total_steps}, set "
        "config.schedule.boundaries lower"
    )
