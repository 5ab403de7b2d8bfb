"""The journey with PEFT on SmolLM2: split, train, convert, and the original with our LoRA is the trained model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft_models
import pytest
import torch
from adapters import products
from checkpoints import digests, load_all
from peft import PeftModel
from training import fit, load, logits, shortened, tokens_of, with_adapter, with_pissa

from pissa_convert import convert
from pissa_convert.errors import ConversionError, RequestError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@dataclass(frozen=True)
class Journey:
    """A model, its split, and an adapter trained on it.

    Attributes:
        wanted: the trained model's logits.
    """

    model: Path
    split: Path
    trained: Path
    tokens: torch.Tensor
    wanted: torch.Tensor


def travel(model: Path, folder: Path, dtype: str = "float32", rate: float = 1e-3, **options: Any) -> Journey:
    split = folder / "split"
    if not split.exists():
        convert(model, split, **options)
    tokens = tokens_of(model)
    peft = PeftModel.from_pretrained(load(split, dtype), split, subfolder="pissa_init", is_trainable=True)
    fit(peft, tokens, rate=rate)
    trained = folder / f"trained-{rate}"
    peft.save_pretrained(trained)
    return Journey(model, split, trained, tokens, logits(peft, tokens))


@pytest.fixture(scope="module")
def short(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shortened(smol, tmp_path_factory.mktemp("short") / "model", 3, "float32")


@pytest.fixture(scope="module")
def journey(short: Path) -> Journey:
    return travel(short, short.parent, rank=8, alpha=12.0)


def test_all_of_smollm2_in_float32_gives_the_trained_logits(smol: Path, tmp_path: Path) -> None:
    whole = travel(shortened(smol, tmp_path / "model", 30, "float32"), tmp_path)
    report = convert(whole.trained, tmp_path / "lora", "lora", init=whole.split)
    assert report.warnings == ()
    base = load(whole.model)
    untrained = logits(base, whole.tokens)
    assert difference(untrained, whole.wanted) > 0.1
    assert difference(logits(with_adapter(base, tmp_path / "lora"), whole.tokens), whole.wanted) < 1e-5


def test_peft_and_a_plain_sum_by_numpy_agree_with_the_trained_weights(journey: Journey, tmp_path: Path) -> None:
    convert(journey.trained, tmp_path / "lora", "lora", init=journey.split)
    trained = PeftModel.from_pretrained(load(journey.split), journey.trained).merge_and_unload().state_dict()
    ours = with_adapter(load(journey.model), tmp_path / "lora").merge_and_unload().state_dict()
    original, changes = load_all(journey.model), products(tmp_path / "lora")
    assert len(changes) == 21
    for module, change in changes.items():
        name = f"{module}.weight"
        plain = original[name].double().numpy() + change
        size = np.linalg.norm(plain)
        assert np.linalg.norm(plain - trained[name].double().numpy()) < 1e-6 * size
        assert np.linalg.norm(plain - ours[name].double().numpy()) < 1e-7 * size


def test_merged_folders_give_the_trained_logits_and_peft_s_weights(journey: Journey, tmp_path: Path) -> None:
    convert(journey.trained, tmp_path / "lora", "lora", init=journey.split)
    convert(journey.model, tmp_path / "a", "merged", adapter=tmp_path / "lora")
    convert(journey.split, tmp_path / "b", "merged", adapter=journey.trained)
    by_peft = PeftModel.from_pretrained(load(journey.split), journey.trained).merge_and_unload().state_dict()
    for name in ("a", "b"):
        assert difference(logits(load(tmp_path / name), journey.tokens), journey.wanted) < 1e-5
        for tensor, values in load_all(tmp_path / name).items():
            assert torch.linalg.vector_norm(values - by_peft[tensor]) <= 1e-6 * torch.linalg.vector_norm(values)
    with pytest.raises(RequestError, match="made for the original model"):
        convert(journey.split, tmp_path / "c", "merged", adapter=tmp_path / "lora")
    with pytest.raises(RequestError, match="still holds what the adapter took out of it"):
        convert(journey.model, tmp_path / "c", "merged", adapter=journey.trained)


def test_the_classic_mistake_that_is_refused_is_noise(journey: Journey) -> None:
    """What would come out: PEFT loads the trained adapter onto the original without a word."""
    tokens = journey.tokens
    wrong = PeftModel.from_pretrained(load(journey.model), journey.trained)
    with torch.no_grad():
        losses = [float(model(input_ids=tokens, labels=tokens).loss) for model in (wrong, load(journey.model))]
    assert losses[0] > losses[1] + 1


def test_the_adapter_folder_alone_is_enough(journey: Journey, tmp_path: Path) -> None:
    """And a copy of it elsewhere gives the same tensors: the model is never opened."""
    alone = Path(shutil.copytree(journey.split / "pissa_init", tmp_path / "alone"))
    convert(journey.trained, tmp_path / "a", "lora", init=journey.split / "pissa_init")
    convert(journey.trained, tmp_path / "b", "lora", init=alone)
    file = "adapter_model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_two_adapters_from_one_init_load_together_on_one_base(journey: Journey, tmp_path: Path) -> None:
    other = travel(journey.model, journey.split.parent, rate=3e-3)
    assert other.split == journey.split
    changes = []
    for name, source in (("first", journey), ("second", other)):
        convert(source.trained, tmp_path / name, "lora", init=source.split)
        changes.append(products(tmp_path / name))
    model = with_adapter(load(journey.model), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", "second")
    for name, source in (("first", journey), ("second", other), ("first", journey)):
        model.set_adapter(name)
        assert difference(logits(model, source.tokens), source.wanted) < 1e-5
    model.base_model.set_adapter(["first", "second"])
    both = load(journey.model)
    state = both.state_dict()
    for module in changes[0]:
        state[f"{module}.weight"] += torch.from_numpy(changes[0][module] + changes[1][module]).float()
    assert difference(logits(model, journey.tokens), logits(both, journey.tokens)) < 1e-5


def peft_conversion(model: PeftModel, init: Path, dest: Path) -> None:
    model.save_pretrained(dest, path_initial_model_for_weight_conversion=str(init))


def test_bfloat16_is_not_worse_than_peft_s_own_conversion(smol: Path, tmp_path: Path) -> None:
    """Both from what PEFT itself split, trained and saved, on the same bfloat16 base."""
    model = shortened(smol, tmp_path / "model", 3, "bfloat16")
    tokens = tokens_of(model)
    peft = with_pissa(load(model, "bfloat16"), tmp_path / "init")
    fit(peft, tokens)
    peft.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "ours", "lora", init=tmp_path / "init")
    peft_conversion(peft, tmp_path / "init", tmp_path / "theirs")
    wanted = logits(peft, tokens)
    exactly = logits(peft.float(), tokens)
    errors, weights = {}, {}
    for name in ("ours", "theirs"):
        loaded = PeftModel.from_pretrained(load(model, "bfloat16"), tmp_path / name)
        errors[name] = float((logits(loaded, tokens) - wanted).norm() / wanted.norm())
        # The same weights in float arithmetic, where products in bfloat16 do not drown what they differ by.
        weights[name] = float((logits(loaded.float(), tokens) - exactly).norm() / exactly.norm())
    assert errors["ours"] < 2e-2  # bfloat16 has steps of 2^-8, and the residual was rounded to it
    assert errors["ours"] <= 1.05 * errors["theirs"]
    assert weights["ours"] <= 1.001 * weights["theirs"] < 2e-3


def test_cast_to_bfloat16_as_servers_do_it_is_far_closer_than_peft_s_own_conversion(
    journey: Journey, tmp_path: Path
) -> None:
    init = Path(shutil.copytree(journey.split / "pissa_init", tmp_path / "init"))  # PEFT writes into it
    convert(journey.trained, tmp_path / "ours", "lora", init=journey.split)
    peft_conversion(PeftModel.from_pretrained(load(journey.split), journey.trained), init, tmp_path / "theirs")
    trained, before = products(journey.trained), products(journey.split / "pissa_init")
    exact = {module: 12 / 8 * (product - before[module]) for module, product in trained.items()}
    in_logits, in_weights = {}, {}
    for name in ("ours", "theirs"):
        model = PeftModel.from_pretrained(load(journey.model), tmp_path / name)
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.data = parameter.data.bfloat16().float()
        # The logits of one text are one draw of the rounding; the weights have thousands.
        in_logits[name] = float((logits(model, journey.tokens) - journey.wanted).norm() / journey.wanted.norm())
        in_weights[name] = sum(
            np.linalg.norm(
                model.get_submodule(f"base_model.model.{module}").get_delta_weight("default").double().numpy() - change
            )
            ** 2
            for module, change in exact.items()
        )
    assert in_logits["ours"] < in_logits["theirs"]
    assert 20**2 * in_weights["ours"] < in_weights["theirs"]


def test_ranks_of_their_own_load_with_peft_without_a_word(journey: Journey, tmp_path: Path) -> None:
    report = convert(journey.trained, tmp_path / "lora", "lora", init=journey.split, rank="auto", tolerance=0.4)
    ranks = {module: entry["rank"] for module, entry in report.modules.items()}
    assert len(set(ranks.values())) > 1
    model = with_adapter(load(journey.model), tmp_path / "lora")
    changes = products(tmp_path / "lora")
    for module, rank in ranks.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == 1
        found = layer.get_delta_weight("default").detach().double().numpy()
        assert np.linalg.norm(found - changes[module]) < 1e-6 * np.linalg.norm(found)


@pytest.mark.parametrize(
    ("settings", "fails"),
    [({"modules_to_save": ["lm_head"]}, "at loading"), ({"bias": "lora_only"}, "at once")],
)
def test_what_peft_s_own_conversion_fails_on_is_carried_over(
    smol: Path, tmp_path: Path, settings: dict[str, Any], fails: str
) -> None:
    model = shortened(smol, tmp_path / "model", 2, "float32")
    if "bias" in settings:
        model = biased(model)
    tokens = tokens_of(model)
    peft = with_pissa(load(model), tmp_path / "init", target_modules=["q_proj", "down_proj"], **settings)
    fit(peft, tokens, rate=1e-2)
    peft.save_pretrained(tmp_path / "trained")
    wanted = logits(peft, tokens)
    convert(tmp_path / "trained", tmp_path / "ours", "lora", init=tmp_path / "init")
    ours = logits(PeftModel.from_pretrained(load(model), tmp_path / "ours"), tokens)
    assert difference(ours, wanted) < 1e-5
    if fails == "at once":
        with pytest.raises(ValueError, match="init"):
            peft_conversion(peft, tmp_path / "init", tmp_path / "theirs")
        return
    peft_conversion(peft, tmp_path / "init", tmp_path / "theirs")
    with pytest.raises(KeyError, match="lm_head"):
        PeftModel.from_pretrained(load(model), tmp_path / "theirs")


def test_weights_stored_in_out_are_no_different(tmp_path: Path) -> None:
    model = tmp_path / "gpt2"
    peft_models.save("gpt2", model)
    convert(model, tmp_path / "split", rank=4)
    tokens = torch.arange(20)[None]
    peft = PeftModel.from_pretrained(
        load(tmp_path / "split"), tmp_path / "split", subfolder="pissa_init", is_trainable=True
    )
    fit(peft, tokens, rate=1e-2)
    peft.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "lora", "lora", init=tmp_path / "split")
    convert(tmp_path / "trained", tmp_path / "again", "lora", base=model)
    base = load(model)
    assert difference(logits(base, tokens), logits(peft, tokens)) > 1e-3
    assert difference(logits(with_adapter(base, tmp_path / "lora"), tokens), logits(peft, tokens)) < 1e-5
    file = "adapter_model.safetensors"
    assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def biased(model: Path) -> Path:
    """The same with biases in the attention, which Llama's configuration allows."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    load(model).save_pretrained(model)
    return model


def test_the_init_is_derived_again_to_the_byte_and_gives_the_same_lora(journey: Journey, tmp_path: Path) -> None:
    convert(journey.trained, tmp_path / "kept", "lora", init=journey.split)
    remains = tmp_path / "remains"
    remains.mkdir()
    shutil.copy(journey.split / "pissa_convert.json", remains)
    with pytest.raises(RequestError, match=r"the initial adapter is missing.*--base"):
        convert(journey.trained, tmp_path / "a", "lora", init=remains)
    by_manifest = convert(journey.trained, tmp_path / "a", "lora", base=journey.model, init=remains)
    alone = convert(journey.trained, tmp_path / "b", "lora", base=journey.model)
    assert by_manifest.warnings == ()
    assert "no manifest proves" in alone.warnings[0]
    kept = digests(tmp_path / "kept")["adapter_model.safetensors"]
    for name in ("a", "b"):
        assert digests(tmp_path / name)["adapter_model.safetensors"] == kept
        manifest = json.loads((tmp_path / name / "pissa_convert.json").read_text())
        record = manifest["source"]["init/adapter_model.safetensors"]
        assert record["blake3"] == digests(journey.split)["pissa_init/adapter_model.safetensors"]


def test_another_model_or_seed_is_not_mistaken_for_the_one_that_was_split(journey: Journey, tmp_path: Path) -> None:
    remains = tmp_path / "remains"
    remains.mkdir()
    shutil.copy(journey.split / "pissa_convert.json", remains)
    with pytest.raises(ConversionError, match="not found again from --base"):
        convert(journey.trained, tmp_path / "residual", "lora", base=without_manifest(journey.split), init=remains)
    assert not (tmp_path / "residual" / "adapter_config.json").exists()
    with pytest.raises(RequestError, match="--seed is recorded"):
        convert(journey.trained, tmp_path / "seed", "lora", base=journey.model, init=remains, seed=3)
    convert(journey.trained, tmp_path / "kept", "lora", init=journey.split)
    convert(journey.trained, tmp_path / "other", "lora", base=journey.model, seed=3)
    file = "adapter_model.safetensors"
    assert (tmp_path / "kept" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def without_manifest(split: Path) -> Path:
    """The residual as it looks when only the model's files were copied."""
    dest = split.parent / "residual"
    if not dest.exists():
        dest.mkdir()
        for file in split.iterdir():
            if file.is_file() and file.name != "pissa_convert.json":
                os.link(file, dest / file.name)
    return dest


def test_an_init_that_was_trained_in_place_is_noticed(journey: Journey, tmp_path: Path) -> None:
    split = tmp_path / "split"
    shutil.copytree(journey.split / "pissa_init", split / "pissa_init")
    shutil.copy(journey.split / "pissa_convert.json", split)
    shutil.copy(journey.trained / "adapter_model.safetensors", split / "pissa_init")
    with pytest.raises(RequestError, match=r"has changed since the split.*--base"):
        convert(journey.trained, tmp_path / "out", "lora", init=split)
    convert(journey.trained, tmp_path / "out", "lora", init=split, base=journey.model)
    convert(journey.trained, tmp_path / "kept", "lora", init=journey.split)
    file = "adapter_model.safetensors"
    assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_model_that_has_no_such_weights_is_refused(journey: Journey, minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--base has no weight|no weight is left"):
        convert(journey.trained, tmp_path / "out", "lora", base=minilm)
