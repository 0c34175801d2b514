"""Models other than BLIP, small and with random weights, written as the hub's checkpoints are."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

WORDS = """
a an the of on in with and two red green blue yellow black white circle square cross shape dot line small large
picture photo image drawing text user assistant describe dog cat house car sky water
"""
SPECIAL = ("<s>", "<pad>", "<unk>", "</s>", "<image>")
BOS, PAD, UNK, EOS, IMAGE = range(5)
TOKENS = (*SPECIAL, *WORDS.split(), *string.ascii_lowercase[1:], *string.digits, *string.punctuation)

CHAT = (
    "{% for m in messages %}user : {% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}"
    " {{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)


def tokenizer(*, ends: bool, marks_image: bool = False) -> PreTrainedTokenizerFast:
    """Words, letters and marks.

    Args:
        ends: puts </s> last, as a text encoder wants it.
        marks_image: knows <image> as the image's place, as LLaVA's does.
    """
    made = Tokenizer(models.WordLevel({token: n for n, token in enumerate(TOKENS)}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    single = "<s> $A </s>" if ends else "<s> $A"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    special = {"image_token": "<image>"} if marks_image else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=special,
    )


VOCABULARY = len(TOKENS) + 3  # as checkpoints have it, padded to a round number
_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, **_LAYERS}
_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SIZE = {"height": 32, "width": 32}


def _loud(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough for captions and scores that differ between images."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                scale = 0.5 if "embed" in name or "lm_head" in name else 1 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def write_blip2(directory: Path) -> Path:
    """BLIP-2 with OPT."""
    vision = Blip2VisionConfig(image_size=32, patch_size=8, initializer_range=0.02, **_TOWER)
    qformer = Blip2QFormerConfig(
        vocab_size=VOCABULARY, encoder_hidden_size=32, cross_attention_frequency=1, **_TOWER, pad_token_id=PAD
    )
    text = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=96,
        tie_word_embeddings=False,  # tied, it writes the same token again and again
        **_LAYERS, **_IDS,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=IMAGE
    )
    model = Blip2ForConditionalGeneration(config).eval()
    _loud(model, 1)
    model.save_pretrained(directory)
    processor = Blip2Processor(BlipImageProcessorPil(size=_SIZE), tokenizer(ends=False), num_query_tokens=4)
    processor.save_pretrained(directory)
    return directory


def write_llava(directory: Path) -> Path:
    """LLaVA: CLIP and Llama; its chat template goes with it."""
    text = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, num_key_value_heads=2, **_TOWER, **_IDS)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **_TOWER)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    _loud(model, 2)
    model.save_pretrained(directory)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIZE),
        tokenizer(ends=False, marks_image=True),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(directory)
    return directory


def write_clip(directory: Path) -> Path:
    """CLIP."""
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, **_TOWER, **_IDS}
    config = CLIPConfig(
        text_config=text, vision_config={"image_size": 32, "patch_size": 8, **_TOWER}, projection_dim=16
    )
    return _write_dual(
        CLIPModel(config).eval(), CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIZE), directory
    )


def write_siglip(directory: Path) -> Path:
    """SigLIP."""
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "projection_size": 32, **_TOWER, **_IDS}
    config = SiglipConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **_TOWER})
    return _write_dual(SiglipModel(config).eval(), SiglipImageProcessorPil(size=_SIZE), directory)


def _write_dual(model: Any, images: Any, directory: Path) -> Path:
    _loud(model, 3)
    model.save_pretrained(directory)
    images.save_pretrained(directory)
    tokenizer(ends=True).save_pretrained(directory)
    return directory
