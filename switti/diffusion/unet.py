"""One UNet with two LoRA adapters, `encode` and `decode`; without them it is the teacher (Section 3.1, Appendix A).

The released models are two complete UNets; one base with two adapters needs half of their memory. Needs diffusers and
peft, the extra `diffusion`.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from switti.diffusion.attention_control import AttentionControl
from switti.diffusion.attention_processor import install_control
from switti.diffusion.guidance_embedding import guidance_embedding
from switti.diffusion.objective import Condition, NoisePredictor
from switti.errors import UserError

Role = Literal["encode", "decode", "teacher"]
ADAPTERS: tuple[Role, ...] = ("encode", "decode")
# By suffix of the module's name; embeddings, norms, first and last convolution stay as they are.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
RANK, ALPHA = 64, 8


class InvertibleUNet:
    """A frozen UNet2DConditionModel and its adapters, each of which starts as the teacher itself (B = 0).

    rank, alpha: of the adapters; their output is scaled by alpha / rank. targets: suffixes of the adapted modules.
    The UNet is changed in place: adapters and attention processors are added.
    """

    def __init__(
        self, unet: Any, rank: int = RANK, alpha: float = ALPHA, targets: Sequence[str] = TARGETS
    ) -> None:
        lora_config, plain = _libraries()
        if getattr(unet, "peft_config", None):
            raise UserError(f"the UNet has adapters {', '.join(unet.peft_config)} already; give one without")
        unet.requires_grad_(False)
        config = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), "init_lora_weights": True}
        with warnings.catch_warnings():
            # peft warns of a second adapter, which is meant.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name in ADAPTERS:
                unet.add_adapter(lora_config(**config), adapter_name=name)
        install_control(unet, plain)
        self.unet, self.rank, self.alpha, self.targets = unet, rank, alpha, tuple(targets)
        self._active: Role | None = None
        self._parameters = {
            name: {
                key.replace(f".{name}.", "."): parameter
                for key, parameter in unet.named_parameters()
                if ".lora_" in key and f".{name}." in key
            }
            for name in ADAPTERS
        }
        self._activate("decode")

    @property
    def guidance_width(self) -> int | None:
        """Width of the guidance embedding that the UNet takes; None if it takes none."""
        return self.unet.config.time_cond_proj_dim

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """An adapter's weights: `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
        return self._parameters[role]

    def fill(self, role: Role, state: Mapping[str, Tensor]) -> None:
        """Copy weights whose keys and shapes were checked."""
        with torch.no_grad():
            for key, parameter in self._parameters[role].items():
                parameter.copy_(state[key])

    def predictor(self, role: Role, control: AttentionControl | None = None) -> NoisePredictor:
        """ε of a student, or of the teacher. control: of one trajectory; its `after_step` advances it."""

        def predict(
            x_BCHW: Tensor, time_B: Tensor, condition: Condition, guidance_B: Tensor | None
        ) -> Tensor:
            self._activate(role)
            return self._predict(x_BCHW, time_B, condition, guidance_B, control)

        return predict

    def _predict(
        self,
        x_BCHW: Tensor,
        time_B: Tensor,
        condition: Condition,
        guidance_B: Tensor | None,
        control: AttentionControl | None,
    ) -> Tensor:
        self._check(x_BCHW, condition, guidance_B)
        dtype = self.unet.dtype
        embedding = None
        if guidance_B is not None:
            embedding = guidance_embedding(guidance_B, self.guidance_width or 0).to(dtype)
        epsilon_BCHW = self.unet(
            x_BCHW.to(dtype),
            time_B,
            encoder_hidden_states=condition.text_BLD.to(dtype),
            timestep_cond=embedding,
            added_cond_kwargs=dict(condition.added) or None,
            cross_attention_kwargs=None if control is None else {"control": control},
            return_dict=False,
        )[0]
        return epsilon_BCHW.to(torch.promote_types(dtype, torch.float32))

    def _check(self, x_BCHW: Tensor, condition: Condition, guidance_B: Tensor | None) -> None:
        config = self.unet.config
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != config.in_channels:
            raise UserError(
                f"latents have shape {list(x_BCHW.shape)}, the UNet takes [rows, {config.in_channels}, height, width]; "
                "encode the image with the UNet's own VAE"
            )
        width, cross = condition.text_BLD.shape[-1], config.cross_attention_dim
        if isinstance(cross, int) and width != cross:
            raise UserError(
                f"text embeddings are {width} wide, the UNet takes {cross}; embed with its own text encoder"
            )
        if guidance_B is not None and self.guidance_width is None:
            raise UserError(
                "the UNet has no guidance embedding (time_cond_proj_dim is null); give embed_guidance=False, or a UNet "
                "with distilled guidance"
            )

    def _activate(self, role: Role) -> None:
        """Both adapters stay trainable, whichever is active: peft freezes the inactive one, whose gradients of an
        earlier forward pass would be lost."""
        if role == self._active:
            return
        if role == "teacher":
            self.unet.disable_adapters()
        else:
            self.unet.enable_adapters()
            self.unet.set_adapter(role)
        for parameters in self._parameters.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self._active = role


def _libraries() -> tuple[Any, Any]:
    """(peft's LoraConfig, diffusers' attention processor). Raises UserError where they are missing."""
    try:
        from diffusers.models.attention_processor import AttnProcessor2_0
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(
            f"diffusion models need diffusers and peft ({error}): pip install 'switti[diffusion]'"
        ) from error
    return LoraConfig, AttnProcessor2_0
