"""The Python API: `convert`, `plan` and `verify`; `matrix` holds `split`."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from pissa_convert.errors import RequestError
from pissa_convert.linalg.native import usable_cpus
from pissa_convert.options import RunOptions
from pissa_convert.plans.requests import choose_backend, plan_request

if TYPE_CHECKING:
    from pissa_convert.engine.ledger import ProgressCallback
    from pissa_convert.engine.verify import Progress, Verification
    from pissa_convert.engine.workers import Workers
    from pissa_convert.plans.gguf.adapter_plan import GgufAdapterPlan
    from pissa_convert.plans.gguf.plan import GgufPlan
    from pissa_convert.plans.lora_plan import LoraPlan
    from pissa_convert.plans.merge_plan import MergePlan
    from pissa_convert.plans.quant_plan import QuantPlan
    from pissa_convert.plans.requests import AnyPlan
    from pissa_convert.plans.split_plan import Plan
    from pissa_convert.report import GgufReport, LoraReport, MergeReport, QuantReport, Report, SplitReport

__all__ = ["convert", "plan", "verify"]

_RUNS = {
    "Plan": "run.run",
    "QuantPlan": "quantise.run_quantised",
    "MergePlan": "merge.run_merge",
    "GgufPlan": "gguf.run_gguf",
}
"""What walks a model by a plan, in `engine`; imported when it is needed: importing all takes as long as some splits."""

_Path = str | os.PathLike[str]


@overload
def plan(
    source: _Path,
    dest: _Path,
    to: Literal["pissa"] = "pissa",
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    **options: Any,
) -> Plan | GgufPlan: ...
@overload
def plan(
    source: _Path,
    dest: _Path,
    to: Literal["qpissa"],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    **options: Any,
) -> QuantPlan: ...
@overload
def plan(
    source: _Path,
    dest: _Path,
    to: Literal["lora"],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    **options: Any,
) -> LoraPlan: ...
@overload
def plan(
    source: _Path,
    dest: _Path,
    to: Literal["merged"],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    **options: Any,
) -> MergePlan | GgufPlan: ...
@overload
def plan(
    source: _Path,
    dest: _Path,
    to: Literal["gguf"],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    **options: Any,
) -> GgufAdapterPlan | GgufPlan: ...
def plan(
    source: _Path,
    dest: _Path,
    to: str = "pissa",
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    **options: Any,
) -> AnyPlan:
    """Say what `convert` would do, from headers alone. Writes nothing.

    The arguments are those of `convert`.

    Returns:
        What is decided for every tensor or module, the layout of every output file, exact output sizes in bytes
        (`output_sizes`), and the predicted peak of resident memory in bytes (`memory.peak`).

    Raises:
        RequestError: the request is wrong in itself or does not fit the files; FormatError (a RequestError): a file
            is malformed.
    """
    run_options = RunOptions(threads, max_memory, device=device, max_vram=max_vram)
    return plan_request(source, dest, to, options, run_options, choose_backend(to, options, run_options))


@overload
def convert(
    source: _Path,
    dest: _Path,
    to: Literal["pissa"] = "pissa",
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> SplitReport | GgufReport: ...
@overload
def convert(
    source: _Path,
    dest: _Path,
    to: Literal["qpissa"],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> QuantReport: ...
@overload
def convert(
    source: _Path,
    dest: _Path,
    to: Literal["lora"],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> LoraReport: ...
@overload
def convert(
    source: _Path,
    dest: _Path,
    to: Literal["merged"],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> MergeReport | GgufReport: ...
@overload
def convert(
    source: _Path,
    dest: _Path,
    to: Literal["gguf"],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> GgufReport: ...
def convert(
    source: _Path,
    dest: _Path,
    to: str = "pissa",
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Report:
    """Convert `source` into the new folder `dest`, streaming. What is interrupted is continued by the same call.

    to="pissa" splits the linear weights of a model folder into residual and principal adapter (PiSSA, arXiv
    2404.02948): `dest` is the residual model with the same file names, dtypes and headers, and `dest/pissa_init/` the
    adapter, which PEFT loads as it is. For every chosen weight W = W_res + s·B·A holds to the rounding of storing
    W_res. Options:

        rank: r, the number of singular directions moved into the adapter (16); at most min(shape) of each weight.
        alpha: lora_alpha, by default the rank (so that s = 1); s = alpha / rank.
        rslora: s = alpha / sqrt(rank) instead.
        target_modules: "all-linear" (every linear layer but the output head), a regular expression for whole module
            names, or a sequence of module names or name endings: PEFT's meaning.
        exclude_modules: the same, for what to leave as it is.
        adapter_dtype: "float32", "bfloat16" or "float16".
        passes: passes over each weight, or "auto": until the estimated loss of captured energy is small.
        seed: of the random start; with the tensor's name it decides all randomness.

    to="qpissa" quantises the linear weights of a model folder to 4 bits as bitsandbytes does, after an adapter has
    taken their principal part: W ≈ Q + s·B·A. `dest` loads with transformers as a 4-bit model, and
    `dest/pissa_init/` onto it with PEFT. Options: those of "pissa", and

        iterations: quantisations of each weight at most (5); after each, A and B are fitted to it again.
        quant: "nf4" or "fp4".
        double_quant: store the blocks' largest magnitudes in 8 bits (True).
        compute_dtype: "bfloat16", "float16" or "float32", what bitsandbytes multiplies in.
        quantize_only_targets: leave the linear weights without an adapter as they are.
        compare_loftq: report what LoftQ's order would have reached.

    to="lora" makes an ordinary LoRA for the original model from the adapter folder `source`, after training, and what
    it was before: ΔW = s′·B′·A′ − s·B·A, without the model, and without forming ΔW. Options:

        init: the split's folder, its `pissa_init/`, or the initial adapter folder that PEFT saved.
        base: the original model, to split it again where the initial adapter is lost; `init` may then be what is left
            of the split's folder, with its manifest; otherwise seed, passes and adapter_dtype are as given.
        rank: the largest rank, or "auto" for the smallest in each module that `tolerance` allows; by default no
            module loses anything, at the sum of both adapters' ranks.
        tolerance: ‖ΔW − B·A‖ / ‖ΔW‖ of each module with rank "auto" (1e-3).
        uniform_rank: the same rank everywhere.
        dtype: of A and B, "float32", "bfloat16" or "float16".

    to="merged" adds an adapter to the model folder `source`: W + s·B·A, in float32 and rounded once, what was trained
    whole in its place, a head that is tied no longer in a file of its own. Options:

        adapter: the adapter folder: a LoRA for the original model, or a trained PiSSA adapter for its residual, which
            may be a 4-bit base: its weights are then read back as bitsandbytes reads them.
        exact_base: instead of an adapter: read a 4-bit base back, and add nothing.
        dtype: "float32", "bfloat16" or "float16" for every floating-point tensor; by default each keeps its own.

    to="gguf" makes one file for llama.cpp, `dest`, of an adapter folder or a model folder. Options:

        base_gguf: a GGUF of the base model, of any type. An adapter is placed by its header; a model gets its keys,
            its tokenizer and its order, once names, shapes and values have shown that both are the same model.
        outtype: of an adapter "f16", "f32", "bf16" or "q8_0"; of a model "template", "f32", "f16", "bf16", "q8_0",
            "q5_0", "q5_1", "q4_0", "q4_1", and with libggml-python "q2_k" to "q6_k".
        base: of an adapter, the base model's folder instead, for its config.json alone.
        init, rank, tolerance, uniform_rank: of a trained PiSSA adapter, as for "lora": ΔW is made on the way.

    Where `source` is a GGUF, to="merged" (adapter, outtype) makes the GGUF `dest`, and to="pissa" (the options of a
    split, outtype) the folder `dest` with the GGUFs of the residual and of the principal adapter; outtype "same" is
    each tensor's own. Its target_modules are names such as "attn_q" or "blk.0.ffn_down".

    Args:
        source: the folder or GGUF to read; never written to.
        dest: what to make; must be absent, an empty folder, or an interrupted run of the same conversion.
        to: the target.
        threads: compute threads; by default every CPU this process may use. The result does not depend on it.
        max_memory: bytes of resident memory to stay under.
        device: where weights are split: "cpu", "cuda" (every GPU of the first one's kind), "cuda:N", or "auto": CUDA
            where there is a GPU. The CPU and each kind of GPU have bytes of their own, equal in accuracy.
        max_vram: bytes of each GPU's memory to stay under; by default most of what is free.
        ray: convert on the Ray cluster at this address, whose machines share the file system of `source` and `dest`,
            or with "local" in tasks on this machine. Threads, memory and, with device "cuda", one GPU are each task's.
        overwrite: replace an earlier conversion in `dest`.
        progress: called as `progress(bytes_done, bytes_in_all, timings)` from the calling thread.

    Raises:
        RequestError: nothing was done because the request or a file is wrong; the message says what to change.
        WeightError: a weight or factor holds NaN or infinity, or a result overflows its dtype.
        ConversionError: reading or writing failed; the same call continues.
    """
    run_options = RunOptions(threads, max_memory, device=device, max_vram=max_vram)
    if ray is not None:
        from pissa_convert.cluster import connect

        if to == "lora":
            raise RequestError("--ray does not apply to --to lora: it walks no model", fix="leave it out")
        with connect(ray, run_options) as cluster:
            work = cluster.plan(Path(source), Path(dest), to, options)
            if type(work).__name__ not in _RUNS:
                raise RequestError("--ray does not apply to an adapter's GGUF: it walks no model", fix="leave it out")
            return _walk(work, cluster, overwrite, progress)
    backend = choose_backend(to, options, run_options)
    work = plan_request(source, dest, to, options, run_options, backend)
    if type(work).__name__ in _RUNS:
        from pissa_convert.engine.workers import InProcess

        return _walk(work, InProcess(backend), overwrite, progress)
    from pissa_convert.engine.gguf_adapter import run_gguf_adapter
    from pissa_convert.engine.lora import run_lora
    from pissa_convert.plans.lora_plan import LoraPlan

    if isinstance(work, LoraPlan):
        return run_lora(work, backend, overwrite=overwrite, progress=progress)
    return run_gguf_adapter(cast("GgufAdapterPlan", work), overwrite=overwrite, progress=progress)


def _walk(work: AnyPlan, workers: Workers, overwrite: bool, progress: ProgressCallback | None) -> Report:
    module, name = _RUNS[type(work).__name__].split(".")
    run = getattr(import_module(f"pissa_convert.engine.{module}"), name)
    report: Report = run(work, workers, overwrite=overwrite, progress=progress)
    return report


def verify(
    dest: _Path,
    source: _Path | None = None,
    *,
    init: _Path | None = None,
    adapter: _Path | None = None,
    base_gguf: _Path | None = None,
    base: _Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a finished conversion against its manifest and, where it is given, what it was made from.

    Every file's size and BLAKE3 is compared with the manifest's, and the manifest's with its own. With `source`, its
    files are compared with their records too, what was copied is compared byte by byte, and for every split weight
    ‖W − (W_res + s·B·A)‖/‖W‖, for every module of a LoRA ‖ΔW − B·A‖/‖ΔW‖ is measured and must be what the manifest
    records, and so must the rounding of every merged weight. Memory does not grow with the model.

    Args:
        dest: the folder or file that `convert` made; nothing is written to it.
        source: the folder of the original model, or for a LoRA of the trained adapter.
        init: for a LoRA with `source`, the initial adapter, as `convert` took it.
        adapter: for a merged model with `source`, the adapter.
        base_gguf, base: for a result of to="gguf" with `source`, what it was made with.
        threads: files that are read at once, at most; by default as many as CPUs, up to four.
        progress: called as `progress(bytes_done, bytes_in_all)`, from worker threads, one call at a time.

    Raises:
        RequestError: there is no finished conversion in `dest`, or `source` is no folder.
        DamageError: something differs; its `findings` name every file and tensor that does.
    """
    from pissa_convert.engine import verify as verification
    from pissa_convert.engine.verify_jobs import Origins

    origins = Origins(*(None if path is None else Path(path) for path in (source, init, adapter, base_gguf, base)))
    return verification.verify(Path(dest), origins, threads=threads or usable_cpus(), progress=progress)
