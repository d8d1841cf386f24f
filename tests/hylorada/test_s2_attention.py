"""Shifted sparse attention in whole models: beside dense masks of its predicate, padded, packed, cached."""

import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hylorada import HyLoRADAConfig, HyLoRADAModel
from hylorada.s2_attention import NAME, AttentionSwitch, Groups, attention_layers
from hylorada.trainer import HyLoRADATrainer, TrainingConfig
from hylorada_kernels.nn import ShiftedAttention
from hylorada_kernels.ops.shifted_attention import shifted_attention
from tests.hylorada.conftest import FAMILIES

EXACT = {"rtol": 1e-9, "atol": 1e-9}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
S2 = {"s2_attn_enabled": True, "s2_group_size": 4, "position_bias_enabled": False}


@pytest.fixture
def make_s2(make_base):
    """make_s2(family, dtype, base changes, config fields) -> a model with S2 in groups of 4, its adapters at start."""

    def make(family="llama", dtype=torch.float64, changes=None, **fields):
        fields = {"lora_rank": 2, "lora_dropout": 0.0, "gradient_checkpointing": False} | S2 | fields
        config = HyLoRADAConfig(lora_target_modules=FAMILIES[family][2], **fields)
        return HyLoRADAModel(make_base(family, dtype, **changes or {}), config)

    return make


def predicate(length, group, offset, sinks=0, window=None):
    """(length, length) bool: who attends to whom in one text, straight from the definition."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    same = (i + group - offset) // group == (j + group - offset) // group
    allowed = (j <= i) & (same | (j < sinks))
    return allowed if window is None else allowed & (i - j < window)


def dense_logits(base, token_ids, masks):
    """The base model's logits with a dense mask (heads, L, L) in every layer, by its own SDPA."""
    handles = []
    for layer, mask in zip(attention_layers(base), masks, strict=True):
        additive = torch.zeros(mask.shape, dtype=base.dtype).masked_fill(~mask, torch.finfo(base.dtype).min)

        def put(module, args, kwargs, additive=additive):
            return args, kwargs | {"attention_mask": additive.unsqueeze(0)}

        handles.append(layer.register_forward_pre_hook(put, with_kwargs=True))
    logits = base(token_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def layer_masks(mode, length, group, offset, sinks=0, window=None, layers=2, heads=4):
    plain, shifted = (predicate(length, group, o, sinks, window) for o in (0, offset))
    if mode == "heads":
        return [torch.stack([plain] * (heads // 2) + [shifted] * (heads - heads // 2))] * layers
    return [torch.stack([shifted if layer % 2 else plain] * heads) for layer in range(layers)]


@pytest.mark.parametrize("mode", ["layers", "heads"])
@pytest.mark.parametrize(("group", "ratio", "offset", "sinks"), [(4, 0.5, 2, 0), (7, 0.3, 2, 3), (5, 0.0, 0, 1)])
def test_training_attends_by_the_predicate(make_base, make_s2, text, family, mode, group, ratio, offset, sinks):
    options = {"s2_group_size": group, "s2_shift_ratio": ratio, "s2_sink_tokens": sinks, "s2_shift_mode": mode}
    model = make_s2(family, **options).train()
    expected = dense_logits(make_base(family, torch.float64), text, layer_masks(mode, 23, group, offset, sinks))
    torch.testing.assert_close(model(text).logits, expected, **EXACT)
    full = make_base(family, torch.float64)(text).logits
    assert (expected[:, group:] - full[:, group:]).abs().max() > 1e-3


def test_groups_as_long_as_the_text_are_full_attention(make_base, make_s2, text, family):
    expected = make_base(family, torch.float64)(text).logits
    for options in ({"s2_group_size": 23, "s2_shift_ratio": 0.0}, {"s2_group_size": 46}, {"s2_group_size": "auto"}):
        torch.testing.assert_close(make_s2(family, **options).train()(text).logits, expected, **EXACT)


def test_evaluation_and_generation_are_the_models_own_bit_for_bit(make_base, make_s2, text, family):
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    ids = text.masked_fill(mask == 0, 2)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "output_scores": True}
    options |= {"return_dict_in_generate": True, "attention_mask": mask}
    base, model = make_base(family), make_s2(family, torch.float32)
    # the base model with the switch alone, and the adapted model beside one that is adapted without groups
    switched = make_base(family)
    AttentionSwitch(switched, Groups(4, 0.5, 0, "layers", in_evaluation=False), None)
    without = make_s2(family, torch.float32, s2_attn_enabled=False, s2_group_size=2048)
    for changed, own in ((switched, base), (model, without)):
        changed.train()(text)
        changed.eval()
        expected = own.generate(ids, **options)
        assert torch.equal(changed(ids, attention_mask=mask).logits, own(ids, attention_mask=mask).logits)
        # by generate in train mode too: it does not learn
        for training in (False, True) if changed is model else (False,):
            found = changed.train(training).generate(ids, **options)
            assert all(torch.equal(*pair) for pair in zip(found.scores, expected.scores, strict=True))
            assert torch.equal(found.sequences, base.generate(ids, **options).sequences)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_evaluation_keeps_the_models_own_implementation(make_base, make_s2, text, implementation):
    model = make_s2(changes={"attn_implementation": implementation})
    base = make_base("llama", torch.float64, attn_implementation=implementation)
    model.train()(text)
    model.eval()
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(text).logits, base(text).logits)
    if implementation == "eager":
        found = model(text, output_attentions=True).attentions
        assert torch.equal(found[1], base(text, output_attentions=True).attentions[1])


def padded(text, left, right):
    """One row with padding on both sides, its mask and its positions."""
    length = text.shape[1]
    ids = torch.cat([text.new_full((1, left), 2), text, text.new_full((1, right), 2)], 1)
    mask = torch.zeros_like(ids)
    mask[:, left : left + length] = 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("mode", ["layers", "heads"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_padding_changes_nothing(make_s2, text, family, mode, sinks):
    model = make_s2(family, s2_shift_mode=mode, s2_sink_tokens=sinks).train()
    alone = model(text[:1]).logits
    for left, right in ((0, 5), (5, 0), (3, 4)):
        ids, mask, positions = padded(text[:1], left, right)
        found = model(ids, attention_mask=mask, position_ids=positions).logits[:, left : left + 23]
        torch.testing.assert_close(found, alone, **EXACT)
    # rows of one batch, each padded in its own way, and one that is all padding
    rows = [padded(text[:1], left, 9 - left) for left in (0, 4, 9)]
    ids, mask, positions = (torch.cat(parts) for parts in zip(*rows, strict=True))
    mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    ids, positions = torch.cat([ids, ids[:1]]), torch.cat([positions, positions[:1]])
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, left in enumerate((0, 4, 9)):
        torch.testing.assert_close(found[row : row + 1, left : left + 23], alone, **EXACT)
    assert found.isfinite().all()


@pytest.mark.parametrize("mode", ["layers", "heads"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_packed_documents_are_documents_alone(make_s2, text, family, mode, sinks):
    model = make_s2(family, s2_shift_mode=mode, s2_sink_tokens=sinks).train()
    first, second = text[:1, :9], text[1:, :14]
    expected = torch.cat([model(first).logits, model(second).logits], 1)
    ids, positions = torch.cat([first, second], 1), torch.tensor([[*range(9), *range(14)]])
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, **EXACT)
    boundaries = torch.tensor([0, 9, 23], dtype=torch.int32)
    found = model(ids, position_ids=positions, cu_seq_lens_q=boundaries).logits
    torch.testing.assert_close(found, expected, **EXACT)

    # two packed rows, and rows that are packed and padded
    other = torch.cat([model(text[:1, 9:]).logits, model(text[1:, :9]).logits], 1)
    both = torch.cat([ids, torch.cat([text[:1, 9:], text[1:, :9]], 1)])
    positions = torch.cat([positions, torch.tensor([[*range(14), *range(9)]])])
    torch.testing.assert_close(model(both, position_ids=positions).logits, torch.cat([expected, other]), **EXACT)
    pads = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.cat([pads, torch.ones_like(both)], 1)
    ids, positions = torch.cat([pads, both], 1), torch.cat([pads, positions], 1)
    found = model(ids, position_ids=positions, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(found, torch.cat([expected, other]), **EXACT)


@pytest.mark.parametrize("position", [0, 6, 22])
@pytest.mark.parametrize("mode", ["layers", "heads"])
def test_a_token_changes_nothing_before_it(make_s2, text, family, mode, position):
    model = make_s2(family, torch.float32, s2_shift_mode=mode, s2_sink_tokens=2).train()
    changed = text.clone()
    changed[:, position] = 1
    before, after = model(text).logits, model(changed).logits
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("mode", ["layers", "heads"])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("group", [4, 7])
def test_cached_decoding_is_the_full_forward(make_s2, text, family, mode, sinks, group):
    options = {"s2_eval": True, "s2_shift_mode": mode, "s2_sink_tokens": sinks, "s2_group_size": group}
    model = make_s2(family, **options)
    with torch.no_grad():
        full = model(text).logits
        torch.testing.assert_close(full, model.train()(text).logits, **EXACT)
        output = model.eval()(text[:, :5], use_cache=True)
        pieces = [output.logits]
        for start, stop in ((5, 6), (6, 7), (7, 12), *((n, n + 1) for n in range(12, 23))):
            output = model(text[:, start:stop], past_key_values=output.past_key_values, use_cache=True)
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **EXACT)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_in_groups_is_generation_by_full_forwards(make_s2, text, family, beams):
    model = make_s2(family, s2_eval=True, s2_group_size=5, s2_sink_tokens=1)
    mask = torch.ones_like(text)
    mask[0, :6] = 0
    ids = text.masked_fill(mask == 0, 2)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    alone = model.generate(ids[:1, 6:], attention_mask=mask[:1, 6:], **options)
    assert torch.equal(cached[:1, 6:], alone)
    if beams == 1:
        written = text[1:]
        for _ in range(8):
            written = torch.cat([written, model(written).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached[1:], written)


def test_an_automatic_group_is_a_quarter_of_the_longest_text_and_stays(make_s2, text, monkeypatch):
    monkeypatch.setattr("hylorada.s2_attention.SMALLEST_AUTO_GROUP", 3)
    auto, fixed = make_s2(s2_group_size="auto", s2_eval=True), make_s2(s2_group_size=5, s2_eval=True)
    assert torch.equal(auto(text).logits, fixed(text).logits)
    # padding does not count
    ids, mask, positions = (part.expand(2, -1) for part in padded(text[:1], 9, 0))
    ids = torch.cat([ids[:, :9], text], 1)
    found = auto(ids, attention_mask=mask, position_ids=positions).logits[:, 9:]
    torch.testing.assert_close(found, fixed(text).logits, **EXACT)
    # in a forward of 32 tokens the group would be 8
    caches = [model(text, use_cache=True).past_key_values for model in (auto, fixed)]
    outputs = [model(text[:, :9], past_key_values=cache) for model, cache in zip((auto, fixed), caches, strict=True)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)

    foreign = make_s2()(text, use_cache=True).past_key_values
    with pytest.raises(ValueError, match='s2_group_size="auto" is fixed when a cache is filled'):
        auto(text[:, :1], past_key_values=foreign)


def gradients(model, text, between=lambda: None):
    """Of two forwards of other lengths, paddings and packings, before one backward."""
    model.zero_grad()
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    packed = text.flip(1)[:, :9]
    torch.manual_seed(5)
    first = model(text, attention_mask=mask, labels=text).loss
    second = model(packed, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, 9), labels=packed).loss
    between()
    (first + 2 * second).backward()
    return {name: parameter.grad.clone() for name, parameter in model.adapter_parameters().items()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["layers", "heads"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(make_s2, text, family, reentrant, mode, dropout):
    changes = {"attn_pdrop" if family == "gpt2" else "attention_dropout": dropout}
    model = make_s2(family, changes=changes, s2_sink_tokens=1, s2_shift_mode=mode, position_bias_enabled=True)
    # the position bias too
    model.to(torch.float64).train()
    expected = gradients(model, text)
    assert all(gradient.isfinite().all() for gradient in expected.values())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, text)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **EXACT)
    if dropout == 0:
        # a recomputation has the attention of its own forward, whatever the model did since
        later = gradients(model, text, lambda: model.eval()(text))
        for name, gradient in expected.items():
            torch.testing.assert_close(later[name], gradient, **EXACT)


def test_every_trainable_parameter_gets_a_gradient(make_model, text, family):
    model = make_model(family, s2_attn_enabled=True, s2_group_size=4, s2_sink_tokens=1).train()
    model(text, labels=text).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


def test_dropout_of_the_attention_is_applied_while_training(make_base, make_s2, text):
    model = make_s2("gpt2", changes={"attn_pdrop": 0.3}).train()
    assert not torch.equal(model(text).logits, model(text).logits)
    torch.manual_seed(7)
    first = model(text).logits
    torch.manual_seed(7)
    assert torch.equal(model(text).logits, first)
    # a bias is added by other operations than the base model's
    torch.testing.assert_close(model.eval()(text).logits, make_base("gpt2", torch.float64)(text).logits, **EXACT)


@pytest.mark.parametrize("window", [3, 6, 64])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_sliding_window_narrows_the_groups(make_base, make_s2, text, window, sinks):
    changes = {"sliding_window": window}
    model = make_s2("mistral", changes=changes, s2_eval=True, s2_group_size=5, s2_sink_tokens=sinks)
    masks = layer_masks("layers", 23, 5, 2, sinks, window)
    expected = dense_logits(make_base("mistral", torch.float64, **changes), text, masks)
    torch.testing.assert_close(model(text).logits, expected, **EXACT)
    # the cache drops what has left the window
    output = model(text[:, :11], use_cache=True)
    pieces = [output.logits]
    for start in range(11, 23):
        output = model(text[:, start : start + 1], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **EXACT)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(text)}
    ids = torch.nn.functional.pad(text, (4, 0), value=2)
    mask = torch.nn.functional.pad(torch.ones_like(text), (4, 0))
    left = model.generate(ids, **options | {"attention_mask": mask})
    assert torch.equal(left[:, 4:], model.generate(text, **options))


def test_models_keep_their_own_settings(make_base, text):
    config = make_base().config
    models = []
    for group in (4, 6):
        # two models that share one config object
        base = transformers.LlamaForCausalLM(config).double()
        base.load_state_dict(make_base("llama", torch.float64).state_dict())
        fields = {"s2_attn_enabled": True, "s2_group_size": group, "position_bias_enabled": False}
        models.append(HyLoRADAModel(base, HyLoRADAConfig(lora_dropout=0.0, **fields)).train())
    plain = transformers.LlamaForCausalLM(config).double().train()
    plain.load_state_dict(make_base("llama", torch.float64).state_dict())
    reference = make_base("llama", torch.float64)
    expected = [dense_logits(reference, text, layer_masks("layers", 23, group, group // 2)) for group in (4, 6)]
    for _ in range(2):
        for model, logits in zip(models, expected, strict=True):
            torch.testing.assert_close(model(text).logits, logits, **EXACT)
            assert torch.equal(plain(text).logits, reference(text).logits)
    assert config._attn_implementation == "sdpa"


def test_threads_do_not_share_a_pass(make_s2, text):
    model = make_s2().train()
    packed = {"position_ids": torch.tensor([[*range(9), *range(14)]])}
    expected = model(text).logits, model(text, **packed).logits
    other = []

    def run_inside(*_):
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as executor:
                other.append(executor.submit(model, text, **packed).result().logits)

    handle = attention_layers(model.base_model)[0].register_forward_pre_hook(run_inside)
    found = model(text).logits
    handle.remove()
    assert torch.equal(found, expected[0]) and torch.equal(other[0], expected[1])


def test_an_interrupted_forward_leaves_nothing_behind(make_base, make_s2, text):
    model = make_s2().train()
    expected = model(text).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = attention_layers(model.base_model)[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(text, position_ids=torch.tensor([[*range(9), *range(14)]]))
    handle.remove()
    assert torch.equal(model(text).logits, expected)
    assert torch.equal(model.eval()(text).logits, make_base("llama", torch.float64)(text).logits)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_tensor_has_the_size_of_a_dense_mask(make_s2):
    length = 1024
    model = make_s2(dtype=torch.float32, changes={"max_position_embeddings": length}, s2_group_size=32).train()
    ids = torch.randint(3, 97, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    positions = {"position_ids": torch.cat([torch.arange(500), torch.arange(524)])[None]}
    sizes = []
    for mode, given in ((True, {"attention_mask": mask}), (True, positions), (False, {"attention_mask": mask})):
        model.train(mode)
        with Largest() as largest:
            model(ids, **given).logits.sum().backward()
        sizes.append(largest.numel)
    *sparse, dense = sizes
    # the logits are the largest
    assert max(sparse) <= 2 * length * 97 < length * length <= dense


def test_saving_and_merging_keep_the_groups(make_model, make_base, text, tmp_path, family):
    model = make_model(family, s2_attn_enabled=True, s2_group_size=4, s2_sink_tokens=1, s2_eval=True)
    expected = model(text).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = HyLoRADAModel.from_pretrained(make_base(family), tmp_path / "adapter")
    assert loaded.hylorada_config == model.hylorada_config
    assert torch.equal(loaded(text).logits, expected)

    model.merge_lora_weights()
    torch.testing.assert_close(model(text).logits, expected, **CLOSE)
    model.train()(text)
    model.save_pretrained(tmp_path / "merged")
    assert NAME not in (tmp_path / "merged" / "config.json").read_text()
    for base in (None, make_base(family)):
        again = HyLoRADAModel.from_pretrained(base, tmp_path / "merged")
        torch.testing.assert_close(again.eval()(text).logits, expected, **CLOSE)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config._attn_implementation == "sdpa"
    assert (plain(text).logits - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="is adapted already"):
        HyLoRADAModel(model.base_model)
    model.unmerge_lora_weights()
    assert torch.equal(model.eval()(text).logits, expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(make_s2, text, duplicate):
    model = make_s2("gpt2", position_bias_enabled=True, gradient_checkpointing=True).train()
    model(text).logits.sum().backward()
    other = duplicate(model)
    assert torch.equal(other(text).logits, model(text).logits)
    first, copied = (attention_layers(each.base_model)[0].hylorada_layer for each in (model, other))
    assert first.switch is not copied.switch and copied.config is other.config
    other.eval()
    assert not torch.equal(other(text).logits, model(text).logits)


def test_names_are_registered_when_the_first_model_is_made(make_s2, text, tmp_path):
    model = make_s2().train()
    expected = model(text).logits
    with open(tmp_path / "model", "wb") as file:
        pickle.dump((model, text, expected), file)
    code = f"""
import pickle, torch
import hylorada.s2_attention
from transformers import AttentionInterface, AttentionMaskInterface
names = lambda: {{*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping}}
assert {NAME!r} not in names()
with open({str(tmp_path / "model")!r}, "rb") as file:
    model, text, expected = pickle.load(file)
assert {NAME!r} in names()
torch.testing.assert_close(model(text).logits, expected)
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_training_lowers_the_loss(make_base, family):
    fields = {"s2_attn_enabled": True, "s2_group_size": 8, "mixed_precision": "fp32"}
    targets = {"lora_target_modules": FAMILIES[family][2]}
    model = HyLoRADAModel(make_base(family), HyLoRADAConfig(**fields, **targets))
    rows = (3 + torch.arange(40) % 5 + 7 * torch.arange(8)[:, None]) % 90
    batches = [{"input_ids": rows[i : i + 4], "attention_mask": torch.ones(4, 40).long()} for i in (0, 4)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    config = TrainingConfig(num_epochs=10, learning_rate=2e-2, show_progress=False)
    losses = [step.loss for step in HyLoRADATrainer(model=model, train_dataloader=loader, config=config).train().steps]
    assert losses[-1] < 0.9 * losses[0]


def test_a_bf16_model_stays_within_rounding(make_base, make_s2, text):
    exact = make_s2(dtype=torch.float64).train()
    exact.load_state_dict({k: v.double() for k, v in make_s2(dtype=torch.bfloat16).state_dict().items()})
    truth = exact(text).logits
    base = make_base("llama", torch.bfloat16)
    by_sdpa = dense_logits(base, text, layer_masks("layers", 23, 4, 2))
    found = make_s2(dtype=torch.bfloat16).train()(text).logits
    assert (found - truth).abs().max() <= 2 * (by_sdpa - truth).abs().max()


HOLES = torch.ones(2, 23).long().index_fill(1, torch.tensor([4]), 0)
FOUR_D = torch.ones(2, 1, 23, 23).bool()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": HOLES}, r"attention_mask has holes in row 0.*remove the masked tokens, or pack"),
        ({"attention_mask": FOUR_D}, r"shape \(batch, length\) that marks padding, got one of 4 dimensions"),
        ({"attention_mask": {"full_attention": None}}, "got one of type dict"),
        ({"output_attentions": True}, "has no attention weights; leave output_attentions out"),
        ({"cu_seq_lens_q": torch.tensor([0, 23, 46])}, "needs one packed row"),
        ({"input_ids": HOLES[:1], "cu_seq_lens_q": torch.tensor([0, 20])}, r"rise from 0 to 23.*got \[0, 20\]"),
    ],
)
def test_what_cannot_be_computed_is_refused(make_base, make_s2, text, given, message):
    model = make_s2().train()
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": text} | given)
    # evaluation takes what the base model takes
    if "cu_seq_lens_q" not in given and not isinstance(given.get("attention_mask"), dict):
        assert (
            torch.equal(model.eval()(text, **given).logits, make_base("llama", torch.float64)(text, **given).logits)
            or "output_attentions" in given
        )


def test_caches_that_do_not_grow_are_refused(make_s2, text):
    model = make_s2(s2_eval=True)
    options = {"max_new_tokens": 3, "attention_mask": torch.ones_like(text), "eos_token_id": None}
    with pytest.raises(ValueError, match='cache_implementation="dynamic"'):
        model.generate(text, cache_implementation="static", **options)
    cache = model(text, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot continue packed documents from a cache"):
        model(text[:, :4], past_key_values=cache, position_ids=torch.tensor([[23, 24, 0, 1]]))


def test_the_name_alone_is_refused(make_base, make_s2, text):
    make_s2()
    base = make_base()
    base.config._attn_implementation_internal = NAME
    with pytest.raises(RuntimeError, match="not for set_attn_implementation"):
        base(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
            ),
            "T5ForConditionalGeneration is no causal language model",
        ),
        (
            lambda: transformers.BloomForCausalLM(
                transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)
            ),
            "BloomForCausalLM does not take its attention from transformers' AttentionInterface",
        ),
        (
            lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, reorder_and_upcast_attn=True)
            ),
            "no reorder_and_upcast_attn",
        ),
        (
            lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=20)
            ),
            's2_shift_mode="heads" needs 2 heads or more, got 1',
        ),
    ],
)
def test_a_model_that_does_not_fit_is_left_as_it_was(make, message):
    base = make()
    hooks = [len(part._forward_pre_hooks) for part in base.modules()]
    linear = next(name for name, part in base.named_modules() if type(part).__name__ in ("Linear", "Conv1D"))
    fields = {"s2_attn_enabled": True, "s2_shift_mode": "heads", "position_bias_enabled": False}
    with pytest.raises(ValueError, match=message):
        HyLoRADAModel(base, HyLoRADAConfig(lora_target_modules=(linear,), **fields))
    assert [len(part._forward_pre_hooks) for part in base.modules()] == hooks
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_other_mathematics_inside_an_attention_is_refused(text):
    config = transformers.Gemma2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    fields = {"s2_attn_enabled": True, "position_bias_enabled": False}
    model = HyLoRADAModel(transformers.Gemma2ForCausalLM(config), HyLoRADAConfig(**fields)).train()
    with pytest.raises(ValueError, match="does not compute 'softcap', which Gemma2Attention needs"):
        model(text)


def test_the_module_is_the_op():
    options = {"group_size": 8, "shift": 3, "shifted_heads": "half", "sink_tokens": 2}
    layer = ShiftedAttention(**options, dropout=0.5)
    q, k, v = (torch.randn(2, heads, 30, 16) for heads in (4, 2, 2))
    lengths = torch.tensor([30, 11])
    expected = shifted_attention(q, k, v, **options, lengths=lengths, scale=0.1)
    assert torch.equal(layer.eval()(q, k, v, lengths=lengths, scale=0.1), expected)
    assert not torch.equal(layer.train()(q, k, v, lengths=lengths, scale=0.1), expected)
    packed = {"cu_seqlens": torch.tensor([0, 12, 30])}
    both_ways = ShiftedAttention(8, causal=False)(q[:1], k[:1], v[:1], **packed)
    assert torch.equal(both_ways, shifted_attention(q[:1], k[:1], v[:1], group_size=8, causal=False, **packed))
    assert list(layer.parameters()) == [] and "group_size=8, shift=3, shifted_heads='half'" in repr(layer)
