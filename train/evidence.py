"""What a run learns about every single training example on the way: whose label may be wrong?

A network that is kept from memorising never comes to believe a wrong label, and says so each time
that it sees the example. Each step's own logits, from before the step, are added up, so that the
evidence costs no forward pass; the alignment, which costs some, is gathered where it is asked for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.methods import cross_entropy


class Evidence(NamedTuple):
    """Sums over all visits of each example so far, on the device; part of the checkpoint.

    In training mode, that is with augmentation, dropout and the mini-batch's own batch statistics;
    of held-out examples at the end of every epoch, in evaluation mode.

    Attributes:
        visits: how often the example was seen with finite logits, int32 [n].
        loss: sum of its losses, float32 [n].
        margin: sum of its margins, the logit of the given label less the largest other logit,
            float32 [n].
        agreed: how often the given label was the predicted one, int32 [n].
        alignment: sum of the inner products of the gradients of its cross-entropy, whatever loss
            is trained, with the momentum from before the step, divided by the momentum's length,
            float32 [n]; in evaluation mode, but with augmentation; NaN for held-out examples. None
            where it is not gathered.
    """

    visits: jax.Array
    loss: jax.Array
    margin: jax.Array
    agreed: jax.Array
    alignment: jax.Array | None = None

    @classmethod
    def zeros(cls, num_examples: int, alignment: bool = False) -> "Evidence":
        """No evidence yet."""
        fields = cls._fields if alignment else cls._fields[:-1]
        dtypes = {"visits": jnp.int32, "agreed": jnp.int32}
        return cls(*(jnp.zeros(num_examples, dtypes.get(x, jnp.float32)) for x in fields))

    @classmethod
    def seen(
        cls, labels: jax.Array, logits: jax.Array, alignment: jax.Array | None = None
    ) -> "Evidence":
        """Of one visit of each example, in the shape of the labels; computed where the logits lie.

        Args:
            labels: given labels, int32 [...].
            logits: float32 [..., classes].
            alignment: float32 [...], where it is gathered.
        """
        is_given = labels[..., None] == jnp.arange(logits.shape[-1])
        given = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        margin = given - jnp.max(jnp.where(is_given, -jnp.inf, logits), axis=-1)
        finite = jnp.all(jnp.isfinite(logits), axis=-1)
        if alignment is not None:
            alignment = jnp.where(finite & jnp.isfinite(alignment), alignment, 0)
        return cls(
            finite.astype(jnp.int32),
            jnp.where(finite, cross_entropy(logits, labels), 0),
            jnp.where(finite, margin, 0),
            (finite & (margin > 0)).astype(jnp.int32),
            alignment,
        )

    def add(self, indices: jax.Array, seen: "Evidence") -> "Evidence":
        """Adds what was seen of the examples of these numbers, int32 of the same shape."""
        return jax.tree.map(lambda total, new: total.at[indices].add(new), self, seen)

    def add_held_out(self, indices: jax.Array, labels: jax.Array, scores: jax.Array) -> "Evidence":
        """Adds what an epoch's end shows of held-out examples, as a visit of each.

        Args:
            indices: of the examples, int32 [m].
            labels: their given labels, int32 [m].
            scores: log-probabilities in evaluation mode, float32 [m, classes].
        """
        seen = Evidence.seen(labels, scores)
        if self.alignment is not None:  # no step goes along their gradients
            seen = seen._replace(alignment=jnp.full(labels.shape, jnp.nan))
        return self.add(indices, seen)


class Means(NamedTuple):
    """Evidence per visit, NumPy float64 [n] each, NaN for an example that was never seen.

    Attributes:
        score: how suspicious the given label is: minus the mean margin, so that it is positive
            where the network on the whole preferred another label. The mean margin over the
            epochs is the area under the margin of Pleiss et al., "Identifying Mislabeled Data
            using the Area Under the Margin Ranking" (NeurIPS 2020), eq. (2).
        loss: mean loss.
        agreement: share of visits at which the given label was the predicted one.
        alignment: mean alignment, below 0 where the updates rather raised the example's loss;
            None where it was not gathered.
    """

    score: np.ndarray
    loss: np.ndarray
    agreement: np.ndarray
    alignment: np.ndarray | None = None


def means(evidence: Any) -> Means:
    """The evidence of a state, per visit."""
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), evidence)
    sums = jax.tree.map(lambda x: x / np.where(sums.visits > 0, sums.visits, np.nan), sums)
    return Means(-sums.margin, sums.loss, sums.agreed, sums.alignment)
