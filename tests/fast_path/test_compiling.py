"""Compiled decoders: which sizes have a graph, and what happens where none can be made."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.kl_vaes import family
from worker.fast_path import CompiledDecoder, FastOptions, FastVaes
from worker.fast_path.norm_silu import GroupNormSiLU


class Backend:
    """Stands for the compiler: counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: object) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward  # type: ignore[no-any-return]


def small_decoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), GroupNormSiLU(nn.GroupNorm(4, 16)), nn.Conv2d(16, 3, 1)).eval()


def test_sizes_that_were_prepared_run_compiled_and_the_others_as_they_are() -> None:
    backend, plain = Backend(), small_decoder()
    compiled = CompiledDecoder(plain, backend=backend)
    with torch.inference_mode():
        assert not compiled.is_prepared
        assert compiled.prepare(torch.zeros(1, 4, 8, 8))
        assert compiled.prepare(torch.zeros(1, 4, 12, 20))
        assert backend.graphs == 2
        assert compiled.has_graph_for(8, 8, torch.float32)
        assert not compiled.has_graph_for(8, 9, torch.float32)
        assert not compiled.has_graph_for(8, 8, torch.float64)
        for shape in ((1, 4, 8, 8), (1, 4, 12, 20), (1, 4, 8, 9), (2, 4, 8, 8)):
            z = torch.randn(shape)
            assert torch.equal(compiled(z), plain(z))
    assert backend.graphs == 2  # nothing was compiled on the way


def test_one_graph_of_free_sizes_serves_single_pictures_of_any_size() -> None:
    backend, plain = Backend(), small_decoder()
    compiled = CompiledDecoder(plain, backend=backend)
    with torch.inference_mode():
        assert compiled.prepare(torch.zeros(1, 4, 10, 14), free_sizes=True)
        for shape in ((1, 4, 8, 8), (1, 4, 9, 23), (1, 4, 31, 6)):
            assert compiled.has_graph_for(*shape[2:], torch.float32)
            z = torch.randn(shape)
            assert torch.equal(compiled(z), plain(z))
    assert backend.graphs == 1


def test_a_graph_compiled_in_one_thread_serves_another() -> None:
    backend, plain = Backend(), small_decoder()
    compiled = CompiledDecoder(plain, backend=backend)
    z = torch.randn(1, 4, 8, 8)
    found = []
    with torch.inference_mode():
        compiled.prepare(z)

    def body() -> None:
        with torch.inference_mode():
            found.append(compiled(z))

    thread = threading.Thread(target=body, name="decodes")
    thread.start()
    thread.join()
    assert torch.equal(found[0], plain(z))
    assert backend.graphs == 1


def test_what_cannot_be_compiled_is_decoded_without_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: object, inputs: object) -> Callable[..., Any]:
        raise RuntimeError("no such instruction")

    plain = small_decoder()
    compiled = CompiledDecoder(plain, backend=broken)
    z = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        assert not compiled.prepare(z)
        assert torch.equal(compiled(z), plain(z))
        assert torch.equal(compiled(z), plain(z))
    assert [getattr(record, "action", None) for record in caplog.records].count("compile_failed") == 1
    assert not compiled.has_graph_for(8, 8, torch.float32)


def test_a_decode_that_has_no_memory_is_not_taken_for_a_compiler_that_fails() -> None:
    def full(graph: object, inputs: object) -> Callable[..., Any]:
        def run(*_: object) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        return run

    compiled = CompiledDecoder(small_decoder(), backend=full)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        compiled.prepare(torch.zeros(1, 4, 8, 8))


def test_a_vae_is_compiled_for_the_sizes_named_and_once_for_all_others() -> None:
    backend, vae = Backend(), family("one_level")
    ways = FastVaes(FastOptions(compile="on", native_bfloat16=False), backend=backend)
    fast = ways.of(vae)
    assert fast is not None
    assert not fast.is_compiled
    assert ways.prepare(vae, fast, sides=[(8, 8)]) == 2
    assert backend.graphs == 2
    assert fast.is_compiled
    z = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        expected = vae.decode(z, return_dict=False)[0]
        found = fast.module(compiled=True).decode(z, return_dict=False)[0]
    assert float((found - expected).abs().max()) <= 1e-4
    assert backend.graphs == 2
    assert fast.facts(compiled=True)["compiled"] is True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler, g++ here")
def test_the_real_compiler_makes_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One norm only, without trying the CPU's vector instructions or compiling headers first: a few seconds."""
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)
    plain = nn.Sequential(GroupNormSiLU(nn.GroupNorm(4, 16)))
    compiled = CompiledDecoder(plain)
    z = torch.randn(1, 16, 16, 16)
    with torch.inference_mode():
        assert compiled.prepare(z)
        assert compiled.has_graph_for(16, 16, torch.float32)
        assert float((compiled(z) - plain(z)).abs().max()) <= 1e-5
