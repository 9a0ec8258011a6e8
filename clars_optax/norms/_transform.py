"""The public transformation: arguments, and a batch or micro-batches of it."""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clars_optax.norms import _arguments
from clars_optax.norms._meshes import explicit_mesh, specs, with_automatic_axes
from clars_optax.norms._microbatches import Result, accumulate, find_aux_axes
from clars_optax.norms._one_batch import check_sum_of_microbatches, one_batch
from clars_optax.norms._trace import explained, refuse_shared_keys, resized


def value_and_grad_and_norms(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    batch_argnums: int | Sequence[int] = 1,
    rng_argnums: int | Sequence[int] = (),
    group_size: int = 1,
    num_norm_examples: int | None = None,
    microbatch_size: int | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    method: Literal["auto", "generic"] = "auto",
) -> Callable[..., tuple[Any, Any, Any]]:
    r"""`jax.value_and_grad` that also returns the norms of the per-example gradients of every leaf.

    Imagine that every example :math:`i` used a copy :math:`W_i` of its own of each parameter. Its
    gradient is

    .. math:: g_i = N \, \partial L / \partial W_i

    for a loss :math:`L` that is a mean over N examples, and :math:`\partial L / \partial W_i` for a
    sum, so that the mean (or the sum) of the :math:`g_i` is the gradient, whatever couples the
    examples. Where nothing couples them, :math:`g_i` is the gradient of example i alone. With
    train-mode BatchNorm it is example i's contribution through the statistics of the batch that it
    is in, which is *not* the gradient that a batch of one would give. Example i is position i along
    axis 0 of the batch arguments, and of what the loss makes of them.

    The model is taken as it is, BatchNorm, shared weights and all. It is traced at the batch size
    and at twice the batch size, which shows where the batch is in every intermediate value; what
    the engine cannot follow is an error that names the operation and the parameter, never a wrong
    or a missing norm. It goes into `jax.checkpoint`, `cond`, `switch`, `scan` and `fori_loop`,
    which stay what they are, into `jax.lax.map` over the examples, and into `custom_vjp` functions,
    which keep their own backward if neither they nor it mix examples; for these the loss is traced
    once more, with as many examples as a group has. Not followed, if parameters and the batch meet
    there: `while_loop`, a `scan` whose steps are the examples, `jax.shard_map` inside of the loss,
    linear solvers, kernels and foreign calls.

    What the loss makes of the batch keeps the order of its positions: after `x[::-1]`, `x[order]`
    or `jnp.roll(x, 1, 0)`, example i is what has come to position i, for the parameters that meet
    it from there on.

    What it returns can be differentiated once more, with respect to whatever it depends on, but for
    parameters that are used more than once or in an operation that has no rule, for which that is
    refused.

    Works under `jit`, with arrays that are sharded over automatic or explicit axes of a mesh (the
    loss then sees automatic ones, with `has_aux` also the explicit ones, and must not close over
    sharded arrays), under `vmap`, `pmap` and
    inside `jax.shard_map`, where the parameters that it gets must be marked as varying
    (`jax.lax.pcast(params, axis_name, to="varying")`) unless it has `check_vma=False`. Over devices
    with equal shares of a batch, `jax.lax.pmean(jax.tree.map(jnp.mean, norms), axis_name)` is exact
    for "mean" losses.

    Args:
      loss_fn: Returns a scalar loss, or a pair of a loss and auxiliary data with `has_aux`.
      argnums: The positional argument(s) to differentiate with respect to, trees of real
        floating-point arrays.
      has_aux: Whether `loss_fn` returns a pair of loss and auxiliary data.
      batch_argnums: The positional argument(s) that carry the examples, on axis 0 of every leaf.
      rng_argnums: The positional argument(s) that are random keys, or trees of them. With
        `microbatch_size`, every leaf is a single key and is folded with the micro-batch's index.
      group_size: Number of examples b in a group. Consecutive runs of b examples take the place of
        single examples: the gradient of a group is the mean of its members'. It must divide the
        number of examples; all of them as one group give the norm of the gradient itself.
      num_norm_examples: Norms of the first so many examples only, a multiple of `group_size`; the
        value and the gradient are still those of all. None: of all. 0: of none, which leaves plain
        gradient accumulation. Inside `pmap` it counts per device. On a GPU whose kernels find the
        norms, and on a TPU, those of some examples cost as much as those of all: there, take all
        norms of some micro-batches.
      microbatch_size: Number of examples m that are worked on at a time, a multiple of `group_size`
        that divides the number of examples. None: all at once. BatchNorm statistics, and so the
        :math:`g_i`, are then those of the micro-batches. Value, gradient and norms are those of the
        whole batch: this is the way to accumulate gradients (`optax.MultiSteps` hands only the last
        mini-step's norms on). On a CPU, where XLA's loops are slow, they are unrolled, which takes
        its time to compile.
      loss_reduction: Whether the loss is the "mean" over the examples, with equal weights, or their
        "sum". For a padded or weighted loss use "sum" on the unnormalised loss; sum gradients,
        norms and weights over devices, and divide all three by the sum of the weights, those of the
        whole batch: a sum that `loss_fn` returns as auxiliary data is averaged over micro-batches.
      method: "auto" uses the fastest way that is exact; "generic" has no special rule for any kind
        of layer: slow, and the check on the rules.

    Returns:
      A function of the same arguments as `loss_fn` that returns `(value, grads, norms)`, or
      `((value, aux), grads, norms)` with `has_aux`. `value` and `grads` are those of
      `jax.value_and_grad`. `norms` is a tree like `grads` whose leaves are float32 `[number of
      groups]`, in the order of the examples. A leaf that the loss does not use, or only behind
      `stop_gradient`, has zeros. With `microbatch_size`, auxiliary arrays that carry the batch on
      an axis are concatenated along it in order, and other floating-point arrays are averaged.

      The norms are those of the loss's own gradients: clip gradients after their use, not before. A
      term of parameters alone that is added to the loss (L2 regularisation) belongs to every
      example and is in its norm; the `weight_decay` of `clars_optax.clars` stays out of it.

    Raises:
      TypeError: An option or a parameter has the wrong type.
      ValueError: Options and batch do not fit; the loss is not a scalar; a parameter has no
        per-example gradient, such as a temperature that divides the mean loss (apply it before the
        mean).
      NotImplementedError: A parameter enters an operation that the engine cannot follow, or a
        second derivative with respect to it cannot be had.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import clars_optax
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
      >>> params = {"w": jnp.array([1.0, -1.0]), "b": jnp.array(0.5)}
      >>> x = jnp.array([[3.0, 4.0], [0.0, 2.0]])
      >>> y = jnp.array([0.5, 0.5])
      >>> step = clars_optax.value_and_grad_and_norms(loss_fn, batch_argnums=(1, 2))
      >>> value, grads, norms = jax.jit(step)(params, x, y)

      The residuals are -1 and -2, so example i has the gradients `2 * residual * x` and `2 *
      residual`:

      >>> print(norms["w"], norms["b"])
      [10.  8.] [2. 4.]
      >>> print(grads["w"], grads["b"])
      [-3. -8.] -3.0

    References:
      Huo, Gu, Huang: `Large Batch Training Does Not Need Warmup
      <https://arxiv.org/abs/2002.01576>`_, 2020.
    """
    settings = _arguments.Settings(
        argnums, has_aux, batch_argnums, rng_argnums, group_size, num_norm_examples,
        microbatch_size, loss_reduction, method,
    )  # fmt: skip
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}.")

    @functools.wraps(loss_fn)
    def step(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        positions = settings.positions(len(args))
        _arguments.check_params(args, positions.params)
        mesh = explicit_mesh((args, kwargs))
        if mesh is None:
            return of_args(*args, **kwargs)

        def aux() -> Any:
            return _value_and_aux(loss_fn(*_rebuilt(args), **kwargs), has_aux)[1]

        params = tuple(args[i] for i in positions.params)
        value: Any = PartitionSpec()
        if has_aux:
            value = value, specs(jax.eval_shape(aux))
        grads = specs(params if isinstance(argnums, Sequence) else params[0])
        out_sharding = (value, grads, PartitionSpec())
        return with_automatic_axes(of_args, mesh, args, kwargs, out_sharding)

    def of_args(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        positions = settings.positions(len(args))
        params = _arguments.arrays(args, positions.params)
        batch = _arguments.arrays(args, positions.batch)
        num_examples = _arguments.count_examples(_arguments.paths(args, positions.batch), batch)
        num_norms = settings.num_norms(num_examples)
        if settings.microbatch_size is not None:
            _arguments.check_keys(args, kwargs, positions)
        treedef = jax.tree.structure([args[i] for i in positions.params])
        paths = _arguments.paths(args, positions.params)
        batch_treedef = jax.tree.structure([args[i] for i in positions.batch])
        aux_treedefs: list[Any] = []

        def loss_of_leaves(
            keys: Sequence[Any], params: Sequence[Any], batch: Sequence[Any]
        ) -> tuple[Any, list[Any]]:
            everything = _rebuilt(args)
            for where, values in (
                (positions.rng, keys),
                (positions.params, jax.tree.unflatten(treedef, params)),
                (positions.batch, jax.tree.unflatten(batch_treedef, batch)),
            ):
                for index, value in zip(where, values, strict=True):
                    everything[index] = value
            value, aux = _value_and_aux(loss_fn(*everything, **kwargs), settings.has_aux)
            leaves, aux_treedef = jax.tree.flatten(aux)
            aux_treedefs.append(aux_treedef)
            return value, leaves

        def of_batch(keys: Sequence[Any], batch: Sequence[Any], num_norms: int) -> Result:
            loss = functools.partial(loss_of_leaves, keys)
            result = one_batch(loss, params, paths, batch, num_norms, settings)
            # What does not depend on the inputs comes out of a trace as a Python number.
            return jax.tree.map(jnp.asarray, result)

        keys = [args[i] for i in positions.rng]
        if settings.microbatch_size is None:
            result = of_batch(keys, batch, num_norms)
        else:
            size = settings.microbatch_size
            loss = functools.partial(loss_of_leaves, keys)
            if settings.loss_reduction == "sum" and size < num_examples:
                check_sum_of_microbatches(loss, params, paths, resized(batch, max(size, 2)))
            # What was forgotten in batch_argnums would fit a batch as large as it, and one example.
            sizes = [size, 2 * size, 3 * size] if 2 * size == num_examples else [size, 2 * size]

            def trace(n: int) -> tuple[Any, Any]:
                make = jax.make_jaxpr(loss_of_leaves, return_shape=True)
                return make(keys, params, resized(batch, n))

            traces = []
            for n in sizes:
                with explained(num_examples, n, trace) if n != num_examples else nullcontext():
                    traces.append(trace(n))
            refuse_shared_keys(traces[0][0])
            one, two = (types for _, (_, types) in traces[:2])
            aux_paths = [
                f"aux{jax.tree_util.keystr(path)}"
                for path, _ in jax.tree_util.tree_leaves_with_path(
                    jax.tree.unflatten(aux_treedefs[-1], one)
                )
            ]
            result = accumulate(
                of_batch,
                find_aux_axes(aux_paths, one, two, size),
                keys,
                batch,
                num_norms=num_norms,
                microbatch_size=size,
                is_mean=settings.loss_reduction == "mean",
            )
        grads, norms = (
            tuple(jax.tree.unflatten(treedef, leaves)) for leaves in (result.grads, result.norms)
        )
        if not isinstance(settings.argnums, Sequence):
            grads, norms = grads[0], norms[0]
        aux = jax.tree.unflatten(aux_treedefs[0], result.aux)
        value = (result.value, aux) if settings.has_aux else result.value
        return value, grads, norms

    return step


def _rebuilt(args: Sequence[Any]) -> list[Any]:
    """The arguments for a trace: variables of Flax NNX know in which one they were made."""
    return [jax.tree.map(lambda leaf: leaf, arg) for arg in args]


def _value_and_aux(returned: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(
            "With has_aux=True, loss_fn must return a pair of the loss and auxiliary data, got "
            f"{_described(returned)}."
        )
    value, aux = returned if has_aux else (returned, None)
    if isinstance(value, float):
        value = jnp.asarray(value)
    if not hasattr(value, "dtype") or (
        value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating)
    ):
        raise TypeError(
            f"loss_fn must return a real floating-point scalar, got {_described(value)}"
            + ("." if has_aux else "; for a loss with auxiliary data pass has_aux=True.")
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"The auxiliary output aux{jax.tree_util.keystr(path)} is {_described(leaf)}, but "
                "loss_fn is traced: return arrays only."
            )
    return value, aux


def _described(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
