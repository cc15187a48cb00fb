"""Strictness for every test: eight simulated devices, shapes checked at run time, no silent promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    # The last two flags more than halve compile time, which is most of the suite's.
    " --xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    " --xla_backend_optimization_level=0"
)
os.environ["HF_HUB_OFFLINE"] = "1"

import atexit
import shutil
import tempfile

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
# Many tests run the same programs: what one worker has compiled, the others find.
if "SQUEEZE_TEST_CACHE" not in os.environ:
    os.environ["SQUEEZE_TEST_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["SQUEEZE_TEST_CACHE"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["SQUEEZE_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

install_import_hook("squeeze_jax", "beartype.beartype")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no core waits for them at the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("training", "commands"))
