"""Adapters on packed layers, and quantized training beside adapters."""

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed; `make test-integrations` installs it")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the dev extra")

import askew_cuda as askew
from askew_cuda.integrations.transformers import quantize_trainer
from askew_cuda.packed.modules import PackedLinear
from tests.integrations.tiny import Counting, language_model, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:finalize:UserWarning"),  # weights that were never annealed
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's
]

INDEX = Counting().rows[:4]


def adapted(pack: bool = True, **config):
    """A language model whose projections are packed, with an adapter beside some of them."""
    model = language_model()
    optimizer = askew.AskewAdamW(askew.param_groups(model, "ternary/channel", verbose=False, pretrained=True))
    optimizer.finalize()
    if pack:
        askew.pack_modules(model, optimizer)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **config))


def train(model, steps: int = 5):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=INDEX, labels=INDEX).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_an_adapter_on_packed_layers_trains_as_on_the_snapped_ones(tmp_path):
    packed, plain = adapted(), adapted(pack=False)
    assert isinstance(packed.base_model.model.model.layers[0].self_attn.q_proj.base_layer, PackedLinear)
    losses = train(packed)
    assert losses == train(plain)
    assert losses[-1] < losses[0]
    packed.save_pretrained(tmp_path)
    fresh = language_model()
    optimizer = askew.AskewAdamW(askew.param_groups(fresh, "ternary/channel", verbose=False, pretrained=True))
    askew.pack_modules(fresh, optimizer)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(again.eval()(INDEX).logits, packed.eval()(INDEX).logits)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_codes_is_refused_and_into_unpacked_weights_is_right(safe):
    model = adapted()
    train(model)
    model.eval()
    wanted = model(INDEX).logits
    with pytest.raises(RuntimeError, match=r"can't be written.*unpack_modules"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(model(INDEX).logits, wanted)
    assert askew.unpack_modules(model) is model
    assert torch.equal(model(INDEX).logits, wanted)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(INDEX).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_trainer_trains_an_adapter_beside_frozen_packed_layers(tmp_path):
    model = adapted()
    before = {name: value.clone() for name, value in model.named_buffers()}
    made = trainer(tmp_path, model)
    made.train()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert made.state.log_history[-2]["loss"] < made.state.log_history[0]["loss"]


def test_adapters_are_quantized_by_name_and_the_frozen_base_is_left_alone(tmp_path):
    model = peft.get_peft_model(language_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    made = trainer(tmp_path, model, eval_strategy="steps", eval_steps=4)
    callback = quantize_trainer(made, {"re:.*lora_[AB].*": "4bit"}, verbose=False)
    made.train()
    assert len(callback.report.tensors) == 2 * 2 * 2
    assert callback.report.left_alone == ()
    now = dict(model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())
