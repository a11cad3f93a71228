"""Attention processors of diffusers that hand a layer's probability maps to prompt-to-prompt control.

A processor is stateless and installed once; the control travels with each call of the UNet, as
`cross_attention_kwargs={"control": …}`. Where nothing is edited or stored, diffusers' fused attention runs.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from switti.diffusion.attention_control import AttentionControl, Place

PLACES: dict[str, Place] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


class ControlledAttention:
    """Processor of one layer.

    plain: diffusers' own processor. name: as in the UNet's `attn_processors`, from which the layer's place follows.
    """

    def __init__(self, plain: Callable[..., Tensor], name: str) -> None:
        self.plain, self.layer = plain, name
        self.place = PLACES[name.split(".")[0]]
        self.is_cross = ".attn2." in name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        control: AttentionControl | None = None,
    ) -> Tensor:
        """hidden_states [R, P, D]; a UNet's transformer blocks have neither spatial nor group norms in attention."""
        if control is None or not control.wants(self.is_cross, self.place, hidden_states.shape[1]):
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(states)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        maps = attn.get_attention_scores(query, key, attention_mask)
        maps_RKPT = maps.unflatten(0, (len(hidden_states), attn.heads))
        maps = control(maps_RKPT, self.is_cross, self.place, self.layer).flatten(0, 1)
        out = attn.batch_to_head_dim(maps @ value)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def install_control(unet: Any, plain: Callable[[], Callable[..., Tensor]]) -> None:
    """A processor of this kind at every attention layer of a UNet. plain: makes diffusers' own."""
    unet.set_attn_processor({name: ControlledAttention(plain(), name) for name in unet.attn_processors})
