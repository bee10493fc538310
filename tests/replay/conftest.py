from unittest.mock import patch

import pytest


@pytest.fixture
def kernel():
    from launchers import scaled
    from triton.runtime.jit import JITFunction

    return JITFunction(scaled)


@pytest.fixture
def driver(monkeypatch):
    from recorder import Recorder, compile_nothing
    from triton.runtime.jit import JITFunction

    from vlcore.bench.stand_in import in_place_of_a_gpu
    from vlcore.kernels import direct_launch, launch

    monkeypatch.setattr(direct_launch, "_kept", {})
    monkeypatch.setattr(launch, "INTERPRETED", False)
    recorder = Recorder()
    with in_place_of_a_gpu(recorder, "sm_90"), patch.object(JITFunction, "_do_compile", compile_nothing):
        yield recorder
