"""python -m experiments.sample RUN|CHECKPOINT|FOLDER|HUB-ID "prompt" … [--out grid.png] [key=value …] [-- "a=b"]

Sample images from a trained generator, an exported folder or published weights: a captioned grid, or with --separate
one file per image. Settings are those of `sampling`, such as guidance=6 guidance_stop=5 top_k=100; each file's metadata
contain them with prompt and seed.

A word is a setting if it is name=value without blanks; all words after -- are prompts, also "a=b" or "-1 °C".

    python -m experiments.sample runs/demo/visibility=causal,seed=0 "red heart, twemoji style" --n 4
    python -m experiments.sample yresearch/Switti "a cat in the snow" guidance=6 --separate --out cats
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.cli import argument_parser, parse_with_prompts, run
from switti import arguments
from switti.errors import UserError
from switti.files import check_output, check_output_folder, check_target
from switti.sampling.formats import check_image, format_of, save_image

if TYPE_CHECKING:
    from PIL.Image import Image


def parser() -> argparse.ArgumentParser:
    form = argument_parser(__doc__)
    add = form.add_argument
    add("run", type=Path, help="run folder, checkpoint, exported folder or hub id")
    add("prompts", nargs="*", metavar="prompt or key=value")
    add("--n", default="1", help="images per prompt (%(default)s)")
    add(
        "--seed",
        default="0",
        help="seed of the first image, in [0, 2^64); the next images count up (%(default)s)",
    )
    add("--negative", default="", help="negative prompt: guidance moves away from it")
    add("--switch-prompt", help="prompt of all images from --switch-scale on")
    add("--switch-scale", help="a scale, counted from 0")
    add("--batch", default="8", help="images at a time; the result does not depend on it (%(default)s)")
    add("--out", type=Path, default=Path("samples.png"), help="a .png, .jpg or .webp file (%(default)s)")
    add("--separate", action="store_true", help="write one PNG per image into the folder OUT")
    return form


def main(argv: list[str]) -> int:
    options, prompts, settings = parse_with_prompts(parser(), argv)
    if not prompts:
        raise UserError("no prompt given")
    for name, prompt in (("--negative", options.negative), ("--switch-prompt", options.switch_prompt)):
        if prompt is not None:
            arguments.text(name, prompt)
    if (options.switch_prompt is None) != (options.switch_scale is None):
        raise UserError("--switch-prompt and --switch-scale belong together; give both or none")
    repeats, batch = (arguments.integer(f"--{name}", getattr(options, name), 1) for name in ("n", "batch"))
    switch = (
        None if options.switch_scale is None else arguments.integer("--switch-scale", options.switch_scale, 1)
    )
    first, count = arguments.seed("--seed", options.seed), len(prompts) * repeats
    arguments.seed("--seed + images − 1", first + count - 1)
    seeds = list(range(first, first + count))
    captions = [prompt for prompt in prompts for _ in range(repeats)]
    files = [options.out / f"{seed:05d}.png" for seed in seeds]
    if options.separate:
        check_output_folder(options.out)
        for file in files:
            check_target(file)
    else:
        format_of(options.out)
        check_output(options.out)

    from configs.load_run import open_pipeline
    from switti.sampling.image_grid import captioned_grid, grid_size

    pipeline, origin = open_pipeline(options.run, settings)
    details: dict[str, Any] = {
        **origin,
        "negative_prompt": options.negative,
        "sampling": asdict(pipeline.sampling),
    }
    if switch is not None:
        details |= {"switch_prompt": options.switch_prompt, "switch_scale": switch}
    grid_details = details | {"prompts": captions, "seeds": seeds}
    columns = repeats if repeats > 1 else 8
    if not options.separate:
        side = pipeline.tokenizer.config.resolution
        check_image(options.out, grid_size(count, side, side, columns), grid_details)
    sampled = pipeline(
        prompts,
        num_images_per_prompt=repeats,
        seeds=seeds,
        negative_prompt=options.negative,
        switch_prompts=options.switch_prompt,
        switch_scale=switch,
        batch_size=batch,
        progress=True,
    )
    images = cast("list[Image]", sampled)
    if options.separate:
        for image, file, caption, seed in zip(images, files, captions, seeds, strict=True):
            save_image(image, file, details | {"prompt": caption, "seed": seed})
    else:
        save_image(captioned_grid(images, captions, columns), options.out, grid_details)
    cut = pipeline.text_encoder.truncated
    if cut:
        print(f"note: {cut} captions were cut to text.max_length={pipeline.text_encoder.max_length} tokens")
    print(options.out)
    return 0


if __name__ == "__main__":
    run(main)
