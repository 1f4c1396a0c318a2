"""From a Hugging Face folder to a draft graph: `wisp-edge export`, also `python -m edge_runtime.export`.

onnxruntime-genai's model builder runs in a subprocess, because it needs torch and transformers, which an edge
device never loads (the `export` extra). Quantized weights are MatMulNBits with blocks of 32; what `PRECISIONS`
calls error-compensated is the builder's fp32 graph, quantized by `weight_graph`. The output is the layout of
`edge_runtime.draft_graph` with KV in place. A failed or interrupted export leaves nothing behind: everything is
built next to `out_dir` and moved there at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from wisp_plugin.errors import ConfigError, ModelError, WispError

PRECISIONS: dict[str, str] = {  # and what each is for
    "fp32": "the model itself, to compare with",
    "int8": "8 bits, rounded to nearest: the closest draft",
    "int4": "4 bits, rounded to nearest: the smallest and fastest draft, as most exporters make it",
    "int4-gptq": "4 bits, error-compensated (GPTQ): as fast as int4, and closer",
    "mixed48": "8 bits for query, key, value and down projections, else int4-gptq: nearly as fast as int4, much closer",
}
_NEEDED_MODULES = ("onnx", "onnxruntime_genai", "torch", "transformers")
# A draft needs the logits behind the last token only. Level 4 multiplies weights with activations in int8, which is the
# fast path on CPUs. Precisions that are not here are made of fp32.
_BUILDER_OPTIONS: dict[str, tuple[str, ...]] = {
    "fp32": ("prune_lm_head=true",),
    "int8": ("prune_lm_head=true", "block_size=32", "accuracy_level=4"),
    "int4": ("prune_lm_head=true", "block_size=32", "accuracy_level=4"),
}
# Products in 4 bits, by the builder's names. In mixed48 these are the kinds whose rounding costs the least agreement
# for the time that 8 bits would take: a third of the weights is left for 8 bits, and query, key and value, an eighth
# of all, are half of the damage (KL by kind, on prompts that no figure is reported of).
_IN_4_BITS: dict[str, Callable[[str], bool]] = {
    "int4-gptq": lambda name: True,
    "mixed48": lambda name: any(f"/{kind}/" in name for kind in ("gate_proj", "up_proj", "o_proj", "lm_head")),
}
_COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_REQUIRED_FILES = ("config.json", "tokenizer.json")
_REPORTED_LINES = 8  # of the builder's output, searched for the reason of a failure


def export_draft(source: Path | str, out_dir: Path, precision: str, progress: Callable[[str], None]) -> None:
    """Write the draft graph of the model `source` (a Hugging Face folder or id) to `out_dir`.

    `out_dir` gets model.onnx with its data, genai_config.json, config.json, the tokenizer's files and the chat
    template; what it held before is replaced. `precision` is one of `PRECISIONS`. `progress` gets one line per step.

    Raises:
        ConfigError: unknown precision.
        ModelError: the `export` extra is missing, `source` cannot be read, or the builder failed.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; allowed: {', '.join(PRECISIONS)}")
    _check_extra()
    folder = _local_folder(source, progress)
    out_dir = out_dir.absolute()
    if out_dir.exists() and (not out_dir.is_dir() or (any(out_dir.iterdir()) and not _is_draft_folder(out_dir))):
        raise ModelError(f"{out_dir} exists and is not a draft folder; give a new or empty folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as scratch:
        built = Path(scratch) / "draft"
        progress(f"building the {precision} draft graph of {folder.name}")
        _run_builder(folder, built, precision, progress)
        for name in _COPIED_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, built / name)
        if precision in _IN_4_BITS:
            from edge_runtime.weight_graph import quantize_graph  # needs the `export` extra

            quantize_graph(built, _IN_4_BITS[precision], progress)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        built.replace(out_dir)
    size_mb = sum(file.stat().st_size for file in out_dir.iterdir()) / 1e6
    progress(f"wrote {out_dir} ({size_mb:.0f} MB)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wisp-edge export`."""
    parser.add_argument("source", metavar="HF_ID_OR_DIR", help="Hugging Face folder or id of the model")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the draft graph")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "precisions:\n" + "\n".join(f"  {name:<10} {purpose}" for name, purpose in PRECISIONS.items())
    parser.add_argument("--precision", choices=PRECISIONS, default="int8", help="see below [%(default)s]")


def main(args: argparse.Namespace) -> int:
    """Run an export from parsed arguments; the exit code, 2 for an error that is told in one line."""
    try:
        export_draft(args.source, args.out, args.precision, lambda line: print(line, file=sys.stderr, flush=True))
    except WispError as error:
        print(f"wisp-edge export: {error}", file=sys.stderr)
        return 2
    return 0


def _check_extra() -> None:
    missing = [name for name in _NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"an export needs the package {missing[0]!r}: install the `export` extra")


def _is_draft_folder(folder: Path) -> bool:
    return (folder / "model.onnx").is_file() and (folder / "genai_config.json").is_file()


def _local_folder(source: Path | str, progress: Callable[[str], None]) -> Path:
    """`source` as a folder on disk; an id of the hub is downloaded."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _download(str(source), progress)
    for name in _REQUIRED_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is not a Hugging Face model folder: {name} is missing")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is damaged: {error}") from None
    return folder.absolute()


def _download(model_id: str, progress: Callable[[str], None]) -> Path:
    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")):
        raise ModelError(f"{model_id!r} is neither a folder nor a model id of the form owner/name")
    from huggingface_hub import snapshot_download  # comes with transformers

    progress(f"fetching {model_id}")
    try:
        return Path(snapshot_download(model_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (OSError, ValueError) as error:  # the hub's HTTP errors are OSErrors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot fetch {model_id!r} from the hub: {reason[0]}") from None


def _run_builder(folder: Path, built: Path, precision: str, progress: Callable[[str], None]) -> None:
    """Run the model builder; `progress` gets its stages, a failure its last line."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(folder), "-o", str(built)]
    of_builder = precision if precision in _BUILDER_OPTIONS else "fp32"
    command += ["-p", of_builder, "-e", "cpu", "-c", str(built.parent / "cache")]
    command += ["--extra_options", *_BUILDER_OPTIONS[of_builder]]
    tail: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip().rsplit("\r", 1)[-1].strip()
            if line.startswith(("Reading embedding", "Reading LM head", "Saving ONNX", "Saving GenAI")):
                progress(line.split(" in ", 1)[0].lower())
            tail = [*tail, line][-_REPORTED_LINES:] if line else tail
    if process.returncode != 0 or not _is_draft_folder(built):
        reason = next((line for line in reversed(tail) if "Error" in line), tail[-1] if tail else "no output")
        raise ModelError(f"cannot export {folder}: {reason}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edge_runtime.export", description="Write the draft graph of a model.")
    add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(_parse(None)))
