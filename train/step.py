"""A step of training: what happens to a batch on the device, as pure functions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import models
import optax_bilevel
from train import augment, methods, optimizers
from train.config import Config
from train.evidence import Evidence
from train.mesh import Layout, example_axis
from train.state import Best, Examples, Measured, RawBatch, Resident, State
from train.sums import Sums

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The functions of a run, not compiled yet.

    Attributes:
        config: the choices of the run; its network is named, not left to be chosen.
        preset: what is done to images.
        method: makes the gradient, and judges the update.
        tx: the optimizer, wrapped by the method.
        graph: of the network, wrapped by the method.
        num_classes, multi_label: of the labels.
        num_train, num_held_out: the examples that the steps gather evidence about, in this order;
            0: about none.
        layout: how the mini-batches lie on a mesh; None on one device.
    """

    config: Config
    preset: augment.Preset
    method: methods.Method
    tx: optax.GradientTransformationExtraArgs
    graph: Any
    num_classes: int
    multi_label: bool
    num_train: int
    num_held_out: int
    layout: Layout | None

    # ---------------------------------------------------------------------------------- init

    def create(self, key: jax.Array) -> models.Network:
        """The network with fresh weights."""
        return create_network(self.config, self.preset.shape, self.num_classes, key)

    def init(self, key: jax.Array) -> State:
        """The state that a run starts from."""
        return self.state_of(self.create(key))

    def state_of(self, network: models.Network) -> State:
        """The state of a run that starts from this network."""
        _, params, batch_stats = nnx.split(self.method.network(network), nnx.Param, ...)
        evidence = best = None
        if self.num_train and not self.multi_label:
            count = self.num_train + self.num_held_out
            evidence = Evidence.zeros(count, self.config.example_alignment)
        if self.num_held_out:
            best = Best(jnp.zeros((), jnp.int32), *_copies((params, batch_stats)))
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=self.tx.init(params),
            method=self.method.init(params),
            sums=Sums.zeros(),
            evidence=evidence,
            best=best,
            failed=jnp.full((), -1, jnp.int32),
        )

    # ---------------------------------------------------------------------------------- step

    def step(self, state: State, batch: RawBatch | Resident, key: jax.Array) -> State:
        """One update of everything."""
        raw = batch.batch() if isinstance(batch, Resident) else batch
        keys = jax.random.split(jax.random.fold_in(key, state.step), 3)
        batches = self._batches(raw, keys[0], keys[1])
        loss_fn = self._loss_fn(state.batch_stats)
        params = self._everywhere(state.params)
        done = self.method.gradient(loss_fn, params, batches, state.method)

        judging = {}
        if self.method.judges:
            judging["losses_fn"] = self._losses_fn(state.batch_stats, raw.judges, keys[2])
        updates, opt_state = self.tx.update(done.grads, state.opt_state, state.params, **judging)
        params = optax.apply_updates(state.params, updates)
        batch_stats = jax.tree.map(self._merge_stats, done.aux.batch_stats)

        num_validation = self.config.num_validation_batches
        sums = state.sums.add(raw.labels, raw.true, done, num_validation, self._everywhere)
        if self.method.judges:
            sums = sums.add_judgement(opt_state)
        evidence = state.evidence
        if evidence is not None and raw.indices is not None:
            logits = done.aux.logits.reshape(*raw.labels.shape, -1)
            seen = Evidence.seen(raw.labels, logits, self._alignment(state, batches, keys[1]))
            evidence = evidence.add(*self._everywhere((raw.indices, seen)))
        return state._replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            method=done.state,
            sums=sums,
            evidence=evidence,
            failed=_first_failure(state, done.losses, (params, batch_stats)),
        )

    def _batches(self, raw: RawBatch, augment_key: Any, dropout_key: Any) -> methods.Batch:
        """The k mini-batches, augmented, with the keys of their dropout masks."""
        k, b = raw.labels.shape[:2]
        augmented = jax.vmap(jax.vmap(self.preset.train))
        each = augmented if self.layout is None else self.layout.per_example(augmented)
        augment_keys = jax.random.split(augment_key, (k, b))
        if self.config.dropout_masks == "shared":
            keys = jnp.broadcast_to(dropout_key, (k,))
        else:
            keys = jax.random.split(dropout_key, k)
        copies = None
        if count := self.method.copies:
            if raw.copies is None:
                raise ValueError(f"RawBatch.copies must hold the first {count} mini-batches")
            own = self._everywhere((augment_keys[:count], keys[:count]))
            copies = methods.Batch(augmented(own[0], raw.copies.images), raw.copies.labels, own[1])
        indices = raw.indices if self.method.by_example else None
        return methods.Batch(each(augment_keys, raw.images), raw.labels, keys, copies, indices)

    def _loss_fn(self, running: PyTree) -> methods.LossFn:
        """The mean loss of a mini-batch; `running` are the running averages before it."""

        def loss_fn(
            params: PyTree, batch: methods.Batch, criterion: Any = methods.cross_entropy
        ) -> tuple[jax.Array, methods.Aux]:
            model = nnx.merge(self.graph, params, running, copy=True)
            model.train()
            if (axis := example_axis()) is not None:  # statistics of the whole mini-batch
                model.set_attributes(nnx.BatchNorm, axis_name=axis, raise_if_not_found=False)
            logits = model(batch.images, rngs=nnx.Rngs(batch.key))
            loss = jnp.mean(criterion(logits, batch.labels))
            _, batch_stats, recorded, _ = nnx.split(model, nnx.BatchStat, nnx.Intermediate, ...)
            return loss, methods.Aux(logits, batch_stats, recorded)

        return loss_fn

    def _losses_fn(self, running: PyTree, judges: Examples | None, key: jax.Array) -> Any:
        """The losses of held-out examples, treated as those trained on are."""
        if judges is None:
            raise ValueError(f"RawBatch.judges must hold {self.method.judges} held-out examples")
        augment_key, dropout_key = jax.random.split(key)
        keys = jax.random.split(augment_key, len(judges.labels))
        images = jax.vmap(self.preset.train)(keys, judges.images)

        def losses_fn(params: PyTree) -> jax.Array:
            model = nnx.merge(self.graph, self._everywhere(params), running, copy=True)
            model.train()
            logits = model(images, rngs=nnx.Rngs(dropout_key))
            return self.method.judged_by(logits, judges.labels)

        return losses_fn

    def _alignment(self, state: State, batches: methods.Batch, key: jax.Array) -> Any:
        """⟨∇ℓ_e, v⟩/|v| of every example with the momentum v, [k, b]; None if not asked for."""
        if not self.config.example_alignment:
            return None
        k, b = batches.labels.shape

        def losses(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            model = nnx.merge(self.graph, params, state.batch_stats, copy=True)
            model.eval()  # batch norm in training mode would mix the examples
            logits = model(batch[0], rngs=nnx.Rngs(key))
            return methods.cross_entropy(logits, batch[1])

        params, direction = self._everywhere((state.params, optimizers.direction(state.opt_state)))
        batch = batches.images.reshape(k * b, *batches.images.shape[2:]), batches.labels.ravel()
        products = optax_bilevel.example_alignment(losses, params, batch, direction)
        length = optax.tree.norm(direction)
        return products.reshape(k, b) / jnp.where(length > 0, length, 1)

    def _merge_stats(self, stats: jax.Array) -> jax.Array:
        """Running averages [k, ...], each updated by one mini-batch, as one."""
        if len(stats) == 1:
            return stats[0]
        num_validation = self.config.num_validation_batches
        policies = {"mean": slice(None), "training": slice(num_validation, None)}
        kept = policies.get(self.config.batch_statistics, slice(num_validation))
        return jnp.mean(stats[kept], axis=0)

    def _everywhere(self, tree: PyTree) -> PyTree:
        return tree if self.layout is None else self.layout.everywhere(tree)

    # ------------------------------------------------------------------------- epoch, predict

    def new_epoch(self, state: State, measured: Measured | None = None) -> State:
        """Sums at zero; what the epoch's end has shown of the held-out part."""
        state = state._replace(sums=Sums.zeros())
        if measured is None or state.best is None:
            return state
        now = Best(state.step, state.params, state.batch_stats)
        best = jax.tree.map(lambda x, y: jnp.where(measured.improved, x, y), now, state.best)
        evidence = state.evidence
        if evidence is not None and measured.scores is not None:
            indices = self.num_train + jnp.arange(self.num_held_out)
            evidence = evidence.add_held_out(indices, measured.labels, measured.scores)
        return state._replace(best=best, evidence=evidence)

    def predict(
        self,
        params: PyTree,
        batch_stats: PyTree,
        images: jax.Array,
        key: jax.Array,
        dropout: bool = False,
    ) -> jax.Array:
        """Scores [n, classes]: log-probabilities (several labels: probabilities) over all views."""
        params = self._everywhere(params)
        model = nnx.merge(self.graph, params, batch_stats, copy=True)
        model.eval()
        if dropout:  # and batch norm still by its running averages
            model.dropout.train()
        return scores(model, self.preset, images, key, multi_label=self.multi_label)


def scores(
    model: models.Network,
    preset: augment.Preset,
    images: jax.Array,
    key: jax.Array,
    *,
    multi_label: bool,
) -> jax.Array:
    """What a network makes of images, [n, classes], over all views of each.

    Log-probabilities; several labels: probabilities.
    """
    crop_key, dropout_key = jax.random.split(key)
    keys = jax.random.split(crop_key, len(images))
    views = preset.views or (lambda key, x: preset.evaluate(key, x)[None])
    views = jax.vmap(views)(keys, images)  # [n, views, h, w, c]
    n, v = views.shape[:2]
    flat = views.reshape(n * v, *views.shape[2:])
    logits = model(flat, rngs=nnx.Rngs(dropout_key)).reshape(n, v, -1)
    if multi_label:
        return jnp.mean(jax.nn.sigmoid(logits), axis=1)
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - jnp.log(v)


def create_network(
    config: Config, shape: tuple[int, ...], num_classes: int, key: jax.Array
) -> models.Network:
    """The network that a config names, for images of a shape as they are after augmentation."""
    options = {} if config.hidden is None else {"hidden": config.hidden}
    return models.create(
        config.network,
        num_classes=num_classes,
        input_shape=shape,
        rngs=nnx.Rngs(params=key),
        dtype=jnp.dtype(config.dtype),
        dropout_rate=config.dropout_rate,
        **options,
    )


def _copies(tree: PyTree) -> PyTree:
    """The same values in arrays of their own: no two leaves of a state may be one array."""
    return jax.tree.map(jnp.copy, tree)


def _first_failure(state: State, losses: jax.Array, new: PyTree) -> jax.Array:
    finite = jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)])
    ok = jnp.all(finite) & jnp.any(jnp.isfinite(losses))
    return jnp.where((state.failed >= 0) | ok, state.failed, state.step)
