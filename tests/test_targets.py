"""What is split agrees with what PEFT targets on the loaded model, told from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import peft_models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2Model

from pissa_convert.errors import RequestError
from pissa_convert.plans.targets import Action, Decision, compact_target_modules, decide, parse_targets

# PEFT asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LEFT_ALONE = {
    "nomic_bert": "transformers splits and renames its layers at loading, so nothing is proven from headers",
}
"""Architectures whose layers are not split although PEFT would target them, with the reason."""

BYPASSED = {
    "siglip": {"vision_model.head.attention.out_proj"},
    "gemma3": {"model.vision_tower.head.attention.out_proj"},
}
"""What PEFT targets in vain: the model reads these layers' weights without calling them."""

TUPLES = {"phimoe": {f"model.layers.{layer}.mlp.router" for layer in range(2)}}
"""What PEFT targets and then fails to run: linear layers that return a tuple."""

HEAD_LEFT_WHOLE = {
    "bert tagger": ("TOKEN_CLS", "classifier"),
    "bert reader": ("QUESTION_ANS", "qa_outputs"),
}
"""Where PEFT stumbles over its own "all-linear": it targets the head, then wants to train it whole."""

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "num_hidden_layers": 2,
}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


def tensors(*names: str, dtype: str = "BF16", shape: tuple[int, ...] = (32, 32)) -> list[peft_models.Tensor]:
    return [(name, dtype, (32,) if "norm" in name or name.endswith("bias") else shape) for name in names]


LAYER = tensors(
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "lm_head.weight",
)


def split(decisions: tuple[Decision, ...]) -> set[str]:
    return {d.module for d in decisions if d.action is Action.SPLIT}


def reason(decisions: tuple[Decision, ...], tensor: str) -> str:
    return next(d.reason for d in decisions if d.tensor == tensor and d.action is Action.COPY)


def targeted_by_peft(folder: Path, targets: str | list[str] = "all-linear") -> set[str]:
    config = LoraConfig(r=2, target_modules=targets, task_type=peft_models.task_of(folder))
    return set(get_peft_model(peft_models.load(folder), config).base_model.targeted_module_names)


def decided(folder: Path, targets: str | list[str] = "all-linear") -> tuple[Decision, ...]:
    return decide(peft_models.headers(folder), peft_models.read_config(folder), targets)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    "name", [name for name in peft_models.NAMES if name not in {*LEFT_ALONE, *HEAD_LEFT_WHOLE, "mamba"}]
)
def test_all_linear_is_what_peft_targets_on_the_loaded_model(name: str, tmp_path: Path) -> None:
    peft_models.save(name, tmp_path)
    decisions = decided(tmp_path)
    assert [d.tensor for d in decisions] == [tensor[0] for tensor in peft_models.headers(tmp_path)]
    assert all(d.reason for d in decisions)
    assert split(decisions) == targeted_by_peft(tmp_path) - (BYPASSED | TUPLES).get(name, set())


@pytest.mark.parametrize("name", HEAD_LEFT_WHOLE)
def test_a_task_head_is_left_for_peft_to_train_whole(name: str, tmp_path: Path) -> None:
    task, head = HEAD_LEFT_WHOLE[name]
    peft_models.save(name, tmp_path)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        targeted_by_peft(tmp_path)
    without_task = get_peft_model(peft_models.load(tmp_path), LoraConfig(r=2, target_modules="all-linear"))
    assert split(decided(tmp_path)) == set(without_task.base_model.targeted_module_names) - {head}
    assert peft_models.task_of(tmp_path) == task


@pytest.mark.parametrize("name", [name for name in peft_models.NAMES if name not in LEFT_ALONE])
def test_a_split_weight_is_the_weight_of_the_module_it_is_named_by(name: str, tmp_path: Path) -> None:
    peft_models.save(name, tmp_path)
    stored, model = peft_models.weights(tmp_path), peft_models.load(tmp_path)
    for decision in decided(tmp_path):
        if decision.action is Action.SPLIT:
            module = model.get_submodule(decision.module)
            assert torch.equal(stored[decision.tensor], module.weight)
            assert decision.fan_in_fan_out == (type(module).__name__ == "Conv1D")


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_layers_that_are_not_proven_to_load_are_refused_as_a_whole(name: str, tmp_path: Path) -> None:
    peft_models.save(name, tmp_path)
    with pytest.raises(RequestError, match="renames this model's layers at loading"):
        decided(tmp_path)


def test_of_a_mamba_block_only_the_layer_that_is_called_on_every_device_is_split(tmp_path: Path) -> None:
    peft_models.save("mamba", tmp_path)
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        targeted_by_peft(tmp_path)
    assert split(decided(tmp_path)) == targeted_by_peft(tmp_path, ["in_proj"])


@pytest.mark.parametrize("name", BYPASSED)
def test_a_layer_that_is_never_called_is_left_because_its_adapter_would_do_nothing(name: str, tmp_path: Path) -> None:
    peft_models.save(name, tmp_path)
    decisions = decided(tmp_path)
    left = [d for d in decisions if "directly" in d.reason]
    assert {d.tensor.rpartition(".")[0].removeprefix("model.") for d in left} == {
        module.removeprefix("model.") for module in BYPASSED[name]
    }
    with pytest.raises(RequestError, match="would have no effect") as error:
        decided(tmp_path, ["out_proj"])
    assert error.value.tensor == left[0].tensor


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen2_moe", "mixtral"])
def test_every_expert_matrix_is_copied_and_says_why(name: str, tmp_path: Path) -> None:
    peft_models.save(name, tmp_path)
    experts = [d for d in decided(tmp_path) if ".experts." in d.tensor]
    assert experts
    assert all(d.action is Action.COPY and "expert" in d.reason for d in experts)


def test_shared_expert_is_left_where_peft_takes_its_name_for_the_fused_experts(tmp_path: Path) -> None:
    peft_models.save("deepseek_v3", tmp_path)
    decisions = decided(tmp_path)
    assert "PEFT takes" in reason(decisions, "model.layers.1.mlp.shared_experts.gate_proj.weight")
    with pytest.raises(RequestError, match=r"layers\.0\.mlp\.gate_proj\.weight'.*PEFT takes"):
        decided(tmp_path, ["gate_proj"])


@pytest.mark.parametrize(
    "targets",
    [["q_proj"], ["self_attn.q_proj", "down_proj"], r".*\.layers\.1\.mlp\..*_proj", r".*\.[qv]_proj"],
)
def test_explicit_targets_mean_what_they_mean_to_peft(targets: str | list[str], tmp_path: Path) -> None:
    peft_models.save("llama", tmp_path)
    assert split(decided(tmp_path, targets)) == targeted_by_peft(tmp_path, targets)


@pytest.mark.parametrize("exclude", [["q_proj"], ["layers.0.mlp.down_proj", "k_proj"], r".*\.layers\.0\..*"])
def test_excluding_wins_over_targeting_as_in_peft(exclude: str | list[str], tmp_path: Path) -> None:
    peft_models.save("llama", tmp_path)
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=exclude)
    expected = set(get_peft_model(peft_models.load(tmp_path), config).base_model.targeted_module_names)
    found = decide(peft_models.headers(tmp_path), peft_models.read_config(tmp_path), exclude=exclude)
    assert split(found) == expected


def test_an_untied_head_is_split_when_asked_for_by_name() -> None:
    assert split(decide(LAYER, LLAMA, ["lm_head", "q_proj"])) >= {"lm_head"}
    assert "output head" in reason(decide(LAYER, LLAMA), "lm_head.weight")


@pytest.mark.parametrize("tied", [{"tie_word_embeddings": True}, {}])
def test_a_head_that_may_be_tied_is_refused_by_name(tied: dict[str, bool]) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"} | tied
    with pytest.raises(RequestError, match=r"'lm_head\.weight': cannot be split: output head, tied"):
        decide(LAYER, config, ["lm_head"])
    without = [tensor for tensor in LAYER if tensor[0] != "lm_head.weight"]
    with pytest.raises(RequestError, match=r"'lm_head\.weight': cannot be split: output head, tied"):
        decide(without, config, ["lm_head", "q_proj"])


@pytest.mark.parametrize(
    ("tensor", "target", "found"),
    [
        (("model.embed_tokens.weight", "BF16", (96, 32)), "embed_tokens", "embedding"),
        (("model.layers.0.input_layernorm.weight", "BF16", (32,)), "input_layernorm", "norm or bias"),
        (("model.patch_conv.weight", "BF16", (32, 3, 8, 8)), "patch_conv", "convolution"),
        (("model.layers.0.mlp.experts.3.w1.weight", "BF16", (32, 32)), "w1", "expert of a mixture"),
        (("model.layers.0.mlp.experts.gate_up_proj", "BF16", (4, 32, 32)), "experts", "experts fused"),
        (("model.layers.2.self_attn.v_proj.weight", "BF16", (32, 32)), "v_proj", "not loaded"),
    ],
)
def test_a_target_that_cannot_be_split_is_refused_by_tensor_name(
    tensor: peft_models.Tensor, target: str, found: str
) -> None:
    with pytest.raises(RequestError, match=found) as error:
        decide([*LAYER, tensor], LLAMA, [target, "q_proj"])
    assert error.value.tensor == tensor[0]
    assert error.value.fix is not None
    assert found in reason(decide([*LAYER, tensor], LLAMA), tensor[0])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "F64", "BOOL"])
def test_a_linear_layer_in_another_dtype_is_refused_by_tensor_name(dtype: str) -> None:
    odd = tensors("model.layers.0.mlp.up_proj.weight", dtype=dtype)
    with pytest.raises(RequestError, match=f"expected BF16 or F16 or F32, found {dtype}") as error:
        decide([*LAYER, *odd], LLAMA)
    assert error.value.tensor == odd[0][0]
    assert reason(decide([*LAYER, *odd], LLAMA, exclude=["up_proj"]), odd[0][0]).startswith("excluded")


def test_an_embedding_in_another_dtype_does_not_matter() -> None:
    assert split(decide([("model.embed_tokens.weight", "F8_E4M3", (9, 8)), *LAYER[1:]], LLAMA))


@pytest.mark.parametrize("inside", [{}, {"text_config": {}}])
def test_a_quantised_model_is_refused_before_its_tensors_are_looked_at(inside: dict[str, object]) -> None:
    quantisation = {"quantization_config": {"quant_method": "fp8"}}
    config = LLAMA | (dict.fromkeys(inside, quantisation) or quantisation)
    with pytest.raises(RequestError, match=r"quantised already.*fp8.*dequantise"):
        decide(LAYER, config)


@pytest.mark.parametrize(
    "suffix", ["qweight", "weight_packed", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"]
)
def test_packed_weights_are_refused_although_the_config_is_silent(suffix: str) -> None:
    packed = f"model.layers.0.mlp.up_proj.{suffix}"
    with pytest.raises(RequestError, match="quantised already") as error:
        decide([*LAYER, (packed, "U8", (32, 32))], LLAMA)
    assert error.value.tensor == packed


def test_a_target_that_nothing_matches_is_answered_with_names_that_exist() -> None:
    with pytest.raises(RequestError, match=r"q_proj, o_proj, down_proj.*model\.layers\.0\.self_attn\.q_proj"):
        decide(LAYER, LLAMA, ["query"])
    with pytest.raises(RequestError, match="no weight is left"):
        decide(LAYER, LLAMA, ["q_proj"], exclude=["q_proj"])


@pytest.mark.parametrize("option", ["targets", "exclude"])
def test_a_malformed_regular_expression_is_a_wrong_request(option: str) -> None:
    with pytest.raises(RequestError, match="not a regular expression"):
        decide(LAYER, LLAMA, **{option: "(q_proj"})


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        ([r".*\.q_proj"], r".*\.q_proj"),
        (["model.layers.0.(q|k)_proj"], "model.layers.0.(q|k)_proj"),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_command_line_words_become_the_form_peft_takes(words: list[str], meaning: str | list[str]) -> None:
    assert parse_targets(words) == meaning


def test_layers_for_multi_token_prediction_are_copied() -> None:
    extra = tensors("model.layers.2.self_attn.q_proj.weight", "mtp.layers.0.mlp.up_proj.weight")
    decisions = decide([*LAYER, *extra], LLAMA)
    assert {reason(decisions, name) for name, _, _ in extra} == {"not loaded by transformers"}


def test_a_base_model_file_is_named_as_the_model_with_a_head_holds_it(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=16, vocab_size=96, bos_token_id=1, eos_token_id=2)
    GPT2Model(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(peft_models.read_config(tmp_path) | GPT2))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        expected = targeted_by_peft(tmp_path)
    assert split(decided(tmp_path)) == expected
    assert "transformer.h.0.attn.c_attn" in expected


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2 classifier", "bert", "t5 gated", "opt", "llava", "vit", "clip", "whisper", "qwen2_moe"],
)
@pytest.mark.parametrize("part", ["all", "some"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_peft_expands_the_compact_names_to_exactly_the_selected_modules(name: str, part: str, tmp_path: Path) -> None:
    peft_models.save(name, tmp_path)
    decisions = decided(tmp_path)
    every = sorted(split(decisions))
    selected = set(every if part == "all" else every[::3])
    names = compact_target_modules({d.module for d in decisions}, selected)
    assert targeted_by_peft(tmp_path, names) == selected
    assert names == sorted(names)


def test_compact_names_are_last_components_where_those_select_nothing_else() -> None:
    every = {"a.0.q", "a.0.k", "a.1.q", "a.1.k"}
    assert compact_target_modules(every, {"a.0.q", "a.1.q"}) == ["q"]
    assert compact_target_modules(every, {"a.0.q", "a.1.q", "a.1.k"}) == ["a.1.k", "q"]
    assert compact_target_modules({"mlp.0", "layers.0.q"}, {"mlp.0"}) == ["mlp.0"], "layers.0 is a module too"


@pytest.mark.parametrize(
    "nonsense",
    [
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [None]},
        {"architectures": 5},
        {"model_type": ["llama"]},
        {"model_type": None, "text_config": []},
        {"text_config": {"model_type": {}, "num_hidden_layers": "two"}},
        {"num_hidden_layers": None, "num_kv_shared_layers": "all"},
        {"tie_word_embeddings": "no"},
    ],
)
def test_a_config_of_the_wrong_types_does_not_break_the_decisions(nonsense: dict[str, object]) -> None:
    assert "model.layers.0.self_attn.q_proj" in split(decide(LAYER, LLAMA | nonsense))
