"""Fixtures that every test may use."""

import contextlib
import gc
import os
import random
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

# Two test workers on two cores: more threads would only fight (and results must not depend on the thread count).
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell without job control starts background jobs with Ctrl-C ignored, and children inherit that: pytest's own would
# never see the signal that their tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and no verdict on how busy the machine is.
settings.register_profile("house", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
with contextlib.suppress(ImportError, AttributeError):
    from hypothesis.internal.conjecture import providers

    # Otherwise constants of our modules are among the examples: of those that this worker happens to have imported.
    _ = providers.is_local_module_file  # older versions look for none
    providers.is_local_module_file = lambda path: False


def pytest_collection_finish():
    """Leave what imports made out of every later garbage collection: accelerate asks for one per Trainer."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Whatever ran before in this worker, which depends on how fast the others were, a test draws the same numbers."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_unconfigure():
    gc.unfreeze()
