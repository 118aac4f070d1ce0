"""The conflict report: angles that are known beforehand, predictions that come true, measurements on prompts."""

import math

import pytest
import torch
from peft import LoraConfig
from several import MASK, PROMPT, Letters, several
from transformers import LlamaConfig, LlamaForSequenceClassification

from reftune.composition import compose, conflicts
from reftune.composition.angles import angles, disturbed, span
from reftune.interventions import LoreftIntervention, NodireftIntervention
from reftune.interventions.forms import form_of

D = 32
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99}


def rows(*numbers):
    """Unit vectors as rows."""
    return torch.eye(D, dtype=torch.float64)[list(numbers)]


def test_known_angles():
    assert angles(rows(0, 1), rows(2, 3)) == (90.0, 90.0)
    assert angles(rows(0, 1), rows(1, 0)) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert angles(rows(0, 1), rows(1, 2)) == pytest.approx((0.0, 90.0), abs=1e-6)
    assert angles(rows(0), rows(0, 5)) == pytest.approx((0.0,), abs=1e-6)
    for degrees in (0.001, 30.0, 60.0, 89.999):  # the small ones and those near 90 as well
        turned = math.cos(math.radians(degrees)) * rows(0) + math.sin(math.radians(degrees)) * rows(7)
        assert angles(rows(0), turned) == pytest.approx((degrees,), rel=1e-9)
    assert angles(rows(0), rows(0)[:0]) == ()
    assert len(span(torch.cat([rows(0, 1), 2 * rows(0) + rows(1)]))) == 2
    assert len(span(torch.zeros(3, D, dtype=torch.float64))) == 0


def edit(kind, seed, rank=3):
    torch.manual_seed(seed)
    module = kind(embed_dim=D, low_rank_dimension=rank, init_weights=False)
    with torch.no_grad():
        module.b.normal_()
    return form_of(module)


def test_the_prediction_is_the_mean_over_random_states():
    a, b = edit(LoreftIntervention, 0), edit(NodireftIntervention, 1)
    h = torch.randn(200_000, D, dtype=torch.float64)
    change = a(h + b(h)) - a(h)
    wanted = float((change.square().sum(1).mean() / a(h).square().sum(1).mean()).sqrt())
    assert disturbed(a, b) == pytest.approx(wanted, rel=0.02)
    assert disturbed(a, b.scaled(3)) == pytest.approx(3 * wanted, rel=0.02)


def sure_angles(model, name_a, name_b, write_a, read_a, write_b, read_b):
    """Give two NodiReFT adapters rows along known axes at layer 2."""
    layer = model.get_base_model().model.layers[2].edit_output
    with torch.no_grad():
        for name, write, read in ((name_a, write_a, read_a), (name_b, write_b, read_b)):
            module = layer.reft_all[name]
            module.R.copy_(rows(*write))
            module.W.copy_(0.1 * rows(*read))
            module.b.zero_()
    return model


@pytest.fixture
def pair():
    same = {"layers": [2], "positions": "all", "r": 2, "intervention": "nodireft"}
    return several(style=same, tone=same)


def test_adapters_that_share_nothing_disturb_nothing_at_their_site(pair):
    sure_angles(pair, "style", "tone", (0, 1), (4, 5), (2, 3), (6, 7))
    report = conflicts(pair, ["style", "tone"], prompts=["one two", "three four five"], tokenizer=Letters())
    (site,) = report.pairs[0].sites
    assert (site.site, site.layer, site.tokens, site.same_tokens) == ("model.layers.2.output", 2, ("all", "all"), True)
    assert site.writes == site.a_reads_b == site.b_reads_a == (90.0, 90.0)
    assert (site.overlap, site.a_disturbed, site.b_disturbed) == (0.0, 0.0, 0.0)
    measured = report.pairs[0].measured
    assert measured.states["model.layers.2.output"] == pytest.approx((0.0, 0.0), abs=1e-9)
    assert 0 < measured.a_changed < 1  # they meet later in the network all the same


def test_a_reader_of_what_the_other_writes_is_disturbed_in_a_sequence(pair):
    sure_angles(pair, "style", "tone", (0, 1), (4, 5), (2, 3), (0, 7))  # tone reads what style writes
    options = {"prompts": ["one two", "three four five"], "tokenizer": Letters()}
    report = conflicts(pair, ["style", "tone"], how="sequence", **options)
    (site,) = report.pairs[0].sites
    assert site.b_reads_a == pytest.approx((0.0, 90.0), abs=1e-6)
    assert site.a_reads_b == (90.0, 90.0)
    assert site.a_disturbed == 0.0
    assert site.b_disturbed == pytest.approx(0.1 / math.sqrt(2), rel=1e-6)
    assert report.pairs[0].measured.states["model.layers.2.output"][1] > 0.01
    summed = conflicts(pair, ["style", "tone"], **options).pairs[0].measured
    assert summed.states["model.layers.2.output"][1] == pytest.approx(0.0, abs=1e-9)  # a sum reads the same h


def test_measured_changes_are_the_formula(pair):
    report = conflicts(pair, ["tone", "style"], prompts=["one two three"], tokenizer=Letters(), chat_template=True)
    ids = {"input_ids": torch.tensor([Letters()("<one two three>")["input_ids"]])}
    logits = {}
    for names in ((), ("tone",), ("style",), ("tone", "style")):
        with torch.no_grad(), compose(dict.fromkeys(names, 1.0)).on(pair):
            logits[names] = pair(**ids).logits[0, -1].double()
    effect = logits["tone",] - logits[()]
    beside = logits["tone", "style"] - logits["style",]
    measured = report.pairs[0].measured
    assert measured.a_changed == pytest.approx(float((beside - effect).norm() / effect.norm()), rel=1e-6)
    top = [logits[n].argmax() for n in (("tone",), ("style",), ("tone", "style"))]
    assert (measured.next_token_a, measured.next_token_b) == (float(top[2] == top[0]), float(top[2] == top[1]))


def test_no_shared_site_and_other_tokens_are_said():
    model = several(
        a={"layers": [1]},
        b={"layers": [2], "positions": "gen"},
        c={"layers": [2], "positions": "prompt"},
        d={"layers": [2], "positions": "gen", "intervention": "red"},
    )
    report = conflicts(model, ["a", "b", "c", "d"])
    assert len(report.pairs) == 6
    text = str(report)
    assert "a (a) and b (b): 0 shared sites" in text
    assert "only through the layers between" in text
    assert "b (a) and c (b): 1 shared site\n" in text
    assert "gen / prompt (never the same)" in text
    red = next(p for p in report.pairs if (p.a, p.b) == ("b", "d")).sites[0]
    assert red.writes == ()
    assert math.isnan(red.a_disturbed)


def test_the_table_and_the_figure(pair, tmp_path):
    sure_angles(pair, "style", "tone", (0, 1), (4, 5), (2, 3), (0, 7))
    report = conflicts(pair, ["style", "tone"], prompts=["one two"], tokenizer=Letters())
    lines = str(report).splitlines()
    assert lines[0] == "style (a) and tone (b): 1 shared site"
    head = "site tokens writes a reads b b reads a overlap a, b disturbed a, b changed"
    assert " ".join(lines[1].split()) == head
    assert lines[2].split()[:7] == ["model.layers.2.output", "all", "90", "90", "0–90", "0.00", "0.00,"]
    assert "next token of 1 prompt:" in lines[3]
    assert max(map(len, lines)) < 200
    pytest.importorskip("matplotlib")
    for name in ("angles.png", "angles.svg"):
        report.figure(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    svg = (tmp_path / "angles.svg").read_text()
    assert "<svg" in svg
    conflicts(several(a={"layers": [1]}, b={"layers": [2]}), ["a", "b"]).figure(tmp_path / "none.png")


def test_the_report_changes_nothing(pair):
    before = pair(input_ids=PROMPT, attention_mask=MASK).logits
    hooks = {m: len(m._forward_hooks) for m in pair.modules()}
    pair.train()
    conflicts(pair, ["style", "tone"], prompts=["one"], tokenizer=Letters())
    assert pair.training
    assert {m: len(m._forward_hooks) for m in pair.modules()} == hooks
    assert torch.equal(pair.eval()(input_ids=PROMPT, attention_mask=MASK).logits, before)


@pytest.mark.parametrize("active", ["plain", "low", ["high", "low"]])
def test_lora_parts_act_with_their_adapters_alone(active):
    lora = {"lora": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)}
    model = several(plain={}, low=lora, high={**lora, "positions": "l1"})
    wanted = {}
    ids = {"input_ids": torch.tensor([Letters()("one two")["input_ids"]])}
    for names in ([], ["low"], ["plain"], ["low", "plain"]):
        model.set_adapter([name for name in names if name == "low"] or "plain")
        with torch.no_grad(), compose(dict.fromkeys(names, 1.0)).on(model):
            wanted[tuple(names)] = model(**ids).logits[0, -1].double()
    effect, other = wanted["low",] - wanted[()], wanted["plain",] - wanted[()]
    change = wanted["low", "plain"] - wanted["plain",] - effect
    model.set_adapter(active)
    before = model(**ids).logits
    report = conflicts(model, ["low", "plain"], prompts=["one two"], tokenizer=Letters())
    found = report.pairs[0].measured
    assert found.a_changed == pytest.approx(float(change.norm() / effect.norm()), rel=1e-6)
    assert found.b_changed == pytest.approx(float(change.norm() / other.norm()), rel=1e-6)
    assert torch.equal(model(**ids).logits, before)


def test_bad_input(pair):
    for arguments, message in [
        ((["style"],), "only .'style'. was named"),
        ((["style", "style"],), "between two adapters"),
        (("style",), "There is no adapter 's'"),
        ((["style", "x"],), "There is no adapter 'x'"),
        ((["style", "tone"], ["one"]), "pass the tokenizer"),
        ((["style", "tone"], [], Letters()), "at least one text"),
        ((["style", "tone"], "one", Letters()), "a list of at least one text"),
    ]:
        with pytest.raises(ValueError, match=message):
            conflicts(pair, *arguments)


def test_a_classifier_has_no_next_token():
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES))
    model = several(base=base, a={"task_type": "SEQ_CLS"}, b={"task_type": "SEQ_CLS"})
    assert conflicts(model, ["a", "b"]).pairs[0].sites
    with pytest.raises(ValueError, match=r"the next token, which a LlamaForSequenceClassification"):
        conflicts(model, ["a", "b"], prompts=["abc"], tokenizer=Letters())


@pytest.mark.parametrize("component", ["block_input", "mlp_output", "model.layers[2].mlp.down_proj.input"])
def test_states_are_measured_wherever_they_are_edited(component):
    same = {"component": component, "layers": [2], "positions": "all"}
    model = several(a=same, b=same)
    options = {"prompts": ["one", "three four"], "tokenizer": Letters()}
    summed, sequence = (conflicts(model, ["a", "b"], how=how, **options).pairs[0] for how in ("sum", "sequence"))
    site = summed.sites[0].site
    assert summed.measured.states[site] == pytest.approx((0.0, 0.0), abs=1e-9)
    a, b = sequence.measured.states[site]
    assert a > 0.01  # what tells a's effect from b's is the same difference, over another size
    assert b > 0.01


@pytest.mark.filterwarnings("ignore:.*has no start that leaves h.*")
def test_kinds_without_a_form_have_directions_where_they_say_them():
    one = {"layers": [2], "positions": "all"}
    model = several(plain=one, curved={**one, "act_fn": "gelu"}, stacked={**one, "stack": [1, 2], "between": "gelu"})
    for pair in conflicts(model, ["plain", "curved", "stacked"]).pairs:
        (site,) = pair.sites
        assert 0 < min(site.writes) < 90
        assert site.a_reads_b
        assert math.isnan(site.a_disturbed)
