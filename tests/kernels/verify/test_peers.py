"""Others' attention: which is for which case, and that it computes what ours does."""

import sys
import types
from importlib.machinery import ModuleSpec

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.flash_attention import flash_attention
from efficient_tx.kernels.verify import peers

VALUES = {"length": 4096, "keys": "all", "heads": "8", "dim": 64, "dtype": "bfloat16", "score": "softmax",
          "mask": "causal"}  # fmt: skip


@pytest.mark.quick
def test_each_platform_has_its_own():
    of_tpu = {"jax.nn", "jax flash", "jax flash, blocks of 512", "jax splash"}
    assert peers.beside("flash_attention", VALUES, "tpu").keys() >= of_tpu
    assert peers.beside("flash_attention", VALUES, "gpu").keys() >= {"jax.nn", "cuDNN", "jax Triton"}
    assert "jax splash" not in peers.beside("flash_attention", VALUES | {"heads": "32/8"}, "tpu")
    assert "jax.nn" not in peers.beside("flash_attention", VALUES | {"length": 65536}, "gpu")
    for other in ({"score": "sigmoid"}, {"keys": "128"}, {"mask": "documents"}):
        assert not peers.beside("flash_attention", VALUES | other, "gpu")
    assert not peers.beside("monarch", {}, "gpu")


@pytest.mark.quick
def test_tokamax_is_there_where_it_is_installed(monkeypatch):
    """A module of its name in its place."""
    x = np.random.default_rng(0).normal(size=(1, 8, 2, 4)).astype(np.float32)
    module = types.ModuleType("tokamax")
    module.__spec__, module.dot_product_attention = ModuleSpec("tokamax", None), jax.nn.dot_product_attention
    monkeypatch.setitem(sys.modules, "tokamax", module)
    theirs = peers.beside("flash_attention", VALUES, "gpu")["tokamax"]
    # Sums of 8 terms in float32.
    np.testing.assert_allclose(theirs(x, x, x), flash_attention(x, x, x, causal=True), atol=1e-5)
    monkeypatch.delitem(sys.modules, "tokamax")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "tokamax" not in peers.beside("flash_attention", VALUES, "gpu")


@pytest.mark.aot
@pytest.mark.parametrize(("target", "kernel"), [("v5e", "splash_mha"), ("h100", "pallas_flash_attention")])
def test_tokamax_compiles_to_kernels_for_chips_that_are_not_there(target, kernel):
    """Forward and backward: its own choice for a CPU is none of them."""
    program = peers.gradient(peers.PEERS[target]["tokamax"], True, 64, target)
    assert len([one for one in program.kernels if one.name.startswith(kernel)]) >= 2


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.slow
def test_they_compute_the_same(mask):
    """Scales and layouts; on the CPU jax.nn, and jax's kernels for TPUs by its interpreter."""
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(1, 512, 2, 128)).astype(np.float32) for _ in range(3))
    wanted = flash_attention(q, k, v, causal=mask == "causal")
    with pltpu.force_tpu_interpret_mode():
        for name, attend in peers.beside("flash_attention", VALUES | {"mask": mask}, "tpu").items():
            # Their products of float32 may be rounded to bfloat16 on the way, 8 bits.
            np.testing.assert_allclose(jax.jit(attend)(q, k, v), wanted, atol=2e-2, err_msg=name)
