"""`torch.compile` of the target's layers, for devices where the CPU that launches kernels is the limit.

A decoder layer is some sixty small kernels: on a GPU they are done sooner than they are launched. Compiled they
become a few. Layers are compiled one by one and not the model as a whole: their code is the same, so that one
compilation serves them all (PyTorch's "regional compilation"). Attention is one operation to the compiler, which it
does not look into: its parts have other shapes in every pass.
"""

from __future__ import annotations

import locale
import logging
from collections.abc import Callable

import torch
from torch import nn

from wisp_plugin.errors import ModelError


def compile_layers(model: nn.Module, choice: str, trial: Callable[[], None]) -> bool:
    """Compile the decoder layers of `model` as `choice` says, and run `trial`; True if they are compiled now.

    With `auto` a model on a CPU stays as it is (a pass there is arithmetic), and where compilation fails, for want of a
    C compiler or because of the model's code, a warning says so and the layers run as they did.

    Raises:
        ModelError: compilation failed, and `choice` is not `auto`; or what `trial` raises: compiled, it is wrong.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    layers = _decoder_layers(model)
    if choice == "never" or (choice == "auto" and (on_cpu or not layers)):
        return False
    try:
        _read_files_as_utf8()
        for layer in layers:
            layer.compile(dynamic=True)
        trial()
    except ModelError:
        raise
    except Exception as error:  # whatever compiler, driver and Python headers of this machine come up with
        line = f"the target cannot be compiled here ({_first_line(error)})"
        if choice != "auto":
            raise ModelError(f"{line}; allowed: compile=auto or never") from error
        logging.getLogger(__name__).warning("%s: its layers run uncompiled, which is slower", line)
        for layer in layers:
            layer._compiled_call_impl = None
        return False
    return True


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of equal modules: the decoder layers of any Hugging Face causal LM."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    return max(alike, key=len, default=[])


def compiled_on_device(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function` of tensors, compiled at its first call for another device than a CPU.

    Where that fails, a warning says so once and the function runs as it is.
    """
    compiled: Callable[..., torch.Tensor] | None = None
    has_failed = False

    def run(first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        nonlocal compiled, has_failed
        if has_failed or first.device.type == "cpu":
            return function(first, *rest)
        try:
            if compiled is None:
                _read_files_as_utf8()
                compiled = torch.compile(function, dynamic=True)
            return compiled(first, *rest)
        except Exception as error:  # as above; what is wrong with the tensors the function will say itself
            logging.getLogger(__name__).warning("%s runs uncompiled: %s", function.__name__, _first_line(error))
            has_failed = True
            return function(first, *rest)

    return run


def _read_files_as_utf8() -> None:
    """The compiler reads its own templates as the locale says, and in Triton's Python stub that is ASCII."""
    if locale.getpreferredencoding(False).upper() not in ("UTF-8", "UTF8"):
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
