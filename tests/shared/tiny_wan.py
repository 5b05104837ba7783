"""A tiny Wan pipeline with random weights, in the hub's layout.

Contract
- `make` writes it to a folder; both xDiT and FastVideo read it from there. It takes a second.
- `ARGUMENTS` of a generation: 9 frames of 32 x 32 pixels are 12 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = "a the cat dog walks runs in rain sun red blue big small bad quality"
ARGUMENTS: dict[str, Any] = {
    "prompt": "a cat walks in rain", "negative_prompt": "bad quality", "height": 32, "width": 32, "num_frames": 9,
    "guidance_scale": 5.0,
}  # fmt: skip

SCHEDULER: dict[str, Any] = {
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000, "flow_shift": 3.0,
}  # fmt: skip


def make(folder: Path, second: bool = False) -> Path:
    """Write the pipeline to `folder`, with a second transformer if asked for, and return the folder."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=1
    )
    pipe = WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        transformer=_transformer(),
        transformer_2=_transformer() if second else None,
        boundary_ratio=0.5 if second else None,
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=UniPCMultistepScheduler(**SCHEDULER),
    )
    pipe.save_pretrained(folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    known = ("_class_name", "_diffusers_version", *SCHEDULER)  # FastVideo's scheduler does not know all of diffusers'
    scheduler.write_text(json.dumps({name: settings[name] for name in known}))
    return folder


def _transformer() -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=128, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
