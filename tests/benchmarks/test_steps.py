"""Every candidate is a step of training that the others can be compared with."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import steps
from benchmarks.steps import Case


@pytest.fixture(scope="module")
def problem():
    return steps.problem(Case("mlp_1x512", (4, 4, 1), k=4, b=2))


@pytest.fixture(scope="module")
def compiled(problem):
    return {name: jax.jit(step) for name, (step, _) in steps.candidates(problem).items()}


@pytest.fixture(scope="module")
def after(problem, compiled):
    """The parameters and the optimizer's state after a step of each."""
    return {
        name: compiled[name](init(problem.params), problem.batches, problem.held_out)
        for name, (_, init) in steps.candidates(problem).items()
    }


def test_all_forms_of_the_rule_take_the_same_step(after):
    wanted = after["stacked"][0]
    for name in ("streaming", "streaming_by_1"):
        same = jax.tree.map(lambda x, y: jnp.allclose(x, y, atol=1e-6), wanted, after[name][0])
        assert all(jax.tree.leaves(same)), name


def test_a_coherent_step_begins_as_the_plain_one_and_then_is_judged(problem, compiled, after):
    first = after["coherent"]
    same = jax.tree.map(lambda x, y: jnp.allclose(x, y), first[0], after["plain"][0])
    assert all(jax.tree.leaves(same))
    _, state = compiled["coherent"](first, problem.batches, problem.held_out)
    assert int(state.count) == 2
    assert float(state.variance) > 0  # has seen an agreement that was not full


def test_k_plain_gradients_add_up_to_k_times_that_of_the_whole_batch(problem, after):
    def moved(name):
        return jax.tree.map(lambda new, old: new - old, after[name][0], problem.params)

    same = jax.tree.map(
        lambda x, y: jnp.allclose(x, 4 * y, atol=1e-6), moved("accumulate"), moved("plain")
    )
    assert all(jax.tree.leaves(same))
