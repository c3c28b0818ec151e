"""Adapters of PEFT, csm-mlx and ours give what their own programs compute; ours work in PEFT after export."""

import copy
import json

import csm  # before mlx

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest

import csm_layouts
from csm_tools import adapters
from test_layouts import CONFIG, CSM_1B, LLAMA3, NATIVE, random_weights, same

ROPE = {"rope_theta": 7000.0, "rope_scaling": LLAMA3}
ALL = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "inputs_embeds_projector",
    "lm_head",
]
PEFT = {
    "lora": {"target_modules": ALL},
    "rslora": {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"k_proj": 2, "depth_decoder.*q_proj": 3},
               "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3}},
    "dora": {"target_modules": ALL, "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["codebooks_head", "embed_text_tokens", "k_proj"]},
    "embeddings": {"target_modules": ["embed_text_tokens", "up_proj"]},
    "heads": {"target_modules": ["down_proj"], "target_parameters": ["codebooks_head.weight"]},
}  # fmt: skip


@pytest.fixture
def theirs():
    """A random CSM of transformers, and its config and weights in our layout."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.CsmForConditionalGeneration(transformers.CsmConfig(**copy.deepcopy(CONFIG | ROPE))).eval()
    for w in model.parameters():
        w.data.mul_(10 if w.ndim > 1 else 1)  # otherwise all logits are nearly equal
    weights = {name: mx.array(w.numpy()) for name, w in model.state_dict().items() if "codec_model" not in name}
    config, weights, _ = csm_layouts.csm_to_native(CONFIG | ROPE, weights, CSM_1B)
    return model, config, csm.split_heads(weights)


def network(config, weights):
    model = csm.CSM(csm.CSMConfig.from_dict(config))
    model.load_weights(list(weights.items()))
    return model


def greedy(config, weights, ids, n=5):
    """Our model's first n frames (n, K) after a text."""
    model, K = network(config, weights), config["audio_num_codebooks"]
    rows = mx.zeros((1, len(ids), K + 1), mx.int32)
    rows[0, :, K], frames = mx.array(ids), []
    for _ in range(n):
        frames.append(model.next_frame(model(rows)[:, -1], lambda i, logits: mx.argmax(logits, axis=-1)))
        rows = mx.concatenate([rows, csm.frame_row(frames[-1], K)], axis=1)
    return mx.concatenate(frames).tolist()


def train(torch, model):
    """Train for a few large steps on random frames."""
    parameters = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(3):
        frames = torch.randint(0, 32, (2, 6, 4))
        model(input_ids=frames, labels=frames).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def said(torch, model, ids, n=5):
    greedily = {"do_sample": False, "depth_decoder_do_sample": False, "max_new_tokens": n, "output_audio": False}
    return model.generate(input_ids=torch.tensor([ids]), **greedily)[0].tolist()


@pytest.mark.parametrize("kind", PEFT)
def test_peft(kind, theirs, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base, config, weights = theirs
    ids = [1, 7, 9, 30, 2]
    assert said(torch, base, ids) == greedy(config, weights, ids)
    options = peft.LoraConfig(r=4, lora_alpha=8, **PEFT[kind])  # Mimi's modules have these names, too
    trained = train(torch, peft.get_peft_model(base, options))
    trained.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = mx.load(str(tmp_path / "adapter_model.safetensors"))
    changes = adapters.adapter_to_native(config, settings, tensors)
    changed = adapters.apply_adapter(weights, changes)
    codes = said(torch, trained, ids)
    assert greedy(config, changed, ids) == codes != greedy(config, weights, ids)
    h = mx.random.normal((5, 32))
    logits = network(config, changed).depth_logits(h, mx.array(codes))
    frames = torch.tensor([[0, *c[:-1]] for c in codes])
    with torch.no_grad():
        expected = trained.base_model.model.depth_decoder(frames, torch.tensor(np.array(h))).logits
    assert np.allclose(np.array(logits), expected.numpy()[:, -3:], atol=1e-4)


def our_adapter(config, parts=("self_attn", "mlp", "projection", "codebook0_head", "audio_head"), dora=False):
    """A random adapter as finetune writes it: (adapter_config.json, tensors)."""
    model, tensors, key = csm.CSM(csm.CSMConfig.from_dict(config)), {}, mx.random.key(3)
    for name, m in model.named_modules():
        if isinstance(m, csm.Linear) and set(parts) & set(name.split(".")):
            key, *k = mx.random.split(key, 4)
            (n_out, n_in), noise = m.weight.shape, mx.random.normal
            tensors |= {f"{name}.lora_a": noise((n_in, 3), key=k[0]), f"{name}.lora_b": noise((3, n_out), key=k[1]) / 9}
            tensors |= {f"{name}.lora_m": 1 + mx.abs(noise((n_out,), key=k[2]))} if dora else {}
    return {"rank": 3, "alpha": 6.0, "dropout": 0.0, "model": "csm-1b", "target_modules": list(parts)}, tensors


@pytest.mark.parametrize("dora", [False, True])
def test_ours_in_peft(dora, theirs, tmp_path):
    """An adapter of `finetune export --to peft` gives our codes in PEFT, and can be read back."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base, config, weights = theirs
    adapter, tensors = our_adapter(config, dora=dora)
    if dora:  # PEFT supports it for modules only
        with pytest.raises(ValueError, match="audio_head"):
            adapters.adapter_to_peft(config, adapter, tensors)
        tensors = {name: w for name, w in tensors.items() if "audio_head" not in name}
    else:
        tensors["text_embeddings.weight"] = weights["text_embeddings.weight"][::-1]
        tensors["audio_embeddings.weight"] = weights["audio_embeddings.weight"][::-1]
    changes = adapters.adapter_to_native(config, adapter, tensors)
    codes = greedy(config, adapters.apply_adapter(weights, changes), [1, 7, 9])
    settings, exported = adapters.adapter_to_peft(config, adapter, tensors)
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), exported, {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert said(torch, loaded, [1, 7, 9]) == codes != greedy(config, weights, [1, 7, 9])
    again = adapters.apply_adapter(weights, adapters.adapter_to_native(config, settings, exported))
    assert all(mx.allclose(again[name], w, atol=1e-5) for name, w in adapters.apply_adapter(weights, changes).items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_csm_mlx(kind, tmp_path):
    """mlx-lm's layers, which csm-mlx substitutes in a model, and the matrices they are fused to."""
    lora, dora = pytest.importorskip("mlx_lm.tuner.lora"), pytest.importorskip("mlx_lm.tuner.dora")
    weights, keys = csm.split_heads(random_weights(NATIVE)), ("self_attn.q_proj", "mlp.down_proj", "codebook0_head")
    linear, embedding = {"lora": (lora.LoRALinear, lora.LoRAEmbedding), "dora": (dora.DoRALinear, dora.DoRAEmbedding)}[
        kind
    ]
    names = [name.removesuffix(".weight") for name in weights if name.removesuffix(".weight").endswith(keys)]
    tensors, expected = {}, dict(weights)
    for name in [*names, "text_embeddings"]:
        w = weights[f"{name}.weight"]
        base = nn.Embedding(*w.shape) if "embeddings" in name else nn.Linear(*w.shape[::-1], bias=False)
        base.weight = w
        layer = (embedding if "embeddings" in name else linear).from_base(base, r=2, scale=0.7)
        layer.lora_a, layer.lora_b = mx.random.normal(layer.lora_a.shape), mx.random.normal(layer.lora_b.shape)
        if kind == "dora":
            layer.m = layer.m * 1.5
        tensors |= {f"{name}.{part}": w for part, w in layer.parameters().items() if isinstance(w, mx.array)}
        expected[f"{name}.weight"] = layer.fuse().weight
    tensors["audio_head"] = mx.stack([weights[f"audio_head.{i}.weight"].T + 1 for i in range(3)])  # trained as a whole
    expected |= {f"audio_head.{i}.weight": weights[f"audio_head.{i}.weight"] + 1 for i in range(3)}
    settings = {"lora_parameters": {"rank": 2, "scale": 0.7, "dropout": 0.0, "keys": keys}, "fine_tune_type": kind}
    for form in (settings, {"lora_parameters": {"rank": 2, "alpha": 1.4}}):
        changed = adapters.apply_adapter(weights, adapters.adapter_to_native(NATIVE, form, tensors))
        assert changed.keys() == expected.keys()
        assert all(mx.allclose(changed[name], w, atol=1e-5) for name, w in expected.items())
    full = adapters.adapter_to_native(NATIVE, {"fine_tune_type": "full"}, weights)
    same(adapters.apply_adapter({name: w + 1 for name, w in weights.items()}, full), weights)


def test_parts_and_sums_of_adapters():
    """Two halves of an adapter add up to it; part of a DoRA lies between; errors name what does not fit."""
    weights = csm.split_heads(random_weights(NATIVE))
    adapter, tensors = our_adapter(NATIVE)
    changes = adapters.adapter_to_native(NATIVE, adapter, tensors)
    assert mx.allclose(changes["codebook0_head.lora_b"], 2 * tensors["codebook0_head.lora_b"])
    whole, half = adapters.apply_adapter(weights, changes), adapters.apply_adapter(weights, changes, 0.5)
    twice = adapters.apply_adapter(half, changes, 0.5)
    a, b = tensors["projection.lora_a"], tensors["projection.lora_b"]
    assert mx.allclose(whole["projection.weight"], weights["projection.weight"] + 2 * (a @ b).T, atol=1e-5)
    assert all(mx.allclose(twice[name], w, atol=1e-4) for name, w in whole.items())
    changes = adapters.adapter_to_native(NATIVE, *our_adapter(NATIVE, dora=True))
    whole, half = adapters.apply_adapter(weights, changes), adapters.apply_adapter(weights, changes, 0.5)
    assert all(mx.allclose(half[name], (weights[name] + w) / 2, atol=1e-4) for name, w in whole.items())
    lengths = mx.linalg.norm(whole["projection.weight"], axis=1)
    assert mx.allclose(lengths, changes["projection.lora_m"], atol=1e-4)
    assert whole["backbone.norm.weight"] is weights["backbone.norm.weight"]
    for wrong in ({"projection.weight": weights["projection.weight"][1:]}, {"projection.weight": None}):
        other = {name: w for name, w in (weights | wrong).items() if w is not None}
        with pytest.raises(ValueError, match="another model, or a quantized one: projection does not fit"):
            adapters.apply_adapter(other, changes)
    for adapter, match in (
        ({}, "not of finetune, PEFT or csm-mlx"),
        ({"r": 2, "lora_alpha": 2}, "projection.lora_a is of an unknown kind"),
    ):
        with pytest.raises(ValueError, match=match):
            adapters.adapter_to_native(NATIVE, adapter, {"projection.lora_a": a})
