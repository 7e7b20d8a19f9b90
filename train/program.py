"""The compiled part of a run: what happens to a batch on the device, and nothing else."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import models
import optax_bilevel
from train import augment, methods
from train.config import Config, ConfigError
from train.evidence import Evidence
from train.mesh import Layout, example_axis

PyTree = Any

SHARE_BINS = 5  # shares of noisy labels 0, 1/4, 1/2, 3/4, 1, rounded
OMEGA_BINS = 101
OMEGA_RANGE = 5.0  # ω̂·(k-1) from -5 to 5; a uniform weight is 1


class Sums(NamedTuple):
    """Running sums of an epoch, on the device; part of the checkpoint.

    Attributes:
        loss: sum of the mini-batches' losses; `losses` counts them.
        given, true: numbers of examples whose given, and whose true label was predicted.
        examples: number of examples seen.
        steps: number of steps.
        negative, effective: sums over steps of the share of negative weights and of 1/Σω̂².
        dropped: number of mini-batches whose loss was not finite.
        step_size: sum over steps of what the optimizer's movement was multiplied by.
        omega: histogram of ω̂·(k-1) by the share of noisy labels, [SHARE_BINS, OMEGA_BINS].
        omega_sum: sum of ω̂·(k-1) by the share of noisy labels, [SHARE_BINS].
    """

    loss: jax.Array
    losses: jax.Array
    given: jax.Array
    true: jax.Array
    examples: jax.Array
    steps: jax.Array
    negative: jax.Array
    effective: jax.Array
    dropped: jax.Array
    step_size: jax.Array
    omega: jax.Array
    omega_sum: jax.Array

    @classmethod
    def zeros(cls) -> "Sums":
        """Sums at the start of an epoch."""
        shapes = {"omega": (SHARE_BINS, OMEGA_BINS), "omega_sum": (SHARE_BINS,)}
        return cls(**{name: jnp.zeros(shapes.get(name, ())) for name in cls._fields})


class State(NamedTuple):
    """The whole run: with the config, all that decides how it goes on.

    Attributes:
        step: steps done, int32 [].
        params: the network's parameters.
        batch_stats: running averages of batch norm, empty for networks without.
        opt_state: state of the optimizer.
        method: state of the method, empty for most.
        sums: of the epoch at hand.
        evidence: about every training example; None with several labels per example.
        failed: the first step that left a NaN or an Inf in the parameters or the running averages,
            or had no finite loss, int32 []; -1 while there is none.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    method: PyTree
    sums: Sums
    evidence: Evidence | None
    failed: jax.Array


class RawBatch(NamedTuple):
    """What the host hands over for a step.

    Attributes:
        images: uint8 [k, b, h, w, c].
        labels: given labels, int32 [k, b] or [k, b, classes].
        true: true labels, likewise.
        indices: which training examples they are, int32 [k, b].
        copies: on a mesh, the first `Program.copies` mini-batches again, whole on every device.
    """

    images: Any
    labels: Any
    true: Any
    indices: Any = None
    copies: Any = None


class Resident(NamedTuple):
    """A training set on the device, from which a step takes its batch itself.

    Attributes:
        images: uint8 [n, h, w, c].
        labels: given labels, int32 [n] or [n, classes].
        true: true labels, likewise.
        indices: which examples the step takes, int32 [k, b].
    """

    images: Any
    labels: Any
    true: Any
    indices: Any

    def batch(self) -> RawBatch:
        """What the step takes."""
        images, labels, true = (
            whole.at[self.indices].get(mode="promise_in_bounds")
            for whole in (self.images, self.labels, self.true)
        )
        return RawBatch(images, labels, true, self.indices)


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run; the same for all its seeds.

    Attributes:
        init: ``key -> State``.
        step: ``(state, raw_batch, key) -> state``; donates the state. On one device a `Resident`
            may stand for the batch.
        predict: ``(params, batch_stats, images uint8 [n, h, w, c], key) -> scores [n, classes]``,
            log-probabilities (several labels: probabilities), averaged over views; with
            ``dropout=True`` dropout stays on.
        new_epoch: ``state -> state`` with its sums at zero; donates the state.
        how: a line that says how the method computes.
        layout: how the steps lie on a mesh; None on one device. States, batches and keys must lie
            on it (`Layout.place`, `Layout.copy`).
        copies: how many of a step's mini-batches are also to be handed over whole to every device
            of the mesh (`RawBatch.copies`).
    """

    init: Any
    step: Any
    predict: Any
    new_epoch: Any
    how: str
    layout: Layout | None = None
    copies: int = 0


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The schedule by the count of optimizer steps."""
    total = config.epochs * steps_per_epoch
    match config.schedule:
        case "constant":
            return optax.constant_schedule(config.learning_rate)
        case "exponential":
            return optax.exponential_decay(
                config.learning_rate, steps_per_epoch, config.decay, staircase=True
            )
        case "steps":
            return optax.piecewise_constant_schedule(
                config.learning_rate, {total // 2: 0.1, 3 * total // 4: 0.1}
            )
        case _:
            return optax.linear_schedule(config.learning_rate, 0.0, total)


def optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """What follows the reweighting: clipping, weight decay, SGD with momentum."""
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=models.decay_mask))
    parts.append(optax.sgd(learning_rate(config, steps_per_epoch), momentum=config.momentum))
    return optax.chain(*parts)


def build(
    config: Config,
    *,
    image_shape: tuple[int, int, int],
    max_value: int,
    num_classes: int,
    multi_label: bool,
    steps_per_epoch: int,
    layout: Layout | None = None,
    num_examples: int = 0,
) -> Program:
    """Builds the functions of a run; configs that differ in seed and labels alone share them.

    With a layout they work on its mesh, else on one device. With `num_examples`, the size of the
    training set, the steps gather evidence about each example.
    """
    return _build(
        dataclasses.replace(config, seed=0, noise="none", noise_rate=0.0),
        image_shape,
        max_value,
        num_classes,
        multi_label,
        steps_per_epoch,
        layout,
        num_examples,
    )


@functools.lru_cache(maxsize=8)
def _build(
    config: Config,
    image_shape: tuple[int, int, int],
    max_value: int,
    num_classes: int,
    multi_label: bool,
    steps_per_epoch: int,
    layout: Layout | None,
    num_examples: int,
) -> Program:
    preset = augment.preset(config.augmentation, image_shape, max_value)
    tx = optimizer(config, steps_per_epoch)
    everywhere = (lambda tree: tree) if layout is None else layout.everywhere
    gathers = num_examples > 0 and not multi_label
    if config.example_alignment and multi_label:
        raise ConfigError(
            f"example_alignment is for one label per image, and {config.dataset} has several"
        )

    def create(key: jax.Array) -> models.Network:
        options = {} if config.hidden is None else {"hidden": config.hidden}
        return models.create(
            config.network,
            num_classes=num_classes,
            input_shape=preset.shape,
            rngs=nnx.Rngs(params=key),
            dtype=jnp.dtype(config.dtype),
            dropout_rate=config.dropout_rate,
            **options,
        )

    network = nnx.eval_shape(lambda: create(jax.random.key(0)))
    parameters = nnx.state(network, nnx.Param)
    method = methods.make(
        config, methods.Task(num_classes, multi_label, steps_per_epoch, parameters, layout)
    )
    abstract = nnx.eval_shape(method.network, network)
    graph = nnx.graphdef(abstract)
    how = method.how
    if method.with_batch_norm and jax.tree.leaves(nnx.state(abstract, nnx.BatchStat)):
        how = f"{how}; {method.with_batch_norm}"

    def start(key: jax.Array) -> State:
        return state_of(create(key))

    def init(key: jax.Array) -> State:
        if config.pretrained is None or not config.pretrained.endswith(".safetensors"):
            return compiled_start(key)
        model = create(key)
        assert isinstance(model, models.ResNet50)
        models.load_pretrained(model, config.pretrained, replace_head=num_classes != 1000)
        state = state_of(model)
        return state if layout is None else layout.copy(state, shardings)

    def state_of(model: models.Network) -> State:
        _, params, batch_stats = nnx.split(method.network(model), nnx.Param, ...)
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=tx.init(params),
            method=method.init(params),
            sums=Sums.zeros(),
            evidence=Evidence.zeros(num_examples, config.example_alignment) if gathers else None,
            failed=jnp.full((), -1, jnp.int32),
        )

    def step(state: State, raw: RawBatch | Resident, key: jax.Array) -> State:
        raw = raw.batch() if isinstance(raw, Resident) else raw
        k, b = raw.labels.shape[:2]
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        augmented = jax.vmap(jax.vmap(preset.train))
        each = augmented if layout is None else layout.per_example(augmented)
        augment_keys = jax.random.split(augment_key, (k, b))
        images = each(augment_keys, raw.images)
        if config.dropout_masks == "shared":
            keys = jnp.broadcast_to(dropout_key, (k,))
        else:
            keys = jax.random.split(dropout_key, k)

        def loss_fn(
            params: PyTree, batch: methods.Batch, criterion: Any = methods.cross_entropy
        ) -> tuple[jax.Array, methods.Aux]:
            model = nnx.merge(graph, params, state.batch_stats, copy=True)
            model.train()
            if (axis := example_axis()) is not None:  # statistics of the whole mini-batch
                model.set_attributes(nnx.BatchNorm, axis_name=axis, raise_if_not_found=False)
            logits = model(batch.images, rngs=nnx.Rngs(batch.key))
            loss = jnp.mean(criterion(logits, batch.labels))
            _, batch_stats, recorded, _ = nnx.split(model, nnx.BatchStat, nnx.Intermediate, ...)
            return loss, methods.Aux(logits, batch_stats, recorded)

        def alignment() -> jax.Array:
            """⟨∇ℓ_e, v⟩/|v| of every example with the momentum v, [k, b]."""

            def losses(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
                model = nnx.merge(graph, params, state.batch_stats, copy=True)
                model.eval()  # batch norm in training mode would mix the examples
                logits = model(batch[0], rngs=nnx.Rngs(dropout_key))
                return methods.cross_entropy(logits, batch[1])

            params, momentum = everywhere((state.params, optax.tree.get(state.opt_state, "trace")))
            batch = images.reshape(k * b, *images.shape[2:]), raw.labels.ravel()
            products = optax_bilevel.example_alignment(losses, params, batch, momentum)
            length = optax.tree.norm(momentum)
            return products.reshape(k, b) / jnp.where(length > 0, length, 1)

        copies = None
        if method.copies:
            first = raw.copies
            if first is None:
                raise ValueError(
                    f"RawBatch.copies must hold the first {method.copies} mini-batches"
                )
            own = everywhere((augment_keys[: method.copies], keys[: method.copies]))
            copies = methods.Batch(augmented(own[0], first.images), first.labels, own[1])
        batches = methods.Batch(images, raw.labels, keys, copies)
        done = method.gradient(loss_fn, everywhere(state.params), batches, state.method)
        updates, opt_state = tx.update(done.grads, state.opt_state, state.params)
        if done.step_size is not None:
            updates = optax.tree.scale(done.step_size, updates)
        params = optax.apply_updates(state.params, updates)
        batch_stats = jax.tree.map(
            lambda x: _merge_stats(x, config.batch_statistics, config.held_out),
            done.aux.batch_stats,
        )
        return State(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            method=done.state,
            sums=_add_step(state.sums, raw, done, config.held_out, everywhere),
            evidence=_add_evidence(
                state.evidence,
                raw,
                done.aux.logits,
                alignment() if config.example_alignment and state.evidence is not None else None,
                everywhere,
            ),
            failed=_first_failure(state, done.losses, (params, batch_stats)),
        )

    def predict(
        params: PyTree,
        batch_stats: PyTree,
        images: jax.Array,
        key: jax.Array,
        dropout: bool = False,
    ) -> jax.Array:
        params = everywhere(params)
        model = nnx.merge(graph, params, batch_stats, copy=True)
        model.eval()
        if dropout:  # and batch norm still by its running averages
            model.dropout.train()
        crop_key, dropout_key = jax.random.split(key)
        keys = jax.random.split(crop_key, len(images))
        views = preset.views or (lambda key, image: preset.evaluate(key, image)[None])
        views = jax.vmap(views)(keys, images)  # [n, views, h, w, c]
        n, v = views.shape[:2]
        flat = views.reshape(n * v, *views.shape[2:])
        logits = model(flat, rngs=nnx.Rngs(dropout_key)).reshape(n, v, -1)
        if multi_label:
            return jnp.mean(jax.nn.sigmoid(logits), axis=1)
        return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - jnp.log(v)

    def new_epoch(state: State) -> State:
        return state._replace(sums=Sums.zeros())

    on_mesh: dict[str, Any] = {}
    scores_on_mesh: dict[str, Any] = {}
    if layout is not None:
        shardings = _shardings(layout, jax.eval_shape(start, jax.random.key(0)), method.spec)
        on_mesh, scores_on_mesh = ({"out_shardings": s} for s in (shardings, layout.replicated))
    compiled_start = jax.jit(start, **on_mesh)
    return Program(
        init=init,
        step=jax.jit(step, donate_argnums=0, **on_mesh),
        predict=jax.jit(predict, static_argnames="dropout", **scores_on_mesh),
        new_epoch=jax.jit(new_epoch, donate_argnums=0, **on_mesh),
        how=how,
        layout=layout,
        copies=method.copies,
    )


def _shardings(layout: Layout, state: State, spec: PyTree) -> State:
    """Where the state is kept: like the parameters, but where the method says otherwise."""
    if spec is None:
        method = layout.parameter_shardings(state.method)
    else:
        specs = jax.tree.broadcast(spec, state.method, is_leaf=lambda x: isinstance(x, P))
        method = jax.tree.map(lambda s: NamedSharding(layout.mesh, s), specs)
    shardings = jax.tree.map(lambda _: layout.replicated, state)
    return shardings._replace(
        params=layout.parameter_shardings(state.params),
        opt_state=layout.parameter_shardings(state.opt_state),
        method=method,
    )


def _merge_stats(stats: jax.Array, policy: str, num_validation: int) -> jax.Array:
    """Running averages [k, ...], each updated by one mini-batch, as one."""
    if len(stats) == 1:
        return stats[0]
    kept = {"mean": slice(None), "training": slice(num_validation, None)}.get(
        policy, slice(num_validation)
    )
    return jnp.mean(stats[kept], axis=0)


def _first_failure(state: State, losses: jax.Array, new: PyTree) -> jax.Array:
    finite = jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)])
    ok = jnp.all(finite) & jnp.any(jnp.isfinite(losses))
    return jnp.where((state.failed >= 0) | ok, state.failed, state.step)


def _add_evidence(
    evidence: Evidence | None,
    raw: RawBatch,
    logits: jax.Array,
    alignment: jax.Array | None,
    everywhere: Callable[[PyTree], PyTree],
) -> Evidence | None:
    if evidence is None or raw.indices is None:
        return evidence
    seen = Evidence.seen(raw.labels, logits.reshape(*raw.labels.shape, -1), alignment)
    return evidence.add(*everywhere((raw.indices, seen)))


def _add_step(
    sums: Sums,
    raw: RawBatch,
    done: methods.Gradient,
    num_validation: int,
    everywhere: Callable[[PyTree], PyTree],
) -> Sums:
    k, b = raw.labels.shape[:2]
    losses, weights = done.losses, done.weights
    logits = done.aux.logits.reshape(k * b, -1)
    finite = jnp.isfinite(losses)

    def correct(labels: jax.Array) -> jax.Array:
        if labels.ndim == 3:  # several labels: the top score is one of them
            top = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=labels.dtype)
            return jnp.sum(top * labels.reshape(k * b, -1)).astype(jnp.float32)
        return jnp.sum(jnp.argmax(logits, -1) == labels.reshape(-1)).astype(jnp.float32)

    sums = sums._replace(
        loss=sums.loss + jnp.sum(jnp.where(finite, losses, 0)),
        losses=sums.losses + jnp.sum(finite),
        given=sums.given + correct(raw.labels),
        true=sums.true + correct(raw.true),
        examples=sums.examples + k * b,
        steps=sums.steps + 1,
        dropped=sums.dropped + jnp.sum(~finite),
        step_size=sums.step_size + (1 if done.step_size is None else done.step_size),
    )
    if weights is None:
        return sums
    wrong = jnp.any((raw.labels != raw.true).reshape(k, b, -1), axis=-1)
    # XLA's partitioner counts too often where indices of a scatter are shared unevenly.
    omega, share = everywhere((weights, jnp.mean(wrong, axis=1)))
    omega, share = omega[num_validation:], share[num_validation:]
    l1, l2 = jnp.sum(jnp.abs(omega)), jnp.sum(jnp.square(omega))
    scaled = omega * len(omega)
    row = jnp.round(share * (SHARE_BINS - 1)).astype(jnp.int32)
    place = (scaled + OMEGA_RANGE) / (2 * OMEGA_RANGE) * OMEGA_BINS
    column = jnp.clip(jnp.floor(place), 0, OMEGA_BINS - 1).astype(jnp.int32)
    return sums._replace(
        negative=sums.negative + jnp.mean(omega < 0),
        effective=sums.effective + jnp.where(l2 > 0, l1**2 / jnp.where(l2 > 0, l2, 1), 0),
        omega=sums.omega.at[row, column].add(1),
        omega_sum=sums.omega_sum.at[row].add(scaled),
    )
