"""Eight fake CPU devices and the hypothesis profiles; loaded before any test imports jax."""

import os

import hypothesis

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()

# The same cases every time: a failure seen once can be run again.
hypothesis.settings.register_profile(
    "default",
    max_examples=24,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink),
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), max_examples=250
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
