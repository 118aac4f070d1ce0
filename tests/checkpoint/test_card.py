"""The model card: valid front matter, what it says of the adapter, and a snippet that runs."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from tests.tiny_chat import save_tiny
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, ViTConfig, ViTForImageClassification

from reftune import Intervention, ReftConfig, get_reft_model, register_intervention
from reftune.checkpoint.card import FORMULAS, formula, layers_in_words, model_card, positions_in_words
from reftune.interventions import INTERVENTIONS


def card_of(config: ReftConfig, **changes) -> str:
    facts = {"sites": ["model.layers.15.output"], "parameters": 4612, "nbytes": 19_512, "versions": {"reftune": "1"}}
    return model_card(config, **(facts | changes))


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


def test_the_front_matter_is_what_the_hub_reads() -> None:
    config = ReftConfig(task_type="CAUSAL_LM", base_model_name_or_path="org/base-1.0")
    assert front(card_of(config)) == {
        "base_model": "org/base-1.0",
        "library_name": "peft",
        "tags": ["reft", "reftune", "peft"],
        "pipeline_tag": "text-generation",
    }


@pytest.mark.parametrize("base", [None, "/home/someone/model", "./model", "model.gguf", "C:\\model"])
def test_a_base_that_is_no_hub_id_is_not_in_the_front_matter(base: str | None) -> None:
    assert "base_model" not in front(card_of(ReftConfig(base_model_name_or_path=base)))


def test_a_base_that_is_a_directory_here_is_not_in_the_front_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front(card_of(ReftConfig(base_model_name_or_path="models/tiny")))


def test_the_bundled_model_is_named_by_its_hub_id_and_loaded_by_reftune() -> None:
    card = card_of(ReftConfig(base_model_name_or_path="smollm2-135m", task_type="CAUSAL_LM"))
    assert front(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "load_adapted(adapter)" in snippet(card)


def test_the_table_says_what_is_edited() -> None:
    config = ReftConfig(r=4, positions="f2+l1", base_model_name_or_path="org/base")
    config.base_model_shape = {"num_hidden_layers": 30}
    card = card_of(config, sites=[f"model.layers.{i}.output" for i in (3, 4, 5, 15)])
    assert "| Base model | `org/base` |" in card
    assert "| Kind | LoReFT: h + Rᵀ(Wh + b − Rh), R Rᵀ = I |" in card
    assert "`f2+l1`: the first 2 tokens and the last token of the prompt (an intervention for each term)" in card
    assert "| Layers | 3-5, 15 of 30 |" in card
    assert "| Component | `block_output` |" in card
    assert "| Rank | 4 |" in card
    assert "| Size | 4,612 parameters, 19.5 kB on disk |" in card
    assert "Import `reftune` first" in card
    assert "KeyError: 'REFT'" in card
    assert card.rstrip().endswith("- reftune 1")


def test_kinds_without_a_rank_shared_terms_and_trained_heads_are_told() -> None:
    config = ReftConfig(intervention="red", positions="f1+l1", share_weights=True, modules_to_save=["score"])
    card = card_of(config, sites=["embed.output"])
    assert "| Rank |" not in card
    assert "(one intervention for all terms)" in card
    assert "| Trained and saved whole | `score` |" in card
    assert "| Layers | none with a number |" in card
    assert "f = relu" in card_of(ReftConfig(act_fn="relu", init_weights=False))


def test_several_representations_are_all_named() -> None:
    entries = [
        {"layer": 1, "intervention": "loreft", "positions": "f1"},
        {"layer": 2, "intervention": "nodireft", "positions": "l1", "component": "mlp_output"},
    ]
    card = card_of(ReftConfig(representations=entries))
    for text in ("LoReFT", "NodiReFT", "`f1`", "`l1`", "`block_output`, `mlp_output`"):
        assert text in card


def test_the_installed_versions_are_stated() -> None:
    card = card_of(ReftConfig(), versions=None)
    assert re.search(r"- reftune \d+\.\d+", card)
    assert f"- torch {version('torch')}" in card  # torch.__version__ may add the build, such as +cu130


@pytest.mark.parametrize(
    ("config", "base_class", "expected"),
    [
        ({}, "", "AutoModelForCausalLM"),
        ({}, "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ({"task_type": "SEQ_CLS"}, "", "AutoModelForSequenceClassification"),
        ({"task_type": "TOKEN_CLS"}, "", "AutoModelForTokenClassification"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "", "AutoModelForSeq2SeqLM"),
        ({}, "BertModel", "import BertModel, AutoTokenizer"),
        ({"task_type": "FEATURE_EXTRACTION"}, "BertModel", "import BertModel, AutoTokenizer"),
        ({}, "LlavaForConditionalGeneration", "import LlavaForConditionalGeneration, AutoTokenizer"),
    ],
)
def test_the_snippet_loads_with_the_class_of_the_task(config: dict, base_class: str, expected: str) -> None:
    code = snippet(card_of(ReftConfig(base_model_name_or_path="org/base", **config), base_class=base_class))
    assert expected in code
    compile(code, "snippet", "exec")


@pytest.mark.parametrize(
    ("base_class", "reads", "expected"),
    [
        ("ViTForImageClassification", "pixel_values", "processor(images=image, return_tensors="),
        ("Wav2Vec2ForSequenceClassification", "input_values", "processor(audio, sampling_rate=16_000"),
        ("WhisperForConditionalGeneration", "input_features", "output = model.generate(**inputs, max_new_tokens=64)"),
    ],
)
def test_images_and_audio_are_read_by_a_processor(base_class: str, reads: str, expected: str) -> None:
    card = card_of(ReftConfig(base_model_name_or_path="org/base"), base_class=base_class, reads=reads)
    code = snippet(card)
    for words in (expected, f"import {base_class}, AutoProcessor", "processor = AutoProcessor.from_pretrained(base)"):
        assert words in code
    assert "okenizer" not in code
    assert "pipeline_tag" not in front(card)
    compile(code, "snippet", "exec")


def test_a_saved_image_classifier_says_so(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    get_reft_model(ViTForImageClassification(config), ReftConfig(r=2, positions="f1")).save_pretrained(tmp_path)
    assert "model = ViTForImageClassification.from_pretrained(base)" in (tmp_path / "README.md").read_text()
    assert "AutoProcessor" in (tmp_path / "README.md").read_text()


def test_the_snippet_runs_and_gives_the_adapted_models_answer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = save_tiny(tmp_path / "base")
    config = ReftConfig(r=2, layers="all", positions="l2", init_weights=False, task_type="CAUSAL_LM")
    model = get_reft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    saved = model_card(model.peft_config["default"], ["model.layers.0.output"], 1, 1)
    code = snippet(saved).replace('adapter = "."', f"adapter = {str(tmp_path / 'adapter')!r}")
    assert code.startswith("import reftune")
    names: dict = {}
    exec(code, names)
    assert capsys.readouterr().out
    with torch.no_grad():
        expected = model.generate(**names["inputs"], max_new_tokens=64)
    assert torch.equal(names["output"], expected)


def test_the_snippet_of_a_classifier_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = save_tiny(tmp_path / "base")
    classifier = LlamaForSequenceClassification.from_pretrained(base)
    classifier.save_pretrained(base)
    model = get_reft_model(classifier, ReftConfig(r=2, positions="l1", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    code = snippet(model_card(model.peft_config["default"], ["model.layers.1.output"], 1, 1))
    exec(code.replace('adapter = "."', f"adapter = {str(tmp_path / 'adapter')!r}"), {})
    assert "logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("f1", "the first token of the prompt"),
        ("f7+l7", "the first 7 tokens and the last 7 tokens of the prompt"),
        ("mid1", "the token in the middle of the prompt"),
        ("prompt", "every token of the prompt"),
        ("all", "every token, of the prompt and generated"),
        ("l2+gen/64", "the last 2 tokens of the prompt and every 64th generated token"),
        ("f1+mid2+l1+gen:3", "the first token, 2 tokens in the middle and the last token of the prompt and "
         "the first 3 generated tokens"),
        ("gen/2", "every 2nd generated token"),
        ("gen/111", "every 111th generated token"),
        ("gen/103", "every 103rd generated token"),
        ("gen", "every generated token"),
    ],
)  # fmt: skip
def test_positions_are_put_in_words(expression: str, words: str) -> None:
    assert positions_in_words(expression) == words


def test_layers_are_put_in_ranges() -> None:
    assert layers_in_words([f"h.{i}.mlp.output" for i in (10, 0, 1, 2, 4)]) == "0-2, 4, 10"
    assert layers_in_words(["embed_tokens.output"]) == ""


def test_every_kind_of_the_library_has_a_name_and_a_formula() -> None:
    ours = {kind for kind, cls in INTERVENTIONS.items() if cls.__module__.startswith("reftune.")}
    assert ours == set(FORMULAS)


def test_a_kind_of_ones_own_is_told_by_its_class() -> None:
    @register_intervention("card_shift")
    class CardShift(Intervention):
        """h + b, a shift."""

    try:
        assert formula("card_shift") == ("CardShift", "h + b, a shift.")
        assert "not known here" in formula("never_registered")[1]
    finally:
        del INTERVENTIONS["card_shift"]
