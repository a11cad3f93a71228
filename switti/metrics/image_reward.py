"""ImageReward v1 (arXiv 2304.05977): a reward head on BLIP's [CLS], with transformers' own BLIP classes.

Value: (MLP([CLS]) − 0.16717) / 1.03334, mean over images; prompts are padded or cut to 35 tokens; images are resized by
bicubic filtering so that the shorter side has 224 px, and cropped in the middle.

Shape suffixes: B images with one caption each, D width of the text encoder.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from switti.errors import UserError, first_line
from switti.files import kind_of, read_json_object
from switti.metrics.config import MetricsConfig
from switti.metrics.scores import MeanScore
from switti.text.quiet import quiet_transformers
from switti.weights.torch_files import check_torch_file

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
PROMPT_TOKENS = 35
WEIGHTS, TEXT_CONFIG = "ImageReward.pt", "med_config.json"
# CLIP's, per channel.
_PIXEL_MEAN, _PIXEL_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64
_MAX_JSON = 1 << 20

# Names in the published file → names in transformers' classes, tried in turn.
_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layers.\1.layer_norm1."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layers.\1.layer_norm2."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)
_VISUAL, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."


class RewardHead(nn.Module):
    """[CLS] [B, D] → raw reward [B]: five linear maps without activations; dropout between them when it was trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = ((width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))
        # Numbered as published; dropout stands at 1, 3 and 5.
        places = ("0", "2", "4", "6", "7")
        self.layers = nn.ModuleDict(
            {place: nn.Linear(*size) for place, size in zip(places, sizes, strict=True)}
        )

    def forward(self, x_BD: Tensor) -> Tensor:
        for layer in self.layers.values():
            x_BD = layer(x_BD)
        return x_BD[:, 0]


class ImageReward:
    """Images and their captions → rewards; all parts injected.

    vision, text: transformers' BlipVisionModel and BlipTextModel. tokenizer: BERT's, uncased.
    """

    def __init__(
        self, vision: Any, text: Any, head: RewardHead, tokenizer: Any, device: torch.device | str = "cpu"
    ) -> None:
        self.vision, self.text, self.head = (
            part.eval().requires_grad_(False).to(device) for part in (vision, text, head)
        )
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        side = vision.config.image_size
        self.transform = v2.Compose(
            [
                v2.Resize(side, v2.InterpolationMode.BICUBIC),
                v2.CenterCrop(side),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(_PIXEL_MEAN, _PIXEL_DEVIATION),
            ]
        )

    @torch.no_grad()
    def score(self, images_B3HW: Tensor, captions: list[str]) -> Tensor:
        """uint8 images with one caption each → [B]."""
        pixels = torch.stack([self.transform(to_pil_image(image)) for image in images_B3HW.cpu()])
        seen = self.vision(pixel_values=pixels.to(self.device)).last_hidden_state
        words = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
        ).to(self.device)
        hidden = self.text(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        return (self.head(hidden[:, 0].float()) - MEAN) / DEVIATION


def load_image_reward(
    source: str, tokenizer: str = "google-bert/bert-base-uncased", device: torch.device | str = "cpu"
) -> ImageReward:
    """From a folder with ImageReward.pt and med_config.json; tokenizer: a folder or hub id.

    Raises:
        UserError: a file is missing or does not hold this network.
    """
    from transformers import BertTokenizer

    setting, folder = f"metrics.image_reward={source}", Path(source).expanduser()
    for name in (WEIGHTS, TEXT_CONFIG):
        if kind_of(folder / name) != "file":
            raise UserError(
                f"{setting}: {folder / name} is missing; download {WEIGHTS} and {TEXT_CONFIG} of the hub's "
                "zai-org/ImageReward into one folder"
            )
    try:
        check_torch_file(folder / WEIGHTS)
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        vision, text, head = build_networks(state, read_json_object(folder / TEXT_CONFIG, _MAX_JSON))
    except (RuntimeError, OSError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{setting} does not hold ImageReward's weights ({first_line(error)})") from error
    local = Path(tokenizer).expanduser()
    try:
        with quiet_transformers():
            words = BertTokenizer.from_pretrained(
                str(local) if local.is_dir() else tokenizer, local_files_only=local.is_dir()
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"metrics.image_reward_tokenizer={tokenizer} cannot be loaded ({first_line(error)}); give a folder with "
            "vocab.txt of bert-base-uncased"
        ) from error
    return ImageReward(vision, text, head, words, device)


def build_image_reward(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, MeanScore]:
    """As `metrics.names` builds it."""
    scorer = load_image_reward(str(config.image_reward), config.image_reward_tokenizer, device)
    return "image_reward", MeanScore(scorer)


def build_networks(
    state: Mapping[str, Tensor], text_config: Mapping[str, Any]
) -> tuple[Any, Any, RewardHead]:
    """The three networks with the published file's weights. The vision part's sizes follow from its weights."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    patch = state[f"{_VISUAL}patch_embed.proj.weight"]
    width, side = patch.shape[0], patch.shape[-1]
    tokens = state[f"{_VISUAL}pos_embed"].shape[1] - 1
    depth = 1 + max(
        int(match[1]) for name in state if (match := re.match(rf"{re.escape(_VISUAL)}blocks\.(\d+)\.", name))
    )
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state[f"{_VISUAL}blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=depth,
            num_attention_heads=max(1, width // _HEAD_WIDTH),
            image_size=round(tokens**0.5) * side,
            patch_size=side,
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=state[f"{_TEXT}embeddings.word_embeddings.weight"].shape[0],
            hidden_size=text_config["hidden_size"],
            encoder_hidden_size=width,
            intermediate_size=text_config["intermediate_size"],
            num_hidden_layers=text_config["num_hidden_layers"],
            num_attention_heads=text_config["num_attention_heads"],
            max_position_embeddings=text_config["max_position_embeddings"],
            layer_norm_eps=text_config.get("layer_norm_eps", 1e-12),
        ),
        add_pooling_layer=False,
    )
    head = RewardHead(text_config["hidden_size"])
    for network, part in (
        (vision, {_renamed(k.removeprefix(_VISUAL)): v for k, v in state.items() if k.startswith(_VISUAL)}),
        (text, {k.removeprefix(_TEXT): v for k, v in state.items() if k.startswith(_TEXT)}),
        (head, {k.removeprefix(_HEAD): v for k, v in state.items() if k.startswith(_HEAD)}),
    ):
        part.pop("embeddings.position_ids", None)
        missing, foreign = network.load_state_dict(part, strict=False)
        missing = [name for name in missing if not name.endswith("position_ids")]
        if missing or foreign:
            raise ValueError(f"{(missing or foreign)[0]} is {'missing' if missing else 'unknown'}")
    return vision, text, head


def _renamed(name: str) -> str:
    for pattern, replacement in _VISION:
        changed, count = re.subn(rf"^{pattern}", replacement, name)
        if count:
            return changed
    return name
