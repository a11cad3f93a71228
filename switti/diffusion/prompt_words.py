"""Words of a prompt and their tokens: token maps between prompts for prompt-to-prompt editing (arXiv 2208.01626).

Shape suffixes: E edited prompts, T tokens of a prompt, S tokens of the source.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switti.errors import UserError

CONTEXT = 77


@dataclass(frozen=True)
class PromptTokens:
    """A prompt split at blanks. ids: with start and end tokens. positions: of each word's tokens within them."""

    prompt: str
    words: tuple[str, ...]
    ids: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]
    context: int = CONTEXT

    @classmethod
    def of(
        cls,
        prompt: str,
        tokenize: Callable[[str], Sequence[int]],
        start: int,
        end: int,
        context: int = CONTEXT,
    ) -> "PromptTokens":
        """tokenize: ids of one word. Raises UserError for a prompt that exceeds the text encoder's context."""
        words, ids, positions = tuple(prompt.split()), [start], []
        for word in words:
            pieces = list(tokenize(word))
            positions.append(tuple(range(len(ids), len(ids) + len(pieces))))
            ids += pieces
        ids.append(end)
        if len(ids) > context:
            raise UserError(
                f"prompt {prompt!r} has {len(ids)} tokens with start and end, the text encoder's context is {context}; "
                "shorten it"
            )
        return cls(prompt, words, tuple(ids), tuple(positions), context)

    def tokens_of(self, words: Collection[str]) -> list[int]:
        """Positions of all tokens of these words. Raises UserError for a word that the prompt lacks."""
        for word in words:
            if word not in self.words:
                raise UserError(
                    f"prompt {self.prompt!r} does not hold the word {word!r}; it has {' '.join(self.words)}"
                )
        return [
            position
            for word, places in zip(self.words, self.positions, strict=True)
            if word in words
            for position in places
        ]


def replacement_map(source: PromptTokens, target: PromptTokens, *, compatible: bool = False) -> Tensor:
    """M [S, T] that carries the source's attention to a prompt with other words at the same places.

    A changed word's s source tokens go to its e target tokens one by one if s = e, otherwise each spreads 1/e over all
    of them.

    Args:
        compatible: as published, behind the last changed word tokens keep their position; by default they are shifted
            by e − s, which differs only for words of unequal token counts.
    """
    if len(source.words) != len(target.words):
        raise UserError(
            f"prompts {source.prompt!r} ({len(source.words)} words) and {target.prompt!r} ({len(target.words)}) must "
            "have equally many words for control 'replace'; take 'refine' for prompts with words added"
        )
    changed = [
        (old, new)
        for old, new, a, b in zip(source.positions, target.positions, source.words, target.words, strict=True)
        if a != b
    ]
    map_ST = torch.zeros(source.context, target.context)
    i = j = 0
    while i < source.context and j < target.context:
        if changed and i == changed[0][0][0]:
            old, new = changed.pop(0)
            if len(old) == len(new):
                map_ST[list(old), list(new)] = 1.0
            else:
                map_ST[old[0] : old[-1] + 1, new[0] : new[-1] + 1] = 1.0 / len(new)
            i, j = i + len(old), j + len(new)
        else:
            map_ST[j if compatible and not changed else i, j] = 1.0
            i, j = i + 1, j + 1
    return map_ST


def refinement_map(source: PromptTokens, target: PromptTokens) -> tuple[Tensor, Tensor]:
    """(source position of each target token [T], −1 where there is none; 1 where there is one, else 0 [T]).

    Global alignment of the token ids: gap 0, match 1, mismatch −1; ties prefer left, then up, then the diagonal.
    """
    x, y = source.ids, target.ids
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    move = [["left"] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i in range(1, len(x) + 1):
        move[i][0] = "up"
        for j in range(1, len(y) + 1):
            left, up = score[i][j - 1], score[i - 1][j]
            diagonal = score[i - 1][j - 1] + (1 if x[i - 1] == y[j - 1] else -1)
            score[i][j] = max(left, up, diagonal)
            move[i][j] = "left" if score[i][j] == left else "up" if score[i][j] == up else "diagonal"
    index_T = torch.arange(target.context)
    i, j = len(x), len(y)
    while i > 0 or j > 0:
        if move[i][j] == "diagonal":
            i, j = i - 1, j - 1
            index_T[j] = i
        elif move[i][j] == "left":
            j -= 1
            index_T[j] = -1
        else:
            i -= 1
    return index_T, (index_T >= 0).float()


def equalizer(target: PromptTokens, factors: Mapping[str, float]) -> Tensor:
    """Factor of each token's attention [T]: 1, or a word's own."""
    factor_T = torch.ones(target.context)
    for word, factor in factors.items():
        factor_T[target.tokens_of([word])] = factor
    return factor_T


Bounds = float | tuple[float, float]


def time_mask(
    steps: int, bounds: Bounds, targets: Sequence[PromptTokens], by_word: Mapping[str, Bounds] | None = None
) -> Tensor:
    """[n + 1, E, T]: 1 in the steps in which a token's attention is controlled; row n is never used.

    bounds: share of the steps, (from, to), or the latter alone. by_word: other bounds of single words.
    """
    context = targets[0].context
    mask_NET = torch.zeros(steps + 1, len(targets), context)
    mask_NET[_steps_within(steps, bounds)] = 1.0
    for word, own in (by_word or {}).items():
        holders = [target for target in targets if word in target.words]
        if not holders:
            raise UserError(
                f"none of the edited prompts holds the word {word!r}, whose time bounds are given"
            )
        for number, target in enumerate(targets):
            if word in target.words:
                tokens = target.tokens_of([word])
                mask_NET[:, number, tokens] = 0.0
                mask_NET[_steps_within(steps, own), number, tokens[0] : tokens[-1] + 1] = 1.0
    return mask_NET


def _steps_within(steps: int, bounds: Bounds) -> slice:
    low, high = (0.0, bounds) if isinstance(bounds, float | int) else bounds
    return slice(int(low * (steps + 1)), int(high * (steps + 1)))
