"""What the leaves of a parameter tree are: counted, decayed, layer by layer."""

import math
import re
from typing import Any

import jax


def parameter_count(params: Any) -> int:
    """Number of scalars in a pytree of arrays, abstract ones included.

    Args:
        params: any pytree whose leaves have a shape, such as `nnx.state(model, nnx.Param)`.
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def decay_mask(params: Any) -> Any:
    """Marks the parameters that get weight decay: kernels of convolutions and linear layers.

    The paper's released code decays these and neither biases nor batch norm. Fits
    `optax.add_decayed_weights(5e-4, mask=decay_mask)`.

    Args:
        params: parameters of a network, an `nnx.State` or plain dicts, or anything with the same
            structure.

    Returns:
        The same structure with a bool in place of each array.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1:] == ["kernel"], params)


def layer_labels(params: Any) -> Any:
    """Names the layer that each parameter belongs to.

    A layer is a convolution or linear layer with its bias and its norm: the norm `bn` or `norm`
    goes with the convolution `conv` beside it, `bn1` or `norm1` with `conv1`. Fits the paper's
    weights ω per layer (table 1, row b) as `bilevel_reweight(groups=layer_labels)`.

    Args:
        params: parameters of a network, an `nnx.State` or plain dicts, or anything with the same
            structure.

    Returns:
        The same structure with the layer's path, such as "blocks/3/conv1", in place of each array.
    """

    def label(path, _) -> str:
        return re.sub(r"\b(?:bn|norm)(\d*)$", r"conv\1", "/".join(_names(path)[:-1]))

    return jax.tree_util.tree_map_with_path(label, params)


def _names(path) -> list[str]:
    # A Variable in an nnx.State is itself a node, whose attribute "value" ends the path.
    return [
        str(key.key if isinstance(key, jax.tree_util.DictKey) else key.idx)
        for key in path
        if isinstance(key, jax.tree_util.DictKey | jax.tree_util.SequenceKey)
    ]
