"""What a bench compares with computes the same thing; and it is left out where it is not to be had, or fails."""

import pytest
import torch
import torch.nn.functional as F

from vlcore import cli
from vlcore.bench import alternatives, bench_rope_attention, command, harness, timing
from vlcore.bench.alternatives import Alternative
from vlcore.bench.harness import Case, Maker
from vlcore.bench.peers import TORCH_BACKEND, TORCH_COMPILED
from vlcore.ops.rel_pos_attention import rel_pos_attention_reference
from vlcore.ops.rms_norm import rms_norm_reference
from vlcore.ops.rope_attention import rope_attention_reference

MAKE = Maker(torch.float64, "cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("peer", [alternatives.sdpa_with_bias, alternatives.flex_rel_pos])
def test_relative_positions(peer):
    q, k, v = (MAKE(2, 3, 4 * 5, 16) for _ in range(3))
    tables = MAKE(7, 16), MAKE(9, 16)
    torch.testing.assert_close(peer(q, k, v, *tables), rel_pos_attention_reference(q, k, v, *tables, (4, 5)))


def test_rotary_attention_of_transformers():
    q, k, v = (MAKE(2, 7, 3, 16) for _ in range(3))
    positions = torch.arange(7).expand(2, 7)
    wanted = rope_attention_reference(q, k, v, positions)
    torch.testing.assert_close(alternatives.llama_attention(q, k, v, positions), wanted)


def test_attention_by_cudnn():
    def attend(x):
        return torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled(), x

    peer = alternatives.by_cudnn(attend)
    assert peer(5) == (True, False, 5) and attend(6)[1]
    assert peer.is_to_be_had("cuda", False) and not peer.is_to_be_had("cpu", False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_attention():
    (case,) = [case for case in bench_rope_attention.CASES if "packed" in case.shape and not case.trains]
    assert "8 packed" in case.shape
    q, k, v, positions, bounds, longest = bench_rope_attention.packed((5, 1, 130))(MAKE)
    assert longest == 130 and bounds.tolist() == [0, 5, 6, 136] and positions[0, 5:8].tolist() == [0, 0, 1]
    wanted = rope_attention_reference(q, k, v, positions, cu_seqlens=bounds)
    flex = alternatives.FlexPacked(alternatives.flex_masked)
    torch.testing.assert_close(flex(q, k, v, positions, bounds, longest), wanted)


def test_norm_of_transformers():
    x, weight = MAKE(3, 8), MAKE(8)
    # Its statistics are float32 whatever the input.
    got = alternatives.llama_rms_norm(x, weight)
    torch.testing.assert_close(got, rms_norm_reference(x, weight), rtol=1e-6, atol=1e-6)


def case(**peers):
    return Case(operator="swiglu", shape="5 × 7", inputs=lambda make: (make(5, 7), make(5, 7)), peers=peers)


def test_what_is_not_to_be_had_is_left_out():
    here = Alternative(lambda gate, up: F.silu(gate) * up, devices=("cpu",))
    given = case(
        here=here,
        elsewhere=Alternative(here.call),
        compiled=Alternative(here.call, compiles=True),
        unknown=Alternative(here.call, "no_such_package"),
    )
    assert [*harness.contenders(given, "cpu", False)] == [TORCH_BACKEND, "here"]
    assert [*harness.contenders(given, "cuda", False)] == [TORCH_BACKEND, "elsewhere"]
    assert [*harness.contenders(given, "cuda", True)] == [TORCH_BACKEND, TORCH_COMPILED, "elsewhere", "compiled"]
    assert {"here", TORCH_BACKEND} <= set(harness.measure(given, Maker(torch.float32, "cpu")).seconds)


def test_a_peer_that_fails_is_named_and_the_others_are_timed():
    def fail(gate, up):
        raise MemoryError("all of it\nis gone")

    found = harness.measure(case(broken=fail), Maker(torch.float32, "cpu"))
    assert found.failed == {"broken": "MemoryError: all of it"} and TORCH_BACKEND in found.seconds
    assert "broken failed: MemoryError: all of it" in command.line(found)


def test_the_reference_is_compiled_where_that_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(dynamic) or function)
    assert TORCH_COMPILED in harness.measure(case(), Maker(torch.float32, "cpu"), compiled=True).seconds
    assert compiled == [False]


def test_a_case_that_fails_stops_no_other(monkeypatch, capsys, tmp_path):
    def wrong(gate, up, *, backend):
        raise RuntimeError("out of resources")

    good = case()
    bad = Case(operator="swiglu", shape="bad", inputs=good.inputs, function=wrong)
    monkeypatch.setattr(command, "cases", lambda name: [bad, good])
    monkeypatch.setattr(command, "roofline", lambda dtype, device: timing.Roofline(1, 1))
    with pytest.raises(AssertionError, match="Not timed: swiglu, bad, float32: out of resources"):
        cli.main(["bench", "swiglu", "--dtype", "float32", "--no-compile"])
    assert "swiglu  5 × 7" in capsys.readouterr().out
