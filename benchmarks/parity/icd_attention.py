"""Golden check of prompt-to-prompt control: word maps, time masks, edited attention maps, local blending."""

import torch

from benchmarks.parity.common import Golden, Settings, TensorFile, equal
from switti.diffusion.attention_control import (
    AttentionControl,
    CrossEdit,
    LocalBlend,
    Refine,
    Replace,
    Reweight,
)
from switti.diffusion.prompt_words import PromptTokens, equalizer, time_mask

TOLERANCE = 1e-6
ATTENTION = "attention.safetensors"
PIECE, START, END = 4, 1, 2


class ToyTokenizer:
    """Words cut in pieces of four letters; ids from the folder's settings."""

    def __init__(self, golden: Golden) -> None:
        self.ids: Settings = golden.meta["tokenizer"]["pieces"]

    def __call__(self, prompt: str) -> PromptTokens:
        return PromptTokens.of(prompt, self._pieces, START, END)

    def all(self, prompts: list[str]) -> list[PromptTokens]:
        return [self(prompt) for prompt in prompts]

    def _pieces(self, word: str) -> list[int]:
        return [self.ids[word[k : k + PIECE]] for k in range(0, len(word), PIECE)]


def cross_edit(name: str, prompts: list[PromptTokens], reweight: tuple[str, float]) -> CrossEdit:
    """Of a golden controller: replace… or refine…, and then _reweight."""
    kind, _, more = name.partition("_")
    inner: CrossEdit
    if kind.startswith("replace"):
        inner = Replace.of(prompts, compatible=True)
    elif kind.startswith("refine"):
        inner = Refine.of(prompts)
    else:
        raise ValueError(f"controller {name} is not known")
    if more != "reweight":
        return inner
    word, factor = reweight
    return Reweight(inner, torch.stack([equalizer(target, {word: factor}) for target in prompts[1:]]))


def prompts_of(name: str, meta: Settings) -> list[str]:
    """A golden case's prompts are those of its longest name: refine_reweight's are refine's."""
    prompts = meta["prompts"]
    return prompts[name] if name in prompts else prompts[name.split("_")[0]]


def check_attention(golden: Golden) -> None:
    """Everything but the network that makes the maps."""
    file = golden.tensors(ATTENTION, "icd.attention.", raw=True)
    tokenizer = ToyTokenizer(golden)
    with golden.part("icd.attention.map"):
        _check_maps(golden, file, tokenizer)
    with golden.part("icd.attention.time_alpha"):
        _check_times(golden, file, tokenizer)
    for name, shares in golden.meta["controllers"].items():
        # The others are the number of heads, of steps, and words about them.
        if isinstance(shares, list):
            with golden.part(f"icd.attention.ctrl/{name}"):
                _check_control(golden, file, tokenizer, name, *shares)
    with golden.part("icd.attention.blend"):
        _check_blend(golden, file, tokenizer)
    file.finish()


def _check_maps(golden: Golden, file: TensorFile, tokenizer: ToyTokenizer) -> None:
    prompts = golden.meta["prompts"]
    for name in ("replace", "replace3"):
        replace = Replace.of(tokenizer.all(prompts[name]), compatible=True)
        file.close(f"map/{name}", replace.map_EST, TOLERANCE)
    targets = tokenizer.all(prompts["refine"])
    refine = Refine.of(targets)
    file.equal("map/refine", refine.index_ET)
    file.close("map/refine_alpha", refine.aligned_ET, TOLERANCE)
    word, factor = prompts["reweight"]
    file.close("map/equalizer", equalizer(targets[1], {word: factor})[None], TOLERANCE)
    for key, positions in (golden.wanted(golden.meta, "word_indices") or {}).items():
        prompt, word = key.split(" | ")
        actual = torch.tensor(tokenizer(prompt).tokens_of([word]))
        golden.add(equal(f"icd.attention.word_indices/{key}", actual, torch.tensor(positions)))


def _check_times(golden: Golden, file: TensorFile, tokenizer: ToyTokenizer) -> None:
    targets = tokenizer.all(golden.meta["prompts"]["replace"])[1:]
    for key in file.starting("time_alpha/"):
        name = key.removeprefix("time_alpha/")
        if name == "word":
            settings = dict(golden.meta["prompts"]["time_alpha_word"])
            steps, bounds = settings.pop("steps"), settings.pop("default_")
            by_word = {word: tuple(values) for word, values in settings.items()}
            mask = time_mask(steps, bounds, targets, by_word)
        else:
            count, _, share = name.partition("_")
            low, _, high = share.partition("to")
            mask = time_mask(int(count), (float(low), float(high)) if high else float(low), targets)
        file.close(key, mask[:, 0], TOLERANCE)


def _check_control(
    golden: Golden, file: TensorFile, tokenizer: ToyTokenizer, name: str, cross: float, own: float
) -> None:
    prompts = tokenizer.all(prompts_of(name, golden.meta))
    settings = golden.meta["controllers"]
    heads, steps = settings["heads"], settings["steps"]
    edit = cross_edit(name, prompts, tuple(golden.meta["prompts"]["reweight"]))
    control = AttentionControl.of(steps, edit, time_mask(steps, cross, prompts[1:]), own)
    sums: dict[str, torch.Tensor] = {}
    for step in range(steps):
        for kind in ("self", "cross"):
            maps = file[f"ctrl/{name}/{kind}_in_{step}"]
            maps = maps[len(maps) // 2 :]
            maps_RKPT = maps.reshape(len(prompts), heads, *maps.shape[1:])
            out = control(maps_RKPT, kind == "cross", "up" if kind == "cross" else "down", "layer").flatten(
                0, 1
            )
            file.close(f"ctrl/{name}/{kind}_out_{step}", out, TOLERANCE)
            sums[kind] = sums.get(kind, torch.zeros(())) + out
        control.after_step(torch.zeros(1), step)
    for kind, total in sums.items():
        file.close(f"ctrl/{name}/average_{kind}", total / steps, TOLERANCE)


def _check_blend(golden: Golden, file: TensorFile, tokenizer: ToyTokenizer) -> None:
    """The thresholds and starts of the released scripts' cases."""
    settings = golden.meta["blend"]
    prompts, words = tokenizer.all(golden.meta["prompts"]["replace"]), settings["words"]
    maps = [layer[:, None] for layer in file["blend/maps"].float()]
    x = file["blend/x"]
    file.close("blend/out", LocalBlend.of(prompts, words)(x, maps, 0, 4), TOLERANCE)
    late = LocalBlend.of(prompts, words, threshold=0.4, subtract_threshold=0.3, start=0.5)
    for call in (1, 2, 3):
        file.close(f"blend/out_late_{call}", late(x, maps, call - 1, 4), TOLERANCE)
    subtract = LocalBlend.of(prompts, words, [[settings["subtract"]]] * len(prompts))
    file.close("blend/out_subtract", subtract(x, maps, 0, 4), TOLERANCE)
