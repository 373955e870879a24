#!/usr/bin/env python3
"""Steer a model in llama-cpp-python through the plugin, with ctypes alone, and print the logits as JSON.

    pip install llama-cpp-python
    scripts/build_plugin.sh
    python examples/python/steer.py target/plugin/lib/libdetox_gguf.so MODEL STEER_FILE 1,60,70 [COEFFICIENT]

The part that a control vector can do is set as a control vector. For the rest, llama.cpp calls the plugin directly,
without running Python: the plugin's table of functions holds ggml's own, except for the one that reads a tensor's shape.
"""

import ctypes
import json
import sys

import llama_cpp

c_ptr, c_int32, c_size_t = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t


class Shape(ctypes.Structure):
    """detox_shape"""

    _fields_ = [("type", c_int32), ("ne", ctypes.c_int64 * 4), ("nb", c_size_t * 4)]


class Tensor(ctypes.Structure):
    """The first members of struct ggml_tensor in llama-cpp-python's llama.cpp."""

    _fields_ = [("type", c_int32), ("buffer", c_ptr), ("ne", ctypes.c_int64 * 4), ("nb", c_size_t * 4)]


SHAPE_FN = ctypes.CFUNCTYPE(None, c_ptr, ctypes.POINTER(Shape))


class HostTable(ctypes.Structure):
    """detox_host_table; a single sequence needs no `op` and no `source`."""

    _fields_ = [("size", c_size_t), ("name", c_ptr), ("shape", SHAPE_FN), ("get", c_ptr), ("set", c_ptr), ("op", c_ptr),
                ("source", c_ptr)]


class ControlVector(ctypes.Structure):
    """detox_control_vector"""

    _fields_ = [("size", c_size_t), ("len", c_size_t), ("n_embd", c_int32), ("il_start", c_int32), ("il_end", c_int32),
                ("is_whole", ctypes.c_bool)]


@SHAPE_FN
def shape_of(tensor, shape):
    found = ctypes.cast(tensor, ctypes.POINTER(Tensor)).contents
    shape.contents.type, shape.contents.ne, shape.contents.nb = found.type, found.ne, found.nb


def ggml_function(name: str) -> int:
    """The address of a function in llama-cpp-python's ggml."""
    folder = llama_cpp.llama_cpp._base_path
    for library in sorted(folder.glob("libggml*")) + sorted(folder.glob("libllama*")):
        try:
            return ctypes.cast(getattr(ctypes.CDLL(str(library)), name), c_ptr).value
        except (AttributeError, OSError):
            continue
    raise SystemExit(f"error: expected llama-cpp-python in {folder} to export {name}, found no such function")


class Plugin:
    """The functions that this example needs; vendor/include/detox_gguf.h has all of them."""

    def __init__(self, path: str):
        self.library = ctypes.CDLL(path)
        self.library.detox_last_error.restype = ctypes.c_char_p
        self.library.detox_set_coefficient.argtypes = [c_ptr, ctypes.c_float]
        if self.library.detox_abi_version() != 1:
            found = self.library.detox_abi_version()
            raise SystemExit(f"error: expected version 1 of the plugin's interface, found {found}")

    def call(self, name: str, *arguments) -> None:
        if getattr(self.library, name)(*arguments) != 0:
            raise SystemExit(f"error: {name}: {self.library.detox_last_error().decode()}")


def main() -> None:
    library, model_path, steer_path, tokens, *rest = sys.argv[1:]
    tokens = [int(token) for token in tokens.split(",")]
    plugin = Plugin(library)

    steer, callback = c_ptr(), c_ptr()
    plugin.call("detox_steer_load", model_path.encode(), steer_path.encode(), None, ctypes.byref(steer))
    if rest:
        plugin.call("detox_set_coefficient", steer, float(rest[0]))
    table = HostTable(ctypes.sizeof(HostTable), ggml_function("ggml_get_name"), shape_of,
                      ggml_function("ggml_backend_tensor_get"), ggml_function("ggml_backend_tensor_set"), None, None)
    plugin.call("detox_steer_callback", steer, ctypes.byref(table), None, ctypes.byref(callback))
    vector = ControlVector(ctypes.sizeof(ControlVector))
    plugin.call("detox_steer_control_vector", steer, ctypes.byref(vector), None, c_size_t(0))
    rows = (ctypes.c_float * max(vector.len, 1))()
    plugin.call("detox_steer_control_vector", steer, ctypes.byref(vector), rows, c_size_t(vector.len))

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 256
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # F32, to compare with other programs
    params.flash_attn_type = 0  # disabled
    # Versions of llama-cpp-python declare this member with different types.
    kind = dict(params._fields_)["cb_eval"]
    function = ctypes.cast(plugin.library.detox_eval_callback, c_ptr)
    params.cb_eval = ctypes.cast(function, kind) if kind is not c_ptr else function
    params.cb_eval_user_data = callback
    context = llama_cpp.llama_init_from_model(model, params)
    code = llama_cpp.llama_set_adapter_cvec(context, rows if vector.len else None, vector.len, vector.n_embd,
                                            vector.il_start, vector.il_end)
    assert code == 0, "llama.cpp refused the control vector"
    array = (llama_cpp.llama_token * len(tokens))(*tokens)  # must outlive the batch, which only points to it
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
    plugin.call("detox_check", callback)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    print(json.dumps(llama_cpp.llama_get_logits_ith(context, -1)[:n_vocab]))

    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    plugin.call("detox_callback_free", callback)
    plugin.call("detox_steer_free", steer)


if __name__ == "__main__":
    main()
