"""python -m experiments.analyse KIND RUN|FOLDER|HUB-ID "prompt" … [--out DIR] [key=value …] [-- "a=b"]

Analyses of the paper on any generator, as plots and tables in DIR.

caption-attention   how much each scale attends to each word of the caption (Figure 7)
scale-attention     how a causal model divides its attention among scales (Figure 13)
prompt-switch       the first prompt until a scale, the second one from there on, for every scale (Figure 8)
guidance-off        guidance switched off at one range of scales after the other (Figure 16)

A word is a setting if it is name=value without blanks; anything after -- is a prompt.
"""

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli import argument_parser, parse_with_prompts, run
from switti.errors import UserError
from switti.files import atomic_write, check_output_folder
from switti.tables import write_csv

if TYPE_CHECKING:
    from torch import Tensor

    from switti.sampling.attention_analysis import CaptionAttention, ScaleAttention
    from switti.sampling.guidance import GuidanceSchedule
    from switti.sampling.pipeline import SwittiPipeline
    from switti.sampling.sampler import PromptSwitch

# Of images in a sheet.
COLUMNS = 3
# Of width: on a phone, 390 px wide, letters are 10 px high.
PLOT_INCHES = 5.2
KINDS = ("caption-attention", "scale-attention", "prompt-switch", "guidance-off")


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("run", type=Path, help="run folder, checkpoint, exported folder or hub id")
    parser.add_argument("prompts", nargs="*", metavar="prompt or key=value")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="folder (%(default)s)")
    parser.add_argument(
        "--width", type=int, default=2, help="scales in a range of guidance-off (%(default)s)"
    )
    options, prompts, settings = parse_with_prompts(parser, argv)
    if not prompts:
        raise UserError("no prompt given")
    if options.kind == "prompt-switch" and len(prompts) != 2:
        raise UserError(f"prompt-switch needs two prompts, got {len(prompts)}")
    if options.width < 1:
        raise UserError(f"--width {options.width} must be at least 1")

    check_output_folder(options.out)

    from configs.load_run import open_pipeline

    pipeline, _ = open_pipeline(options.run, settings)
    if options.kind == "scale-attention" and pipeline.generator.config.visibility != "causal":
        raise UserError(
            "scale-attention needs a causal model: in a non-causal one each scale sees itself alone"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    draw = {
        "caption-attention": caption_attention,
        "scale-attention": scale_attention,
        "prompt-switch": prompt_switch,
        "guidance-off": lambda p, prompts, out: guidance_off(p, prompts, out, options.width),
    }
    for path in draw[options.kind](pipeline, prompts, options.out):
        print(path)
    return 0


def sample(
    pipeline: "SwittiPipeline",
    prompts: list[str],
    recorder: "CaptionAttention | ScaleAttention | None" = None,
    schedule: "GuidanceSchedule | None" = None,
    switch: "PromptSwitch | None" = None,
) -> "Tensor":
    """Images [B, 3, H, W] in [0, 1] of all prompts in one batch, seeds 0, 1, …"""
    from contextlib import nullcontext

    import torch

    from switti.sampling.attention_analysis import recording
    from switti.sampling.config import PruningConfig
    from switti.sampling.noise import ImageNoise
    from switti.sampling.sampler import sample_latent

    device = pipeline.device
    text = pipeline.text_encoder.encode(prompts).to(device)
    null = pipeline.text_encoder.encode([""]).to(device)
    noise = ImageNoise(list(range(len(prompts))), device)
    # Maps of attention are of all tokens.
    whole = replace(pipeline.sampling, pruning=PruningConfig())
    watch = nullcontext() if recorder is None else recording(pipeline.generator, recorder)
    with torch.no_grad(), watch, torch.autocast(device.type, torch.bfloat16, enabled=pipeline.autocast):
        latent = sample_latent(
            pipeline.generator,
            pipeline.tokenizer,
            text,
            null,
            pipeline.sampling if recorder is None else whole,
            noise,
            switch=switch,
            schedule=schedule,
        )
        image = pipeline.tokenizer.decode(latent)
    return (image.float().clamp(-1, 1) + 1) / 2


def caption_attention(pipeline: "SwittiPipeline", prompts: list[str], out: Path) -> list[Path]:
    """A heat map a prompt: scales by caption tokens."""
    from switti.sampling.attention_analysis import CaptionAttention

    recorder = CaptionAttention(len(prompts))
    sample(pipeline, prompts, recorder)
    shares_NBT = recorder.result()
    names, paths = scale_names(pipeline), []
    for b, prompt in enumerate(prompts):
        words = pipeline.text_encoder.pieces(prompt)
        rows = shares_NBT[:, b, : len(words)].tolist()
        paths += heat_map(out / f"caption_attention_{b:02d}", rows, names, words, "caption", prompt)
    return paths


def scale_attention(pipeline: "SwittiPipeline", prompts: list[str], out: Path) -> list[Path]:
    """One heat map: attending scales by attended scales."""
    from switti.sampling.attention_analysis import ScaleAttention

    recorder = ScaleAttention(pipeline.generator.pyramid, len(prompts))
    sample(pipeline, prompts, recorder)
    rows = recorder.result().tolist()
    names = scale_names(pipeline)
    title = f"mean over {len(prompts)} prompts, all heads and blocks"
    return heat_map(out / "scale_attention", rows, names, names, "attended scale", title)


def scale_names(pipeline: "SwittiPipeline") -> list[str]:
    """What plots, captions and tables call the scales: 1×1, 2×2, …"""
    return [f"{side}×{side}" for side in pipeline.generator.pyramid.sides]


def prompt_switch(pipeline: "SwittiPipeline", prompts: list[str], out: Path) -> list[Path]:
    """One row of images: switched from the first scale on (only the second prompt), the second, …, never."""
    from switti.sampling.sampler import PromptSwitch

    first, second = prompts
    text = pipeline.text_encoder.encode([second]).to(pipeline.device)
    count = pipeline.generator.pyramid.count
    images = [sample(pipeline, [first], switch=PromptSwitch(text, k)) for k in range(count)]
    images.append(sample(pipeline, [first]))
    captions = [f"from {name}: {second}" for name in scale_names(pipeline)] + [f"never: {first}"]
    return [image_rows(out / "prompt_switch.png", images, captions, 1)]


def guidance_off(pipeline: "SwittiPipeline", prompts: list[str], out: Path, width: int) -> list[Path]:
    """A row of images for each prompt: guided everywhere, then unguided at `width` scales from each scale on."""
    from switti.sampling.guidance import GuidanceSchedule

    schedule = GuidanceSchedule.of(pipeline.sampling, pipeline.generator.pyramid)
    names, images, titles = scale_names(pipeline), [sample(pipeline, prompts)], ["guided"]
    for start in range(len(schedule.strengths) - width + 1):
        off = range(start, start + width)
        strengths = tuple(0.0 if k in off else t for k, t in enumerate(schedule.strengths))
        images.append(sample(pipeline, prompts, schedule=replace(schedule, strengths=strengths)))
        titles.append(f"off {names[start]}" + (f"–{names[start + width - 1]}" if width > 1 else ""))
    captions = [f"{title}: {prompt}" for prompt in prompts for title in titles]
    return [image_rows(out / "guidance_off.png", images, captions, len(prompts))]


def image_rows(path: Path, images: list["Tensor"], captions: list[str], prompts: int) -> Path:
    """A captioned sheet, prompt after prompt; images: one batch of all prompts for each setting that is compared.

    At most COLUMNS in a row, so that captions can be read on a phone.
    """
    from PIL import Image

    from switti.sampling.image_grid import captioned_grid, to_pil

    settings = [to_pil(batch) for batch in images]
    columns = min(COLUMNS, len(settings))
    empty = Image.new("RGB", settings[0][0].size, "white")
    filling = -len(settings) % columns  # each prompt begins a row
    cells, texts = [], []
    for row in range(prompts):
        cells += [*(batch[row] for batch in settings), *[empty] * filling]
        texts += [*captions[row * len(settings) : (row + 1) * len(settings)], *[""] * filling]
    with atomic_write(path) as temporary:
        captioned_grid(cells, texts, columns=columns).save(temporary, format="PNG")
    return path


def heat_map(
    stem: Path, rows: list[list[float]], names: list[str], columns: list[str], label: str, title: str
) -> list[Path]:
    """Plot and table of shares by scale. names, columns: of the rows and the columns.

    The table has a row for each scale, the plot a column: so words stand upright and a phone's width is enough.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from switti.sampling.image_grid import drawable

    lines = textwrap.wrap(drawable(title), 48)
    figure, axes = plt.subplots(
        figsize=(PLOT_INCHES, 1.4 + 0.17 * len(lines) + max(1.0, 0.22 * len(columns))), layout="constrained"
    )
    image = axes.imshow(list(zip(*rows, strict=True)), aspect="auto", vmin=0.0, cmap="viridis")
    axes.set(xlabel="scale", ylabel=label)
    # Words of people: no mathematics.
    axes.set_title("\n".join(lines), fontsize=10, parse_math=False)
    axes.set_yticks(range(len(columns)), [drawable(column) for column in columns], parse_math=False)
    slanted = len(names) > 6
    axes.set_xticks(
        range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center",
        rotation_mode="anchor",
    )  # fmt: skip
    figure.colorbar(image, label="share of attention")
    plot, table = stem.with_suffix(".png"), stem.with_suffix(".csv")
    with atomic_write(plot) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
    write_csv(table, [["scale", *columns], *([name, *row] for name, row in zip(names, rows, strict=True))])
    return [plot, table]


if __name__ == "__main__":
    run(main)
