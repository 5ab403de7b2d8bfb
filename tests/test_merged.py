"""`--to merged`: W + s·B·A, rounded once, in the files of the model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft_models
import pytest
import torch
from adapters import lora_for, splits, to_merged, write
from checkpoints import DTYPES, digests, llm_like, load_all, raw_header, small_model, write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from training import fit, load, logits

from pissa_convert import plan, verify
from pissa_convert.cli import main
from pissa_convert.errors import DamageError, RequestError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor:UserWarning"),  # PEFT, of its own lora_bias
]

DYING = str(Path(__file__).parent / "faults" / "dying.py")
TOKENS = torch.arange(3, 23)[None]


def merged_by_hand(model: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], s: float) -> dict[str, torch.Tensor]:
    """In float64, not yet rounded."""
    result = {name: tensor.double() for name, tensor in model.items()}
    for name in model:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in lora:
            result[name] += s * lora[f"{stem}.lora_B.weight"].double() @ lora[f"{stem}.lora_A.weight"].double()
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "in", small_model(), 2)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", lora_for(small_model()))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("alpha", "rslora", "s"), [(4, False, 1.0), (6, False, 1.5), (4, True, 2.0)])
def test_every_weight_is_the_sum_rounded_once_and_the_rest_is_the_same_bytes(
    tmp_path: Path, dtype: str, alpha: int, rslora: bool, s: float
) -> None:
    model = small_model(dtype=DTYPES[dtype])
    source, lora = write_model(tmp_path / "in", model, 2), lora_for(model)
    report = to_merged(source, tmp_path / "out", write(tmp_path / "lora", lora, lora_alpha=alpha, use_rslora=rslora))
    assert report.tensors == 8
    exact, result = merged_by_hand(model, lora, s), load_all(tmp_path / "out")
    assert result.keys() == model.keys()
    for name, tensor in result.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(tensor, model[name])
            continue
        once = exact[name].to(DTYPES[dtype])
        assert tensor.dtype == once.dtype
        # Added up in float32: now and then a sum beside a tie is rounded to its other side.
        assert (tensor != once).double().mean() < (0.6 if dtype == "F32" else 2e-3)
        rounding = torch.linalg.matrix_norm(once.double() - exact[name])
        error = torch.linalg.matrix_norm(tensor.double() - exact[name])
        assert error <= 1.001 * rounding + 1e-7 * torch.linalg.matrix_norm(exact[name])
    for file in source.glob("*.safetensors"):
        assert raw_header(file) == raw_header(tmp_path / "out" / file.name)
        assert file.stat().st_size == (tmp_path / "out" / file.name).stat().st_size
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("before", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("after", ["float32", "float16", "bfloat16"])
def test_with_a_dtype_every_float_is_cast_and_headers_index_and_config_follow(
    tmp_path: Path, before: str, after: str
) -> None:
    model = small_model(dtype=DTYPES[before]) | {"model.layers.0.steps": torch.arange(5)}
    source, lora = write_model(tmp_path / "in", model, 2), lora_for(small_model())
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "x"}
    (source / "config.json").write_text(json.dumps(settings))
    sizes = plan(source, tmp_path / "out", "merged", adapter=write(tmp_path / "lora", lora), dtype=after).output_sizes
    to_merged(source, tmp_path / "out", tmp_path / "lora", dtype=after)
    exact, result = merged_by_hand(model, lora, 1.0), load_all(tmp_path / "out")
    kind = getattr(torch, after)
    for name, tensor in result.items():
        if name.endswith("steps"):
            assert torch.equal(tensor, model[name])
        else:
            assert tensor.dtype == kind
            step = torch.finfo(kind).eps
            assert torch.allclose(tensor.double(), exact[name], rtol=step, atol=1e-6)
            if not name.endswith("_proj.weight"):
                assert torch.equal(tensor, model[name].to(kind))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == settings | {"dtype": after}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in result.values())
    assert sizes == {name: (tmp_path / "out" / name).stat().st_size for name in digests(tmp_path / "out")}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pissa_convert.plans.merge_steps.BLOCK", 1000)


def test_rows_lanes_and_threads_change_no_byte_of_a_bfloat16_model(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "in", small_model(dtype=torch.bfloat16), 2)
    to_merged(source, tmp_path / "whole", adapter)
    for block in (400, 1000):
        monkeypatch.setattr("pissa_convert.plans.merge_steps.BLOCK", block)
        for threads in (1, 3):
            dest = tmp_path / f"{block}-{threads}"
            to_merged(source, dest, adapter, threads=threads)
            assert digests(dest).keys() == digests(tmp_path / "whole").keys()
            for name, tensor in load_all(dest).items():
                assert torch.equal(tensor, load_all(tmp_path / "whole")[name])
        assert digests(tmp_path / f"{block}-1") == digests(tmp_path / f"{block}-3")


def trained(name: str, folder: Path, **settings: Any) -> tuple[Path, Path, torch.Tensor]:
    """A tiny model, a LoRA trained on it with PEFT, and the logits of both together."""
    peft_models.save(name, folder / "model")
    rate = settings.pop("rate", 1e-2)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    model = get_peft_model(load(folder / "model"), LoraConfig(**(options | settings)))
    fit(model, TOKENS, rate=rate)
    model.save_pretrained(folder / "adapter")
    return folder / "model", folder / "adapter", logits(model, TOKENS)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("name", "settings", "untied"),
    [
        ("llama", {}, False),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, False),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}, False),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, False),
        ("gpt2", {"fan_in_fan_out": True}, True),
        ("qwen2", {"bias": "lora_only"}, False),
        ("qwen2", {"bias": "all", "lora_bias": True, "target_modules": ["q_proj", "k_proj"]}, False),
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}, True),
        ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}, True),
        ("qwen2", {"modules_to_save": ["lm_head"]}, True),
        ("qwen2", {"modules_to_save": ["embed_tokens"]}, True),
        ("gpt2", {"modules_to_save": ["lm_head"], "fan_in_fan_out": True}, True),
    ],
)
@pytest.mark.usefixtures("small_steps")
def test_the_merged_folder_gives_peft_s_logits(
    tmp_path: Path, name: str, settings: dict[str, Any], untied: bool
) -> None:
    """The live, unmerged PEFT model is the oracle: merging in PEFT would move a tied head with its embedding."""
    source, adapter, wanted = trained(name, tmp_path, **settings)
    assert difference(logits(load(source), TOKENS), wanted) > 1e-3
    to_merged(source, tmp_path / "out", adapter)
    assert difference(logits(load(tmp_path / "out"), TOKENS), wanted) < 1e-5
    verify(tmp_path / "out", source, adapter=adapter)
    if name == "qwen2":
        assert (tmp_path / "out" / "model-00002-of-00002.safetensors").exists() is untied


def test_a_tied_model_that_was_saved_with_its_embedding_stays_tied(tmp_path: Path) -> None:
    source, adapter, wanted = trained("qwen2", tmp_path, target_modules=["q_proj"])
    model = PeftModel.from_pretrained(load(source), adapter)
    model.save_pretrained(tmp_path / "both", save_embedding_layers=True)
    assert {key.split(".")[-2] for key in load_file(tmp_path / "both" / "adapter_model.safetensors")} > {"embed_tokens"}
    to_merged(source, tmp_path / "out", tmp_path / "both")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert difference(logits(load(tmp_path / "out"), TOKENS), wanted) < 1e-5


def test_an_untied_head_is_read_in_any_dtype(tmp_path: Path) -> None:
    source, adapter, wanted = trained("qwen2", tmp_path, modules_to_save=["lm_head"])
    to_merged(source, tmp_path / "out", adapter, dtype="bfloat16")
    result = load(tmp_path / "out", "bfloat16")
    assert result.lm_head.weight.data_ptr() != result.get_input_embeddings().weight.data_ptr()
    assert difference(logits(result, TOKENS), wanted) < 0.05


def test_residual_and_adapter_give_the_same_as_original_and_lora(tmp_path: Path) -> None:
    source, split, adapter, lora = splits(tmp_path)
    to_merged(source, tmp_path / "a", lora)
    to_merged(split, tmp_path / "b", adapter)
    one, other = load_all(tmp_path / "a"), load_all(tmp_path / "b")
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=2e-7 * float(tensor.abs().max()))
    assert not (tmp_path / "b" / "pissa_init").exists()
    assert "not a complete model" not in (tmp_path / "b" / "README.md").read_text()


def test_the_untrained_adapter_on_its_residual_gives_the_original(tmp_path: Path) -> None:
    source, split, _, _ = splits(tmp_path)
    to_merged(split, tmp_path / "out", split / "pissa_init")
    for name, tensor in load_all(tmp_path / "out").items():
        assert torch.allclose(tensor, load_all(source)[name], rtol=0, atol=2e-7)


def run_dying(name: str, call: int, arguments: list[str]) -> int:
    command = [sys.executable, DYING, name, str(call), "before", *arguments]
    return subprocess.run(command, check=False, capture_output=True, cwd=Path(DYING).parent).returncode


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_killed_at_every_rename_the_same_command_continues_to_the_same_bytes(tmp_path: Path, dtype: str | None) -> None:
    source, adapter, _ = trained("qwen2", tmp_path, modules_to_save=["lm_head"])
    options = [] if dtype is None else ["--dtype", dtype]
    to_merged(source, tmp_path / "whole", adapter, **({} if dtype is None else {"dtype": dtype}))
    expected = digests(tmp_path / "whole")
    for call in range(1, len(expected) + 1):
        dest = tmp_path / f"{call}"
        arguments = [str(source), str(dest), "--to", "merged", "--adapter", str(adapter), "--quiet", *options]
        assert run_dying("replace", call, arguments) == -signal.SIGKILL
        assert not (dest / "pissa_convert.json").exists()
        assert main(arguments) == 0
        assert digests(dest) == expected


@pytest.mark.usefixtures("small_steps")
def test_what_an_interrupted_run_has_done_is_kept(source: Path, adapter: Path, tmp_path: Path) -> None:
    to_merged(source, tmp_path / "whole", adapter)
    calls = []

    def stop(done: int, total: int, timings: Any) -> None:
        calls.append(done)
        if done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_merged(source, tmp_path / "out", adapter, progress=stop)
    again: list[int] = []
    report = to_merged(source, tmp_path / "out", adapter, progress=lambda done, total, timings: again.append(done))
    assert report.resumed
    assert again[0] > 0.5 * again[-1]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_verify_finds_a_wrong_weight_whose_digest_is_right(source: Path, adapter: Path, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    to_merged(source, dest, adapter)
    before = digests(dest)
    assert verify(dest).files == len(before)
    assert verify(dest, source, adapter=adapter).tensors == 8
    with pytest.raises(RequestError, match="two folders"):
        verify(dest, source)
    other = write(tmp_path / "other", lora_for(small_model(), seed=5))
    with pytest.raises(DamageError) as caught:
        verify(dest, source, adapter=other)
    assert any("W + s·B·A" in str(finding) for finding in caught.value.findings)
    file = next(dest.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if not name.endswith("_proj.weight"))
    tensors[name] = tensors[name] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DamageError) as caught:
        verify(dest, source, adapter=adapter)
    assert any("copied" in str(finding) for finding in caught.value.findings)


PEAK = (
    "import sys; from pissa_convert import convert;"
    "print(convert(sys.argv[1], sys.argv[3], 'merged', adapter=sys.argv[2]).peak_memory)"
)


def test_memory_does_not_grow_with_the_matrix(tmp_path: Path) -> None:
    peaks, sizes = [], (4096, 32768)
    for rows in sizes:
        model = {"x.q_proj.weight": torch.randn(8, 2048).repeat(rows // 8, 1).bfloat16()}
        folder = tmp_path / f"{rows}"
        command = [sys.executable, "-c", PEAK, str(write_model(folder / "in", model))]
        command += [str(write(folder / "a", lora_for(model))), str(folder / "out")]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 2 * (sizes[1] - sizes[0]) * 2048 * 2  # of bfloat16
    assert peaks[1] < 512 << 20


def test_a_card_keeps_the_model_s_own(source: Path, adapter: Path, tmp_path: Path) -> None:
    to_merged(source, tmp_path / "out", adapter)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert "# Merged model" in card
    assert card.rstrip().endswith("# a model")


def test_llm_like_weights_of_16_bits_are_within_half_a_step(tmp_path: Path) -> None:
    weight = llm_like(300, 200, dtype=torch.bfloat16)
    lora = lora_for({"m.q_proj.weight": weight}, rank=8)
    source = write_model(tmp_path / "in", {"m.q_proj.weight": weight})
    to_merged(source, tmp_path / "out", write(tmp_path / "a", lora))
    exact = merged_by_hand({"m.q_proj.weight": weight}, lora, 1.0)["m.q_proj.weight"].numpy()
    stored = load_all(tmp_path / "out")["m.q_proj.weight"].double().numpy()
    step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert (np.abs(stored - exact) <= 0.5001 * step + 1e-7).all()


_UNABLE = {
    "mixtral": "target_parameters",
    "qwen3_moe": "target_parameters",
    "olmoe": "target_parameters",
    "deepseek_v3": "target_parameters",
    "nomic_bert": "no weight for it",
}
"""What is refused: PEFT adapts the fused experts of these, and renames the layers of the last."""

_NOT_BY_PEFT = ("bert tagger", "bert reader", "phimoe", "mamba")
"""PEFT 0.21 does not make, or not run, an adapter for all linear layers of these."""

_UNUSED = {"siglip": r".*head\.attention\.out_proj"}
"""Layers whose weight torch's attention reads itself: a live adapter on them has no effect, and a merged one has."""


@pytest.mark.parametrize("name", [name for name in peft_models.NAMES if name not in _NOT_BY_PEFT])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # PEFT, of its own keys
def test_every_architecture_s_layers_are_found_by_their_names(name: str, tmp_path: Path) -> None:
    """Names on disk against names at run time: transformers and PEFT are the oracle for both."""
    peft_models.save(name, tmp_path / "model")
    model = peft_models.load(tmp_path / "model").eval()
    torch.manual_seed(1)
    config = LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules="all-linear",
        exclude_modules=_UNUSED.get(name),
        init_lora_weights=False,
        task_type=peft_models.task_of(tmp_path / "model"),
    )
    peft = get_peft_model(model, config).eval()
    wanted = peft_models.outputs(name, peft)
    peft.save_pretrained(tmp_path / "adapter")
    if name in _UNABLE:
        with pytest.raises(RequestError, match=_UNABLE[name]):
            to_merged(tmp_path / "model", tmp_path / "out", tmp_path / "adapter")
        return
    to_merged(tmp_path / "model", tmp_path / "out", tmp_path / "adapter")
    found = peft_models.outputs(name, peft_models.load(tmp_path / "out").eval())
    assert difference(found, wanted) < 1e-5
